# SPDX-License-Identifier: Apache-2.0
"""Keys and values in vLLM's pages: [blocks, num_key_value_heads, block_size, kept + value_dim], keys rotated."""

import torch
from torch import Tensor


def write_pages(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write tokens into their slots.

    Args:
        key: rotated and cut, [tokens, num_key_value_heads, kept]; value: [tokens, num_key_value_heads, value_dim].
        slots: place of each token, block * block_size + place in the block; negative: it is not kept (padding).
    """
    kept = slots >= 0
    block, place = slots[kept] // pages.shape[2], slots[kept] % pages.shape[2]
    pages[block, :, place] = torch.cat([key, value], -1)[: len(slots)][kept].to(pages.dtype)


def read_pages(pages: Tensor, blocks: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor]:
    """Keys [1, num_key_value_heads, length, kept] and values of one sequence, whose `blocks` are in order."""
    needed = -(-length // pages.shape[2])
    found = pages[blocks[:needed].long()].transpose(0, 1).flatten(1, 2)[None, :, :length]
    return found[..., :kept], found[..., kept:]
