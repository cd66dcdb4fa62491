# SPDX-License-Identifier: Apache-2.0
"""Cache layers that rotate keys once, when they are written, and store only the kept dimensions.

Everything else (growth, beam reordering, cropping, sliding windows) is transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aqua_attention.errors import AquaError
from aqua_attention.ops.select import rotate


class Rotation:
    """The matrices of one attached layer, a key-value head each; `active` is False once AQUA has left the model."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.active = True


class RotatedLayer(DynamicLayer):
    """A growing cache layer whose `keys` are rotated, [batch, num_key_value_heads, length, kept]."""

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.rotation = rotation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and append; returns all rotated keys and all values. See `DynamicLayer.update`."""
        keys, values = super().update(_rotated(self.rotation, key_states), value_states, *args, **kwargs)
        return _tagged(keys, self.rotation), values


class RotatedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window cache layer whose `keys` are rotated."""

    def __init__(self, rotation: Rotation, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.rotation = rotation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and append; returns the rotated keys and values to attend to. See `DynamicSlidingWindowLayer`."""
        keys, values = super().update(_rotated(self.rotation, key_states), value_states, *args, **kwargs)
        return _tagged(keys, self.rotation), values


def rotate_on_write(cache: DynamicCache, rotations: dict[int, Rotation]) -> None:
    """Make the layers of `cache` rotate what is written to them, as far as that keeps their content right.

    Empty ordinary layers are replaced. Layers that an earlier attachment filled under the same rotation go on under
    this one. Everything else (ordinary layers with content, other kinds of layer) stays as it is.
    """
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(max(rotations) + 1))
    for index, rotation in rotations.items():
        if index >= len(cache.layers):
            continue
        layer = cache.layers[index]
        if isinstance(layer, (RotatedLayer, RotatedSlidingLayer)):
            if layer.get_seq_length() == 0 or torch.equal(layer.rotation.matrix, rotation.matrix):
                layer.rotation = rotation
        elif layer.get_seq_length() > 0:
            continue
        elif type(layer) is DynamicLayer:
            cache.layers[index] = RotatedLayer(rotation)
        elif type(layer) is DynamicSlidingWindowLayer:
            replacement = RotatedSlidingLayer(rotation, layer.sliding_window)
            replacement.record_past = layer.record_past
            cache.layers[index] = replacement


def is_rotated(key: Tensor, rotation: Rotation) -> bool:
    """Whether `key`, as it enters attention, was rotated by `rotation` in the cache.

    The tensor itself says so: only it is the same in every thread, and under gradient checkpointing, where the model
    drops its cache in silence.

    Raises:
        AquaError: it was rotated for other projections, another s_ratio or another layer.
    """
    tag = getattr(key, "_aqua_rotation", None)
    if tag is None:
        return False
    if tag is not rotation:
        raise AquaError("this cache was filled under other AQUA projections or settings: start with a new cache")
    return True


def _tagged(keys: Tensor, rotation: Rotation) -> Tensor:
    keys._aqua_rotation = rotation  # type: ignore[attr-defined]
    return keys


def _rotated(rotation: Rotation, key_states: Tensor) -> Tensor:
    if not rotation.active:
        raise AquaError(
            "this cache holds AQUA-rotated keys, but the AQUA that filled it has left the model: apply the same "
            "projections and settings again, or start with a new cache"
        )
    return rotate(key_states, rotation.matrix)
