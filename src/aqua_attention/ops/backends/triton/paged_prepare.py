# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What comes before decoding over pages, in one launch: rotate query and key, choose dimensions, write to the page."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import on_device_of, starts_early
from aqua_attention.ops.backends.triton.choose import choose_dims
from aqua_attention.ops.backends.triton.paged import PageArguments, page_constants, store_tokens
from aqua_attention.ops.backends.triton.prepare import FEW_PROGRAMS, WARPS
from aqua_attention.ops.backends.triton.turn import load_rotation, load_states, turn, turning
from aqua_attention.ops.layout import Chosen
from aqua_attention.ops.pages import PagedCache, Step
from aqua_attention.ops.plan import LayerPlan


def prepare_paged(
    query: Tensor, key: Tensor, value: Tensor, cache: PagedCache, plan: LayerPlan, step: Step
) -> tuple[Tensor, Chosen | None]:
    """Rotate one query and key token a sequence, write key and value to their slots, choose dimensions.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise; the
            heads of a token lie together. On a GPU rotation and key_rms are read before the kernel ahead of this one
            has ended: that one must not be what writes them.
        plan: its dimensions are shared by a group, unless each key-value head has one query head.

    Returns:
        Rotated queries [batch, num_attention_heads, kept], and what `decode_paged` multiplies outside the exact window,
        whatever the length; None: every dimension.
    """
    (batch, heads, head_dim), kv_heads, kept = query.shape, cache.num_key_value_heads, cache.kept
    rotated, chosen = query.new_empty((batch, heads, kept)), None
    if plan.selects:
        chosen = Chosen(
            step.lengths.new_empty((batch, kv_heads, plan.k)),
            step.lengths.new_empty((batch, kv_heads, kept), dtype=torch.int8),
        )
    # A second program for the key and the value, where there are multiprocessors for it.
    halves = 2 if batch * kv_heads <= FEW_PROGRAMS else 1
    with on_device_of(query):
        _prepare_paged[(kv_heads, batch, halves)](
            query,
            key,
            value,
            plan.rotation,
            plan.key_rms,
            step.slots,
            PageArguments.of(cache),
            rotated,
            *((None, None) if chosen is None else chosen[:2]),
            query.stride(0),
            key.stride(0),
            value.stride(0),
            COUNT=plan.k,
            SELECTION=plan.config.selection,
            SQUARED=plan.config.share == "group",
            num_warps=WARPS,
            **page_constants(cache, heads // kv_heads),
            **turning(heads // kv_heads, head_dim, kept),
            **starts_early(query),
        )
    return rotated, chosen


@triton.jit
def _prepare_paged(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    rms_ptr,
    slots_ptr,
    pages,
    rotated_ptr,
    dims_ptr,
    mask_ptr,
    query_stride,
    key_stride,
    value_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    SELECTION: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + group
    does_query, does_key = tl.program_id(2) == 0, tl.program_id(2) == tl.num_programs(2) - 1
    heads, narrow, columns = tl.arange(0, ROWS), tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    rms = tl.load(rms_ptr + group * KEPT + narrow, narrow < KEPT, 0.0)
    rotation_ptr += group * HEAD_DIM * KEPT
    high, low = load_rotation(rotation_ptr, 0, rotated_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    if EARLY:
        # For what computes the query; a rotation is older.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    query_ptr += row * query_stride + group * GROUP * HEAD_DIM
    key_ptr += row * key_stride + group * HEAD_DIM
    source = (query_ptr, key_ptr, rotation_ptr, 0)
    loaded = (load_states(source, 0, GROUP, ROWS, HEAD_DIM, CHUNK), high, low)
    turned = turn(source, loaded, GROUP, ROWS, HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED)
    if does_query:
        tl.store(
            rotated_ptr + (place * GROUP + heads[:, None]) * KEPT + narrow[None, :],
            turned,
            (heads < GROUP)[:, None] & (narrow < KEPT)[None, :],
        )
        if dims_ptr is not None:
            choose_dims(
                turned.to(tl.float32),
                rms,
                (dims_ptr, mask_ptr, None),
                place,
                0.0,
                1.0,
                GROUP,
                ROWS,
                KEPT,
                KEPT_PADDED,
                COUNT,
                COUNT,
                False,
                SELECTION,
                SQUARED,
            )
    if does_key:
        new = tl.sum(tl.where((heads == GROUP)[:, None], turned.to(tl.float32), 0.0), 0)
        value = tl.load(value_ptr + row * value_stride + group * VALUE_DIM + columns, columns < VALUE_DIM, 0.0)
        slot = tl.load(slots_ptr + row + tl.arange(0, 1))
        store_tokens(
            pages,
            group,
            slot,
            new[None, :],
            value[None, :],
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            BLOCK,
        )
