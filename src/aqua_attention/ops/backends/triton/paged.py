# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What kernels over pages share: what they are given of a `PagedCache`, and how a token gets into its page."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import padded
from aqua_attention.ops.backends.triton.prepare import quantized
from aqua_attention.ops.pages import PagedCache


class PageArguments(NamedTuple):
    """Pointers to the parts of the first page of the first head, and numbers of elements from a page, and a head, to
    the next; scales are half as far apart.
    """

    key_pages: Tensor
    value_pages: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    channel_scale: Tensor | None
    channel_mean: Tensor | None
    block_stride: int
    head_stride: int

    @staticmethod
    def of(cache: PagedCache) -> PageArguments:
        """Those of a cache."""
        channels = cache.quantization or (None, None)
        scales = cache.key_scales, cache.value_scales
        return PageArguments(cache.keys, cache.values, *scales, *channels, *cache.storage.stride()[:2])


def page_constants(cache: PagedCache, group: int) -> dict[str, int]:
    """What kernels over pages know when they are compiled, for so many query heads of a key-value head."""
    return {
        "GROUP": group,
        "KEPT": cache.kept,
        "KEPT_PADDED": padded(cache.kept),
        "VALUE_DIM": cache.value_dim,
        "VALUE_PADDED": padded(cache.value_dim),
        "BLOCK": cache.block_size,
    }


@triton.jit
def store_tokens(
    pages,
    group,
    slots,
    keys,
    values,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write rotated keys [tokens, KEPT_PADDED] and values [tokens, VALUE_PADDED] of a head to their slots, [tokens]."""
    dims, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    there = slots >= 0
    place = slots % BLOCK
    page = slots // BLOCK * pages.block_stride + group.to(tl.int64) * pages.head_stride
    key_column, value_column = dims < KEPT, columns < VALUE_DIM
    if pages.key_scales is not None:
        channel_mean = tl.load(pages.channel_mean + group * KEPT + dims, key_column, 0.0)
        channel_scale = tl.load(pages.channel_scale + group * KEPT + dims, key_column, 1.0)
        keys = tl.where(key_column[None, :], keys.to(tl.float32), 0.0)
        keys, key_scales = quantized((keys - channel_mean[None, :]) / channel_scale[None, :], 1)
        values, value_scales = quantized(values.to(tl.float32), 1)
        tl.store(pages.key_scales + page // 2 + place, key_scales, there)
        tl.store(pages.value_scales + page // 2 + place, value_scales, there)
    tl.store(
        pages.key_pages + (page + place)[:, None] + dims[None, :] * BLOCK, keys, there[:, None] & key_column[None, :]
    )
    tl.store(
        pages.value_pages + (page + place * VALUE_DIM)[:, None] + columns[None, :],
        values,
        there[:, None] & value_column[None, :],
    )
