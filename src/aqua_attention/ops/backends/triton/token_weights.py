# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""What several kernels that choose tokens share: a query for codes of 8 bits, and the weights of a group's heads."""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import TILE

WEIGHT_UNIT = tl.constexpr(32768.0)
"""What the weight 1 is in float16: as much room below as there can be."""


@triton.jit
def merged_lse(part_lse_ptr, place, splits, GROUP: tl.constexpr, SPLITS_PADDED: tl.constexpr, UNIT: tl.constexpr):
    """Log-sum-exp of each head, as a tuple of numbers; the mass of the exact window; and the logarithm of the largest
    share that a head has outside of it.
    """
    parts = tl.arange(0, SPLITS_PADDED)
    found, window, outside = (), 0.0, float("-inf")
    for head in tl.static_range(GROUP):
        lse = tl.load(
            part_lse_ptr + (place * GROUP + head) * (splits + 1) + parts,
            parts <= splits,
            float("-inf"),
            cache_modifier=".cg",
        )
        top = tl.max(lse, 0)
        top = tl.where(top > float("-inf"), top, 0.0)
        whole = top + tl.log2(tl.sum(tl.exp2(lse - top), 0))
        # NaN in any part is in the sum.
        window += tl.sum(tl.where(parts == splits, tl.exp2(lse - whole), 0.0), 0) * UNIT
        others = tl.sum(tl.where(parts < splits, tl.exp2(lse - top), 0.0), 0)
        outside = tl.maximum(outside, top + tl.log2(others) - whole)
        found = found + (whole,)  # noqa: RUF005 (tuples of kernels cannot be unpacked)
    return found, window, outside


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
def group_weights(scratch, tiles, is_tile, lse, outside, GROUP: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr):
    """Weights of the heads of a group together, float32 [TILES, TILE], of which WEIGHT_UNIT are 1; those of the exact
    window are 0.

    Args:
        tiles: numbers of the tiles, counted from the first of all places; is_tile: which there are.
        lse: of `merged_lse`; outside: so much, as a logarithm, counts as 1.
    """
    tokens = tl.arange(0, TILE)
    weight = tl.zeros([TILES, TILE], tl.float32)
    for head in tl.static_range(GROUP):
        at = tiles * GROUP + head
        top = tl.load(scratch.tops + at, is_tile, 0.0, cache_modifier=".cg")
        # Masks of whole tiles: tokens are loaded eight at a time.
        there = is_tile[:, None] & (tokens >= 0)[None, :]
        some = tl.load(scratch.weights + at[:, None] * TILE + tokens[None, :], there, 0.0, cache_modifier=".cg")
        weight += some.to(tl.float32) * (tl.exp2(top - lse[head] - outside) * UNIT)[:, None]
    return weight
