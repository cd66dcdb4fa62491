# SPDX-License-Identifier: Apache-2.0
"""A model's attention layers, and the queries and keys that pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.interface import as_aqua_mask, install, mask_builder
from aqua_attention.ops.api import attention

Observer = Callable[[nn.Module, Tensor, Tensor], None]


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


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """While open, `observer(module, query, key)` sees every attention call; the model's results stay dense.

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
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise AquaError(f"{type(model).__name__} is not causal: only decoder language models are supported")
        observer(module, query, key)
        output = attention(
            query,
            key,
            value,
            None,
            mask=as_aqua_mask(attention_mask),
            scaling=scaling,
            softcap=softcap,
            s_aux=s_aux,
        )
        return output.transpose(1, 2).contiguous(), None

    undo = install(model, dense, mask_builder(0, 0))
    try:
        yield
    finally:
        undo()


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of a decoder in order, found by running it on four tokens and watching.

    Watching instead of reading class names means that a layer on this list really sends its attention through the
    interface, and one that does not is never taken for rotated.

    Raises:
        AquaError: the model is no decoder that sends its attention through transformers' interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise AquaError(f"model is a {type(model).__name__}: a transformers PreTrainedModel is needed")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise AquaError(f"{name} is an encoder-decoder: only decoder language models are supported")
    found: dict[nn.Module, AttentionLayer] = {}

    def note(module: nn.Module, query: Tensor, key: Tensor) -> None:
        found[module] = AttentionLayer(
            index=getattr(module, "layer_idx", len(found)),
            module=module,
            num_attention_heads=query.shape[1],
            num_key_value_heads=key.shape[1],
            head_dim=query.shape[-1],
            device=key.device,
        )

    with observed(model, note), torch.no_grad():
        try:
            embeddings = model.get_input_embeddings()
            tokens = torch.arange(4, device=embeddings.weight.device)[None]
            model(input_ids=tokens, use_cache=False)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            if isinstance(error, AquaError):
                raise
            raise AquaError(f"{name} does not run on token ids, so it is no decoder language model: {error}") from error
    layers = sorted(found.values(), key=lambda layer: layer.index)
    if not layers:
        raise AquaError(f"{name} made no attention call: AQUA needs a model with attention layers")
    if len({layer.index for layer in layers}) < len(layers):
        raise AquaError(f"{name} has attention layers that share a layer index: this architecture is not supported")
    return layers


def innermost_decoder(model: PreTrainedModel, layers: list[AttentionLayer]) -> PreTrainedModel:
    """The smallest PreTrainedModel inside `model` that holds all attention layers (no language-model head)."""
    modules = {layer.module for layer in layers}
    holders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and modules <= set(part.modules())]
    return holders[-1]
