# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""AQUA decoding over pages on a GPU: one query token a sequence, reading only the chosen dimensions of most keys.

The tiles of all sequences and heads stand in one row, and each program takes an equal share of it, whatever the lengths
are. Where there are programs enough the row has gaps, so that each has tiles of one head. Lengths are read by the
programs alone, so that a recorded step serves any of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.blocks import (
    LEAST_SIZE,
    LOG2_E,
    TILE,
    VERSION,
    on_device_of,
    padded,
    shared_memory,
    sm_count,
    starts_early,
    store_part,
)
from aqua_attention.ops.backends.triton.decode import (
    BY_HAND_GROUP,
    BY_HAND_VALUES,
    MOST_STAGES,
    OTHER_BYTES,
)
from aqua_attention.ops.backends.triton.decode_int8 import VALUE_UNIT
from aqua_attention.ops.backends.triton.decode_merge import merge, merging
from aqua_attention.ops.backends.triton.paged import PageArguments, page_constants
from aqua_attention.ops.backends.triton.paged_tiles import edge_tiles, inner_tiles
from aqua_attention.ops.layout import TILE as TILE_TOKENS
from aqua_attention.ops.layout import Chosen
from aqua_attention.ops.pages import PagedCache, PagedLayer, Step

DIMS_AT_ONCE = 32
PROGRAMS, WARPS = 2, 4
"""Programs on each multiprocessor, and warps of one."""
QUANTIZED_PROGRAMS, QUANTIZED_WARPS, QUANTIZED_STAGES = 2, 4, 3
"""The same over codes of 8 bits, and tiles on their way."""
LEAST_TILES = 2
"""Tiles of a program at least, where sequences have so many. One sequence of 8,250 tokens took 25.9 us so, and 29.8
with 4 (`benchmarks/serve_decode.py --size 1x8250 --capacity 8320 --only 'k_ratio 0.5' --set LEAST_TILES=4`), before the
row had gaps."""
BY_HAND_ROWS = 64
"""Sequences times heads from which on a kernel with registers placed by hand takes codes of 8 bits."""
LEAST_BATCH = 64
"""Batches up to this size share one compiled kernel."""


