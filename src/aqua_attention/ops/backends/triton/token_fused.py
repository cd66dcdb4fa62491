# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Scoring and choosing tokens in one launch: weights are read back by the program that has just written them, from the
GPU's cache, and while some programs look for a threshold others read keys.

Of each sequence and head the first program scores the exact window, and all others wait for each other, see
`token_resident`.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import LOG2_E, on_device_of, starts_early
from aqua_attention.ops.backends.triton.token_resident import choose_held, meet
from aqua_attention.ops.backends.triton.token_scores import score_constants, score_tiles, score_window
from aqua_attention.ops.backends.triton.token_work import ScoredArguments, TokenWork, seen_length, start_early
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache

LEAST_WARPS, MOST_WARPS, TILES_OF_WARP, STAGES = 4, 16, 8, 3


def score_and_choose(cache: ScoredCache, work: TokenWork, plan: LayerPlan, *, scaling: float, appended: bool) -> None:
    """What `score_tokens` and `choose_tokens` do. `work.scratch.met` must be zero: `prepare_tokens` makes it so."""
    batch, kv_heads, _, _, tiles = cache.shape
    config, held = plan.config, int(triton.next_power_of_2(-(-tiles // work.chunks)))
    with on_device_of(work.rotated):
        _score_and_choose[(work.chunks + 1, kv_heads, batch)](
            work.rotated,
            work.dims,
            ScoredArguments.of(cache),
            work.scratch,
            scaling * LOG2_E,
            0.0 if config.select_p is None else float(config.select_p),
            config.select_tokens or 0,
            plan.sink,
            plan.recent,
            plan.min_length,
            APPENDED=appended,
            SPLITS_PADDED=triton.next_power_of_2(work.chunks + 1),
            TILES_PADDED=held,
            CHUNKS=work.chunks,
            BY_COUNT=config.select_p is None,
            UNIT=1.0 / triton.next_power_of_2(work.group),
            num_warps=max(LEAST_WARPS, min(MOST_WARPS, held // TILES_OF_WARP)),
            num_stages=STAGES,
            **score_constants(cache, work),
            **starts_early(work.rotated),
        )


@triton.jit
def _score_and_choose(
    query_ptr,
    dims_ptr,
    cache,
    scratch,
    scaling,
    share,
    wanted,
    sink,
    recent,
    min_length,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_early(EARLY)
    chunk, group, row = tl.program_id(0) - 1, tl.program_id(1), tl.program_id(2)
    place = (row * tl.num_programs(1) + group).to(tl.int64)
    length = seen_length(cache, row, APPENDED)
    query_ptr += place * GROUP * KEPT
    part = (row, group, place, length)
    if chunk < 0:
        score_window(
            query_ptr,
            cache,
            scratch,
            part,
            CHUNKS,
            scaling,
            sink,
            recent,
            GROUP,
            ROWS,
            KEPT,
            KEPT_PADDED,
            BLOCK,
            ASSEMBLY,
        )
        meet(scratch.met + place, 0)
    else:
        score_tiles(
            query_ptr,
            dims_ptr + place * CHOSEN,
            cache,
            scratch,
            part,
            (chunk, CHUNKS),
            scaling,
            sink,
            recent,
            GROUP,
            KEPT,
            CHOSEN,
            DIMS,
            HEADS,
            TOGETHER,
            BLOCK,
            ASSEMBLY,
        )
        meet(scratch.met + place, CHUNKS + 1)
        own = (place, length, chunk, CHUNKS + 1)
        limits = (share, wanted, sink, recent, min_length)
        choose_held(cache, scratch, own, limits, CHUNKS, GROUP, SPLITS_PADDED, TILES_PADDED, CHUNKS, BY_COUNT, UNIT)
