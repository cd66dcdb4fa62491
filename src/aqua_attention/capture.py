# SPDX-License-Identifier: Apache-2.0
"""A model's attention layers, and the queries and keys that pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.interface import as_aqua_mask, check_call, check_detached, install, mask_builder
from aqua_attention.ops.api import attention

Observer = Callable[[nn.Module, Tensor, Tensor, float], None]
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model: where it is and the shape of its heads."""

    index: int
    """`layer_idx` of the module, which is also its place in a cache."""
    module: nn.Module
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    device: torch.device
    reads_own_cache: bool
    """Whether its keys come straight from this layer of a `DynamicCache`, so that they can be rotated when written."""


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """While open, `observer(module, query, key, scaling)` sees every attention call; the model's results stay dense.

    query: [batch, num_attention_heads, length, head_dim], key: [batch, num_key_value_heads, length, head_dim], as
    they enter the scores: after rotary embedding and after any query-key norm.
    """

    def dense(
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
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        check_call(type(model).__name__, causal, kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        observer(module, query, key, scaling)
        with torch.autocast(query.device.type, enabled=False):
            output = attention(
                query.to(value.dtype),
                key.to(value.dtype),
                value,
                None,
                mask=as_aqua_mask(attention_mask),
                scaling=scaling,
                softcap=softcap,
                s_aux=s_aux,
            )
        return output.transpose(1, 2).contiguous(), None

    _, undo = install(model, dense, mask_builder(0, 0))
    try:
        yield
    finally:
        undo()


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of a decoder in order, found by running it on four tokens and watching.

    The run is compared with the model's own attention. Watching instead of reading class names means that a layer on
    this list really sends its attention through the interface, and one that does not is never taken for rotated.

    Raises:
        AquaError: the model is no decoder that sends its attention through transformers' interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise AquaError(f"model is a {type(model).__name__}: a transformers PreTrainedModel is needed")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise AquaError(f"{name} is an encoder-decoder: only decoder language models are supported")
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    tokens = torch.arange(4, device=input_device(model))[None]
    check_detached(model)
    try:
        with torch.no_grad(), evaluation_mode(model):
            with observed(model, lambda module, query, key, scaling: seen.update({module: (query, key)})):
                output = model(input_ids=tokens, use_cache=True)
            expected = model(input_ids=tokens)
    except AquaError:
        raise
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise AquaError(f"{name} does not run on token ids alone, so it is not supported ({reason})") from error
    if not seen:
        raise AquaError(f"{name} made no attention call: AQUA needs a model with attention layers")
    _check_finite(name, seen, expected[0])
    # A quantised model may round activations too: then the last bit of an attention output moves logits by percents.
    exact = output[0].dtype in (torch.float32, torch.float64) and all(map(is_plain, model.parameters()))
    _check_same(name, output[0], expected[0], tolerance=1e-2 if exact else 0.2)
    cache = getattr(output, "past_key_values", None)
    layers: list[AttentionLayer] = []
    for module, (query, key) in seen.items():
        index = getattr(module, "layer_idx", None)
        layers.append(
            AttentionLayer(
                index=len(layers) if index is None else index,
                module=module,
                num_attention_heads=query.shape[1],
                num_key_value_heads=key.shape[1],
                head_dim=query.shape[-1],
                device=key.device,
                reads_own_cache=index is not None and _is_cached(cache, index, key),
            )
        )
    layers.sort(key=lambda layer: layer.index)
    if len({layer.index for layer in layers}) < len(layers):
        raise AquaError(f"{name} has attention layers that share a layer index: this architecture is not supported")
    return layers


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout while open; then every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def observe_windows(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    windows: Tensor,
    observer: Observer,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """One dense forward pass for each window of token ids [count, context], watched by `observer`."""
    # The language-model head says nothing about queries and keys, and costs more than observing does.
    decoder, device = innermost_decoder(model, layers), input_device(model)
    with observed(model, observer), torch.no_grad(), evaluation_mode(model):
        for done, window in enumerate(windows):
            if progress:
                progress(done, len(windows))
            decoder(input_ids=window[None].to(device), use_cache=False)
    if progress:
        progress(len(windows), len(windows))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the token ids of `model` belong; the CPU when its embeddings are offloaded."""
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        raise AquaError(f"{type(model).__name__} has no token embeddings: a decoder language model is needed")
    return weight.device if weight.device.type != "meta" else torch.device("cpu")


def is_plain(weight: Tensor) -> bool:
    """Whether `weight` holds ordinary floats. Quantised ones are integers, float8, or of a class of their own."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in PLAIN_DTYPES


def _check_finite(name: str, seen: dict[nn.Module, tuple[Tensor, Tensor]], logits: Tensor) -> None:
    """No NaN may pass: compared with anything, it would look like no difference."""
    remedy = "the weights are damaged or the dtype is too narrow (try --dtype float32)"
    for module, states in seen.items():
        if not all(bool(torch.isfinite(each).all()) for each in states):
            layer = getattr(module, "layer_idx", None)
            raise AquaError(f"layer {layer} of {name} gives NaN or infinite queries or keys: {remedy}")
    if bool(torch.isnan(logits).any()):
        raise AquaError(f"{name} gives NaN: {remedy}")


def _check_same(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """With our dense attention a model must give what it gives with its own, or its scores hold more than q and k."""
    difference = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
    if difference > tolerance:
        raise AquaError(
            f"{name} computes more than softmax attention of queries and keys (its output changes by {difference:.0%} "
            "under plain attention), which AQUA does not support"
        )


def _is_cached(cache: Any, index: int, key: Tensor) -> bool:
    """Whether `key` is what layer `index` of an ordinary `DynamicCache` holds."""
    if type(cache) is not DynamicCache or index >= len(cache.layers):
        return False
    stored = getattr(cache.layers[index], "keys", None)
    return (
        isinstance(stored, Tensor)
        and stored.shape == key.shape
        and stored.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    )


def innermost_decoder(model: PreTrainedModel, layers: list[AttentionLayer]) -> PreTrainedModel:
    """The smallest PreTrainedModel inside `model` that holds all attention layers (no language-model head)."""
    modules = {layer.module for layer in layers}
    holders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and modules <= set(part.modules())]
    return holders[-1]
