# SPDX-License-Identifier: Apache-2.0
"""AQUA attention at the speed of fused dense attention, without a score matrix in memory.

Zeroing the dropped entries of a query and running dense attention is AQUA. With an exact window, the tokens
outside it and inside it are two partial softmaxes, merged by their log-sum-exp; causal attention of
`query[sink + recent:]` on `key[sink : length - recent]` is exactly the outside part, so it needs no mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams

from aqua_attention.ops.mask import visible_and_exact

WINDOW_SCORES = 1 << 24
"""Scores of the exact window held at once: 64 MB in float32, for each of the few copies in flight."""


def unsupported_reason(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    window: bool,
    softcap: float | None,
    s_aux: Tensor | None,
) -> str | None:
    """Why the fused path cannot take this call; None when it can."""
    if softcap is not None:
        return "fused attention has no softcap"
    if s_aux is not None:
        return "fused attention has no extra softmax logit (s_aux)"
    if mask is not None and (window or mask.dtype != torch.bool):
        return "an exact window with padding or a sliding window needs its own mask"
    if not window:
        return None
    if query.shape[2] != key.shape[2]:
        return "an exact window needs as many queries as keys (prefill)"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "merging by log-sum-exp has no gradient"
    return None


def attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor | None,
    *,
    mask: Tensor | None = None,
    sink: int = 0,
    recent: int = 0,
    scaling: float | None = None,
) -> Tensor:
    """Same arguments and result as `attention_reference`, where `unsupported_reason` is None.

    One difference, which dense fused kernels share: under a boolean mask, a NaN in a key that the mask hides may spoil
    queries that do not see it, because these kernels add minus infinity to its score.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = max(query.shape[-1], value.shape[-1])
    # Keys narrower than values push the fused kernels onto a slow path; zeros change no score.
    query, key = (F.pad(states, (0, width - states.shape[-1])) for states in (query, key))
    if selected is not None:
        selected = F.pad(selected, (0, width - selected.shape[-1]))
    length, window = query.shape[2], sink + recent
    if selected is None or (window > 0 and length <= window):
        return dense_attention(query, key, value, mask, scaling)
    masked_query = torch.where(selected, query, 0)
    if window == 0:
        return dense_attention(masked_query, key, value, mask, scaling)

    outside = slice(sink, length - recent)
    far, far_lse = attention_with_lse(masked_query[:, :, window:], key[:, :, outside], value[:, :, outside], scaling)
    near, near_lse = _window_attention(query, key, value, sink, recent, scaling)
    share = torch.sigmoid(near_lse[:, :, window:] - far_lse)[..., None]
    near[:, :, window:].mul_(share).add_(far * (1 - share))
    return near.to(value.dtype)


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention of as many queries as keys, with the log-sum-exp of each query's scaled scores.

    Args:
        query: [batch, num_attention_heads, length, width], key and value: [batch, num_key_value_heads, length, ...].

    Returns:
        Output [batch, num_attention_heads, length, value_dim] and float32 log-sum-exp
        [batch, num_attention_heads, length].
    """
    length, same_width = query.shape[2], query.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and same_width:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scaling
        )
        return output, lse[:, :, :length]
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        given = SDPAParams(query, key, value, None, 0.0, True, query.shape[1] > key.shape[1])
        if torch.backends.cuda.can_use_cudnn_attention(given):
            output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, True, False, scale=scaling
            )
            return output, lse.reshape(query.shape[:3])
        if torch.backends.cuda.can_use_flash_attention(given):
            output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, True, False, scale=scaling
            )
            return output, lse[:, :, :length]
    fits = same_width and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0 and query.dtype != torch.float64
    if query.device.type == "cuda" and fits:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, True, scale=scaling
        )
        return output, lse[:, :, :length]
    return _chunked_with_lse(query, key, value, scaling)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Dense attention through scaled_dot_product_attention; the mask is None (causal) or boolean."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    if mask is None and 1 < queries < key.shape[2]:
        positions = torch.arange(key.shape[2], device=query.device)
        mask = (positions <= positions[-queries:, None])[None, None]
    kernel_mask = mask
    if queries == 1 and heads > groups:
        # One query a head: the heads of a group become the queries of one head, and no key is repeated.
        query = query.reshape(batch, groups, heads // groups, -1)
        if mask is not None and mask.shape[1] > 1:
            kernel_mask = mask.reshape(mask.shape[0], groups, heads // groups, -1)
    elif heads > groups and query.device.type != "cpu" and mask is not None:
        key, value = (states.repeat_interleave(heads // groups, dim=1) for states in (key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=kernel_mask,
        is_causal=mask is None and queries > 1,
        scale=scaling,
        enable_gqa=query.shape[1] > key.shape[1],
    )
    output = output.reshape(batch, heads, queries, -1)
    if mask is not None:
        # Kernels disagree about a query that sees nothing (padding): zeros, means, NaN. Zeros, as in the reference.
        output = output.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return output


def _window_attention(
    query: Tensor, key: Tensor, value: Tensor, sink: int, recent: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to its first `sink` and last `recent` tokens only, in blocks of queries.

    Returns float32 (or wider) output [batch, heads, length, value_dim] and log-sum-exp [batch, heads, length].
    """
    batch, heads, length, width = query.shape
    groups, dtype = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    block = max(64, recent)
    count = -(-length // block)
    band = block + max(recent, 1) - 1
    # Block b has the queries [b * block, (b + 1) * block) and the keys from recent - 1 before its first query on.
    before, after = band - block, count * block - length

    def blocks_of(states: Tensor) -> Tensor:
        return F.pad(states, (0, 0, before, after)).unfold(2, band, block)

    key_blocks, value_blocks = blocks_of(key), blocks_of(value)
    first_key, first_value = key[:, :, None, :sink], value[:, :, None, :sink]
    query_blocks = F.pad(query, (0, 0, 0, after)).reshape(batch, groups, heads // groups, count, block, width)
    outputs, lses = [], []
    step = max(1, WINDOW_SCORES // (batch * heads * block * (band + sink)))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        size = part.stop - part.start
        tall = query_blocks[:, :, :, part].transpose(2, 3).reshape(batch, groups, size, -1, width).to(dtype)
        near = tall @ key_blocks[:, :, part].to(dtype)
        first = tall @ first_key.transpose(-1, -2).to(dtype)
        scores = torch.cat([first, near], -1).reshape(batch, groups, size, heads // groups, block, -1) * scaling
        hidden = _hidden_in_window(part, block, band, before, sink, recent, query.device)
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        # A query beyond the sequence (padding of the last block) may see nothing: its rows are cut off below.
        probabilities = (scores - lse[..., None]).exp().reshape(batch, groups, size, -1, sink + band)
        output = probabilities[..., :sink] @ first_value.to(dtype)
        output += probabilities[..., sink:] @ value_blocks[:, :, part].to(dtype).transpose(-1, -2)
        outputs.append(output.reshape(batch, groups, size, heads // groups, block, -1).transpose(2, 3))
        lses.append(lse.transpose(2, 3))
    output = torch.cat(outputs, 3).reshape(batch, heads, count * block, -1)[:, :, :length]
    lse = torch.cat(lses, 3).reshape(batch, heads, count * block)[:, :, :length]
    return output, lse


def _hidden_in_window(
    part: slice, block: int, band: int, before: int, sink: int, recent: int, device: torch.device
) -> Tensor:
    """Boolean [blocks, block, sink + band]: which of the keys laid beside a block a query must not see."""
    blocks = torch.arange(part.start, part.stop, device=device)[:, None, None]
    queries = blocks * block + torch.arange(block, device=device)[:, None]
    near = blocks * block - before + torch.arange(band, device=device)
    first = torch.arange(sink, device=device)
    # A first token inside the band is counted once, as a first token.
    near_hidden = (near > queries) | (near <= queries - recent) | (near < sink)
    return torch.cat([first > queries, near_hidden], -1)


def _chunked_with_lse(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in plain torch, for devices and widths that no fused kernel takes."""
    batch, heads, length, width = query.shape
    groups, dtype = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    rows = max(1, WINDOW_SCORES // max(1, batch * heads * length))
    outputs, lses = [], []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        tall = query[:, :, start:stop].to(dtype).reshape(batch, groups, -1, width)
        scores = (tall @ key[:, :, :stop].to(dtype).transpose(-1, -2)) * scaling
        scores = scores.reshape(batch, heads, stop - start, stop)
        visible, _ = visible_and_exact(
            None, queries=stop - start, keys=stop, start=start, sink=0, recent=0, device=query.device
        )
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp().reshape(batch, groups, -1, stop)
        output = probabilities @ value[:, :, :stop].to(dtype)
        outputs.append(output.reshape(batch, heads, stop - start, -1))
        lses.append(lse)
    return torch.cat(outputs, 2).to(value.dtype), torch.cat(lses, 2)
