# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Codes of 4 and 8 bits as operands of tensor cores, in Gluon, for `token_scores_by_hand`.

The low bits of a code, and nothing above them, are a number of float16: as many times its smallest. Tensor cores
multiply such numbers exactly. So a code is masked, and no more; sums begin at what makes 8, or 128, zero. Of two codes
of 4 bits in a byte the second counts 16 times as much where it lies, in the sum and in its beginning.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aqua_attention.ops.backends.triton.decode_int8_mma import (
    HEADS,
    LEFT,
    MMA,
    RIGHT,
    TILE,
    codes_in_rows,
    joined,
)

SMALLEST = gl.constexpr(2.0**-24)
"""The least number of float16 above zero."""
EIGHT_NUMBERS = gl.constexpr((gl.float16,) * 8)
SIXTEEN_NUMBERS = gl.constexpr((gl.float16,) * 16)


@gluon.jit
def few_bits_operand(words):
    """Words [16, 16] of eight codes of 4 bits as numbers in float16, [128, 16]; rows as `left_operand` has them.

    A code is worth SMALLEST times itself, and each second one of a dimension 16 times as much.
    """
    even, odd = gl.split(gl.permute(gl.reshape(words, [8, 2, 16]), (0, 2, 1)))
    # Halves of two rows beside each other, then the codes of each token.
    a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = gl.inline_asm_elementwise(  # noqa: E741
        """
        {
        .reg .b32 first, third, fifth, seventh, token;
        prmt.b32 first, $16, $17, 0x5410;
        prmt.b32 fifth, $16, $17, 0x7632;
        shr.u32 third, first, 8;
        shr.u32 seventh, fifth, 8;
        and.b32 token, first, 0x000f000f;
        mov.b32 {$0, $1}, token;
        and.b32 token, first, 0x00f000f0;
        mov.b32 {$2, $3}, token;
        and.b32 token, third, 0x000f000f;
        mov.b32 {$4, $5}, token;
        and.b32 token, third, 0x00f000f0;
        mov.b32 {$6, $7}, token;
        and.b32 token, fifth, 0x000f000f;
        mov.b32 {$8, $9}, token;
        and.b32 token, fifth, 0x00f000f0;
        mov.b32 {$10, $11}, token;
        and.b32 token, seventh, 0x000f000f;
        mov.b32 {$12, $13}, token;
        and.b32 token, seventh, 0x00f000f0;
        mov.b32 {$14, $15}, token;
        }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [even, odd],
        dtype=SIXTEEN_NUMBERS,
        is_pure=True,
        pack=1,
    )
    first, second = joined(a, b, c, d, e, f, g, h), joined(i, j, k, l, m, n, o, p)
    # [pair of rows, eighth, word of it, row of the pair, bits 0, 1 and 2 of the code's place in its word]
    codes = gl.reshape(gl.join(first, second), [8, 8, 2, 2, 2, 2, 2])
    codes = gl.permute(codes, (2, 6, 5, 4, 1, 0, 3))
    return gl.convert_layout(gl.reshape(codes, [TILE, 16]), LEFT)


@gluon.jit
def bytes_operand(words):
    """Words [16, 32] of four codes of 8 bits as numbers in float16, [128, 16]; rows as `left_operand` has them.

    A code is worth SMALLEST times itself.
    """
    even, odd = gl.split(gl.permute(gl.reshape(words, [8, 2, 32]), (0, 2, 1)))
    # Halves of two rows beside each other, then the codes of each token.
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, token;
        prmt.b32 low, $8, $9, 0x5410;
        prmt.b32 high, $8, $9, 0x7632;
        and.b32 token, low, 0x00ff00ff;
        mov.b32 {$0, $1}, token;
        prmt.b32 token, low, 0, 0x4341;
        mov.b32 {$2, $3}, token;
        and.b32 token, high, 0x00ff00ff;
        mov.b32 {$4, $5}, token;
        prmt.b32 token, high, 0, 0x4341;
        mov.b32 {$6, $7}, token;
        }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [even, odd],
        dtype=EIGHT_NUMBERS,
        is_pure=True,
        pack=1,
    )
    return codes_in_rows(joined(a, b, c, d, e, f, g, h), TILE // 4)


@gluon.jit
def is_sixteenfold(rows, BITS: gl.constexpr):
    """Whether the code of a row counts 16 times as much: in 4 bits, each second one of a lane's tokens in a row."""
    return (rows // 8 % 2 == 1) & (BITS == 4)


@gluon.jit
def beginning_of(queries, rows, CHUNKS: gl.constexpr, BITS: gl.constexpr):
    """Where sums of products with such codes begin, so that 8, or 128, is zero: [TILE, HEADS]."""
    whole = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, RIGHT))
    for chunk in gl.static_range(CHUNKS):
        whole += gl.sum(queries[chunk].to(gl.float32), 0)
    whole = gl.convert_layout(whole, gl.SliceLayout(0, MMA)) * (-(2 ** (BITS - 1)) * SMALLEST)
    return whole[None, :] * gl.where(is_sixteenfold(rows, BITS), 16.0, 1.0)[:, None]
