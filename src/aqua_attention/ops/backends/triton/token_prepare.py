# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""First of a step that chooses tokens: rotate query and key, choose dimensions, append to a `ScoredCache`."""

import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import LEAST_SIZE, on_device_of, sm_count
from aqua_attention.ops.backends.triton.choose import choose_dims
from aqua_attention.ops.backends.triton.prepare import quantized
from aqua_attention.ops.backends.triton.token_arguments import ScoredArguments, first_block, start_early
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.backends.triton.turn import load_rotation, turn_several, turning
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import FEW_BITS_LARGEST, ScoredCache

LARGEST = tl.constexpr(float(FEW_BITS_LARGEST))
WARPS = 8
FEW_PROGRAMS = 64


def prepare_tokens(
    query: Tensor, key: Tensor, value: Tensor, cache: ScoredCache, plan: LayerPlan, work: TokenWork
) -> None:
    """Write `work.rotated`, `work.dims` and the new token, which is counted once `attend_to_tokens` ends.

    Args:
        query: [batch, num_attention_heads, head_dim], contiguous; key: [batch, num_key_value_heads, head_dim], value
            likewise.
    """
    batch, kv_heads, kept, _, _ = cache.shape
    # A second program for the key and the value, where there are multiprocessors for it. Where there are too few for
    # all sequences, a program takes several: it is the rotation that takes time to read.
    halves = 2 if work.places <= FEW_PROGRAMS else 1
    together = max(1, min(LEAST_SIZE // (work.group + 1), triton.cdiv(work.places, sm_count(query))))
    constants = work.constants(cache)
    constants.pop("ROWS")
    with on_device_of(query):
        _prepare_tokens[(kv_heads, triton.cdiv(batch, together), halves)](
            query,
            key,
            value,
            plan.rotation,
            plan.key_rms,
            ScoredArguments.of(cache),
            work.rotated,
            work.dims,
            work.mask,
            work.scratch.step,
            batch,
            TOGETHER=together,
            COUNT=work.dims.shape[2],
            BITS=cache.score_bits,
            SELECTION=plan.config.selection,
            SQUARED=plan.config.share == "group",
            num_warps=WARPS,
            **constants,
            **turning(work.group, query.shape[2], kept),
            **work.starts_early(),
        )


@triton.jit(do_not_specialize=["batch"])
def _prepare_tokens(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    rms_ptr,
    cache,
    rotated_ptr,
    dims_ptr,
    mask_ptr,
    step_ptr,
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
    BITS: tl.constexpr,
    SELECTION: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    group, groups, first = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * TOGETHER
    does_query, does_key = tl.program_id(2) == 0, tl.program_id(2) == tl.num_programs(2) - 1
    # The query heads of a sequence and its key, then those of the next.
    number, member = tl.arange(0, ROWS) // (GROUP + 1), tl.arange(0, ROWS) % (GROUP + 1)
    places = (first + number).to(tl.int64) * groups + group
    there = (number < TOGETHER) & (first + number < batch)
    narrow = tl.arange(0, KEPT_PADDED)
    column = narrow < KEPT
    rms = tl.load(rms_ptr + group * KEPT + narrow, column, 0.0)
    rotation_ptr += group * HEAD_DIM * KEPT
    loaded = load_rotation(rotation_ptr, 0, rotated_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    # What computes the query ends here; a rotation is older.
    start_early(EARLY)
    states = (
        query_ptr + (places * GROUP + member) * HEAD_DIM,
        key_ptr + places * HEAD_DIM,
        there & (member < GROUP),
        there & (member == GROUP),
    )
    turned = turn_several(states, rotation_ptr, loaded, HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED)
    if does_query:
        tl.store(
            rotated_ptr + (places * GROUP + member)[:, None] * KEPT + narrow[None, :],
            turned,
            states[2][:, None] & column[None, :],
        )
        if group + first == 0:
            tl.store(step_ptr, tl.load(step_ptr, cache_modifier=".cg") + 1)
    turned = turned.to(tl.float32)
    for one in tl.static_range(0, TOGETHER):
        row = first + one
        if row < batch:
            if does_key:
                new = tl.sum(tl.where(((number == one) & (member == GROUP))[:, None], turned, 0.0), 0)
                _append(new, value_ptr, cache, row, group, KEPT, KEPT_PADDED, VALUE_DIM, VALUE_PADDED, BITS, BLOCK)
            if does_query:
                choose_dims(
                    turned,
                    (number == one) & (member < GROUP),
                    rms,
                    (dims_ptr, mask_ptr, None),
                    row.to(tl.int64) * groups + group,
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


@triton.jit
def _append(
    new,
    value_ptr,
    cache,
    row,
    group,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a sequence's new key and value behind its tokens, if there is room."""
    narrow, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    column = narrow < KEPT
    position = tl.load(cache.lengths + row, cache_modifier=".cg")
    if (position >= 0) & (position < cache.max_length):
        block = first_block(cache, row, group) + position // BLOCK * cache.block_stride
        at = block * BLOCK + position % BLOCK
        place = (row * tl.num_programs(0) + group).to(tl.int64)
        value = tl.load(value_ptr + place * VALUE_DIM + columns, columns < VALUE_DIM, 0.0)
        mean = tl.load(cache.channel_mean + group * KEPT + narrow, column, 0.0)
        unit = tl.load(cache.channel_scale + group * KEPT + narrow, column, 1.0)
        states = (new - mean) / unit
        codes, scale = quantized(states, 0)
        if cache.value_scales is not None:
            tl.store(cache.keys + at * KEPT + narrow, codes, column)
            if BITS == 4:
                tl.store(cache.key_scales + at, scale)
        # One byte in each run of a dimension: few, and the rest of the tile is not touched.
        codes_at = cache.codes + (block * KEPT + narrow) * (BLOCK * BITS // 8) + position % BLOCK * BITS // 8
        if BITS == 4:
            codes, scale = quantized_in_few(states)
            # The other half is a neighbour's. This program alone writes to it.
            held = tl.load(codes_at, column, 0, cache_modifier=".cg")
            codes = tl.where(position % 2 == 0, (held & 240) | codes, (held & 15) | (codes << 4))
        tl.store(codes_at, codes, column)
        tl.store(cache.scales + at, scale)
        if cache.value_scales is not None:
            value_codes, value_scale = quantized(value.to(tl.float32), 0)
            tl.store(cache.value_tokens + at * VALUE_DIM + columns, value_codes, columns < VALUE_DIM)
            tl.store(cache.value_scales + at, value_scale)
        else:
            tl.store(cache.keys + at * KEPT + narrow, new.to(cache.keys.dtype.element_ty), column)
            tl.store(cache.value_tokens + at * VALUE_DIM + columns, value, columns < VALUE_DIM)


@triton.jit
def quantized_in_few(states):
    """`ops.scored.coded` of one token in 4 bits: a code in each byte."""
    scale = tl.max(tl.abs(states), 0) / LARGEST
    # The largest of numbers leaves NaN out.
    scale = tl.where(tl.sum(states * 0, 0) == 0, scale, float("nan")).to(tl.bfloat16)
    divisor = tl.where(scale.to(tl.float32) > 0, scale.to(tl.float32), 1.0)
    # To the nearest, of two equally near ones the even, as in `prepare.quantized`.
    codes = tl.minimum(tl.maximum((states / divisor + 12582912.0) - 12582912.0, -LARGEST), LARGEST)
    return (codes + 8).to(tl.uint8), scale
