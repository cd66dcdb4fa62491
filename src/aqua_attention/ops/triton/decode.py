# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""AQUA decoding on a GPU: one query token a sequence, reading only the chosen dimensions of the keys.

The tokens of a sequence are split over programs; each writes the attention over its own tokens and its log-sum-exp, and
the last one to arrive merges them. Three programs have the blocks in which tokens can need every dimension, one each:
the first tile and the two halves of the tail. All others read `k` rows of each tile, without a branch in their loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.triton.layout import TILE, TiledCache

DIMS_AT_ONCE = 32
LEAST_SIZE = 16
"""Rows and columns of a matrix product on tensor cores are padded to so many at least."""
WARPS, FEW_WARPS = 8, 4
"""Of a program when there are many programs, and when all of them run at once."""
STAGE_BYTES, MOST_STAGES = 200_000, 4
"""Shared memory for the tiles that are on their way, and how many there are at most: two in float32, whose products
need more of it."""
LARGEST_FLOAT32 = 128
"""Dimensions of a head in float32, for the same reason."""
WHOLE_TILES = 40
"""Caches of up to so many tiles are read whole, by queries that are zero where they are not chosen: there the latency
counts and not the bytes, and the addresses of keys need not wait for the choice."""
SPECIAL = 3
"""Programs of each sequence and head for the blocks with an exact window."""
MOST_SPLITS = 61
"""The program that merges holds the log-sum-exp of all of them at once."""
MERGED_ROWS = 64
"""Partial results of so many splits and heads are merged at once."""
TILES_EACH, LEAST_SPLITS = 12, 4
"""Tiles of a program when there are many; as many programs as run at once, where that is this many splits or more. Both
are the best of a sweep on an H100."""


class Chosen(NamedTuple):
    """Dimensions to multiply outside the exact window, for each sequence and key-value head, shared by its query heads.

    Attributes:
        dims: int32 [batch, num_key_value_heads, k], each once.
        mask: int8 [batch, num_key_value_heads, kept], 1 for these.
        counts: int32 [batch, num_key_value_heads], how many of `dims` count, the first ones; None: all.
    """

    dims: Tensor
    mask: Tensor
    counts: Tensor | None = None

    @staticmethod
    def of(dims: Tensor, kept: int) -> Chosen:
        """From the dimensions alone."""
        mask = torch.zeros((*dims.shape[:2], kept), dtype=torch.int8, device=dims.device)
        return Chosen(dims.to(torch.int32).contiguous(), mask.scatter_(-1, dims.long(), 1))


