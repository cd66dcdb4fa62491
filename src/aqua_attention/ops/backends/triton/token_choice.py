# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""Choosing tokens from their weights without sorting them: `ops.tokens.choose_tokens` for one query a sequence.

A program adds up the weights of a group's heads, and writes them in float16. It reads these again and again from the
cache of its processor, each time to see what is above a few thresholds, which divide an interval. Numbers of 0 or more
are in the order of their bits, so 15 bits are halved until one is left. Then it lists the tokens that are read.

Several programs of a sequence and head, where there are too few of these for a GPU, wait for each other: each says what
it has above the thresholds, and all add that up in the same order. This needs all of them on the GPU at once, which
blocks that follow each other are. The interpreter runs one program after the other, and takes one only.

A list has room for all tokens, and nothing else is kept of them, so that no distribution of scores overflows.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE, on_device_of, starts_early
from aqua_attention.ops.backends.triton.token_weights import WEIGHT_UNIT, group_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import (
    MOST_NUMBERS,
    MOST_TURNS,
    ScoredArguments,
    Sequences,
    TokenWork,
    seen_length,
    start_early,
)
from aqua_attention.ops.plan import LayerPlan

WARPS, TILES_AT_ONCE = 8, 32
"""Of a program, and how many tiles it looks at together: of each a thread has 16 tokens."""
THRESHOLDS, MANY_THRESHOLDS, FEW_TILES = 3, 7, 16
"""Of a turn. There are more where programs meet, so that they meet less often, and have so few tiles that all sums fit
into registers."""
INFINITY = tl.constexpr(0x7C00)
"""Its bits in float16: the threshold that no token reaches."""
TURNS = tl.constexpr(MOST_TURNS)
MOST_SAID = tl.constexpr(MOST_NUMBERS)


def choose_tokens(cache: Sequences, work: TokenWork, plan: LayerPlan, *, appended: bool) -> None:
    """Write the tokens that are read, and how many these are.

    `work.scratch.met` must be zero: what rotates the queries makes it so.
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
            ASSEMBLY=work.rotated.is_cuda,
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
    ASSEMBLY: tl.constexpr,
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
    lse, window, outside = merged_lse(scratch.part_lse, place, splits, GROUP, SPLITS_PADDED, UNIT)
    every = (length < min_length) | (window != window)
    if BY_COUNT:
        # Only the order counts, which shall not be lost where the exact window has nearly all.
        window, outside = 0.0, tl.where(outside > float("-inf"), outside, 0.0)
    else:
        every, outside = every | (share >= 1.0), 0.0
    tiles = tl.cdiv(length, TILE)
    each = tl.cdiv(tiles, CHUNKS)
    begin = chunk * each
    part = (length, begin, tl.minimum(begin + each, tiles), sink, recent, every)
    first = place * cache.tile_count
    held_ptr, tokens_ptr = scratch.together + first * TILE, scratch.tokens + first * TILE
    shared = (scratch.met + place, scratch.said + place * TURNS * MOST_SAID * CHUNKS, chunk)
    _keep(scratch, held_ptr, first, part, lse, outside, GROUP, TILES, UNIT)
    tl.debug_barrier()  # the whole program has written before any of it reads
    least, turn = _threshold(held_ptr, part, window, share, wanted, shared, TILES, CHUNKS, COUNT, BY_COUNT, ASSEMBLY)
    if CHUNKS > 1:
        total, before = _together(_count(held_ptr, part, least, TILES), shared, turn, CHUNKS)
        _list(held_ptr, tokens_ptr, part, least, before.to(tl.int32), TILES)
    else:
        total = _list(held_ptr, tokens_ptr, part, least, tl.full([], 0, tl.int32), TILES)
    if chunk == 0:
        tl.store(scratch.counts + place, total.to(tl.int32))


@triton.jit
def _positions(tile, TILES: tl.constexpr):
    """Tiles that are looked at together, and their tokens, [TILES, TILE]."""
    tiles = tile + tl.arange(0, TILES)
    return tiles, tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def _keep(scratch, held_ptr, first, part, lse, outside, GROUP: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr):
    """Write the weights of the tokens of this program that can be chosen; a negative one for others."""
    length, begin, end, sink, recent, _every = part
    for tile in range(begin, end, TILES):
        tiles, position = _positions(tile, TILES)
        others = (position >= sink) & (position < length - recent) & (tiles < end)[:, None]
        weight = group_weights(scratch, first + tiles, tiles < end, lse, outside, GROUP, TILES, UNIT)
        tl.store(held_ptr + position, tl.where(others, weight, -1.0).to(tl.float16), (tiles < end)[:, None])


@triton.jit
def _held(held_ptr, tile, end, TILES: tl.constexpr):
    """Weights of tiles that are looked at together."""
    tiles, position = _positions(tile, TILES)
    return tl.load(held_ptr + position, (tiles < end)[:, None], -1.0)


@triton.jit
def _read(held, position, part, least):
    """Which tokens are read: those of the exact window, and those that weigh so much at least."""
    length, _begin, end, sink, recent, every = part
    exact = (position < sink) | (position >= length - recent)
    return ((position < length) & (position < end * TILE) & (exact | (held >= least) | every)).to(tl.int32)


@triton.jit
def _count(held_ptr, part, least, TILES: tl.constexpr):
    """How many tokens of this program are read, as a number that is said."""
    _length, begin, end, _sink, _recent, _every = part
    found = tl.zeros([TILES, TILE], tl.int32)
    for tile in range(begin, end, TILES):
        found += _read(_held(held_ptr, tile, end, TILES), _positions(tile, TILES)[1], part, least)
    return tl.sum(found).to(tl.float32)


@triton.jit
def _list(held_ptr, tokens_ptr, part, least, place, TILES: tl.constexpr):
    """List the tokens of this program that are read, in order, from a place in the list on; gives that behind them."""
    _length, begin, end, _sink, _recent, _every = part
    for tile in range(begin, end, TILES):
        position = _positions(tile, TILES)[1]
        read = _read(_held(held_ptr, tile, end, TILES), position, part, least)
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
def _weight_of(bits):
    """The number in float16 that has these bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _counted(sums, held, threshold, ASSEMBLY: tl.constexpr):
    """The sums, in float16, with one more where a token weighs so much."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 one; set.ge.f16x2.f16x2 one, $2, $3; add.f16x2 $0, $1, one; }",
            "=r,r,r,r",
            [sums, held, tl.zeros_like(held) + threshold],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return sums + (held >= threshold).to(tl.float16)


@triton.jit
def _have(
    held_ptr,
    part,
    thresholds,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    BY_COUNT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Mass, or number, of the tokens of this program that weigh as much as each of COUNT thresholds. A number in
    float16 is exact: a thread adds up less than a thousand tokens in one.
    """
    _length, begin, end, _sink, _recent, _every = part
    kind: tl.constexpr = tl.float16 if BY_COUNT else tl.float32
    sums, found = (), ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([TILES, TILE], kind),)  # noqa: RUF005 (tuples of kernels cannot be unpacked)
    for tile in range(begin, end, TILES):
        held, added = _held(held_ptr, tile, end, TILES), ()
        for i in tl.static_range(COUNT):
            if BY_COUNT:
                more = _counted(sums[i], held, thresholds[i], ASSEMBLY)
            else:
                more = sums[i] + tl.where(held >= thresholds[i], held.to(tl.float32), 0.0)
            added = added + (more,)  # noqa: RUF005
        sums = added
    for i in tl.static_range(COUNT):
        total = tl.sum(sums[i].to(tl.float32))
        found = found + (total if BY_COUNT else total / WEIGHT_UNIT,)  # noqa: RUF005
    return found


