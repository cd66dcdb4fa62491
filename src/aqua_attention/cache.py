# SPDX-License-Identifier: Apache-2.0
"""Caches that rotate keys once, when they are written, and store less of them: dimensions, bits, tokens.

Growing full-attention layers are in `rotated_layer.py`. Sliding-window layers are bounded, and stay as they are but for
the rotation; so do layers of a fixed size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from aqua_attention.cache_spec import CacheSpec
from aqua_attention.errors import AquaError
from aqua_attention.rotated_layer import RotatedLayer, rotated_keys, tagged


class RotatedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window cache layer whose `keys` are rotated."""

    def __init__(self, spec: CacheSpec, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.spec = spec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and append; returns the rotated keys and values to attend to. See `DynamicSlidingWindowLayer`."""
        keys, values = super().update(rotated_keys(self.spec, key_states), value_states, *args, **kwargs)
        return tagged(keys, self), values

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self.keys.shape[0] if self.is_initialized and self.keys is not None else 0

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All that is held, to be written to a file: numbers and tensors by name."""
        assert self.keys is not None and self.values is not None
        return {"cumulative_length": self.cumulative_length}, {"keys": self.keys, "values": self.values}

    def restore(self, numbers: dict[str, int], tensors: dict[str, Tensor]) -> None:
        """Hold what `state` once returned."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = tensors["keys"], tensors["values"]
        self.cumulative_length = int(numbers["cumulative_length"])


class RotatedStaticLayer(StaticLayer):
    """A cache layer of fixed size, for `torch.compile` and CUDA graphs: rotated keys, `kept` wide, and values."""

    def __init__(self, spec: CacheSpec, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.spec = spec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and write; returns all rotated keys and values, those not written yet too. See `StaticLayer`."""
        keys, values = super().update(rotated_keys(self.spec, key_states), value_states, *args, **kwargs)
        return tagged(keys, self), values


class RotatedStaticSlidingLayer(StaticSlidingWindowLayer):
    """A sliding-window cache layer of fixed size whose `keys` are rotated."""

    def __init__(self, spec: CacheSpec, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self.spec = spec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and write; returns the rotated keys and values to attend to. See `StaticSlidingWindowLayer`."""
        keys, values = super().update(rotated_keys(self.spec, key_states), value_states, *args, **kwargs)
        return tagged(keys, self), values


class AquaCache(Cache):
    """A cache made for one attachment, by `Attachment.new_cache`: growing, or of a fixed size.

    An ordinary `DynamicCache`, which `generate` makes by itself, becomes the same as the growing one while it is empty.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        specs: dict[int, CacheSpec],
        max_length: int | None = None,
        offloading: bool = False,
    ) -> None:
        """An empty cache; see `Attachment.new_cache`."""
        self.max_length = max_length
        if max_length is None:
            layers = DynamicCache(config=config).layers
        else:
            layers = StaticCache(config=config, max_cache_len=max_length).layers
        super().__init__(layers=layers, offloading=offloading)
        rotate_on_write(self, specs)

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile by itself: a compiled step cannot say that there is no room."""
        return False

    def check_room(self, new: int) -> None:
        """Raise AquaError when `new` more tokens do not fit; nothing is changed then."""
        if self.max_length is None:
            return
        held = max(int(layer.get_seq_length()) for layer in self.layers)
        if held + new > self.max_length:
            raise AquaError(
                f"the static cache has room for {self.max_length} tokens and holds {held}, {new} more do not fit: "
                "make it with a larger max_length"
            )


def rotate_on_write(cache: Cache, specs: dict[int, CacheSpec]) -> None:
    """Make the layers of `cache` rotate what is written to them, as far as that keeps their content right.

    Empty ordinary layers are replaced. Layers that an earlier attachment filled under the same spec go on under
    this one. Everything else (ordinary layers with content, other kinds of layer) stays as it is.
    """
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(max(specs) + 1))
    for index, spec in specs.items():
        if index >= len(cache.layers):
            continue
        layer = cache.layers[index]
        if isinstance(layer, (RotatedStaticLayer, RotatedStaticSlidingLayer)):
            if layer.spec is not spec and spec.same_as(layer.spec):
                layer.spec = spec
        elif isinstance(layer, (RotatedLayer, RotatedSlidingLayer)):
            if layer.get_seq_length() == 0 and isinstance(layer, RotatedLayer):
                if layer.spec is not spec:
                    cache.layers[index] = RotatedLayer(spec)
            elif layer.get_seq_length() == 0 or spec.same_as(layer.spec):
                layer.spec = spec
        elif layer.get_seq_length() > 0:
            continue
        elif type(layer) is DynamicLayer:
            cache.layers[index] = RotatedLayer(spec)
        elif type(layer) is DynamicSlidingWindowLayer:
            replacement = RotatedSlidingLayer(spec, layer.sliding_window)
            replacement.record_past = layer.record_past
            cache.layers[index] = replacement
        elif type(layer) is StaticLayer and isinstance(cache, AquaCache):
            cache.layers[index] = RotatedStaticLayer(spec, layer.max_cache_len)
        elif type(layer) is StaticSlidingWindowLayer and isinstance(cache, AquaCache):
            # The layer's own length is its window, or the whole cache where that is shorter.
            cache.layers[index] = RotatedStaticSlidingLayer(spec, layer.max_cache_len, layer.max_cache_len)
