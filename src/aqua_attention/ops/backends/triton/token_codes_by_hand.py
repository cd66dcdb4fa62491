# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Keys and values of 8 bits as what `token_gather_by_hand` multiplies; words are of four codes.

Of keys, lanes 4g to 4g + 3 read runs of a token's dimensions, and a word of four codes becomes four numbers of one row:
dimensions stand in another order, and so do the query's. Of values it is as in `decode_int8_mma`, where a lane makes
columns of four rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton.decode_int8_mma import HEADS, LEFT, MMA, RIGHT
from aqua_attention.ops.backends.triton.token_words_by_hand import STEP, piece_begin, piece_count, piece_words


@gluon.jit
def load_scales(key_scales_ptr, value_scales_ptr, tokens, is_token):
    """Scales of the keys and values of a step's tokens, zero where there is none."""
    tokens = gl.convert_layout(tokens, gl.SliceLayout(1, MMA))
    of_keys = gl.load(key_scales_ptr + tokens, is_token, 0.0, cache_modifier=".cg")
    return of_keys, gl.load(value_scales_ptr + tokens, is_token, 0.0, cache_modifier=".cg")


@gluon.jit
def ordered_queries(query_ptr, channel_scale_ptr, scaling, GROUP: gl.constexpr, KEPT: gl.constexpr):
    """The queries of a group as right operands [16, HEADS] of the products with keys, with the scales of channels, made
    small enough for float16; and what the products are worth, [HEADS].
    """
    row = gl.arange(0, 16, gl.SliceLayout(1, RIGHT))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT))
    peak = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, RIGHT))
    wide = ()
    for piece in gl.static_range(piece_count(KEPT // 4)):
        for word in gl.static_range(piece_words(KEPT // 4, piece) // 4):
            # Of four codes in a word the first two are rows of the first half.
            dims = 4 * (piece_begin(KEPT // 4, piece) + word) + row // 8 * 2 + row % 2
            dims += piece_words(KEPT // 4, piece) * (row % 8 // 2)
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
    for piece in gl.static_range(piece_count(KEPT // 4)):
        parts = (keys[piece],)
        if piece_words(KEPT // 4, piece) == 16:
            even, odd = gl.split(gl.reshape(keys[piece], [STEP, 4, 2, 2]))
            first, third = gl.split(even)
            second, fourth = gl.split(odd)
            parts = (first, second, third, fourth)
        elif piece_words(KEPT // 4, piece) == 8:
            first, second = gl.split(gl.reshape(keys[piece], [STEP, 4, 2]))
            parts = (first, second)
        for part in gl.static_range(piece_words(KEPT // 4, piece) // 4):
            scores = mma_v2(key_operand(parts[part]), queries[piece_begin(KEPT // 4, piece) // 4 + part], scores)
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
