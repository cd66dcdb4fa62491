# SPDX-License-Identifier: Apache-2.0
"""A whole decoding step with every dimension in one launch, for caches of few tokens.

At k = d nothing is selected, so one launch suffices. `prepare` and `decode` take two, and below some thousands of
tokens launches take most of the time. Here each program rotates the query itself, and only the one with the newest
tokens does anything with the key.
"""

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.blocks import (
    LOG2_E,
    CacheArguments,
    cache_constants,
    on_device_of,
    padded,
    shared_memory,
    starts_early,
)
from aqua_attention.ops.backends.triton.decode_merge import merging
from aqua_attention.ops.backends.triton.decode_short_kernel import decode_short_kernel
from aqua_attention.ops.backends.triton.turn import turning
from aqua_attention.ops.layout import TILE, TiledCache

WARPS, MOST_STAGES = 8, 3
OTHER_BYTES = 10_000
"""Shared memory that is neither for tiles on their way nor, before them, for the rotation."""
LARGEST_SHORT = 128
"""Dimensions of a head: tiles on their way, and the rotation, must fit into shared memory."""


def decode_short(
    query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, rotation: Tensor, *, splits: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Rotate one query and key token a sequence, append key and value, attend with every dimension.

    Args:
        query, key, value, rotation, scaling: see `prepare`.
        cache: in 16 bits, with heads of LARGEST_SHORT dimensions at most.
        splits: programs for the tiles of each sequence and key-value head, besides the two for the tail; 0: one
            program does everything.

    Returns:
        What `decode` returns, and rotated queries [batch, num_attention_heads, kept].

    Raises:
        AquaError: a cache of another kind.
    """
    (batch, kv_heads, kept, value_dim, _), (_, heads, head_dim) = cache.shape, query.shape
    cache.check_rotated()
    if not is_taken(query, cache):
        raise AquaError(
            f"a cache of {'8 bits' if cache.quantization is not None else query.dtype} with heads of {head_dim} and "
            f"{value_dim} dimensions: one launch takes 16 bits and {LARGEST_SHORT} at most"
        )
    tile_bytes = TILE * (padded(kept) + padded(value_dim)) * query.element_size()
    # The newest tokens are two parts more.
    splits, group = min(splits, max(cache.count - 2, 0)) + 2 if splits > 0 else 1, heads // kv_heads
    rotated = query.new_empty((batch, heads, kept))
    output = query.new_empty((batch, heads, value_dim))
    partial = query.new_empty((batch, heads, splits, value_dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, splits), dtype=torch.float32)
    with on_device_of(query):
        decode_short_kernel[(splits, kv_heads, batch)](
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            rotation.contiguous(),
            CacheArguments.of(cache),
            cache.arrived,
            partial,
            lse,
            rotated,
            output,
            scaling * LOG2_E,
            STAGES=max(1, min(MOST_STAGES, 1 + (shared_memory(query) - OTHER_BYTES) // tile_bytes)),
            TOGETHER=splits == 1,
            num_warps=WARPS,
            **cache_constants(cache, group),
            **turning(group, head_dim, kept),
            **merging(group, splits),
            **starts_early(query, rotation.is_contiguous()),
        )
    return output, rotated


def is_taken(query: Tensor, cache: TiledCache) -> bool:
    """Whether the kernel takes such a cache and heads of such a size."""
    widest = max(*cache.shape[2:4], query.shape[-1])
    return cache.quantization is None and query.element_size() == 2 and widest <= LARGEST_SHORT
