# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Choosing tokens in one launch, by programs that keep the weights of all tokens in registers.

They are read once. Several programs of a sequence and head, where it does not fit into one, wait for each other: each
says what it has above a threshold, and all add that up in the same order. This needs all of them on the GPU at once,
which blocks that follow each other are. The interpreter runs one program after the other, and takes one only.

The threshold is found by quartering an interval of orders: meeting takes longer than adding up three times. Where the
lightest token that would be read is needed, it is found, too.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE
from aqua_attention.ops.backends.triton.token_order import BINS, order_of, value_of
from aqua_attention.ops.backends.triton.token_weights import group_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import MOST_TURNS, seen_length, start_early

TURNS = tl.constexpr(MOST_TURNS)


@triton.jit
def choose_resident(
    cache,
    scratch,
    share,
    wanted,
    sink,
    recent,
    min_length,
    splits,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Part of a sequence and key-value head; arguments as those of `token_choice.choose_phase`.

    Args:
        TILES_PADDED: of a program; CHUNKS: programs of a sequence and head.
    """
    start_early(EARLY)
    chunk, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (row * tl.num_programs(1) + group).to(tl.int64)
    part = (place, seen_length(cache, row, APPENDED), chunk, 0)
    limits = (share, wanted, sink, recent, min_length)
    choose_held(cache, scratch, part, limits, splits, GROUP, SPLITS_PADDED, TILES_PADDED, CHUNKS, BY_COUNT, UNIT)


@triton.jit
def choose_held(
    cache,
    scratch,
    part,
    limits,
    splits,
    GROUP: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Choose among the tokens of this program, and list what is read.

    Args:
        part: the place, its length, which program of it this is, and how many have met at this place before.
    """
    place, length, chunk, met = part
    share, wanted, sink, recent, min_length = limits
    shared = (scratch.met + place, scratch.said + place * TURNS * 3 * CHUNKS, chunk, met)
    lse, window = merged_lse(scratch.part_lse, place, splits, GROUP, SPLITS_PADDED, UNIT)
    every = (length < min_length) | (window != window)
    if BY_COUNT:
        window = 0.0
    else:
        every = every | (share >= 1.0)
    # Of what there is, each has an equal part.
    each = tl.cdiv(tl.cdiv(length, TILE), CHUNKS)
    tiles, tokens = chunk * each + tl.arange(0, TILES_PADDED), tl.arange(0, TILE)
    position = tiles[:, None] * TILE + tokens[None, :]
    seen = (position < length) & (position < (chunk + 1) * each * TILE)
    others = seen & (position >= sink) & (position < length - recent)
    at = place * cache.tile_count + tiles
    weight = group_weights(scratch, at, tiles * TILE < length, others, lse, GROUP, TILES_PADDED, UNIT)
    weight = tl.where(others, value_of(order_of(weight)), -1.0)
    order, turn = _threshold(weight, window, share, wanted, shared, CHUNKS, BY_COUNT)
    read = ((seen & (others == 0)) | (others & ((weight >= value_of(order)) | every))).to(tl.int32)
    held = tl.sum(read, 1)
    ends = tl.cumsum(held, 0)
    behind = tl.sum(held, 0)
    total, before = _together(behind.to(tl.float32), shared, turn, CHUNKS)
    at = (ends - held)[:, None] + tl.cumsum(read, 1) - 1 + before.to(tl.int32)
    tl.store(scratch.tokens + place * cache.tile_count * TILE + at, position, read > 0)
    if chunk == 0:
        tl.store(scratch.counts + place, total.to(tl.int32))


@triton.jit
def meet(met_ptr, count):
    """Say that this program has written what others wait for, and wait until so many have."""
    tl.debug_barrier()  # all of it is written before
    met = tl.atomic_add(met_ptr, 1) + 1
    while met < count:
        met = tl.atomic_add(met_ptr, 0)
    tl.debug_barrier()


@triton.jit
def _together(number, shared, turn, CHUNKS: tl.constexpr):
    """The sum of a number of each program of a sequence and head, and that of the programs before this one."""
    before = number * 0
    if CHUNKS > 1:
        met_ptr, said_ptr, chunk, met_before = shared
        said_ptr += turn * 3 * CHUNKS
        tl.store(said_ptr + chunk, number)
        meet(met_ptr, met_before + (turn + 1) * CHUNKS)
        chunks = tl.arange(0, CHUNKS)
        numbers = tl.load(said_ptr + chunks, cache_modifier=".cg")
        number, before = tl.sum(numbers, 0), tl.sum(tl.where(chunks < chunk, numbers, 0.0), 0)
    return number, before


@triton.jit
def _three_together(first, second, third, shared, turn, CHUNKS: tl.constexpr):
    """The sums of three numbers of each program."""
    if CHUNKS > 1:
        met_ptr, said_ptr, chunk, met_before = shared
        said_ptr += turn * 3 * CHUNKS
        tl.store(said_ptr + chunk, first)
        tl.store(said_ptr + CHUNKS + chunk, second)
        tl.store(said_ptr + 2 * CHUNKS + chunk, third)
        meet(met_ptr, met_before + (turn + 1) * CHUNKS)
        said_ptr += tl.arange(0, CHUNKS)
        first = tl.sum(tl.load(said_ptr, cache_modifier=".cg"), 0)
        second = tl.sum(tl.load(said_ptr + CHUNKS, cache_modifier=".cg"), 0)
        third = tl.sum(tl.load(said_ptr + 2 * CHUNKS, cache_modifier=".cg"), 0)
    return first, second, third


@triton.jit
def _have(weight, least, BY_COUNT: tl.constexpr):
    """Mass, or number, of the tokens of this program that weigh so much at least."""
    return tl.sum(tl.where(weight >= least, 1.0 if BY_COUNT else weight, 0.0))


@triton.jit
def _lightest(order, BY_COUNT: tl.constexpr):
    """What a token of this order counts for at least."""
    return value_of(order) * 0 + 1.0 if BY_COUNT else value_of(order)


@triton.jit
def _narrowed(low, high, low_has, order, has, target):
    """An interval of orders, and what is above its lower end, once it is known what is above one of them."""
    enough = has >= target
    return tl.where(enough, order, low), tl.where(enough, high, tl.minimum(high, order)), tl.where(enough, has, low_has)


@triton.jit
def _threshold(weight, window, share, wanted, shared, CHUNKS: tl.constexpr, BY_COUNT: tl.constexpr):
    """The order from which on tokens are read: a largest for which they have enough; behind all orders for none. And
    how often programs have met.
    """
    low_has = window + _together(_have(weight, 0.0, BY_COUNT), shared, 0, CHUNKS)[0]
    target = tl.minimum(low_has, wanted * 1.0) if BY_COUNT else share * low_has
    low = tl.where(window >= target, BINS * BINS, 0)
    high, turn = tl.maximum(low, BINS * BINS), 1
    while (high - low > 1) & (low_has - _lightest(low, BY_COUNT) >= target):
        width = high - low
        first, second, third = low + tl.maximum(width >> 2, 1), low + (width >> 1), low + (3 * width >> 2)
        first_has, second_has, third_has = _three_together(
            _have(weight, value_of(first), BY_COUNT),
            _have(weight, value_of(second), BY_COUNT),
            _have(weight, value_of(third), BY_COUNT),
            shared,
            turn,
            CHUNKS,
        )
        low, high, low_has = _narrowed(low, high, low_has, first, window + first_has, target)
        low, high, low_has = _narrowed(low, high, low_has, second, window + second_has, target)
        low, high, low_has = _narrowed(low, high, low_has, third, window + third_has, target)
        turn += 1
    return low, turn
