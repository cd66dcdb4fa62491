# SPDX-License-Identifier: Apache-2.0
"""AQUA decoding on a GPU: one query token a sequence, reading only the chosen dimensions of the keys."""

import torch
import triton
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton import LARGEST_FLOAT32
from aqua_attention.ops.backends.triton.blocks import (
    LEAST_SIZE,
    LOG2_E,
    VERSION,
    CacheArguments,
    cache_constants,
    on_device_of,
    padded,
    shared_memory,
    sm_count,
    starts_early,
)
from aqua_attention.ops.backends.triton.decode_kernel import decode_kernel
from aqua_attention.ops.backends.triton.decode_merge import mass_kernel, merge_kernel, merging
from aqua_attention.ops.layout import TILE, Chosen, TiledCache, expect

DIMS_AT_ONCE = 32
WARPS, FEW_WARPS = 8, 4
"""Of a program when there are many programs, and when all of them run at once."""
OTHER_BYTES, MOST_STAGES = 32_000, 4
"""Shared memory that is not for tiles on their way, and how many those are at most: two in float32, whose products need
more of it."""
QUANTIZED = {"num_stages": 2, "maxnreg": 168}
"""Over codes of 8 bits: three programs of FEW_WARPS then share a multiprocessor. The best of a sweep on an H100."""
BY_HAND, BY_HAND_AT_ONCE = {"num_warps": 1, "maxnreg": 240}, 8
"""Of the kernel whose registers are placed by hand: less go through memory. Eight programs share a multiprocessor, two
each of its quarters."""
BY_HAND_GROUP, BY_HAND_VALUES = 8, (64, 128)
"""Query heads of a key-value head that it takes at most, and sizes of values."""
BY_HAND_TILES = 1024
"""Tiles of all sequences and heads from which on it is faster than one kernel that does everything."""
BY_HAND_EACH, BY_HAND_FULL, BY_HAND_LONG = 4, 0.9, 24
"""Tiles of one of its programs at least; how much of the GPU the programs must fill; and with how many tiles each there
are two rounds of programs, in which sequences of different lengths share out better."""
SPECIAL = 3
"""Programs of each sequence and head for the blocks with an exact window."""
MOST_SPLITS, MOST_BY_HAND = 64 - SPECIAL, 128 - SPECIAL
"""The program that merges holds the log-sum-exp of all of them at once."""
TILES_EACH, LEAST_SPLITS = 12, 4
"""Tiles of a program when there are many; as many programs as run at once, where that is this many splits or more. Both
are the best of a sweep on an H100."""


