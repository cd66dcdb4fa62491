# SPDX-License-Identifier: Apache-2.0
"""Dense attention by the fused kernels that torch has, with or without the log-sum-exp of the scores.

Zeroing the dropped entries of a query and running dense attention is AQUA, so every backend for prompts rests on these.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams

from aqua_attention.ops.mask import visible_and_exact

SCORES_AT_ONCE = 1 << 24
"""Scores held at once in plain torch: 64 MB in float32, for each of the few copies in flight."""
fewer_queries_kernel: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
"""`attention_with_lse` of one sequence with fewer queries than keys: who has a faster one than torch puts it here."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Dense attention through scaled_dot_product_attention; the mask is None (causal) or boolean."""
    batch, heads, queries, _ = query.shape
    kv_heads = key.shape[1]
    if mask is None and 1 < queries < key.shape[2]:
        if takes_fewer_queries(query, key, value):
            return attention_with_lse(query, key, value, scaling)[0]
        positions = torch.arange(key.shape[2], device=query.device)
        mask = (positions <= positions[-queries:, None])[None, None]
    kernel_mask = mask
    if queries == 1 and heads > kv_heads:
        # One query a head: the heads of a group become the queries of one head, and no key is repeated.
        query = query.reshape(batch, kv_heads, heads // kv_heads, -1)
        if mask is not None and mask.shape[1] > 1:
            kernel_mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, -1)
    elif heads > kv_heads and query.device.type != "cpu" and mask is not None:
        key, value = (states.repeat_interleave(heads // kv_heads, dim=1) for states in (key, value))
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


def widened(states: Tensor, width: int) -> Tensor:
    """States with zeros behind their last dimension; the same tensor where it has that width, which `F.pad` copies.

    Keys narrower than values push fused kernels onto a slow path; zeros change no score.
    """
    return states if states.shape[-1] == width else F.pad(states, (0, width - states.shape[-1]))


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention, with the log-sum-exp of each query's scaled scores.

    Args:
        query: [batch, num_attention_heads, queries, width], key and value: [batch, num_key_value_heads, keys, ...]; the
            queries are at the end of the keys.

    Returns:
        Output [batch, num_attention_heads, queries, value_dim] and float32 log-sum-exp
        [batch, num_attention_heads, queries].
    """
    length, same_width = query.shape[2], query.shape[-1] == value.shape[-1]
    # These operators are asked directly, and take the numbers of a token to lie together without a look.
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    if length < key.shape[2]:
        if not takes_fewer_queries(query, key, value):
            return _chunked_with_lse(query, key, value, scaling)
        if fewer_queries_kernel is not None and len(query) == 1:
            return fewer_queries_kernel(query, key, value, scaling)
        # Causal means to this operator that the last query sees all keys.
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, False, scale=scaling
        )
        return output, lse[:, :, :length]
    if query.device.type == "cpu" and same_width:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scaling
        )
        return output, lse[:, :, :length]
    # Operators that are asked directly pad no heads to a multiple of 8.
    in_eights = query.shape[-1] % 8 == 0
    if query.device.type == "cuda" and in_eights and query.dtype in (torch.float16, torch.bfloat16):
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
    fits = same_width and query.shape[-1] <= 256 and in_eights and query.dtype != torch.float64
    if query.device.type == "cuda" and fits:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, True, scale=scaling
        )
        return output, lse[:, :, :length]
    return _chunked_with_lse(query, key, value, scaling)


def takes_fewer_queries(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel does causal attention of fewer queries than keys, without a mask in memory."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    # The operator pads no heads to a multiple of 8, and `torch.compile` cannot trace the question below.
    if query.shape[-1] % 8 or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        return False
    # Asked about without causality, which to `scaled_dot_product_attention` means something else here.
    given = SDPAParams(query, key, value, None, 0.0, False, query.shape[1] > key.shape[1])
    return torch.backends.cuda.can_use_flash_attention(given)


def _chunked_with_lse(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in plain torch, for devices and widths that no fused kernel takes."""
    batch, heads, length, width = query.shape
    kv_heads, dtype = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    before = key.shape[2] - length
    rows = max(1, SCORES_AT_ONCE // max(1, batch * heads * key.shape[2]))
    outputs, lses = [], []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        seen = before + stop
        tall = query[:, :, start:stop].to(dtype).reshape(batch, kv_heads, -1, width)
        scores = (tall @ key[:, :, :seen].to(dtype).transpose(-1, -2)) * scaling
        scores = scores.reshape(batch, heads, stop - start, seen)
        visible, _ = visible_and_exact(
            None, queries=stop - start, keys=seen, start=before + start, sink=0, recent=0, device=query.device
        )
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp().reshape(batch, kv_heads, -1, seen)
        output = probabilities @ value[:, :, :seen].to(dtype)
        outputs.append(output.reshape(batch, heads, stop - start, -1))
        lses.append(lse)
    return torch.cat(outputs, 2).to(value.dtype), torch.cat(lses, 2)
