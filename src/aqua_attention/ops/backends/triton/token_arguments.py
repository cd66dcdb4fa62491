# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What the kernels that choose tokens are given of a cache, or of pages, and where in these a token lies."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import TILE as TOKENS
from aqua_attention.ops.layout import TILE
from aqua_attention.ops.scored import ScoredCache
from aqua_attention.ops.scored_pages import COPY_BYTES, PagedSequences

Sequences = ScoredCache | PagedSequences


class ScoredArguments(NamedTuple):
    """What kernels are given of a `ScoredCache`, or of pages, as one argument. A place is a sequence and head.

    A block is a tile, or the page of one head. Scales of keys are those of the codes where both have 8 bits. Strides
    count blocks; `key_block` and others are elements from the keys, values, codes and scales of a block to those of the
    next. The block table is of pages, `table_width` from a row of it to the next.
    """

    keys: Tensor
    value_tokens: Tensor  # a tuple of triton's has `values` of its own
    codes: Tensor
    scales: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    channel_scale: Tensor
    channel_mean: Tensor
    lengths: Tensor
    block_table: Tensor | None
    tile_count: int
    max_length: int
    table_width: int
    row_stride: int
    head_stride: int
    block_stride: int
    key_block: int
    value_block: int
    code_block: int
    scale_block: int

    @staticmethod
    def of(cache: Sequences) -> ScoredArguments:
        """Those of a cache, whose tensors are never replaced, or of pages."""
        if isinstance(cache, PagedSequences):
            return ScoredArguments._of_pages(cache)
        (_, kv_heads, kept, value_dim, tiles), states = (
            cache.shape,
            (cache.keys, cache.values, cache.codes, cache.scales, cache.key_scales, cache.value_scales),
        )
        numbers = tiles, cache.max_length, 0, kv_heads * tiles, tiles, 1
        sizes = kept * TILE, value_dim * TILE, kept * TILE * cache.score_bits // 8, TILE
        return ScoredArguments(*states, *cache.quantization, cache.lengths, None, *numbers, *sizes)

    @staticmethod
    def _of_pages(cache: PagedSequences) -> ScoredArguments:
        pages, table = cache.pages, cache.block_table
        block, head = pages.storage.stride()[:2]
        states = pages.keys, pages.values, pages.codes, pages.scales, None, None
        numbers = cache.tiles, cache.tiles * TILE, table.stride(0), 0, 1, block // head
        size = head * pages.storage.element_size()
        return ScoredArguments(
            *states, *pages.scoring, cache.lengths, table, *numbers, head, head, size, size // COPY_BYTES
        )


@triton.jit
def first_block(cache, row, group):
    """The block at which a sequence and head begins."""
    return row.to(tl.int64) * cache.row_stride + group.to(tl.int64) * cache.head_stride


@triton.jit
def seen_length(cache, row, APPENDED: tl.constexpr):
    """Tokens of a sequence, with the one that was just written. Not through the cache of this processor, where what was
    before may lie.
    """
    held = tl.load(cache.lengths + row, cache_modifier=".cg")
    return tl.where(held < 0, 0, tl.minimum(held + APPENDED, cache.max_length))


@triton.jit
def token_places(cache, row, first, tokens, is_token, BLOCK: tl.constexpr):
    """The blocks of tokens of a sequence and head, and their places in these; without pages all count from the first.

    Where there is no token it is a page of somebody's, which there is.
    """
    if cache.block_table is None:
        blocks, places = first, tokens
    else:
        at = row.to(tl.int64) * cache.table_width + tokens // BLOCK
        blocks = tl.load(cache.block_table + at, is_token, 0, cache_modifier=".cg").to(tl.int64)
        blocks, places = first + blocks * cache.block_stride, tokens % BLOCK
    return blocks, places


@triton.jit
def code_pointers(
    cache, row, first, tiles, dims, tokens, length, DIM: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """Where the codes of dimensions of tiles lie; arguments broadcast to one shape. In 4 bits two tokens are one, and
    there are no pages.
    """
    if cache.block_table is None:
        RUN: tl.constexpr = BLOCK * BITS // 8
        pointers = cache.codes + (first + tiles * cache.block_stride) * (DIM * RUN) + dims * RUN + tokens
    else:
        position = tiles * TOKENS + tokens
        blocks, places = token_places(cache, row, first, position, position < length, BLOCK)
        pointers = cache.codes + blocks * cache.code_block + dims * BLOCK + places
    return pointers


@triton.jit
def start_early(EARLY: tl.constexpr):
    """Wait for the kernel before this one, and with 2 let the next be put on the GPU. A kernel that is launched early
    waits first, so that it finds what any before it has written.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if EARLY == 2:
        tl.extra.cuda.gdc_launch_dependents()
