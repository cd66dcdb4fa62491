# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernel of `decode_short`.

Each program rotates the query. One has the new token and the part of the tail that it belongs to, one the other part,
the rest have tiles; the last to arrive merges them. Up to TILE tokens one is enough, and then nothing is merged.
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
from aqua_attention.ops.backends.triton.decode_merge import merge
from aqua_attention.ops.backends.triton.prepare import append
from aqua_attention.ops.backends.triton.turn import load_rotation, load_states, turn


@triton.jit
def decode_short_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    cache,
    arrived_ptr,
    partial_ptr,
    lse_ptr,
    rotated_ptr,
    output_ptr,
    scaling,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of a sequence and key-value head; TOGETHER: all of it."""
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(1)
    place = (row * groups + group).to(tl.int64)
    rotation_ptr += group * HEAD_DIM * KEPT
    dtype = query_ptr.dtype.element_ty
    high, low = load_rotation(rotation_ptr, 0, dtype, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    if EARLY:
        # For what computes the query; a rotation is older.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(cache.lengths + row, cache_modifier=".cg")
    source = (query_ptr, key_ptr, rotation_ptr, place)
    loaded = (load_states(source, 0, GROUP, ROWS, HEAD_DIM, CHUNK), high, low)
    # Tiles that are read as such: not one to which this step moves tokens, whose place in the tail it needs.
    done = tl.maximum((position - 1) // TILE - 1, 0)
    halves = tl.where(position > TILE, 2, 1)
    if TOGETHER:
        each, used = done, 1
    else:
        each = tl.cdiv(done, tl.maximum(splits - 2, 1))
        used = halves + tl.cdiv(done, tl.maximum(each, 1))
    first_block = row.to(tl.int64) * cache.row_stride + group.to(tl.int64) * cache.head_stride
    first_head = place * GROUP
    # Each head has room for all programs, and its parts lie together.
    partial_ptr += first_head * (splits - used) * VALUE_DIM
    lse_ptr += first_head * (splits - used)
    block_table_ptr, scale_ptr, mean_ptr = cache.block_table, cache.channel_scale, cache.channel_mean
    if block_table_ptr is not None:
        block_table_ptr += row * cache.table_width
    stored = (cache.tiles, cache.value_tiles, cache.key_scales, cache.value_scales, scale_ptr, mean_ptr)
    lookup = (block_table_ptr, cache.table_width, first_block, cache.block_stride)
    heads, columns, tokens, dim = (
        tl.arange(0, ROWS),
        tl.arange(0, VALUE_PADDED),
        tl.arange(0, TILE),
        tl.arange(0, KEPT_PADDED),
    )
    inside, column = heads < GROUP, columns < VALUE_DIM
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    if split < (1 if TOGETHER else halves):
        tail_ptr = cache.tail + place * 2 * TILE * KEPT
        # The first program has the new token, and so the half of the tail in which that gets its place.
        newest = tl.where((halves == 2) & (position % TILE != 0), done + 1, done)
        tile = tl.where(split == 0, newest, 2 * done + 1 - newest)
        seen = tile * TILE + tokens < position
        keys, values = _half(tail_ptr, stored, lookup, tile, seen, KEPT, KEPT_PADDED, VALUE_DIM, VALUE_PADDED, BLOCK)
        value = tl.load(value_ptr + place * VALUE_DIM + columns, column, 0.0).to(tl.float32)
        _count_reader(cache.lengths, arrived_ptr, position, row, splits, groups, cache.tile_count * TILE)
        turned = turn(source, loaded, GROUP, ROWS, HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED)
        wide = turned.to(tl.float32)
        new = tl.sum(tl.where((heads == GROUP)[:, None], wide, 0.0), 0)
        is_new = (split == 0) & (position < cache.tile_count * TILE)
        score = tl.where(is_new, tl.sum(wide * new[None, :], 1) * scaling, float("-inf"))
        scores = tl.dot(turned, keys, input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        largest = tl.maximum(score, tl.max(scores, 1))
        # Where all scores are minus infinity, the other parts decide.
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        weight, weights = tl.exp2(score - safe), tl.exp2(scores - safe[:, None])
        total = weight + tl.sum(weights, 1)
        output = tl.where(is_new, weight[:, None] * value[None, :], 0.0)
        output = tl.dot(weights.to(dtype), values, output, input_precision="ieee")
        if split == 0:
            tl.store(
                rotated_ptr + (first_head + heads)[:, None] * KEPT + dim[None, :],
                turned,
                inside[:, None] & (dim < KEPT)[None, :],
            )
        if is_new:
            tl.debug_barrier()  # the tail is read before it is written
            append(new, value, tail_ptr, stored, lookup, position, KEPT, KEPT_PADDED, VALUE_DIM, VALUE_PADDED, BLOCK)
        if TOGETHER:
            if halves == 2:
                # All of its tokens are there.
                keys, values = _half(
                    tail_ptr,
                    stored,
                    lookup,
                    2 * done + 1 - newest,
                    tokens >= 0,
                    KEPT,
                    KEPT_PADDED,
                    VALUE_DIM,
                    VALUE_PADDED,
                    BLOCK,
                )
                scores = tl.dot(turned, keys, input_precision="ieee") * scaling
                largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")
            so_far = (turned, largest, total, output)
            largest, total, output = _tiles(
                so_far, stored, lookup, 0, done, scaling, KEPT, KEPT_PADDED, VALUE_DIM, VALUE_PADDED, BLOCK, STAGES
            )
    else:
        begin = (split - halves) * each
        end = tl.minimum(begin + each, done)
        _count_reader(cache.lengths, arrived_ptr, position, row, splits, groups, cache.tile_count * TILE)
        if begin < end:
            turned = turn(source, loaded, GROUP, ROWS, HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED)
            fresh = (turned, largest, total, output)
            largest, total, output = _tiles(
                fresh, stored, lookup, begin, end, scaling, KEPT, KEPT_PADDED, VALUE_DIM, VALUE_PADDED, BLOCK, STAGES
            )

    if split < used:
        if used == 1:
            output = output / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(
                output_ptr + (first_head + heads)[:, None] * VALUE_DIM + columns[None, :],
                output.to(output_ptr.dtype.element_ty),
                inside[:, None] & column[None, :],
            )
        else:
            at = (first_head + heads) * used + split
            store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM)
            tl.debug_barrier()  # the whole program has written before it says so
            if tl.atomic_add(arrived_ptr + row * (groups + 1) + group, 1) == used - 1:
                tl.store(arrived_ptr + row * (groups + 1) + group, 0)
                results = (partial_ptr, lse_ptr, output_ptr, None)
                merge(results, used, first_head, GROUP, GROUP_PADDED, VALUE_DIM, VALUE_PADDED, MERGED)


@triton.jit
def _count_reader(lengths_ptr, arrived_ptr, position, row, splits, groups, longest):
    """When all programs of a sequence have read its length, the last lets it grow."""
    at = arrived_ptr + row * (groups + 1) + groups
    # The length has come to every warp before this is counted: all have branched, or asked for tokens, by it, and the
    # mask depends on it.
    tl.debug_barrier()
    if tl.atomic_add(at, 1, mask=position >= 0, sem="relaxed") == splits * groups - 1:
        tl.store(at, 0)
        tl.store(lengths_ptr + row, tl.minimum(position + 1, longest))


@triton.jit
def _half(
    tail_ptr,
    stored,
    lookup,
    tile,
    seen,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys, [KEPT_PADDED, TILE], and values, [TILE, VALUE_PADDED], of the tokens of a tile that are in the tail yet."""
    values_ptr = stored[1]
    block_table_ptr, table_width, first_block, block_stride = lookup
    tokens, dim, columns = tl.arange(0, TILE), tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    slot = (tile % 2) * TILE + tokens
    keys = tl.load(tail_ptr + slot[None, :] * KEPT + dim[:, None], (dim < KEPT)[:, None] & seen[None, :], 0.0)
    block_ids = token_blocks(block_table_ptr, first_block, block_stride, tile, table_width, BLOCK)
    values_at = token_pointers(values_ptr, block_table_ptr, block_ids, VALUE_DIM, BLOCK)[:, None] + columns[None, :]
    return keys, tl.load(values_at, seen[:, None] & (columns < VALUE_DIM)[None, :], 0.0)


