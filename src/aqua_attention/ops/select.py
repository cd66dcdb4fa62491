# SPDX-License-Identifier: Apache-2.0
"""Rotation, and the choice of the dimensions that a query multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from aqua_attention.config import AquaConfig


def rotate(states: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries or keys into the projection's basis: each head by the matrix of its key-value head.

    The product is taken in at least float32, because a rotation rounded to bfloat16 is no longer orthogonal.

    Args:
        states: [batch, heads, length, head_dim]; heads is a multiple of num_key_value_heads.
        rotation: [num_key_value_heads, head_dim, kept], columns by falling variance.

    Returns:
        [batch, heads, length, kept] in the dtype of `states`.
    """
    batch, heads, length, head_dim = states.shape
    groups = rotation.shape[0]
    dtype = torch.promote_types(states.dtype, rotation.dtype)
    # The query heads of one key-value head lie next to each other, so they are one tall matrix for its rotation.
    tall = states.to(dtype).reshape(batch, groups, heads // groups * length, head_dim)
    with torch.autocast(states.device.type, enabled=False):
        return (tall @ rotation.to(dtype)).reshape(batch, heads, length, -1).to(states.dtype)


def select_dimensions(query: Tensor, config: AquaConfig, head_dim: int, key_rms: Tensor) -> Tensor | None:
    """Which dimensions each query multiplies (paper, section 3: the k largest |q_i|).

    Equal scores: the lower dimension (larger calibrated variance) wins. A NaN counts as largest, so a NaN in a
    query stays visible in its output.

    Args:
        query: rotated queries, [batch, num_attention_heads, length, kept].
        config: `k_ratio`, `s_ratio`, `selection` and `share` are read.
        head_dim: width of the model's heads before `s_ratio` cut the trailing dimensions.
        key_rms: root mean square of each rotated key dimension over the calibration text, not centred,
            [num_key_value_heads, kept]; read by selection="weighted" only.

    Returns:
        Boolean, same shape as `query`, exactly k True in each row; None when every dimension is kept.
    """
    batch, heads, length, kept = query.shape
    k = config.selected_dims(head_dim)
    if k >= kept:
        return None
    if config.selection == "static":
        return (torch.arange(kept, device=query.device) < k).expand(query.shape)
    groups = key_rms.shape[0]
    size = query.float().reshape(batch, groups, heads // groups, length, kept).abs()
    if config.selection == "weighted":
        size = size * key_rms.float()[:, None, None, :]
    if config.share == "group":
        size = size.square().sum(2, keepdim=True)
    order = torch.sort(size, dim=-1, descending=True, stable=True).indices
    selected = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, order[..., :k], True)
    return selected.expand(batch, groups, heads // groups, length, kept).reshape(query.shape)
