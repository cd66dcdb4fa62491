# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Scoring all tokens of a sequence by a few dimensions of their keys in 8 or 4 bits.

Scores become weights in 16 bits: a weight is relative to the largest of its tile, so that it keeps 11 bits over 29
octaves, and what reads it takes no more powers. The exact window is scored with whole keys by a program of its own.

A product of tensor cores has 16 rows, and a group seldom has so many heads. So one product scores several tiles: the
dimensions of all of them stand below each other, and rows of the query that belong to one tile are zero in the others.
No more is multiplied than with rows left empty, and everything that follows works on full rows.
"""

import torch
import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import (
    LEAST_SIZE,
    LOG2_E,
    TILE,
    on_device_of,
    padded,
)
from aqua_attention.ops.backends.triton.decode_int8 import decoded
from aqua_attention.ops.backends.triton.token_arguments import (
    ScoredArguments,
    Sequences,
    code_pointers,
    first_block,
    seen_length,
    start_early,
    token_places,
)
from aqua_attention.ops.backends.triton.token_weights import WEIGHT_UNIT, query_for_codes
from aqua_attention.ops.backends.triton.token_work import TokenWork

REGISTERS = 168
"""Of a lane of the kernel that is placed by hand: twelve of its programs share a multiprocessor."""
WARPS, STAGES = 4, 3
MOST_PRODUCTS = 128
"""Dimensions of all tiles that one product scores, at most."""


def score_tokens(cache: Sequences, work: TokenWork, *, scaling: float, window: tuple[int, int], appended: bool) -> None:
    """Write weights, their largest, and log-sum-exps.

    Args:
        window: tokens of the exact window, the first and the last ones.
        appended: one token more is there than `cache.lengths` say.
    """
    (batch, kv_heads, _, _, _), given = cache.shape, ScoredArguments.of(cache)
    # The kernel that is placed by hand looks for the largest before it multiplies.
    if work.by_hand and scaling >= 0:
        # Imported here: it needs triton's lower language, which the interpreter does not know.
        from aqua_attention.ops.backends.triton import token_scores_by_hand

        with on_device_of(work.rotated):
            token_scores_by_hand.score_kernel[(work.splits + 1, kv_heads, batch)](
                work.rotated,
                work.dims,
                given._replace(codes=cache.codes.view(torch.int32)),
                work.scratch,
                scaling * LOG2_E,
                *window,
                APPENDED=appended,
                GROUP=work.group,
                KEPT=cache.shape[2],
                CHOSEN=work.dims.shape[2],
                SINK=padded(window[0]) if window[0] else 0,
                RECENT=padded(window[1]) if window[1] else 0,
                BLOCK=cache.block_size,
                KEY_SIZE=given.key_block,
                CODE_SIZE=given.code_block // 4,
                SCALE_SIZE=given.scale_block,
                BITS=cache.score_bits,
                num_warps=1,
                maxnreg=REGISTERS,
                **work.starts_early(),
            )
        return
    with on_device_of(work.rotated):
        _score_tokens[(work.splits + 1, kv_heads, batch)](
            work.rotated,
            work.dims,
            given,
            work.scratch,
            scaling * LOG2_E,
            *window,
            APPENDED=appended,
            num_warps=WARPS,
            num_stages=STAGES,
            **score_constants(cache, work),
            **work.starts_early(),
        )


def score_constants(cache: Sequences, work: TokenWork) -> dict[str, int]:
    """What kernels that score know when they are compiled."""
    most, heads = work.dims.shape[2], int(triton.next_power_of_2(work.group))
    dims = max(LEAST_SIZE, int(triton.next_power_of_2(most)))
    together = max(1, min(LEAST_SIZE // heads, MOST_PRODUCTS // dims))
    if work.rotated.element_size() == 4:
        together = 1  # products in float32 are not those of tensor cores
    return {name: size for name, size in work.constants(cache).items() if not name.startswith("VALUE")} | {
        "CHOSEN": most,
        "DIMS": dims,
        "HEADS": max(LEAST_SIZE // together, heads),
        "TOGETHER": together,
        "BITS": cache.score_bits,
        "ASSEMBLY": work.rotated.is_cuda,
    }


@triton.jit
def _score_tokens(
    query_ptr,
    dims_ptr,
    cache,
    scratch,
    scaling,
    sink,
    recent,
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
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_early(EARLY)
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0) - 1
    place = (row * tl.num_programs(1) + group).to(tl.int64)
    length = seen_length(cache, row, APPENDED)
    query_ptr += place * GROUP * KEPT
    part = (row, group, place, length)
    if split == splits:
        score_window(
            query_ptr,
            cache,
            scratch,
            part,
            splits,
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
    else:
        score_tiles(
            query_ptr,
            dims_ptr + place * CHOSEN,
            cache,
            scratch,
            part,
            (split, splits),
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
            BITS,
            ASSEMBLY,
        )


@triton.jit
def score_tiles(
    query_ptr,
    dims_ptr,
    cache,
    scratch,
    part,
    share,
    scaling,
    sink,
    recent,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Score the tiles of one program. Scales and means of channels go into the query, made small enough for float16.

    Args:
        share: which of how many programs it is.
    """
    row, group, place, length = part
    split, splits = share
    tiles = tl.cdiv(length, TILE)
    each = tl.cdiv(tiles, splits)
    begin = split * each
    end = tl.minimum(begin + each, tiles)
    rows, tokens, indices = tl.arange(0, TOGETHER * HEADS), tl.arange(0, TILE), tl.arange(0, TOGETHER * DIMS)
    # Which head and tile a row is of, and which dimension and tile is multiplied there.
    head, tile_of_row = rows % HEADS, rows // HEADS
    index, tile_of_dim = indices % DIMS, indices // DIMS
    inside, taken = head < GROUP, index < CHOSEN
    dims = tl.load(dims_ptr + index, taken, 0, cache_modifier=".cg")
    query = tl.load(
        query_ptr + head[:, None] * KEPT + dims[None, :],
        inside[:, None] & taken[None, :] & (tile_of_row[:, None] == tile_of_dim[None, :]),
        0.0,
        cache_modifier=".cg",
    ).to(tl.float32)
    mean = tl.sum(query * tl.load(cache.channel_mean + group * KEPT + dims)[None, :], 1) * scaling
    query *= tl.load(cache.channel_scale + group * KEPT + dims)[None, :]
    is_wide: tl.constexpr = query_ptr.dtype.element_ty == tl.float32
    unit = tl.full([TOGETHER * HEADS], 1.0, tl.float32) * scaling
    if not is_wide:
        peak = tl.max(tl.abs(query), 1)
        peak = tl.where(peak > 0, peak, 1.0)
        query = (query / peak[:, None]).to(tl.float16)
        unit = peak * scaling
    largest = tl.full([TOGETHER * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TOGETHER * HEADS], tl.float32)
    first = first_block(cache, row, group)
    behind = tl.minimum(length - recent, end * TILE)
    for tile in range(begin, end, TOGETHER):
        # Instead of nothing, the last tile again or dimension 0, times zero: masks of bytes cost more.
        codes_at = code_pointers(
            cache,
            row,
            first,
            tl.minimum(tile + tile_of_dim, end - 1)[:, None],
            dims[:, None],
            tl.arange(0, TILE * BITS // 8)[None, :],
            length,
            KEPT,
            BLOCK,
            BITS,
        )
        codes = tl.load(codes_at)
        if BITS == 4:
            # As codes of 8 bits, of which 128 is zero.
            codes = (tl.interleave(codes & 15, codes >> 4) + 120).to(tl.uint8)
        held = tl.minimum(tile + tile_of_row, end - 1)[:, None] * TILE + tokens[None, :]
        blocks, places = token_places(cache, row, first, held, held < length, BLOCK)
        scales = tl.load(cache.scales + blocks * cache.scale_block + places)
        if is_wide:
            scores = tl.dot(query, codes.to(tl.float32) - 128, input_precision="ieee")
        else:
            scores = tl.dot(query, decoded(codes, ASSEMBLY))
        scores = scores * (unit[:, None] * scales.to(tl.float32)) + mean[:, None]
        position = (tile + tile_of_row)[:, None] * TILE + tokens[None, :]
        others = (position >= sink) & (position < behind)
        scores = tl.where(others, scores, float("-inf"))
        # The largest of numbers leaves NaN out; the sum does not.
        top = tl.max(scores, 1)
        level = tl.where(top > float("-inf"), top, 0.0)
        weights = tl.exp2(scores - level[:, None])
        there = inside & (tile + tile_of_row < end)
        at = (place * cache.tile_count + tile + tile_of_row) * GROUP + head
        tl.store(scratch.tops + at, level, there)
        tl.store(
            scratch.weights + at[:, None] * TILE + tokens[None, :],
            (weights * WEIGHT_UNIT).to(tl.float16),
            there[:, None] & (tokens[None, :] >= 0),
        )
        now = tl.maximum(largest, top)
        base = tl.where(now > float("-inf"), now, 0.0)
        total = total * tl.exp2(largest - base) + tl.sum(weights, 1) * tl.exp2(top - base)
        largest = now
    # Tiles of one head that lay in different rows.
    largest, total = tl.reshape(largest, [TOGETHER, HEADS]), tl.reshape(total, [TOGETHER, HEADS])
    whole = tl.max(largest, 0)
    base = tl.where(whole > float("-inf"), whole, 0.0)
    total = tl.sum(total * tl.exp2(largest - base[None, :]), 0)
    heads = tl.arange(0, HEADS)
    lse_ptr = scratch.part_lse + (place * GROUP + heads) * (splits + 1) + split
    tl.store(lse_ptr, base + tl.log2(total), heads < GROUP)


@triton.jit
def score_window(
    query_ptr,
    cache,
    scratch,
    part,
    splits,
    scaling,
    sink,
    recent,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Log-sum-exp of the exact window, at most TILE tokens at either end, with every dimension."""
    row, group, place, length = part
    heads, tokens, narrow = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, KEPT_PADDED)
    query = tl.load(
        query_ptr + heads[:, None] * KEPT + narrow[None, :],
        (heads < GROUP)[:, None] & (narrow < KEPT)[None, :],
        0.0,
        cache_modifier=".cg",
    )
    if cache.value_scales is not None:
        query, unit, mean = query_for_codes(query, cache, group, scaling, KEPT, KEPT_PADDED)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = first_block(cache, row, group)
    for end in tl.static_range(2):
        start = 0 if end == 0 else tl.maximum(length - recent, sink)
        position = start + tokens
        seen = position < (tl.minimum(sink, length) if end == 0 else length)
        blocks, places = token_places(cache, row, first, position, seen, BLOCK)
        keys = tl.load(
            cache.keys + (blocks * cache.key_block + places * KEPT)[None, :] + narrow[:, None],
            seen[None, :] & (narrow < KEPT)[:, None],
            0,
            cache_modifier=".cg",
        )
        if cache.value_scales is not None:
            scales_at = cache.key_scales + blocks * cache.scale_block + places
            scales = tl.load(scales_at, seen, 0.0, cache_modifier=".cg").to(tl.float32)
            scores = tl.dot(query, decoded(keys, ASSEMBLY)) * (unit[:, None] * scales[None, :]) + mean[:, None]
        else:
            scores = tl.dot(query, keys, input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now > float("-inf"), now, 0.0)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        largest = now
    lse_ptr = scratch.part_lse + (place * GROUP + heads) * (splits + 1) + splits
    tl.store(lse_ptr, largest + tl.log2(total), heads < GROUP)
