# SPDX-License-Identifier: Apache-2.0
"""Calibration: one pass of a text through a model, from which the projections follow."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.capture import attention_layers, observe_windows
from aqua_attention.errors import AquaError
from aqua_attention.fingerprint import key_weight_digest, shape_of
from aqua_attention.projections import Projections
from aqua_attention.stats import LayerStatistics, Statistics
from aqua_attention.text import text_digest, token_windows, tokenize
from aqua_attention.version import __version__


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens: int = 32768,
    context: int = 2048,
    seed: int | None = 0,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Projections:
    """Learn the projections of `model` from windows of `text`.

    Args:
        model: a decoder language model; its weights and its attention are left as they are.
        text: plain text.
        tokens: how many tokens to read; fewer when the text is shorter (`calibration["tokens"]` says).
        context: tokens in a window. Calibrate at the length you will use: projections from short windows are
            slightly worse on long ones.
        seed: windows are spread over the whole text, and the seed chooses them; None: the first windows of the text.
        name: recorded as the model's name; the one in its config unless given.
        progress: called as progress(windows done, windows in all).

    Raises:
        AquaError: no attention layers, a text shorter than one window, a context longer than the model's, NaN.
    """
    layers = attention_layers(model)
    token_ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(token_ids, tokens=tokens, context=context, seed=seed, prefix=prefix)
    check_tokens(model, windows, context=windows.shape[1])
    statistics = collect(model, windows, progress=progress)
    return Projections.from_statistics(
        statistics,
        model={
            "name": name or model.config._name_or_path,
            "shape": shape_of(model, layers),
            "key_weights": key_weight_digest(layers),
        },
        calibration={
            "text_sha256": text_digest(text),
            "tokens": windows.numel(),
            "context": windows.shape[1],
            "seed": seed,
            "library_version": __version__,
        },
    )


def collect(
    model: PreTrainedModel, windows: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """Statistics of every attention layer over token windows [count, context], one forward pass a window."""
    layers = attention_layers(model)
    index_of = {layer.module: layer.index for layer in layers}
    statistics: Statistics = {}

    def accumulate(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        index, seen = index_of[module], LayerStatistics.of(query, key)
        statistics[index] = statistics[index] + seen if index in statistics else seen

    observe_windows(model, layers, windows, accumulate, progress)
    return statistics


def check_tokens(model: PreTrainedModel, token_ids: Tensor, *, context: int) -> None:
    """Raise AquaError for tokens that the model does not know, and for a context longer than its positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise AquaError(f"context is {context}: the model knows {limit} positions, choose at most that")
    known = model.get_input_embeddings().weight.shape[0]
    if token_ids.numel() and int(token_ids.max()) >= known:
        raise AquaError(
            f"the text has token {int(token_ids.max())}, the model knows {known} tokens: the tokenizer is another "
            "model's"
        )
