# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernels of `decode`.

The tokens of a sequence are split over programs; each writes the attention over its own tokens and its log-sum-exp, and
the last one to arrive merges them. Three programs have the blocks in which tokens can need every dimension, one each:
the first tile and the two halves of the tail. All others read `k` rows of each tile, without a branch in their loop.

In the blocks with an exact window, what `prepare` of the same step does not write is read before it has ended: all but
the new token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aqua_attention.ops.triton.blocks import online_softmax


@triton.jit
def decode_kernel(
    query_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    lengths_ptr,
    arrived_ptr,
    partial_ptr,
    lse_ptr,
    output_ptr,
    scores_ptr,
    whole_lse_ptr,
    scaling,
    sink,
    recent,
    count,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COPIES: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    TILE: tl.constexpr,
    SPECIAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of the tokens of a sequence and key-value head; the last to end merges all."""
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(1)
    # Past the cache of this processor, where an earlier step's may lie.
    length = tl.minimum(tl.load(lengths_ptr + row, cache_modifier=".cg") + APPENDED, count * TILE)
    done = tl.maximum((length - 1) // TILE - 1, 0)
    place = (row * groups + group).to(tl.int64)
    tiles_ptr += place * count * DIM * TILE
    tail_ptr += place * 2 * TILE * DIM
    values_ptr += place * count * TILE * VALUE_DIM
    query_ptr += place * GROUP * DIM
    if dims_ptr is not None:
        dims_ptr += place * CHOSEN
        mask_ptr += place * DIM
    if counts_ptr is not None:
        counts_ptr += place
    first_head = place * GROUP
    if split < SPECIAL:
        _exact_block(
            query_ptr,
            mask_ptr,
            tiles_ptr,
            tail_ptr,
            values_ptr,
            partial_ptr,
            lse_ptr,
            scores_ptr,
            scaling,
            sink,
            recent,
            count,
            split,
            splits,
            length,
            done,
            first_head,
            GROUP,
            COPIES,
            SPECIAL_ROWS,
            DIM,
            DIM_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            TILE,
            APPENDED,
            EARLY,
        )
    else:
        each = tl.cdiv(tl.maximum(done - 1, 0), splits - SPECIAL)
        begin = 1 + (split - SPECIAL) * each
        _tiles(
            query_ptr,
            dims_ptr,
            counts_ptr,
            tiles_ptr,
            values_ptr,
            partial_ptr,
            lse_ptr,
            scores_ptr,
            scaling,
            count,
            split,
            splits,
            begin,
            tl.minimum(begin + each, done),
            first_head,
            GROUP,
            ROWS,
            DIM,
            DIM_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            CHOSEN,
            STEP,
            TILE,
            EARLY,
        )

    tl.debug_barrier()  # the whole program has written before it says so
    if tl.atomic_add(arrived_ptr + row * (groups + 1) + group, 1) == splits - 1:
        tl.store(arrived_ptr + row * (groups + 1) + group, 0)
        _merge(
            partial_ptr,
            lse_ptr,
            output_ptr,
            whole_lse_ptr,
            splits,
            first_head,
            GROUP,
            GROUP_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            SPLITS_PADDED,
            MERGED,
        )
        if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
            if tl.atomic_add(arrived_ptr + row * (groups + 1) + groups, 1) == groups - 1:
                # All programs of this sequence have read its length.
                tl.store(arrived_ptr + row * (groups + 1) + groups, 0)
                tl.store(lengths_ptr + row, length)


@triton.jit
def _exact_block(
    query_ptr,
    mask_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    sink,
    recent,
    count,
    split,
    splits,
    length,
    done,
    first_head,
    GROUP: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    APPENDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention to the first tile, or to a half of the tail.

    Where dimensions are chosen, each head has two rows: one sees the exact window with every dimension, one the other
    tokens with the chosen ones: so one matrix product does.
    """
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, DIM_PADDED)
    column = columns < VALUE_DIM
    rows = tl.arange(0, ROWS)
    member, is_narrow = rows % (ROWS // COPIES), rows >= ROWS // COPIES
    inside = member < GROUP
    position = tl.where(split == 0, 0, done + split - 1) * TILE + tokens
    seen = position < tl.where((split == 0) & (done == 0), 0, length)
    # Without the new token, which is being written.
    old = seen & (position < length - APPENDED)
    there = (dim[:, None] < DIM) & old[None, :]
    if split == 0:
        if EARLY:  # noqa: SIM102 (this is known when compiling, the other is not)
            if length == 2 * TILE + 1:
                # The first tile is being moved from the tail.
                tl.extra.cuda.gdc_wait()
        keys = tl.load(tiles_ptr + dim[:, None] * TILE + tokens[None, :], there, 0.0)
    else:
        keys = tl.load(tail_ptr + (position % (2 * TILE))[None, :] * DIM + dim[:, None], there, 0.0)
    values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :], old[:, None] & column[None, :], 0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    query = tl.load(query_ptr + member[:, None] * DIM + dim[None, :], inside[:, None] & (dim[None, :] < DIM), 0.0)
    visible = inside[:, None] & seen[None, :]
    if COPIES == 2:
        flags = tl.load(mask_ptr + dim, dim < DIM, 0)
        query = tl.where(is_narrow[:, None] & (flags == 0)[None, :], 0.0, query).to(query.dtype)
        exact = (position < sink) | (position >= length - recent)
        visible = visible & (exact[None, :] != is_narrow[:, None])
    scores = tl.dot(query, keys, input_precision="ieee")
    is_new = (position == length - APPENDED) & seen
    if APPENDED:
        key = tl.load(tail_ptr + (length - 1) % (2 * TILE) * DIM + dim, dim < DIM, 0.0)
        score = tl.sum(query.to(tl.float32) * key[None, :].to(tl.float32), 1)
        scores = tl.where(is_new[None, :], score[:, None], scores)
    scores = tl.where(visible, scores * scaling, float("-inf"))
    if scores_ptr is not None:
        tl.store(scores_ptr + (first_head + member[:, None]) * count * TILE + position[None, :], scores, visible)
    largest, total, output = online_softmax(
        scores,
        values,
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, VALUE_PADDED], tl.float32),
        "ieee",
    )
    if APPENDED:
        value = tl.load(values_ptr + (length - 1).to(tl.int64) * VALUE_DIM + columns, column, 0.0).to(tl.float32)
        weight = tl.sum(tl.where(is_new[None, :] & visible, tl.exp2(scores - largest[:, None]), 0.0), 1)
        # Nothing, not NaN, where a token that is not seen has an infinite value.
        output += tl.where(weight[:, None] != 0, weight[:, None] * value[None, :], 0.0)
    if COPIES == 2:
        # The two rows of a head lie in the same threads.
        largest = tl.reshape(largest, [2, ROWS // 2])
        both = tl.max(largest, 0)
        share = tl.exp2(largest - tl.where(both == float("-inf"), 0.0, both)[None, :])
        largest, total = both, tl.sum(tl.reshape(total, [2, ROWS // 2]) * share, 0)
        output = tl.sum(tl.reshape(output, [2, ROWS // 2, VALUE_PADDED]) * share[:, :, None], 0)
        member = tl.arange(0, ROWS // 2)
    at = (first_head + member) * splits + split
    _store_part(partial_ptr, lse_ptr, at, largest, total, output, member < GROUP, columns, VALUE_DIM)


@triton.jit
def _tiles(
    query_ptr,
    dims_ptr,
    counts_ptr,
    tiles_ptr,
    values_ptr,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    count,
    split,
    splits,
    begin,
    end,
    first_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention to the tiles from `begin` to before `end`, with the chosen dimensions."""
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, DIM_PADDED)
    column = columns < VALUE_DIM
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    limit = CHOSEN
    if counts_ptr is not None:
        limit = tl.load(counts_ptr)
    if dims_ptr is None:
        query = tl.load(query_ptr + heads[:, None] * DIM + dim[None, :], inside[:, None] & (dim[None, :] < DIM), 0.0)
    for tile in range(begin, end):
        if dims_ptr is None:
            keys_ptr = tiles_ptr + (tile * DIM + dim[:, None]) * TILE + tokens[None, :]
            if DIM == DIM_PADDED:
                keys = tl.load(keys_ptr)
            else:
                keys = tl.load(keys_ptr, (dim[:, None] < DIM) & (tokens[None, :] >= 0), 0.0)
            scores = tl.dot(query, keys, input_precision="ieee")
        else:
            scores = tl.zeros([ROWS, TILE], tl.float32)
            for start in tl.static_range(0, CHOSEN, STEP):
                places = start + tl.arange(0, STEP)
                some = tl.load(dims_ptr + places, places < limit, 0)
                chosen = tl.load(
                    query_ptr + heads[:, None] * DIM + some[None, :],
                    inside[:, None] & (places[None, :] < limit),
                    0.0,
                )
                keys_ptr = tiles_ptr + (tile * DIM + some[:, None]) * TILE + tokens[None, :]
                if counts_ptr is None:
                    # Where k is no multiple, the rest is dimension 0 again, times zero.
                    keys = tl.load(keys_ptr)
                else:
                    keys = tl.load(keys_ptr, (places[:, None] < limit) & (tokens[None, :] >= 0), 0.0)
                scores = tl.dot(chosen, keys, scores, input_precision="ieee")
        scores = scores * scaling
        position = tile * TILE + tokens
        if VALUE_DIM == VALUE_PADDED:
            values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :])
        else:
            there = (position[:, None] >= 0) & column[None, :]
            values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :], there, 0.0)
        if scores_ptr is not None:
            there = inside[:, None] & (tokens[None, :] >= 0)
            tl.store(scores_ptr + (first_head + heads[:, None]) * count * TILE + position[None, :], scores, there)
        largest, total, output = online_softmax(scores, values, largest, total, output, "ieee")
    at = (first_head + heads) * splits + split
    _store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM)


@triton.jit
def _merge(
    partial_ptr,
    lse_ptr,
    output_ptr,
    whole_lse_ptr,
    splits,
    first_head,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The attention over all splits of the sequence, from that over each and its log-sum-exp."""
    columns = tl.arange(0, VALUE_PADDED)
    column = columns < VALUE_DIM
    every, member = tl.arange(0, SPLITS_PADDED), tl.arange(0, GROUP_PADDED)
    first = (first_head + member) * splits
    # Past the cache of this processor, which may hold what was there before.
    lse = tl.load(
        lse_ptr + first[:, None] + every[None, :],
        (member[:, None] < GROUP) & (every[None, :] < splits),
        float("-inf"),
        cache_modifier=".cg",
    )
    top = tl.max(lse, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    whole_lse = top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), 1))
    # Heads that are not there, and sequences without a token: zeros, and no minus infinity less itself.
    whole_lse = tl.where(whole_lse == float("-inf"), 0.0, whole_lse)
    result = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for start in range(0, splits, MERGED):
        part = start + tl.arange(0, MERGED)
        is_part = (member[:, None] < GROUP) & (part[None, :] < splits)
        at = first[:, None] + part[None, :]
        part_lse = tl.load(lse_ptr + at, is_part, float("-inf"), cache_modifier=".cg")
        some = tl.load(
            partial_ptr + at[:, :, None] * VALUE_DIM + columns[None, None, :],
            is_part[:, :, None] & column[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        result += tl.sum(some * tl.exp2(part_lse - whole_lse[:, None])[:, :, None], 1)
    tl.store(
        output_ptr + (first_head + member)[:, None] * VALUE_DIM + columns[None, :],
        result.to(output_ptr.dtype.element_ty),
        (member[:, None] < GROUP) & column[None, :],
    )
    if whole_lse_ptr is not None:
        tl.store(whole_lse_ptr + first_head + member, whole_lse, member < GROUP)


@triton.jit
def _store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM: tl.constexpr):
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(partial_ptr + at[:, None] * VALUE_DIM + columns[None, :], output, there)
    tl.store(lse_ptr + at, largest + tl.log2(total), inside)


@triton.jit
def mass_kernel(scores_ptr, lse_ptr, lengths_ptr, mass_ptr, tokens, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Attention that each token was given by the heads of a group, from their scores and log-sum-exp."""
    row = tl.program_id(2)
    place = (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = position < tl.load(lengths_ptr + row)
    mass = tl.zeros([BLOCK], tl.float32)
    for member in range(GROUP):
        head = place * GROUP + member
        scores = tl.load(scores_ptr + head * tokens + position, seen, float("-inf"))
        mass += tl.exp2(scores - tl.load(lse_ptr + head))
    tl.store(mass_ptr + place * tokens + position, tl.where(seen, mass, 0.0), position < tokens)
