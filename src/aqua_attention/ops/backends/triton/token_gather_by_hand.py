# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Attention to listed tokens where every register is placed by hand, in Gluon: see `token_gather`.

A program is one warp and takes 32 tokens at a time; those of the next time are on their way meanwhile. Nothing goes
through shared memory. Tokens are rows of both products. How keys and values become operands of these is said in
`token_codes_by_hand`, for 8 bits, and `token_numbers_by_hand`, for 16.

The tokens of a list that lie side by side there are rows far apart, so that each lane's numbers are a run of the list:
row r is number `4 * (r % 8) + r // 8`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton import token_codes_by_hand as codes
from aqua_attention.ops.backends.triton import token_numbers_by_hand as numbers
from aqua_attention.ops.backends.triton.decode_int8_mma import (
    HEADS,
    MMA,
    RIGHT,
    TILE,
    VALUE_UNIT,
    left_operand,
    words_layout,
)
from aqua_attention.ops.backends.triton.early_by_hand import start_early
from aqua_attention.ops.backends.triton.token_words_by_hand import STEP, load_keys, load_words

OF_KEYS = gl.constexpr(gl.DistributedLinearLayout([[1], [2]], [[0], [0], [4], [8], [16]], [], [], [32]))
"""Of a list's next tokens: the four whose keys a lane reads; and the eight of which it reads values."""
OF_VALUES = gl.constexpr(gl.DistributedLinearLayout([[1], [2], [4]], [[8], [16], [0], [0], [0]], [], [], [32]))


@gluon.constexpr_function
def output_layout(width, run):
    """Of the attention of each head, [8, width]: a lane's sums are of runs of columns, of which eight lanes have 64 or
    128 side by side.
    """
    in_row = [[0, 1 << bit] for bit in range(run.bit_length() - 1)]
    in_row += [[0, 64]] if 8 * run < width else []
    lanes = [[2, 0], [4, 0], [0, run], [0, 2 * run], [0, 4 * run]]
    return gl.DistributedLinearLayout([*in_row, [1, 0]], lanes, [], [], [8, width])


