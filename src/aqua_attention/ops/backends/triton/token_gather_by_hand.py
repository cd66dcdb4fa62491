# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Attention to listed tokens of 8 bits where every register is placed by hand, in Gluon: see `token_gather`.

A program is one warp and takes 32 tokens at a time; those of the next time are on their way meanwhile. Nothing goes
through shared memory. Tokens are rows of both products. Of keys, lanes 4g to 4g + 3 read runs of a token's dimensions,
and a word of four codes becomes four numbers of one row: dimensions stand in another order, and so do the query's. Of
values it is as in `decode_int8_mma`, where a lane makes columns of four rows.

The tokens of a list that lie side by side there are rows far apart, so that each lane's numbers are a run of the list:
row r is number `4 * (r % 8) + r // 8`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton.decode_int8_mma import (
    HEADS,
    LEFT,
    MMA,
    RIGHT,
    TILE,
    VALUE_UNIT,
    left_operand,
    words_layout,
)
from aqua_attention.ops.backends.triton.early_by_hand import start_early
from aqua_attention.ops.backends.triton.token_work import GATHER_STEP

STEP = gl.constexpr(GATHER_STEP)
OF_KEYS = gl.constexpr(gl.DistributedLinearLayout([[1], [2]], [[0], [0], [4], [8], [16]], [], [], [32]))
"""Of a list's next tokens: the four whose keys a lane reads; and the eight of which it reads values."""
OF_VALUES = gl.constexpr(gl.DistributedLinearLayout([[1], [2], [4]], [[8], [16], [0], [0], [0]], [], [], [32]))


@gluon.constexpr_function
def key_layout(words):
    """Of 32 rows of so many words (16, 8 or 4) of four codes: lane 4g + t has rows g, g + 8, g + 16 and g + 24, and a
    quarter of each.
    """
    each = words // 4
    in_row = [[0, 1 << bit] for bit in range(each.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*in_row, [8, 0], [16, 0]], [[0, each], [0, 2 * each], [1, 0], [2, 0], [4, 0]], [], [], [32, words]
    )