def decode(
    query: Tensor,
    chosen: Chosen | None,
    cache: TiledCache,
    *,
    sink: int = 0,
    recent: int = 0,
    scaling: float,
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
        scaling: factor of the scores.
        splits: programs for each sequence and key-value head; None: as many as fill the GPU.
        appended: a token that `prepare` has written is counted too, and the sequences are one longer afterwards. On a
            GPU that starts kernels early `prepare` must be the kernel just before this one.
        mass: float32 [batch, num_key_value_heads, cache.count * TILE]; gets the attention that each token was
            given, summed over the heads of its group, and zero behind a sequence's end.

    Returns:
        [batch, num_attention_heads, value_dim] in the dtype of the cache.

    Raises:
        AquaError: shapes or sizes that the kernel does not take; the message lists what it takes.
    """
    (batch, kv_heads, kept, value_dim, _), count, heads = cache.shape, cache.count, query.shape[1]
    _check(query, chosen, cache, mass, splits)
    check_window(sink, recent)
    dims, chosen_mask, counts, min_length = (None, None, None, 0) if chosen is None else chosen
    most, group = kept if dims is None else dims.shape[2], heads // kv_heads
    by_hand = is_by_hand(query, cache)
    if by_hand:
        fitting, warps = splits_by_hand(batch * kv_heads, count, query), FEW_WARPS
    else:
        fitting, warps = splits_and_warps(batch * kv_heads, count, query)
    splits = fitting if splits is None else splits
    others = splits if by_hand else 0
    splits += SPECIAL
    copies = 1 if chosen is None else 2
    partial = query.new_empty((batch, heads, splits, value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, splits), dtype=torch.float32)
    scores = None if mass is None else query.new_empty((batch, heads, count * TILE), dtype=torch.float32)
    whole_lse = None if mass is None else query.new_empty((batch, heads), dtype=torch.float32)
    output = query.new_empty((batch, heads, value_dim))
    dims_at_once = DIMS_AT_ONCE if most > LEAST_SIZE else LEAST_SIZE
    options: dict[str, int] = {}
    if cache.quantization is None:
        tile_bytes = TILE * (padded(kept if min_length > 0 else most) + padded(value_dim)) * query.element_size()
        most_stages = MOST_STAGES if query.element_size() == 2 else 2
        options["num_stages"] = max(1, min(most_stages, 1 + (shared_memory(query) - OTHER_BYTES) // tile_bytes))
    else:
        dims_at_once = padded(most)
        if not by_hand:
            warps, options = FEW_WARPS, QUANTIZED
    arguments = CacheArguments.of(cache)
    shared, merged = cache_constants(cache, group), merging(group, splits)
    scaling *= LOG2_E
    early = starts_early(query, appended)
    with on_device_of(query):
        if by_hand:
            # Three launches. Tiles start when `prepare` has ended, although they could be put on the GPU before: beside
            # a program that needs shared memory, it seems, a multiprocessor keeps less of its cache for what is on its
            # way, and goes on so while programs follow each other (26 us of 652, in pages of 32 tokens 152 of 924).
            # Special blocks start when all programs of the tiles have, and end when these have; the merge waits for
            # them, and so for both.
            # Imported here: it needs triton's lower language, which the interpreter does not know.
            from aqua_attention.ops.backends.triton.decode_int8_mma import decode_quantized_kernel

            early = starts_early(query)
            decode_quantized_kernel[(others, kv_heads, batch)](
                query,
                dims,
                counts,
                arguments._replace(tiles=cache.tiles.view(torch.int32), value_tiles=cache.values.view(torch.int32)),
                partial,
                lse,
                scores,
                scaling,
                SPECIAL,
                None,
                APPENDED=appended,
                CHOSEN=most,
                KEY_SIZE=kept * cache.block_size // 4,
                VALUE_SIZE=cache.block_size * value_dim // 4,
                SCALE_SIZE=cache.block_size,
                EARLY=early["EARLY"],
                **{name: size for name, size in shared.items() if not name.endswith("PADDED")},
                **BY_HAND,
            )
        decode_kernel[(splits - others, kv_heads, batch)](
            query,
            dims,
            chosen_mask,
            counts,
            arguments,
            cache.arrived,
            partial,
            lse,
            output,
            scores,
            whole_lse,
            scaling,
            sink,
            recent,
            min_length or None,
            others,
            APPENDED=appended,
            ROWS=padded(group),
            COPIES=copies,
            SPECIAL_ROWS=copies * max(triton.next_power_of_2(group), LEAST_SIZE // copies),
            CHOSEN=most,
            DIMS_AT_ONCE=dims_at_once,
            SPECIAL=SPECIAL,
            ALONE=not by_hand,
            ASSEMBLY=query.is_cuda,
            num_warps=warps,
            **shared,
            **merged,
            **early,
            **options,
        )
        if by_hand:
            sizes = {name: shared[name] for name in ("GROUP", "VALUE_DIM", "VALUE_PADDED")}
            merge_kernel[(kv_heads, batch)](
                partial,
                lse,
                output,
                whole_lse,
                cache.lengths,
                splits,
                count * TILE,
                APPENDED=appended,
                **sizes,
                **merged,
                **early,
            )
        if mass is not None:
            mass_kernel[(-(-count * TILE // 1024), kv_heads, batch)](
                scores, whole_lse, cache.lengths, mass, count * TILE, GROUP=group, BLOCK=1024
            )
    return output


def splits_and_warps(rows: int, tiles: int, query: Tensor) -> tuple[int, int]:
    """Programs for the tiles of each of `rows` sequences and heads, and the warps of one."""
    at_once = min(sm_count(query) // rows - SPECIAL, tiles, MOST_SPLITS)
    if at_once >= LEAST_SPLITS or at_once == tiles:
        return at_once, FEW_WARPS if query.element_size() == 2 else WARPS
    return max(1, min(-(-tiles // TILES_EACH), MOST_SPLITS)), WARPS


def is_by_hand(query: Tensor, cache: TiledCache) -> bool:
    """Whether tiles are those of the kernel with registers placed by hand: where they are worth three launches."""
    if cache.quantization is None or not query.is_cuda or VERSION < (3, 6):
        return False
    (_, kv_heads, _, value_dim, _), tiles = cache.shape, cache.count - SPECIAL
    rows = len(cache.lengths) * kv_heads
    if query.shape[1] // kv_heads > BY_HAND_GROUP or value_dim not in BY_HAND_VALUES or tiles < 1:
        return False
    # With few sequences and heads, programs of one warp are too few.
    return rows * tiles >= BY_HAND_TILES and rows * splits_by_hand(rows, tiles, query) >= BY_HAND_TILES // 4


def splits_by_hand(rows: int, tiles: int, query: Tensor, programs: int = BY_HAND_AT_ONCE) -> int:
    """Programs of one warp for the tiles of each of `rows` sequences and heads: rounds of as many as run at once,
    `programs` on each multiprocessor.
    """
    at_once = sm_count(query) * programs
    most = min(-(-tiles // BY_HAND_EACH), MOST_BY_HAND)
    found, fullest = most, 0.0
    for rounds in (2, 3, 4) if rows * tiles >= at_once * 2 * BY_HAND_LONG else (1, 2, 3, 4):
        splits = max(1, rounds * at_once // rows)
        full = rows * splits / at_once / -(-rows * splits // at_once)
        if splits > most or fullest >= BY_HAND_FULL:
            break
        if full > fullest:
            found, fullest = splits, full
    return found


def check_window(sink: int, recent: int) -> None:
    """Raise AquaError for an exact window that the kernels do not take."""
    if not (0 <= sink <= TILE and 0 <= recent <= TILE):
        raise AquaError(f"sink is {sink} and recent {recent}: the kernel takes 0 to {TILE} of each")


def _check(query: Tensor, chosen: Chosen | None, cache: TiledCache, mass: Tensor | None, splits: int | None) -> None:
    cache.check_rotated()
    cache.check_query(query, chosen)
    batch, kv_heads, kept, value_dim, _ = cache.shape
    if query.dtype != cache.dtype or not query.is_contiguous():
        raise AquaError(f"query is {query.dtype}: it must be contiguous, in the cache's {cache.dtype}")
    if query.dtype == torch.float32 and query.is_cuda and max(kept, value_dim) > LARGEST_FLOAT32:
        raise AquaError(
            f"heads of {kept} dimensions in float32: the kernel takes {LARGEST_FLOAT32} at most, or 16 bits"
        )
    most = MOST_BY_HAND if is_by_hand(query, cache) else MOST_SPLITS
    if splits is not None and not 1 <= splits <= most:
        raise AquaError(f"splits is {splits}: it must be 1 to {most}, or None")
    if chosen is not None and chosen.min_length > 0 and cache.quantization is not None:
        raise AquaError(
            f"chosen.min_length is {chosen.min_length}: over codes of 8 bits there must be counts instead, as "
            "`prepare` gives"
        )
    if mass is not None:
        expect("mass", mass, torch.float32, (batch, kv_heads, cache.count * TILE))
