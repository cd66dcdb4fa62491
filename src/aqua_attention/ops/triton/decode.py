# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""AQUA decoding on a GPU: one query token a sequence, reading only the chosen dimensions of the keys.

The tokens of a sequence are split over programs; each writes the attention over its own tokens and its log-sum-exp, and
a second kernel merges them. One program of each sequence and head has the tokens that need every dimension: those of
the first tile and of the tail. All others read `k` rows of each tile, without a branch in their loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.triton.layout import TILE, TiledCache

DIMS_AT_ONCE = 32
LEAST_ROWS = 16
"""Rows of a matrix product on tensor cores: the query heads of a group are padded to so many."""
PROGRAMS = 4096
"""Splits are made until there are about so many programs: the best of a sweep on an H100."""
WARPS, STAGES = 8, 4
"""Stages for two bytes a number; wider ones take two, or the values of several tiles leave no room."""
MOST_SPLITS = 64
"""The kernel that merges them holds all of one head at once."""
LEAST_TILES = 4
"""Tiles that a program has at least, unless there are fewer."""


def decode(
    query: Tensor,
    dims: Tensor | None,
    cache: TiledCache,
    *,
    sink: int = 0,
    recent: int = 0,
    scaling: float | None = None,
    splits: int | None = None,
    appended: bool = False,
) -> Tensor:
    """One step of `attention_reference` for one query token a sequence, with dimensions shared by a group.

    Args:
        query: rotated, [batch, num_attention_heads, kept].
        dims: int32 [batch, num_key_value_heads, k], the dimensions to multiply, each once; None: all (dense attention).
        cache: keys and values, the query's own token included.
        sink, recent: size of the exact window, at most TILE each.
        scaling: factor of the scores; default 1/sqrt(kept).
        appended: a token that `prepare` has written is counted too, and the sequences are one longer afterwards.
        splits: programs for each sequence and key-value head; None: as many as fill the GPU.

    Returns:
        [batch, num_attention_heads, value_dim] in the dtype of the cache.

    Raises:
        AquaError: shapes or sizes that the kernel does not take; the message lists what it takes.
    """
    batch, groups, count, kept, _ = cache.tiles.shape
    heads, value_dim = query.shape[1], cache.values.shape[3]
    _check(query, dims, cache, sink, recent)
    if dims is None:
        dims = torch.arange(kept, dtype=torch.int32, device=query.device).expand(batch, groups, kept).contiguous()
    if splits is None:
        splits = max(1, min(-(-PROGRAMS // (batch * groups)), -(-count // LEAST_TILES), MOST_SPLITS))
    splits += 1  # the first has the exact window
    partial = query.new_empty((batch, heads, splits, value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, splits), dtype=torch.float32)
    output = query.new_empty((batch, heads, value_dim))
    _partial[(splits, groups, batch)](
        query,
        dims,
        cache.tiles,
        cache.tail,
        cache.values,
        cache.lengths,
        partial,
        lse,
        (kept**-0.5 if scaling is None else scaling) * 1.4426950408889634,
        sink,
        recent,
        count,
        APPENDED=appended,
        GROUP=heads // groups,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(heads // groups)),
        DIM=kept,
        DIM_PADDED=triton.next_power_of_2(kept),
        VALUE_DIM=value_dim,
        CHOSEN=dims.shape[2],
        STEP=DIMS_AT_ONCE if dims.shape[2] > LEAST_ROWS else LEAST_ROWS,
        TILE=TILE,
        num_warps=WARPS,
        num_stages=STAGES if query.element_size() == 2 else 2,
    )
    _merge[(heads, batch)](
        partial,
        lse,
        output,
        cache.lengths,
        splits,
        APPENDED=appended,
        SPLITS=triton.next_power_of_2(splits),
        VALUE_DIM=value_dim,
        num_warps=4,
    )
    return output


def _check(query: Tensor, dims: Tensor | None, cache: TiledCache, sink: int, recent: int) -> None:
    batch, groups, _, kept, _ = cache.tiles.shape
    if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != kept or query.shape[1] % groups:
        raise AquaError(f"query is {tuple(query.shape)}: it must be [{batch}, a multiple of {groups}, {kept}]")
    if query.dtype != cache.tiles.dtype or not query.is_contiguous():
        raise AquaError(f"query is {query.dtype}: it must be contiguous, in the cache's {cache.tiles.dtype}")
    if kept % 16 or cache.values.shape[3] not in (16, 32, 64, 128, 256):
        raise AquaError(
            f"{kept} key and {cache.values.shape[3]} value dimensions: the kernel takes multiples of 16, and values of "
            "16, 32, 64, 128 or 256"
        )
    if not (0 <= sink <= TILE and 0 <= recent <= TILE):
        raise AquaError(f"sink is {sink} and recent {recent}: the kernel takes 0 to {TILE} of each")
    if dims is not None:
        fits = dims.ndim == 3 and dims.shape[:2] == (batch, groups) and 1 <= dims.shape[2] <= kept
        if not fits or dims.dtype != torch.int32 or not dims.is_contiguous():
            raise AquaError(
                f"dims is {dims.dtype} {tuple(dims.shape)}: it must be int32 [{batch}, {groups}, 1 to {kept}]"
            )


@triton.jit
def _update(scores, values, largest, total, output):
    """One more block of an online softmax; scores are to the base 2."""
    now = tl.maximum(largest, tl.max(scores, 1))
    # A block in which nothing is visible must not make NaN of minus infinity less itself.
    safe = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(largest - safe)
    total = total * shrink + tl.sum(weights, 1)
    output = output * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return now, total, output


@triton.jit
def _partial(
    query_ptr,
    dims_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    lengths_ptr,
    partial_ptr,
    lse_ptr,
    scaling,
    sink,
    recent,
    count,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHOSEN: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(1)
    length = tl.load(lengths_ptr + row) + APPENDED
    done = tl.maximum((length - 1) // TILE - 1, 0)
    place = (row * groups + group).to(tl.int64)
    tiles_ptr += place * count * DIM * TILE
    tail_ptr += place * 2 * TILE * DIM
    values_ptr += place * count * TILE * VALUE_DIM
    dims_ptr += place * CHOSEN
    query_ptr += (row * groups + group) * GROUP * DIM

    heads, tokens, columns = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, VALUE_DIM)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_DIM], tl.float32)

    if split == 0:
        # Every dimension of the first tile and of the tail; outside the window those not chosen count as zero.
        dim = tl.arange(0, DIM_PADDED)
        there = (heads[:, None] < GROUP) & (dim[None, :] < DIM)
        query = tl.load(query_ptr + heads[:, None] * DIM + dim[None, :], there, 0.0)
        chosen = tl.zeros([DIM_PADDED], tl.int32)
        for start in range(0, CHOSEN, 16):
            places = start + tl.arange(0, 16)
            some = tl.load(dims_ptr + places, places < CHOSEN, -1)
            chosen += tl.sum((some[:, None] == dim[None, :]).to(tl.int32), 0)
        narrow = tl.where(chosen[None, :] > 0, query, 0.0).to(query.dtype)
        for block in tl.static_range(0, 3):
            # The first tile, then the two halves of the tail.
            if block == 0:
                position = tokens
                seen = position < tl.where(done > 0, length, 0)
                keys = tl.load(
                    tiles_ptr + dim[:, None] * TILE + tokens[None, :], (dim[:, None] < DIM) & seen[None, :], 0.0
                )
            else:
                position = (done + block - 1) * TILE + tokens
                seen = position < length
                slots = position % (2 * TILE)
                keys = tl.load(
                    tail_ptr + slots[None, :] * DIM + dim[:, None], (dim[:, None] < DIM) & seen[None, :], 0.0
                )
            exact = (position < sink) | (position >= length - recent)
            wide = tl.dot(query, keys, input_precision="ieee")
            scores = tl.where(exact[None, :], wide, tl.dot(narrow, keys, input_precision="ieee")) * scaling
            scores = tl.where(seen[None, :], scores, float("-inf"))
            values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :], seen[:, None], 0.0)
            largest, total, output = _update(scores, values, largest, total, output)
    else:
        each = tl.cdiv(tl.maximum(done - 1, 0), splits - 1)
        begin = 1 + (split - 1) * each
        for tile in range(begin, tl.minimum(begin + each, done)):
            scores = tl.zeros([ROWS, TILE], tl.float32)
            for start in tl.static_range(0, CHOSEN, STEP):
                place_of = start + tl.arange(0, STEP)
                dim = tl.load(dims_ptr + place_of, place_of < CHOSEN, 0)
                there = (heads[:, None] < GROUP) & (place_of[None, :] < CHOSEN)
                query = tl.load(query_ptr + heads[:, None] * DIM + dim[None, :], there, 0.0)
                # Where k is no multiple, the rest is dimension 0 again, times zero.
                keys = tl.load(tiles_ptr + (tile * DIM + dim[:, None]) * TILE + tokens[None, :])
                scores = tl.dot(query, keys, scores, input_precision="ieee")
            position = tile * TILE + tokens
            values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :])
            largest, total, output = _update(scores * scaling, values, largest, total, output)

    head = (row * groups + group) * GROUP + heads
    inside = heads < GROUP
    some = tl.where(total > 0, total, 1.0)
    output = output / some[:, None]
    tl.store(
        partial_ptr + (head[:, None].to(tl.int64) * splits + split) * VALUE_DIM + columns[None, :],
        output,
        inside[:, None],
    )
    tl.store(lse_ptr + head * splits + split, largest + tl.log2(total), inside)


@triton.jit
def _merge(
    partial_ptr,
    lse_ptr,
    output_ptr,
    lengths_ptr,
    splits,
    APPENDED: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    head = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
        if tl.program_id(0) == 0:
            # Nobody else reads it in this launch.
            tl.store(lengths_ptr + tl.program_id(1), tl.load(lengths_ptr + tl.program_id(1)) + 1)
    place, columns = tl.arange(0, SPLITS), tl.arange(0, VALUE_DIM)
    lse = tl.load(lse_ptr + head * splits + place, place < splits, float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    weights = weights / tl.sum(weights, 0)
    some = tl.load(
        partial_ptr + (head.to(tl.int64) * splits + place[:, None]) * VALUE_DIM + columns[None, :],
        place[:, None] < splits,
        0.0,
    )
    result = tl.sum(some * weights[:, None], 0)
    tl.store(output_ptr + head.to(tl.int64) * VALUE_DIM + columns, result.to(output_ptr.dtype.element_ty))
