# SPDX-License-Identifier: Apache-2.0
"""Base of all cache layers of AQUA: a plan, rotated keys that know their layer, and `attend`.

The bounded ones, with a sliding window or a fixed size, hold a layer of transformers' own, of rotated keys.
"""

from collections.abc import Callable
from functools import wraps
from threading import local
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from aqua_attention.cache.stored import as_stored, needs_own_cache
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attend, rotate
from aqua_attention.ops.mask import HIDDEN
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.select import rotate as rotate_plainly

OTHER_SETTINGS = (
    "this cache was filled under other AQUA projections or settings, or by a model with other weights or adapters: "
    "start with a new cache, or go back to those"
)


class CacheLayer(Protocol):
    """A cache layer of ours, of any kind.

    Its `update` hands keys and values to the model, which passes them on to our attention function, which asks the
    layer. So only the layer knows what it stores. One in a cache also has `batch`: how many sequences it holds.
    """

    plan: LayerPlan

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """Attention of new queries to all that is stored; then what the layer does after it (evict, write).

        `call` has the keys and values that `update` returned.
        """


class _HandedOut(local):
    """Of each thread, the layer whose keys were handed to the model last, in the forward pass that is under way."""

    layer: Any = None


_handed_out = _HandedOut()


def layer_of(key: Tensor, plan: LayerPlan) -> CacheLayer:
    """The cache layer that rotated `key`, as it enters attention, or `Uncached` where none did.

    The tensor itself says so: only it is the same in every thread, and under gradient checkpointing, where the model
    drops its cache in silence. An AquaError if it was rotated under another plan, or is not the tensor that the layer
    has just handed out: a copy does not say whether it is rotated.
    """
    # It stays noted: a model may attend to these keys once more, to a copy then.
    handed_out = _handed_out.layer
    layer: CacheLayer | None = getattr(key, "_aqua_layer", None)
    if layer is None and handed_out is not None and handed_out.plan is plan:
        raise AquaError(
            f"layer {plan.index} attends to a copy, or a part, of the keys that its AQUA cache has handed out, which "
            "are rotated: pass them on as they come from Cache.update, or leave out the cache (use_cache=False)"
        )
    if layer is None:
        return Uncached(plan)
    if layer.plan is not plan:
        raise AquaError(OTHER_SETTINGS)
    return layer


def tagged(keys: Tensor, layer: Any) -> Tensor:
    """The same keys, marked as rotated in `layer`, which the next attention of this thread should be to."""
    keys._aqua_layer = layer  # type: ignore[attr-defined]
    _handed_out.layer = layer
    return keys


def forget_handed_out() -> None:
    """A forward pass begins: what an earlier one has handed out means nothing."""
    _handed_out.layer = None


