# SPDX-License-Identifier: Apache-2.0
"""How much attention each key is given: what eviction goes by (H2O), without a score matrix in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aqua_attention.ops.mask import mask_rows
from aqua_attention.ops.reference import attention_probabilities, rows_at_once


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
    batch, _, queries, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    tall_key = key.to(torch.promote_types(query.dtype, torch.float32)).transpose(-1, -2)
    mass = query.new_zeros((batch, groups, keys), dtype=torch.float32)
    rows = rows_at_once(query, keys)
    for start in range(0, queries, rows):
        block = slice(start, min(start + rows, queries))
        # Causal: the keys after the block's last query are hidden from all of it.
        seen = keys if mask is not None else keys - queries + block.stop
        probabilities = attention_probabilities(
            query[:, :, block],
            lambda tall, seen=seen: tall @ tall_key[..., :seen],  # type: ignore[misc]
            None if selected is None else selected[:, :, block],
            groups=groups,
            keys=seen,
            mask=mask_rows(mask, block, sink=options.get("sink", 0), recent=options.get("recent", 0)),
            **options,
        )
        mass[:, :, :seen] += group_mass(probabilities, groups, counted[:, block])
    return mass


def group_mass(probabilities: Tensor, groups: int, counted: Tensor) -> Tensor:
    """What each key gets from the counted queries of all heads of its group, [batch, groups, keys].

    Args:
        probabilities: [batch, num_attention_heads, queries, keys]; counted: boolean [batch, queries].
    """
    batch, _, _, keys = probabilities.shape
    given = probabilities.masked_fill(~counted[:, None, :, None], 0.0)
    return given.reshape(batch, groups, -1, keys).sum(2).float()
