# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Keys and values of 16 bits as what `token_gather_by_hand` multiplies; words are of two numbers.

A load of a lane is of 16 bytes, or of 8 in the last piece of some keys. Of keys, lanes 4g to 4g + 3 read 64 bytes of a
token side by side: dimensions stand in another order than in a product, and so do the query's. Of values, eight lanes
read 128 bytes of a token side by side, and each lane those of four tokens, which are one operand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton.decode_int8_mma import HEADS, LEFT, MMA, RIGHT
from aqua_attention.ops.backends.triton.token_words_by_hand import STEP, piece_begin, piece_count, piece_words


@gluon.constexpr_function
def value_layout(words):
    """Of 16 rows of so many words (32 or 64): lane 4g + t has rows 2t, 2t + 1, 2t + 8 and 2t + 9, and of each four
    words in a row, of every 32.
    """
    in_row = [[0, 1], [0, 2], *([[0, 32]] if words == 64 else [])]
    lanes = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
    return gl.DistributedLinearLayout([*in_row, [1, 0], [8, 0]], lanes, [], [], [16, words])


@gluon.constexpr_function
def repeated(dtype, count):
    """What assembly gives: so many numbers of a dtype."""
    return (dtype,) * count


@gluon.jit
def ordered_queries(query_ptr, GROUP: gl.constexpr, KEPT: gl.constexpr):
    """The queries of a group as right operands [16, HEADS] of the products with keys."""
    row = gl.arange(0, 16, gl.SliceLayout(1, RIGHT))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT))
    there = (head < GROUP)[None, :] & (row >= 0)[:, None]
    queries = ()
    for piece in gl.static_range(piece_count(KEPT // 2)):
        for part in gl.static_range(piece_words(KEPT // 2, piece) // 8):
            # Of a lane's words two are of a product: the first has two rows of its first half, the other of the second.
            words = piece_words(KEPT // 2, piece) // 4 * (row % 8 // 2) + 2 * part + row // 8
            dims = 2 * (piece_begin(KEPT // 2, piece) + words) + row % 2
            query = gl.load(query_ptr + head[None, :] * KEPT + dims[:, None], there, 0.0, cache_modifier=".cg")
            queries = queries + (query,)  # noqa: RUF005
    return queries


@gluon.jit
def products(keys, queries, KEPT: gl.constexpr):
    """Of a step's keys with the queries, [STEP, HEADS]."""
    scores = gl.full([STEP, HEADS], 0.0, gl.float32, MMA)
    for piece in gl.static_range(piece_count(KEPT // 2)):
        parts = (keys[piece],)
        if piece_words(KEPT // 2, piece) == 16:
            # [row, lane, half of its words, half of a product]
            parts = gl.split(gl.permute(gl.reshape(keys[piece], [STEP, 4, 2, 2]), (0, 1, 3, 2)))
        for part in gl.static_range(piece_words(KEPT // 2, piece) // 8):
            query = queries[piece_begin(KEPT // 2, piece) // 8 + part]
            scores = mma_v2(key_operand(parts[part], query.dtype), query, scores)
    return scores


@gluon.jit
def key_operand(words, dtype: gl.constexpr):
    """Two words of each lane of four, as many as [STEP, 8], as a left operand [STEP, 16]."""
    first, second = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=repeated(dtype, 2), is_pure=True, pack=1
    )
    # [row, lane, half of a product, number of the word]
    numbers = gl.reshape(gl.join(first, second), [STEP, 4, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(numbers, (0, 2, 1, 3)), [STEP, 16]), LEFT)


@gluon.jit
def value_operand(words, WORDS: gl.constexpr, dtype: gl.constexpr):
    """Values of half of a step as a left operand [2 * WORDS, 16]: row `64 i + 8 j + g` is column `64 i + 8 g + j`."""
    even, odd = gl.split(gl.permute(gl.reshape(words, [8, 2, WORDS]), (0, 2, 1)))
    # Of two rows beside each other the same column.
    a, b, c, d = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high;
        prmt.b32 low, $4, $5, 0x5410;
        prmt.b32 high, $4, $5, 0x7632;
        mov.b32 {$0, $1}, low;
        mov.b32 {$2, $3}, high;
        }
        """,
        "=h,=h,=h,=h,r,r",
        [even, odd],
        dtype=repeated(dtype, 4),
        is_pure=True,
        pack=1,
    )
    # [pair of rows, of 32 words, lane, word of it, row of the pair, number of the word]
    numbers = gl.reshape(gl.join(gl.join(a, b), gl.join(c, d)), [8, WORDS // 32, 8, 4, 2, 2])
    numbers = gl.reshape(gl.permute(numbers, (1, 3, 5, 2, 0, 4)), [2 * WORDS, 16])
    return gl.convert_layout(numbers, LEFT)