@triton.jit
def _narrowed(low, high, low_has, bits, has, target):
    """An interval of bits, and what is above its lower end, once it is known what is above one number in it."""
    enough = has >= target
    return tl.where(enough, bits, low), tl.where(enough, high, tl.minimum(high, bits)), tl.where(enough, has, low_has)


@triton.jit
def _threshold(
    held_ptr,
    part,
    window,
    share,
    wanted,
    shared,
    TILES: tl.constexpr,
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
    own = _have(held_ptr, part, (_weight_of(nothing),), TILES, 1, BY_COUNT, ASSEMBLY)
    low_has = window + _together(own[0], shared, 0, CHUNKS)[0]
    target = tl.minimum(low_has, wanted * 1.0) if BY_COUNT else share * low_has
    low = tl.where(window >= target, INFINITY, nothing)
    high, turn, lightest = nothing + INFINITY, 1, nothing.to(tl.float32)
    # It ends early where without one token from the lower end on there would not be enough.
    while (high - low > 1) & (low_has - lightest >= target):
        thresholds, weights, width = (), (), high - low
        for i in tl.static_range(COUNT):
            bits = low + tl.maximum((i + 1) * width // (COUNT + 1), 1)
            thresholds, weights = thresholds + (bits,), weights + (_weight_of(bits),)  # noqa: RUF005
        has = _have(held_ptr, part, weights, TILES, COUNT, BY_COUNT, ASSEMBLY)
        has = _all_together(has, shared, turn, CHUNKS, COUNT)
        for i in tl.static_range(COUNT):
            low, high, low_has = _narrowed(low, high, low_has, thresholds[i], window + has[i], target)
        lightest = tl.full([], 1.0, tl.float32) if BY_COUNT else _weight_of(low).to(tl.float32) / WEIGHT_UNIT
        turn += 1
    return _weight_of(low), turn
