# SPDX-License-Identifier: Apache-2.0
"""AQUA attention in a transformers model: attach, use the model as before, detach."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from aqua_attention.attach.compiled import CompiledParts
from aqua_attention.attach.coverage import Coverage, Inputs, check_stacks, install_stack
from aqua_attention.attach.explain import Known, explained
from aqua_attention.attach.explanation import Explanation
from aqua_attention.attach.generate import BATCHING, GenerateCaches, Replaced, extends_masks, refuse_batching
from aqua_attention.attach.inputs import is_captured, positions_of, put, tokens_of
from aqua_attention.attach.possible import look_at_mask, why_no_tiles, why_not_by_itself, why_not_replayed
from aqua_attention.attach.recording import NO_GRAPHS, Recorder
from aqua_attention.attach.weights import Weights
from aqua_attention.cache.cache import (
    LAYOUTS,
    AquaCache,
    Plans,
    bounded_layers,
    foreign_layers,
    make_cache,
    prepare_for,
    rotate_on_write,
    sliding_windows,
)
from aqua_attention.cache.file import load_cache, save_cache
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.cache.layer import Recordable, forget_handed_out, layer_of
from aqua_attention.cache.stored import needs_own_cache
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig, check_bidirectional, encoder_config
from aqua_attention.errors import AquaError, Reason, said
from aqua_attention.machine import Shape, resolved
from aqua_attention.model import interface
from aqua_attention.model.capture import AttentionLayer, innermost_decoder
from aqua_attention.model.limits import has_learned_positions
from aqua_attention.ops.plan import Call, LayerPlan, Reading
from aqua_attention.ops.select import without_autocast

LOG = logging.getLogger("aqua_attention")
OWN_CACHES = (DynamicCache, AquaCache)
"""Caches whose layers can be ours."""
SelectionObserver = Callable[[int, Tensor | None, torch.Size, int], None]
ReadingObserver = Callable[[int, Reading], None]


class Attachment:
    """AQUA on one model. Made by `apply`; use it as a context manager, or call `attach` and `detach`.

    While attached, attention layers compute AQUA attention, in prefill and in decoding. `generate` gets a tiled cache
    of the size it needs, where that is possible. On a GPU its decoding steps are recorded as a CUDA graph. An empty
    `DynamicCache` stores rotated keys. Any other cache works too, but slower: its keys are rotated at each step.

    Attributes:
        model, projections: as given.
        config: as given, but a `min_length` of "auto" is a number, and for an encoder `recent` and the like are 0.
        sides: "text", "images" or both: what the layers under AQUA read.
        dense: attention layers that stay dense, by name. The projections or the pattern leave them out, or AQUA cannot
            take them, such as nn.MultiheadAttention (the pooling head of SigLIP).
        on_selection: called as on_selection(layer index, selected, shape of the rotated queries, head_dim) for every
            attention call; `selected` is boolean [batch, num_attention_heads, queries, kept] or None for all of them.
            It is told what was chosen, and changes no route.
        on_reading: called as on_reading(layer index, `ops.plan.Reading`) for every attention call in which tokens are
            chosen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections,
        config: AquaConfig,
        layers: str | None = None,
        *,
        layout: str = "auto",
        record: bool = True,
        compile: bool = True,
    ) -> None:
        """Check that everything fits; the model is not changed before `attach`. The options are those of `apply`.

        An AquaError where the model cannot take AQUA, the projections are not for it, or `min_length` is "auto" and
        nothing is known of this machine.
        """
        if layout not in LAYOUTS:
            raise AquaError(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
        self.model, self.projections = model, projections
        self.layout, self.record, self.compile = layout, record, compile
        self.on_selection: SelectionObserver | None = None
        self.on_reading: ReadingObserver | None = None
        self._coverage = coverage = Coverage(model, projections, layers)
        self._key_weights = coverage.key_weights()
        self._found, self.dense = coverage.found, coverage.dense
        self.sides = {layer.side for layer in self._found}
        self._causal = [layer for layer in self._found if layer.causal]
        if not self._causal:
            check_bidirectional(type(model).__name__, config)
            config = encoder_config(config)
        self.config = config = resolved(config, [layer_shape(layer, model.dtype) for layer in self._causal])
        for layer in self._found:
            config.kept_dims(layer.head_dim)
        self._decoder = innermost_decoder(model, self._causal or self._found)
        self._forward_parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._knows_positions = "position_ids" in self._forward_parameters and not has_learned_positions(self._decoder)
        self._foreign = foreign_layers(self._decoder.config, [layer.index for layer in self._causal])
        self._rotates_on_write = coverage.rotates_on_write(config, self._foreign)
        windows = sliding_windows(self._decoder.config) if self._causal else {}
        self._windows, self._exact_windows = windows, windows if config.sliding == "exact" else {}
        """Sizes of the sliding windows in which every dimension is multiplied, by layer index."""
        self._plans: dict[int, LayerPlan] = {}
        """By the `id` of the layer's module, which `torch.compile` compares before it runs code for a layer; of a key
        that is a module it compares the class only, and one layer would run code that has the plan of another."""
        self._undo: list[Callable[[], None]] = []
        self._bounded = bounded_layers(self._decoder.config) if self._causal else set()
        self.dropped: weakref.finalize[Any, Any] | None = None
        """Warns where this is dropped; given by `apply`, and taken back when AQUA is attached."""

    def __repr__(self) -> str:
        state = "attached" if self._plans else "not attached: use it in `with`, or call attach()"
        layers = f"{len(self._found)} layers under AQUA, {len(self.dense)} dense"
        changes = ", ".join(f"{name}={value!r}" for name, value in self.config.changes.items())
        return f"<Attachment of {type(self.model).__name__}: {layers}; AquaConfig({changes}); {state}>"

    def attach(self) -> Attachment:
        """Put AQUA into the model, and return itself; an AquaError where there is one, or another thread attaches."""
        with interface.CHANGES:
            return self._attach()

    def _attach(self) -> Attachment:
        if self.dropped:
            self.dropped.detach()
        interface.check_detached(self.model)
        self._plans = {id(layer.module): self._plan(layer) for layer in self._found}
        self._weights = Weights(self._plans, self._causal, self._coverage.key_weights)
        self._undo.append(self._weights.end)
        self._can_tile = False
        """Whether a tiled cache was found to be possible, which is asked once and not in each step."""
        stacks = [stack for causal in (True, False) if (stack := [f for f in self._found if f.causal == causal])]
        check_stacks(self.model, stacks)
        attention = interface.attention_function(type(self.model).__name__, self._attend)
        try:
            if self.layout == "tiled" and (reason := self._why_not_automatic()):
                raise AquaError(f"layout='tiled' is impossible here, because {said(reason, 'leave layout out')}")
            for stack in stacks:
                config = self.config if stack[0].causal else encoder_config(self.config)
                exact = next(iter(self._exact_windows.values()), None) if stack[0].causal else None
                builder = interface.mask_builder(config.sink, config.recent, config.threshold, exact)
                alone = len(stacks) == 1 and self._coverage.alone
                self._undo += install_stack(self.model, stack, alone, attention, builder, self._before_forward)
        except BaseException:
            self.detach()
            raise
        self._serve_generate()
        return self

    def _serve_generate(self) -> None:
        """Give `generate` of this model its cache and recorded steps."""
        make = functools.partial(self.new_cache, layout="tiled")
        self._caches = GenerateCaches(make, self._why_not_automatic, self.config)
        self._parts = parts = CompiledParts(self.model, self._causal, cuda_only=True, report=LOG.warning)
        self._recorder = Recorder(
            self.model,
            self.model.forward,
            self._why_not_replayed,
            parts=parts.used if self.compile else nullcontext,
            observing=self,
        )
        if not hasattr(self.model, "_prepare_cache_for_generation"):
            return

        def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._weights.looked(), self._recorder.generating(extends_masks(self.model, kwargs)):
                return self._caches.generate(original, *args, **kwargs)

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._recorder(*args, **kwargs)

        replacements = {"_prepare_cache_for_generation": self._caches.prepare, "generate": generate, "forward": forward}
        replacements |= {BATCHING: refuse_batching} if hasattr(self.model, BATCHING) else {}
        self._undo += [Replaced(self.model, name, by).undo for name, by in replacements.items()]
        self._undo.append(self.release)

    def release(self) -> None:
        """Free the cache and the recordings that are kept for the next call of `generate`."""
        self._caches.forget()
        self._recorder.forget()

    def detach(self) -> None:
        """Leave the model as it was found. Caches that AQUA filled cannot be used by the model afterwards."""
        with interface.CHANGES:
            for plan in self._plans.values():
                plan.active = False
            while self._undo:
                self._undo.pop()()
            self._plans = {}

    def __enter__(self) -> Attachment:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __reduce__(self) -> Any:
        raise AquaError("an Attachment cannot be copied or pickled: copy its model, and call `apply` for the copy")

    def new_cache(self, max_length: int | None = None, *, offloading: bool = False, layout: str = "auto") -> AquaCache:
        """An empty cache for this attachment, to be given to `generate` or `forward` as `past_key_values`.

        Args:
            max_length: tokens that are allocated at once; no shape changes then, as `torch.compile` and CUDA graphs
                need. None: the cache grows.
            offloading: keep the layers that are not in use on the CPU.
            layout: of a cache of fixed size. "tiled": keys by dimension, of which the decoding kernels read the chosen
                ones only, and sliding-window layers as rings. "plain": keys by token, all of them read. "auto": tiled
                on a GPU, where that is possible. The cache's `layout` says which it is. A tiled one can be recorded in
                a CUDA graph. `torch.compile` breaks its graph there: take a plain one for that.

        Raises:
            AquaError: AQUA is not attached, or a cache of fixed size or its layout cannot store a setting.
        """
        if not self._plans:
            raise AquaError("AQUA is not attached: make its cache inside `apply`, or after attach()")
        if not self._rotates_on_write:
            raise AquaError(
                f"{type(self.model).__name__} does not take its keys straight from its cache: leave new_cache out"
            )
        untiled = self._why_not_tiled() if max_length is not None else None
        return make_cache(self._decoder.config, self._cached(), max_length, offloading, layout, untiled)

    def explain(self, length: int = 4096, batch: int = 1) -> Explanation:
        """What a prompt of so many tokens, and decoding after it, run on; the bytes read; what would be faster.

        Before `generate` was called it says what will happen, then also what did. Print it, or read its fields.

        Args:
            length: tokens of each sequence, without padding; batch: sequences.

        Raises:
            AquaError: AQUA is not attached, or a size is below 1.
        """
        if not self._plans:
            raise AquaError("AQUA is not attached: ask for an explanation inside `apply`, or after attach()")
        if min(length, batch) < 1:
            raise AquaError(f"length is {length} and batch {batch}: they must be 1 or more")
        untiled, cache = self._why_not_automatic() if self._causal else None, None
        if self._rotates_on_write:
            cache = self.new_cache() if untiled else self.new_cache(length, layout="tiled")
        known = Known(
            self._decoder, self._found, self._plans, len(self.dense), cache, untiled, self._why_not_recorded()
        )
        return explained(known, self._caches, self._recorder, self._parts if self.compile else None, length, batch)

    def save_cache(self, cache: Cache, path: Path | str) -> None:
        """Write a growing cache that this attachment has filled to one safetensors file, whole or not at all.

        An AquaError for another kind of cache, an empty one, or where the file cannot be written.
        """
        save_cache(path, cache, self._cached(), self._model_facts())

    def load_cache(self, path: Path | str) -> AquaCache:
        """A cache from a file, to go on with: same model, projections, and settings of what is stored.

        An AquaError where the file is damaged, or of another model, other projections or settings.
        """
        cache = self.new_cache()
        load_cache(path, cache, self._cached(), self._model_facts())
        return cache

    def _model_facts(self) -> dict[str, Any]:
        return {"shape": self.projections.model["shape"], "dtype": str(self.model.dtype)}

    def _cached(self) -> Plans:
        """The plans of the layers that share a cache."""
        return {plan.index: plan for plan in self._plans.values() if plan.causal}

    def _plan(self, layer: AttentionLayer) -> LayerPlan:
        """All that is known of a layer before its first call."""
        config = self.config if layer.causal else encoder_config(self.config)
        if layer.causal and layer.index in self._exact_windows:
            config = config.exact()
        elif layer.index in self._windows:
            config = config.reading_all()
        facts = {"causal": layer.causal, "key_weights": self._key_weights[layer.module]}
        return self.projections.layers[layer.index].plan(config, layer.device, index=layer.index, **facts)

    def _why_not_tiled(self) -> str | None:
        """Why there can be no cache for the decoding kernels; None when there can, or when they have no layer."""
        return self._coverage.why_no_tiles() or self._foreign or why_no_tiles(self._decoder, self._causal, self._plans)

    def _why_not_automatic(self) -> str | None:
        """Why `generate` is not given a tiled cache; None when it is."""
        if self.layout == "plain":
            return Reason("layout is 'plain'", "leave layout out")
        if not self._rotates_on_write:
            return Reason(f"{type(self.model).__name__} does not take its keys straight from its cache")
        devices = {plan.rotation.device for plan in self._cached().values()}
        return (self.layout == "auto" and why_not_by_itself(devices)) or self._why_not_tiled()

    def _why_not_recorded(self) -> str | None:
        """Why no decoding step is recorded, whatever the cache; None when some can be."""
        if not self._recorder.has_graphs():
            return NO_GRAPHS
        return None if self.record else Reason("record is False", "set record=True")

    def _why_not_replayed(self, cache: Any, mask: Tensor | None) -> str | None:
        """Why the next decoding step on this cache cannot be recorded; None when it can."""
        return self._why_not_recorded() or why_not_replayed(cache, mask)

    def _before_forward(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Say the positions of padded rows; make an empty cache rotate on write, where that is right."""
        if holder is not self._decoder:
            return args, kwargs
        forget_handed_out()
        given = dict(zip(self._forward_parameters, args, strict=False)) | kwargs
        if self._knows_positions and (positions := positions_of(given)) is not None:
            args, kwargs = put(self._forward_parameters, "position_ids", positions, (args, kwargs))
        if not self._rotates_on_write:
            return args, kwargs
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        use_cache = getattr(self._decoder.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache and "past_key_values" in self._forward_parameters:
            # The model would make this very cache itself, out of our sight.
            cache = DynamicCache(config=self._decoder.config)
            args, kwargs = put(self._forward_parameters, "past_key_values", cache, (args, kwargs))
        if (needs := needs_own_cache(self.config)) and cache is not None and type(cache) not in OWN_CACHES:
            raise AquaError(
                f"{needs} needs a DynamicCache, the default of generate, not a {type(cache).__name__}: leave one of "
                "the two out"
            )
        if type(cache) in OWN_CACHES and not is_captured():
            if (tokens := tokens_of(given)) is not None and tokens.shape[1] > 1:
                self._weights.look()
            rotate_on_write(cache, self._cached(), self._decoder.config)
            self._check(cache, given)
        return args, kwargs

    def _check(self, cache: Cache, given: dict[str, Any]) -> None:
        """Raise AquaError for a forward pass that some layer would refuse after others have written their tokens."""
        tokens = tokens_of(given)
        if tokens is not None:
            prepare_for(cache, self._cached(), tokens.shape[0], tokens.shape[1])
        mask = given.get("attention_mask")
        recordable = [layer for layer in cache.layers if isinstance(layer, Recordable)]
        if not self._can_tile and any(isinstance(layer, TiledLayer) for layer in recordable):
            if reason := self._why_not_tiled():
                remedies = said(reason, "make a new one")
                raise AquaError(f"this cache is tiled, which is impossible here, because {remedies}")
            self._can_tile = True
        look_at_mask(cache, mask)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            interface.as_aqua_mask(mask)
            if any(isinstance(layer, RotatedLayer) and layer.has_evicted for layer in cache.layers):
                raise AquaError(
                    "after an eviction (h2o_ratio), a 4-D mask no longer says which tokens it means: give a 2-D one"
                )
        if needs := torch.is_grad_enabled() and ("the tiled layout" if recordable else needs_own_cache(self.config)):
            trained = any(weight.requires_grad for weight in self._decoder.parameters())
            if trained or (tokens is not None and tokens.requires_grad):
                raise AquaError(f"{needs} has no gradient: leave it out, or use torch.no_grad()")

    def _attend(self, module: nn.Module, call: Call, causal: bool, given: dict[str, Any]) -> Tensor:
        """Attention of one layer; query and key arrive after rotary embedding."""
        plan = self._plans.get(id(module))
        self._coverage.check_call(module, causal, given.get("dropout", 0.0), None if plan is None else plan.causal)
        if plan is None:
            return interface.attend_dense(interface.directed(call, causal))
        call = interface.directed(call, causal, plan.sink)
        is_sliding = bool(given.get("sliding_window")) or plan.index in self._bounded
        if is_sliding and call.mask is not None and call.mask.dtype == torch.bool and plan.needs_codes:
            raise AquaError(
                "sink, recent and min_length in a sliding-window layer need a 2-D mask, not a 4-D one: set them to 0"
            )
        observer = self.on_selection
        call = call._replace(sink=plan.sink, recent=plan.recent, is_observed=bool(observer or self.on_reading))
        with without_autocast(call.query.device.type):
            output, selected, rotated, reading = layer_of(call.key, plan).attend(call, is_sliding)
        if observer is not None:
            observer(plan.index, selected, rotated, plan.head_dim)
        if self.on_reading is not None and reading is not None:
            self.on_reading(plan.index, reading)
        return output


def layer_shape(layer: AttentionLayer, dtype: torch.dtype) -> Shape:
    """What the profile of a layer is looked up by, see `machine.resolved`."""
    return Shape(layer.device, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, dtype)