def decode(
    query: Tensor,
    chosen: Chosen | None,
    cache: TiledCache,
    *,
    sink: int = 0,
    recent: int = 0,
    scaling: float | None = None,
    splits: int | None = None,
    whole: bool | None = None,
    appended: bool = False,
    mass: Tensor | None = None,
) -> Tensor:
    """One step of `attention_reference` for one query token a sequence, with dimensions shared by a group.

    Args:
        query: rotated, [batch, num_attention_heads, kept].
        chosen: the dimensions to multiply; None: all (dense attention).
        cache: keys and values, the query's own token included.
        sink, recent: size of the exact window, at most TILE each.
        scaling: factor of the scores; default 1/sqrt(kept).
        splits: programs for each sequence and key-value head; None: as many as fill the GPU.
        whole: read dimensions that are not chosen too, and multiply them by zero; None: where that is faster.
        appended: a token that `prepare` has written is counted too, and the sequences are one longer afterwards.
        mass: float32 [batch, num_key_value_heads, tokens of `cache.values`]; gets the attention that each token was
            given, summed over the heads of its group, and zero behind a sequence's end.

    Returns:
        [batch, num_attention_heads, value_dim] in the dtype of the cache.

    Raises:
        AquaError: shapes or sizes that the kernel does not take; the message lists what it takes.
    """
    batch, groups, count, kept, _ = cache.tiles.shape
    heads, value_dim = query.shape[1], cache.values.shape[3]
    _check(query, chosen, mass, cache, sink, recent)
    dims, chosen_mask, counts = (None, None, None) if chosen is None else chosen
    most = kept if dims is None else dims.shape[2]
    if splits is None:
        splits, warps = splits_and_warps(batch * groups, count, query.device)
    else:
        warps = WARPS
    splits += SPECIAL
    partial = query.new_empty((batch, heads, splits, value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, splits), dtype=torch.float32)
    scores = None if mass is None else query.new_empty((batch, heads, count * TILE), dtype=torch.float32)
    whole_lse = None if mass is None else query.new_empty((batch, heads), dtype=torch.float32)
    output = query.new_empty((batch, heads, value_dim))
    group_padded = triton.next_power_of_2(heads // groups)
    whole = chosen is not None and (count <= WHOLE_TILES if whole is None else whole)
    if whole:
        most, counts = kept, None
    tile_bytes = TILE * (padded(most) + padded(value_dim)) * query.element_size()
    stages = max(1, min(MOST_STAGES if query.element_size() == 2 else 2, 1 + STAGE_BYTES // tile_bytes))
    _decode[(splits, groups, batch)](
        query,
        dims,
        chosen_mask,
        counts,
        cache.tiles,
        cache.tail,
        cache.values,
        cache.lengths,
        cache.arrived,
        partial,
        lse,
        output,
        scores,
        whole_lse,
        (kept**-0.5 if scaling is None else scaling) * 1.4426950408889634,
        sink,
        recent,
        count,
        APPENDED=appended,
        GROUP=heads // groups,
        ROWS=padded(heads // groups),
        DIM=kept,
        DIM_PADDED=padded(kept),
        VALUE_DIM=value_dim,
        VALUE_PADDED=padded(value_dim),
        CHOSEN=most,
        STEP=DIMS_AT_ONCE if most > LEAST_SIZE else LEAST_SIZE,
        GROUP_PADDED=group_padded,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        MERGED=min(triton.next_power_of_2(splits), max(1, MERGED_ROWS // group_padded)),
        TILE=TILE,
        SPECIAL=SPECIAL,
        WHOLE=whole,
        num_warps=warps,
        **starts_early(query),
        num_stages=stages,
    )
    if mass is not None:
        _mass[(-(-count * TILE // 1024), groups, batch)](
            scores, whole_lse, cache.lengths, mass, count * TILE, GROUP=heads // groups, BLOCK=1024
        )
    return output


def splits_and_warps(rows: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Programs for the tiles of each of `rows` sequences and heads, and the warps of one."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64
    at_once = min(processors // rows - SPECIAL, tiles)
    if at_once >= LEAST_SPLITS or at_once == tiles:
        return at_once, FEW_WARPS
    return max(1, min(-(-tiles // TILES_EACH), MOST_SPLITS)), WARPS


def starts_early(tensor: Tensor) -> dict[str, bool]:
    """Options of a kernel that may be put on the GPU before the one ahead of it has ended, where GPUs can do that."""
    early = tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"EARLY": early, "launch_pdl": early} if early else {"EARLY": False}


def padded(size: int) -> int:
    """The size of a block that holds so many."""
    return max(LEAST_SIZE, int(triton.next_power_of_2(size)))


def _check(
    query: Tensor, chosen: Chosen | None, mass: Tensor | None, cache: TiledCache, sink: int, recent: int
) -> None:
    batch, groups, count, kept, _ = cache.tiles.shape
    if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != kept or query.shape[1] % groups:
        raise AquaError(f"query is {tuple(query.shape)}: it must be [{batch}, a multiple of {groups}, {kept}]")
    if query.dtype != cache.tiles.dtype or not query.is_contiguous():
        raise AquaError(f"query is {query.dtype}: it must be contiguous, in the cache's {cache.tiles.dtype}")
    if query.dtype == torch.float32 and query.is_cuda and max(kept, cache.values.shape[3]) > LARGEST_FLOAT32:
        raise AquaError(
            f"heads of {kept} dimensions in float32: the kernel takes {LARGEST_FLOAT32} at most, or 16 bits"
        )
    if not (0 <= sink <= TILE and 0 <= recent <= TILE):
        raise AquaError(f"sink is {sink} and recent {recent}: the kernel takes 0 to {TILE} of each")
    if chosen is not None:
        dims, mask, counts = chosen
        fits = dims.ndim == 3 and dims.shape[:2] == (batch, groups) and 1 <= dims.shape[2] <= kept
        if not fits or dims.dtype != torch.int32 or not dims.is_contiguous():
            raise AquaError(
                f"dims is {dims.dtype} {tuple(dims.shape)}: it must be int32 [{batch}, {groups}, 1 to {kept}]"
            )
        if mask.dtype != torch.int8 or mask.shape != (batch, groups, kept) or not mask.is_contiguous():
            raise AquaError(f"mask is {mask.dtype} {tuple(mask.shape)}: it must be int8 [{batch}, {groups}, {kept}]")
        if counts is not None and (counts.dtype != torch.int32 or counts.shape != (batch, groups)):
            raise AquaError(f"counts is {counts.dtype} {tuple(counts.shape)}: it must be int32 [{batch}, {groups}]")
    if mass is not None and (mass.dtype != torch.float32 or mass.shape != (batch, groups, count * TILE)):
        raise AquaError(
            f"mass is {mass.dtype} {tuple(mass.shape)}: it must be float32 [{batch}, {groups}, {count * TILE}]"
        )


@triton.jit
def _decode(
    query_ptr,
    dims_ptr,
    mask_ptr,
    counts_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    lengths_ptr,
    arrived_ptr,
    partial_ptr,
    lse_ptr,
    output_ptr,
    scores_ptr,
    whole_lse_ptr,
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
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    TILE: tl.constexpr,
    SPECIAL: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(1)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # for `prepare`
    length = tl.minimum(tl.load(lengths_ptr + row) + APPENDED, count * TILE)
    done = tl.maximum((length - 1) // TILE - 1, 0)
    place = (row * groups + group).to(tl.int64)
    tiles_ptr += place * count * DIM * TILE
    tail_ptr += place * 2 * TILE * DIM
    values_ptr += place * count * TILE * VALUE_DIM
    query_ptr += place * GROUP * DIM
    limit = CHOSEN
    if counts_ptr is not None:
        limit = tl.load(counts_ptr + place)
    if dims_ptr is not None and not WHOLE:
        dims_ptr += place * CHOSEN

    heads, tokens, columns = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, VALUE_PADDED)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    head = place * GROUP + heads
    inside = heads < GROUP
    if scores_ptr is not None:
        scores_ptr += head[:, None] * count * TILE

    if split < SPECIAL:
        # The first tile, or half of the tail. Outside the window, dimensions that are not chosen count as zero.
        dim = tl.arange(0, DIM_PADDED)
        query = tl.load(query_ptr + heads[:, None] * DIM + dim[None, :], inside[:, None] & (dim[None, :] < DIM), 0.0)
        position = tl.where(split == 0, 0, done + split - 1) * TILE + tokens
        seen = position < tl.where((split == 0) & (done == 0), 0, length)
        there = (dim[:, None] < DIM) & seen[None, :]
        if split == 0:
            keys = tl.load(tiles_ptr + dim[:, None] * TILE + tokens[None, :], there, 0.0)
        else:
            keys = tl.load(tail_ptr + (position % (2 * TILE))[None, :] * DIM + dim[:, None], there, 0.0)
        values = tl.load(
            values_ptr + position[:, None] * VALUE_DIM + columns[None, :],
            seen[:, None] & (columns[None, :] < VALUE_DIM),
            0.0,
        )
        if dims_ptr is not None:
            exact = (position < sink) | (position >= length - recent)
            chosen = tl.load(mask_ptr + place * DIM + dim, dim < DIM, 0) > 0
            keys = tl.where(chosen[:, None] | exact[None, :], keys, 0.0)
        scores = tl.dot(query, keys, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scaling, float("-inf"))
        if scores_ptr is not None:
            tl.store(scores_ptr + position[None, :], scores, inside[:, None] & seen[None, :])
        largest, total, output = _update(scores, values, largest, total, output)
    else:
        each = tl.cdiv(tl.maximum(done - 1, 0), splits - SPECIAL)
        begin = 1 + (split - SPECIAL) * each
        for tile in range(begin, tl.minimum(begin + each, done)):
            scores = tl.zeros([ROWS, TILE], tl.float32)
            for start in tl.static_range(0, CHOSEN, STEP):
                places = start + tl.arange(0, STEP)
                if dims_ptr is None or WHOLE:
                    dim = tl.minimum(places, CHOSEN - 1)
                else:
                    dim = tl.load(dims_ptr + places, places < limit, 0)
                query = tl.load(
                    query_ptr + heads[:, None] * DIM + dim[None, :], inside[:, None] & (places[None, :] < limit), 0.0
                )
                if WHOLE:
                    chosen = tl.load(mask_ptr + place * DIM + dim)
                    query = tl.where(chosen[None, :] > 0, query, 0.0).to(query.dtype)
                keys_ptr = tiles_ptr + (tile * DIM + dim[:, None]) * TILE + tokens[None, :]
                if counts_ptr is None:
                    # Where k is no multiple, the rest is some dimension again, times zero.
                    keys = tl.load(keys_ptr)
                else:
                    keys = tl.load(keys_ptr, (places[:, None] < limit) & (tokens[None, :] >= 0), 0.0)
                scores = tl.dot(query, keys, scores, input_precision="ieee")
            scores = scores * scaling
            position = tile * TILE + tokens
            if VALUE_DIM == VALUE_PADDED:
                values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :])
            else:
                there = (position[:, None] >= 0) & (columns[None, :] < VALUE_DIM)
                values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :], there, 0.0)
            if scores_ptr is not None:
                tl.store(scores_ptr + position[None, :], scores, inside[:, None] & (tokens[None, :] >= 0))
            largest, total, output = _update(scores, values, largest, total, output)

    output = output / tl.where(total > 0, total, 1.0)[:, None]
    column = columns < VALUE_DIM
    tl.store(
        partial_ptr + (head[:, None] * splits + split) * VALUE_DIM + columns[None, :],
        output,
        inside[:, None] & column[None, :],
    )
    tl.store(lse_ptr + head * splits + split, largest + tl.log2(total), inside)

    tl.debug_barrier()  # the whole program has written before it says so
    if tl.atomic_add(arrived_ptr + row * (groups + 1) + group, 1) == splits - 1:
        tl.store(arrived_ptr + row * (groups + 1) + group, 0)
        every, member = tl.arange(0, SPLITS_PADDED), tl.arange(0, GROUP_PADDED)
        first = (place * GROUP + member) * splits
        # Past the cache of this processor, which may hold what was there before.
        parts = tl.load(
            lse_ptr + first[:, None] + every[None, :],
            (member[:, None] < GROUP) & (every[None, :] < splits),
            float("-inf"),
            cache_modifier=".cg",
        )
        top = tl.max(parts, 1)
        whole_lse = top + tl.log2(tl.sum(tl.exp2(parts - tl.where(member < GROUP, top, 0.0)[:, None]), 1))
        result = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
        for start in range(0, splits, MERGED):
            part = start + tl.arange(0, MERGED)
            is_part = (member[:, None] < GROUP) & (part[None, :] < splits)
            at = first[:, None] + part[None, :]
            weights = tl.exp2(
                tl.load(lse_ptr + at, is_part, float("-inf"), cache_modifier=".cg")
                - tl.where(member < GROUP, whole_lse, 0.0)[:, None]
            )
            some = tl.load(
                partial_ptr + at[:, :, None] * VALUE_DIM + columns[None, None, :],
                is_part[:, :, None] & column[None, None, :],
                0.0,
                cache_modifier=".cg",
            )
            result += tl.sum(some * weights[:, :, None], 1)
        tl.store(
            output_ptr + (place * GROUP + member)[:, None] * VALUE_DIM + columns[None, :],
            result.to(output_ptr.dtype.element_ty),
            (member[:, None] < GROUP) & column[None, :],
        )
        if whole_lse_ptr is not None:
            tl.store(whole_lse_ptr + place * GROUP + member, whole_lse, member < GROUP)
        if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
            if tl.atomic_add(arrived_ptr + row * (groups + 1) + groups, 1) == groups - 1:
                # All programs of this sequence have read its length.
                tl.store(arrived_ptr + row * (groups + 1) + groups, 0)
                tl.store(lengths_ptr + row, length)


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
def _mass(scores_ptr, lse_ptr, lengths_ptr, mass_ptr, tokens, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(2)
    place = (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = position < tl.load(lengths_ptr + row)
    mass = tl.zeros([BLOCK], tl.float32)
    for member in range(GROUP):
        head = place * GROUP + member
        scores = tl.load(scores_ptr + head * tokens + position, seen, float("-inf"))
        mass += tl.exp2(scores - tl.load(lse_ptr + head))
    tl.store(mass_ptr + place * tokens + position, tl.where(seen, mass, 0.0), position < tokens)
