# SPDX-License-Identifier: Apache-2.0
"""Rotation, and the choice of the dimensions that a query multiplies."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.plan import LayerPlan


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
    kv_heads = rotation.shape[0]
    dtype = torch.promote_types(states.dtype, rotation.dtype)
    # The query heads of one key-value head lie next to each other, so they are one tall matrix for its rotation.
    tall = states.to(dtype).reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    with without_autocast(states.device.type):
        return (tall @ rotation.to(dtype)).reshape(batch, heads, length, -1).to(states.dtype)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast; entering torch's own takes as long as a small kernel."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def select_dimensions(
    query: Tensor, plan: LayerPlan, short: Tensor | None = None, *, scaling: float | None = None
) -> Tensor | None:
    """Which dimensions each query multiplies (paper, section 3: the k largest |q_i|; or as many as it needs).

    Equal scores: the lower dimension (larger calibrated variance) wins. A NaN counts as largest, so a NaN in a
    query stays visible in its output.

    Args:
        query: rotated queries, [batch, num_attention_heads, length, kept or more]. Of more, only the exact window
            multiplies those behind `kept`.
        plan: its settings, and `key_rms`, which selection="weighted" and `logit_error` read.
        short: queries that multiply every dimension, boolean, broadcasts to [batch, num_attention_heads, length]; from
            `ops.mask.short_queries`, and needed when `min_length` is not 0.
        scaling: factor of the scores, read by `logit_error`; default the plan's.

    Returns:
        Boolean, same shape as `query`, with exactly k True in each row (`k_ratio`) or at least one (`logit_error`), in
        rows of short queries all that are kept; None when every dimension of the queries is multiplied.

    Raises:
        AquaError: `min_length` is not 0, and `short` is missing.
    """
    if plan.min_length > 0 and short is None:
        raise AquaError(
            f"min_length is {plan.min_length}, but it is not said which queries are short: give `short`, from "
            "ops.mask.short_queries"
        )
    kept, width = plan.kept, query.shape[-1]
    selected = _selected(query[..., :kept], plan, plan.scaling if scaling is None else scaling)
    if selected is not None and short is not None:
        selected = selected | short[..., None]
    if width == kept:
        return selected
    selected = query.new_ones((*query.shape[:3], kept), dtype=torch.bool) if selected is None else selected
    return torch.nn.functional.pad(selected, (0, width - kept))


def _selected(query: Tensor, plan: LayerPlan, scaling: float) -> Tensor | None:
    """`select_dimensions`, whatever the length."""
    batch, heads, length, kept = query.shape
    kv_heads, config = plan.key_rms.shape[0], plan.config
    if not plan.selects:
        return None
    if config.selection == "static" and not plan.is_adaptive:
        return (torch.arange(kept, device=query.device) < plan.k).expand(query.shape)
    size = query.float().reshape(batch, kv_heads, heads // kv_heads, length, kept).abs()
    error = size * plan.key_rms.float()[:, None, None, :]
    size = error if config.selection == "weighted" else size
    if config.share == "group":
        size = size.square().sum(2, keepdim=True)
    if config.selection == "static":
        order = torch.arange(kept, device=query.device).expand(size.shape)
    else:
        order = torch.sort(size, dim=-1, descending=True, stable=True).indices
    if config.logit_error is None:
        order = order[..., : plan.k]
        chosen = torch.ones_like(order, dtype=torch.bool)
    else:
        variance = (error * scaling).square()
        if config.share == "group":
            variance = variance.sum(2, keepdim=True)
        # Dropping from place i on costs the sum of the variances from there to the end.
        left = variance.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
        chosen = ~(left <= config.logit_error)  # a NaN is kept
        chosen[..., 0] = True
    selected = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, order, chosen)
    return selected.expand(batch, kv_heads, heads // kv_heads, length, kept).reshape(query.shape)