def decode_paged(
    query: Tensor, chosen: Chosen | None, cache: PagedCache, layer: PagedLayer, step: Step, output: Tensor
) -> None:
    """Attention of one query token a sequence to its pages, the new token's included.

    Args:
        query: [batch, num_attention_heads, kept], as keys are stored; the heads of a token lie together.
        chosen: the dimensions to multiply outside the exact window; None: all.
        output: [batch, num_attention_heads, value_dim], contiguous; is written.

    Raises:
        AquaError: fewer counters than sequences and heads.
    """
    (batch, heads, kept), kv_heads, plan = query.shape, cache.num_key_value_heads, layer.plan
    if is_by_hand(query, cache, layer, step):
        from aqua_attention.ops.backends.triton.paged_by_hand import decode_by_hand

        decode_by_hand(query, chosen, cache, layer, step, output)
        return
    if step.arrived.numel() < batch * kv_heads:
        raise AquaError(f"arrived holds {step.arrived.numel()} counters: {batch} sequences need {batch * kv_heads}")
    group, is_quantized = heads // kv_heads, cache.quantization is not None
    most = kept if chosen is None else chosen.dims.shape[-1]
    programs, warps = (QUANTIZED_PROGRAMS, QUANTIZED_WARPS) if is_quantized else (PROGRAMS, WARPS)
    count = step.block_table.shape[1] * cache.block_size // TILE_TOKENS + 1
    programs = min(programs * sm_count(query), -(-batch * kv_heads * count // LEAST_TILES))
    # A program has one part of each head that it comes to, so heads and programs number the parts.
    partial = query.new_empty((batch * kv_heads + programs, group, cache.value_dim), dtype=torch.float32)
    lse = query.new_empty((batch * kv_heads + programs, group), dtype=torch.float32)
    window = layer.window if chosen is None else None
    sink, recent, min_length = (plan.sink, plan.recent, plan.min_length) if chosen is not None and plan else (0, 0, 0)
    with on_device_of(query):
        _decode_paged[(programs,)](
            query,
            *((None, None) if chosen is None else chosen[:2]),
            PageArguments.of(cache),
            step.lengths,
            step.block_table,
            step.arrived,
            partial,
            lse,
            output,
            batch,
            query.stride(0),
            step.block_table.stride(0),
            step.block_table.shape[1],
            layer.scaling * LOG2_E,
            None if layer.softcap is None else layer.softcap * LOG2_E,
            sink,
            recent,
            min_length or None,
            window,
            BATCH_PADDED=max(LEAST_BATCH, triton.next_power_of_2(batch)),
            HEADS=kv_heads,
            ROWS=padded(group),
            CHOSEN=most,
            DIMS_AT_ONCE=DIMS_AT_ONCE if most > LEAST_SIZE else LEAST_SIZE,
            LEAST=LEAST_TILES,
            ASSEMBLY=query.is_cuda,
            num_warps=warps,
            num_stages=QUANTIZED_STAGES
            if is_quantized
            else stages(query, kept if min_length else most, cache.value_dim),
            **page_constants(cache, group),
            **merging(group, min(programs, count)),
            **starts_early(query),
        )


def is_by_hand(query: Tensor, cache: PagedCache, layer: PagedLayer, step: Step) -> bool:
    """Whether inner tiles are those of the kernel with registers placed by hand, see `decode.is_by_hand`.

    Lengths are not known here. With few sequences and heads it does not pay, whatever these are.
    """
    if cache.quantization is None or not query.is_cuda or VERSION < (3, 6):
        return False
    (block, head), tables = cache.storage.stride()[:2], step.block_table
    if block % head or not query.is_contiguous() or tables.stride(0) < tables.shape[1] or layer.softcap or layer.window:
        return False
    group = query.shape[1] // cache.num_key_value_heads
    fits = group <= BY_HAND_GROUP and cache.value_dim in BY_HAND_VALUES
    return fits and len(query) * cache.num_key_value_heads >= BY_HAND_ROWS


def stages(query: Tensor, dims: int, value_dim: int) -> int:
    """Tiles on their way, as many as shared memory has room for."""
    tile_bytes = TILE_TOKENS * (padded(dims) + padded(value_dim)) * query.element_size()
    most = MOST_STAGES if query.element_size() == 2 else 2
    return max(1, min(most, 1 + (shared_memory(query) // PROGRAMS - OTHER_BYTES) // tile_bytes))


@triton.jit(do_not_specialize=["batch"])
def _decode_paged(
    query_ptr,
    dims_ptr,
    mask_ptr,
    pages,
    lengths_ptr,
    block_table_ptr,
    arrived_ptr,
    partial_ptr,
    lse_ptr,
    output_ptr,
    batch,
    query_stride,
    table_stride,
    table_width,
    scaling,
    softcap,
    sink,
    recent,
    min_length,
    window,
    BATCH_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_AT_ONCE: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A share of the tiles of all sequences and heads; of each head the last program to end merges all parts."""
    program = tl.program_id(0)
    rows = tl.arange(0, BATCH_PADDED)
    lengths = tl.load(lengths_ptr + rows, rows < batch, 0, cache_modifier=".cg")
    first_tiles = tl.zeros_like(lengths)
    if window is not None:
        first_tiles = tl.maximum(lengths - window, 0) // TILE
    # A sequence without a token has a tile in which nothing is seen: its output is zero.
    counts = tl.where(rows < batch, tl.maximum(tl.cdiv(lengths, TILE) - first_tiles, 1), 0)
    each, rooms = rooms_of(counts, tl.num_programs(0), HEADS, LEAST)
    starts = (tl.cumsum(rooms, 0) - rooms) * HEADS
    begin = program * each
    end = tl.minimum(begin + each, tl.sum(rooms, 0) * HEADS)
    if EARLY:
        # For the queries and the new token. Lengths and tables are older.
        tl.extra.cuda.gdc_wait()
    if begin < end:
        first = _place_of(rows, batch, rooms, starts, begin, HEADS)
        last = _place_of(rows, batch, rooms, starts, end - 1, HEADS)
        for number in range(0, last - first + 1):
            place = first + number
            row, group = place // HEADS, place % HEADS
            of_row = rows == row
            head_tiles, room = tl.sum(tl.where(of_row, counts, 0), 0), tl.sum(tl.where(of_row, rooms, 0), 0)
            start = tl.sum(tl.where(of_row, starts, 0), 0) + group * room
            length = tl.sum(tl.where(of_row, lengths, 0), 0)
            first_tile = tl.sum(tl.where(of_row, first_tiles, 0), 0)
            first_seen = 0
            if window is not None:
                first_seen = tl.maximum(length - window, 0)
            first_program = start // each
            splits = (start + head_tiles - 1) // each - first_program + 1
            at = (place + first_program).to(tl.int64) * GROUP
            attend_part(
                (query_ptr, dims_ptr, mask_ptr),
                pages,
                (block_table_ptr, table_stride, table_width),
                (partial_ptr + at * VALUE_DIM, lse_ptr + at, splits, program - first_program),
                (scaling, softcap, sink, recent, min_length, first_seen, length),
                row,
                group,
                first_tile + tl.maximum(begin - start, 0),
                first_tile + tl.minimum(end - start, head_tiles),
                query_stride,
                HEADS,
                GROUP,
                ROWS,
                KEPT,
                KEPT_PADDED,
                VALUE_DIM,
                VALUE_PADDED,
                CHOSEN,
                DIMS_AT_ONCE,
                BLOCK,
                ASSEMBLY,
                False,
            )
            tl.debug_barrier()  # the whole program has written before it says so
            if tl.atomic_add(arrived_ptr + place, 1) == splits - 1:
                tl.store(arrived_ptr + place, 0)
                output_at = output_ptr + place.to(tl.int64) * GROUP * VALUE_DIM
                results = (partial_ptr + at * VALUE_DIM, lse_ptr + at, output_at, None)
                merge(results, splits, 0, GROUP, GROUP_PADDED, VALUE_DIM, VALUE_PADDED, MERGED)


@triton.jit
def rooms_of(counts, programs, HEADS: tl.constexpr, LEAST: tl.constexpr):
    """Tiles of a program, and those that each head of a sequence takes in the row.

    Where there are programs enough a head takes whole programs, and its last one is not full. Else heads follow each
    other, and a program may have the end of one and the beginning of the next.

    Args:
        counts: tiles of a head of each sequence; LEAST: of a program, where sequences have so many.
    """
    each = tl.maximum(tl.cdiv(tl.sum(counts, 0) * HEADS, programs), tl.minimum(LEAST, tl.max(counts, 0)))
    parts = tl.cdiv(counts, each)
    return each, tl.where(tl.sum(parts, 0) * HEADS <= programs, parts * each, counts)


@triton.jit
def _place_of(rows, batch, rooms, starts, tile, HEADS: tl.constexpr):
    """The sequence and head of a tile of the whole row."""
    row = tl.sum(((starts <= tile) & (rows < batch)).to(tl.int32), 0) - 1
    start = tl.sum(tl.where(rows == row, starts, 0), 0)
    return row * HEADS + (tile - start) // tl.sum(tl.where(rows == row, rooms, 0), 0)


@triton.jit
def attend_part(
    chosen,
    pages,
    table,
    part,
    limits,
    row,
    group,
    begin,
    end,
    query_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Attention of a head to its tiles from `begin` to before `end`.

    With EDGES to those only in which a token needs every dimension.

    Args:
        table: pointer, stride and width; part: pointers to the parts of the head, how many there are, which this is.
        limits: factor and soft limit of the scores; the exact window and `min_length`, or None; what is seen.
    """
    query_ptr, dims_ptr, mask_ptr = chosen
    block_table_ptr, table_stride, table_width = table
    partial_ptr, lse_ptr, splits, split = part
    scaling, softcap, sink, recent, min_length, first_seen, length = limits
    heads, columns = tl.arange(0, ROWS), tl.arange(0, VALUE_PADDED)
    place = (row * HEADS + group).to(tl.int64)
    if dims_ptr is None:
        # Every dimension of all tiles: those at the edges are not seen whole.
        exact_before, exact_from = 0, 0
        inner_begin, inner_end = tl.cdiv(first_seen, TILE), length // TILE
    else:
        exact_before, exact_from = sink, tl.maximum(length - recent, 0)
        inner_begin, inner_end = tl.cdiv(sink, TILE), exact_from // TILE
        dims_ptr += place * CHOSEN
        mask_ptr += place * KEPT
    if min_length is not None:
        is_short = length < min_length
        exact_from = tl.where(is_short, 0, exact_from)
        inner_begin, inner_end = tl.where(is_short, 0, inner_begin), tl.where(is_short, length // TILE, inner_end)
    channel_scale_ptr, channel_mean_ptr = pages.channel_scale, pages.channel_mean
    if channel_scale_ptr is not None:
        channel_scale_ptr += group * KEPT
        channel_mean_ptr += group * KEPT
    stored = (
        pages.key_pages,
        pages.value_pages,
        pages.key_scales,
        pages.value_scales,
        channel_scale_ptr,
        channel_mean_ptr,
    )
    query_ptr += row.to(tl.int64) * query_stride + group * GROUP * KEPT
    taken = (query_ptr, dims_ptr, mask_ptr)
    lookup = (
        block_table_ptr + row.to(tl.int64) * table_stride,
        table_width,
        group.to(tl.int64) * pages.head_stride,
        pages.block_stride,
    )
    inner_begin = tl.minimum(tl.maximum(inner_begin, begin), end)
    inner_end = tl.minimum(tl.maximum(inner_end, inner_begin), end)
    state = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, VALUE_PADDED], tl.float32),
    )
    bounds = (scaling, softcap, first_seen, length, exact_before, exact_from)
    # Short sequences have a loop of their own, over every dimension; one of the two is empty.
    first: tl.constexpr = 1 if min_length is None else 0
    change = inner_begin
    if min_length is not None:
        change = tl.where(is_short, inner_end, inner_begin)
    for loop in tl.static_range(first, 1 if EDGES else 2):
        state = inner_tiles(
            (query_ptr, None, None) if loop == 0 else taken,
            stored,
            lookup,
            state,
            bounds,
            inner_begin if loop == 0 else change,
            change if loop == 0 else inner_end,
            GROUP,
            ROWS,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            KEPT if loop == 0 else CHOSEN,
            DIMS_AT_ONCE,
            BLOCK,
            ASSEMBLY,
        )
    state = edge_tiles(
        taken,
        stored,
        lookup,
        state,
        bounds,
        (begin, inner_begin, inner_end, end),
        GROUP,
        ROWS,
        KEPT,
        KEPT_PADDED,
        VALUE_DIM,
        VALUE_PADDED,
        BLOCK,
    )
    largest, total, output = state
    if pages.key_scales is not None:
        output /= VALUE_UNIT
    store_part(partial_ptr, lse_ptr, heads * splits + split, largest, total, output, heads < GROUP, columns, VALUE_DIM)
