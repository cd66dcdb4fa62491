# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Decoding over tiles of tokens that lie in pages, for one sequence and key-value head, see `ops.pages`.

Functions take as one what belongs together. `chosen`: pointers to queries, to the list of their dimensions and to its
mask (None: every dimension). `stored`: pointers to keys, values, their scales (None: not quantized), and to scales
and means of the head's channels. `lookup`: pointer to the sequence's row of the block table, its width, and where the
head's pages begin and how far apart they are. `state`: the online softmax: largest score, sum and output. `limits`:
factor and soft limit of the scores; the first token that is seen and how many there are; and which are scored with
every dimension, those before one place and those from another on.

What steps write is read past the cache of the processor, which may hold what lay there in an earlier one.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import LEAST_SIZE, TILE, online_softmax, token_blocks
from aqua_attention.ops.backends.triton.decode_int8 import VALUE_UNIT, decoded

LEAST = tl.constexpr(LEAST_SIZE)


@triton.jit
def pages_of(lookup, tile, BLOCK: tl.constexpr):
    """Where the page of each token of a tile begins, [TILE]."""
    block_table_ptr, table_width, first, stride = lookup
    return tl.multiple_of(token_blocks(block_table_ptr, first, stride, tile, table_width, BLOCK), 16)


@triton.jit
def limited(scores, softcap):
    """Scores to the base 2 under a soft limit c (in the same units): c * tanh(score / c)."""
    if softcap is not None:
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2.8853900817779268 / softcap)) + 1))
    return scores


