# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Keys and values as words of 32 bits, as `token_gather_by_hand` reads them: four codes, or two numbers of 16 bits.

A key is read in pieces of 16 words, and at the end one of 8 or 4 or both. Numbers of 16 bits are words until they are
multiplied, because each would take a register of its own from a step to the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aqua_attention.ops.backends.triton.token_work import GATHER_STEP

STEP = gl.constexpr(GATHER_STEP)
"""Tokens at a time."""


@gluon.constexpr_function
def key_layout(words):
    """Of 32 rows of so many words (16, 8 or 4): lane 4g + t has rows g, g + 8, g + 16 and g + 24, and a quarter of
    each, words in a row.
    """
    each = words // 4
    in_row = [[0, 1 << bit] for bit in range(each.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*in_row, [8, 0], [16, 0]], [[0, each], [0, 2 * each], [1, 0], [2, 0], [4, 0]], [], [], [32, words]
    )


@gluon.constexpr_function
def piece_count(words):
    """In how many pieces keys of so many words are read."""
    return words // 16 + words // 8 % 2 + words // 4 % 2


@gluon.constexpr_function
def piece_words(words, piece):
    """Words of such a piece: 16, and at the end 8 or 4 or both."""
    return 16 if piece < words // 16 else 8 if piece == words // 16 and words // 8 % 2 else 4


@gluon.constexpr_function
def piece_begin(words, piece):
    """The word at which it begins."""
    return 16 * min(piece, words // 16) + 8 * (piece > words // 16)


@gluon.jit
def load_keys(keys_ptr, tokens, WORDS: gl.constexpr):
    """Whole keys of a step, a tuple of pieces."""
    keys = ()
    for piece in gl.static_range(piece_count(WORDS)):
        keys = keys + (  # noqa: RUF005 (tuples of kernels cannot be unpacked)
            load_words(
                keys_ptr + piece_begin(WORDS, piece),
                tokens,
                piece_words(WORDS, piece),
                key_layout(piece_words(WORDS, piece)),
                WORDS,
            ),
        )
    return keys


@gluon.jit
def load_words(pointer, tokens, WORDS: gl.constexpr, LAYOUT: gl.constexpr, STRIDE: gl.constexpr):
    """So many words of each token, of which there are STRIDE."""
    words = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))
    rows = gl.convert_layout(tokens, gl.SliceLayout(1, LAYOUT)) * STRIDE
    return gl.load(pointer + words[None, :] + rows[:, None], cache_modifier=".cg")
