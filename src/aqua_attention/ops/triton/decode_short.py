# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""A whole decoding step with every dimension in one launch, for caches of few tokens.

`prepare` and `decode` are two, and below some thousands of tokens it is launches that take the time. Here each program
rotates the query itself, and only the one with the newest tokens does anything with the key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.tiled import TILE, TiledCache
from aqua_attention.ops.triton.blocks import (
    cells_of,
    key_pointers,
    load_rotation,
    on_device_of,
    online_softmax,
    padded,
    page_numbers,
    starts_early,
    store_part,
    token_cells,
    token_pointers,
)
from aqua_attention.ops.triton.decode import LOG2_E, MERGED_ROWS
from aqua_attention.ops.triton.decode_merge import merge
from aqua_attention.ops.triton.prepare import LARGEST_CHUNK, append, load_states, turn

WARPS, STAGES = 8, 3
LARGEST_SHORT = 128
"""Dimensions of a head: tiles on their way, and the rotation, must fit into shared memory."""


def decode_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TiledCache,
    rotation: Tensor,
    *,
    splits: int,
    scaling: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate one query and key token a sequence, append key and value, attend with every dimension.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        cache: of which nothing is rounded.
        rotation: float32 [num_key_value_heads, head_dim, kept]. On a GPU it is read before the kernel ahead of this
            one has ended: that one must not be what writes it.
        splits: programs for the tiles of each sequence and key-value head, besides the one with the tail.
        scaling: factor of the scores; default 1/sqrt(kept).

    Returns:
        What `decode` returns, and rotated queries [batch, num_attention_heads, kept].
    """
    (batch, groups, kept, value_dim, _), (_, heads, head_dim) = cache.shape, query.shape
    splits = min(splits, max(cache.count - 2, 0)) + 1
    group_padded = triton.next_power_of_2(heads // groups)
    rotated = query.new_empty((batch, heads, kept))
    output = query.new_empty((batch, heads, value_dim))
    partial = query.new_empty((batch, heads, splits, value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, splits), dtype=torch.float32)
    with on_device_of(query):
        _decode_short[(splits, groups, batch)](
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            rotation.contiguous(),
            cache.tiles,
            cache.tail,
            cache.values,
            None if cache.pages is None else cache.pages.table,
            cache.lengths,
            cache.arrived,
            partial,
            lse,
            rotated,
            output,
            (kept**-0.5 if scaling is None else scaling) * LOG2_E,
            cache.count,
            0 if cache.pages is None else cache.pages.table.shape[1],
            *cache.cell_strides,
            GROUP=heads // groups,
            ROWS=padded(heads // groups + 1),
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=padded(head_dim),
            CHUNK=min(padded(head_dim), LARGEST_CHUNK // padded(kept)),
            KEPT=kept,
            KEPT_PADDED=padded(kept),
            VALUE_DIM=value_dim,
            VALUE_PADDED=padded(value_dim),
            GROUP_PADDED=group_padded,
            SPLITS_PADDED=triton.next_power_of_2(splits),
            MERGED=min(triton.next_power_of_2(splits), max(1, MERGED_ROWS // group_padded)),
            TILE=TILE,
            BLOCK=cache.block,
            STAGES=STAGES,
            num_warps=WARPS,
            **starts_early(query, rotation.is_contiguous()),
        )
    return output, rotated


@triton.jit
def _decode_short(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    table_ptr,
    lengths_ptr,
    arrived_ptr,
    partial_ptr,
    lse_ptr,
    rotated_ptr,
    output_ptr,
    scaling,
    count,
    blocks,
    row_stride,
    group_stride,
    block_stride,
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
    SPLITS_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
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
    position = tl.load(lengths_ptr + row, cache_modifier=".cg")
    states = load_states(query_ptr, key_ptr, place, 0, GROUP, ROWS, HEAD_DIM, CHUNK)
    # Tiles that are read as such: not one to which this step moves tokens, whose place in the tail it needs.
    done = tl.maximum((position - 1) // TILE - 1, 0)
    each = tl.cdiv(done, tl.maximum(splits - 1, 1))
    begin = (split - 1) * each
    end = tl.minimum(begin + each, done)
    used = 1 + tl.cdiv(done, tl.maximum(each, 1))
    first_cell = row.to(tl.int64) * row_stride + group.to(tl.int64) * group_stride
    if table_ptr is not None:
        table_ptr += row * blocks
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
    if split == 0:
        tail_ptr += place * 2 * TILE * KEPT
        keys, values = _tail_block(
            tail_ptr,
            values_ptr,
            table_ptr,
            first_cell,
            block_stride,
            done,
            position,
            blocks,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            TILE,
            BLOCK,
        )
        value = tl.load(value_ptr + place * VALUE_DIM + columns, column, 0.0)
        _count_reader(lengths_ptr, arrived_ptr, position, row, splits, groups, count * TILE)
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
        tl.store(
            rotated_ptr + (place * GROUP + heads[:, None]) * KEPT + dim[None, :],
            turned,
            inside[:, None] & (dim < KEPT)[None, :],
        )
        new = tl.sum(tl.where((heads == GROUP)[:, None], turned.to(tl.float32), 0.0), 0)
        for block in tl.range(done, tl.cdiv(position, TILE), num_stages=1):
            scores = tl.dot(turned, keys, input_precision="ieee") * scaling
            scores = tl.where((block * TILE + tokens < position)[None, :], scores, float("-inf"))
            largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")
            keys, values = _tail_block(
                tail_ptr,
                values_ptr,
                table_ptr,
                first_cell,
                block_stride,
                block + 1,
                position,
                blocks,
                KEPT,
                KEPT_PADDED,
                VALUE_DIM,
                VALUE_PADDED,
                TILE,
                BLOCK,
            )
        if position < count * TILE:
            score = tl.sum(turned.to(tl.float32) * new[None, :], 1) * scaling
            now = tl.maximum(largest, score)
            shrink, weight = tl.exp2(largest - now), tl.exp2(score - now)
            total = total * shrink + weight
            output = output * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            largest = now
            tl.debug_barrier()  # the tail is read before it is written
            append(
                new,
                value,
                tiles_ptr,
                tail_ptr,
                values_ptr,
                None,
                None,
                None,
                None,
                table_ptr,
                position,
                blocks,
                first_cell,
                block_stride,
                KEPT,
                KEPT_PADDED,
                VALUE_DIM,
                VALUE_PADDED,
                TILE,
                BLOCK,
            )
    else:
        numbers = page_numbers(table_ptr, begin, blocks, BLOCK, TILE)
        _count_reader(lengths_ptr, arrived_ptr, position, row, splits, groups, count * TILE)
        if begin < end:
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
            for tile in tl.range(begin, end, num_stages=STAGES):
                cells = cells_of(numbers, first_cell, block_stride, tile, BLOCK, TILE)
                numbers = page_numbers(table_ptr, tile + 1, blocks, BLOCK, TILE)
                keys_at = key_pointers(tiles_ptr, table_ptr, cells, dim, KEPT, BLOCK, TILE)
                if KEPT == KEPT_PADDED:
                    keys = tl.load(keys_at)
                else:
                    keys = tl.load(keys_at, (dim[:, None] < KEPT) & (tokens[None, :] >= 0), 0.0)
                values_at = (
                    token_pointers(values_ptr, table_ptr, cells, VALUE_DIM, BLOCK, TILE)[:, None] + columns[None, :]
                )
                if VALUE_DIM == VALUE_PADDED:
                    values = tl.load(values_at)
                else:
                    values = tl.load(values_at, (tokens[:, None] >= 0) & column[None, :], 0.0)
                scores = tl.dot(turned, keys, input_precision="ieee") * scaling
                largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")

    if split < used:
        first_head = place * GROUP
        if used == 1:
            output = output / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(
                output_ptr + (first_head + heads)[:, None] * VALUE_DIM + columns[None, :],
                output.to(output_ptr.dtype.element_ty),
                inside[:, None] & column[None, :],
            )
        else:
            store_part(
                partial_ptr,
                lse_ptr,
                (first_head + heads) * used + split,
                largest,
                total,
                output,
                inside,
                columns,
                VALUE_DIM,
            )
            tl.debug_barrier()  # the whole program has written before it says so
            if tl.atomic_add(arrived_ptr + row * (groups + 1) + group, 1) == used - 1:
                tl.store(arrived_ptr + row * (groups + 1) + group, 0)
                merge(
                    partial_ptr,
                    lse_ptr,
                    output_ptr,
                    None,
                    used,
                    first_head,
                    GROUP,
                    GROUP_PADDED,
                    VALUE_DIM,
                    VALUE_PADDED,
                    SPLITS_PADDED,
                    MERGED,
                )


@triton.jit
def _count_reader(lengths_ptr, arrived_ptr, position, row, splits, groups, longest):
    """When all programs of a sequence have read its length, the last lets it grow."""
    at = arrived_ptr + row * (groups + 1) + groups
    # The mask is there for what it depends on: the length has come before this is counted.
    if tl.atomic_add(at, 1, mask=position >= 0, sem="relaxed") == splits * groups - 1:
        tl.store(at, 0)
        tl.store(lengths_ptr + row, tl.minimum(position + 1, longest))


@triton.jit
def _tail_block(
    tail_ptr,
    values_ptr,
    table_ptr,
    first_cell,
    block_stride,
    block,
    position,
    blocks,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys, [KEPT_PADDED, TILE], and values, [TILE, VALUE_PADDED], of the tokens of a tile that are in the tail yet."""
    tokens, dim, columns = tl.arange(0, TILE), tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    at = block * TILE + tokens
    seen = at < position
    keys = tl.load(
        tail_ptr + (at % (2 * TILE))[None, :] * KEPT + dim[:, None], (dim < KEPT)[:, None] & seen[None, :], 0.0
    )
    cells = token_cells(table_ptr, first_cell, block_stride, block, blocks, BLOCK, TILE)
    values = tl.load(
        token_pointers(values_ptr, table_ptr, cells, VALUE_DIM, BLOCK, TILE)[:, None] + columns[None, :],
        seen[:, None] & (columns < VALUE_DIM)[None, :],
        0.0,
    )
    return keys, values
