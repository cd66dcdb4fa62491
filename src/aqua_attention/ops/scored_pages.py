# SPDX-License-Identifier: Apache-2.0
"""Pages of a serving engine whose decoding steps choose tokens (AQUA-Select): see `ops.pages` and `ops.scored`.

A page of a key-value head is one contiguous run, and has all of its tokens, what they are chosen by as well:

    keys by token [block_size, kept], values by token [block_size, value_dim], codes of the keys by dimension, uint8
    [kept, block_size], and their scales, bfloat16 [block_size]

So what moves, shares or drops pages takes the copy along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from aqua_attention.ops.layout import TILE, Quantization, quantized
from aqua_attention.ops.pages import PagedCache, content

COPY_BYTES = 2
"""Of a token and head in the copy, besides a byte a dimension: a scale in bfloat16."""


def scored_content(kept: int, value_dim: int, element_size: int) -> int:
    """Bytes of a token and head in such a page, a whole number of elements."""
    return content(kept, value_dim, element_size, is_quantized=False) + _copy(kept, element_size) * element_size


def _copy(kept: int, element_size: int) -> int:
    """Elements of a token and head that the copy takes."""
    return -(-(kept + COPY_BYTES) // element_size)


@dataclass(frozen=True, eq=False)
class ScoredPages(PagedCache):
    """The pages of one layer that chooses tokens.

    Attributes:
        scoring: how codes are made of keys, see `ops.scored.score_quantization`. Keys and values are in no 8 bits.
    """

    scoring: Quantization = field(kw_only=True)

    @property
    def _needed(self) -> int:
        return self.kept + self.value_dim + _copy(self.kept, self.storage.element_size())

    @cached_property
    def keys(self) -> Tensor:
        """[num_blocks, num_key_value_heads, block_size, kept]."""
        return self._part(0, self.kept).unflatten(-1, (self.block_size, self.kept))

    @property
    def keys_by_token(self) -> Tensor:
        """The same."""
        return self.keys

    @cached_property
    def codes(self) -> Tensor:
        """Uint8 [num_blocks, num_key_value_heads, kept, block_size], in which 128 is zero."""
        return self._bytes(0, self.kept).unflatten(-1, (self.kept, self.block_size))

    @cached_property
    def scales(self) -> Tensor:
        """Bfloat16 [num_blocks, num_key_value_heads, block_size], of the codes of a token."""
        return self._bytes(self.kept, COPY_BYTES).view(torch.bfloat16)

    def _bytes(self, start: int, width: int) -> Tensor:
        """So many bytes a token of the copy in each page, [num_blocks, num_key_value_heads, block_size * width]."""
        size, begin = self.block_size, (self.kept + self.value_dim) * self.storage.element_size() + start
        return self.storage.flatten(2).view(torch.uint8)[..., begin * size : (begin + width) * size]

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `PagedCache`: keys are rotated; their codes are made here."""
        super().write(key, value, slots)
        there = slots >= 0
        block, place = slots[there] // self.block_size, slots[there] % self.block_size
        # Of keys as they are stored, so that what is scored follows from what is read.
        states = key[there].to(self.keys.dtype).float()
        codes, scales = quantized((states - self.scoring.channel_mean) / self.scoring.channel_scale)
        self.codes[block, :, :, place], self.scales[block, :, place] = codes, scales

    def read_copy(self, blocks: Tensor, length: int) -> Tensor:
        """Keys as they are scored, float32 [num_key_value_heads, length, kept], of a sequence as in `read`."""
        blocks = blocks[: -(-length // self.block_size)].long()
        codes = self.codes[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length].float() - 128
        scales = self.scales[blocks].transpose(0, 1).flatten(1, 2)[:, :length, None].float()
        channel_scale, channel_mean = (each[:, None] for each in self.scoring)
        return codes * scales * channel_scale + channel_mean


@dataclass(frozen=True, eq=False)
class PagedSequences:
    """Sequences in such pages, as a step sees those of a `ScoredCache`. Their new tokens are written already.

    Attributes:
        pages: of the layer; block_table, lengths: see `Step`.
        tiles: of a sequence at most; behind the columns of the table is nothing.
        score_bits, value_scales: see `ScoredCache`; keys and values are as they came.
    """

    pages: ScoredPages
    block_table: Tensor
    lengths: Tensor
    tiles: int
    score_bits: ClassVar[int] = 8
    value_scales: ClassVar[None] = None

    @staticmethod
    def of(pages: ScoredPages, block_table: Tensor, lengths: Tensor) -> PagedSequences:
        """With as many tiles as the table has room for."""
        return PagedSequences(pages, block_table, lengths, -(-block_table.shape[1] * pages.block_size // TILE))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Batch, num_key_value_heads, kept, value_dim, tiles of a sequence."""
        pages = self.pages
        return len(self.lengths), pages.num_key_value_heads, pages.kept, pages.value_dim, self.tiles

    @property
    def block_size(self) -> int:
        """Tokens that lie together."""
        return self.pages.block_size

    @property
    def codes(self) -> Tensor:
        """See `ScoredPages`."""
        return self.pages.codes

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and the keys as they are scored, of the first tokens of a sequence, float32
        [num_key_value_heads, length, width].
        """
        blocks = self.block_table[row]
        key, value = self.pages.read(blocks, length, torch.float32)
        return key[0].float(), value[0].float(), self.pages.read_copy(blocks, length)
