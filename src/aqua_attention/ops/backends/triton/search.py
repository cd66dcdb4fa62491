# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Choosing the largest numbers of each row of a block without sorting them.

The threshold is found by halving an interval of floats: non-negative ones have the order of their bits. All rows of a
block search at the same time, in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _as_float(order, LOW_BITS: tl.constexpr):
    """Non-negative floats have the order of their bits: the one at a place of that order."""
    return (order << LOW_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _behind_largest(size, LOW_BITS: tl.constexpr):
    """The place behind that of the largest number of each row, at most that behind infinity."""
    return (tl.minimum(tl.max(size.to(tl.int32, bitcast=True), 1), 0x7F800000) >> LOW_BITS) + 1


@triton.jit
def _look(size, count, middle, low, high, held, fewer, LOW_BITS: tl.constexpr):
    """One step of the search in `largest`."""
    # Sums of floats are twice as fast as those of integers.
    there = tl.sum(tl.where(size >= _as_float(middle, LOW_BITS)[:, None], 1.0, 0.0), 1)
    enough = there >= count
    low, held = tl.where(enough, middle, low), tl.where(enough, there, held)
    return low, tl.where(enough, high, middle), held, tl.where(enough, fewer, there)


@triton.jit
def largest(
    size,
    states,
    count,
    before,
    RANK_BY_DOT: tl.constexpr,
    KEPT: tl.constexpr,
    LOW_BITS: tl.constexpr,
    OCTAVES: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """`states`, with zeros but where the `count` largest numbers of each row of `size` are: NaN first, of equal ones
    the first. Negative numbers are none; `before[i, j]` is 1 where i < j, else 0.
    """
    bits = size.to(tl.int32, bitcast=True)
    if tl.max(tl.max(bits, 1), 0) > 0x7F800000:
        # Move the others down by one place to make room for NaN. The two smallest are equal then.
        moved = tl.where(bits > 0x7F800000, 0x7F800000, tl.maximum(bits - (1 << LOW_BITS), 0))
        size = tl.where(bits < 0, size, moved.to(tl.float32, bitcast=True))
    # `held` numbers are at the place `low` or behind it, at least as many as asked for; at `high` are `fewer`.
    high = _behind_largest(size, LOW_BITS)
    low, held, fewer = tl.zeros_like(high), tl.full(high.shape, KEPT, tl.float32), tl.zeros(high.shape, tl.float32)
    middle = tl.maximum(high - (OCTAVES << (23 - LOW_BITS)), 0)
    low, high, held, fewer = _look(size, count, middle, low, high, held, fewer, LOW_BITS)
    unsettled = tl.max(tl.where(held > count, high - low, 1), 0)
    while unsettled > 1:
        for halving in tl.static_range(HALVINGS):
            middle = low + ((high - low) >> 1)
            if halving % 2 == 0:
                # Where the wanted one would be if the numbers between the two were spread evenly.
                share = (held - count + 0.5) / (held - fewer + 0.5)
                guess = low + (share * (high - low).to(tl.float32)).to(tl.int32)
                middle = tl.minimum(tl.maximum(guess, low + 1), tl.maximum(high - 1, low))
            low, high, held, fewer = _look(size, count, middle, low, high, held, fewer, LOW_BITS)
        unsettled = tl.max(tl.where(held > count, high - low, 1), 0)
    # What is at the place `low` or behind it is chosen, and nothing below.
    bound = tl.where(low > 0, _as_float(tl.maximum(low - 1, 0), LOW_BITS), -1.0)[:, None]
    bound = tl.broadcast_to(bound, size.shape)
    if tl.max(held, 0) > count:
        # In some rows too many are at that place. The rank among them is the sum of those before.
        least = _as_float(low, LOW_BITS)[:, None]
        equal = tl.where(size == least, 1.0, 0.0)
        rank = tl.dot(equal.to(before.dtype), before) if RANK_BY_DOT else tl.cumsum(equal, 1) - equal
        bound = tl.where(rank >= tl.where(held > count, count - fewer, KEPT)[:, None], least, bound)
    return tl.where(size <= bound, 0.0, states)


@triton.jit
def _drop(size, variance, limit, middle, low, high, dropped, LOW_BITS: tl.constexpr):
    """One step of the search in `needed`."""
    lost = tl.sum(tl.where(size < _as_float(middle, LOW_BITS)[:, None], variance, 0.0), 1)
    # A NaN is never little enough.
    little = lost <= limit
    return tl.where(little, middle, low), tl.where(little, high, middle), tl.where(little, lost, dropped)


@triton.jit
def needed(size, variance, limit, LOW_BITS: tl.constexpr, OCTAVES: tl.constexpr, HALVINGS: tl.constexpr):
    """Boolean, the shape of `size`: the fewest of the largest numbers of each row, one at least, for which the
    variances of the others add up to `limit` at most. The order is that of `largest`.
    """
    # What is before the place `low` may be dropped, all that is before `high` may not, unless it is everything.
    high = _behind_largest(size, LOW_BITS)
    low, dropped = tl.zeros_like(high), tl.zeros(high.shape, tl.float32)
    middle = tl.maximum(high - (OCTAVES << (23 - LOW_BITS)), 0)
    low, high, dropped = _drop(size, variance, limit, middle, low, high, dropped, LOW_BITS)
    unsettled = tl.max(high, 0)
    while unsettled > 1:
        for _ in tl.static_range(HALVINGS):
            low, high, dropped = _drop(size, variance, limit, low + ((high - low) >> 1), low, high, dropped, LOW_BITS)
        least, most = _as_float(low, LOW_BITS)[:, None], _as_float(high - 1, LOW_BITS)[:, None]
        between = tl.sum(tl.where((size >= least) & (size <= most), 1, 0), 1)
        unsettled = tl.max(tl.where(high - low > 1, between, 1), 0)
    # Between the two is one number, or several equal ones: the last of these are dropped.
    least, most = _as_float(low, LOW_BITS)[:, None], _as_float(high - 1, LOW_BITS)[:, None]
    equal = (size >= least) & (size <= most)
    left = tl.cumsum(tl.where(equal, variance, 0.0), 1, reverse=True) + dropped[:, None]
    chosen = ~(size <= most) | (equal & ~(left <= limit))
    dims = tl.arange(0, size.shape[1])[None, :]
    first = tl.min(tl.where(equal, dims, size.shape[1]), 1)
    return chosen | ((tl.sum(chosen.to(tl.int32), 1) == 0)[:, None] & (dims == first[:, None]))
