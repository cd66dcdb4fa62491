# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What comes before decoding over pages, in one launch: rotate query and key, choose dimensions, write to the page."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import LEAST_SIZE, on_device_of, padded, sm_count, starts_early
from aqua_attention.ops.backends.triton.choose import choose_dims
from aqua_attention.ops.backends.triton.paged import PageArguments, page_constants, store_tokens
from aqua_attention.ops.backends.triton.prepare import FEW_PROGRAMS, WARPS
from aqua_attention.ops.backends.triton.token_arguments import start_early
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.backends.triton.turn import load_rotation, turn_several, turning
from aqua_attention.ops.layout import Chosen
from aqua_attention.ops.pages import PagedCache, Step
from aqua_attention.ops.plan import LayerPlan

MOST_TOGETHER = 4
"""Sequences of a program at most."""


def prepare_paged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    plan: LayerPlan,
    step: Step,
    work: TokenWork | None = None,
) -> tuple[Tensor, Chosen | None]:
    """Rotate one query and key token a sequence, write key and value to their slots, choose dimensions.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise; the
            heads of a token lie together. On a GPU rotation and key_rms are read before the kernel ahead of this one
            has ended: that one must not be what writes them.
        plan: its dimensions are shared by a group, unless each key-value head has one query head.
        work: of a step that chooses tokens: what is returned lies there, and `step` is its number.

    Returns:
        Rotated queries [batch, num_attention_heads, kept], and what `decode_paged` multiplies outside the exact window,
        whatever the length; None: every dimension.
    """
    (batch, heads, head_dim), kv_heads, kept = query.shape, cache.num_key_value_heads, cache.kept
    rotated, chosen = query.new_empty((batch, heads, kept)) if work is None else work.rotated, None
    if work is not None:
        chosen = Chosen(work.dims, work.mask)
    elif plan.selects:
        chosen = Chosen(
            step.lengths.new_empty((batch, kv_heads, plan.k)),
            step.lengths.new_empty((batch, kv_heads, kept), dtype=torch.int8),
        )
    # A second program for the key and the value, where there are multiprocessors for it. Where there are too few for
    # all, a program takes as many sequences as fit into a product: it is the rotation that takes time to read.
    group = heads // kv_heads
    together = 1 if batch * kv_heads <= sm_count(query) else max(1, min(MOST_TOGETHER, LEAST_SIZE // (group + 1)))
    halves = 2 if batch * kv_heads <= FEW_PROGRAMS else 1
    with on_device_of(query):
        _prepare_paged[(kv_heads, triton.cdiv(batch, together), halves)](
            query,
            key,
            value,
            plan.rotation,
            plan.key_rms,
            step.slots,
            PageArguments.of(cache),
            rotated,
            *((None, None) if chosen is None else chosen[:2]),
            None if work is None else work.scratch.step,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            batch,
            TOGETHER=together,
            COUNT=plan.k,
            SELECTION=plan.config.selection,
            SQUARED=plan.config.share == "group",
            num_warps=WARPS,
            **page_constants(cache, group),
            **turning(group, head_dim, kept) | {"ROWS": padded(together * (group + 1))},
            **(starts_early(query) if work is None else work.starts_early()),
        )
    return rotated, chosen


@triton.jit(do_not_specialize=["batch"])
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
    step_ptr,
    query_stride,
    key_stride,
    value_stride,
    batch,
    TOGETHER: tl.constexpr,
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
    group, groups, first = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * TOGETHER
    does_query, does_key = tl.program_id(2) == 0, tl.program_id(2) == tl.num_programs(2) - 1
    # The query heads of a sequence and its key, then those of the next.
    number, member = tl.arange(0, ROWS) // (GROUP + 1), tl.arange(0, ROWS) % (GROUP + 1)
    rows = (first + number).to(tl.int64)
    there = (number < TOGETHER) & (rows < batch)
    narrow, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    rms = tl.load(rms_ptr + group * KEPT + narrow, narrow < KEPT, 0.0)
    dtype = rotated_ptr.dtype.element_ty
    rotation_ptr += group * HEAD_DIM * KEPT
    high, low = load_rotation(rotation_ptr, 0, dtype, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    # For what computes the query; a rotation is older.
    start_early(EARLY)
    query_at = query_ptr + rows * query_stride + (group * GROUP + member) * HEAD_DIM
    key_at = key_ptr + rows * key_stride + group * HEAD_DIM
    states = (query_at, key_at, there & (member < GROUP), there & (member == GROUP))
    turned = turn_several(states, rotation_ptr, (high, low), HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED)
    if does_query:
        tl.store(
            rotated_ptr + ((rows * groups + group) * GROUP + member)[:, None] * KEPT + narrow[None, :],
            turned,
            (there & (member < GROUP))[:, None] & (narrow < KEPT)[None, :],
        )
    if step_ptr is not None:  # noqa: SIM102 (this is known when compiling, the other is not)
        if does_query & (group + first == 0):
            tl.store(step_ptr, tl.load(step_ptr, cache_modifier=".cg") + 1)
    turned = turned.to(tl.float32)
    for one in tl.static_range(0, TOGETHER):
        row = (first + one).to(tl.int64)
        is_row = row < batch
        if dims_ptr is not None:  # noqa: SIM102 (as above)
            if does_query & is_row:
                choose_dims(
                    turned,
                    (number == one) & (member < GROUP),
                    rms,
                    (dims_ptr, mask_ptr, None),
                    row * groups + group,
                    0.0,
                    1.0,
                    KEPT,
                    KEPT_PADDED,
                    COUNT,
                    COUNT,
                    False,
                    SELECTION,
                    SQUARED,
                )
        if does_key & is_row:
            new = tl.sum(tl.where(((number == one) & (member == GROUP))[:, None], turned, 0.0), 0)
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
