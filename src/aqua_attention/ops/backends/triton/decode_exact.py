# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Decoding over a block in which tokens can need every dimension.

What `prepare` of the same step does not write is read before it has ended: all but the new token and a tile that is
being moved. It is read past the cache of this processor, which may hold what lay there before an earlier step.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import (
    TILE,
    key_pointers,
    online_softmax,
    store_part,
    token_blocks,
    token_pointers,
)
from aqua_attention.ops.backends.triton.decode_int8 import VALUE_UNIT


@triton.jit
def exact_block(
    chosen,
    tail_ptr,
    stored,
    lookup,
    parts,
    scaling,
    sink,
    recent,
    length,
    done,
    GROUP: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    APPENDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention to the first tile, or to a half of the tail.

    Where dimensions are chosen, each head has two rows: one sees the exact window with every dimension, one the other
    tokens with the chosen ones: so one matrix product does.
    """
    query_ptr, _, mask_ptr, _ = chosen
    tiles_ptr, values_ptr, key_scales_ptr, value_scales_ptr, channel_scale_ptr, channel_mean_ptr = stored
    block_table_ptr, table_width, first_block, block_stride = lookup
    partial_ptr, lse_ptr, scores_ptr, split, splits, first_head, count = parts
    tokens, columns, dim = tl.arange(0, TILE), tl.arange(0, VALUE_PADDED), tl.arange(0, KEPT_PADDED)
    column = columns < VALUE_DIM
    rows = tl.arange(0, ROWS)
    member, is_narrow = rows % (ROWS // COPIES), rows >= ROWS // COPIES
    inside = member < GROUP
    tile = tl.where(split == 0, 0, done + split - 1)
    position = tile * TILE + tokens
    seen = position < tl.where((split == 0) & (done == 0), 0, length)
    # Without the new token, which is being written.
    old = seen & (position < length - APPENDED)
    there = (dim[:, None] < KEPT) & old[None, :]
    block_ids = token_blocks(block_table_ptr, first_block, block_stride, tile, table_width, BLOCK)
    if split == 0:
        if EARLY:  # noqa: SIM102 (this is known when compiling, the other is not)
            if length == 2 * TILE + 1:
                # The first tile is being moved from the tail.
                tl.extra.cuda.gdc_wait()
        keys = tl.load(
            key_pointers(tiles_ptr, block_table_ptr, block_ids, dim, KEPT, BLOCK), there, 0, cache_modifier=".cg"
        )
        if key_scales_ptr is not None:
            scales = tl.load(
                token_pointers(key_scales_ptr, block_table_ptr, block_ids, 1, BLOCK),
                old,
                0.0,
                cache_modifier=".cg",
            )
            scale, mean = (
                tl.load(channel_scale_ptr + dim, dim < KEPT, 0.0),
                tl.load(channel_mean_ptr + dim, dim < KEPT, 0.0),
            )
            wide = (keys.to(tl.float32) - 128) * scales[None, :].to(tl.float32)
            wide = wide * scale[:, None] + mean[:, None]
            keys = tl.where(there, wide, 0.0).to(tail_ptr.dtype.element_ty)
    else:
        keys = tl.load(
            tail_ptr + (position % (2 * TILE))[None, :] * KEPT + dim[:, None], there, 0.0, cache_modifier=".cg"
        )
    values_at = token_pointers(values_ptr, block_table_ptr, block_ids, VALUE_DIM, BLOCK)[:, None] + columns[None, :]
    values = tl.load(values_at, old[:, None] & column[None, :], 0, cache_modifier=".cg")
    value_scales = None
    if value_scales_ptr is not None:
        values = (values.to(tl.float32) - 128).to(tl.float16)
        scales = tl.load(
            token_pointers(value_scales_ptr, block_table_ptr, block_ids, 1, BLOCK), old, 0.0, cache_modifier=".cg"
        )
        value_scales = scales.to(tl.float32) * VALUE_UNIT
    if EARLY:
        tl.extra.cuda.gdc_wait()
    query = tl.load(
        query_ptr + member[:, None] * KEPT + dim[None, :],
        inside[:, None] & (dim[None, :] < KEPT),
        0.0,
        cache_modifier=".cg",
    )
    visible = inside[:, None] & seen[None, :]
    if COPIES == 2:
        flags = tl.load(mask_ptr + dim, dim < KEPT, 0, cache_modifier=".cg")
        query = tl.where(is_narrow[:, None] & (flags == 0)[None, :], 0.0, query).to(query.dtype)
        exact = (position < sink) | (position >= length - recent)
        visible = visible & (exact[None, :] != is_narrow[:, None])
    scores = tl.dot(query, keys, input_precision="ieee")
    is_new = (position == length - APPENDED) & seen
    if APPENDED:
        key = tl.load(tail_ptr + (length - 1) % (2 * TILE) * KEPT + dim, dim < KEPT, 0.0, cache_modifier=".cg")
        score = tl.sum(query.to(tl.float32) * key[None, :].to(tl.float32), 1)
        scores = tl.where(is_new[None, :], score[:, None], scores)
    scores = tl.where(visible, scores * scaling, float("-inf"))
    if scores_ptr is not None:
        tl.store(scores_ptr + (first_head + member[:, None]) * count * TILE + position[None, :], scores, visible)
    largest, total, output = online_softmax(
        scores,
        values,
        value_scales,
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, VALUE_PADDED], tl.float32),
        "ieee",
    )
    if APPENDED:
        weight = tl.sum(tl.where(is_new[None, :] & visible, tl.exp2(scores - largest[:, None]), 0.0), 1)
        page = (length - 1) // BLOCK
        if block_table_ptr is not None:
            page = tl.load(block_table_ptr + page)
        newest = (first_block + page.to(tl.int64) * block_stride) * BLOCK + (length - 1) % BLOCK
        value = tl.load(values_ptr + newest * VALUE_DIM + columns, column, 0, cache_modifier=".cg")
        if value_scales_ptr is None:
            value = value.to(tl.float32)
        else:
            value = (
                (value.to(tl.float32) - 128)
                * tl.load(value_scales_ptr + newest, cache_modifier=".cg").to(tl.float32)
                * VALUE_UNIT
            )
        # Nothing, not NaN, where a token that is not seen has an infinite value.
        output += tl.where(weight[:, None] != 0, weight[:, None] * value[None, :], 0.0)
    if COPIES == 2:
        # The two rows of a head lie in the same threads.
        largest = tl.reshape(largest, [2, ROWS // 2])
        both = tl.max(largest, 0)
        share = tl.exp2(largest - tl.where(both == float("-inf"), 0.0, both)[None, :])
        largest, total = both, tl.sum(tl.reshape(total, [2, ROWS // 2]) * share, 0)
        output = tl.sum(tl.reshape(output, [2, ROWS // 2, VALUE_PADDED]) * share[:, :, None], 0)
        member = tl.arange(0, ROWS // 2)
    if value_scales_ptr is not None:
        output *= 1 / VALUE_UNIT
    at = (first_head + member) * splits + split
    store_part(partial_ptr, lse_ptr, at, largest, total, output, member < GROUP, columns, VALUE_DIM)
