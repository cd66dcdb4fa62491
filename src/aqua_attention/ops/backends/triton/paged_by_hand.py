# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Decoding over pages of 8-bit codes where inner tiles are those of the kernel with registers placed by hand.

Three launches, as `decode` has them over tiled caches: that kernel, then the edges of every sequence, then the merge.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import (
    LOG2_E,
    TILE,
    CacheArguments,
    on_device_of,
    padded,
    starts_early,
)
from aqua_attention.ops.backends.triton.decode import BY_HAND, FEW_WARPS, splits_by_hand
from aqua_attention.ops.backends.triton.decode_int8_mma import decode_quantized_kernel
from aqua_attention.ops.backends.triton.decode_merge import merge_kernel, merging
from aqua_attention.ops.backends.triton.paged import PageArguments, page_constants
from aqua_attention.ops.backends.triton.paged_decode import attend_part
from aqua_attention.ops.layout import TILE as TILE_TOKENS
from aqua_attention.ops.layout import Chosen
from aqua_attention.ops.pages import PagedCache, PagedLayer, Step


def decode_by_hand(
    query: Tensor, chosen: Chosen | None, cache: PagedCache, layer: PagedLayer, step: Step, output: Tensor
) -> None:
    """`decode_paged` where `is_by_hand` says so."""
    (batch, heads, kept), kv_heads, plan = query.shape, cache.num_key_value_heads, layer.plan
    group, table, pages = heads // kv_heads, step.block_table, PageArguments.of(cache)
    tiles = -(-table.shape[1] * cache.block_size // TILE_TOKENS)
    splits = splits_by_hand(batch * kv_heads, tiles, query)
    window = (0, 0, 0) if chosen is None or plan is None else (plan.sink, plan.recent, plan.min_length)
    dims, mask = (None, None) if chosen is None else chosen[:2]
    partial = query.new_empty((batch, heads, 1 + splits, cache.value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, 1 + splits), dtype=torch.float32)
    words, scaling, constants = (
        [_words(each) for each in pages[:2]],
        layer.scaling * LOG2_E,
        page_constants(cache, group),
    )
    # Pages are numbered by head, and a page is so many bytes.
    size, of_page = pages.head_stride, pages.block_stride // pages.head_stride
    arguments = CacheArguments(
        words[0], query, words[1], *pages[2:6], table, step.lengths, tiles, table.stride(0), 0, 1, of_page
    )
    early = starts_early(query)
    with on_device_of(query):
        decode_quantized_kernel[(splits, kv_heads, batch)](
            query,
            dims,
            None,
            arguments,
            partial,
            lse,
            None,
            scaling,
            1,
            window,
            APPENDED=False,
            GROUP=group,
            KEPT=kept,
            VALUE_DIM=cache.value_dim,
            CHOSEN=kept if dims is None else dims.shape[-1],
            BLOCK=cache.block_size,
            KEY_SIZE=size // 4,
            VALUE_SIZE=size // 4,
            SCALE_SIZE=size // 2,
            EARLY=early["EARLY"],
            **BY_HAND,
        )
        _edges[(kv_heads, batch)](
            query,
            dims,
            mask,
            pages,
            step.lengths,
            table,
            partial,
            lse,
            query.stride(0),
            table.stride(0),
            table.shape[1],
            scaling,
            *window[:2],
            window[2] or None,
            1 + splits,
            HEADS=kv_heads,
            ROWS=padded(group),
            CHOSEN=kept if dims is None else dims.shape[-1],
            ASSEMBLY=query.is_cuda,
            num_warps=FEW_WARPS,
            **constants,
            **early,
        )
        merge_kernel[(kv_heads, batch)](
            partial,
            lse,
            output,
            None,
            step.lengths,
            1 + splits,
            0,
            APPENDED=False,
            **{name: constants[name] for name in ("GROUP", "VALUE_DIM", "VALUE_PADDED")},
            **merging(group, 1 + splits),
            **early,
        )


def _words(codes: Tensor) -> Tensor:
    """The first page of the first head as words of four codes: kernels take the address alone."""
    return codes[0, 0].flatten().view(torch.int32)


@triton.jit
def _edges(
    query_ptr,
    dims_ptr,
    mask_ptr,
    pages,
    lengths_ptr,
    block_table_ptr,
    partial_ptr,
    lse_ptr,
    query_stride,
    table_stride,
    table_width,
    scaling,
    sink,
    recent,
    min_length,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first part of a sequence and key-value head: all tiles that the other kernel leaves.

    With EARLY it starts when all programs of the inner tiles have, and ends when these have.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    group, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + row, cache_modifier=".cg")
    at = (row * HEADS + group).to(tl.int64) * GROUP * splits
    attend_part(
        (query_ptr, dims_ptr, mask_ptr),
        pages,
        (block_table_ptr, table_stride, table_width),
        (partial_ptr + at * VALUE_DIM, lse_ptr + at, splits, 0),
        (scaling, None, sink, recent, min_length, 0, length),
        row,
        group,
        0,
        tl.cdiv(length, TILE),
        query_stride,
        HEADS,
        GROUP,
        ROWS,
        KEPT,
        KEPT_PADDED,
        VALUE_DIM,
        VALUE_PADDED,
        CHOSEN,
        CHOSEN,
        BLOCK,
        ASSEMBLY,
        True,
    )
    if EARLY:
        tl.extra.cuda.gdc_wait()
