# SPDX-License-Identifier: Apache-2.0
"""AQUA attention in a transformers model: attach, use the model as before, detach."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from aqua_attention.attach.coverage import Coverage, attend_dense
from aqua_attention.attach.new_cache import LAYOUTS, make_cache, needs_own_cache, why_untiled
from aqua_attention.attach.stacks import check_stacks, install_stack
from aqua_attention.cache.cache import AquaCache, check_cache, rotate_on_write
from aqua_attention.cache.file import load_cache, save_cache
from aqua_attention.cache.growing import RotatedLayer, layer_of
from aqua_attention.cache.spec import CacheSpec
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig, check_bidirectional, encoder_config
from aqua_attention.errors import AquaError
from aqua_attention.machine import Shape, resolved
from aqua_attention.model.capture import AttentionLayer, innermost_decoder
from aqua_attention.model.interface import as_aqua_mask, check_call, check_detached, mask_builder
from aqua_attention.ops.api import attend, attention, rotate
from aqua_attention.ops.mask import bidirectional, short_queries
from aqua_attention.ops.select import select_dimensions

OWN_CACHES = (DynamicCache, AquaCache)
"""Caches whose layers can be ours."""
SelectionObserver = Callable[[int, Tensor | None, torch.Size, int], None]


@dataclass(frozen=True)
class _AttachedLayer:
    index: int
    head_dim: int
    spec: CacheSpec
    key_rms: Tensor
    causal: bool
    config: AquaConfig


class Attachment:
    """AQUA on one model. Made by `apply`; use it as a context manager, or call `attach` and `detach`.

    While attached, every attention layer of the model computes AQUA attention, in prefill and in decoding, and an
    empty `DynamicCache` (the default of `generate`) stores rotated keys. Any other cache works too, only slower:
    its keys are rotated at each step.

    Attributes:
        model, projections, config: as given, but a `min_length` of "auto" is a number.
        sides: "text", "images" or both: what the layers under AQUA read.
        dense: names of the attention layers that stay dense: the projections or the pattern leave them out, AQUA cannot
            take them, as an nn.MultiheadAttention (the pooling head of SigLIP), or they were not found, for a reason.
        on_selection: called as on_selection(layer index, selected, shape of the rotated queries, head_dim) for every
            attention call; `selected` is boolean [batch, num_attention_heads, queries, kept] or None for all of them.
    """

    def __init__(
        self, model: PreTrainedModel, projections: Projections, config: AquaConfig, layers: str | None = None
    ) -> None:
        """Check that everything fits; the model is not changed before `attach`.

        Args:
            layers: see `apply`.

        Raises:
            AquaError: the model cannot take AQUA, the projections are not for it, or `min_length` is "auto" and nothing
                is known of this machine.
        """
        self.model, self.projections = model, projections
        self.on_selection: SelectionObserver | None = None
        self._coverage = coverage = Coverage(model, projections, layers)
        weights = projections.check_model(model, coverage.covered)
        self._key_weights = {
            layer.module: weights[place] if weights else None for place, layer in enumerate(coverage.covered)
        }
        self._found, self.dense = coverage.found, coverage.dense
        self.sides = {layer.side for layer in self._found}
        self._causal = [layer for layer in self._found if layer.causal]
        if not self._causal:
            check_bidirectional(type(model).__name__, config)
        self.config = config = resolved(config, [layer_shape(layer, model.dtype) for layer in self._causal])
        for layer in self._found:
            config.kept_dims(layer.head_dim)
        self._decoder = innermost_decoder(model, self._causal or self._found)
        self._forward_parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._rotates_on_write = bool(self._causal) and all(layer.reads_own_cache for layer in self._causal)
        if (needs := needs_own_cache(config)) and not self._rotates_on_write:
            raise AquaError(
                f"{type(model).__name__} does not take its keys straight from its cache, so that {needs} would save "
                "nothing: leave it out"
            )
        if needs and any(coverage.left.values()):
            raise AquaError(f"{needs} is for all layers of a language model: leave it out, or the pattern of layers")
        self._layers: dict[nn.Module, _AttachedLayer] = {}
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> Attachment:
        """Put AQUA into the model.

        Raises:
            AquaError: AQUA is attached to this model already.
        """
        check_detached(self.model)
        self._layers = {layer.module: self._attached(layer) for layer in self._found}
        self._can_tile = False
        """Whether a tiled cache was found to be possible, which is asked once and not in each step."""
        self._undo = []
        stacks = [stack for causal in (True, False) if (stack := [f for f in self._found if f.causal == causal])]
        check_stacks(self.model, stacks)
        try:
            for stack in stacks:
                config = self._layers[stack[0].module].config
                builder = mask_builder(config.sink, config.recent, config.threshold)
                alone = len(stacks) == 1 and self._coverage.alone
                self._undo += install_stack(self.model, stack, alone, self._attend, builder, self._before_forward)
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Leave the model as it was found. Caches that AQUA filled cannot be used by the model afterwards."""
        for layer in self._layers.values():
            layer.spec.active = False
        while self._undo:
            self._undo.pop()()
        self._layers = {}

    def __enter__(self) -> Attachment:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def new_cache(self, max_length: int | None = None, *, offloading: bool = False, layout: str = "auto") -> AquaCache:
        """An empty cache for this attachment, to be given to `generate` or `forward` as `past_key_values`.

        Args:
            max_length: None grows as needed; a number of tokens allocates them once and never changes a shape, as
                `torch.compile` and CUDA graphs need.
            offloading: keep the layers that are not in use on the CPU.
            layout: of a cache of fixed size. "tiled": keys by dimension, for the decoding kernels, which read the
                chosen dimensions only (on a CPU, one in C that is compiled when it is first used); "plain": keys by
                token, all of them read; "auto": tiled on a GPU, where that is possible. The cache's `layout` says which
                it is. A tiled one can be recorded in a CUDA graph; `torch.compile` breaks its graph there, so take a
                plain one for that.

        Raises:
            AquaError: not attached, or a setting that a cache of fixed size or its layout cannot store.
        """
        if layout not in LAYOUTS:
            raise AquaError(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
        if not self._layers:
            raise AquaError("AQUA is not attached: make its cache inside `apply`, or after attach()")
        if not self._rotates_on_write:
            raise AquaError(f"{type(self.model).__name__} does not take its keys straight from its cache")
        return make_cache(self._decoder, self._causal, self._specs(), self.config, max_length, offloading, layout)

    def save_cache(self, cache: Cache, path: Path | str) -> None:
        """Write a growing cache that this attachment has filled to one safetensors file, whole or not at all.

        Raises:
            AquaError: another kind of cache, an empty one, or the file cannot be written.
        """
        save_cache(path, cache, self._specs(), self.config, self._model_facts())

    def load_cache(self, path: Path | str) -> AquaCache:
        """A cache from a file, to go on with: same model, projections, and settings of what is stored.

        Raises:
            AquaError: the file is damaged, or of another model, other projections or settings.
        """
        cache = self.new_cache()
        load_cache(path, cache, self._specs(), self.config, self._model_facts())
        return cache

    def _model_facts(self) -> dict[str, Any]:
        return {"shape": self.projections.model["shape"], "dtype": str(self.model.dtype)}

    def _specs(self) -> dict[int, CacheSpec]:
        return {layer.index: layer.spec for layer in self._layers.values() if layer.causal}

    def _attached(self, layer: AttentionLayer) -> _AttachedLayer:
        projection, kept = self.projections.layers[layer.index], self.config.kept_dims(layer.head_dim)
        config = self.config if layer.causal else encoder_config(self.config)
        return _AttachedLayer(
            index=layer.index,
            head_dim=layer.head_dim,
            spec=CacheSpec(projection, config, layer.device, self._key_weights[layer.module]),
            key_rms=projection.key_rms[..., :kept].contiguous().to(layer.device),
            causal=layer.causal,
            config=config,
        )

    def _before_forward(
        self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the cache of this forward pass rotate on write, while it is empty and where that is right."""
        if not self._rotates_on_write or holder is not self._decoder:
            return args, kwargs
        given = dict(zip(self._forward_parameters, args, strict=False)) | kwargs
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        use_cache = getattr(self._decoder.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache and "past_key_values" in self._forward_parameters:
            # The model would make this very cache itself, out of our sight.
            cache = DynamicCache(config=self._decoder.config)
            place = self._forward_parameters.index("past_key_values")
            if place < len(args):
                args = (*args[:place], cache, *args[place + 1 :])
            else:
                kwargs = kwargs | {"past_key_values": cache}
        if (needs := needs_own_cache(self.config)) and cache is not None and type(cache) not in OWN_CACHES:
            raise AquaError(
                f"{needs} needs a DynamicCache, the default of generate, not a {type(cache).__name__}: leave one of "
                "the two out"
            )
        if type(cache) in OWN_CACHES and not _is_captured():
            rotate_on_write(cache, self._specs(), self._decoder.config)
            self._check(cache, given)
        return args, kwargs

    def _check(self, cache: Cache, given: dict[str, Any]) -> None:
        """Raise AquaError for a forward pass that some layer would refuse after others have written their tokens."""
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if isinstance(tokens, Tensor):
            check_cache(cache, self._specs(), tokens.shape[0], tokens.shape[1])
        mask = given.get("attention_mask")
        tiled = [layer for layer in cache.layers if isinstance(layer, TiledLayer)]
        if tiled and not self._can_tile:
            if reason := why_untiled(self._decoder, self._causal, self._specs(), self.config, 1):
                raise AquaError(f"this cache is tiled, which is impossible here, because {reason}: make a new one")
            self._can_tile = True
        if tiled:
            # All hold the same tokens; asking one of them waits for the GPU once a step.
            is_known = mask is None or (isinstance(mask, Tensor) and tiled[0].knows(mask))
            for layer in tiled:
                layer.mask_is_known = is_known
        if isinstance(mask, Tensor) and mask.ndim == 4:
            as_aqua_mask(mask)
            if any(isinstance(layer, RotatedLayer) and layer.has_evicted for layer in cache.layers):
                raise AquaError("after an eviction (h2o_ratio), a 4-D mask no longer says which tokens it means")
        if needs := torch.is_grad_enabled() and ("the tiled layout" if tiled else needs_own_cache(self.config)):
            trained = any(weight.requires_grad for weight in self._decoder.parameters())
            if trained or (isinstance(tokens, Tensor) and tokens.requires_grad):
                raise AquaError(f"{needs} has no gradient: leave it out, or use torch.no_grad()")

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention function that transformers calls; query and key arrive after rotary embedding."""
        layer = self._layers.get(module)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        self._coverage.check_call(module, causal, dropout, None if layer is None else layer.causal)
        check_call(type(self.model).__name__, kwargs)
        mask = as_aqua_mask(attention_mask)
        if mask is None and not causal:
            sink = 0 if layer is None else layer.config.sink
            mask = bidirectional(query.shape[2], key.shape[2], sink=sink, device=query.device)
        options: dict[str, Any] = {"softcap": softcap, "s_aux": s_aux}
        if layer is None:
            output = attend_dense(query, key, value, mask, scaling=scaling, **options)
            return output.transpose(1, 2).contiguous(), None
        config = layer.config
        sliding_window = kwargs.get("sliding_window")
        needs_codes = config.sink + config.recent + config.threshold > 0
        if needs_codes and mask is not None and mask.dtype == torch.bool and sliding_window:
            raise AquaError(
                "sink, recent and min_length in a sliding-window layer need a 2-D attention mask, not a 4-D one"
            )
        scaling = layer.head_dim**-0.5 if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            cached = layer_of(key, layer.spec)
            if isinstance(cached, TiledLayer):
                if sliding_window or softcap or s_aux is not None:
                    raise AquaError(
                        "the tiled layout knows neither sliding windows, softcap nor extra softmax logits: make the "
                        "cache with layout='plain'"
                    )
                if cached.decodes(query.shape[2]):
                    output, query, chosen = cached.decode(query, layer.key_rms, self.config, scaling)
                    if self.on_selection is not None:
                        selected = None if chosen is None else chosen.selected(query.shape[1])
                        self.on_selection(layer.index, selected, query.shape, layer.head_dim)
                    return output.transpose(1, 2).contiguous(), None
            queries = query.shape[2]
            if mask is None and 1 < queries < key.shape[2] and not isinstance(cached, (RotatedLayer, TiledLayer)):
                # Without a mask, keys behind the queries are the empty end of a static cache.
                key, value = key[:, :, :queries], value[:, :, :queries]
            if cached is None:
                key, value = self._uncached(layer.spec, key, value, queries, bool(sliding_window))
            options |= {"mask": mask, "scaling": scaling}
            # A tiled layer rounds, if at all, what it stores afterwards.
            if (layer.spec.is_plain or isinstance(cached, TiledLayer)) and self.on_selection is None:
                query, key = query.to(value.dtype), key.to(value.dtype)
                output = attend(query, key, value, layer.spec.matrix, layer.key_rms, config, **options)
            else:
                query = rotate(query, layer.spec.matrix).to(value.dtype)
                selected = self._selected(layer, query, scaling, mask, key.shape[2])
                options |= {"sink": config.sink, "recent": config.recent}
                if isinstance(cached, RotatedLayer):
                    output = cached.attend(query, key, value, selected, is_sliding=bool(sliding_window), **options)
                else:
                    output = attention(query, key.to(value.dtype), value, selected, **options)
            if isinstance(cached, TiledLayer):
                cached.store(mask)
        return output.transpose(1, 2).contiguous(), None

    def _selected(
        self, layer: _AttachedLayer, query: Tensor, scaling: float, mask: Tensor | None, keys: int
    ) -> Tensor | None:
        """The dimensions that each query multiplies outside the exact window; shape of `query`, or None for all."""
        kept, min_length = layer.spec.kept, layer.config.threshold
        leading = query[..., :kept]
        short = short_queries(mask, min_length, queries=query.shape[2], keys=keys, device=query.device)
        selected = select_dimensions(leading, layer.config, layer.head_dim, layer.key_rms, scaling, short)
        if self.on_selection is not None:
            self.on_selection(layer.index, selected, leading.shape, layer.head_dim)
        if kept == query.shape[-1]:
            return selected
        selected = leading.new_ones(leading.shape, dtype=torch.bool) if selected is None else selected
        return torch.nn.functional.pad(selected, (0, query.shape[-1] - kept))

    def _uncached(
        self, spec: CacheSpec, key: Tensor, value: Tensor, queries: int, is_sliding: bool
    ) -> tuple[Tensor, Tensor]:
        """Rotate keys that no cache of ours has rotated: scoring without a cache, or another kind of cache.

        With `bits`, keys and values are what a cache would give back, so that the loss of rounding is seen.
        """
        key = spec.rotated(key)
        needs = None if is_sliding else needs_own_cache(self.config)
        if needs and (key.shape[2] > queries or spec.eviction):
            raise AquaError(f"{needs} needs a cache that AQUA has filled from its first token: start with a new one")
        return (key, value) if is_sliding else spec.rounded(key, value)


def layer_shape(layer: AttentionLayer, dtype: torch.dtype) -> Shape:
    """What the profile of a layer is looked up by, see `machine.resolved`."""
    return Shape(layer.device, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, dtype)


def _is_captured() -> bool:
    """Whether this call is being compiled or recorded, when lengths cannot be looked at."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def apply(
    model: PreTrainedModel, projections: Projections, config: AquaConfig | None = None, *, layers: str | None = None
) -> Attachment:
    """AQUA attention for `model`, to be used as a context manager that restores everything, also after an error.

    Example:
        >>> with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=0.5, selection="weighted", sink=4, recent=64)):
        ...     model.generate(**inputs)

    For a lasting change: `attachment = aqua.apply(model, projections, config).attach()`, and `attachment.detach()`.

    Args:
        layers: only the layers whose name matches, such as "vision_tower.*" in a vision-language model; the others stay
            dense, as do those that the projections do not cover. `Attachment.dense` names them.

    Raises:
        AquaError: the model does not use transformers' attention interface, the projections are not for it, or a
            setting means nothing to it: an encoder has no cache, and no token is its most recent one.
    """
    return Attachment(model, projections, config or AquaConfig(), layers)
