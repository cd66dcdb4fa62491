# SPDX-License-Identifier: Apache-2.0
"""What a model can do: predict, generate, and how many tokens and positions it knows."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.model.capture import attention_layers, evaluation_mode, input_device
from aqua_attention.model.sides import TEXT


def check_predicts(model: PreTrainedModel) -> None:
    """Raise AquaError for a model that predicts no next token: an encoder, or one without a head for it.

    Models with code of their own may predict without transformers' `generate`.
    """
    if model.can_generate():
        return
    text = [layer for layer in attention_layers(model) if layer.side == TEXT]
    if text and all(layer.causal for layer in text):
        with torch.no_grad(), evaluation_mode(model):
            output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
        logits = getattr(output, "logits", None)
        if logits is not None and logits.ndim == 3 and logits.shape[-1] >= model.config.get_text_config().vocab_size:
            return
    raise AquaError(
        f"{type(model).__name__} predicts no next token: an encoder is measured by `aqua eval retention` and "
        "`aqua eval images`"
    )


def check_generates(model: PreTrainedModel) -> None:
    """Raise AquaError for a model that cannot write a text."""
    check_predicts(model)
    if not model.can_generate():
        raise AquaError(
            f"{type(model).__name__} cannot generate (its class is no GenerationMixin): it is measured by "
            "`aqua eval perplexity`"
        )


def check_tokens(model: PreTrainedModel, token_ids: Tensor, *, context: int) -> None:
    """Raise AquaError for tokens that the model does not know, and for a context longer than its positions."""
    limit = position_limit(model)
    if limit is not None and context > limit:
        raise AquaError(f"context is {context}: the model knows {limit} positions, choose at most that")
    try:
        known = model.get_input_embeddings().weight.shape[0]
    except NotImplementedError:  # a model of pairs, as CLIP
        known = model.config.get_text_config().vocab_size
    if token_ids.numel() and int(token_ids.max()) >= known:
        raise AquaError(
            f"the text has token {int(token_ids.max())}, the model knows {known} tokens: the tokenizer is another "
            "model's"
        )


def has_learned_positions(model: PreTrainedModel) -> bool:
    """Whether positions are looked up in a table, which ends; rotary ones go on."""
    tables = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return any("position" in name or name.endswith("wpe") for name in tables)


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model knows; None when its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if limit is not None and padding is not None and name.endswith("position_embeddings"):
            return int(limit) - padding - 1  # RoBERTa and its like count from behind the place of padding
    return limit
