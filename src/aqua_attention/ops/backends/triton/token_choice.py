# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""Choosing tokens from their weights without sorting them: `ops.tokens.choose_tokens` for one query a sequence.

A program adds up the weights of a group's heads, and keeps them in registers, in float16. It looks again and again what
is above a threshold, which divides an interval. Numbers of 0 or more are in the order of their bits. So 15 bits are
halved until one is left. Then it lists the tokens that are read.

Several programs of a sequence and head wait for each other, see `token_meeting`. There are several where a sequence is
longer than registers take, or where few long ones would leave most of the GPU idle. The interpreter runs one program
after the other, and takes one only.

A list has room for all tokens, and nothing else is kept of them, so that no distribution of scores overflows.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE, on_device_of, sm_count
from aqua_attention.ops.backends.triton.token_arguments import ScoredArguments, Sequences, seen_length, start_early
from aqua_attention.ops.backends.triton.token_meeting import least_weight_of_all
from aqua_attention.ops.backends.triton.token_threshold import bits_of, least_weight, reach, two
from aqua_attention.ops.backends.triton.token_weights import head_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import (
    CHOOSE_PROGRAMS,
    LEAST_CHOSEN,
    MOST_SAID,
    PARTS,
    TokenWork,
)
from aqua_attention.ops.plan import LayerPlan