class Readable:
    """`keys` and `values` of our layers, as others read them: what the model gave, so that any cache can hold them.

    What is held is rotated. Nobody else is shown that, because a copy of a tensor does not say so. Both are copies:
    outside of inference mode torch lets nobody write to them, which would change nothing here.
    """

    plan: LayerPlan

    def held_states(self) -> tuple[Tensor, Tensor] | None:
        """Rotated keys and values of the tokens that are held, in the order they came; None while there are none."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor | None:
        """Keys as they came, [batch, num_key_value_heads, tokens, head_dim], but for what was not stored of them."""
        if (states := self.held_states()) is None:
            return None
        rotated, rotation = states[0], self.plan.rotation
        back = rotation[..., : rotated.shape[3]].transpose(1, 2).to(rotated.device)
        with torch.inference_mode(not rotated.requires_grad):
            return rotate_plainly(rotated, back)

    @keys.setter
    def keys(self, states: Any) -> None:
        _refuse_to_write("keys")

    @property
    def values(self) -> Tensor | None:
        """Values of the same tokens, [batch, num_key_value_heads, tokens, value_dim]; None while there are none."""
        if (states := self.held_states()) is None:
            return None
        with torch.inference_mode(not states[1].requires_grad):
            return states[1].clone()

    @values.setter
    def values(self, states: Any) -> None:
        _refuse_to_write("values")


def _refuse_to_write(name: str) -> None:
    raise AquaError(
        f"{name} of a cache layer of AQUA cannot be set: read keys and values, and put what you make of them into a "
        "new DynamicCache"
    )


def rotated_keys(plan: LayerPlan, key_states: Tensor) -> Tensor:
    """Keys in the basis of the plan, while AQUA is in the model."""
    check_active(plan)
    return rotate(key_states, plan.rotation)


def check_active(plan: LayerPlan) -> None:
    """Raise AquaError when AQUA has left the model."""
    if not plan.active:
        raise AquaError(
            "this cache holds AQUA-rotated keys, but the AQUA that filled it has left the model: apply the same "
            "projections and settings again, or start with a new cache"
        )


def attend_by_token(call: Call, plan: LayerPlan) -> Attended:
    """Attention to rotated keys and values as they are handed out."""
    key, value = call.key, call.value
    return attend(call._replace(query=call.query.to(value.dtype), key=key.to(value.dtype)), plan)


def without_empty_end(call: Call) -> Call:
    """Without a mask, keys behind the queries are the empty end of a static cache."""
    queries = call.query.shape[2]
    if call.mask is None and 1 < queries < call.key.shape[2]:
        return call._replace(key=call.key[:, :, :queries], value=call.value[:, :, :queries])
    return call


def check_handed_out(value: Tensor, handed: Tensor | None, stored: str) -> None:
    """Raise AquaError unless attention is to the values that `update` handed out, for the first time.

    A store of something else than plain values attends to its own.
    """
    if value is not handed:
        raise AquaError(
            f"the model changes or copies the values of its cache before it attends to them, or attends to them twice, "
            f"which {stored} cannot follow: leave that out"
        )


def real_tokens(mask: Tensor | None, batch: int, new: int, device: torch.device) -> Tensor:
    """Which of the new tokens of a call are no padding, boolean [batch, new]."""
    if mask is None:
        return torch.ones(batch, new, dtype=torch.bool, device=device)
    # A real token sees itself, a padding token is seen by none.
    indices = torch.arange(new, device=mask.device)
    seen = mask[:, :, indices, mask.shape[3] - new + indices] != HIDDEN
    return seen.any(1).expand(batch, -1)


class Uncached:
    """Keys that no cache of ours has rotated: scoring without a cache, or another kind of cache."""

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """See `CacheLayer`. With `bits`, keys and values are what a cache would give back: the loss is seen."""
        call, plan = without_empty_end(call), self.plan
        key, value = rotate(call.key, plan.rotation), call.value
        if not is_sliding:
            needs = needs_own_cache(plan.config)
            if needs and (key.shape[2] > call.query.shape[2] or plan.config.h2o_ratio < 1):
                raise AquaError(
                    f"{needs} needs a cache that AQUA has filled from its first token: start with a new one"
                )
            key, value = as_stored(plan, key, value)
        return attend_by_token(call._replace(key=key, value=value), plan)


def wait_for_offloading(device: torch.device) -> None:
    """The current stream waits until copies to the CPU have ended, and until what lay there before has been read.

    transformers fetches layers in a stream of its own, which up to 5.17 at least did not wait for either. Like it we
    take for granted that the model runs in the default stream.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable` where something is compiled; elsewhere it takes as long as a small kernel."""
    disabled = torch.compiler.disable(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


class Recordable:
    """Base of layers whose decoding step never waits for the host, so that a CUDA graph can record it.

    A prompt, and a token under a mask that is not known, go another way, which may ask.
    """

    plan: LayerPlan
    is_initialized: bool
    is_sliding: bool
    batch_size: int
    mask_is_known = True
    """Whether the mask of the coming forward pass hides nothing but the padding of a prompt; else tokens are attended
    to one by one in plain torch. Set before each pass, where nothing is being recorded."""
    _is_filled = False
    _new: tuple[Tensor, ...] | None = None

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self.batch_size if self.is_initialized else 0

    def decodes(self, queries: int) -> bool:
        """Whether so many new tokens are a decoding step."""
        return queries == 1 and self._is_filled and self.mask_is_known

    def knows(self, mask: Tensor) -> bool:
        """Whether a mask, [batch, tokens so far and one more], hides nothing but what was padding in a prompt."""
        raise NotImplementedError

    def addresses(self) -> list[int]:
        """Where what a recorded step reads and writes lies, which changes when the layer allocates anew."""
        raise NotImplementedError

    def store(self, mask: Tensor | None) -> None:
        """Write the tokens that `update` took and that the mask of their attention shows to be no padding."""
        raise NotImplementedError

    def _taken(self) -> tuple[Tensor, ...]:
        """What `update` has left to be written, once."""
        if self._new is None:
            raise AquaError(
                f"{type(self).__name__}: the model asked for attention twice after one update of its cache, which the "
                "tiled layout cannot follow: make the cache with layout='plain'"
            )
        new, self._new = self._new, None
        return new


class Bounded(Readable):
    """A layer of transformers' own, `held`, that is given rotated keys; all that is not here is its business."""

    held: Any

    def __init__(self, plan: LayerPlan, held: CacheLayerMixin) -> None:
        self.plan, self.held = plan, held

    def __getattr__(self, name: str) -> Any:
        if name == "held":  # while it is copied
            raise AttributeError(name)
        return getattr(self.held, name)

    def held_states(self) -> tuple[Tensor, Tensor] | None:
        """See `Readable`; of a fixed size also what is empty."""
        return (self.held.keys, self.held.values) if self.batch else None

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self.held.keys.shape[0] if self.held.is_initialized and self.held.keys is not None else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for keys as wide as they will be stored."""
        self.held.lazy_initialization(key_states[..., : self.plan.rotation.shape[2]], value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and write; returns the rotated keys and values to attend to, as transformers' layer does."""
        keys, values = self.held.update(rotated_keys(self.plan, key_states), value_states, *args, **kwargs)
        return tagged(keys, self), values

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """See `CacheLayer`."""
        return attend_by_token(without_empty_end(call), self.plan)

    def prefetch(self) -> None:
        """Move back to the device of the model, if it was offloaded."""
        if self.batch and self.held.keys.device != self.held.device:
            wait_for_offloading(self.held.device)
        self.held.prefetch()


CacheLayerMixin.register(Bounded)


class RotatedSlidingLayer(Bounded):
    """A sliding-window cache layer of rotated keys."""

    def __init__(self, plan: LayerPlan, *, sliding_window: int) -> None:
        super().__init__(plan, DynamicSlidingWindowLayer(sliding_window=sliding_window))

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All that is held, to be written to a file: numbers and tensors by name."""
        states = self.held_states()
        assert states is not None
        return {"cumulative_length": self.held.cumulative_length}, dict(zip(("keys", "values"), states, strict=True))

    def restore(self, numbers: dict[str, int], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Hold what `state` once returned, of a model in `dtype`."""
        if {tensors["keys"].dtype, tensors["values"].dtype} != {dtype}:
            raise ValueError(f"keys and values are not {dtype}")
        self.held.lazy_initialization(tensors["keys"], tensors["values"])
        self.held.keys, self.held.values = tensors["keys"], tensors["values"]
        self.held.cumulative_length = int(numbers["cumulative_length"])


class RotatedStaticLayer(Bounded):
    """A cache layer of fixed size, for `torch.compile` and CUDA graphs: rotated keys, `kept` wide, and values."""

    def __init__(self, plan: LayerPlan, *, max_cache_len: int) -> None:
        super().__init__(plan, StaticLayer(max_cache_len=max_cache_len))

    def grow(self, room: int) -> None:
        """Make room for so many tokens; what is held stays."""
        held, more = self.held, room - self.held.max_cache_len
        if held.keys is not None:
            held.keys, held.values = (F.pad(states, (0, 0, 0, more)) for states in (held.keys, held.values))
        held.max_cache_len = room


class RotatedStaticSlidingLayer(RotatedStaticLayer):
    """A sliding-window cache layer of fixed size, of rotated keys. It grows up to its window."""

    def __init__(self, plan: LayerPlan, *, max_cache_len: int, sliding_window: int) -> None:
        held = StaticSlidingWindowLayer(max_cache_len=max_cache_len, sliding_window=sliding_window)
        Bounded.__init__(self, plan, held)
