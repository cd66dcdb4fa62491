# SPDX-License-Identifier: Apache-2.0
"""Caches that rotate keys once, when they are written, and store less of them: dimensions, bits, tokens.

Growing full-attention layers are in `rotated_layer.py`. Sliding-window layers are bounded, and stay as they are but for
the rotation; so do layers of a fixed size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from aqua_attention.cache.growing import (
    OTHER_SETTINGS,
    RotatedLayer,
    check_active,
    rotated_keys,
    tagged,
    wait_for_offloading,
)
from aqua_attention.cache.spec import CacheSpec
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.errors import AquaError


class _RotatesOnWrite:
    """What our variants of transformers' bounded layers add to them."""

    spec: CacheSpec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and write; returns the rotated keys and values to attend to, as transformers' layer does."""
        written = super().update(rotated_keys(self.spec, key_states), value_states, *args, **kwargs)  # type: ignore[misc]
        return tagged(written[0], self), written[1]

    def prefetch(self) -> None:
        """Move back to the device of the model, if it was offloaded."""
        if self.is_initialized and self.keys.device != self.device:  # type: ignore[attr-defined]
            wait_for_offloading(self.device)  # type: ignore[attr-defined]
        super().prefetch()  # type: ignore[misc]


class RotatedSlidingLayer(_RotatesOnWrite, DynamicSlidingWindowLayer):
    """A sliding-window cache layer whose `keys` are rotated."""

    def __init__(self, spec: CacheSpec, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.spec = spec

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


class RotatedStaticLayer(_RotatesOnWrite, StaticLayer):
    """A cache layer of fixed size, for `torch.compile` and CUDA graphs: rotated keys, `kept` wide, and values."""

    def __init__(self, spec: CacheSpec, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.spec = spec


class RotatedStaticSlidingLayer(_RotatesOnWrite, StaticSlidingWindowLayer):
    """A sliding-window cache layer of fixed size whose `keys` are rotated."""

    def __init__(self, spec: CacheSpec, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self.spec = spec


class AquaCache(Cache):
    """A cache made for one attachment, by `Attachment.new_cache`: growing, or of a fixed size.

    Attributes:
        max_length: tokens for which there is room; None: it grows.
        layout: "tiled" for the decoding kernels, or "plain".

    An ordinary `DynamicCache`, which `generate` makes by itself, becomes the same as the growing one while it is empty.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        specs: dict[int, CacheSpec],
        max_length: int | None = None,
        offloading: bool = False,
        layout: str = "plain",
    ) -> None:
        """An empty cache; see `Attachment.new_cache`."""
        self.max_length, self.layout = max_length, layout
        if max_length is None:
            layers = DynamicCache(config=config).layers
        else:
            layers = StaticCache(config=config, max_cache_len=max_length).layers
        super().__init__(layers=layers, offloading=offloading)
        rotate_on_write(self, specs, config)

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile by itself: a compiled step cannot say that there is no room."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n forgets n of them.

        Raises:
            AquaError: one of the layers cannot; nothing is changed then.
        """
        for layer in self.layers:
            if isinstance(layer, RotatedLayer):
                layer.check_crop(tokens_to_remove)
            elif isinstance(layer, RotatedSlidingLayer):
                if layer.get_seq_length() >= layer.sliding_window and not layer.record_past:
                    raise AquaError(
                        "a sliding-window layer has forgotten what a crop would need: call activate_past_recording() "
                        "on the cache before it is filled"
                    )
            else:
                raise AquaError(
                    "a static cache cannot be cropped, as assisted decoding and prompt lookup do: make it without "
                    "max_length"
                )
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence.

        Raises:
            AquaError: the cache is of a fixed size.
        """
        self._check_growing()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices.

        Raises:
            AquaError: the cache is of a fixed size.
        """
        self._check_growing()
        super().batch_select_indices(indices)

    def _check_growing(self) -> None:
        if self.max_length is not None:
            raise AquaError("a static cache cannot repeat or select sequences: make it without max_length")


def rotate_on_write(cache: Cache, specs: dict[int, CacheSpec], config: PreTrainedConfig) -> None:
    """Make the layers of `cache` rotate what is written to them, as far as that keeps their content right.

    Empty layers are replaced. Layers that an earlier attachment filled under the same spec go on under this one.
    Everything else (ordinary layers with content, other kinds of layer) stays as it is.

    Args:
        config: of the decoder, which says which layers have a sliding window.
    """
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicCache(config=config).layers)
    for index, spec in specs.items():
        layer = cache.layers[index] if index < len(cache.layers) else None
        mine = getattr(layer, "spec", None)
        if layer is None or mine is spec:
            continue
        if int(layer.get_seq_length()) == 0:
            cache.layers[index] = _empty(layer, spec, getattr(cache, "layout", None)) or layer
        elif mine is not None and spec.same_as(mine):
            layer.spec = spec


def _empty(layer: CacheLayerMixin, spec: CacheSpec, layout: str | None) -> CacheLayerMixin | None:
    """The rotated layer that takes the place of an empty one; None where there is none.

    Args:
        layout: of an `AquaCache`, whose layers of a fixed size are replaced too; None: another cache.
    """
    if type(layer) in (DynamicLayer, RotatedLayer):
        return RotatedLayer(spec)
    if type(layer) in (DynamicSlidingWindowLayer, RotatedSlidingLayer):
        sliding = RotatedSlidingLayer(spec, layer.sliding_window)
        sliding.record_past = layer.record_past
        return sliding
    if layout and type(layer) in (StaticLayer, RotatedStaticLayer, TiledLayer):
        return (TiledLayer if layout == "tiled" else RotatedStaticLayer)(spec, layer.max_cache_len)
    if layout and type(layer) in (StaticSlidingWindowLayer, RotatedStaticSlidingLayer):
        # The layer's own length is its window, or the whole cache where that is shorter.
        return RotatedStaticSlidingLayer(spec, layer.max_cache_len, layer.max_cache_len)
    return None


def check_cache(cache: Cache, specs: dict[int, CacheSpec], batch: int, new: int) -> None:
    """Raise AquaError when `new` tokens of `batch` sequences cannot go on with what `cache` holds.

    Before any layer has run, so that the cache stays as it is.
    """
    for index, spec in specs.items():
        layer = cache.layers[index] if index < len(cache.layers) else None
        mine = getattr(layer, "spec", None)
        if layer is None or mine is None:
            continue
        if mine is not spec:
            check_active(mine)
            raise AquaError(OTHER_SETTINGS)
        held = layer.batch_size if isinstance(layer, StaticLayer) and layer.is_initialized else 0
        held = layer.batch if isinstance(layer, (RotatedLayer, RotatedSlidingLayer)) else held
        if held not in (0, batch):
            raise AquaError(
                f"the cache holds {held} sequences, the batch has {batch}: start with a new cache, or repeat or select "
                "its sequences first"
            )
    room = getattr(cache, "max_length", None)
    if room is not None and (held := int(cache.get_seq_length())) + new > room:
        raise AquaError(
            f"the static cache has room for {room} tokens and holds {held}, {new} more do not fit: make it with a "
            "larger max_length"
        )