@triton.jit
def edge_tiles(
    chosen,
    stored,
    lookup,
    state,
    limits,
    spans,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention to tiles in which a token can need every dimension, or can be one that is not seen.

    Args:
        spans: begin and end of those before the inner tiles, then of those behind.
    """
    query_ptr, _, mask_ptr = chosen
    key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, channel_scale_ptr, channel_mean_ptr = stored
    scaling, softcap, first_seen, length, exact_before, exact_from = limits
    largest, total, output = state
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, KEPT_PADDED)
    heads = tl.arange(0, ROWS)
    query = tl.load(
        query_ptr + heads[:, None] * KEPT + dim[None, :],
        (heads < GROUP)[:, None] & (dim < KEPT)[None, :],
        0.0,
        cache_modifier=".cg",
    )
    narrow = query
    if mask_ptr is not None:
        flags = tl.load(mask_ptr + dim, dim < KEPT, 0, cache_modifier=".cg")
        narrow = tl.where((flags == 0)[None, :], 0.0, query).to(query.dtype)
    before = spans[1] - spans[0]
    for edge in tl.range(0, before + spans[3] - spans[2], num_stages=1):
        tile = tl.where(edge < before, spans[0] + edge, spans[2] + edge - before)
        position = tile * TILE + tokens
        seen = (position >= first_seen) & (position < length)
        page = pages_of(lookup, tile, BLOCK)
        # Of whole pages, so that tokens are read together: what is not seen of them is no key, and may be anything.
        exists = (dim < KEPT)[:, None] & (tile * TILE + tokens // BLOCK * BLOCK < length)[None, :]
        keys = tl.load(
            key_ptr + (page + tokens % BLOCK)[None, :] + dim[:, None] * BLOCK, exists, 0, cache_modifier=".cg"
        )
        there = exists & seen[None, :]
        values = tl.load(
            value_ptr + (page + tokens % BLOCK * VALUE_DIM)[:, None] + columns[None, :],
            seen[:, None] & (columns < VALUE_DIM)[None, :],
            0,
            cache_modifier=".cg",
        )
        value_scales = None
        if key_scales_ptr is None:
            keys = tl.where(there, keys, 0.0).to(query.dtype)
        else:
            scales_at = page // 2 + tokens % BLOCK
            scales = tl.load(key_scales_ptr + scales_at, seen, 0.0, cache_modifier=".cg").to(tl.float32)
            channel_scale = tl.load(channel_scale_ptr + dim, dim < KEPT, 0.0)
            channel_mean = tl.load(channel_mean_ptr + dim, dim < KEPT, 0.0)
            wide = (keys.to(tl.float32) - 128) * scales[None, :] * channel_scale[:, None] + channel_mean[:, None]
            keys = tl.where(there, wide, 0.0).to(query.dtype)
            values = tl.where(seen[:, None], values.to(tl.float32) - 128, 0.0).to(tl.float16)
            value_scales = (
                tl.load(value_scales_ptr + scales_at, seen, 0.0, cache_modifier=".cg").to(tl.float32) * VALUE_UNIT
            )
        scores = tl.dot(query, keys, input_precision="ieee")
        if mask_ptr is not None:
            exact = (position < exact_before) | (position >= exact_from)
            scores = tl.where(exact[None, :], scores, tl.dot(narrow, keys, input_precision="ieee"))
        scores = tl.where(seen[None, :], limited(scores * scaling, softcap), float("-inf"))
        largest, total, output = online_softmax(scores, values, value_scales, largest, total, output, "ieee")
    return largest, total, output


@triton.jit
def inner_tiles(
    chosen,
    stored,
    lookup,
    state,
    limits,
    begin,
    end,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Attention to full tiles with the chosen dimensions."""
    if stored[2] is None:
        state = plain_tiles(
            chosen,
            stored,
            lookup,
            state,
            limits,
            begin,
            end,
            GROUP,
            ROWS,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            CHOSEN,
            DIMS_AT_ONCE,
            BLOCK,
        )
    else:
        # In one product: codes become numbers once.
        DIMS_PADDED: tl.constexpr = triton.next_power_of_2(CHOSEN) if CHOSEN > LEAST else LEAST
        state = quantized_tiles(
            chosen,
            stored,
            lookup,
            state,
            limits,
            begin,
            end,
            GROUP,
            ROWS,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            CHOSEN,
            DIMS_PADDED,
            BLOCK,
            ASSEMBLY,
        )
    return state


@triton.jit
def plain_tiles(
    chosen,
    stored,
    lookup,
    state,
    limits,
    begin,
    end,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`inner_tiles` over numbers of 16 or 32 bits."""
    query_ptr, dims_ptr, _ = chosen
    key_ptr, value_ptr = stored[:2]
    scaling, softcap = limits[0], limits[1]
    largest, total, output = state
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, KEPT_PADDED)
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    if dims_ptr is None:
        query = tl.load(
            query_ptr + heads[:, None] * KEPT + dim[None, :],
            inside[:, None] & (dim < KEPT)[None, :],
            0.0,
            cache_modifier=".cg",
        )
    # Looked up a tile ahead: loads that wait for a look-up in the same turn are asked for one tile ahead only.
    page = pages_of(lookup, begin, BLOCK)
    for tile in range(begin, end):
        keys_at = key_ptr + (page + tokens % BLOCK)[None, :]
        if dims_ptr is None:
            if KEPT == KEPT_PADDED:
                keys = tl.load(keys_at + dim[:, None] * BLOCK)
            else:
                keys = tl.load(keys_at + dim[:, None] * BLOCK, (dim[:, None] < KEPT) & (tokens[None, :] >= 0), 0.0)
            scores = tl.dot(query, keys, input_precision="ieee")
        else:
            scores = tl.zeros([ROWS, TILE], tl.float32)
            for start in tl.static_range(0, CHOSEN, DIMS_AT_ONCE):
                indices = start + tl.arange(0, DIMS_AT_ONCE)
                some = tl.load(dims_ptr + indices, indices < CHOSEN, 0, cache_modifier=".cg")
                queries = tl.load(
                    query_ptr + heads[:, None] * KEPT + some[None, :],
                    inside[:, None] & (indices < CHOSEN)[None, :],
                    0.0,
                    cache_modifier=".cg",
                )
                # Where their number is no multiple, the rest is dimension 0 again, times zero.
                keys = tl.load(keys_at + some[:, None] * BLOCK)
                scores = tl.dot(queries, keys, scores, input_precision="ieee")
        values_at = value_ptr + (page + tokens % BLOCK * VALUE_DIM)[:, None] + columns[None, :]
        if VALUE_DIM == VALUE_PADDED:
            values = tl.load(values_at)
        else:
            values = tl.load(values_at, (tokens[:, None] >= 0) & (columns < VALUE_DIM)[None, :], 0.0)
        page = pages_of(lookup, tl.minimum(tile + 1, end - 1), BLOCK)
        scores = limited(scores * scaling, softcap)
        largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")
    return largest, total, output


@triton.jit
def quantized_tiles(
    chosen,
    stored,
    lookup,
    state,
    limits,
    begin,
    end,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIMS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """`inner_tiles` over codes of 8 bits, in the way of the function of that name in `decode_int8`."""
    query_ptr, dims_ptr, mask_ptr = chosen
    key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, channel_scale_ptr, channel_mean_ptr = stored
    scaling, softcap = limits[0], limits[1]
    largest, total, output = state
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, KEPT_PADDED)
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    query_at = query_ptr + heads[:, None] * KEPT
    query = tl.load(query_at + dim[None, :], inside[:, None] & (dim < KEPT)[None, :], 0.0, cache_modifier=".cg").to(
        tl.float32
    )
    if mask_ptr is not None:
        query = tl.where((tl.load(mask_ptr + dim, dim < KEPT, 0, cache_modifier=".cg") == 0)[None, :], 0.0, query)
    # Scales and means of channels go into the query, which is made small enough for float16.
    mean = tl.sum(query * tl.load(channel_mean_ptr + dim, dim < KEPT, 0.0)[None, :], 1) * scaling
    peak = tl.max(tl.abs(query * tl.load(channel_scale_ptr + dim, dim < KEPT, 0.0)[None, :]), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    indices = tl.arange(0, DIMS_PADDED)
    taken = indices < CHOSEN
    dims = indices
    if dims_ptr is not None:
        dims = tl.load(dims_ptr + indices, taken, 0, cache_modifier=".cg")
    query = tl.load(query_at + dims[None, :], inside[:, None] & taken[None, :], 0.0, cache_modifier=".cg").to(
        tl.float32
    )
    channel_scale = tl.load(channel_scale_ptr + dims, taken, 0.0)
    query = (query * channel_scale[None, :] / peak[:, None]).to(tl.float16)
    unit = peak * scaling
    # Scales are read ahead, too: they are too small for the compiler to do it.
    page = pages_of(lookup, begin, BLOCK)
    scales_at, there = page // 2 + tokens % BLOCK, begin + tl.zeros_like(tokens) < end
    key_scales = tl.load(key_scales_ptr + scales_at, there, 0.0, cache_modifier=".cg")
    value_scales = tl.load(value_scales_ptr + scales_at, there, 0.0, cache_modifier=".cg")
    for tile in range(begin, end):
        keys_at = key_ptr + (page + tokens % BLOCK)[None, :] + dims[:, None] * BLOCK
        if DIMS_PADDED == CHOSEN:
            keys = tl.load(keys_at)
        else:
            keys = tl.load(keys_at, taken[:, None] & (tokens[None, :] >= 0), 0)
        values_at = value_ptr + (page + tokens % BLOCK * VALUE_DIM)[:, None] + columns[None, :]
        if VALUE_DIM == VALUE_PADDED:
            values = tl.load(values_at)
        else:
            values = tl.load(values_at, (tokens[:, None] >= 0) & (columns < VALUE_DIM)[None, :], 0)
        scores = tl.dot(query, decoded(keys, ASSEMBLY)) * (unit[:, None] * key_scales.to(tl.float32)[None, :])
        scores = limited(scores + mean[:, None], softcap)
        weights = value_scales.to(tl.float32) * VALUE_UNIT
        page = pages_of(lookup, tl.minimum(tile + 1, end - 1), BLOCK)
        scales_at = page // 2 + tokens % BLOCK
        key_scales = tl.load(key_scales_ptr + scales_at, cache_modifier=".cg")
        value_scales = tl.load(value_scales_ptr + scales_at, cache_modifier=".cg")
        largest, total, output = online_softmax(
            scores, decoded(values, ASSEMBLY), weights, largest, total, output, "ieee"
        )
    return largest, total, output
