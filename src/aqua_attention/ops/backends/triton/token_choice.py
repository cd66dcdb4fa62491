# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""Choosing tokens from their weights without sorting them: `ops.tokens.choose_tokens` for one query a sequence.

A program adds up the weights of a group's heads, and writes them in float16. Then it has all of them in registers, and
looks again and again what is above a few thresholds, which divide an interval. Numbers of 0 or more are in the order of
their bits, so 15 bits are halved until one is left. Then it lists the tokens that are read.

Several programs of a sequence and head wait for each other: each says what it has above the thresholds, and all add
that up in the same order. There are several where a sequence is longer than registers take, or where there are too few
sequences for a GPU. This needs all of them on the GPU at once, which blocks that follow each other are. The interpreter
runs one program after the other, and takes one only.

A list has room for all tokens, and nothing else is kept of them, so that no distribution of scores overflows.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE, on_device_of, sm_count, starts_early
from aqua_attention.ops.backends.triton.token_weights import WEIGHT_UNIT, group_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import (
    CHOOSE_PROGRAMS,
    LEAST_CHOSEN,
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
MOST_REGISTERS = 128
"""Of a thread, so that two programs run at once on a multiprocessor."""
THRESHOLDS, MET_THRESHOLDS, MANY_THRESHOLDS, FEW_TILES = 1, 3, 7, 16
"""Of a turn: of programs that are alone, of those that meet, which shall not often, and of these where they have so few
tiles that all sums fit into registers."""
INFINITY = tl.constexpr(0x7C00)
"""Its bits in float16: the threshold that no token reaches."""
NEGATIVE = tl.constexpr(0xBC00BC00 - 2**32)
"""Twice -1 in float16, which no token weighs."""
TURNS = tl.constexpr(MOST_TURNS)
MOST_SAID = tl.constexpr(MOST_NUMBERS)


def choose_tokens(cache: Sequences, work: TokenWork, plan: LayerPlan, *, appended: bool) -> None:
    """Write the tokens that are read, and how many these are.

    `work.scratch.met` must be zero: what rotates the queries makes it so.
    """
    batch, kv_heads, _, _, tiles = cache.shape
    config = plan.config
    each = -(-tiles // work.chunks)
    at_once = min(TILES_AT_ONCE, int(triton.next_power_of_2(each)))
    slices = -(-each // at_once)
    # The more sequences there are, the fewer programs does each need that is short.
    least = LEAST_CHOSEN * -(-work.places * work.chunks // (CHOOSE_PROGRAMS * sm_count(work.rotated)))
    thresholds = THRESHOLDS
    if work.chunks > 1:
        thresholds = MANY_THRESHOLDS if each <= FEW_TILES else MET_THRESHOLDS
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
            min(least, slices * at_once),
            APPENDED=appended,
            GROUP=work.group,
            SPLITS_PADDED=triton.next_power_of_2(work.splits + 1),
            TILES=at_once,
            SLICES=slices,
            CHUNKS=work.chunks,
            COUNT=thresholds,
            BY_COUNT=config.select_p is None,
            UNIT=1.0 / triton.next_power_of_2(work.group),
            ASSEMBLY=work.rotated.is_cuda,
            num_warps=WARPS,
            maxnreg=MOST_REGISTERS,
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
    least_tiles,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COUNT: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Part of a sequence and key-value head, if it is that long.

    Args:
        least_tiles: of a program.
        TILES: that are looked at together; SLICES: how often. CHUNKS: programs of a sequence and head; COUNT:
            thresholds of a turn.
        UNIT: weights of heads are shares of their softmax; times this all together are 1 at most.
    """
    start_early(EARLY)
    # What was scored last comes first: it still lies in the GPU's cache.
    chunk, group = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.num_programs(2) - 1 - tl.program_id(2)
    place = (row * tl.num_programs(1) + group).to(tl.int64)
    length = seen_length(cache, row, APPENDED)
    tiles = tl.cdiv(length, TILE)
    each = tl.maximum(tl.cdiv(tiles, CHUNKS), least_tiles)
    chunks = tl.maximum(tl.cdiv(tiles, each), 1)
    if chunk < chunks:
        begin = chunk * each
        part = (length, begin, tl.minimum(begin + each, tiles), sink, recent)
        shared = (scratch.met + place, scratch.said + place * TURNS * MOST_SAID * CHUNKS, chunk, chunks)
        lse, window, outside = merged_lse(scratch.part_lse, place, splits, GROUP, SPLITS_PADDED, UNIT)
        every = (length < min_length) | (window != window)
        if BY_COUNT:
            # Only the order counts, which shall not be lost where the exact window has nearly all.
            window, outside = 0.0, tl.where(outside > float("-inf"), outside, 0.0)
        else:
            every, outside = every | (share >= 1.0), 0.0
        first = place * cache.tile_count
        held_ptr, tokens_ptr = scratch.together + first * TILE, scratch.tokens + first * TILE
        _keep(scratch, held_ptr, first, part, lse, outside, GROUP, TILES, UNIT)
        tl.debug_barrier()  # the whole program has written before any of it reads
        held = _pairs(held_ptr, part, TILES, SLICES)
        least, turn = _threshold(held, window, share, wanted, shared, CHUNKS, COUNT, BY_COUNT, ASSEMBLY)
        if CHUNKS > 1:
            total, before = _together(_number(held_ptr, part, least, every, TILES), shared, turn, CHUNKS)
            _list(held_ptr, tokens_ptr, part, least, every, before.to(tl.int32), TILES)
        else:
            total = _list(held_ptr, tokens_ptr, part, least, every, tl.full([], 0, tl.int32), TILES)
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
    length, begin, end, sink, recent = part
    for tile in range(begin, end, TILES):
        tiles, position = _positions(tile, TILES)
        others = (position >= sink) & (position < length - recent) & (tiles < end)[:, None]
        weight = group_weights(scratch, first + tiles, tiles < end, lse, outside, GROUP, TILES, UNIT)
        tl.store(held_ptr + position, tl.where(others, weight, -1.0).to(tl.float16), (tiles < end)[:, None])


@triton.jit
def _pairs(held_ptr, part, TILES: tl.constexpr, SLICES: tl.constexpr):
    """Weights of this program, a tuple of int32 [TILES, TILE // 2], each of which holds two: the compiler would give
    each a register.
    """
    _length, begin, end, _sink, _recent = part
    held_ptr, held = held_ptr.to(tl.pointer_type(tl.int32)), ()
    for i in tl.static_range(SLICES):
        tiles = begin + i * TILES + tl.arange(0, TILES)
        at = tiles[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
        held = held + (tl.load(held_ptr + at, (tiles < end)[:, None], NEGATIVE),)  # noqa: RUF005 (no unpacking there)
    return held


@triton.jit
def _two(pairs):
    """Even and odd numbers in float16 of pairs."""
    return pairs.to(tl.int16).to(tl.float16, bitcast=True), (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _read(held_ptr, tile, part, least, every, TILES: tl.constexpr):
    """Positions of tiles that are looked at together, and which are read: those of the exact window, and those that
    weigh so much at least.
    """
    length, _begin, end, sink, recent = part
    tiles, position = _positions(tile, TILES)
    held = tl.load(held_ptr + position, (tiles < end)[:, None], -1.0)
    exact = (position < sink) | (position >= length - recent)
    return position, ((position < length) & (tiles < end)[:, None] & (exact | (held >= least) | every)).to(tl.int32)


@triton.jit
def _number(held_ptr, part, least, every, TILES: tl.constexpr):
    """How many tokens of this program are read, as a number that is said."""
    _length, begin, end, _sink, _recent = part
    found = tl.zeros([TILES, TILE], tl.int32)
    for tile in range(begin, end, TILES):
        found += _read(held_ptr, tile, part, least, every, TILES)[1]
    return tl.sum(found).to(tl.float32)


@triton.jit
def _list(held_ptr, tokens_ptr, part, least, every, place, TILES: tl.constexpr):
    """List the tokens of this program that are read, in order, from a place in the list on; gives that behind them."""
    _length, begin, end, _sink, _recent = part
    for tile in range(begin, end, TILES):
        position, read = _read(held_ptr, tile, part, least, every, TILES)
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
        met_ptr, said_ptr, chunk, chunks = shared
        said_ptr += turn * MOST_SAID * CHUNKS
        tl.store(said_ptr + chunk, number)
        meet(met_ptr, (turn + 1) * chunks)
        others = tl.arange(0, CHUNKS)
        numbers = tl.load(said_ptr + others, others < chunks, 0.0, cache_modifier=".cg")
        number, before = tl.sum(numbers, 0), tl.sum(tl.where(others < chunk, numbers, 0.0), 0)
    return number, before


@triton.jit
def _all_together(numbers, shared, turn, CHUNKS: tl.constexpr, COUNT: tl.constexpr):
    """The sums of COUNT numbers of each program."""
    found = ()
    if CHUNKS > 1:
        met_ptr, said_ptr, chunk, chunks = shared
        said_ptr += turn * MOST_SAID * CHUNKS
        for i in tl.static_range(COUNT):
            tl.store(said_ptr + i * CHUNKS + chunk, numbers[i])
        meet(met_ptr, (turn + 1) * chunks)
        others = tl.arange(0, CHUNKS)
        for i in tl.static_range(COUNT):
            said = tl.load(said_ptr + i * CHUNKS + others, others < chunks, 0.0, cache_modifier=".cg")
            found = found + (tl.sum(said, 0),)  # noqa: RUF005
    else:
        found = numbers
    return found


@triton.jit
def _weight_of(bits):
    """The number in float16 that has these bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


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
    even, odd = _two(pairs)
    least = _weight_of(threshold)
    # Numbers that are added up here are whole, and have no sign.
    even_sum, odd_sum = _two(sums)
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
    even, odd = _two(pairs)
    least = _weight_of(threshold)
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
            even, odd = _two(sums)
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
def _threshold(
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
    own = _have(held, (nothing,), 1, BY_COUNT, ASSEMBLY)
    low_has = window + _together(own[0], shared, 0, CHUNKS)[0]
    target = tl.minimum(low_has, wanted * 1.0) if BY_COUNT else share * low_has
    low = tl.where(window >= target, INFINITY, nothing)
    high, turn, lightest = nothing + INFINITY, 1, nothing.to(tl.float32)
    # It ends early where without one token from the lower end on there would not be enough.
    while (high - low > 1) & (low_has - lightest >= target):
        thresholds, width = (), high - low
        for i in tl.static_range(COUNT):
            thresholds = thresholds + (low + tl.maximum((i + 1) * width // (COUNT + 1), 1),)  # noqa: RUF005
        has = _have(held, thresholds, COUNT, BY_COUNT, ASSEMBLY)
        has = _all_together(has, shared, turn, CHUNKS, COUNT)
        for i in tl.static_range(COUNT):
            low, high, low_has = _narrowed(low, high, low_has, thresholds[i], window + has[i], target)
        lightest = tl.full([], 1.0, tl.float32) if BY_COUNT else _weight_of(low).to(tl.float32) / WEIGHT_UNIT
        turn += 1
    return _weight_of(low), turn
