# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""The weight of the lightest of the tokens that are read, without sorting them.

A program has its weights in registers, in float16, two in 32 bits: the compiler would give each a register. Numbers
that have no sign are in the order of their bits, so an interval of bits holds the weight that is looked for. Each turn
says what is above a few thresholds in it.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.token_meeting import all_together
from aqua_attention.ops.backends.triton.token_weights import WEIGHT_UNIT

INFINITY = tl.constexpr(0x7C00)
"""Its bits in float16: the threshold that no token reaches."""


@triton.jit
def two(pairs):
    """Even and odd numbers in float16 of pairs."""
    return pairs.to(tl.int16).to(tl.float16, bitcast=True), (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def weight_of(bits):
    """The number in float16 that has these bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def bits_of(weight):
    """Of a number in float16."""
    return weight.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _counted(sums, pairs, threshold, ASSEMBLY: tl.constexpr):
    """The sums, pairs of numbers in float16, with one more where a token weighs so much."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 one;
            .reg .b32 both;
            cvt.u16.u32 one, $3;
            mov.b32 both, {one, one};
            set.ge.f16x2.f16x2 both, $2, both;
            add.f16x2 $0, $1, both;
            }
            """,
            "=r,r,r,r",
            [sums, pairs, tl.zeros_like(pairs) + threshold],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    even, odd = two(pairs)
    least = weight_of(threshold)
    # Numbers that are added up here are whole, and have no sign.
    even_sum, odd_sum = two(sums)
    even_sum += (even >= least).to(tl.float16)
    odd_sum += (odd >= least).to(tl.float16)
    return even_sum.to(tl.int16, bitcast=True).to(tl.int32) | (odd_sum.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _weighed(sums, pairs, threshold, ASSEMBLY: tl.constexpr):
    """The sums, in float32, with the weights of two tokens each, if they weigh so much."""
    if ASSEMBLY:
        # The compiler would keep all weights in float32.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            .reg .b32 both;
            .reg .f32 first, second;
            cvt.u16.u32 low, $3;
            mov.b32 both, {low, low};
            set.ge.f16x2.f16x2 both, $2, both;
            mul.f16x2 both, both, $2;
            mov.b32 {low, high}, both;
            cvt.f32.f16 first, low;
            cvt.f32.f16 second, high;
            add.f32 first, first, second;
            add.f32 $0, $1, first;
            }
            """,
            "=f,f,r,r",
            [sums, pairs, tl.zeros_like(pairs) + threshold],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    even, odd = two(pairs)
    least = weight_of(threshold)
    even = tl.where(even >= least, even.to(tl.float32), 0.0)
    return sums + (even + tl.where(odd >= least, odd.to(tl.float32), 0.0))


@triton.jit
def _have(held, thresholds, COUNT: tl.constexpr, BY_COUNT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Mass, or number, of the tokens of this program that weigh as much as each of COUNT thresholds. A number in
    float16 is exact: a thread adds up less than a thousand tokens in one.
    """
    found = ()
    for i in tl.static_range(COUNT):
        if BY_COUNT:
            sums = tl.zeros_like(held[0])
            for j in tl.static_range(len(held)):
                sums = _counted(sums, held[j], thresholds[i], ASSEMBLY)
            even, odd = two(sums)
            total = tl.sum(even.to(tl.float32) + odd.to(tl.float32))
        else:
            sums = tl.zeros(held[0].shape, tl.float32)
            for j in tl.static_range(len(held)):
                sums = _weighed(sums, held[j], thresholds[i], ASSEMBLY)
            total = tl.sum(sums) / WEIGHT_UNIT
        found = found + (total,)  # noqa: RUF005
    return found


@triton.jit
def _narrowed(low, high, low_has, bits, has, target):
    """An interval of bits, and what is above its lower end, once it is known what is above one number in it."""
    enough = has >= target
    return tl.where(enough, bits, low), tl.where(enough, high, tl.minimum(high, bits)), tl.where(enough, has, low_has)


@triton.jit
def least_weight(
    held,
    window,
    share,
    wanted,
    shared,
    CHUNKS: tl.constexpr,
    COUNT: tl.constexpr,
    BY_COUNT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The weight from which on tokens are read: a largest for which they have enough; infinity for none. And how often
    programs have met.
    """
    # A fixed number of tokens has none that weighs nothing beside the others: they would be ties, and all be read.
    nothing = tl.full([], 1 if BY_COUNT else 0, tl.int32)
    low, high, turn = nothing, nothing + INFINITY, 1
    first = (low,) + _between(low, high, COUNT)  # noqa: RUF005 (tuples of kernels cannot be unpacked)
    found = _have(held, first, COUNT + 1, BY_COUNT, ASSEMBLY)
    found = all_together(found, shared, 0, CHUNKS, COUNT + 1)
    low_has = window + found[0]
    target = tl.minimum(low_has, wanted * 1.0) if BY_COUNT else share * low_has
    for i in tl.static_range(COUNT):
        low, high, low_has = _narrowed(low, high, low_has, first[i + 1], window + found[i + 1], target)
    low = tl.where(window >= target, INFINITY, low)
    # It ends early where without one token from the lower end on there would not be enough.
    while (high - low > 1) & (low_has - _lightest(low, BY_COUNT) >= target):
        thresholds = _between(low, high, COUNT)
        has = _have(held, thresholds, COUNT, BY_COUNT, ASSEMBLY)
        has = all_together(has, shared, turn, CHUNKS, COUNT)
        for i in tl.static_range(COUNT):
            low, high, low_has = _narrowed(low, high, low_has, thresholds[i], window + has[i], target)
        turn += 1
    return weight_of(low), turn


@triton.jit
def _between(low, high, COUNT: tl.constexpr):
    """COUNT numbers that divide an interval of bits."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (low + tl.maximum((i + 1) * (high - low) // (COUNT + 1), 1),)  # noqa: RUF005
    return found


@triton.jit
def _lightest(low, BY_COUNT: tl.constexpr):
    """Mass, or number, of one token from the lower end on, at least."""
    return tl.full([], 1.0, tl.float32) if BY_COUNT else weight_of(low).to(tl.float32) / WEIGHT_UNIT
