# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Weights of tokens as numbers of 16 bits in their order, their histograms, and the threshold that these give.

An order has 5 bits of exponent and 11 of mantissa, and stands for that number exactly: with exponent e and mantissa m
for 2**(e - 31) * (1 + m / 2048), with e = 0 for 2**-30 * m / 2048. So the mass of all tokens with one upper half is
known from how many they are and the sum of their lower halves, in whole numbers, whatever the order of adding.
"""

import triton
import triton.language as tl

BINS = tl.constexpr(256)
"""Values of half an order."""
LARGEST_ORDER = tl.constexpr(65535)


@triton.jit
def order_of(weight):
    """Orders of float32 weights from 0 to 1. NaN is largest."""
    bits = weight.to(tl.int32, bitcast=True)
    # Rounded, so that sums of many are not moved to one side.
    normal = (bits + ((1 << 11) - (96 << 23))) >> 12
    small = (tl.minimum(weight, 2.0**-30) * (2.0**41) + 0.5).to(tl.int32)
    order = tl.where(weight < 2.0**-30, small, normal)
    order = tl.minimum(tl.maximum(order, 0), LARGEST_ORDER)
    return tl.where(weight == weight, order, LARGEST_ORDER)


@triton.jit
def value_of(order):
    """The weight that an order stands for; behind all of them infinity."""
    bits = (order + (96 << 11)) << 12
    value = tl.where(order < 2048, order.to(tl.float32) * 2.0**-41, bits.to(tl.float32, bitcast=True))
    return tl.where(order > LARGEST_ORDER, float("inf"), value)


@triton.jit
def unit_and_base(upper):
    """What one in the lower half is worth beside these upper halves, and how many of it a lower half of zero is."""
    exponent = upper >> 3
    unit = tl.exp2((tl.maximum(exponent, 1) - 42).to(tl.float32))
    base = tl.where(exponent > 0, 2048, 0) + (upper & 7) * 256
    return unit, base


@triton.jit
def one_hot(halves, wanted, AXIS: tl.constexpr):
    """1 in float16 at four bits of each number, 0 elsewhere, [parts, 16, numbers] or with the last two exchanged."""
    sixteen = tl.arange(0, 16)
    if AXIS == 1:
        found = (halves[:, None, :] == sixteen[None, :, None]) & wanted[:, None, :]
    else:
        found = (halves[:, :, None] == sixteen[None, None, :]) & wanted[:, :, None]
    return found.to(tl.float16)


@triton.jit
def add_coarse(orders, wanted, counts, lower):
    """Add tokens, [parts, tokens], to histograms of their upper halves, [parts, 16, 16] each: how many, and the sums of
    lower halves. Products of tensor cores with ones and zeros add without atomics.
    """
    upper, low = orders >> 8, (orders & 255).to(tl.float16)
    rows, columns = one_hot(upper >> 4, wanted, 1), one_hot(upper & 15, wanted, 2)
    counts = tl.dot(rows, columns, counts)
    return counts, tl.dot(rows, columns * low[:, :, None], lower)


@triton.jit
def add_fine(orders, wanted, counts):
    """The same of lower halves, of how many alone."""
    low = orders & 255
    return tl.dot(one_hot(low >> 4, wanted, 1), one_hot(low & 15, wanted, 2), counts)


@triton.jit
def flat(histogram):
    """[parts, 16, 16] of whole numbers as [BINS]."""
    return tl.reshape(tl.sum(histogram, 0), [BINS]).to(tl.int32)


@triton.jit
def coarse_threshold(coarse_ptr, window, share, wanted, BY_COUNT: tl.constexpr):
    """The upper half of the threshold: tokens with a greater one are read, some of those with this one, no others.

    Args:
        window: mass of the exact window.
        share: of all mass that is to be read; wanted: how many tokens, where that is said BY_COUNT.

    Returns:
        The upper half, -1 for all tokens (also where something is NaN), BINS for none; what the greater ones and the
        window have; and what is to be reached.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(coarse_ptr + bins, cache_modifier=".cg")
    if BY_COUNT:
        have = tl.cumsum(counts, 0, reverse=True).to(tl.float32)
        target = tl.minimum(tl.sum(counts, 0), wanted).to(tl.float32)
        window = 0.0
    else:
        lower = tl.load(coarse_ptr + BINS + bins, cache_modifier=".cg")
        unit, base = unit_and_base(bins)
        mass = unit * (counts.to(tl.float32) * base.to(tl.float32) + lower.to(tl.float32))
        have = tl.cumsum(mass, 0, reverse=True)
        target = share * (window + tl.sum(tl.where(bins == 0, have, 0.0), 0))
    upper = tl.max(tl.where(window + have >= target, bins, -1), 0)
    upper = tl.where(window >= target, BINS, upper)
    reached = window + tl.sum(tl.where(bins == upper + 1, have, 0.0), 0)
    return upper, reached, target


@triton.jit
def fine_threshold(fine_ptr, upper, reached, target, BY_COUNT: tl.constexpr):
    """The lower half of the threshold; tokens with this order or a greater one are read."""
    bins = tl.arange(0, BINS)
    counts = tl.load(fine_ptr + bins, cache_modifier=".cg")
    if BY_COUNT:
        have = tl.cumsum(counts, 0, reverse=True).to(tl.float32)
    else:
        unit, base = unit_and_base(upper)
        have = tl.cumsum(counts.to(tl.float32) * (unit * (base + bins).to(tl.float32)), 0, reverse=True)
    # Rounded sums of the same numbers in another order may fall short by a little: then it is all of them.
    return tl.max(tl.where(reached + have >= target, bins, 0), 0)
