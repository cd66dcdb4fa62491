# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Choosing tokens from their weights without sorting them: `ops.tokens.choose_tokens` for one query a sequence.

Three phases, of which each needs what all programs have found in the one before: the weights of a group's heads are
added, and their upper halves counted; tokens at the threshold are counted by their lower halves; tokens that are read
are listed, in order. Where the weights of a sequence fit into one program, `token_resident` does all in one launch.

A list has room for all tokens, and both histograms count all of them, so that no distribution of scores overflows.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE, on_device_of, starts_early
from aqua_attention.ops.backends.triton.token_order import (
    BINS,
    add_coarse,
    add_fine,
    coarse_threshold,
    fine_threshold,
    flat,
    order_of,
)
from aqua_attention.ops.backends.triton.token_resident import choose_resident
from aqua_attention.ops.backends.triton.token_weights import group_weights, merged_lse
from aqua_attention.ops.backends.triton.token_work import (
    ScoredArguments,
    TokenWork,
    seen_length,
    start_early,
)
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache

WARPS = 4
"""Of a program; each has a tile of its own at a time."""
PHASES = 3
RESIDENT_WARPS, LEAST_WARPS, TILES_OF_WARP = 16, 4, 16
"""Of a program that keeps weights, at most and at least, and how many tiles a warp keeps, unless these are too many."""


