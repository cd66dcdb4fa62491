# SPDX-License-Identifier: Apache-2.0
"""The growing cache layer: keys rotated on write, held in stores, attended to there, and evicted from.

After an eviction it stores fewer tokens than its length says; positions and masks follow the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from aqua_attention.cache.spec import CacheSpec
from aqua_attention.cache.store import SLACK
from aqua_attention.cache.window import WindowStore
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attention
from aqua_attention.ops.mask import HIDDEN
from aqua_attention.ops.mass import attention_mass, group_mass
from aqua_attention.ops.reference import attention_probabilities, weighted_values

FEW_QUERIES = 16
"""So many queries multiply with stored codes; for more, the codes are widened into keys and values first."""
LEAST_EVICTED = 16
"""Eviction waits for so many new tokens, or one part in `SLACK` of the stored ones: then it moves these."""


OTHER_SETTINGS = (
    "this cache was filled under other AQUA projections or settings, or by a model with other weights: start with a "
    "new cache"
)
NUMBERS = ("evicted", "after_eviction", "evict_from", "has_padding")
"""What a `RotatedLayer` counts, for `state` and `restore`."""


class RotatedLayer(DynamicLayer):
    """A growing cache layer of rotated keys, [batch, num_key_value_heads, stored, kept], and values.

    Its length is the number of tokens it was given; it may store fewer of them.
    """

    def __init__(self, spec: CacheSpec) -> None:
        # Not DynamicLayer's: `keys` and `values` are read from the stores here.
        self.is_initialized = False
        self.spec = spec
        self._clear()

    def _clear(self) -> None:
        self._keys, self._values = self.spec.stores()
        self._evicted = 0
        self._after_eviction = 0
        """Tokens that the last eviction left."""
        self._evict_from = 0
        """Tokens stored at which eviction is due again: moving the others for each new one would cost too much."""
        self._mass: Tensor | None = None
        """Attention that each stored token was given, [batch, num_key_value_heads, stored]."""
        self._real: Tensor | None = None
        """Boolean [batch, stored]: which tokens are no padding. Kept where a window store or eviction needs it."""
        self._lengths: Tensor | None = None
        """Real tokens of each sequence so far, evicted ones too, [batch]."""
        self._has_padding = False
        self._is_offloaded = False

    @property
    def stored(self) -> int:
        """Tokens stored; less than the length after an eviction."""
        return self._keys.length

    @property
    def keys(self) -> Tensor | None:
        """All stored rotated keys, [batch, num_key_value_heads, stored, kept]; None while empty.

        With `s_ratio` and an exact window they have all dimensions, zero where they were not stored.
        """
        return self._keys.read() if self.stored else None

    @property
    def values(self) -> Tensor | None:
        """All stored values, [batch, num_key_value_heads, stored, value_dim]; None while empty."""
        return self._values.read() if self.stored else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and append; returns all rotated keys and all values.

        Where the stores hold something else than plain states, what is returned has their shape and is NaN: AQUA's
        attention function asks the layer itself (`attend`), and nobody else must read it.

        Raises:
            AquaError: AQUA has left the model.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotated = rotated_keys(self.spec, key_states)
        self._keys.append(rotated)
        self._values.append(value_states)
        if self.spec.is_plain:
            return tagged(self._keys.read(), self), self._values.read()
        nothing = rotated.new_full((1,), torch.nan)
        keys = nothing.expand(*rotated.shape[:2], self.stored, rotated.shape[3])
        return tagged(keys, self), nothing.to(value_states).expand(*keys.shape[:3], value_states.shape[3])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selected: Tensor | None,
        *,
        mask: Tensor | None,
        is_sliding: bool,
        **options: Any,
    ) -> Tensor:
        """AQUA attention to what `update` has stored, as `ops.api.attention`; then evict, if that is due.

        Args:
            key, value: what `update` returned.
            is_sliding: the attention layer has a sliding window; its tokens are never evicted.
            options: further arguments of `ops.api.attention`.
        """
        if self.spec.is_plain:
            return attention(query, key.to(value.dtype), value, selected, mask=mask, **options)
        if offloaded := self._is_offloaded:
            self.prefetch()
        mask = self._visible(mask, query.shape[2])
        groups, mass = key.shape[1], None
        eviction = None if is_sliding else self.spec.eviction
        watched = eviction is not None or isinstance(self._keys, WindowStore)
        real = self._new_real(mask, query.shape[2]) if watched else None
        if query.shape[2] <= FEW_QUERIES:
            probabilities = attention_probabilities(
                query, self._keys.products, selected, groups=groups, keys=self.stored, mask=mask, **options
            )
            output = weighted_values(probabilities, self._values.mixture, groups).to(value.dtype)
            if eviction is not None and real is not None:
                mass = group_mass(probabilities, groups, eviction.counted(real))
        else:
            key = self._keys.read().to(value.dtype)
            output = attention(query, key, self._values.read(), selected, mask=mask, **options)
            if eviction is not None and real is not None:
                # Without padding it is known without a look at the mask that only the last queries count.
                last = slice(-eviction.queries if eviction.queries and mask is None else None, None)
                mass = attention_mass(
                    query[:, :, last],
                    key,
                    None if selected is None else selected[:, :, last],
                    eviction.counted(real)[:, last],
                    None if mask is None else mask[:, :, last],
                    **options,
                )
        if real is not None:
            self._attended(real, mass)
        if offloaded:
            self.offload()
        return output

    def get_seq_length(self) -> int:
        """Tokens given so far, evicted ones too: the position of the next one."""
        return self.stored + self._evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask, and the position of the first; after an eviction, see `_visible`."""
        return self.stored + query_length, self._evicted

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n forgets n of them, n keeps n.

        Tokens that had left the exact window or the unrounded end do not get back what they lost then, and the
        attention that forgotten queries gave stays counted.

        Raises:
            AquaError: tokens have been evicted since the last one that would stay; nothing is changed then.
        """
        removed = self.check_crop(tokens_to_remove)
        left = self.stored - removed
        self._keys.keep(left)
        self._values.keep(left)
        if self._real is not None and self._lengths is not None:
            self._lengths = self._lengths - self._real[:, left:].sum(-1)
            self._real = self._real[:, :left]
        if self._mass is not None:
            self._mass = self._mass[..., :left]
        if left == 0:
            self._clear()

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens a crop would forget.

        Raises:
            AquaError: see `crop`.
        """
        length = self.get_seq_length()
        removed = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(length, -tokens_to_remove)
        if self._evicted and removed > self.stored - self._after_eviction:
            raise AquaError(
                f"the last {removed} tokens cannot be taken back, others were evicted after them: with h2o_ratio, "
                "leave out assisted decoding and cropping"
            )
        return removed

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
        self._is_offloaded = True

    def prefetch(self) -> None:
        """Move back to the device of the model."""
        if self.is_initialized:
            wait_for_offloading(self.device)
            self._change(lambda states: states.to(self.device, non_blocking=True))
        self._is_offloaded = False

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self._keys.batch if self.stored else 0

    @property
    def has_evicted(self) -> bool:
        """Whether it stores fewer tokens than it was given."""
        return self._evicted > 0

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All that is held, to be written to a file: numbers and tensors by name."""
        numbers = {name: int(getattr(self, f"_{name}")) for name in NUMBERS}
        tensors = {f"keys.{name}": tensor for name, tensor in self._keys.tensors().items()}
        tensors |= {f"values.{name}": tensor for name, tensor in self._values.tensors().items()}
        for name in ("mass", "real", "lengths"):
            if (tensor := getattr(self, f"_{name}")) is not None:
                tensors[name] = tensor
        return numbers, tensors

    def restore(self, numbers: dict[str, int], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Hold what `state` once returned, of a model in `dtype`."""
        self._clear()
        for name in NUMBERS:
            setattr(self, f"_{name}", type(getattr(self, f"_{name}"))(numbers[name]))
        for part, store in (("keys.", self._keys), ("values.", self._values)):
            store.restore({name.removeprefix(part): held for name, held in tensors.items() if name.startswith(part)})
        for name in ("mass", "real", "lengths"):
            setattr(self, f"_{name}", tensors.get(name))
        if self._keys.length != self._values.length:
            raise ValueError(f"{self._keys.length} keys, {self._values.length} values")
        if isinstance(self._keys, WindowStore) and self._real is not None:
            self._keys.settle(self._real)
        nothing = self.spec.matrix.new_empty(0, dtype=dtype)
        self.lazy_initialization(nothing, nothing)

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self._keys.change(function)
        self._values.change(function)
        for name in ("_mass", "_real", "_lengths"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))

    def _visible(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """A mask over the stored tokens, from the model's own, which knows nothing of evictions.

        Only its last columns, of the new tokens, are right after one. All earlier tokens are visible but for padding,
        and the exact window is counted among them: its tokens are never evicted, so it is the same window.
        """
        if self._evicted == 0 or self._real is None:
            return mask
        if mask is None and queries == 1 and not self._has_padding:
            return None
        if mask is None:
            new = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=self._real.device).tril()
        else:
            new = mask[..., -queries:] != HIDDEN
        old = self._known(self.stored - queries)[0][:, None, None]
        return torch.cat([old.expand(-1, new.shape[1], queries, -1), new.expand(len(old), -1, -1, -1)], -1)

    def _known(self, old: int) -> tuple[Tensor, Tensor]:
        """Which of the first `old` tokens are real, and how many of a sequence ever were; others count as real."""
        if self._real is None or self._lengths is None:
            real = torch.ones(self._keys.batch, old, dtype=torch.bool, device=self.device)
            return real, real.sum(-1)
        new = old - self._real.shape[1]
        return torch.nn.functional.pad(self._real, (0, new), value=True), self._lengths + new

    def _new_real(self, mask: Tensor | None, queries: int) -> Tensor:
        """Which of the new tokens are no padding, boolean [batch, queries]."""
        if mask is None:
            return torch.ones(self._keys.batch, queries, dtype=torch.bool, device=self.device)
        self._has_padding = True
        # A real token sees itself, a padding token is seen by none.
        places = torch.arange(queries, device=mask.device)
        seen = mask[:, :, places, mask.shape[3] - queries + places] != HIDDEN
        return seen.any(1).expand(self._keys.batch, -1)

    def _attended(self, new: Tensor, mass: Tensor | None) -> None:
        """Note which of the new tokens are real and who was attended to; trim the window store; evict."""
        before, counted = self._known(self.stored - new.shape[1])
        self._real, self._lengths = torch.cat([before, new], -1), counted + new.sum(-1)
        if isinstance(self._keys, WindowStore):
            self._keys.settle(self._real)
        if mass is not None:
            assert self.spec.eviction is not None
            known = self._mass
            if known is not None:
                known = torch.nn.functional.pad(known, (0, self.stored - known.shape[-1]))
                mass = self.spec.eviction.added(known, mass, new)
            self._mass = mass
            self._evict()

    def _evict(self) -> None:
        eviction, stored = self.spec.eviction, self.stored
        assert eviction is not None and self._mass is not None and self._real is not None and self._lengths is not None
        if stored < self._evict_from or stored <= eviction.at_most(self.get_seq_length()):
            return
        whole = max(self._keys.whole, self._values.whole)
        places, real = eviction.chosen(self._mass, self._real, self._lengths, whole)
        self._evict_from = places.shape[2] + max(places.shape[2] // SLACK, LEAST_EVICTED)
        if places.shape[2] == stored:
            return
        self._keys.gather(places)
        self._values.gather(places)
        self._mass, self._real = self._mass.gather(2, places), real
        if isinstance(self._keys, WindowStore):
            self._keys.settle(real)
        self._evicted += stored - self.stored
        self._after_eviction = self.stored


class HasSpec(Protocol):
    """A cache layer of ours, of any kind."""

    spec: CacheSpec


def layer_of(key: Tensor, spec: CacheSpec) -> HasSpec | None:
    """The cache layer that rotated `key`, as it enters attention; None when it is not rotated.

    The tensor itself says so: only it is the same in every thread, and under gradient checkpointing, where the model
    drops its cache in silence.

    Raises:
        AquaError: it was rotated for other projections, another s_ratio or another layer.
    """
    layer: HasSpec | None = getattr(key, "_aqua_layer", None)
    if layer is not None and layer.spec is not spec:
        raise AquaError(OTHER_SETTINGS)
    return layer


def tagged(keys: Tensor, layer: HasSpec) -> Tensor:
    """The same keys, marked as rotated in `layer`."""
    keys._aqua_layer = layer  # type: ignore[attr-defined]
    return keys


def rotated_keys(spec: CacheSpec, key_states: Tensor) -> Tensor:
    """Keys in the basis of `spec`, while AQUA is in the model."""
    check_active(spec)
    return spec.rotated(key_states)


def check_active(spec: CacheSpec) -> None:
    """Raise AquaError when AQUA has left the model."""
    if not spec.active:
        raise AquaError(
            "this cache holds AQUA-rotated keys, but the AQUA that filled it has left the model: apply the same "
            "projections and settings again, or start with a new cache"
        )


def wait_for_offloading(device: torch.device) -> None:
    """The current stream waits until copies to the CPU have ended, and until what lay there before has been read.

    transformers fetches layers in a stream of its own, which up to 5.17 at least did not wait for either. Like it we
    take for granted that the model runs in the default stream.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
