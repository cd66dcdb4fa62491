# SPDX-License-Identifier: Apache-2.0
"""How much attention each key is given: what eviction goes by (H2O), without a score matrix in memory."""

from typing import Any

import torch
from torch import Tensor

from aqua_attention.ops.reference import attention_probabilities, query_blocks


def attention_mass(
    query: Tensor, key: Tensor, selected: Tensor | None, counted: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Probabilities that each key gets from the counted queries, summed over the heads of its group.

    Args:
        query, key, selected, mask: as for `ops.reference.attention_reference`.
        counted: boolean [batch, queries].
        options: `scaling`, and where they matter `sink`, `recent`, `softcap`, `s_aux`, likewise.

    Returns:
        float32 [batch, num_key_value_heads, keys].
    """
    kv_heads, keys = key.shape[1], key.shape[2]
    tall_key = key.to(torch.promote_types(query.dtype, torch.float32)).transpose(-1, -2)
    mass = query.new_zeros((query.shape[0], kv_heads, keys), dtype=torch.float32)
    for block, seen, part in query_blocks(query, keys, mask, options.get("sink", 0), options.get("recent", 0)):
        probabilities = attention_probabilities(
            query[:, :, block],
            lambda tall, seen=seen: tall @ tall_key[..., :seen],  # type: ignore[misc]
            None if selected is None else selected[:, :, block],
            num_key_value_heads=kv_heads,
            keys=seen,
            mask=part,
            **options,
        )
        mass[:, :, :seen] += group_mass(probabilities, kv_heads, counted[:, block])
    return mass


def group_mass(probabilities: Tensor, num_key_value_heads: int, counted: Tensor) -> Tensor:
    """What each key gets from the counted queries of all heads of its group, [batch, num_key_value_heads, keys].

    Args:
        probabilities: [batch, num_attention_heads, queries, keys]; counted: boolean [batch, queries].
    """
    batch, _, _, keys = probabilities.shape
    given = probabilities.masked_fill(~counted[:, None, :, None], 0.0)
    return given.reshape(batch, num_key_value_heads, -1, keys).sum(2).float()
