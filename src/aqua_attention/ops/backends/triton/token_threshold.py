# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""The weight of the lightest of the tokens that are read, without sorting them.

A program has its weights in registers, in float16, two in 32 bits: the compiler would give each a register. Numbers
that have no sign are in the order of their bits, so an interval of bits holds the weight that is looked for. Each turn
says what is above a few thresholds in it.
"""

import triton
import triton.language as tl

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
def counted(sums, pairs, threshold, ASSEMBLY: tl.constexpr):
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
def reach(pairs, threshold, ASSEMBLY: tl.constexpr):
    """Which of two tokens weigh as much as the number of these bits: bit 0 for the even one, bit 16 for the odd one."""
    # Bit 10 is one of those that 1 has in float16, and 0 has not.
    return (counted(tl.zeros_like(pairs), pairs, threshold, ASSEMBLY) >> 10) & 0x00010001


@triton.jit
def weighed(sums, pairs, threshold, ASSEMBLY: tl.constexpr):
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
def _has(held, threshold, BY_COUNT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Mass, or number, of the tokens of this program that weigh so much. A number in float16 is exact: a thread adds up
    less than a thousand tokens in one.
    """
    if BY_COUNT:
        sums = tl.zeros_like(held[0])
        for j in tl.static_range(len(held)):
            sums = counted(sums, held[j], threshold, ASSEMBLY)
        even, odd = two(sums)
        return tl.sum(even.to(tl.float32) + odd.to(tl.float32))
    else:
        sums = tl.zeros(held[0].shape, tl.float32)
        for j in tl.static_range(len(held)):
            sums = weighed(sums, held[j], threshold, ASSEMBLY)
        return tl.sum(sums) / WEIGHT_UNIT


@triton.jit
def least_weight(held, window, share, wanted, BY_COUNT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The weight from which on tokens are read: a largest for which they have enough; infinity for none."""
    low, high = lightest_of_all(BY_COUNT), tl.full([], INFINITY, tl.int32)
    low_has = window + _has(held, low, BY_COUNT, ASSEMBLY)
    target = target_of(low_has, share, wanted, BY_COUNT)
    low = tl.where(window >= target, INFINITY, low)
    # It ends early where without one token from the lower end on there would not be enough.
    while (high - low > 1) & (low_has - _lightest(low, BY_COUNT) >= target):
        middle = (low + high) // 2
        has = window + _has(held, middle, BY_COUNT, ASSEMBLY)
        enough = has >= target
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        low_has = tl.where(enough, has, low_has)
    return weight_of(low)


@triton.jit
def lightest_of_all(BY_COUNT: tl.constexpr):
    """Bits of the least weight that can be chosen. A fixed number of tokens has none that weighs nothing beside the
    others: they would be ties, and all be read.
    """
    return tl.full([], 1 if BY_COUNT else 0, tl.int32)


@triton.jit
def target_of(has, share, wanted, BY_COUNT: tl.constexpr):
    """What the tokens that are read must have, given what all have."""
    return tl.minimum(has, wanted * 1.0) if BY_COUNT else share * has


@triton.jit
def _lightest(low, BY_COUNT: tl.constexpr):
    """Mass, or number, of one token from the lower end on, at least."""
    return tl.full([], 1.0, tl.float32) if BY_COUNT else weight_of(low).to(tl.float32) / WEIGHT_UNIT
