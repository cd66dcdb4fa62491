# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""Choosing tokens from their weights without sorting them: `ops.tokens.choose_tokens` for one query a sequence.

A program adds up the weights of a group's heads, and writes them in float16. Then it has all of them in registers, and
looks again and again what is above a few thresholds, which divide an interval. Numbers of 0 or more are in the order of
their bits, so 15 bits are halved until one is left. Then it lists the tokens that are read.

Several programs of a sequence and head wait for each other: each says what it has above the thresholds, and all add
that up in the same order. There are several where a sequence is longer than registers take, and then as many as the GPU
has room for. The interpreter runs one program after the other, and takes one only.

A list has room for all tokens, and nothing else is kept of them, so that no distribution of scores overflows.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE, on_device_of, sm_count
from aqua_attention.ops.backends.triton.token_arguments import ScoredArguments, Sequences, seen_length, start_early
from aqua_attention.ops.backends.triton.token_meeting import MOST_SAID, TURNS, before_this
from aqua_attention.ops.backends.triton.token_threshold import bits_of, least_weight, two
from aqua_attention.ops.backends.triton.token_weights import head_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import CHOOSE_PROGRAMS, LEAST_CHOSEN, TokenWork
from aqua_attention.ops.plan import LayerPlan

WARPS, TILES_AT_ONCE, MOST_HEADS = 8, 32, 8
"""Of a program, and how many tiles it looks at together: of each a thread has 16 tokens, of groups of more heads 8."""
MOST_REGISTERS = 128
"""Of a thread, so that two programs run at once on a multiprocessor."""
THRESHOLDS, MET_THRESHOLDS, MANY_THRESHOLDS, FEW_TILES = 1, 3, 7, 16
"""Of a turn: of programs that are alone, of those that meet, which shall not often, and of these where they have so few
tiles that all sums fit into registers."""
NEGATIVE = tl.constexpr(0xBC00BC00 - 2**32)
"""Twice -1 in float16, which no token weighs."""


