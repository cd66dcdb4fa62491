# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What comes before decoding attention, in one launch: rotate query and key, choose dimensions, append to the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import (
    TILE,
    CacheArguments,
    cache_constants,
    key_pointers,
    on_device_of,
    starts_early,
    token_blocks,
    token_pointers,
)
from aqua_attention.ops.backends.triton.choose import choose_dims
from aqua_attention.ops.backends.triton.turn import load_rotation, load_states, turn, turning
from aqua_attention.ops.layout import Chosen, TiledCache
from aqua_attention.ops.plan import LayerPlan

WARPS = 8
FEW_PROGRAMS = 64


def prepare(
    query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float
) -> tuple[Tensor, Chosen | None]:
    """Rotate one query and key token a sequence, write key and value behind the others, choose dimensions.

    The sequences are not longer afterwards: `decode` with `appended=True` counts the new token and lengthens them; once
    for each call, because at the end of a tile the oldest token of the tail has given its place. A token for which a
    sequence has no room is not written.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        plan: dimensions are shared by a group, unless each key-value head has one query head. On a GPU rotation and
            key_rms are read before the kernel ahead of this one has ended: that one must not be what writes them.
        scaling: factor of the scores, read by `logit_error`.

    Returns:
        Rotated queries [batch, num_attention_heads, kept], and what `decode` multiplies: None where every dimension
        counts; `dims` are in the order of the selection, of sequences shorter than `min_length` in any.

    Raises:
        AquaError: shapes that do not fit, or dimensions that are not shared by a group.
    """
    cache.check_step(query, key, value, plan)
    cache.check_rotated()
    batch, heads, head_dim = query.shape
    _, kv_heads, kept, _, _ = cache.shape
    # Codes of 8 bits are read by one loop, which must be told how many dimensions it reads.
    counted = plan.is_adaptive or (plan.selects and plan.min_length > 0 and cache.quantization is not None)
    listed = kept if counted else plan.k
    rotated, chosen, lengths = query.new_empty((batch, heads, kept)), None, cache.lengths
    if plan.selects:
        chosen = Chosen(
            lengths.new_empty((batch, kv_heads, listed)),
            lengths.new_empty((batch, kv_heads, kept), dtype=torch.int8),
            lengths.new_empty((batch, kv_heads)) if counted else None,
            min_length=0 if counted else plan.min_length,
        )
    # A second program for the key and the value, where there are multiprocessors for it.
    halves = 2 if batch * kv_heads <= FEW_PROGRAMS else 1
    with on_device_of(query):
        _prepare[(kv_heads, batch, halves)](
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            plan.rotation.contiguous(),
            plan.key_rms.contiguous(),
            CacheArguments.of(cache),
            rotated,
            *((None, None, None) if chosen is None else chosen[:3]),
            plan.config.logit_error or 0.0,
            scaling,
            plan.min_length or None,
            COUNT=plan.k,
            LISTED=listed,
            ADAPTIVE=plan.is_adaptive,
            SELECTION=plan.config.selection,
            SQUARED=plan.config.share == "group",
            num_warps=WARPS,
            **cache_constants(cache, heads // kv_heads),
            **turning(heads // kv_heads, head_dim, kept),
            # A copy made here would be what was started just before.
            **starts_early(query, plan.rotation.is_contiguous() and plan.key_rms.is_contiguous()),
        )
    return rotated, chosen


@triton.jit
def _prepare(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    rms_ptr,
    cache,
    rotated_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    logit_error,
    scaling,
    min_length,
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
    LISTED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SELECTION: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    group, row = tl.program_id(0), tl.program_id(1)
    place = (row * tl.num_programs(0) + group).to(tl.int64)
    does_query, does_key = tl.program_id(2) == 0, tl.program_id(2) == tl.num_programs(2) - 1
    heads, narrow = tl.arange(0, ROWS), tl.arange(0, KEPT_PADDED)
    inside, column = heads < GROUP, narrow < KEPT
    columns = tl.arange(0, VALUE_PADDED)
    rms = tl.load(rms_ptr + group * KEPT + narrow, column, 0.0)
    rotation_ptr += group * HEAD_DIM * KEPT
    high, low = load_rotation(rotation_ptr, 0, rotated_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    if EARLY:
        # For what computes the query; a rotation is older.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(cache.lengths + row)
    value = tl.load(value_ptr + place * VALUE_DIM + columns, columns < VALUE_DIM, 0.0)
    source = (query_ptr, key_ptr, rotation_ptr, place)
    loaded = (load_states(source, 0, GROUP, ROWS, HEAD_DIM, CHUNK), high, low)
    turned = turn(source, loaded, GROUP, ROWS, HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED)
    if does_query:
        tl.store(
            rotated_ptr + (place * GROUP + heads[:, None]) * KEPT + narrow[None, :],
            turned,
            inside[:, None] & column[None, :],
        )
    turned = turned.to(tl.float32)

    if does_key & (position < cache.tile_count * TILE):
        new = tl.sum(tl.where((heads == GROUP)[:, None], turned, 0.0), 0)
        first_block = row.to(tl.int64) * cache.row_stride + group.to(tl.int64) * cache.head_stride
        block_table_ptr, scale_ptr, mean_ptr = cache.block_table, cache.channel_scale, cache.channel_mean
        if block_table_ptr is not None:
            block_table_ptr += row * cache.table_width
        if scale_ptr is not None:
            scale_ptr += group * KEPT
            mean_ptr += group * KEPT
        stored = (cache.tiles, cache.value_tiles, cache.key_scales, cache.value_scales, scale_ptr, mean_ptr)
        lookup = (block_table_ptr, cache.table_width, first_block, cache.block_stride)
        append(
            new,
            value,
            cache.tail + place * 2 * TILE * KEPT,
            stored,
            lookup,
            position,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            BLOCK,
        )

    if dims_ptr is not None:
        if min_length is not None:
            # As many tokens as `decode` will count, the new one too.
            is_short = tl.minimum(position + 1, cache.tile_count * TILE) < min_length
            if does_query & is_short:
                tl.store(mask_ptr + place * KEPT + narrow, tl.full([KEPT_PADDED], 1, tl.int8), column)
                tl.store(dims_ptr + place * LISTED + narrow, narrow, narrow < LISTED)
                if counts_ptr is not None:
                    tl.store(counts_ptr + place, KEPT)
            does_query = does_query & (is_short == 0)
        if does_query:
            choose_dims(
                turned,
                inside,
                rms,
                (dims_ptr, mask_ptr, counts_ptr),
                place,
                logit_error,
                scaling,
                KEPT,
                KEPT_PADDED,
                COUNT,
                LISTED,
                ADAPTIVE,
                SELECTION,
                SQUARED,
            )


@triton.jit
def append(
    key,
    value,
    tail_ptr,
    stored,
    lookup,
    position,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a rotated key, [KEPT_PADDED], and a value, [VALUE_PADDED], of one sequence and key-value head."""
    tiles_ptr, values_ptr, key_scales_ptr, value_scales_ptr, channel_scale_ptr, channel_mean_ptr = stored
    block_table_ptr, table_width, first_block, block_stride = lookup
    narrow, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    column = narrow < KEPT
    # The new token replaces one of the tile before last, which must be in its place by then.
    slot = position % (2 * TILE)
    if (position % TILE == 0) & (position >= 2 * TILE):
        tokens = tl.arange(0, TILE)
        there = column[:, None] & (tokens[None, :] >= 0)
        old = tl.load(tail_ptr + (slot + tokens[None, :]) * KEPT + narrow[:, None], there, 0.0)
        block_ids = token_blocks(block_table_ptr, first_block, block_stride, position // TILE - 2, table_width, BLOCK)
        if channel_scale_ptr is not None:
            scale, mean = (
                tl.load(channel_scale_ptr + narrow, column, 1.0),
                tl.load(channel_mean_ptr + narrow, column, 0.0),
            )
            codes, scales = quantized((old.to(tl.float32) - mean[:, None]) / scale[:, None], 0)
            tl.store(token_pointers(key_scales_ptr, block_table_ptr, block_ids, 1, BLOCK), scales)
        else:
            codes = old
        tl.store(key_pointers(tiles_ptr, block_table_ptr, block_ids, narrow, KEPT, BLOCK), codes, there)
        tl.debug_barrier()
    tl.store(tail_ptr + slot * KEPT + narrow, key.to(tail_ptr.dtype.element_ty), column)
    page = position // BLOCK
    if block_table_ptr is not None:
        page = tl.load(block_table_ptr + page)
    at = (first_block + page.to(tl.int64) * block_stride) * BLOCK + position % BLOCK
    if value_scales_ptr is not None:
        value_codes, value_scale = quantized(value.to(tl.float32), 0)
        tl.store(value_scales_ptr + at, value_scale)
        tl.store(values_ptr + at * VALUE_DIM + columns, value_codes, columns < VALUE_DIM)
    else:
        tl.store(values_ptr + at * VALUE_DIM + columns, value, columns < VALUE_DIM)


@triton.jit
def quantized(states, AXIS: tl.constexpr):
    """`ops.layout.quantized` along an axis."""
    scale = (tl.max(tl.abs(states), AXIS) / 127 * 1.0078125).to(tl.bfloat16)
    # The largest of numbers leaves NaN out.
    scale = tl.where(tl.sum(states * 0, AXIS) == 0, scale.to(tl.float32), float("nan")).to(tl.bfloat16)
    divisor = tl.where(scale.to(tl.float32) > 0, scale.to(tl.float32), 1.0)
    scaled = states / tl.expand_dims(divisor, AXIS)
    # To the nearest, of two equally near ones the even: 1.5 * 2**23 has no room for less than one.
    codes = tl.minimum(tl.maximum((scaled + 12582912.0) - 12582912.0, -127.0), 127.0)
    return (codes + 128).to(tl.uint8), scale
