# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What comes before decoding attention, in one launch: rotate query and key, choose dimensions, append to the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.ops.backends.triton.blocks import (
    key_pointers,
    on_device_of,
    padded,
    starts_early,
    token_blocks,
    token_pointers,
)
from aqua_attention.ops.backends.triton.turn import LARGEST_CHUNK, load_rotation, load_states, turn
from aqua_attention.ops.layout import TILE, Chosen, TiledCache

WARPS = 8
FEW_PROGRAMS = 64


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
    """Rotate one query and key token a sequence, write key and value behind the others, choose dimensions.

    The sequences are not longer afterwards: `decode` with `appended=True` counts the new token and lengthens them; once
    for each call, because at the end of a tile the oldest token of the tail has given its place. A token for which a
    sequence has no room is not written.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        rotation: float32 [num_key_value_heads, head_dim, kept].
        key_rms: float32 [num_key_value_heads, kept], see `ops.select.select_dimensions`. On a GPU both are read before
            the kernel ahead of this one has ended: that one must not be what writes them.
        config: `k_ratio` or `logit_error`, `selection` and `min_length`, as in `select_dimensions`; `share` must be
            "group", unless each key-value head has one query head.
        scaling: factor of the scores, read by `logit_error`; default 1/sqrt(head_dim).

    Returns:
        Rotated queries [batch, num_attention_heads, kept], and what `decode` multiplies: None where every dimension
        counts; `dims` are in the order of the selection, of sequences shorter than `min_length` in any.

    Raises:
        AquaError: shapes that do not fit, or dimensions that are not shared by a group.
    """
    cache.check_step(query, key, value, rotation, key_rms, config)
    cache.check_rotated()
    batch, heads, head_dim = query.shape
    groups, kept = rotation.shape[0], rotation.shape[2]
    count, adaptive = config.selected_dims(head_dim), config.logit_error is not None
    count = kept if adaptive else min(count, kept)
    # Codes of 8 bits are read by one loop, which must be told how many dimensions it reads.
    counted = adaptive or (count < kept and config.threshold > 0 and cache.quantization is not None)
    places = kept if counted else count
    rotated = query.new_empty((batch, heads, kept))
    chosen = None
    if adaptive or count < kept:
        chosen = Chosen(
            torch.empty((batch, groups, places), dtype=torch.int32, device=query.device),
            torch.empty((batch, groups, kept), dtype=torch.int8, device=query.device),
            torch.empty((batch, groups), dtype=torch.int32, device=query.device) if counted else None,
            min_length=0 if counted else config.threshold,
        )
    # A second program for the key and the value, where there are processors for it.
    halves = 2 if batch * groups <= FEW_PROGRAMS else 1
    with on_device_of(query):
        _prepare[(groups, batch, halves)](
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            rotation.contiguous(),
            key_rms.contiguous(),
            cache.tiles,
            cache.tail,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            *(cache.quantization or (None, None)),
            None if cache.pages is None else cache.pages.block_table,
            cache.lengths,
            rotated,
            *((None, None, None) if chosen is None else chosen[:3]),
            cache.count,
            0 if cache.pages is None else cache.pages.block_table.shape[1],
            *cache.block_strides,
            config.logit_error or 0.0,
            head_dim**-0.5 if scaling is None else scaling,
            config.threshold or None,
            GROUP=heads // groups,
            ROWS=padded(heads // groups + 1),
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=padded(head_dim),
            CHUNK=min(padded(head_dim), LARGEST_CHUNK // padded(kept)),
            KEPT=kept,
            KEPT_PADDED=padded(kept),
            VALUE_DIM=value.shape[2],
            VALUE_DIM_PADDED=triton.next_power_of_2(value.shape[2]),
            COUNT=count,
            PLACES=places,
            ADAPTIVE=adaptive,
            SELECTION=config.selection,
            SQUARED=config.share == "group",
            TILE=TILE,
            BLOCK=cache.block,
            num_warps=WARPS,
            # A copy made here would be what was started just before.
            **starts_early(query, rotation.is_contiguous() and key_rms.is_contiguous()),
        )
    return rotated, chosen


@triton.jit
def _prepare(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    rms_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    scale_ptr,
    mean_ptr,
    block_table_ptr,
    lengths_ptr,
    rotated_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    tiles,
    blocks,
    row_stride,
    group_stride,
    block_stride,
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
    VALUE_DIM_PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    PLACES: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SELECTION: tl.constexpr,
    SQUARED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    group, row = tl.program_id(0), tl.program_id(1)
    place = (row * tl.num_programs(0) + group).to(tl.int64)
    does_query, does_key = tl.program_id(2) == 0, tl.program_id(2) == tl.num_programs(2) - 1
    heads, narrow = tl.arange(0, ROWS), tl.arange(0, KEPT_PADDED)
    inside, column = heads < GROUP, narrow < KEPT
    columns = tl.arange(0, VALUE_DIM_PADDED)
    rms = tl.load(rms_ptr + group * KEPT + narrow, column, 0.0)
    rotation_ptr += group * HEAD_DIM * KEPT
    high, low = load_rotation(rotation_ptr, 0, rotated_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    if EARLY:
        # For what computes the query; a rotation is older.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(lengths_ptr + row)
    value = tl.load(value_ptr + place * VALUE_DIM + columns, columns < VALUE_DIM, 0.0)
    states = load_states(query_ptr, key_ptr, place, 0, GROUP, ROWS, HEAD_DIM, CHUNK)
    turned = turn(
        states,
        high,
        low,
        query_ptr,
        key_ptr,
        rotation_ptr,
        place,
        GROUP,
        ROWS,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        CHUNK,
        KEPT,
        KEPT_PADDED,
    )
    if does_query:
        tl.store(
            rotated_ptr + (place * GROUP + heads[:, None]) * KEPT + narrow[None, :],
            turned,
            inside[:, None] & column[None, :],
        )
    turned = turned.to(tl.float32)

    if does_key & (position < tiles * TILE):
        new = tl.sum(tl.where((heads == GROUP)[:, None], turned, 0.0), 0)
        first_cell = row.to(tl.int64) * row_stride + group.to(tl.int64) * group_stride
        if block_table_ptr is not None:
            block_table_ptr += row * blocks
        append(
            new,
            value,
            tiles_ptr,
            tail_ptr + place * 2 * TILE * KEPT,
            values_ptr,
            key_scales_ptr,
            value_scales_ptr,
            None if scale_ptr is None else scale_ptr + group * KEPT,
            None if mean_ptr is None else mean_ptr + group * KEPT,
            block_table_ptr,
            position,
            blocks,
            first_cell,
            block_stride,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_DIM_PADDED,
            TILE,
            BLOCK,
        )

    if dims_ptr is not None:
        if min_length is not None:
            # As many tokens as `decode` will count, the new one too.
            is_short = tl.minimum(position + 1, tiles * TILE) < min_length
            if does_query & is_short:
                tl.store(mask_ptr + place * KEPT + narrow, tl.full([KEPT_PADDED], 1, tl.int8), column)
                tl.store(dims_ptr + place * PLACES + narrow, narrow, narrow < PLACES)
                if counts_ptr is not None:
                    tl.store(counts_ptr + place, KEPT)
            does_query = does_query & (is_short == 0)
        if does_query:
            # The dimensions of largest summed square; among equals the lower one, and a NaN is largest.
            if SELECTION == "static":
                size = (KEPT_PADDED - narrow).to(tl.float32)
            else:
                size = tl.where(inside[:, None], turned, 0.0)
                if SELECTION == "weighted":
                    size *= rms[None, :]
                size = tl.sum(size * size if SQUARED else tl.abs(size), 0)
                size = tl.where(size == size, size, float("inf"))
            size = tl.where(column, size, -1.0)
            ahead = (size[:, None] > size[None, :]) | (
                (size[:, None] == size[None, :]) & (narrow[:, None] < narrow[None, :])
            )
            rank = tl.sum(ahead.to(tl.int32), 0)
            if not ADAPTIVE:
                chosen = (rank < COUNT).to(tl.int32)
                if counts_ptr is not None:
                    tl.store(counts_ptr + place, COUNT)
            else:
                # Dropping a dimension costs its variance and that of all behind it.
                error = tl.where(inside[:, None], turned, 0.0) * rms[None, :] * scaling
                variance = tl.sum(error * error, 0)
                behind = tl.sum(tl.where(ahead, 0.0, variance[:, None]), 0)
                few = behind <= logit_error
                chosen = (((few == 0) | (rank == 0)) & column).to(tl.int32)
                tl.store(counts_ptr + place, tl.sum(chosen, 0))
            tl.store(mask_ptr + place * KEPT + narrow, chosen.to(tl.int8), column)
            tl.store(dims_ptr + place * PLACES + rank, narrow, chosen > 0)


@triton.jit
def append(
    key,
    value,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    scale_ptr,
    mean_ptr,
    block_table_ptr,
    position,
    blocks,
    first_cell,
    block_stride,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a rotated key, [KEPT_PADDED], and a value, [VALUE_DIM_PADDED], of one sequence and key-value head."""
    narrow, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_DIM_PADDED)
    column = narrow < KEPT
    # The new token replaces one of the tile before last, which must be in its place by then.
    slot = position % (2 * TILE)
    if (position % TILE == 0) & (position >= 2 * TILE):
        tokens = tl.arange(0, TILE)
        there = column[:, None] & (tokens[None, :] >= 0)
        old = tl.load(tail_ptr + (slot + tokens[None, :]) * KEPT + narrow[:, None], there, 0.0)
        cells = token_blocks(block_table_ptr, first_cell, block_stride, position // TILE - 2, blocks, BLOCK, TILE)
        if scale_ptr is not None:
            scale, mean = tl.load(scale_ptr + narrow, column, 1.0), tl.load(mean_ptr + narrow, column, 0.0)
            codes, steps = _rounded((old.to(tl.float32) - mean[:, None]) / scale[:, None], 0)
            tl.store(token_pointers(key_scales_ptr, block_table_ptr, cells, 1, BLOCK, TILE), steps)
        else:
            codes = old
        tl.store(key_pointers(tiles_ptr, block_table_ptr, cells, narrow, KEPT, BLOCK, TILE), codes, there)
        tl.debug_barrier()
    tl.store(tail_ptr + slot * KEPT + narrow, key.to(tail_ptr.dtype.element_ty), column)
    page = position // BLOCK
    if block_table_ptr is not None:
        page = tl.load(block_table_ptr + page)
    at = (first_cell + page.to(tl.int64) * block_stride) * BLOCK + position % BLOCK
    if value_scales_ptr is not None:
        value_codes, value_step = _rounded(value.to(tl.float32), 0)
        tl.store(value_scales_ptr + at, value_step)
        tl.store(values_ptr + at * VALUE_DIM + columns, value_codes, columns < VALUE_DIM)
    else:
        tl.store(values_ptr + at * VALUE_DIM + columns, value, columns < VALUE_DIM)


@triton.jit
def _rounded(states, AXIS: tl.constexpr):
    """`ops.tiled.rounded` along an axis."""
    step = (tl.max(tl.abs(states), AXIS) / 127 * 1.0078125).to(tl.bfloat16)
    # The largest of numbers leaves NaN out.
    step = tl.where(tl.sum(states * 0, AXIS) == 0, step.to(tl.float32), float("nan")).to(tl.bfloat16)
    divisor = tl.where(step.to(tl.float32) > 0, step.to(tl.float32), 1.0)
    places = states / tl.expand_dims(divisor, AXIS)
    # To the nearest, of two equally near ones the even: 1.5 * 2**23 has no room for less than one.
    codes = tl.minimum(tl.maximum((places + 12582912.0) - 12582912.0, -127.0), 127.0)
    return (codes + 128).to(tl.uint8), step
