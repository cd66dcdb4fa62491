# SPDX-License-Identifier: Apache-2.0
"""Keys and values in the pages of a serving engine, laid out for a decoding kernel that reads few dimensions.

Everything of a token lies in its page, so that what moves, shares or drops pages (prefix caching, preemption) need not
know what is in them. A page of a key-value head is one contiguous run:

    keys by dimension [kept, block_size], values by token [block_size, value_dim], and in 8 bits the scales of its keys
    and of its values, bfloat16 [block_size] each

Keys are rotated where the layer has a plan. A page may be longer than that: what is behind stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.layout import Quantization, quantized
from aqua_attention.ops.plan import LayerPlan

SCALE_BYTES = 4
"""Of a token and head in 8 bits: two scales in bfloat16."""


def content(kept: int, value_dim: int, element_size: int, *, is_quantized: bool) -> int:
    """Bytes of a token and head in a page."""
    return kept + value_dim + SCALE_BYTES if is_quantized else (kept + value_dim) * element_size


@dataclass(frozen=True, eq=False)
class PagedCache:
    """The pages of one layer.

    Attributes:
        storage: [num_blocks, num_key_value_heads, block_size, content], a page of a head one contiguous run; of one
            byte an element where quantized, otherwise in the dtype of the keys.
        kept, value_dim: dimensions of a stored key, and of a value.
        quantization: keys and values are stored in 8 bits.

    Raises:
        AquaError: pages that do not lie so, or are too small.
    """

    storage: Tensor
    kept: int
    value_dim: int
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        storage, needed = self.storage, self._needed
        if storage.ndim != 4 or storage.stride()[2:] != (storage.shape[3], 1) or storage.shape[3] < needed:
            raise AquaError(
                f"pages are {tuple(storage.shape)} with strides {storage.stride()}: they must be [num_blocks, "
                f"num_key_value_heads, block_size, {needed} or more], a page of a head in one run"
            )
        if self.quantization is not None and storage.element_size() != 1:
            raise AquaError(f"pages are {storage.dtype}: in 8 bits they must be of one byte an element")

    @property
    def _needed(self) -> int:
        """Elements of a token and head at least."""
        return self.kept + self.value_dim + (SCALE_BYTES if self.quantization is not None else 0)

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self.storage.shape[2]

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.storage.shape[1]

    @cached_property
    def keys(self) -> Tensor:
        """[num_blocks, num_key_value_heads, kept, block_size]."""
        return self._part(0, self.kept).unflatten(-1, (self.kept, self.block_size))

    @property
    def keys_by_token(self) -> Tensor:
        """[num_blocks, num_key_value_heads, block_size, kept]."""
        return self.keys.transpose(-1, -2)

    @cached_property
    def values(self) -> Tensor:
        """[num_blocks, num_key_value_heads, block_size, value_dim]."""
        return self._part(self.kept, self.value_dim).unflatten(-1, (self.block_size, self.value_dim))

    @cached_property
    def key_scales(self) -> Tensor | None:
        """Bfloat16 [num_blocks, num_key_value_heads, block_size]; None where nothing is quantized."""
        return None if self.quantization is None else self._part(self.kept + self.value_dim, 2).view(torch.bfloat16)

    @cached_property
    def value_scales(self) -> Tensor | None:
        """As `key_scales`."""
        return None if self.quantization is None else self._part(self.kept + self.value_dim + 2, 2).view(torch.bfloat16)

    def _part(self, start: int, width: int) -> Tensor:
        """So many elements a token of each page, [num_blocks, num_key_value_heads, block_size * width]."""
        pages = self.storage if self.quantization is None else self.storage.view(torch.uint8)
        blocks, heads, size, _ = pages.shape
        return pages.view(blocks, heads, -1)[..., start * size : (start + width) * size]

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write tokens to their slots.

        Args:
            key: as it is stored, but for 8 bits: [tokens, num_key_value_heads, kept].
            value: [tokens, num_key_value_heads, value_dim].
            slots: place of each token, block * block_size + place in the block; negative: it is not kept (padding).
        """
        there = slots >= 0
        block, place = slots[there] // self.block_size, slots[there] % self.block_size
        key, value = key[there], value[there]
        if self.quantization is not None:
            assert self.key_scales is not None and self.value_scales is not None
            key = (key.float() - self.quantization.channel_mean) / self.quantization.channel_scale
            key, key_scales = quantized(key)
            value, value_scales = quantized(value)
            self.key_scales[block, :, place], self.value_scales[block, :, place] = key_scales, value_scales
        self.keys_by_token[block, :, place] = key.to(self.keys.dtype)
        self.values[block, :, place] = value.to(self.values.dtype)

    def read(self, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [1, num_key_value_heads, length, kept] and values of one sequence, whose `blocks` are in order."""
        blocks = blocks[: -(-length // self.block_size)].long()

        def by_token(found: Tensor) -> Tensor:
            # Of a single page a view would do, and fused kernels take the numbers of a token to lie together.
            return found.transpose(0, 1).flatten(1, 2).contiguous()[None, :, :length]

        key, value = by_token(self.keys_by_token[blocks]), by_token(self.values[blocks])
        if self.quantization is None:
            return key, value
        assert self.key_scales is not None and self.value_scales is not None
        key_scales, value_scales = (
            by_token(scales[blocks][..., None]).float() for scales in (self.key_scales, self.value_scales)
        )
        channel_scale, channel_mean = (each[:, None] for each in self.quantization)
        key = (key.float() - 128) * key_scales * channel_scale + channel_mean
        return key.to(dtype), ((value.float() - 128) * value_scales).to(dtype)


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """How a layer attends to its pages.

    Attributes:
        plan: what AQUA does; None: keys are stored as they come, and every dimension is multiplied.
        scaling: factor of the scores; softcap: their soft limit, see `Call`.
        window: tokens that a query sees, its own included; None: all. Only without a plan.
        memory: what kernels that choose tokens work in; layers whose steps follow one another may share it.
    """

    plan: LayerPlan | None
    scaling: float
    softcap: float | None = None
    window: int | None = None
    memory: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.plan is not None and self.window is not None:
            raise AquaError("a layer with a sliding window attends to every dimension: leave plan or window out")


class Step(NamedTuple):
    """One decoding step: one token of each sequence. Of fixed shape, so that it can be recorded.

    Attributes:
        block_table: int32 [batch, blocks], pages of each sequence in order; those behind its length are not looked at.
        lengths: int32 [batch], tokens of each sequence, the new one included; 0: there is none, and its output is zero.
        slots: int64 [batch], where the new tokens go, see `PagedCache.write`.
        arrived: int32, zero, at least batch * num_key_value_heads of them: kernels count their programs there.
        longest: tokens of a sequence at most; None: as many as the table has room for.
    """

    block_table: Tensor
    lengths: Tensor
    slots: Tensor
    arrived: Tensor
    longest: int | None = None
