# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What several kernels share: sizes of blocks, early starts, rotations, and one step of an online softmax."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""Of triton. 3.4 cannot start kernels early, and below 3.6 there is no way to place registers by hand."""
LEAST_SIZE = 16
"""Rows and columns of a matrix product on tensor cores are padded to so many at least."""


def padded(size: int) -> int:
    """The size of a block that holds so many."""
    return max(LEAST_SIZE, int(triton.next_power_of_2(size)))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device, which need not be the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that a program can have; of an H100 where there is no GPU."""
    if not tensor.is_cuda:
        return 232_448
    return int(getattr(torch.cuda.get_device_properties(tensor.device), "shared_memory_per_block_optin", 99 << 10))


def starts_early(tensor: Tensor, wanted: bool = True) -> dict[str, bool]:
    """Options of a kernel that may be put on the GPU before the one ahead of it has ended, where GPUs can do that."""
    early = wanted and VERSION >= (3, 5) and tensor.device.type == "cuda"
    early = early and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"EARLY": early, "launch_pdl": early} if early else {"EARLY": False}


@triton.jit
def token_blocks(block_table_ptr, first, stride, tile, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The cell of a tile, see `ops.tiled`; with pages, that of each of its tokens, [TILE]."""
    if block_table_ptr is None:
        cells = first + tile * stride
    else:
        cells = first + tl.zeros([TILE], tl.int64)
        for part in tl.static_range(0, TILE // BLOCK):
            # One number for a page, and a hint: else its tokens would be looked up, and read, one by one.
            at = tile * (TILE // BLOCK) + part
            cell = first + tl.load(block_table_ptr + at, at < blocks, 0, cache_modifier=".cg").to(tl.int64) * stride
            cells = tl.where(tl.arange(0, TILE) // BLOCK == part, cell, cells)
        cells = tl.max_constancy(cells, BLOCK)
    return cells


@triton.jit
def key_pointers(
    tiles_ptr,
    block_table_ptr,
    cells,
    dims,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some dimensions of the tokens of a tile, [dims, TILE]."""
    tokens = tl.arange(0, TILE)
    if block_table_ptr is None:
        pointers = tiles_ptr + cells * (DIM * BLOCK) + dims[:, None] * BLOCK + tokens[None, :]
    else:
        pointers = tiles_ptr + (cells * (DIM * BLOCK) + tokens % BLOCK)[None, :] + dims[:, None] * BLOCK
    return pointers


@triton.jit
def token_pointers(pointer, block_table_ptr, cells, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """What belongs to the tokens of a tile, [TILE]: the first of WIDTH numbers of each."""
    tokens = tl.arange(0, TILE)
    if block_table_ptr is None:
        pointers = pointer + cells * (BLOCK * WIDTH) + tokens * WIDTH
    else:
        pointers = pointer + (cells * BLOCK + tokens % BLOCK) * WIDTH
    return pointers


@triton.jit
def online_softmax(scores, values, steps, largest, total, output, PRECISION: tl.constexpr):
    """One more block of an online softmax; scores are to the base 2. `steps`, if any, multiply a token's values."""
    now = tl.maximum(largest, tl.max(scores, 1))
    # A block in which nothing is visible must not make NaN of minus infinity less itself.
    safe = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(largest - safe)
    total = total * shrink + tl.sum(weights, 1)
    if steps is not None:
        weights = weights * steps[None, :]
    output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return now, total, output


@triton.jit
def store_part(partial_ptr, lse_ptr, at, largest, total, output, inside, columns, VALUE_DIM: tl.constexpr):
    """What one program found: the attention over its tokens, and their log-sum-exp."""
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(partial_ptr + at[:, None] * VALUE_DIM + columns[None, :], output, there)
    tl.store(lse_ptr + at, largest + tl.log2(total), inside)
