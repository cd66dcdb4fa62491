# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What comes before decoding attention, in one launch: rotate query and key, choose dimensions, append to the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.triton.decode import LEAST_ROWS
from aqua_attention.ops.triton.layout import TILE, TiledCache


def prepare(
    query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, rotation: Tensor, weight: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Rotate one query and key token a sequence, write key and value behind the others, choose `count` dimensions.

    The sequences are not longer afterwards: `decode` with `appended=True` counts the new token and lengthens them.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        rotation: float32 [num_key_value_heads, head_dim, kept].
        weight: float32 [num_key_value_heads, kept]: key_rms for selection="weighted", ones for "magnitude".
        count: dimensions to choose for each key-value head, shared by its query heads, 1 to kept.

    Returns:
        Rotated queries [batch, num_attention_heads, kept] and int32 dimensions [batch, num_key_value_heads, count],
        ascending.
    """
    batch, heads, head_dim = query.shape
    groups, kept = rotation.shape[0], rotation.shape[2]
    if rotation.shape[:2] != (groups, head_dim) or cache.tail.shape[1] != groups or cache.tail.shape[3] != kept:
        raise AquaError(
            f"rotation {tuple(rotation.shape)} does not fit queries of {head_dim} dimensions and a cache of "
            f"{cache.tail.shape[1]} heads of {cache.tail.shape[3]}"
        )
    if not 1 <= count <= kept:
        raise AquaError(f"count is {count}: it must be 1 to {kept} dimensions")
    rotated = query.new_empty((batch, heads, kept))
    dims = torch.empty((batch, groups, count), dtype=torch.int32, device=query.device)
    _prepare[(groups, batch)](
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        rotation,
        weight,
        cache.tiles,
        cache.tail,
        cache.values,
        cache.lengths,
        rotated,
        dims,
        cache.tiles.shape[2],
        GROUP=heads // groups,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(heads // groups + 1)),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        KEPT=kept,
        KEPT_PADDED=triton.next_power_of_2(kept),
        VALUE_DIM=value.shape[2],
        VALUE_DIM_PADDED=triton.next_power_of_2(value.shape[2]),
        COUNT=count,
        TILE=TILE,
        num_warps=8,
    )
    return rotated, dims


@triton.jit
def _prepare(
    query_ptr,
    key_ptr,
    value_ptr,
    rotation_ptr,
    weight_ptr,
    tiles_ptr,
    tail_ptr,
    values_ptr,
    lengths_ptr,
    rotated_ptr,
    dims_ptr,
    tiles,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
):
    group, row = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(0) + group
    # One matrix: the query heads of the group, and the key as the row behind them.
    heads, wide, narrow = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM_PADDED), tl.arange(0, KEPT_PADDED)
    states = tl.load(
        query_ptr + (place * GROUP + heads[:, None]) * HEAD_DIM + wide[None, :],
        (heads[:, None] < GROUP) & (wide[None, :] < HEAD_DIM),
        0.0,
    ).to(tl.float32)
    key = tl.load(key_ptr + place * HEAD_DIM + wide, wide < HEAD_DIM, 0.0).to(tl.float32)
    states = tl.where(heads[:, None] == GROUP, key[None, :], states)
    rotation = tl.load(
        rotation_ptr + (group * HEAD_DIM + wide[:, None]) * KEPT + narrow[None, :],
        (wide[:, None] < HEAD_DIM) & (narrow[None, :] < KEPT),
        0.0,
    )
    turned = tl.dot(states, rotation, input_precision="ieee").to(rotated_ptr.dtype.element_ty)
    tl.store(
        rotated_ptr + (place * GROUP + heads[:, None]) * KEPT + narrow[None, :],
        turned,
        (heads[:, None] < GROUP) & (narrow[None, :] < KEPT),
    )

    # The dimensions of largest summed square; among equals the lower one, and a NaN is largest.
    weight = tl.load(weight_ptr + group * KEPT + narrow, narrow < KEPT, 0.0)
    size = tl.where(heads[:, None] < GROUP, turned.to(tl.float32) * weight[None, :], 0.0)
    size = tl.sum(size * size, 0)
    size = tl.where(size == size, size, float("inf"))
    size = tl.where(narrow < KEPT, size, -1.0)
    ahead = (size[:, None] > size[None, :]) | ((size[:, None] == size[None, :]) & (narrow[:, None] < narrow[None, :]))
    chosen = (tl.sum(ahead.to(tl.int32), 0) < COUNT).to(tl.int32)
    tl.store(dims_ptr + place * COUNT + tl.cumsum(chosen, 0) - 1, narrow, chosen > 0)

    # The new token replaces one of the tile before last, which must be in its place by then.
    position = tl.load(lengths_ptr + row)
    place = place.to(tl.int64)
    tail_ptr += place * 2 * TILE * KEPT
    slot = position % (2 * TILE)
    if (position % TILE == 0) & (position >= 2 * TILE):
        tokens = tl.arange(0, TILE)
        old = tl.load(
            tail_ptr + (slot + tokens[None, :]) * KEPT + narrow[:, None],
            (narrow[:, None] < KEPT) & (tokens[None, :] >= 0),
        )
        tile = position // TILE - 2
        tl.store(
            tiles_ptr + ((place * tiles + tile) * KEPT + narrow[:, None]) * TILE + tokens[None, :],
            old,
            (narrow[:, None] < KEPT) & (tokens[None, :] >= 0),
        )
        tl.debug_barrier()
    new = tl.sum(tl.where(heads[:, None] == GROUP, turned.to(tl.float32), 0.0), 0)
    tl.store(tail_ptr + slot * KEPT + narrow, new.to(tail_ptr.dtype.element_ty), narrow < KEPT)
    columns = tl.arange(0, VALUE_DIM_PADDED)
    value = tl.load(value_ptr + place * VALUE_DIM + columns, columns < VALUE_DIM, 0.0)
    tl.store(values_ptr + (place * tiles * TILE + position) * VALUE_DIM + columns, value, columns < VALUE_DIM)
