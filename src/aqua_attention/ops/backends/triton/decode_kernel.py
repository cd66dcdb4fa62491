# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernel of `decode`.

The tokens of a sequence are split over programs; each writes the attention over its own tokens and its log-sum-exp, and
the last one to arrive merges them. Three programs have the blocks in which tokens can need every dimension, one each:
the first tile and the two halves of the tail. All others read `k` rows of each tile, without a branch in their loop.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import (
    TILE,
    key_pointers,
    online_softmax,
    store_part,
    token_blocks,
    token_pointers,
)
from aqua_attention.ops.backends.triton.decode_exact import exact_block
from aqua_attention.ops.backends.triton.decode_int8 import quantized_tiles
from aqua_attention.ops.backends.triton.decode_merge import merge


@triton.jit
def decode_kernel(
    query_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    cache,
    arrived_ptr,
    partial_ptr,
    lse_ptr,
    output_ptr,
    scores_ptr,
    whole_lse_ptr,
    scaling,
    sink,
    recent,
    min_length,
    others,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COPIES: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_AT_ONCE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPECIAL: tl.constexpr,
    ALONE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of the tokens of a sequence and key-value head; the last to end merges all.

    Args:
        others: parts that another kernel does, and a third merges; 0 where this one is ALONE. With EARLY this one
            starts when all programs of the other have, and ends when they have.
    """
    if EARLY and not ALONE:
        tl.extra.cuda.gdc_launch_dependents()
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0) + others, tl.num_programs(1)
    # Past the cache of this processor, where an earlier step's may lie.
    length = tl.minimum(tl.load(cache.lengths + row, cache_modifier=".cg") + APPENDED, cache.tile_count * TILE)
    done = tl.maximum((length - 1) // TILE - 1, 0)
    place = (row * groups + group).to(tl.int64)
    first_block = row.to(tl.int64) * cache.row_stride + group.to(tl.int64) * cache.head_stride
    tail_ptr = cache.tail + place * 2 * TILE * KEPT
    block_table_ptr, channel_scale_ptr, channel_mean_ptr = cache.block_table, cache.channel_scale, cache.channel_mean
    if block_table_ptr is not None:
        block_table_ptr += row * cache.table_width
    if channel_scale_ptr is not None:
        channel_scale_ptr += group * KEPT
        channel_mean_ptr += group * KEPT
    query_ptr += place * GROUP * KEPT
    if dims_ptr is not None:
        dims_ptr += place * CHOSEN
        mask_ptr += place * KEPT
    if counts_ptr is not None:
        counts_ptr += place
    first_head = place * GROUP
    key_scales_ptr, value_scales_ptr = cache.key_scales, cache.value_scales
    stored = (cache.tiles, cache.value_tiles, key_scales_ptr, value_scales_ptr, channel_scale_ptr, channel_mean_ptr)
    lookup = (block_table_ptr, cache.table_width, first_block, cache.block_stride)
    chosen = (query_ptr, dims_ptr, mask_ptr, counts_ptr)
    parts = (partial_ptr, lse_ptr, scores_ptr, split, splits, first_head, cache.tile_count)
    if split < SPECIAL:
        exact_block(
            chosen,
            tail_ptr,
            stored,
            lookup,
            parts,
            scaling,
            sink,
            recent,
            length,
            done,
            GROUP,
            COPIES,
            SPECIAL_ROWS,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            BLOCK,
            APPENDED,
            EARLY and ALONE,
        )
    elif ALONE:
        each = tl.cdiv(tl.maximum(done - 1, 0), splits - SPECIAL)
        begin = 1 + (split - SPECIAL) * each
        end = tl.minimum(begin + each, done)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if channel_scale_ptr is None:
            _tiles(
                chosen,
                stored,
                lookup,
                parts,
                scaling,
                begin,
                end,
                length,
                min_length,
                GROUP,
                ROWS,
                KEPT,
                KEPT_PADDED,
                VALUE_DIM,
                VALUE_PADDED,
                CHOSEN,
                DIMS_AT_ONCE,
                BLOCK,
            )
        else:
            quantized_tiles(
                chosen,
                stored,
                lookup,
                parts,
                scaling,
                begin,
                end,
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
            )

    if ALONE:
        tl.debug_barrier()  # the whole program has written before it says so
        if tl.atomic_add(arrived_ptr + row * (groups + 1) + group, 1) == splits - 1:
            tl.store(arrived_ptr + row * (groups + 1) + group, 0)
            results = (partial_ptr, lse_ptr, output_ptr, whole_lse_ptr)
            merge(results, splits, first_head, GROUP, GROUP_PADDED, VALUE_DIM, VALUE_PADDED, MERGED)
            if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
                if tl.atomic_add(arrived_ptr + row * (groups + 1) + groups, 1) == groups - 1:
                    # All programs of this sequence have read its length.
                    tl.store(arrived_ptr + row * (groups + 1) + groups, 0)
                    tl.store(cache.lengths + row, length)
    elif EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _tiles(
    chosen,
    stored,
    lookup,
    parts,
    scaling,
    begin,
    end,
    length,
    min_length,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention to the tiles from `begin` to before `end`, with the chosen dimensions.

    Where there is a `min_length`, a loop for short sequences stands before that for others, and one of them is empty.
    """
    query_ptr, dims_ptr, _, counts_ptr = chosen
    tiles_ptr, values_ptr = stored[:2]
    block_table_ptr, table_width, first_block, block_stride = lookup
    partial_ptr, lse_ptr, scores_ptr, split, splits, first_head, count = parts
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, KEPT_PADDED)
    column = columns < VALUE_DIM
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    if dims_ptr is None or min_length is not None:
        query = tl.load(query_ptr + heads[:, None] * KEPT + dim[None, :], inside[:, None] & (dim[None, :] < KEPT), 0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    limit = CHOSEN
    if counts_ptr is not None:
        limit = tl.load(counts_ptr)
    first: tl.constexpr = 1 if min_length is None else 0
    change = begin
    if min_length is not None:
        change = tl.where(length < min_length, tl.maximum(begin, end), begin)
    for loop in tl.static_range(first, 2):
        for tile in range(begin if loop == 0 else change, change if loop == 0 else end):
            block_ids = token_blocks(block_table_ptr, first_block, block_stride, tile, table_width, BLOCK)
            if dims_ptr is None or loop == 0:
                keys_at = key_pointers(tiles_ptr, block_table_ptr, block_ids, dim, KEPT, BLOCK)
                if KEPT == KEPT_PADDED:
                    keys = tl.load(keys_at)
                else:
                    keys = tl.load(keys_at, (dim[:, None] < KEPT) & (tokens[None, :] >= 0), 0.0)
                scores = tl.dot(query, keys, input_precision="ieee")
            else:
                scores = tl.zeros([ROWS, TILE], tl.float32)
                for start in tl.static_range(0, CHOSEN, DIMS_AT_ONCE):
                    indices = start + tl.arange(0, DIMS_AT_ONCE)
                    some = tl.load(dims_ptr + indices, indices < limit, 0)
                    queries = tl.load(
                        query_ptr + heads[:, None] * KEPT + some[None, :],
                        inside[:, None] & (indices[None, :] < limit),
                        0.0,
                    )
                    keys_at = key_pointers(tiles_ptr, block_table_ptr, block_ids, some, KEPT, BLOCK)
                    if counts_ptr is None:
                        # Where k is no multiple, the rest is dimension 0 again, times zero.
                        keys = tl.load(keys_at)
                    else:
                        keys = tl.load(keys_at, (indices[:, None] < limit) & (tokens[None, :] >= 0), 0.0)
                    scores = tl.dot(queries, keys, scores, input_precision="ieee")
            scores = scores * scaling
            values_at = (
                token_pointers(values_ptr, block_table_ptr, block_ids, VALUE_DIM, BLOCK)[:, None] + columns[None, :]
            )
            if VALUE_DIM == VALUE_PADDED:
                values = tl.load(values_at)
            else:
                values = tl.load(values_at, (tokens[:, None] >= 0) & column[None, :], 0.0)
            if scores_ptr is not None:
                there = inside[:, None] & (tokens[None, :] >= 0)
                scores_at = scores_ptr + (first_head + heads[:, None]) * count * TILE + tile * TILE + tokens[None, :]
                tl.store(scores_at, scores, there)
            largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")
    at = (first_head + heads) * splits + split
    store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM)