@triton.jit
def _tiles(
    state,
    stored,
    lookup,
    begin,
    end,
    scaling,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """An online softmax goes on over the tiles from `begin` to before `end`."""
    query, largest, total, output = state
    tiles_ptr, values_ptr = stored[:2]
    block_table_ptr, table_width, first_block, block_stride = lookup
    tokens, dim, columns = tl.arange(0, TILE), tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    for tile in tl.range(begin, end, num_stages=STAGES):
        block_ids = token_blocks(block_table_ptr, first_block, block_stride, tile, table_width, BLOCK)
        keys_at = key_pointers(tiles_ptr, block_table_ptr, block_ids, dim, KEPT, BLOCK)
        if KEPT == KEPT_PADDED:
            keys = tl.load(keys_at)
        else:
            keys = tl.load(keys_at, (dim[:, None] < KEPT) & (tokens[None, :] >= 0), 0.0)
        values_at = token_pointers(values_ptr, block_table_ptr, block_ids, VALUE_DIM, BLOCK)[:, None] + columns[None, :]
        if VALUE_DIM == VALUE_PADDED:
            values = tl.load(values_at)
        else:
            values = tl.load(values_at, (tokens[:, None] >= 0) & (columns < VALUE_DIM)[None, :], 0.0)
        scores = tl.dot(query, keys, input_precision="ieee") * scaling
        largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")
    return largest, total, output
