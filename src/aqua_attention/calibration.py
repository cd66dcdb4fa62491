# SPDX-License-Identifier: Apache-2.0
"""Calibration: one pass of a text through a model, from which the projections follow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.capture import attention_layers, observe_windows
from aqua_attention.checkpoint import Checkpoint, check_finished
from aqua_attention.errors import AquaError
from aqua_attention.fingerprint import key_weight_digest, shape_of
from aqua_attention.projections import Projections
from aqua_attention.stats import LayerStatistics, Statistics, merge
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
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 10.0,
    resume: bool = False,
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
        checkpoint: a file that keeps the state of the run every `checkpoint_seconds` (at the end of a window) and on
            Ctrl-C. `checkpoint.discard` it once the projections are saved.
        resume: go on from `checkpoint` where it exists; the result is that of an uninterrupted run, bit for bit.
        progress: called as progress(windows done, windows in all).

    Raises:
        AquaError: no attention layers, a text shorter than one window, a context longer than the model's, NaN; a
            checkpoint of another run, or one that exists though `resume` was not asked for.
    """
    if resume and checkpoint is None:
        raise AquaError("resume takes a checkpoint: name the file to go on from")
    if checkpoint is not None and not resume:
        check_finished(Path(checkpoint))
    layers = attention_layers(model)
    token_ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(token_ids, tokens=tokens, context=context, seed=seed, prefix=prefix)
    check_tokens(model, windows, context=windows.shape[1])
    shape, key_weights, digest = shape_of(model, layers), key_weight_digest(layers), text_digest(text)
    calibration = {
        "text_sha256": digest,
        "tokens": windows.numel(),
        "context": windows.shape[1],
        "seed": seed,
        "library_version": __version__,
    }
    identity = {"name": name or model.config._name_or_path, "shape": shape, "key_weights": key_weights}
    keeper = None
    if checkpoint is not None:
        # What the model is and what it reads; the windows' digest stands for the tokenizer.
        read = {"windows_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "dtype": str(model.dtype)}
        # The name tells models apart whose key weights cannot be read (quantised, offloaded).
        run = {"model": identity["name"], "shape": shape, "key_weights": key_weights} | calibration | read
        keeper = Checkpoint(checkpoint, run, seconds=checkpoint_seconds)
    statistics = collect(model, windows, checkpoint=keeper, progress=progress)
    return Projections.from_statistics(statistics, model=identity, calibration=calibration)


def collect(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of every attention layer over token windows [count, context], one forward pass a window.

    Args:
        checkpoint: where to begin, and where to keep the sums while they grow.
    """
    layers = attention_layers(model)
    index_of = {layer.module: layer.index for layer in layers}
    state = checkpoint.load() if checkpoint else ({}, 0)
    first, window = state[1], Statistics()

    def accumulate(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        index, seen = index_of[module], LayerStatistics.of(query, key)
        window[index] = window[index] + seen if index in window else seen

    def between_windows(count: int, _: int) -> None:
        nonlocal state
        for index, layer in window.items():
            layer.check_finite(index)
        if window:
            # In one assignment, so that an interrupt finds sums and number of windows that belong together.
            state = (merge(state[0], window) if state[0] else dict(window), first + count)
            window.clear()
        if checkpoint:
            checkpoint.keep(*state)
        if progress:
            progress(first + count, len(windows))

    try:
        observe_windows(model, layers, windows[first:], accumulate, between_windows)
    except KeyboardInterrupt:
        if checkpoint:
            checkpoint.save(*state)
        raise
    return state[0]


def check_tokens(model: PreTrainedModel, token_ids: Tensor, *, context: int) -> None:
    """Raise AquaError for tokens that the model does not know, and for a context longer than its positions."""
    limit = position_limit(model)
    if limit is not None and context > limit:
        raise AquaError(f"context is {context}: the model knows {limit} positions, choose at most that")
    known = model.get_input_embeddings().weight.shape[0]
    if token_ids.numel() and int(token_ids.max()) >= known:
        raise AquaError(
            f"the text has token {int(token_ids.max())}, the model knows {known} tokens: the tokenizer is another "
            "model's"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model knows; None when its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
