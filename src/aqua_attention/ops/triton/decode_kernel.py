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

from aqua_attention.ops.triton.blocks import decoded, key_pointers, online_softmax, token_cells, token_pointers

VALUE_UNIT = tl.constexpr(256.0)
"""Steps of values are multiplied by this, so that weights times steps seldom are too small for float16."""


@triton.jit
def decode_kernel(
    query_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    key_steps_ptr,
    value_steps_ptr,
    scale_ptr,
    mean_ptr,
    table_ptr,
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
    blocks,
    row_stride,
    group_stride,
    block_stride,
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
    BLOCK: tl.constexpr,
    SPECIAL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of the tokens of a sequence and key-value head; the last to end merges all."""
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(1)
    # Past the cache of this processor, where an earlier step's may lie.
    length = tl.minimum(tl.load(lengths_ptr + row, cache_modifier=".cg") + APPENDED, count * TILE)
    done = tl.maximum((length - 1) // TILE - 1, 0)
    place = (row * groups + group).to(tl.int64)
    first_cell = row.to(tl.int64) * row_stride + group.to(tl.int64) * group_stride
    tail_ptr += place * 2 * TILE * DIM
    if table_ptr is not None:
        table_ptr += row * blocks
    if scale_ptr is not None:
        scale_ptr += group * DIM
        mean_ptr += group * DIM
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
            key_steps_ptr,
            value_steps_ptr,
            scale_ptr,
            mean_ptr,
            table_ptr,
            partial_ptr,
            lse_ptr,
            scores_ptr,
            scaling,
            sink,
            recent,
            count,
            blocks,
            first_cell,
            block_stride,
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
            BLOCK,
            APPENDED,
            ASSEMBLY,
            EARLY,
        )
    else:
        each = tl.cdiv(tl.maximum(done - 1, 0), splits - SPECIAL)
        begin = 1 + (split - SPECIAL) * each
        _tiles(
            query_ptr,
            dims_ptr,
            mask_ptr,
            counts_ptr,
            tiles_ptr,
            values_ptr,
            key_steps_ptr,
            value_steps_ptr,
            scale_ptr,
            mean_ptr,
            table_ptr,
            partial_ptr,
            lse_ptr,
            scores_ptr,
            scaling,
            count,
            blocks,
            first_cell,
            block_stride,
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
            BLOCK,
            ASSEMBLY,
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
    key_steps_ptr,
    value_steps_ptr,
    scale_ptr,
    mean_ptr,
    table_ptr,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    sink,
    recent,
    count,
    blocks,
    first_cell,
    block_stride,
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
    BLOCK: tl.constexpr,
    APPENDED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
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
    tile = tl.where(split == 0, 0, done + split - 1)
    position = tile * TILE + tokens
    seen = position < tl.where((split == 0) & (done == 0), 0, length)
    # Without the new token, which is being written.
    old = seen & (position < length - APPENDED)
    there = (dim[:, None] < DIM) & old[None, :]
    cells = token_cells(table_ptr, first_cell, block_stride, tile, blocks, BLOCK, TILE)
    if split == 0:
        if EARLY:  # noqa: SIM102 (this is known when compiling, the other is not)
            if length == 2 * TILE + 1:
                # The first tile is being moved from the tail.
                tl.extra.cuda.gdc_wait()
        keys = tl.load(key_pointers(tiles_ptr, table_ptr, cells, dim, DIM, BLOCK, TILE), there, 0)
        if key_steps_ptr is not None:
            steps = tl.load(token_pointers(key_steps_ptr, table_ptr, cells, 1, BLOCK, TILE), old, 0.0)
            scale, mean = tl.load(scale_ptr + dim, dim < DIM, 0.0), tl.load(mean_ptr + dim, dim < DIM, 0.0)
            wide = decoded(keys, ASSEMBLY).to(tl.float32) * steps[None, :].to(tl.float32)
            wide = wide * scale[:, None] + mean[:, None]
            keys = tl.where(there, wide, 0.0).to(tail_ptr.dtype.element_ty)
    else:
        keys = tl.load(tail_ptr + (position % (2 * TILE))[None, :] * DIM + dim[:, None], there, 0.0)
    values_at = token_pointers(values_ptr, table_ptr, cells, VALUE_DIM, BLOCK, TILE)[:, None] + columns[None, :]
    values = tl.load(values_at, old[:, None] & column[None, :], 0)
    value_steps = None
    if value_steps_ptr is not None:
        values = decoded(values, ASSEMBLY)
        steps = tl.load(token_pointers(value_steps_ptr, table_ptr, cells, 1, BLOCK, TILE), old, 0.0)
        value_steps = steps.to(tl.float32) * VALUE_UNIT
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
        value_steps,
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, VALUE_PADDED], tl.float32),
        "ieee",
    )
    if APPENDED:
        weight = tl.sum(tl.where(is_new[None, :] & visible, tl.exp2(scores - largest[:, None]), 0.0), 1)
        page = (length - 1) // BLOCK
        if table_ptr is not None:
            page = tl.load(table_ptr + page)
        newest = (first_cell + page.to(tl.int64) * block_stride) * BLOCK + (length - 1) % BLOCK
        value = tl.load(values_ptr + newest * VALUE_DIM + columns, column, 0)
        if value_steps_ptr is None:
            value = value.to(tl.float32)
        else:
            value = (value.to(tl.float32) - 128) * tl.load(value_steps_ptr + newest).to(tl.float32) * VALUE_UNIT
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
    if value_steps_ptr is not None:
        output *= 1 / VALUE_UNIT
    at = (first_head + member) * splits + split
    _store_part(partial_ptr, lse_ptr, at, largest, total, output, member < GROUP, columns, VALUE_DIM)


@triton.jit
def _tiles(
    query_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    tiles_ptr,
    values_ptr,
    key_steps_ptr,
    value_steps_ptr,
    scale_ptr,
    mean_ptr,
    table_ptr,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    count,
    blocks,
    first_cell,
    block_stride,
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
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention to the tiles from `begin` to before `end`, with the chosen dimensions."""
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, DIM_PADDED)
    column = columns < VALUE_DIM
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    if EARLY:
        tl.extra.cuda.gdc_wait()
    query_at = query_ptr + heads[:, None] * DIM
    if dims_ptr is None or scale_ptr is not None:
        query = tl.load(query_at + dim[None, :], inside[:, None] & (dim[None, :] < DIM), 0.0)
    if scale_ptr is not None:
        # Scales and means of keys go into the query, which is made small enough for float16.
        if mask_ptr is not None:
            query = tl.where((tl.load(mask_ptr + dim, dim < DIM, 0) == 0)[None, :], 0.0, query)
        mean = tl.sum(query.to(tl.float32) * tl.load(mean_ptr + dim, dim < DIM, 0.0)[None, :], 1)
        query = query.to(tl.float32) * tl.load(scale_ptr + dim, dim < DIM, 0.0)[None, :]
        peak = tl.max(tl.abs(query), 1)
        peak = tl.where(peak > 0, peak, 1.0)
        query = (query / peak[:, None]).to(tl.float16)
        unit, mean = peak * scaling, mean * scaling
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    limit = CHOSEN
    if counts_ptr is not None:
        limit = tl.load(counts_ptr)
    if dims_ptr is not None and STEP >= CHOSEN:
        # All at once: they stay in registers.
        places = tl.arange(0, STEP)
        chosen_dims = tl.load(dims_ptr + places, places < limit, 0)
        taken = inside[:, None] & (places[None, :] < limit)
        query = tl.load(query_at + chosen_dims[None, :], taken, 0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + chosen_dims)
            query = (query.to(tl.float32) * scale[None, :] / peak[:, None]).to(tl.float16)
    if scale_ptr is not None:
        # A step is too small to be loaded ahead by the compiler.
        cells = token_cells(table_ptr, first_cell, block_stride, begin, blocks, BLOCK, TILE)
        there = begin * TILE + tokens < end * TILE
        next_key_steps = tl.load(token_pointers(key_steps_ptr, table_ptr, cells, 1, BLOCK, TILE), there, 0.0)
        next_value_steps = tl.load(token_pointers(value_steps_ptr, table_ptr, cells, 1, BLOCK, TILE), there, 0.0)
    for tile in range(begin, end):
        cells = token_cells(table_ptr, first_cell, block_stride, tile, blocks, BLOCK, TILE)
        if dims_ptr is None:
            keys_at = key_pointers(tiles_ptr, table_ptr, cells, dim, DIM, BLOCK, TILE)
            if DIM == DIM_PADDED:
                keys = tl.load(keys_at)
            else:
                keys = tl.load(keys_at, (dim[:, None] < DIM) & (tokens[None, :] >= 0), 0)
            if scale_ptr is not None:
                keys = decoded(keys, ASSEMBLY)
            scores = tl.dot(query, keys, input_precision="ieee")
        elif STEP >= CHOSEN:
            keys_at = key_pointers(tiles_ptr, table_ptr, cells, chosen_dims, DIM, BLOCK, TILE)
            if counts_ptr is None and STEP == CHOSEN:
                keys = tl.load(keys_at)
            else:
                keys = tl.load(keys_at, (places[:, None] < limit) & (tokens[None, :] >= 0), 0)
            if scale_ptr is not None:
                keys = decoded(keys, ASSEMBLY)
            scores = tl.dot(query, keys, input_precision="ieee")
        else:
            scores = tl.zeros([ROWS, TILE], tl.float32)
            for start in tl.static_range(0, CHOSEN, STEP):
                places = start + tl.arange(0, STEP)
                some = tl.load(dims_ptr + places, places < limit, 0)
                chosen = tl.load(query_at + some[None, :], inside[:, None] & (places[None, :] < limit), 0.0)
                keys_at = key_pointers(tiles_ptr, table_ptr, cells, some, DIM, BLOCK, TILE)
                if counts_ptr is None:
                    # Where k is no multiple, the rest is dimension 0 again, times zero.
                    keys = tl.load(keys_at)
                else:
                    keys = tl.load(keys_at, (places[:, None] < limit) & (tokens[None, :] >= 0), 0)
                scores = tl.dot(chosen, keys, scores, input_precision="ieee")
        values_at = token_pointers(values_ptr, table_ptr, cells, VALUE_DIM, BLOCK, TILE)[:, None] + columns[None, :]
        if VALUE_DIM == VALUE_PADDED:
            values = tl.load(values_at)
        else:
            values = tl.load(values_at, (tokens[:, None] >= 0) & column[None, :], 0)
        value_steps = None
        if scale_ptr is not None:
            key_steps, value_steps = next_key_steps.to(tl.float32), next_value_steps.to(tl.float32) * VALUE_UNIT
            cells = token_cells(table_ptr, first_cell, block_stride, tile + 1, blocks, BLOCK, TILE)
            there = (tile + 1) * TILE + tokens < end * TILE
            next_key_steps = tl.load(token_pointers(key_steps_ptr, table_ptr, cells, 1, BLOCK, TILE), there, 0.0)
            next_value_steps = tl.load(token_pointers(value_steps_ptr, table_ptr, cells, 1, BLOCK, TILE), there, 0.0)
            scores = scores * (unit[:, None] * key_steps[None, :]) + mean[:, None]
            values = decoded(values, ASSEMBLY)
        else:
            scores = scores * scaling
        if scores_ptr is not None:
            there = inside[:, None] & (tokens[None, :] >= 0)
            scores_at = scores_ptr + (first_head + heads[:, None]) * count * TILE + tile * TILE + tokens[None, :]
            tl.store(scores_at, scores, there)
        largest, total, output = online_softmax(scores, values, value_steps, largest, total, output, "ieee")
    if scale_ptr is not None:
        output *= 1 / VALUE_UNIT
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
