# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""What several kernels that choose tokens share: a query for codes of 8 bits, and the weights of a group's heads."""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE

WEIGHT_UNIT = tl.constexpr(32768.0)
"""What the weight 1 is in float16: as much room below as there can be."""


MOST_ROWS = tl.constexpr(8)
"""Heads whose parts are merged together."""


@triton.jit
def merged_lse(part_lse_ptr, place, splits, GROUP: tl.constexpr, SPLITS_PADDED: tl.constexpr, UNIT: tl.constexpr):
    """Log-sum-exp of each head, as a tuple of numbers; the mass of the exact window; and the logarithm of the largest
    share that a head has outside of it.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP) if GROUP < MOST_ROWS else MOST_ROWS
    rows, parts = tl.arange(0, ROWS), tl.arange(0, SPLITS_PADDED)[None, :]
    found, window, largest = (), 0.0, 0.0
    for first in tl.static_range(0, GROUP, ROWS):
        heads = first + rows
        there = (heads < GROUP)[:, None] & (parts <= splits)
        at = (place * GROUP + heads)[:, None] * (splits + 1) + parts
        lse = tl.load(part_lse_ptr + at, there, float("-inf"), cache_modifier=".cg")
        top = tl.max(lse, 1)
        top = tl.where(top > float("-inf"), top, 0.0)
        shares = tl.exp2(lse - top[:, None])
        outside = tl.sum(tl.where(parts < splits, shares, 0.0), 1)
        exact = tl.sum(tl.where(parts == splits, shares, 0.0), 1)
        # NaN in any part is in the sum.
        whole = outside + exact
        window += tl.sum(tl.where(heads < GROUP, exact / whole, 0.0), 0) * UNIT
        largest = tl.maximum(largest, tl.max(tl.where(heads < GROUP, outside / whole, 0.0), 0))
        merged = top + tl.log2(whole)
        for row in tl.static_range(ROWS):
            if first + row < GROUP:
                # A tuple of kernels cannot be unpacked.
                found = found + (tl.sum(tl.where(rows == row, merged, 0.0), 0),)  # noqa: RUF005
    return found, window, tl.log2(largest)


@triton.jit
def query_for_codes(query, cache, group, scaling, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr):
    """A query that multiplies codes of keys, [rows, KEPT_PADDED] in float16, with scales and means of channels in it.

    Returns:
        The query, what its products are worth times the scale of a token, and what is added to these.
    """
    narrow = tl.arange(0, KEPT_PADDED)
    query = query.to(tl.float32)
    mean = tl.load(cache.channel_mean + group * KEPT + narrow, narrow < KEPT, 0.0)
    mean = tl.sum(query * mean[None, :], 1) * scaling
    query *= tl.load(cache.channel_scale + group * KEPT + narrow, narrow < KEPT, 0.0)[None, :]
    peak = tl.max(tl.abs(query), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    return (query / peak[:, None]).to(tl.float16), peak * scaling, mean


@triton.jit
def head_weights(scratch, first, tile, end, GROUP: tl.constexpr, TILES: tl.constexpr):
    """Weights of each head of a group, tuples of int32 [TILES, TILE // 2], of two tokens each, and the largest scores
    they are relative to, [TILES].

    Args:
        first: number of the first tile of a place, counted from that of all places; tile, end: of this place.
    """
    tiles, pairs = tile + tl.arange(0, TILES), tl.arange(0, TILE // 2)
    weights, tops = (), ()
    for head in tl.static_range(GROUP):
        at = (first + tiles) * GROUP + head
        # Masks of whole tiles: tokens are loaded eight at a time.
        there = (tiles < end)[:, None] & (pairs >= 0)[None, :]
        weights_ptr = scratch.weights.to(tl.pointer_type(tl.int32)) + at[:, None] * (TILE // 2) + pairs[None, :]
        weights = weights + (tl.load(weights_ptr, there, 0, cache_modifier=".cg"),)  # noqa: RUF005 (no unpacking)
        tops = tops + (tl.load(scratch.tops + at, tiles < end, 0.0, cache_modifier=".cg"),)  # noqa: RUF005
    return weights, tops
