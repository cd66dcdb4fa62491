# SPDX-License-Identifier: Apache-2.0
"""Bounded cache layers of rotated keys: transformers' own with a sliding window or a fixed size, rotated on write."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from aqua_attention.cache.layer import RotatesOnWrite
from aqua_attention.ops.plan import LayerPlan


class RotatedSlidingLayer(RotatesOnWrite, DynamicSlidingWindowLayer):
    """A sliding-window cache layer whose `keys` are rotated."""

    def __init__(self, plan: LayerPlan, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.plan = plan

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self.keys.shape[0] if self.is_initialized and self.keys is not None else 0

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All that is held, to be written to a file: numbers and tensors by name."""
        assert self.keys is not None and self.values is not None
        return {"cumulative_length": self.cumulative_length}, {"keys": self.keys, "values": self.values}

    def restore(self, numbers: dict[str, int], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Hold what `state` once returned, of a model in `dtype`."""
        if {tensors["keys"].dtype, tensors["values"].dtype} != {dtype}:
            raise ValueError(f"keys and values are not {dtype}")
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = tensors["keys"], tensors["values"]
        self.cumulative_length = int(numbers["cumulative_length"])


class RotatedStaticLayer(RotatesOnWrite, StaticLayer):
    """A cache layer of fixed size, for `torch.compile` and CUDA graphs: rotated keys, `kept` wide, and values."""

    def __init__(self, plan: LayerPlan, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.plan = plan


class RotatedStaticSlidingLayer(RotatesOnWrite, StaticSlidingWindowLayer):
    """A sliding-window cache layer of fixed size whose `keys` are rotated."""

    def __init__(self, plan: LayerPlan, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self.plan = plan
