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
from aqua_attention.ops.scored_pages import ScoredPages


class PageArguments(NamedTuple):
    """Pointers to the parts of the first page of the first head, and numbers of elements from a page, and a head, to
    the next; scales of 8-bit pages are half as far apart. Codes and scores are of `ScoredPages`.
    """

    key_pages: Tensor
    value_pages: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    channel_scale: Tensor | None
    channel_mean: Tensor | None
    block_stride: int
    head_stride: int
    codes: Tensor | None = None
    code_scales: Tensor | None = None

    @staticmethod
    def of(cache: PagedCache) -> PageArguments:
        """Those of a cache."""
        if isinstance(cache, ScoredPages):
            (unit, mean), (block, head) = cache.scoring, cache.storage.stride()[:2]
            states = cache.keys, cache.values, None, None, unit, mean
            return PageArguments(*states, block, head, cache.codes, cache.scales)
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
    stored = there[:, None] & key_column[None, :]
    if pages.codes is not None:
        store_copy(pages, group, page, place, keys, there, KEPT, KEPT_PADDED, BLOCK)
        tl.store(pages.key_pages + (page + place * KEPT)[:, None] + dims[None, :], keys, stored)
    else:
        tl.store(pages.key_pages + (page + place)[:, None] + dims[None, :] * BLOCK, keys, stored)
    tl.store(
        pages.value_pages + (page + place * VALUE_DIM)[:, None] + columns[None, :],
        values,
        there[:, None] & value_column[None, :],
    )


@triton.jit
def store_copy(
    pages, group, page, place, keys, there, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the codes of rotated keys [tokens, KEPT_PADDED] to their pages, by dimension, and their scales."""
    dims = tl.arange(0, KEPT_PADDED)
    column = dims < KEPT
    mean = tl.load(pages.channel_mean + group * KEPT + dims, column, 0.0)
    unit = tl.load(pages.channel_scale + group * KEPT + dims, column, 1.0)
    # Of keys as they are stored, so that what is scored follows from what is read.
    keys = tl.where(column[None, :], keys.to(pages.key_pages.dtype.element_ty).to(tl.float32), 0.0)
    codes, scales = quantized((keys - mean[None, :]) / unit[None, :], 1)
    size: tl.constexpr = pages.key_pages.dtype.element_ty.primitive_bitwidth // 8
    tl.store(
        pages.codes + (page * size + place)[:, None] + dims[None, :] * BLOCK, codes, there[:, None] & column[None, :]
    )
    tl.store(pages.code_scales + page * (size // 2) + place, scales, there)