WARPS, TILES_AT_ONCE, MOST_HEADS = 8, 16, 8
"""Of a program, and how many tiles it looks at together: of each head a thread has 8 tokens then. Of more heads half as
many tiles, for its registers."""
MOST_REGISTERS = 128
"""Of a thread, so that two programs run at once on a multiprocessor."""
MET_WARPS, FEW_TILES, SUMS = 4, 64, 16
"""Programs that meet have so many warps up to so many tiles. A warp has sums of so many parts times tiles at once."""
WORDS, MOST_LISTED = tl.constexpr(TILE // 32), 256
"""Of a tile, with a bit for each token; and how many of them are listed together."""
SAID = tl.constexpr(MOST_SAID)
EXACT, ALL, NOWHERE = tl.constexpr(-2.0), tl.constexpr(-3.0), tl.constexpr(-4.0)
"""What stands for the weight of a token of the exact window; the least weight where all tokens are read; and what
stands for a token that is not there. None is infinite: `token_threshold.weighed` multiplies some by zero."""


def choose_tokens(cache: Sequences, work: TokenWork, plan: LayerPlan, *, appended: bool) -> None:
    """Write the tokens that are read, and how many these are.

    `work.scratch.step` must be another number than in all steps before: what rotates the queries counts it.
    """
    batch, kv_heads, _, _, tiles = cache.shape
    config = plan.config
    each = -(-tiles // work.chunks)
    warps = MET_WARPS if work.chunks > 1 and each <= FEW_TILES else WARPS
    # The weights of all heads are on their way together.
    most = TILES_AT_ONCE // (1 if work.group <= MOST_HEADS else 2)
    if work.chunks > 1:
        most = max(1, min(most, SUMS * warps // PARTS))
    at_once = min(most, int(triton.next_power_of_2(each)))
    # The more sequences there are, the fewer programs does each need that is short.
    least = LEAST_CHOSEN * -(-work.places * work.chunks // (CHOOSE_PROGRAMS * sm_count(work.rotated)))
    slices = -(-each // at_once)
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
            LISTED=min(MOST_LISTED, int(triton.next_power_of_2(each)) * WORDS.value),
            CHUNKS=work.chunks,
            PARTS=PARTS,
            BY_COUNT=config.select_p is None,
            UNIT=1.0 / triton.next_power_of_2(work.group),
            ASSEMBLY=work.rotated.is_cuda,
            num_warps=warps,
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
    LISTED: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Part of a sequence and key-value head, if it is that long.

    Args:
        least_tiles: of a program.
        TILES: that are looked at together; SLICES: how often. LISTED: words of bits that are listed together.
        CHUNKS: programs of a sequence and head; PARTS: of an interval of bits, where these meet.
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
        end = tl.minimum(begin + each, tiles)
        part = (length, begin, end, sink, recent)
        shared = (
            tl.load(scratch.step, cache_modifier=".cg"),
            scratch.said + place * SAID * CHUNKS,
            chunk,
            taking_part,
        )
        lse, window, outside = merged_lse(scratch.part_lse, place, splits, GROUP, SPLITS_PADDED, UNIT)
        every = (length < min_length) | (window != window)
        if BY_COUNT:
            # Only the order counts, which shall not be lost where the exact window has nearly all.
            window, outside = 0.0, tl.where(outside > float("-inf"), outside, 0.0)
        else:
            every, outside = every | (share >= 1.0), 0.0
        first, held = place * cache.tile_count, ()
        for i in tl.static_range(SLICES):
            some = _of_all_heads(scratch, first, begin + i * TILES, part, lse, outside, GROUP, TILES, UNIT)
            held = held + (some,)  # noqa: RUF005 (no unpacking there)
        before = tl.full([], 0, tl.int32)
        if CHUNKS > 1:
            least, before = least_weight_of_all(held, window, share, wanted, shared, CHUNKS, PARTS, BY_COUNT, ASSEMBLY)
            before = tl.where(every, begin * TILE, before + _exact_before(begin * TILE, length, sink, recent))
        else:
            least = least_weight(held, window, share, wanted, BY_COUNT, ASSEMBLY)
        least = bits_of(tl.where(every, ALL, least.to(tl.float32)))
        words_ptr, tokens_ptr = scratch.words + first * WORDS, scratch.tokens + first * TILE
        for i in tl.static_range(SLICES):
            rows = (begin + i * TILES) * WORDS + tl.arange(0, TILES * WORDS)
            tl.store(words_ptr + rows, _read(held[i], least, ASSEMBLY), rows < end * WORDS)
        tl.debug_barrier()  # the whole program has written before any of it reads
        total = _list(words_ptr, tokens_ptr, part, before, LISTED, ASSEMBLY)
        if chunk == taking_part - 1:
            tl.store(scratch.counts + place, total)


@triton.jit
def _of_all_heads(
    scratch, first, tile, part, lse, outside, GROUP: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr
):
    """Weights of the tokens of some tiles, int32 [TILES, TILE // 2], of which each holds two: the compiler would give
    each a register.
    """
    length, _begin, end, sink, recent = part
    heads, tops = head_weights(scratch, first, tile, end, GROUP, TILES)
    even, odd = tl.zeros([TILES, TILE // 2], tl.float32), tl.zeros([TILES, TILE // 2], tl.float32)
    for head in tl.static_range(GROUP):
        unit = (tl.exp2(tops[head] - lse[head] - outside) * UNIT)[:, None]
        some_even, some_odd = two(heads[head])
        even += some_even.to(tl.float32) * unit
        odd += some_odd.to(tl.float32) * unit
    position = (tile + tl.arange(0, TILES))[:, None] * TILE + 2 * tl.arange(0, TILE // 2)[None, :]
    places = (tl.minimum(length, end * TILE), sink, length - recent)
    return _placed(even, position, places) | (_placed(odd, position + 1, places) << 16)


@triton.jit
def _placed(weight, position, places):
    """Bits in float16 of the weights of tokens, by where these are."""
    end, sink, recent = places
    # NaN is in the mass, too, so that all are read.
    weight = tl.where(weight == weight, weight, 0.0)
    weight = tl.where((position >= sink) & (position < recent), weight, EXACT)
    return bits_of(tl.where(position < end, weight, NOWHERE))


@triton.jit
def _read(pairs, least, ASSEMBLY: tl.constexpr):
    """Which tokens weigh so much, a bit for each. Of 32 that follow each other first the even ones, then the others."""
    places = tl.arange(0, TILE // 2)[None, :] % 16
    bits = reach(pairs, least, ASSEMBLY) << places
    return tl.sum(tl.reshape(bits, [bits.numel // 16, 16]), 1)


@triton.jit
def _exact_before(position, length, sink, recent):
    """How many tokens of the exact window lie before a position."""
    return tl.minimum(position, sink) + tl.maximum(position - tl.maximum(length - recent, sink), 0)


@triton.jit
def _list(words_ptr, tokens_ptr, part, place, LISTED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """List the tokens of this program that are read, in order, from a place in the list on; gives the one behind them.

    The 32 tokens of a word are neighbours in a warp, and so are those that are read in memory.
    """
    length, begin, end, sink, recent = part
    bit = tl.arange(0, 32)[None, :]
    earlier = _below(bit)
    for row in range(begin * WORDS, end * WORDS, LISTED):
        rows = row + tl.arange(0, LISTED)
        there = rows < end * WORDS
        bits = tl.load(words_ptr + rows, there, 0)
        bits = _spread(bits & 0xFFFF) | (_spread((bits >> 16) & 0xFFFF) << 1)
        exact = _below(length - rows * 32) & (_below(sink - rows * 32) | ~_below(length - recent - rows * 32))
        bits = tl.where(there, bits | exact, 0)
        count = _ones(bits, ASSEMBLY)
        at = place + tl.cumsum(count, 0) - count
        bits = bits[:, None]
        here = at[:, None] + _ones(bits & earlier, ASSEMBLY)
        _put(tokens_ptr, here, rows[:, None] * 32 + bit, (bits >> bit) & 1, ASSEMBLY)
        place += tl.sum(count, 0)
    return place


@triton.jit
def _spread(bits):
    """16 bits with a zero behind each."""
    bits = (bits | (bits << 8)) & 0x00FF00FF
    bits = (bits | (bits << 4)) & 0x0F0F0F0F
    bits = (bits | (bits << 2)) & 0x33333333
    return (bits | (bits << 1)) & 0x55555555


@triton.jit
def _below(count):
    """So many ones from the lowest bit on: none to 32."""
    ones = tl.zeros_like(count) + 1
    some = (ones << tl.minimum(tl.maximum(count, 0), 31)) - 1
    return tl.where(count >= 32, -1, some)


@triton.jit
def _ones(bits, ASSEMBLY: tl.constexpr):
    """How many bits are 1."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24) & 0xFF


@triton.jit
def _put(pointer, at, numbers, wanted, ASSEMBLY: tl.constexpr):
    """Store the numbers that are wanted, here and there."""
    if ASSEMBLY:
        # The compiler would hand them to other threads first, of which neighbours would store to distant places.
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
