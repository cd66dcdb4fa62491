# SPDX-License-Identifier: Apache-2.0
"""What a backend is, which ones there are, and the only place that chooses among them, and says why.

A backend is a module in `ops.backends`. It is loaded when it is first asked, and knows no other backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aqua_attention.errors import AquaError, Reason
from aqua_attention.ops import select
from aqua_attention.ops.plan import Attended, Call, LayerPlan

if TYPE_CHECKING:
    from aqua_attention.ops.layout import Chosen, TiledCache
    from aqua_attention.ops.pages import PagedCache, PagedLayer, Step
    from aqua_attention.ops.scored import ScoredCache

BACKENDS = {
    "triton": "aqua_attention.ops.backends.triton:Triton",
    "fused": "aqua_attention.ops.backends.torch:Fused",
    "cpu": "aqua_attention.ops.backends.cpu:Cpu",
    "chunked": "aqua_attention.ops.backends.torch:Chunked",
    "reference": "aqua_attention.ops.backends.torch:Reference",
}
"""In order of preference: "auto" is the first that gives no reason against a call."""
READS_ALL = Reason("it reads every token", "leave select_p and select_tokens out")
"""Why a backend cannot choose tokens."""
FROM_GROWING = Reason("on a CPU tokens are chosen from a growing cache")
"""Why a layer that chooses tokens is not in tiles there, which is no obstacle."""
Channels = tuple[Tensor, Tensor] | None
"""Scale and mean of the channels of rotated keys, float32 [heads, 1, width]; None: of values, which have none."""


class Backend:
    """One way to compute AQUA attention. A backend overrides what it can do; the rest is refused.

    Attributes:
        name: as `impl` says it.
        for_prompts: whether it attends to keys by token (`attend`); for_rotated: also with a choice that is made
            already (`attend_rotated`); for_choice: by a kernel that chooses tokens.
        keeps_short_unrotated: whether it decodes sequences shorter than `min_length` from keys as they came: where
            every dimension is multiplied, rotating cancels.
    """

    name = ""
    for_prompts = True
    for_rotated = False
    for_choice = False
    keeps_short_unrotated = False

    def why_not(self, call: Call, plan: LayerPlan | None) -> str | None:
        """Why it cannot take this call; None when it can.

        It is asked while `torch.compile` traces a call too, which cannot make a `Reason`.

        Args:
            plan: None for `attend_rotated`.
        """
        return None

    def is_automatic(self, call: Call) -> bool:
        """Whether "auto" may take it; otherwise it runs only where it is named."""
        return True

    def attend(self, call: Call, plan: LayerPlan) -> Attended:
        """Rotate the queries, choose dimensions, attend."""
        raise NotImplementedError

    def attend_rotated(self, call: Call, selected: Tensor | None) -> Tensor:
        """Attend with rotated queries and a choice, boolean of their shape; None: every dimension.

        Returns:
            [batch, num_attention_heads, queries, value_dim] in the dtype of the values.
        """
        raise NotImplementedError

    def why_not_rotate(self, states: Tensor, rotation: Tensor) -> str | None:
        """Why it does not rotate these states; None when it does."""
        return "it has no rotation of its own"

    def rotate(self, states: Tensor, rotation: Tensor) -> Tensor:
        """`ops.select.rotate`."""
        raise NotImplementedError

    def why_not_encode(self, states: Tensor) -> str | None:
        """Why it does not make codes of these states; None when it does."""
        return "it makes no codes"

    def encode(self, states: Tensor, channels: Channels) -> tuple[Tensor, Tensor, Tensor]:
        """States [batch, heads, length, width] as a growing cache stores them in 8 bits, see `cache.quantized`.

        Returns:
            Codes, uint8 of the same shape, and bfloat16 scales and zero points, [batch, heads, length, 1].
        """
        raise NotImplementedError

    def widen(self, codes: Tensor, scales: Tensor, zero_points: Tensor, channels: Channels, out: Tensor) -> None:
        """Write the states that `encode` made these of to `out`, of their shape, in its dtype."""
        raise NotImplementedError

    def serves_tiles(self, device: torch.device) -> bool:
        """Whether it is the one that decodes from a `TiledCache`, or a `ScoredCache`, on such a device."""
        return False

    def decodes_automatically(self, device: torch.device) -> bool:
        """Whether "auto" may have it decode from a tiled cache there."""
        return True

    def why_not_tiled(self, plan: LayerPlan, num_attention_heads: int, dtype: torch.dtype) -> str | None:
        """Why it cannot decode from a tiled cache of this layer, a `Reason` where a setting helps; None when it can."""
        return "it reads no tiles"

    def fill(
        self,
        cache: TiledCache | ScoredCache,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        order: Tensor | None = None,
    ) -> None:
        """`fill` of the cache, with the token at place order[b, t] as token t of sequence b; None: as they are.

        Args:
            order: int64 [batch, length].
        """
        if order is not None:
            keys, values = (states.gather(2, order[:, None, :, None].expand(states.shape)) for states in (keys, values))
        cache.fill(keys, values, lengths)

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float
    ) -> tuple[Tensor, Tensor, Chosen | None]:
        """One decoding step, see `ops.api.decode`."""
        raise NotImplementedError

    def decode_scored(
        self, query: Tensor, key: Tensor, value: Tensor, cache: ScoredCache, plan: LayerPlan, scaling: float
    ) -> tuple[Tensor, Chosen, Tensor]:
        """One decoding step that chooses tokens, see `ops.scored_step.selected_step`.

        Returns:
            The output, the dimensions that scored, and how many tokens were read, int32 [batch, num_key_value_heads];
            the last two are of the cache's memory, and hold until the next step.
        """
        raise NotImplementedError

    def why_not_paged(self, query: Tensor, cache: PagedCache, layer: PagedLayer) -> str | None:
        """Why it neither writes to nor decodes from these pages, for such queries, [tokens, num_attention_heads,
        head_dim]; a `Reason` where a setting helps; None when it does.
        """
        return "it knows no pages"

    def write_paged(self, key: Tensor, value: Tensor, cache: PagedCache, layer: PagedLayer, slots: Tensor) -> None:
        """See `ops.api.write_pages`."""
        raise NotImplementedError

    def decode_paged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: PagedCache,
        layer: PagedLayer,
        step: Step,
        output: Tensor,
    ) -> None:
        """See `ops.api.decode_pages`."""
        raise NotImplementedError

    def reserve_paged(
        self,
        layer: PagedLayer,
        num_attention_heads: int,
        value_dim: int,
        dtype: torch.dtype,
        *,
        sequences: int,
        length: int,
    ) -> None:
        """See `ops.api.reserve_pages`."""


_loaded: dict[str, Backend] = {}
"""A dictionary, and no cached function, because `torch.compile` looks into it without a break."""


def load(name: str) -> Backend:
    """A backend by its name in `BACKENDS`."""
    if name not in _loaded:
        module, _, backend = BACKENDS[name].partition(":")
        _loaded[name] = getattr(import_module(module), backend)()
    return _loaded[name]


def names(*, rotated: bool = False) -> list[str]:
    """Backends that attend to keys by token, the preferred first; `rotated`: with a choice that is made already."""
    loaded = [load(name) for name in BACKENDS]
    return [each.name for each in loaded if (each.for_rotated if rotated else each.for_prompts)]


def choose(call: Call, plan: LayerPlan | None, impl: str = "auto") -> Backend:
    """The backend that takes a call.

    Args:
        plan: None where queries are rotated and a choice is made already.
        impl: one of `names`, or "auto": the first of them that can take the call. All compute the same function.

    Raises:
        AquaError: an unknown `impl`, or one that cannot take this call; the message says why and what to use.
    """
    known = names(rotated=plan is None)
    if impl == "auto":
        for name in known:
            backend = load(name)
            if backend.is_automatic(call) and backend.why_not(call, plan) is None:
                return backend
    if impl not in known:
        raise AquaError(f"impl is {impl!r}: it must be one of {', '.join(['auto', *known])}")
    backend = load(impl)
    if reason := backend.why_not(call, plan):
        others = ", ".join(["auto", *known[known.index(impl) + 1 :]])
        raise AquaError(f"impl={impl!r} cannot take this call ({reason}): use {' or '.join(others.rsplit(', ', 1))}")
    return backend


def why_not_preferred(call: Call, plan: LayerPlan | None) -> str | None:
    """Why `choose` takes another backend than the one it prefers for such a call; None when it takes that one."""
    known = map(load, names(rotated=plan is None))
    return next(backend for backend in known if backend.is_automatic(call)).why_not(call, plan)


def why_not_chosen(call: Call, plan: LayerPlan) -> str | None:
    """Why no kernel chooses the tokens of such a call, of keys by token; None when one does."""
    return chooser().why_not(call, plan)


def chooser() -> Backend:
    """The backend whose kernel chooses tokens of keys by token."""
    return next(backend for backend in map(load, BACKENDS) if backend.for_choice)


def rotate(states: Tensor, rotation: Tensor) -> Tensor:
    """`ops.select.rotate`, by a kernel where there is one for these states."""
    for name in BACKENDS:
        backend = load(name)
        if backend.why_not_rotate(states, rotation) is None:
            return backend.rotate(states, rotation)
    return select.rotate(states, rotation)


def encoder(states: Tensor) -> Backend | None:
    """The backend that makes codes of these states; None: plain torch does, in `cache.quantized`."""
    return next((backend for backend in map(load, BACKENDS) if backend.why_not_encode(states) is None), None)


def tiled_backend(device: torch.device) -> Backend:
    """The backend that decodes from a tiled cache on a device; whether it can, `why_not_tiled` says."""
    return next(backend for backend in map(load, BACKENDS) if backend.serves_tiles(device))


def why_not_tiled(plan: LayerPlan, num_attention_heads: int, dtype: torch.dtype) -> str | None:
    """Why a layer cannot be decoded from a tiled cache, of which a layer that chooses tokens has a `ScoredCache`; None
    when it can.

    Args:
        dtype: of the model's queries, keys and values.
    """
    from aqua_attention.ops.layout import TILE

    config = plan.config
    if reason := tiled_backend(plan.rotation.device).why_not_tiled(plan, num_attention_heads, dtype):
        return reason
    if config.share != "group" and num_attention_heads != plan.num_key_value_heads:
        text = f"share is {config.share!r}, and the kernel reads the same dimensions for a group"
        return Reason(text, "set share='group' to read fewer bytes")
    if remedy := _remedy_for_stored(plan):
        return Reason("it stores neither bits=4, h2o_ratio nor s_ratio with an exact window", remedy)
    if max(config.sink, config.recent) > TILE:
        text = f"sink is {config.sink} and recent {config.recent}, and it takes {TILE} at most"
        return Reason(text, f"set sink and recent to {TILE} or less")
    return None


def paged_backend(query: Tensor, cache: PagedCache, layer: PagedLayer, impl: str = "auto") -> Backend | None:
    """The backend that takes pages; None: plain torch does.

    Args:
        impl: a backend's name, "torch", or "auto": the first that can, where it may be taken unasked.

    Raises:
        AquaError: an unknown `impl`, or one that cannot take these pages.
    """
    if impl == "auto":
        known = [load(name) for name in BACKENDS]
        able = (each for each in known if each.why_not_paged(query, cache, layer) is None)
        return next((each for each in able if each.decodes_automatically(query.device)), None)
    if impl == "torch":
        return None
    if impl not in BACKENDS:
        raise AquaError(f"impl is {impl!r}: it must be auto, torch or {', '.join(BACKENDS)}")
    if reason := load(impl).why_not_paged(query, cache, layer):
        raise AquaError(f"impl={impl!r} cannot take these pages ({reason}): use auto or torch")
    return load(impl)


def why_not_paged(query: Tensor, cache: PagedCache, layer: PagedLayer) -> str | None:
    """Why kernels do not take pages, so that plain torch does; None when they do."""
    return tiled_backend(query.device).why_not_paged(query, cache, layer)


def _remedy_for_stored(plan: LayerPlan) -> str:
    """What to change in what a cache stores, so that it can be in tiles; empty where it can."""
    if plan.config.bits == 4:
        on_gpu = plan.rotation.device.type == "cuda"
        return "set bits=8, or leave bits out" if on_gpu else "leave bits out (bits=8 needs a GPU)"
    if plan.config.h2o_ratio < 1:
        return "set h2o_ratio=1"
    return "leave s_ratio out, or sink and recent" if plan.has_window_store else ""
