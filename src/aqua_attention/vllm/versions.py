# SPDX-License-Identifier: Apache-2.0
"""What differs between versions of vLLM: how a backend says what its pages look like."""

from __future__ import annotations

from typing import Any

from vllm.v1 import kv_cache_interface

from aqua_attention.ops.pages import SCALE_BYTES
from aqua_attention.vllm.settings import INT8

LAYOUTS = getattr(kv_cache_interface, "KVCacheLayout", None)
"""Named layouts of pages came with 0.30, and with them pages of any content; before, a backend gives their shape."""
OLD_SCALE_BYTES = 8
"""Room for the scales of a token and head in pages of 8 bits before 0.30, of which ours are a half."""
assert OLD_SCALE_BYTES >= SCALE_BYTES


class PagesByShape:
    """Up to 0.29: pages [num_blocks, num_kv_heads, block_size, content], a page of a head in one run."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """See `AttentionBackend`: with `s_ratio` the room of dimensions that are not stored is taken all the same."""
        content = 2 * head_size + (OLD_SCALE_BYTES if cache_dtype_str == INT8 else 0)
        return num_blocks, num_kv_heads, block_size, content

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """See `AttentionBackend`."""
        if include_num_layers_dimension:
            raise NotImplementedError("layers do not share blocks")
        return 0, 1, 2, 3

    @classmethod
    def get_required_kv_cache_layout(cls) -> str:
        """See `AttentionBackend`."""
        return "HND"


class PagesByLayout:
    """From 0.30 on: layouts have names, and a specification says how much a page holds."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """See `AttentionBackend`."""
        assert LAYOUTS is not None
        return (LAYOUTS.LBHNC,)


Pages: type = PagesByShape if LAYOUTS is None else PagesByLayout
"""What a backend inherits."""
