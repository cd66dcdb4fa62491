# SPDX-License-Identifier: Apache-2.0
"""Rotation, and the choice of the dimensions that a query multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError


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


def select_dimensions(
    query: Tensor,
    config: AquaConfig,
    head_dim: int,
    key_rms: Tensor,
    scaling: float | None = None,
    short: Tensor | None = None,
) -> Tensor | None:
    """Which dimensions each query multiplies (paper, section 3: the k largest |q_i|; or as many as it needs).

    Equal scores: the lower dimension (larger calibrated variance) wins. A NaN counts as largest, so a NaN in a
    query stays visible in its output.

    Args:
        query: rotated queries, [batch, num_attention_heads, length, kept].
        config: `k_ratio` or `logit_error`, `s_ratio`, `selection`, `share` and `min_length` are read.
        head_dim: width of the model's heads before `s_ratio` cut the trailing dimensions.
        key_rms: root mean square of each rotated key dimension over the calibration text, not centred,
            [num_key_value_heads, kept]; read by selection="weighted" and by `logit_error`.
        scaling: factor of the scores, read by `logit_error`; default 1/sqrt(head_dim).
        short: queries that multiply every dimension, boolean, broadcasts to [batch, num_attention_heads, length]; from
            `ops.mask.short_queries`, and needed when `min_length` is not 0.

    Returns:
        Boolean, same shape as `query`, with exactly k True in each row (`k_ratio`) or at least one (`logit_error`), in
        rows of short queries all; None when `k_ratio` keeps every dimension.

    Raises:
        AquaError: `min_length` is not 0, and `short` is missing.
    """
    if config.threshold > 0 and short is None:
        raise AquaError(
            f"min_length is {config.min_length}, but it is not said which queries are short: give `short`, from "
            "ops.mask.short_queries"
        )
    selected = _selected(query, config, head_dim, key_rms, scaling)
    return selected if selected is None or short is None else selected | short[..., None]


def _selected(
    query: Tensor, config: AquaConfig, head_dim: int, key_rms: Tensor, scaling: float | None
) -> Tensor | None:
    """`select_dimensions`, whatever the length."""
    batch, heads, length, kept = query.shape
    groups = key_rms.shape[0]
    k = config.selected_dims(head_dim)
    adaptive = config.logit_error is not None
    if k >= kept and not adaptive:
        return None
    if config.selection == "static" and not adaptive:
        return (torch.arange(kept, device=query.device) < k).expand(query.shape)
    size = query.float().reshape(batch, groups, heads // groups, length, kept).abs()
    error = size * key_rms.float()[:, None, None, :]
    size = error if config.selection == "weighted" else size
    if config.share == "group":
        size = size.square().sum(2, keepdim=True)
    if config.selection == "static":
        order = torch.arange(kept, device=query.device).expand(size.shape)
    else:
        order = torch.sort(size, dim=-1, descending=True, stable=True).indices
    if config.logit_error is None:
        chosen = torch.ones_like(order[..., :k], dtype=torch.bool)
        order = order[..., :k]
    else:
        variance = (error * (head_dim**-0.5 if scaling is None else scaling)).square()
        if config.share == "group":
            variance = variance.sum(2, keepdim=True)
        # Dropping from place i on costs the sum of the variances from there to the end.
        left = variance.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
        chosen = ~(left <= config.logit_error)  # a NaN is kept
        chosen[..., 0] = True
    selected = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, order, chosen)
    return selected.expand(batch, groups, heads // groups, length, kept).reshape(query.shape)
