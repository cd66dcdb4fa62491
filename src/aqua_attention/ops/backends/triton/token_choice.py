# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Choosing tokens from their weights without sorting them: `ops.tokens.choose_tokens` for one query a sequence.

A program adds up the weights of a group's heads, and writes them as orders of 16 bits. It reads these again and again
from the cache of its processor, each time to see what is above a few thresholds, which divide an interval. Then it
lists the tokens that are read.

Several programs of a sequence and head, where there are too few of these for a GPU, wait for each other: each says what
it has above the thresholds, and all add that up in the same order. This needs all of them on the GPU at once, which
blocks that follow each other are. The interpreter runs one program after the other, and takes one only.

A list has room for all tokens, and nothing else is kept of them, so that no distribution of scores overflows.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE, on_device_of, starts_early
from aqua_attention.ops.backends.triton.token_order import BEHIND_ALL, NOTHING, held_order, order_of, value_of
from aqua_attention.ops.backends.triton.token_weights import group_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import (
    MOST_NUMBERS,
    MOST_TURNS,
    ScoredArguments,
    TokenWork,
    seen_length,
    start_early,
)
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache

WARPS, TILES_AT_ONCE = 8, 32
"""Of a program, and how many tiles it looks at together: of each a thread has 16 tokens."""
THRESHOLDS, MANY_THRESHOLDS, FEW_TILES = 3, 7, 16
"""Of a turn. There are more where programs meet, so that they meet less often, and have so few tiles that all sums fit
into registers."""
TURNS = tl.constexpr(MOST_TURNS)
MOST_SAID = tl.constexpr(MOST_NUMBERS)


