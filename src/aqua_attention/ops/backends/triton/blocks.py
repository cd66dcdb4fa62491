# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What several kernels share: what they are given of a cache, early starts, and one step of an online softmax.

Functions that kernels call take as one what belongs together. `stored`: pointers to tiles, values, scales of keys and
values, scales and means of channels. `lookup`: block table, its columns, first block and stride of a sequence and head.
`chosen`: queries, their dimensions as a list and as a mask, counts. `parts`: where results go, which part of how many
this is, the first head, tiles of a sequence.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops import layout
from aqua_attention.ops.layout import TiledCache

LOG2_E = 1.4426950408889634
"""Kernels take powers of 2: scores are multiplied by this."""
TILE = tl.constexpr(layout.TILE)
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""Of triton. 3.4 cannot start kernels early, and below 3.6 there is no way to place registers by hand."""
EARLY_STARTS = True
"""Whether kernels are launched before the one ahead of them has ended, where GPUs can do that."""
LEAST_SIZE = 16
"""Rows and columns of a matrix product on tensor cores are padded to so many at least."""


def padded(size: int) -> int:
    """The size of a block that holds so many."""
    return max(LEAST_SIZE, int(triton.next_power_of_2(size)))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device, which need not be the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def _gpu(device: torch.device) -> Any:
    """Its properties: asking torch takes the host microseconds in each step of each layer."""
    return torch.cuda.get_device_properties(device)


def sm_count(tensor: Tensor) -> int:
    """Streaming multiprocessors of the GPU; a number to go on with where there is none."""
    return int(_gpu(tensor.device).multi_processor_count) if tensor.is_cuda else 64


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that a program can have; of an H100 where there is no GPU."""
    if not tensor.is_cuda:
        return 232_448
    return int(getattr(_gpu(tensor.device), "shared_memory_per_block_optin", 99 << 10))


def starts_early(tensor: Tensor, wanted: bool = True) -> dict[str, int]:
    """Options of a kernel that may start early, see `EARLY_STARTS`. With EARLY 2 it lets the next be put on the GPU."""
    early = wanted and bool(EARLY_STARTS) and VERSION >= (3, 5) and tensor.device.type == "cuda"
    early = early and _gpu(tensor.device).major >= 9
    return {"EARLY": 2, "launch_pdl": True} if early else {"EARLY": 0}


class CacheArguments(NamedTuple):
    """What kernels are given of a `TiledCache`, as one argument: pointers, and numbers of blocks.

    A step launches as fast as with one argument each (`benchmarks/host_time.py`, at c32fb42 and later).
    """

    tiles: Tensor
    tail: Tensor
    value_tiles: Tensor  # a tuple of triton's has `values` of its own
    key_scales: Tensor | None
    value_scales: Tensor | None
    channel_scale: Tensor | None
    channel_mean: Tensor | None
    block_table: Tensor | None
    lengths: Tensor
    tile_count: int
    table_width: int
    row_stride: int
    head_stride: int
    block_stride: int

    @staticmethod
    def of(cache: TiledCache) -> CacheArguments:
        """Those of a cache, whose tensors are never replaced."""
        if cache.arguments is None:
            cache.arguments = CacheArguments._found(cache)
        found: CacheArguments = cache.arguments
        return found

    @staticmethod
    def _found(cache: TiledCache) -> CacheArguments:
        table = None if cache.pages is None else cache.pages.block_table
        states = cache.tiles, cache.tail, cache.values, cache.key_scales, cache.value_scales
        scale, mean = cache.quantization or (None, None)
        width = 0 if table is None else table.shape[1]
        return CacheArguments(*states, scale, mean, table, cache.lengths, cache.count, width, *cache.block_strides)


def cache_constants(cache: TiledCache, group: int) -> dict[str, int]:
    """What kernels over a cache know when they are compiled, for so many query heads of a key-value head."""
    _, _, kept, value_dim, _ = cache.shape
    return {
        "GROUP": group,
        "KEPT": kept,
        "KEPT_PADDED": padded(kept),
        "VALUE_DIM": value_dim,
        "VALUE_PADDED": padded(value_dim),
        "BLOCK": cache.block_size,
    }


@triton.jit
def token_blocks(block_table_ptr, first, stride, tile, table_width, BLOCK: tl.constexpr):
    """The block of a tile, see `ops.layout`; with pages, that of each of its tokens, [TILE]."""
    if block_table_ptr is None:
        block_ids = first + tile * stride
    else:
        block_ids = first + tl.zeros([TILE], tl.int64)
        for part in tl.static_range(0, TILE // BLOCK):
            # One number for a page, and a hint: else its tokens would be looked up, and read, one by one.
            at = tile * (TILE // BLOCK) + part
            block_id = (
                first + tl.load(block_table_ptr + at, at < table_width, 0, cache_modifier=".cg").to(tl.int64) * stride
            )
            block_ids = tl.where(tl.arange(0, TILE) // BLOCK == part, block_id, block_ids)
        block_ids = tl.max_constancy(block_ids, BLOCK)
    return block_ids


@triton.jit
def key_pointers(
    tiles_ptr,
    block_table_ptr,
    block_ids,
    dims,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some dimensions of the tokens of a tile, [dims, TILE]."""
    tokens = tl.arange(0, TILE)
    if block_table_ptr is None:
        pointers = tiles_ptr + block_ids * (DIM * BLOCK) + dims[:, None] * BLOCK + tokens[None, :]
    else:
        pointers = tiles_ptr + (block_ids * (DIM * BLOCK) + tokens % BLOCK)[None, :] + dims[:, None] * BLOCK
    return pointers


@triton.jit
def token_pointers(pointer, block_table_ptr, block_ids, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What belongs to the tokens of a tile, [TILE]: the first of WIDTH numbers of each."""
    tokens = tl.arange(0, TILE)
    if block_table_ptr is None:
        pointers = pointer + block_ids * (BLOCK * WIDTH) + tokens * WIDTH
    else:
        pointers = pointer + (block_ids * BLOCK + tokens % BLOCK) * WIDTH
    return pointers


@triton.jit
def softmax_block(scores, largest):
    """One more block of an online softmax, of scores to the base 2.

    Returns:
        The largest score now, the weights of the block, and what earlier sums are multiplied by.
    """
    now = tl.maximum(largest, tl.max(scores, 1))
    # A block in which nothing is visible must not make NaN of minus infinity less itself.
    safe = tl.where(now == float("-inf"), 0.0, now)
    return now, tl.exp2(scores - safe[:, None]), tl.exp2(largest - safe)


@triton.jit
def online_softmax(scores, values, scales, largest, total, output, PRECISION: tl.constexpr):
    """`softmax_block`, with the sum of weights and of the values. `scales`, if any, multiply a token's values."""
    now, weights, shrink = softmax_block(scores, largest)
    total = total * shrink + tl.sum(weights, 1)
    if scales is not None:
        weights = weights * scales[None, :]
    output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return now, total, output


@triton.jit
def store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM: tl.constexpr):
    """What one program found: the attention over its tokens, and their log-sum-exp."""
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(partial_ptr + at[:, None] * VALUE_DIM + columns[None, :], output, there)
    tl.store(lse_ptr + at, largest + tl.log2(total), inside)
