# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Filling a tiled cache with a prompt on a GPU: tiles, tail and values in one pass, without waiting for the GPU."""

import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import (
    TILE,
    CacheArguments,
    cache_constants,
    key_pointers,
    on_device_of,
    token_blocks,
    token_pointers,
)
from aqua_attention.ops.backends.triton.prepare import quantized
from aqua_attention.ops.backends.triton.rotate import by_token
from aqua_attention.ops.layout import TILE as TOKENS
from aqua_attention.ops.layout import TiledCache

WARPS = 8


def fill(cache: TiledCache, keys: Tensor, values: Tensor, lengths: Tensor, order: Tensor | None = None) -> None:
    """`Backend.fill`. Lengths and order are not looked at: they must be right.

    Raises:
        AquaError: keys and values that do not fit the cache.
    """
    cache.check_prompt(keys, values)
    cache.lengths.copy_(lengths)
    batch, kv_heads, length, _ = keys.shape
    keys, values = by_token(keys), by_token(values)
    with on_device_of(keys):
        _fill[(triton.cdiv(length, TOKENS), kv_heads, batch)](
            keys,
            values,
            None if order is None else order.contiguous(),
            CacheArguments.of(cache),
            *keys.stride()[:3],
            *values.stride()[:3],
            length,
            num_warps=WARPS,
            **cache_constants(cache, 1),
        )


@triton.jit
def _fill(
    key_ptr,
    value_ptr,
    order_ptr,
    cache,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    length,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dims, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    tokens = tile * TILE + tl.arange(0, TILE)
    count = tl.load(cache.lengths + row)
    there = tokens < count
    # Blocks are written to their end, as the plain path does; behind it there may be no block.
    written = tokens < tl.cdiv(count, BLOCK) * BLOCK
    source = tokens.to(tl.int64)
    if order_ptr is not None:
        source = tl.load(order_ptr + row * length + tokens, there, 0).to(tl.int64)
    if tile * TILE < count:
        first_block = row * cache.row_stride + group * cache.head_stride
        block_table_ptr, scale_ptr, mean_ptr = cache.block_table, cache.channel_scale, cache.channel_mean
        if block_table_ptr is not None:
            block_table_ptr += row * cache.table_width
        block_ids = token_blocks(block_table_ptr, first_block, cache.block_stride, tile, cache.table_width, BLOCK)
        column = (dims < KEPT)[:, None]
        keys = tl.load(
            key_ptr + row * key_batch + group * key_head + source[None, :] * key_token + dims[:, None],
            there[None, :] & column,
            0.0,
        )
        # The last tokens are also held as they came.
        done = tl.maximum((count - 1) // TILE - 1, 0) * TILE
        place = row * tl.num_programs(1) + group
        slots = (place * 2 * TILE + tokens % (2 * TILE)) * KEPT
        tl.store(cache.tail + slots[None, :] + dims[:, None], keys, (there & (tokens >= done))[None, :] & column)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + group * KEPT + dims, dims < KEPT, 1.0)
            mean = tl.load(mean_ptr + group * KEPT + dims, dims < KEPT, 0.0)
            codes, scales = quantized((keys.to(tl.float32) - mean[:, None]) / scale[:, None], 0)
            tl.store(token_pointers(cache.key_scales, block_table_ptr, block_ids, 1, BLOCK), scales, written)
        else:
            codes = keys
        tiles = key_pointers(cache.tiles, block_table_ptr, block_ids, dims, KEPT, BLOCK)
        tl.store(tiles, codes, written[None, :] & column)
        given = (columns < VALUE_DIM)[None, :]
        values = tl.load(
            value_ptr + row * value_batch + group * value_head + source[:, None] * value_token + columns[None, :],
            there[:, None] & given,
            0.0,
        )
        if scale_ptr is not None:
            value_codes, scales = quantized(values.to(tl.float32), 1)
            tl.store(token_pointers(cache.value_scales, block_table_ptr, block_ids, 1, BLOCK), scales, written)
        else:
            value_codes = values
        held = token_pointers(cache.value_tiles, block_table_ptr, block_ids, VALUE_DIM, BLOCK)
        tl.store(held[:, None] + columns[None, :], value_codes, written[:, None] & given)
