# SPDX-License-Identifier: Apache-2.0
"""AQUA attention in a transformers model: attach, use the model as before, detach."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from aqua_attention.cache import Rotation, is_rotated, rotate_on_write
from aqua_attention.capture import AttentionLayer, attention_layers, innermost_decoder
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.interface import NAME_PREFIX, as_aqua_mask, install, mask_builder
from aqua_attention.ops.api import attention
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.projections import Projections

SelectionObserver = Callable[[int, Tensor | None, int], None]


@dataclass(frozen=True)
class _AttachedLayer:
    index: int
    head_dim: int
    rotation: Rotation
    key_rms: Tensor


class Attachment:
    """AQUA on one model. Made by `apply`; use it as a context manager, or call `attach` and `detach`.

    While attached, every attention layer of the model computes AQUA attention, in prefill and in decoding, and an
    empty `DynamicCache` (the default of `generate`) stores rotated keys. Any other cache works too, only slower:
    its keys are rotated at each step.

    Attributes:
        model, projections, config: as given.
        on_selection: called as on_selection(layer index, selected, head_dim) for every attention call; `selected` is
            boolean [batch, num_attention_heads, queries, kept] or None for every kept dimension.
    """

    def __init__(self, model: PreTrainedModel, projections: Projections, config: AquaConfig) -> None:
        """Check that everything fits; the model is not changed before `attach`.

        Raises:
            AquaError: the model cannot take AQUA, or the projections are not for it.
        """
        self.model, self.projections, self.config = model, projections, config
        self.on_selection: SelectionObserver | None = None
        self._found = attention_layers(model)
        projections.check_model(model, self._found)
        for layer in self._found:
            config.kept_dims(layer.head_dim)
        self._decoder = innermost_decoder(model, self._found)
        self._forward_parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._layers: dict[nn.Module, _AttachedLayer] = {}
        self._cache: Cache | None = None
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> Attachment:
        """Put AQUA into the model.

        Raises:
            AquaError: AQUA is attached to this model already.
        """
        if str(self.model.config._attn_implementation).startswith(NAME_PREFIX):
            raise AquaError("AQUA is attached to this model already: leave that `apply`, or call its detach(), first")
        self._layers = {layer.module: self._attached(layer) for layer in self._found}
        self._undo.append(install(self.model, self._attend, mask_builder(self.config.sink, self.config.recent)))
        before = self._decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        after = self._decoder.register_forward_hook(self._after_forward, always_call=True)
        self._undo += [before.remove, after.remove]
        return self

    def detach(self) -> None:
        """Leave the model as it was found. Caches that AQUA filled cannot be used by the model afterwards."""
        for layer in self._layers.values():
            layer.rotation.active = False
        while self._undo:
            self._undo.pop()()
        self._layers, self._cache = {}, None

    def __enter__(self) -> Attachment:
        return self if self._undo else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _attached(self, layer: AttentionLayer) -> _AttachedLayer:
        projection, kept = self.projections.layers[layer.index], self.config.kept_dims(layer.head_dim)
        return _AttachedLayer(
            index=layer.index,
            head_dim=layer.head_dim,
            rotation=Rotation(projection.rotation[..., :kept].contiguous().to(layer.device)),
            key_rms=projection.key_rms[..., :kept].contiguous().to(layer.device),
        )

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See which cache this forward pass uses, and make it rotate on write while it is empty."""
        given = dict(zip(self._forward_parameters, args, strict=False)) | kwargs
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        if self._checkpoints_gradients():
            # The model drops its cache in this mode: keys arrive as they are.
            self._cache = None
            return args, kwargs
        use_cache = self._decoder.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and "past_key_values" in self._forward_parameters:
            # The model would make this very cache itself, out of our sight.
            cache = DynamicCache(config=self._decoder.config)
            place = self._forward_parameters.index("past_key_values")
            if place < len(args):
                args = (*args[:place], cache, *args[place + 1 :])
            else:
                kwargs = kwargs | {"past_key_values": cache}
        if type(cache) is DynamicCache:
            rotate_on_write(cache, {layer.index: layer.rotation for layer in self._layers.values()})
        self._cache = cache
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._cache = None

    def _checkpoints_gradients(self) -> bool:
        return self.model.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self._decoder.modules()
        )

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
        if layer is None:
            raise AquaError(f"{type(module).__name__} was added to the model after AQUA was attached: attach again")
        if dropout > 0:
            raise AquaError("AQUA attention has no dropout: call model.eval(), or set attention_dropout to 0")
        scaling = layer.head_dim**-0.5 if scaling is None else scaling
        query = rotate(query, layer.rotation.matrix)
        if not is_rotated(self._cache_layer(layer.index), layer.rotation):
            key = rotate(key, layer.rotation.matrix)
        selected = select_dimensions(query, self.config, layer.head_dim, layer.key_rms)
        if self.on_selection is not None:
            self.on_selection(layer.index, selected, layer.head_dim)
        mask = as_aqua_mask(attention_mask)
        if mask is None and 1 < query.shape[2] < key.shape[2]:
            # Without a mask, keys behind the queries are the empty end of a static cache.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        output = attention(
            query,
            key,
            value,
            selected,
            mask=mask,
            sink=self.config.sink,
            recent=self.config.recent,
            scaling=scaling,
            softcap=softcap,
            s_aux=s_aux,
        )
        return output.transpose(1, 2).contiguous(), None

    def _cache_layer(self, index: int) -> Any:
        layers = getattr(self._cache, "layers", ())
        return layers[index] if index < len(layers) else None


def apply(model: PreTrainedModel, projections: Projections, config: AquaConfig | None = None) -> Attachment:
    """AQUA attention for `model`, to be used as a context manager that restores everything, also after an error.

    Example:
        >>> with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=0.5, selection="weighted", sink=4, recent=64)):
        ...     model.generate(**inputs)

    For a lasting change: `attachment = aqua.apply(model, projections, config).attach()`, and `attachment.detach()`.

    Raises:
        AquaError: the model does not use transformers' attention interface, or the projections are not for it.
    """
    return Attachment(model, projections, config or AquaConfig())
