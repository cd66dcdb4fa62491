# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Decoding over tiles of 8-bit codes.

Scales and means of channels go into the few queries, scales of tokens into scores and weights, so that a code only has
to become a number. Products of tensor cores take no bytes by row: the numbers go through shared memory once more, which
`decode_int8_mma` avoids where it can be used.
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

VALUE_UNIT = tl.constexpr(256.0)
"""Scales of values are multiplied by this, so that weights times scales seldom are too small for float16."""


@triton.jit
def decoded(codes, ASSEMBLY: tl.constexpr):
    """Codes as numbers in float16, 128 as zero: exact."""
    if ASSEMBLY:
        # A byte as the low bits of 1024 makes a number without converting any. Said to be impure, or the compiler does
        # this after it has rearranged the bytes one by one.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 zero;
            mov.b32 zero, 0x64806480;
            prmt.b32 $0, $2, 0x64646464, 0x4140;
            prmt.b32 $1, $2, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, zero;
            sub.f16x2 $1, $1, zero;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    return (codes.to(tl.float32) - 128).to(tl.float16)


@triton.jit
def quantized_tiles(
    chosen,
    stored,
    lookup,
    parts,
    scaling,
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
    """Attention to the tiles from `begin` to before `end`, with the chosen dimensions."""
    query_ptr, dims_ptr, mask_ptr, counts_ptr = chosen
    tiles_ptr, values_ptr, key_scales_ptr, value_scales_ptr, channel_scale_ptr, channel_mean_ptr = stored
    block_table_ptr, table_width, first_block, block_stride = lookup
    partial_ptr, lse_ptr, scores_ptr, split, splits, first_head, count = parts
    tokens, dim = tl.arange(0, TILE), tl.arange(0, KEPT_PADDED)
    heads = tl.arange(0, ROWS)
    inside = heads < GROUP
    query_at = query_ptr + heads[:, None] * KEPT
    query = tl.load(query_at + dim[None, :], inside[:, None] & (dim[None, :] < KEPT), 0.0).to(tl.float32)
    if mask_ptr is not None:
        query = tl.where((tl.load(mask_ptr + dim, dim < KEPT, 0) == 0)[None, :], 0.0, query)
    mean = tl.sum(query * tl.load(channel_mean_ptr + dim, dim < KEPT, 0.0)[None, :], 1) * scaling
    # The query is made small enough for float16.
    peak = tl.max(tl.abs(query * tl.load(channel_scale_ptr + dim, dim < KEPT, 0.0)[None, :]), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    unit = peak * scaling
    indices = tl.arange(0, DIMS_AT_ONCE)
    limit = CHOSEN
    if counts_ptr is not None:
        limit = tl.load(counts_ptr)
    dims = indices
    if dims_ptr is not None:
        dims = tl.load(dims_ptr + indices, indices < limit, 0)
    taken = indices < limit
    query = tl.load(query_at + dims[None, :], inside[:, None] & taken[None, :], 0.0).to(tl.float32)
    scale = tl.load(channel_scale_ptr + dims, taken, 0.0)
    query = (query * scale[None, :] / peak[:, None]).to(tl.float16)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    wanted = taken[:, None] & (tokens[None, :] >= 0)
    columns = tl.arange(0, VALUE_PADDED)
    values_wanted = (tokens[:, None] >= 0) & (columns < VALUE_DIM)[None, :]
    # Scales are too small for the compiler to load ahead.
    block_ids = token_blocks(block_table_ptr, first_block, block_stride, begin, table_width, BLOCK)
    is_tile = begin * TILE + tokens < end * TILE
    next_key_scales = tl.load(token_pointers(key_scales_ptr, block_table_ptr, block_ids, 1, BLOCK), is_tile, 0.0)
    next_value_scales = tl.load(token_pointers(value_scales_ptr, block_table_ptr, block_ids, 1, BLOCK), is_tile, 0.0)
    for tile in range(begin, end):
        block_ids = token_blocks(block_table_ptr, first_block, block_stride, tile, table_width, BLOCK)
        keys_at = key_pointers(tiles_ptr, block_table_ptr, block_ids, dims, KEPT, BLOCK)
        if counts_ptr is None and DIMS_AT_ONCE == CHOSEN:  # noqa: SIM108 (known when compiling)
            keys = tl.load(keys_at)
        else:
            keys = tl.load(keys_at, wanted, 0)
        key_scales, value_scales = next_key_scales.to(tl.float32), next_value_scales.to(tl.float32) * VALUE_UNIT
        scores = tl.dot(query, decoded(keys, ASSEMBLY)) * (unit[:, None] * key_scales[None, :]) + mean[:, None]
        values_at = token_pointers(values_ptr, block_table_ptr, block_ids, VALUE_DIM, BLOCK)[:, None] + columns[None, :]
        if VALUE_DIM == VALUE_PADDED:  # noqa: SIM108
            values = tl.load(values_at)
        else:
            values = tl.load(values_at, values_wanted, 0)
        block_ids = token_blocks(
            block_table_ptr, first_block, block_stride, tl.minimum(tile + 1, end - 1), table_width, BLOCK
        )
        next_key_scales = tl.load(token_pointers(key_scales_ptr, block_table_ptr, block_ids, 1, BLOCK))
        next_value_scales = tl.load(token_pointers(value_scales_ptr, block_table_ptr, block_ids, 1, BLOCK))
        if scores_ptr is not None:
            there = inside[:, None] & (tokens[None, :] >= 0)
            scores_at = scores_ptr + (first_head + heads[:, None]) * count * TILE + tile * TILE + tokens[None, :]
            tl.store(scores_at, scores, there)
        largest, total, output = online_softmax(
            scores, decoded(values, ASSEMBLY), value_scales, largest, total, output, "ieee"
        )
    at = (first_head + heads) * splits + split
    store_part(
        partial_ptr, lse_ptr, at, largest, total, output / VALUE_UNIT, inside, tl.arange(0, VALUE_PADDED), VALUE_DIM
    )
