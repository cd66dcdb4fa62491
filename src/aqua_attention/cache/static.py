# SPDX-License-Identifier: Apache-2.0
"""Bounded cache layers of rotated keys: transformers' own with a sliding window or a fixed size, rotated on write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from aqua_attention.cache.layer import attend_by_token, rotated_keys, tagged, wait_for_offloading, without_empty_end
from aqua_attention.ops.plan import Attended, Call, LayerPlan


class RotatesOnWrite:
    """What our variants of transformers' bounded layers add to them."""

    is_initialized: bool
    keys: Tensor | None
    device: torch.device

    def __init__(self, plan: LayerPlan, **sizes: int) -> None:
        super().__init__(**sizes)
        self.plan = plan

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self.keys.shape[0] if self.is_initialized and self.keys is not None else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and write; returns the rotated keys and values to attend to, as transformers' layer does."""
        written = super().update(rotated_keys(self.plan, key_states), value_states, *args, **kwargs)  # type: ignore[misc]
        return tagged(written[0], self), written[1]

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """See `CacheLayer`."""
        return attend_by_token(without_empty_end(call), self.plan)

    def prefetch(self) -> None:
        """Move back to the device of the model, if it was offloaded."""
        if self.is_initialized and self.keys is not None and self.keys.device != self.device:
            wait_for_offloading(self.device)
        super().prefetch()  # type: ignore[misc]


class RotatedSlidingLayer(RotatesOnWrite, DynamicSlidingWindowLayer):
    """A sliding-window cache layer whose `keys` are rotated."""

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


class RotatedStaticSlidingLayer(RotatesOnWrite, StaticSlidingWindowLayer):
    """A sliding-window cache layer of fixed size whose `keys` are rotated."""