def choose_tokens(cache: ScoredCache, work: TokenWork, plan: LayerPlan, *, appended: bool) -> None:
    """Write the tokens that are read, and how many these are."""
    batch, kv_heads, _, _, tiles = cache.shape
    config = plan.config
    given = (
        ScoredArguments.of(cache),
        work.scratch,
        0.0 if config.select_p is None else float(config.select_p),
        config.select_tokens or 0,
        plan.sink,
        plan.recent,
        plan.min_length,
        work.splits,
    )
    constants = {
        "APPENDED": appended,
        "GROUP": work.group,
        "SPLITS_PADDED": triton.next_power_of_2(work.splits + 1),
        "BY_COUNT": config.select_p is None,
        "UNIT": 1.0 / triton.next_power_of_2(work.group),
        **starts_early(work.rotated),
    }
    with on_device_of(work.rotated):
        if work.way == "resident":
            held = int(triton.next_power_of_2(-(-tiles // work.chunks)))
            warps = max(LEAST_WARPS, min(RESIDENT_WARPS, held // TILES_OF_WARP))
            choose_resident[(work.chunks, kv_heads, batch)](
                *given, TILES_PADDED=held, CHUNKS=work.chunks, num_warps=warps, **constants
            )
            return
        for phase in range(PHASES):
            choose_phase[(work.chunks, kv_heads, batch)](
                *given,
                CHUNKS_PADDED=triton.next_power_of_2(work.chunks),
                AT_ONCE=WARPS,
                PHASE=phase,
                num_warps=WARPS,
                **constants,
            )


@triton.jit
def choose_phase(
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
    CHUNKS_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    PHASE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Args:
    UNIT: weights of heads are shares of their softmax; times this all together are 1 at most.
    PHASE: 0, 1 or 2.
    """
    start_early(EARLY)
    chunk, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (row * tl.num_programs(1) + group).to(tl.int64)
    length = seen_length(cache, row, APPENDED)
    tiles = tl.cdiv(length, TILE)
    each = tl.cdiv(tiles, tl.num_programs(0))
    begin = chunk * each
    end = tl.minimum(begin + each, tiles)
    lse, window = merged_lse(scratch.part_lse, place, splits, GROUP, SPLITS_PADDED, UNIT)
    part = (place, length, begin, end, cache.tile_count)
    limits = (window, share, wanted, sink, recent)
    every = (length < min_length) | (window != window)
    if not BY_COUNT:
        every = every | (share >= 1.0)
    if PHASE == 0:
        _weigh(scratch, lse, part, sink, recent, GROUP, AT_ONCE, UNIT)
    elif PHASE == 1:
        _count(scratch, part, limits, every, chunk, AT_ONCE, BY_COUNT)
    else:
        _list(scratch, part, limits, every, chunk, CHUNKS_PADDED, AT_ONCE, BY_COUNT)


@triton.jit
def _positions(tile, AT_ONCE: tl.constexpr):
    """Tiles that are looked at together, and their tokens, [AT_ONCE, TILE]."""
    together = tile + tl.arange(0, AT_ONCE)
    return together, together[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def _kinds(position, length, end, sink, recent):
    """Which tokens are in the exact window, and which others there are, before the end of these tiles."""
    seen = (position < length) & (position < end * TILE)
    exact = (position < sink) | (position >= length - recent)
    return seen & exact, seen & (exact == 0)


@triton.jit
def _weigh(scratch, lse, part, sink, recent, GROUP: tl.constexpr, AT_ONCE: tl.constexpr, UNIT: tl.constexpr):
    """Phase 0: orders of the weights of a group's heads together, and their coarse histogram."""
    place, length, begin, end, tile_count = part
    counts = tl.zeros([AT_ONCE, 16, 16], tl.float32)
    lower = tl.zeros([AT_ONCE, 16, 16], tl.float32)
    for tile in range(begin, end, AT_ONCE):
        together, position = _positions(tile, AT_ONCE)
        others = _kinds(position, length, end, sink, recent)[1]
        at = place * tile_count + together
        weight = group_weights(scratch, at, together < end, others, lse, GROUP, AT_ONCE, UNIT)
        orders = order_of(weight)
        tl.store(scratch.orders + place * tile_count * TILE + position, orders.to(tl.int16), others)
        counts, lower = add_coarse(orders, others, counts, lower)
    bins = tl.arange(0, BINS)
    counts, lower = flat(counts), flat(lower)
    coarse_ptr = scratch.coarse + place * 2 * BINS + bins
    tl.atomic_add(coarse_ptr, counts, counts > 0)
    tl.atomic_add(coarse_ptr + BINS, lower, lower > 0)


@triton.jit
def _load_orders(scratch, place, tile_count, position, others):
    orders = tl.load(scratch.orders + place * tile_count * TILE + position, others, 0, cache_modifier=".cg")
    return orders.to(tl.int32) & 65535


@triton.jit
def _threshold(scratch, place, limits, every, BY_COUNT: tl.constexpr):
    """`coarse_threshold`, or everything."""
    window, share, wanted, _, _ = limits
    upper, reached, target = coarse_threshold(scratch.coarse + place * 2 * BINS, window, share, wanted, BY_COUNT)
    return tl.where(every, -1, upper), reached, target


@triton.jit
def _count(scratch, part, limits, every, chunk, AT_ONCE: tl.constexpr, BY_COUNT: tl.constexpr):
    """Phase 1: how many tokens of this program are read anyway; the fine histogram of those at the threshold."""
    place, length, begin, end, tile_count = part
    upper = _threshold(scratch, place, limits, every, BY_COUNT)[0]
    counts = tl.zeros([AT_ONCE, 16, 16], tl.float32)
    above = tl.zeros([AT_ONCE, TILE], tl.int32)
    for tile in range(begin, end, AT_ONCE):
        position = _positions(tile, AT_ONCE)[1]
        exact, others = _kinds(position, length, end, limits[3], limits[4])
        orders = _load_orders(scratch, place, tile_count, position, others)
        above += (exact | (others & ((orders >> 8) > upper))).to(tl.int32)
        counts = add_fine(orders, others & ((orders >> 8) == upper), counts)
    bins, counts = tl.arange(0, BINS), flat(counts)
    place_of_part = place * tl.num_programs(0) + chunk
    tl.atomic_add(scratch.fine + place * BINS + bins, counts, counts > 0)
    tl.store(scratch.at_least + place_of_part * BINS + bins, tl.cumsum(counts, 0, reverse=True))
    tl.store(scratch.above + place_of_part, tl.sum(tl.sum(above, 1), 0))


@triton.jit
def _list(
    scratch,
    part,
    limits,
    every,
    chunk,
    CHUNKS_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """Phase 2: list the tokens that are read, behind those of the programs before this one."""
    place, length, begin, end, tile_count = part
    upper, reached, target = _threshold(scratch, place, limits, every, BY_COUNT)
    low = fine_threshold(scratch.fine + place * BINS, upper, reached, target, BY_COUNT)
    least = upper * BINS + low
    chunks = tl.arange(0, CHUNKS_PADDED)
    is_chunk = chunks < tl.num_programs(0)
    at = place * tl.num_programs(0) + chunks
    held = tl.load(scratch.above + at, is_chunk, 0, cache_modifier=".cg")
    held += tl.load(scratch.at_least + at * BINS + low, is_chunk, 0, cache_modifier=".cg")
    if chunk == 0:
        tl.store(scratch.counts + place, tl.sum(held, 0))
    behind = tl.sum(tl.where(chunks < chunk, held, 0), 0)
    tokens_ptr = scratch.tokens + place * tile_count * TILE
    for tile in range(begin, end, AT_ONCE):
        position = tile * TILE + tl.arange(0, AT_ONCE * TILE)
        exact, others = _kinds(position, length, end, limits[3], limits[4])
        orders = _load_orders(scratch, place, tile_count, position, others)
        read = (exact | (others & (orders >= least))).to(tl.int32)
        rank = tl.cumsum(read, 0)
        tl.store(tokens_ptr + behind + rank - 1, position, read > 0)
        behind += tl.sum(read, 0)
