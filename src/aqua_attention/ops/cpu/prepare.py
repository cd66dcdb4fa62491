# SPDX-License-Identifier: Apache-2.0
"""What comes before decoding attention on a CPU: rotate query and key, choose dimensions, append to the cache."""

from __future__ import annotations

from torch import Tensor, int8, int32

from aqua_attention.config import AquaConfig
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.ops.tiled import Chosen, TiledCache


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TiledCache,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    scaling: float | None = None,
) -> tuple[Tensor, Chosen | None]:
    """`ops.triton.prepare.prepare` in plain torch; the sequences are one longer afterwards, where they have room.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        rotation: float32 [num_key_value_heads, head_dim, kept]; key_rms: float32 [num_key_value_heads, kept].
        config: the selection; its dimensions are shared by a group.

    Returns:
        Rotated queries [batch, num_attention_heads, kept], and what `decode` multiplies; None: every dimension.
    """
    groups = key.shape[1]
    rotated = rotate(query[:, :, None], rotation)
    cache.append(rotate(key[:, :, None], rotation)[:, :, 0], value)
    selected = select_dimensions(rotated, config, query.shape[2], key_rms, scaling)
    rotated = rotated[:, :, 0]
    if selected is None:
        return rotated, None
    # The heads of a group have the same ones.
    mask = selected[:, :: query.shape[1] // groups, 0]
    counts = mask.sum(-1, dtype=int32)
    most = int(counts.max())
    dims = mask.to(int8).sort(dim=-1, descending=True, stable=True).indices[..., :most].to(int32).contiguous()
    return rotated, Chosen(dims, mask.to(int8).contiguous(), counts if config.logit_error is not None else None)
