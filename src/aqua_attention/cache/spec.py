# SPDX-License-Identifier: Apache-2.0
"""What one attention layer's cache does to keys and values before it stores them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aqua_attention.cache.eviction import Eviction
from aqua_attention.cache.quantized import Rounded
from aqua_attention.cache.store import Growing, Store
from aqua_attention.cache.window import WindowStore
from aqua_attention.calibration.projections import LayerProjection
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.state import weight_difference
from aqua_attention.model.fingerprint import WEIGHT_TOLERANCE
from aqua_attention.ops.api import rotate
from aqua_attention.ops.layout import Rounding


class CacheSpec:
    """Rotation, width, precision and eviction of one attached layer.

    Attributes:
        matrix: [num_key_value_heads, head_dim, width], the leading columns of the layer's rotation. Width is `kept`, or
            head_dim when the tokens of an exact window keep every dimension.
        kept: leading rotated key dimensions that every token keeps.
        bits: None stores keys and values as they are, 8 in int8, 4 in int4.
        sink, recent: size of the exact window.
        min_length: sequences of fewer tokens multiply every dimension.
        eviction: which tokens stay; None: all.
        active: False once AQUA has left the model.
    """

    def __init__(
        self,
        projection: LayerProjection,
        config: AquaConfig,
        device: torch.device | str = "cpu",
        key_weights: list[float] | None = None,
    ) -> None:
        """From one layer's projection.

        Args:
            key_weights: digest of the layer's key weights (`fingerprint.key_weight_digest`), so that no cache goes on
                under other weights; None where they cannot be read.
        """
        self.key_weights = key_weights
        head_dim = projection.rotation.shape[-1]
        self.kept = config.kept_dims(head_dim)
        self.sink, self.recent, self.bits, self.min_length = config.sink, config.recent, config.bits, config.threshold
        self.has_window_store = self.kept < head_dim and config.sink + config.recent > 0
        width = head_dim if self.has_window_store else self.kept
        self.matrix = projection.rotation[..., :width].contiguous().to(device)
        self._scale = projection.key_std[..., : self.kept].contiguous().to(device)
        self._mean = projection.key_mean[..., : self.kept].contiguous().to(device)
        self.eviction: Eviction | None = None
        if config.h2o_ratio < 1:
            self.eviction = Eviction(config.h2o_ratio, config.h2o_queries, config.sink, config.recent)
        self.active = True

    @property
    def is_plain(self) -> bool:
        """Whether the cache gives back the very keys and values that it was given, rotated."""
        return self.bits is None and self.eviction is None and not self.has_window_store

    @property
    def rounding(self) -> Rounding | None:
        """How a tiled cache rounds keys to 8 bits; None where it does not."""
        return Rounding(self._scale, self._mean) if self.bits == 8 else None

    def stores(self) -> tuple[Store, Store]:
        """An empty store for rotated keys, and one for values."""
        keys, values = self._leading_store(), self._value_store()
        if self.has_window_store:
            keys = WindowStore(keys, self.kept, self.sink, self.recent)
        return keys, values

    def rotated(self, keys: Tensor) -> Tensor:
        """Keys as the model computes them, [batch, num_key_value_heads, length, head_dim], in this layer's basis."""
        return rotate(keys, self.matrix)

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values as `bits` would give them back; those of an exact window are rounded too."""
        if self.bits is None:
            return keys, values
        leading, value_store = self._leading_store(), self._value_store()
        leading.append(keys[..., : self.kept])
        value_store.append(values)
        return torch.cat([leading.read(), keys[..., self.kept :]], -1), value_store.read()

    def tensors(self) -> list[Tensor]:
        """What stored states are made with."""
        return [self.matrix] if self.bits is None else [self.matrix, self._scale, self._mean]

    def same_as(self, other: CacheSpec) -> bool:
        """Whether a cache filled under the other can go on under this one."""
        if self is other:
            return True
        ours, theirs = (
            (spec.kept, spec.bits, spec.sink, spec.recent, spec.eviction, spec.matrix.shape) for spec in (self, other)
        )
        if ours != theirs or not same_weights(self.key_weights, other.key_weights):
            return False
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return all(torch.equal(mine, its.to(mine.device)) for mine, its in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheSpec:
        """Itself: a copied cache belongs to the attachment that filled the first, and ends with it."""
        return self

    def __getstate__(self) -> Any:
        """Not to be pickled: what is loaded elsewhere would know of no attachment."""
        raise AquaError("a cache that AQUA has filled cannot be pickled: write it with Attachment.save_cache")

    def _leading_store(self) -> Store:
        return Growing() if self.bits is None else Rounded(self.bits, self.recent, self._scale, self._mean)

    def _value_store(self) -> Store:
        return Growing() if self.bits is None else Rounded(self.bits, self.recent)


def same_weights(first: list[float] | None, second: list[float] | None) -> bool:
    """Whether two layers' key weights are the same as far as is known."""
    return first is None or second is None or weight_difference([first], [second]) <= WEIGHT_TOLERANCE