@gluon.constexpr_function
def output_layout(width):
    """Of the attention of each head, [8, width]: the columns in a row that a lane's sums are of."""
    in_row = [[0, 1 << bit] for bit in range((width // 8).bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, width // 8], [0, width // 4], [0, width // 2]]
    return gl.DistributedLinearLayout([*in_row, [1, 0]], lanes, [], [], [8, width])


@gluon.constexpr_function
def piece_count(kept):
    """In how many pieces keys of so many dimensions are read."""
    return kept // 64 + kept // 32 % 2 + kept // 16 % 2


@gluon.constexpr_function
def piece_words(kept, piece):
    """Words of such a piece: 16, and at the end 8 or 4 or both."""
    return 16 if piece < kept // 64 else 8 if piece == kept // 64 and kept // 32 % 2 else 4


@gluon.constexpr_function
def piece_begin(kept, piece):
    """The word at which it begins."""
    return 16 * min(piece, kept // 64) + 8 * (piece > kept // 64)


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
    """What `token_gather` does up to the merge, for keys and values that are words of four codes.

    Args:
        KEY_SIZE, VALUE_SIZE, SCALE_SIZE: words, words and scales from a block to the next.
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
    row, group, place, piece = part
    begin, stop, count = share
    stop = gl.minimum(stop, gl.cdiv(count, STEP))
    end = gl.minimum(stop * STEP, count)
    first = row.to(gl.int64) * cache.row_stride + group.to(gl.int64) * cache.head_stride
    keys_ptr = cache.keys + first * KEY_SIZE
    values_ptr = cache.value_tokens + first * VALUE_SIZE
    key_scales_ptr, value_scales_ptr = cache.key_scales + first * SCALE_SIZE, cache.value_scales + first * SCALE_SIZE
    list_ptr = scratch.tokens + place.to(gl.int64) * (cache.tile_count * TILE)
    final = cache.tile_count * (TILE // STEP) - 1
    rows = gl.arange(0, STEP, gl.SliceLayout(1, MMA))
    number_of_row = STEP // 8 * (rows % 8) + rows // 8
    queries, unit = ordered_queries(query_ptr, cache.channel_scale + group * KEPT, scaling, GROUP, KEPT)
    key_tokens, value_tokens = listed(list_ptr, begin, final, end)
    next_key_tokens, next_value_tokens = listed(list_ptr, begin + 1, final, end)
    keys = load_keys(keys_ptr, key_tokens, KEPT)
    key_scales, value_scales = load_scales(
        key_scales_ptr, value_scales_ptr, key_tokens, begin * STEP + number_of_row < end
    )
    values = (
        load_values(values_ptr, value_tokens[0], VALUE_DIM),
        load_values(values_ptr, value_tokens[1], VALUE_DIM),
    )
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    output = gl.full([VALUE_DIM, HEADS], 0.0, gl.float32, MMA)
    for step in range(begin, stop):
        key_tokens, value_tokens = next_key_tokens, next_value_tokens
        next_key_tokens, next_value_tokens = listed(list_ptr, step + 2, final, end)
        # What the means of channels add is the same for all tokens.
        scores = products(keys, queries, KEPT)
        keys = load_keys(keys_ptr, key_tokens, KEPT)
        is_token = step * STEP + number_of_row < end
        scores = scores * (key_scales.to(gl.float32)[:, None] * unit[None, :])
        scores = gl.where(is_token[:, None], scores, float("-inf"))
        now = gl.maximum(largest, gl.max(scores, 0))
        base = gl.where(now > float("-inf"), now, 0.0)
        weights = gl.exp2(scores - base[None, :])
        shrink = gl.exp2(largest - base)
        total = total * shrink + gl.sum(weights, 0)
        largest = now
        parts = weight_operands((weights * (value_scales.to(gl.float32) * VALUE_UNIT)[:, None]).to(gl.float16))
        is_token = (step + 1) * STEP + number_of_row < end
        key_scales, value_scales = load_scales(key_scales_ptr, value_scales_ptr, key_tokens, is_token)
        output = output * shrink[None, :]
        for half in gl.static_range(2):
            words = values[0]
            values = (values[1], load_values(values_ptr, value_tokens[half], VALUE_DIM))
            output = mma_v2(left_operand(words, VALUE_DIM // 4), parts[half], output)

    LAYOUT: gl.constexpr = output_layout(VALUE_DIM)
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    gl.store(scratch.lse + piece * GROUP + heads, largest + gl.log2(total), heads < GROUP)
    output = output * (1.0 / gl.where(total > 0, total * VALUE_UNIT, 1.0))[None, :]
    by_head = gl.permute(gl.reshape(output, [VALUE_DIM // 8, 8, HEADS]), (2, 1, 0))
    by_head = gl.convert_layout(gl.reshape(by_head, [HEADS, VALUE_DIM]), LAYOUT)
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, LAYOUT))
    there = (heads < GROUP)[:, None] & (columns >= 0)[None, :]
    at = (piece.to(gl.int64) * GROUP + heads)[:, None] * VALUE_DIM + columns[None, :]
    gl.store(scratch.partial + at, by_head, there)


@gluon.jit
def listed(list_ptr, step, final, end):
    """The tokens of a step of a list: of the rows of keys, [32], and of those of each half of the values, [16]. Behind
    its end the first of the sequence, which there is.
    """
    start = gl.minimum(step, final) * STEP
    number = gl.arange(0, STEP, OF_KEYS)
    tokens = gl.load(list_ptr + (start + number), cache_modifier=".cg")
    tokens = gl.where(step * STEP + number < end, tokens, 0)
    of_keys = gl.reshape(gl.permute(gl.reshape(tokens, [8, 4]), (1, 0)), [STEP])
    number = gl.arange(0, STEP, OF_VALUES)
    tokens = gl.load(list_ptr + (start + number), cache_modifier=".cg")
    tokens = gl.where(step * STEP + number < end, tokens, 0)
    # [eight rows, half of the step, of it]
    low, high = gl.split(gl.permute(gl.reshape(tokens, [8, 2, 2]), (2, 0, 1)))
    return of_keys, (gl.reshape(low, [16]), gl.reshape(high, [16]))


@gluon.jit
def load_scales(key_scales_ptr, value_scales_ptr, tokens, is_token):
    """Scales of the keys and values of a step's tokens, zero where there is none."""
    tokens = gl.convert_layout(tokens, gl.SliceLayout(1, MMA))
    of_keys = gl.load(key_scales_ptr + tokens, is_token, 0.0, cache_modifier=".cg")
    return of_keys, gl.load(value_scales_ptr + tokens, is_token, 0.0, cache_modifier=".cg")


@gluon.jit
def load_keys(keys_ptr, tokens, KEPT: gl.constexpr):
    """Whole keys of a step, a tuple of pieces."""
    keys = ()
    for piece in gl.static_range(piece_count(KEPT)):
        keys = keys + (  # noqa: RUF005 (tuples of kernels cannot be unpacked)
            load_words(
                keys_ptr + piece_begin(KEPT, piece),
                tokens,
                piece_words(KEPT, piece),
                key_layout(piece_words(KEPT, piece)),
                KEPT,
            ),
        )
    return keys


@gluon.jit
def load_values(values_ptr, tokens, VALUE_DIM: gl.constexpr):
    """Values of half of a step."""
    return load_words(values_ptr, tokens, VALUE_DIM // 4, words_layout(VALUE_DIM // 4), VALUE_DIM)


@gluon.jit
def load_words(pointer, tokens, WORDS: gl.constexpr, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """So many words of each token, of which there are WIDTH codes."""
    words = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))
    rows = gl.convert_layout(tokens, gl.SliceLayout(1, LAYOUT)) * (WIDTH // 4)
    return gl.load(pointer + words[None, :] + rows[:, None], cache_modifier=".cg")


@gluon.jit
def ordered_queries(query_ptr, channel_scale_ptr, scaling, GROUP: gl.constexpr, KEPT: gl.constexpr):
    """The queries of a group as right operands [16, HEADS] of the products with keys, with the scales of channels, made
    small enough for float16; and what the products are worth, [HEADS].
    """
    row = gl.arange(0, 16, gl.SliceLayout(1, RIGHT))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT))
    peak = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, RIGHT))
    wide = ()
    for piece in gl.static_range(piece_count(KEPT)):
        for word in gl.static_range(piece_words(KEPT, piece) // 4):
            # Of four codes in a word the first two are rows of the first half.
            dims = 4 * (piece_begin(KEPT, piece) + word) + row // 8 * 2 + row % 2
            dims += piece_words(KEPT, piece) * (row % 8 // 2)
            there = (head < GROUP)[None, :] & (row >= 0)[:, None]
            query = gl.load(query_ptr + head[None, :] * KEPT + dims[:, None], there, 0.0, cache_modifier=".cg")
            query = query.to(gl.float32) * gl.load(channel_scale_ptr + dims)[:, None]
            peak = gl.maximum(peak, gl.max(gl.abs(query), 0))
            wide = wide + (query,)  # noqa: RUF005
    peak = gl.where(peak > 0, peak, 1.0)
    queries = ()
    for chunk in gl.static_range(KEPT // 16):
        queries = queries + ((wide[chunk] / peak[None, :]).to(gl.float16),)  # noqa: RUF005
    return queries, gl.convert_layout(peak * scaling, gl.SliceLayout(0, MMA))


@gluon.jit
def products(keys, queries, KEPT: gl.constexpr):
    """Of a step's keys with the queries, [STEP, HEADS]."""
    scores = gl.full([STEP, HEADS], 0.0, gl.float32, MMA)
    for piece in gl.static_range(piece_count(KEPT)):
        parts = (keys[piece],)
        if piece_words(KEPT, piece) == 16:
            even, odd = gl.split(gl.reshape(keys[piece], [STEP, 4, 2, 2]))
            first, third = gl.split(even)
            second, fourth = gl.split(odd)
            parts = (first, second, third, fourth)
        elif piece_words(KEPT, piece) == 8:
            first, second = gl.split(gl.reshape(keys[piece], [STEP, 4, 2]))
            parts = (first, second)
        for part in gl.static_range(piece_words(KEPT, piece) // 4):
            scores = mma_v2(key_operand(parts[part]), queries[piece_begin(KEPT, piece) // 4 + part], scores)
    return scores


@gluon.jit
def key_operand(words):
    """Words [STEP, 4] of four codes as numbers in float16, 128 as zero, [STEP, 16]."""
    # Each byte as the low bits of 1024.
    a, b, c, d = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 zero, first, second;
        mov.b32 zero, 0x64806480;
        prmt.b32 first, $4, 0x64646464, 0x4140;
        prmt.b32 second, $4, 0x64646464, 0x4342;
        sub.f16x2 first, first, zero;
        sub.f16x2 second, second, zero;
        mov.b32 {$0, $1}, first;
        mov.b32 {$2, $3}, second;
        }
        """,
        "=h,=h,=h,=h,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
    # [row, quarter, first or second two of the word, which of them]
    codes = gl.permute(gl.join(gl.join(a, c), gl.join(b, d)), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(codes, [STEP, 16]), LEFT)


@gluon.jit
def weight_operands(weights):
    """Weights [STEP, HEADS], a result's layout, as two right operands [16, HEADS]: squares of 8 x 8 are transposed."""
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [weights], dtype=gl.float16, is_pure=False, pack=2
    )
    # [half of the step, square of it, head, row]
    squares = gl.reshape(turned, [2, 2, 8, HEADS])
    low, high = gl.split(gl.permute(squares, (1, 3, 2, 0)))
    low = gl.convert_layout(gl.reshape(low, [16, HEADS]), RIGHT)
    return low, gl.convert_layout(gl.reshape(high, [16, HEADS]), RIGHT)
