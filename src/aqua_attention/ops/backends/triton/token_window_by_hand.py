# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Scoring the exact window with every dimension, in Gluon: what one program does beside `token_scores_by_hand`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton.decode_int8_mma import HEADS, LEFT, MMA, RIGHT, query_operands


@gluon.jit
def score_window(
    query_ptr,
    channels,
    cache,
    scratch,
    lookup,
    part,
    splits,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    SINK: gl.constexpr,
    RECENT: gl.constexpr,
    BLOCK: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
):
    """Log-sum-exp of the exact window, with every dimension."""
    place, length, sink, recent, scaling = part
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    if cache.value_scales is not None:
        operands = query_operands(query_ptr, None, KEPT, *channels, scaling, GROUP, KEPT, KEPT)
    else:
        operands = plain_operands(query_ptr, scaling, GROUP, KEPT)
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    if SINK > 0:
        scores = scores_of_tokens(
            operands, cache, lookup, 0, gl.minimum(sink, length), KEPT, SINK, BLOCK, KEY_SIZE, SCALE_SIZE
        )
        largest, total = added(scores, largest, total)
    if RECENT > 0:
        start = gl.maximum(length - recent, sink)
        scores = scores_of_tokens(operands, cache, lookup, start, length, KEPT, RECENT, BLOCK, KEY_SIZE, SCALE_SIZE)
        largest, total = added(scores, largest, total)
    lse_ptr = scratch.part_lse + (place * GROUP + heads) * (splits + 1) + splits
    gl.store(lse_ptr, largest + gl.log2(total), heads < GROUP)


@gluon.jit
def added(scores, largest, total):
    """The largest, and the sum of powers relative to it, with those of more tokens."""
    now = gl.maximum(largest, gl.max(scores, 0))
    base = gl.where(now > float("-inf"), now, 0.0)
    return now, total * gl.exp2(largest - base) + gl.sum(gl.exp2(scores - base[None, :]), 0)


@gluon.jit
def scores_of_tokens(
    operands,
    cache,
    lookup,
    start,
    limit,
    KEPT: gl.constexpr,
    COUNT: gl.constexpr,
    BLOCK: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
):
    """Scores of COUNT tokens from `start` on by every dimension, [COUNT, HEADS]; behind `limit` minus infinity."""
    queries, unit, mean = operands
    position = start + gl.arange(0, COUNT, gl.SliceLayout(1, LEFT))
    blocks, places = places_of(lookup, position, position < limit, BLOCK)
    keys_at = blocks * KEY_SIZE + places * KEPT
    scores = gl.full([COUNT, HEADS], 0.0, gl.float32, MMA)
    for chunk in gl.static_range((KEPT + 15) // 16):
        dims = chunk * 16 + gl.arange(0, 16, gl.SliceLayout(0, LEFT))
        there = (position < limit)[:, None] & (dims < KEPT)[None, :]
        keys = gl.load(cache.keys + keys_at[:, None] + dims[None, :], there, 0, cache_modifier=".cg")
        if cache.value_scales is not None:
            keys = (keys.to(gl.float32) - 128).to(gl.float16)
        scores = mma_v2(keys, queries[chunk], scores)
    position = start + gl.arange(0, COUNT, gl.SliceLayout(1, MMA))
    if cache.value_scales is not None:
        blocks, places = places_of(lookup, position, position < limit, BLOCK)
        scales_at = blocks * SCALE_SIZE + places
        scales = gl.load(cache.key_scales + scales_at, position < limit, 0.0, cache_modifier=".cg").to(gl.float32)
        scores = scores * scales[:, None]
    scores = scores * unit[None, :] + mean[None, :]
    return gl.where((position < limit)[:, None], scores, float("-inf"))


@gluon.jit
def places_of(lookup, position, is_token, BLOCK: gl.constexpr):
    """The blocks of tokens of a sequence and head, and their places in these."""
    block_table_ptr, _width, first_block, block_stride = lookup
    blocks = position // BLOCK
    if block_table_ptr is not None:
        blocks = gl.load(block_table_ptr + blocks, is_token, 0, cache_modifier=".cg")
    return first_block + blocks.to(gl.int64) * block_stride, position % BLOCK


@gluon.jit
def plain_operands(query_ptr, scaling, GROUP: gl.constexpr, KEPT: gl.constexpr):
    """All dimensions of the queries of a group as right operands; what products are worth, and what is added: none."""
    at16 = gl.arange(0, 16, gl.SliceLayout(1, RIGHT))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT))
    queries = ()
    for chunk in gl.static_range((KEPT + 15) // 16):
        dims = chunk * 16 + at16
        there = (head < GROUP)[None, :] & (dims < KEPT)[:, None]
        query = gl.load(query_ptr + head[None, :] * KEPT + dims[:, None], there, 0.0, cache_modifier=".cg")
        queries = queries + (query,)  # noqa: RUF005
    unit = gl.full([HEADS], 1.0, gl.float32, gl.SliceLayout(0, MMA)) * scaling
    return queries, unit, gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