def choose_tokens(cache: Sequences, work: TokenWork, plan: LayerPlan, *, appended: bool) -> None:
    """Write the tokens that are read, and how many these are.

    `work.scratch.met` must be zero: what rotates the queries makes it so.
    """
    batch, kv_heads, _, _, tiles = cache.shape
    config = plan.config
    each = -(-tiles // work.chunks)
    # The weights of all heads are on their way together.
    most = TILES_AT_ONCE if work.group <= MOST_HEADS else TILES_AT_ONCE // 2
    at_once = min(most, int(triton.next_power_of_2(each)))
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
            **work.starts_early(),
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
    taking_part = tl.maximum(tl.cdiv(tiles, each), 1)
    if chunk < taking_part:
        begin = chunk * each
        part = (length, begin, tl.minimum(begin + each, tiles), sink, recent)
        shared = (scratch.met + place, scratch.said + place * TURNS * MOST_SAID * CHUNKS, chunk, taking_part)
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
        held = ()
        for i in tl.static_range(SLICES):
            held = held + (_pairs(held_ptr, begin + i * TILES, part, TILES),)  # noqa: RUF005 (no unpacking there)
        least, turn = least_weight(held, window, share, wanted, shared, CHUNKS, COUNT, BY_COUNT, ASSEMBLY)
        before = tl.full([], 0, tl.int32)
        if CHUNKS > 1:
            number = _number(held_ptr, part, least, every, TILES)
            before = before_this(number, shared, turn, CHUNKS).to(tl.int32)
        total = _list(held_ptr, tokens_ptr, part, least, every, before, TILES, ASSEMBLY)
        if chunk == taking_part - 1:
            tl.store(scratch.counts + place, total)


@triton.jit
def _keep(scratch, held_ptr, first, part, lse, outside, GROUP: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr):
    """Write the weights of the tokens of this program that can be chosen; a negative one for others.

    The weights of the next tiles are asked for before those of the present ones are added up.
    """
    length, begin, end, sink, recent = part
    held_ptr = held_ptr.to(tl.pointer_type(tl.int32))
    pairs = tl.arange(0, TILE // 2)[None, :]
    heads, tops = head_weights(scratch, first, begin, end, GROUP, TILES)
    for tile in range(begin, end, TILES):
        tiles = tile + tl.arange(0, TILES)
        next_heads, next_tops = head_weights(scratch, first, tile + TILES, end, GROUP, TILES)
        even, odd = tl.zeros([TILES, TILE // 2], tl.float32), tl.zeros([TILES, TILE // 2], tl.float32)
        for head in tl.static_range(GROUP):
            unit = (tl.exp2(tops[head] - lse[head] - outside) * UNIT)[:, None]
            some_even, some_odd = two(heads[head])
            even += some_even.to(tl.float32) * unit
            odd += some_odd.to(tl.float32) * unit
        heads, tops = next_heads, next_tops
        position = _positions(tile, TILES)
        low, high = sink, length - recent
        bits = bits_of(tl.where((position >= low) & (position < high), even, -1.0))
        bits |= bits_of(tl.where((position + 1 >= low) & (position + 1 < high), odd, -1.0)) << 16
        tl.store(held_ptr + tiles[:, None] * (TILE // 2) + pairs, bits, (tiles < end)[:, None])


@triton.jit
def _pairs(held_ptr, tile, part, TILES: tl.constexpr):
    """Weights of tiles, int32 [TILES, TILE // 2], each of which holds two: the compiler would give each a register."""
    tiles = tile + tl.arange(0, TILES)
    at = tiles[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
    return tl.load(held_ptr.to(tl.pointer_type(tl.int32)) + at, (tiles < part[2])[:, None], NEGATIVE)


@triton.jit
def _positions(tile, TILES: tl.constexpr):
    """Of the even tokens of tiles that are looked at together, [TILES, TILE // 2]."""
    return (tile + tl.arange(0, TILES))[:, None] * TILE + 2 * tl.arange(0, TILE // 2)[None, :]


@triton.jit
def _read(pairs, tile, part, least, every, TILES: tl.constexpr):
    """Which even and odd tokens are read, as 1 and 0."""
    position = _positions(tile, TILES)
    even, odd = two(pairs)
    return _is_read(even, position, part, least, every), _is_read(odd, position + 1, part, least, every)


@triton.jit
def _is_read(weight, position, part, least, every):
    """Those of the exact window are, and those that weigh so much at least."""
    length, _begin, end, sink, recent = part
    exact = (position < sink) | (position >= length - recent)
    return ((position < tl.minimum(length, end * TILE)) & (exact | (weight >= least) | every)).to(tl.int32)


@triton.jit
def _number(held_ptr, part, least, every, TILES: tl.constexpr):
    """How many tokens of this program are read, as a number that is said."""
    found = tl.zeros([TILES, TILE // 2], tl.int32)
    for tile in range(part[1], part[2], TILES):
        even, odd = _read(_pairs(held_ptr, tile, part, TILES), tile, part, least, every, TILES)
        found += even + odd
    return tl.sum(found).to(tl.float32)


@triton.jit
def _list(held_ptr, tokens_ptr, part, least, every, place, TILES: tl.constexpr, ASSEMBLY: tl.constexpr):
    """List the tokens of this program that are read, in order, from a place in the list on; gives that behind them."""
    pairs = _pairs(held_ptr, part[1], part, TILES)
    for tile in range(part[1], part[2], TILES):
        next_pairs = _pairs(held_ptr, tile + TILES, part, TILES)
        even, odd = _read(pairs, tile, part, least, every, TILES)
        both = even + odd
        count = tl.sum(both, 1)
        at = (place + tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(both, 1) - both
        position = _positions(tile, TILES)
        _put(tokens_ptr, at, position, even, ASSEMBLY)
        _put(tokens_ptr, at + even, position + 1, odd, ASSEMBLY)
        place += tl.sum(count, 0)
        pairs = next_pairs
    return place


@triton.jit
def _put(pointer, at, numbers, wanted, ASSEMBLY: tl.constexpr):
    """Store the numbers that are wanted, here and there."""
    if ASSEMBLY:
        # The compiler would hand all of them to other threads first, through shared memory.
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred is_wanted;
            .reg .b64 address;
            setp.ne.s32 is_wanted, $4, 0;
            mad.wide.s32 address, $2, 4, $1;
            @is_wanted st.global.b32 [address], $3;
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r",
            [pointer.to(tl.int64), at, numbers, wanted],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointer + at, numbers, wanted > 0)