@gluon.jit
def gather_kernel(
    query_ptr,
    cache,
    scratch,
    scaling,
    places,
    groups,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    VALUE_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
    LISTS: gl.constexpr,
    LEAST: gl.constexpr,
    EARLY: gl.constexpr,
):
    """What `token_gather` does up to the merge. Keys and values are words of four codes, or of two numbers.

    Args:
        KEY_SIZE, VALUE_SIZE, SCALE_SIZE: words, words and scales from a block to the next; without codes no scales.
        LISTS: whose lengths are looked at together. LEAST: steps of a program, at least.
    """
    start_early(EARLY)
    # The lists stand in one row, in steps; this program begins in the one of which the row has reached its part.
    lists = gl.arange(0, LISTS, gl.BlockedLayout([LISTS // 32], [32], [1], [0]))
    rooms = rooms_of(scratch, lists, places, LEAST)
    total = gl.sum(rooms, 0)
    for some in range(LISTS, places, LISTS):
        total += gl.sum(rooms_of(scratch, some + lists, places, LEAST), 0)
    size = gl.maximum(gl.cdiv(total, gl.num_programs(0)), LEAST)
    begin = gl.program_id(0) * size
    place, start, passed = lists_before(rooms, begin, 0)
    for some in range(LISTS, places, LISTS):
        more, steps, passed = lists_before(rooms_of(scratch, some + lists, places, LEAST), begin, passed)
        place += more
        start += steps
    stop = gl.minimum(begin + size, total)
    while start < stop:
        count = gl.load(scratch.counts + place, cache_modifier=".cg")
        gather_piece(
            query_ptr + place.to(gl.int64) * GROUP * KEPT,
            cache,
            scratch,
            # From a piece to the next, either the list or the program is another.
            (place // groups, place % groups, place, place + gl.program_id(0)),
            (gl.maximum(begin - start, 0), begin + size - start, count),
            scaling,
            GROUP,
            KEPT,
            VALUE_DIM,
            KEY_SIZE,
            VALUE_SIZE,
            SCALE_SIZE,
        )
        start += gl.maximum(gl.cdiv(count, STEP), LEAST)
        place += 1


@gluon.jit
def rooms_of(scratch, lists, places, LEAST: gl.constexpr):
    """Steps that lists take in the row of all, in which a short one is as long as the least part of a program."""
    counts = gl.load(scratch.counts + lists, lists < places, 0, cache_modifier=".cg")
    return gl.where(lists < places, gl.maximum(gl.cdiv(counts, STEP), LEAST), 0)


@gluon.jit
def lists_before(rooms, begin, passed):
    """How many lists end where a part begins or before, their steps, and those of all with the ones that `passed`."""
    ends = passed + gl.associative_scan(rooms, 0, added)
    is_before = (ends <= begin) & (rooms > 0)
    steps = gl.sum(gl.where(is_before, rooms, 0), 0)
    return gl.sum(is_before.to(gl.int32), 0), steps, passed + gl.sum(rooms, 0)


@gluon.jit
def added(first, second):
    """Of which a scan is made."""
    return first + second


@gluon.jit
def gather_piece(
    query_ptr,
    cache,
    scratch,
    part,
    share,
    scaling,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    VALUE_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
):
    """Attention to the tokens of some steps of a list."""
    CODES: gl.constexpr = SCALE_SIZE > 0
    KEY_WORDS: gl.constexpr = KEPT // 4 if CODES else KEPT // 2
    VALUE_WORDS: gl.constexpr = VALUE_DIM // 4 if CODES else VALUE_DIM // 2
    VALUES: gl.constexpr = words_layout(VALUE_WORDS) if CODES else numbers.value_layout(VALUE_WORDS)
    row, group, place, piece = part
    begin, stop, count = share
    stop = gl.minimum(stop, gl.cdiv(count, STEP))
    end = gl.minimum(stop * STEP, count)
    first = row.to(gl.int64) * cache.row_stride + group.to(gl.int64) * cache.head_stride
    keys_ptr = cache.keys + first * KEY_SIZE
    values_ptr = cache.value_tokens + first * VALUE_SIZE
    list_ptr = scratch.tokens + place.to(gl.int64) * (cache.tile_count * TILE)
    final = cache.tile_count * (TILE // STEP) - 1
    rows = gl.arange(0, STEP, gl.SliceLayout(1, MMA))
    number_of_row = STEP // 8 * (rows % 8) + rows // 8
    # Read where the list has ended, with a weight of zero: if its value is infinite, the sum is NaN. An empty list has
    # none, and the first token of a sequence is there.
    spare = gl.where(end > 0, gl.load(list_ptr + gl.maximum(end - 1, 0), cache_modifier=".cg"), 0)
    key_tokens, value_tokens = listed(list_ptr, begin, final, end, spare)
    next_key_tokens, next_value_tokens = listed(list_ptr, begin + 1, final, end, spare)
    keys = load_keys(keys_ptr, key_tokens, KEY_WORDS)
    if CODES:
        key_scales_ptr = cache.key_scales + first * SCALE_SIZE
        value_scales_ptr = cache.value_scales + first * SCALE_SIZE
        queries, unit = codes.ordered_queries(query_ptr, cache.channel_scale + group * KEPT, scaling, GROUP, KEPT)
        key_scales, value_scales = codes.load_scales(
            key_scales_ptr, value_scales_ptr, key_tokens, begin * STEP + number_of_row < end
        )
    else:
        queries = numbers.ordered_queries(query_ptr, GROUP, KEPT)
    values = (
        load_words(values_ptr, value_tokens[0], VALUE_WORDS, VALUES, VALUE_WORDS),
        load_words(values_ptr, value_tokens[1], VALUE_WORDS, VALUES, VALUE_WORDS),
    )
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    output = gl.full([VALUE_DIM, HEADS], 0.0, gl.float32, MMA)
    for step in range(begin, stop):
        key_tokens, value_tokens = next_key_tokens, next_value_tokens
        next_key_tokens, next_value_tokens = listed(list_ptr, step + 2, final, end, spare)
        is_token = step * STEP + number_of_row < end
        if CODES:
            # What the means of channels add is the same for all tokens.
            scores = codes.products(keys, queries, KEPT) * (key_scales.to(gl.float32)[:, None] * unit[None, :])
        else:
            scores = numbers.products(keys, queries, KEPT) * scaling
        keys = load_keys(keys_ptr, key_tokens, KEY_WORDS)
        scores = gl.where(is_token[:, None], scores, float("-inf"))
        now = gl.maximum(largest, gl.max(scores, 0))
        base = gl.where(now > float("-inf"), now, 0.0)
        weights = gl.exp2(scores - base[None, :])
        shrink = gl.exp2(largest - base)
        total = total * shrink + gl.sum(weights, 0)
        largest = now
        output = output * shrink[None, :]
        if CODES:
            parts = weight_operands((weights * (value_scales.to(gl.float32) * VALUE_UNIT)[:, None]).to(gl.float16))
            is_token = (step + 1) * STEP + number_of_row < end
            key_scales, value_scales = codes.load_scales(key_scales_ptr, value_scales_ptr, key_tokens, is_token)
        else:
            parts = weight_operands(weights.to(queries[0].dtype))
        for half in gl.static_range(2):
            words = values[0]
            values = (values[1], load_words(values_ptr, value_tokens[half], VALUE_WORDS, VALUES, VALUE_WORDS))
            if CODES:
                operand = left_operand(words, VALUE_WORDS)
            else:
                operand = numbers.value_operand(words, VALUE_WORDS, queries[0].dtype)
            output = mma_v2(operand, parts[half], output)

    heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    gl.store(scratch.lse + piece * GROUP + heads, largest + gl.log2(total), heads < GROUP)
    UNIT: gl.constexpr = VALUE_UNIT if CODES else 1.0
    output = output * (1.0 / gl.where(total > 0, total * UNIT, 1.0))[None, :]
    # Columns of a lane: a run, or several, which eight lanes have side by side.
    RUN: gl.constexpr = VALUE_DIM // 8 if CODES else 8
    LAYOUT: gl.constexpr = output_layout(VALUE_DIM, RUN)
    by_head = gl.permute(gl.reshape(output, [VALUE_DIM // (8 * RUN), RUN, 8, HEADS]), (3, 0, 2, 1))
    by_head = gl.convert_layout(gl.reshape(by_head, [HEADS, VALUE_DIM]), LAYOUT)
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, LAYOUT))
    there = (heads < GROUP)[:, None] & (columns >= 0)[None, :]
    at = (piece.to(gl.int64) * GROUP + heads)[:, None] * VALUE_DIM + columns[None, :]
    gl.store(scratch.partial + at, by_head, there)


@gluon.jit
def listed(list_ptr, step, final, end, spare):
    """The tokens of a step of a list: of the rows of keys, [32], and of those of each half of the values, [16]. Behind
    its end the spare one.
    """
    start = gl.minimum(step, final) * STEP
    number = gl.arange(0, STEP, OF_KEYS)
    tokens = gl.load(list_ptr + (start + number), cache_modifier=".cg")
    tokens = gl.where(step * STEP + number < end, tokens, spare)
    of_keys = gl.reshape(gl.permute(gl.reshape(tokens, [8, 4]), (1, 0)), [STEP])
    number = gl.arange(0, STEP, OF_VALUES)
    tokens = gl.load(list_ptr + (start + number), cache_modifier=".cg")
    tokens = gl.where(step * STEP + number < end, tokens, spare)
    # [eight rows, half of the step, of it]
    low, high = gl.split(gl.permute(gl.reshape(tokens, [8, 2, 2]), (2, 0, 1)))
    return of_keys, (gl.reshape(low, [16]), gl.reshape(high, [16]))


@gluon.jit
def weight_operands(weights):
    """Weights [STEP, HEADS], a result's layout, as two right operands [16, HEADS]: squares of 8 x 8 are transposed."""
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [weights], dtype=weights.dtype, is_pure=False, pack=2
    )
    # [half of the step, square of it, head, row]
    squares = gl.reshape(turned, [2, 2, 8, HEADS])
    low, high = gl.split(gl.permute(squares, (1, 3, 2, 0)))
    low = gl.convert_layout(gl.reshape(low, [16, HEADS]), RIGHT)
    return low, gl.convert_layout(gl.reshape(high, [16, HEADS]), RIGHT)
