# SPDX-License-Identifier: Apache-2.0
"""Cache layers that rotate keys once, when they are written, and store only the kept dimensions, in few bits if asked.

Full-attention layers keep their states in stores of ours (`store.py`): a decoded token is written in place, where
transformers' own layer copies the whole cache. Sliding-window layers are bounded, and stay as they are but for the
rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aqua_attention.errors import AquaError
from aqua_attention.ops.select import rotate
from aqua_attention.store import Growing, Rounded, Store


class Rotation:
    """What one attached layer does to its keys and values before it stores them.

    Attributes:
        matrix: [num_key_value_heads, head_dim, kept], the leading columns of the layer's rotation.
        scale, mean: of each rotated key dimension over the calibration text, [num_key_value_heads, kept]; scale is the
            standard deviation. Read when `bits` is given.
        bits: None stores keys and values as they are, 8 in int8, 4 in int4.
        recent: last tokens that are never rounded.
        active: False once AQUA has left the model.
    """

    def __init__(
        self,
        matrix: Tensor,
        scale: Tensor | None = None,
        mean: Tensor | None = None,
        bits: int | None = None,
        recent: int = 0,
    ) -> None:
        self.matrix, self.scale, self.mean = matrix, scale, mean
        self.bits, self.recent = bits, recent
        self.active = True

    def stores(self) -> tuple[Store, Store]:
        """An empty store for rotated keys, and one for values."""
        if self.bits is None:
            return Growing(), Growing()
        return Rounded(self.bits, self.recent, self.scale, self.mean), Rounded(self.bits, self.recent)

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values as a cache would give them back."""
        key_store, value_store = self.stores()
        key_store.append(keys)
        value_store.append(values)
        return key_store.read(), value_store.read()

    def same_as(self, other: Rotation) -> bool:
        """Whether a cache filled under the other can go on under this one."""
        if self is other:
            return True
        same = self.bits == other.bits and self.recent == other.recent
        return same and torch.equal(self.matrix, other.matrix.to(self.matrix.device))


class RotatedLayer(DynamicLayer):
    """A growing cache layer of rotated keys, [batch, num_key_value_heads, length, kept], and values."""

    def __init__(self, rotation: Rotation) -> None:
        # Not DynamicLayer's: `keys` and `values` are read from the stores here.
        self.is_initialized = False
        self.rotation = rotation
        self._keys, self._values = rotation.stores()

    @property
    def keys(self) -> Tensor | None:
        """All rotated keys, [batch, num_key_value_heads, length, kept]; None while empty."""
        return self._keys.read() if self._keys.length else None

    @property
    def values(self) -> Tensor | None:
        """All values, [batch, num_key_value_heads, length, value_dim]; None while empty."""
        return self._values.read() if self._values.length else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and append; returns all rotated keys and all values.

        Raises:
            AquaError: AQUA has left the model, or the batch has another size than what is stored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotated = _rotated(self.rotation, key_states)
        if self._keys.length and (stored := self._keys.batch) != rotated.shape[0]:
            raise AquaError(
                f"the cache holds {stored} sequences, the batch has {rotated.shape[0]}: start with a new cache, or "
                "repeat or select its sequences first"
            )
        self._keys.append(rotated)
        self._values.append(value_states)
        return _tagged(self._keys.read(), self.rotation), self._values.read()

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self._keys.length

    def reset(self) -> None:
        """Forget everything."""
        self._keys, self._values = self.rotation.stores()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n forgets n of them, n keeps n."""
        length = tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
        self._keys.keep(length)
        self._values.keep(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these indices (beam search)."""
        self._change(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices."""
        self._change(lambda states: states[indices.to(states.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move to the CPU."""
        self._change(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device of the model."""
        self._change(lambda states: states.to(self.device, non_blocking=True))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self._keys.change(function)
        self._values.change(function)


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
            if layer.get_seq_length() == 0 and isinstance(layer, RotatedLayer):
                cache.layers[index] = RotatedLayer(rotation)
            elif layer.get_seq_length() == 0 or rotation.same_as(layer.rotation):
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
