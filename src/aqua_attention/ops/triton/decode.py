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
SPECIAL = 3
"""Programs of each sequence and head for the blocks with an exact window."""
MOST_SPLITS = 64 - SPECIAL
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
    fitting, warps = splits_and_warps(batch * groups, count, query)
    splits = fitting if splits is None else splits
    splits += SPECIAL
    copies = 1 if chosen is None else 2
    partial = query.new_empty((batch, heads, splits, value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, splits), dtype=torch.float32)
    scores = None if mass is None else query.new_empty((batch, heads, count * TILE), dtype=torch.float32)
    whole_lse = None if mass is None else query.new_empty((batch, heads), dtype=torch.float32)
    output = query.new_empty((batch, heads, value_dim))
    group_padded = triton.next_power_of_2(heads // groups)
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
        COPIES=copies,
        SPECIAL_ROWS=copies * max(triton.next_power_of_2(heads // groups), LEAST_SIZE // copies),
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
        num_warps=warps,
        **starts_early(query, appended),
        num_stages=stages,
    )
    if mass is not None:
        _mass[(-(-count * TILE // 1024), groups, batch)](
            scores, whole_lse, cache.lengths, mass, count * TILE, GROUP=heads // groups, BLOCK=1024
        )
    return output


def splits_and_warps(rows: int, tiles: int, query: Tensor) -> tuple[int, int]:
    """Programs for the tiles of each of `rows` sequences and heads, and the warps of one."""
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 64
    at_once = min(processors // rows - SPECIAL, tiles)
    if at_once >= LEAST_SPLITS or at_once == tiles:
        return at_once, FEW_WARPS if query.element_size() == 2 else WARPS
    return max(1, min(-(-tiles // TILES_EACH), MOST_SPLITS)), WARPS


def starts_early(tensor: Tensor, wanted: bool = True) -> dict[str, bool]:
    """Options of a kernel that may be put on the GPU before the one ahead of it has ended, where GPUs can do that."""
    early = wanted and tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
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
    COPIES: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
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
    EARLY: tl.constexpr,
):
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(1)
    length = tl.minimum(tl.load(lengths_ptr + row) + APPENDED, count * TILE)
    if EARLY:
        # For `prepare`, which has written everything that is read from here on.
        tl.extra.cuda.gdc_wait()
    done = tl.maximum((length - 1) // TILE - 1, 0)
    place = (row * groups + group).to(tl.int64)
    tiles_ptr += place * count * DIM * TILE
    tail_ptr += place * 2 * TILE * DIM
    values_ptr += place * count * TILE * VALUE_DIM
    query_ptr += place * GROUP * DIM
    if dims_ptr is not None:
        dims_ptr += place * CHOSEN
        mask_ptr += place * DIM
    if counts_ptr is not None:
        counts_ptr += place
    first_head = place * GROUP
    if split < SPECIAL:
        _exact_block(
            query_ptr,
            mask_ptr,
            tiles_ptr,
            tail_ptr,
            values_ptr,
            partial_ptr,
            lse_ptr,
            scores_ptr,
            scaling,
            sink,
            recent,
            count,
            split,
            splits,
            length,
            done,
            first_head,
            GROUP,
            COPIES,
            SPECIAL_ROWS,
            DIM,
            DIM_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            TILE,
        )
    else:
        each = tl.cdiv(tl.maximum(done - 1, 0), splits - SPECIAL)
        begin = 1 + (split - SPECIAL) * each
        _tiles(
            query_ptr,
            dims_ptr,
            counts_ptr,
            tiles_ptr,
            values_ptr,
            partial_ptr,
            lse_ptr,
            scores_ptr,
            scaling,
            count,
            split,
            splits,
            begin,
            tl.minimum(begin + each, done),
            first_head,
            GROUP,
            ROWS,
            DIM,
            DIM_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            CHOSEN,
            STEP,
            TILE,
        )

    tl.debug_barrier()  # the whole program has written before it says so
    if tl.atomic_add(arrived_ptr + row * (groups + 1) + group, 1) == splits - 1:
        tl.store(arrived_ptr + row * (groups + 1) + group, 0)
        _merge(
            partial_ptr,
            lse_ptr,
            output_ptr,
            whole_lse_ptr,
            splits,
            first_head,
            GROUP,
            GROUP_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            SPLITS_PADDED,
            MERGED,
        )
        if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
            if tl.atomic_add(arrived_ptr + row * (groups + 1) + groups, 1) == groups - 1:
                # All programs of this sequence have read its length.
                tl.store(arrived_ptr + row * (groups + 1) + groups, 0)
                tl.store(lengths_ptr + row, length)


@triton.jit
def _exact_block(
    query_ptr,
    mask_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    sink,
    recent,
    count,
    split,
    splits,
    length,
    done,
    first_head,
    GROUP: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention to the first tile, or to a half of the tail.

    Where dimensions are chosen, each head has two rows: one sees the exact window with every dimension, one the other
    tokens with the chosen ones: so one matrix product does.
    """
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, DIM_PADDED)
    column = columns < VALUE_DIM
    rows = tl.arange(0, ROWS)
    member, is_narrow = rows % (ROWS // COPIES), rows >= ROWS // COPIES
    inside = member < GROUP
    query = tl.load(query_ptr + member[:, None] * DIM + dim[None, :], inside[:, None] & (dim[None, :] < DIM), 0.0)
    position = tl.where(split == 0, 0, done + split - 1) * TILE + tokens
    seen = position < tl.where((split == 0) & (done == 0), 0, length)
    there = (dim[:, None] < DIM) & seen[None, :]
    if split == 0:
        keys = tl.load(tiles_ptr + dim[:, None] * TILE + tokens[None, :], there, 0.0)
    else:
        keys = tl.load(tail_ptr + (position % (2 * TILE))[None, :] * DIM + dim[:, None], there, 0.0)
    values = tl.load(
        values_ptr + position[:, None] * VALUE_DIM + columns[None, :], seen[:, None] & column[None, :], 0.0
    )
    visible = inside[:, None] & seen[None, :]
    if COPIES == 2:
        flags = tl.load(mask_ptr + dim, dim < DIM, 0)
        query = tl.where(is_narrow[:, None] & (flags == 0)[None, :], 0.0, query).to(query.dtype)
        exact = (position < sink) | (position >= length - recent)
        visible = visible & (exact[None, :] != is_narrow[:, None])
    scores = tl.where(visible, tl.dot(query, keys, input_precision="ieee") * scaling, float("-inf"))
    if scores_ptr is not None:
        tl.store(scores_ptr + (first_head + member[:, None]) * count * TILE + position[None, :], scores, visible)
    largest, total, output = _update(
        scores,
        values,
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, VALUE_PADDED], tl.float32),
    )
    if COPIES == 2:
        # The two rows of a head lie in the same threads.
        largest = tl.reshape(largest, [2, ROWS // 2])
        both = tl.max(largest, 0)
        share = tl.exp2(largest - tl.where(both == float("-inf"), 0.0, both)[None, :])
        largest, total = both, tl.sum(tl.reshape(total, [2, ROWS // 2]) * share, 0)
        output = tl.sum(tl.reshape(output, [2, ROWS // 2, VALUE_PADDED]) * share[:, :, None], 0)
        member = tl.arange(0, ROWS // 2)
    at = (first_head + member) * splits + split
    _store_part(partial_ptr, lse_ptr, at, largest, total, output, member < GROUP, columns, VALUE_DIM)


@triton.jit
def _tiles(
    query_ptr,
    dims_ptr,
    counts_ptr,
    tiles_ptr,
    values_ptr,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    count,
    split,
    splits,
    begin,
    end,
    first_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention to the tiles from `begin` to before `end`, with the chosen dimensions."""
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, DIM_PADDED)
    column = columns < VALUE_DIM
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    if dims_ptr is None:
        query = tl.load(query_ptr + heads[:, None] * DIM + dim[None, :], inside[:, None] & (dim[None, :] < DIM), 0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    limit = CHOSEN
    if counts_ptr is not None:
        limit = tl.load(counts_ptr)
    for tile in range(begin, end):
        if dims_ptr is None:
            keys_ptr = tiles_ptr + (tile * DIM + dim[:, None]) * TILE + tokens[None, :]
            if DIM == DIM_PADDED:
                keys = tl.load(keys_ptr)
            else:
                keys = tl.load(keys_ptr, (dim[:, None] < DIM) & (tokens[None, :] >= 0), 0.0)
            scores = tl.dot(query, keys, input_precision="ieee")
        else:
            scores = tl.zeros([ROWS, TILE], tl.float32)
            for start in tl.static_range(0, CHOSEN, STEP):
                places = start + tl.arange(0, STEP)
                some = tl.load(dims_ptr + places, places < limit, 0)
                chosen = tl.load(
                    query_ptr + heads[:, None] * DIM + some[None, :],
                    inside[:, None] & (places[None, :] < limit),
                    0.0,
                )
                keys_ptr = tiles_ptr + (tile * DIM + some[:, None]) * TILE + tokens[None, :]
                if counts_ptr is None:
                    # Where k is no multiple, the rest is dimension 0 again, times zero.
                    keys = tl.load(keys_ptr)
                else:
                    keys = tl.load(keys_ptr, (places[:, None] < limit) & (tokens[None, :] >= 0), 0.0)
                scores = tl.dot(chosen, keys, scores, input_precision="ieee")
        scores = scores * scaling
        position = tile * TILE + tokens
        if VALUE_DIM == VALUE_PADDED:
            values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :])
        else:
            there = (position[:, None] >= 0) & column[None, :]
            values = tl.load(values_ptr + position[:, None] * VALUE_DIM + columns[None, :], there, 0.0)
        if scores_ptr is not None:
            there = inside[:, None] & (tokens[None, :] >= 0)
            tl.store(scores_ptr + (first_head + heads[:, None]) * count * TILE + position[None, :], scores, there)
        largest, total, output = _update(scores, values, largest, total, output)
    at = (first_head + heads) * splits + split
    _store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM)


@triton.jit
def _merge(
    partial_ptr,
    lse_ptr,
    output_ptr,
    whole_lse_ptr,
    splits,
    first_head,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The attention over all splits of the sequence, from that over each and its log-sum-exp."""
    columns = tl.arange(0, VALUE_PADDED)
    column = columns < VALUE_DIM
    every, member = tl.arange(0, SPLITS_PADDED), tl.arange(0, GROUP_PADDED)
    first = (first_head + member) * splits
    # Past the cache of this processor, which may hold what was there before.
    lse = tl.load(
        lse_ptr + first[:, None] + every[None, :],
        (member[:, None] < GROUP) & (every[None, :] < splits),
        float("-inf"),
        cache_modifier=".cg",
    )
    top = tl.where(member < GROUP, tl.max(lse, 1), 0.0)
    whole_lse = top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), 1))
    whole_lse = tl.where(member < GROUP, whole_lse, 0.0)
    result = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for start in range(0, splits, MERGED):
        part = start + tl.arange(0, MERGED)
        is_part = (member[:, None] < GROUP) & (part[None, :] < splits)
        at = first[:, None] + part[None, :]
        part_lse = tl.load(lse_ptr + at, is_part, float("-inf"), cache_modifier=".cg")
        some = tl.load(
            partial_ptr + at[:, :, None] * VALUE_DIM + columns[None, None, :],
            is_part[:, :, None] & column[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        result += tl.sum(some * tl.exp2(part_lse - whole_lse[:, None])[:, :, None], 1)
    tl.store(
        output_ptr + (first_head + member)[:, None] * VALUE_DIM + columns[None, :],
        result.to(output_ptr.dtype.element_ty),
        (member[:, None] < GROUP) & column[None, :],
    )
    if whole_lse_ptr is not None:
        tl.store(whole_lse_ptr + first_head + member, whole_lse, member < GROUP)


@triton.jit
def _store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM: tl.constexpr):
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(partial_ptr + at[:, None] * VALUE_DIM + columns[None, :], output, there)
    tl.store(lse_ptr + at, largest + tl.log2(total), inside)


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