def choose_tokens(cache: ScoredCache, work: TokenWork, plan: LayerPlan, *, appended: bool) -> None:
    """Write the tokens that are read, and how many these are.

    `work.scratch.met` must be zero: `prepare_tokens` makes it so.
    """
    batch, kv_heads, _, _, tiles = cache.shape
    config = plan.config
    at_once = min(TILES_AT_ONCE, int(triton.next_power_of_2(-(-tiles // work.chunks))))
    is_wide = work.chunks > 1 and at_once <= FEW_TILES
    with on_device_of(work.rotated):
        _choose_tokens[(work.chunks, kv_heads, batch)](
            ScoredArguments.of(cache),
            work.scratch,
            0.0 if config.select_p is None else float(config.select_p),
            config.select_tokens or 0,
            plan.sink,
            plan.recent,
            plan.min_length,
            work.splits,
            APPENDED=appended,
            GROUP=work.group,
            SPLITS_PADDED=triton.next_power_of_2(work.splits + 1),
            TILES=at_once,
            CHUNKS=work.chunks,
            COUNT=MANY_THRESHOLDS if is_wide else THRESHOLDS,
            BY_COUNT=config.select_p is None,
            UNIT=1.0 / triton.next_power_of_2(work.group),
            num_warps=WARPS,
            **starts_early(work.rotated),
        )


@triton.jit
def _choose_tokens(
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
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COUNT: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Part of a sequence and key-value head.

    Args:
        TILES: that are looked at together; CHUNKS: programs of a sequence and head; COUNT: thresholds of a turn.
        UNIT: weights of heads are shares of their softmax; times this all together are 1 at most.
    """
    start_early(EARLY)
    # What was scored last comes first: it still lies in the GPU's cache.
    chunk, group = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.num_programs(2) - 1 - tl.program_id(2)
    place = (row * tl.num_programs(1) + group).to(tl.int64)
    length = seen_length(cache, row, APPENDED)
    lse, window = merged_lse(scratch.part_lse, place, splits, GROUP, SPLITS_PADDED, UNIT)
    every = (length < min_length) | (window != window)
    if BY_COUNT:
        window = 0.0
    else:
        every = every | (share >= 1.0)
    tiles = tl.cdiv(length, TILE)
    each = tl.cdiv(tiles, CHUNKS)
    begin = chunk * each
    part = (length, begin, tl.minimum(begin + each, tiles), sink, recent)
    first = place * cache.tile_count
    orders_ptr, tokens_ptr = scratch.orders + first * TILE, scratch.tokens + first * TILE
    shared = (scratch.met + place, scratch.said + place * TURNS * MOST_SAID * CHUNKS, chunk)
    _keep(scratch, orders_ptr, first, part, lse, GROUP, TILES, UNIT)
    tl.debug_barrier()  # the whole program has written before any of it reads
    least, turn = _threshold(orders_ptr, part, window, share, wanted, shared, TILES, CHUNKS, COUNT, BY_COUNT)
    least = tl.where(every, NOTHING, least)
    if CHUNKS > 1:
        total, before = _together(_count(orders_ptr, part, least, TILES), shared, turn, CHUNKS)
        _list(orders_ptr, tokens_ptr, part, least, before.to(tl.int32), TILES)
    else:
        total = _list(orders_ptr, tokens_ptr, part, least, tl.full([], 0, tl.int32), TILES)
    if chunk == 0:
        tl.store(scratch.counts + place, total.to(tl.int32))


@triton.jit
def _positions(tile, TILES: tl.constexpr):
    """Tiles that are looked at together, and their tokens, [TILES, TILE]."""
    tiles = tile + tl.arange(0, TILES)
    return tiles, tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def _keep(scratch, orders_ptr, first, part, lse, GROUP: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr):
    """Write the orders of the tokens of this program that can be chosen, NOTHING for others."""
    length, begin, end, sink, recent = part
    for tile in range(begin, end, TILES):
        tiles, position = _positions(tile, TILES)
        others = (position >= sink) & (position < length - recent) & (tiles < end)[:, None]
        weight = group_weights(scratch, first + tiles, tiles < end, lse, GROUP, TILES, UNIT)
        held = tl.where(others, held_order(order_of(weight)), NOTHING)
        tl.store(orders_ptr + position, held.to(tl.int16), (tiles < end)[:, None])


@triton.jit
def _held(orders_ptr, tile, end, TILES: tl.constexpr):
    """Orders of tiles that are looked at together."""
    tiles, position = _positions(tile, TILES)
    return tl.load(orders_ptr + position, (tiles < end)[:, None], 0).to(tl.int32) & 65535


@triton.jit
def _read(held, position, part, least):
    """Which tokens are read: those of the exact window, and those from an order on."""
    length, _begin, end, sink, recent = part
    exact = (position < sink) | (position >= length - recent)
    return ((position < length) & (position < end * TILE) & (exact | (held >= least))).to(tl.int32)


@triton.jit
def _count(orders_ptr, part, least, TILES: tl.constexpr):
    """How many tokens of this program are read, as a number that is said."""
    _length, begin, end, _sink, _recent = part
    found = tl.zeros([TILES, TILE], tl.int32)
    for tile in range(begin, end, TILES):
        found += _read(_held(orders_ptr, tile, end, TILES), _positions(tile, TILES)[1], part, least)
    return tl.sum(found).to(tl.float32)


@triton.jit
def _list(orders_ptr, tokens_ptr, part, least, place, TILES: tl.constexpr):
    """List the tokens of this program that are read, in order, from a place in the list on; gives that behind them."""
    _length, begin, end, _sink, _recent = part
    for tile in range(begin, end, TILES):
        position = _positions(tile, TILES)[1]
        read = _read(_held(orders_ptr, tile, end, TILES), position, part, least)
        count = tl.sum(read, 1)
        ends = place + tl.cumsum(count, 0)
        tl.store(tokens_ptr + (ends - count)[:, None] + tl.cumsum(read, 1) - 1, position, read > 0)
        place += tl.sum(count, 0)
    return place


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
        met_ptr, said_ptr, chunk = shared
        said_ptr += turn * MOST_SAID * CHUNKS
        tl.store(said_ptr + chunk, number)
        meet(met_ptr, (turn + 1) * CHUNKS)
        chunks = tl.arange(0, CHUNKS)
        numbers = tl.load(said_ptr + chunks, cache_modifier=".cg")
        number, before = tl.sum(numbers, 0), tl.sum(tl.where(chunks < chunk, numbers, 0.0), 0)
    return number, before


@triton.jit
def _all_together(numbers, shared, turn, CHUNKS: tl.constexpr, COUNT: tl.constexpr):
    """The sums of COUNT numbers of each program."""
    found = ()
    if CHUNKS > 1:
        met_ptr, said_ptr, chunk = shared
        said_ptr += turn * MOST_SAID * CHUNKS
        for i in tl.static_range(COUNT):
            tl.store(said_ptr + i * CHUNKS + chunk, numbers[i])
        meet(met_ptr, (turn + 1) * CHUNKS)
        said_ptr += tl.arange(0, CHUNKS)
        for i in tl.static_range(COUNT):
            found = found + (tl.sum(tl.load(said_ptr + i * CHUNKS, cache_modifier=".cg"), 0),)  # noqa: RUF005
    else:
        found = numbers
    return found


@triton.jit
def _worth(held, BY_COUNT: tl.constexpr):
    """What a token of this order counts for: one, or its weight."""
    return tl.full(held.shape, 1.0, tl.float32) if BY_COUNT else value_of(held)


@triton.jit
def _have(orders_ptr, part, thresholds, TILES: tl.constexpr, COUNT: tl.constexpr, BY_COUNT: tl.constexpr):
    """Mass, or number, of the tokens of this program from each of COUNT orders on."""
    _length, begin, end, _sink, _recent = part
    sums, found = (), ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([TILES, TILE], tl.float32),)  # noqa: RUF005 (tuples of kernels cannot be unpacked)
    for tile in range(begin, end, TILES):
        held = _held(orders_ptr, tile, end, TILES)
        worth, added = _worth(held, BY_COUNT), ()
        for i in tl.static_range(COUNT):
            added = added + (sums[i] + tl.where(held >= thresholds[i], worth, 0.0),)  # noqa: RUF005
        sums = added
    for i in tl.static_range(COUNT):
        found = found + (tl.sum(sums[i]),)  # noqa: RUF005
    return found


@triton.jit
def _narrowed(low, high, low_has, order, has, target):
    """An interval of orders, and what is above its lower end, once it is known what is above one of them."""
    enough = has >= target
    return tl.where(enough, order, low), tl.where(enough, high, tl.minimum(high, order)), tl.where(enough, has, low_has)


@triton.jit
def _threshold(
    orders_ptr,
    part,
    window,
    share,
    wanted,
    shared,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COUNT: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """The order from which on tokens are read: a largest for which they have enough; behind all orders for none. And
    how often programs have met.
    """
    lowest: tl.constexpr = NOTHING + 1
    own = _have(orders_ptr, part, (lowest,), TILES, 1, BY_COUNT)
    low_has = window + _together(own[0], shared, 0, CHUNKS)[0]
    target = tl.minimum(low_has, wanted * 1.0) if BY_COUNT else share * low_has
    low = tl.where(window >= target, BEHIND_ALL, lowest)
    high, turn = low * 0 + BEHIND_ALL, 1
    while (high - low > 1) & (low_has - _worth(low, BY_COUNT) >= target):
        thresholds, width = (), high - low
        for i in tl.static_range(COUNT):
            thresholds = thresholds + (low + tl.maximum((i + 1) * width // (COUNT + 1), 1),)  # noqa: RUF005
        has = _have(orders_ptr, part, thresholds, TILES, COUNT, BY_COUNT)
        has = _all_together(has, shared, turn, CHUNKS, COUNT)
        for i in tl.static_range(COUNT):
            low, high, low_has = _narrowed(low, high, low_has, thresholds[i], window + has[i], target)
        turn += 1
    return low, turn
