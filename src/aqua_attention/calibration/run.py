# SPDX-License-Identifier: Apache-2.0
"""Calibration: one pass of a text, or of images, through a model, from which the projections follow."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import is_progress_bar_enabled

from aqua_attention.calibration.checkpoint import (
    Checkpoint,
    check_no_unfinished,
    check_seconds,
    later_checkpoints,
    room_for,
)
from aqua_attention.calibration.learned import learn
from aqua_attention.calibration.positions import begins, placed
from aqua_attention.calibration.projections import LEARNED, SVD, TUNED, Projections
from aqua_attention.calibration.reading import check_learnable, spread, windows_read
from aqua_attention.calibration.statistics import LayerStatistics, Statistics, merge, warn_of_few
from aqua_attention.calibration.tuning import check_tunable, tune
from aqua_attention.config import whole_number
from aqua_attention.data.models import load_model
from aqua_attention.data.text import load_text, text_digest, token_windows, tokenize, warn_of_windows
from aqua_attention.errors import AquaError, brief
from aqua_attention.io.files import check_room
from aqua_attention.io.progress import Progress, progress_bar
from aqua_attention.model import capture
from aqua_attention.model.fingerprint import key_weight_digest, shape_of
from aqua_attention.model.limits import check_tokens
from aqua_attention.model.sides import TEXT, Inputs, check_unpadded, given_sides, inputs_digest
from aqua_attention.version import __version__

TOKENS = {SVD: 32768, LEARNED: 81920, TUNED: 614400}
"""Tokens read unless another number is asked for."""
FIRST_WINDOWS = 16
"""Windows from which singular vectors are taken where other passes follow, which read all."""
Facts = dict[str, Any]
"""JSON values by name."""


class RunOptions(TypedDict, total=False):
    """Options of every calibration. The defaults are those of `CalibrationRun`.

    Attributes:
        name: recorded as the model's name; the one in its config unless given.
        layers: only those whose name matches this pattern, such as "language_model.*"; the others stay dense.
        checkpoint: a file that keeps the state of the run every `checkpoint_seconds` (10, at the end of a window) and
            on Ctrl-C. `checkpoint.discard` it once the projections are saved.
        resume: go on from `checkpoint` where it exists; the result is that of an uninterrupted run, bit for bit.
        progress: True (the default) shows a bar, or lines where the error stream is no terminal, unless transformers'
            bars are disabled. False shows nothing. A function is called as progress(windows done, windows in all).
    """

    name: str
    layers: str | None
    checkpoint: Path | str | None
    checkpoint_seconds: float
    resume: bool
    progress: Progress | bool | None


def calibrate(
    model: PreTrainedModel | os.PathLike[str] | str,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Path | str,
    *,
    tokens: int | None = None,
    context: int = 2048,
    seed: int | None = 0,
    basis: str = SVD,
    last_position: int | None = None,
    **options: Unpack[RunOptions],
) -> Projections:
    """Learn the projections of `model` from windows of `text` (arXiv 2509.11155, section 3).

    Args:
        model: a decoder or encoder that reads text, or the name of one, see `load_model`. Its weights and its
            attention are left as they are.
        tokenizer: the model's; None where the model is named.
        text: plain text, or the Path of a file or folder of it, see `load_text`.
        tokens: how many tokens to read; fewer when the text is shorter (`calibration["tokens"]` says). None: 32768, for
            a learned basis 81920, for a tuned one 614400.
        context: tokens in a window.
        seed: chooses the windows, which are spread over the whole text. None: the first windows of the text.
        basis: "svd": the singular vectors (the paper). "learned": these turned in a second pass, until choosing
            dimensions changes each head's attention less, see `learned.learn`. "tuned": all layers turned together in a
            third pass, until the model's predictions change less, see `tuning.tune` (for a GPU).
        last_position: read half of the windows as if they began later, up to this position. One file then serves
            short and long contexts. None: all at the first positions, which is worse on longer texts.
        options: see `RunOptions`.

    Returns:
        A float32 rotation [num_key_value_heads, head_dim, head_dim] for each attention layer, with its statistics.

    Raises:
        AquaError: no attention layers, a text shorter than one window, a context longer than the model's, NaN; a
            checkpoint that cannot be written, one of another run, or one that exists though `resume` was not asked for.
    """
    if basis not in TOKENS:
        raise AquaError(f"basis is {basis!r}: it must be one of {', '.join(TOKENS)}")
    tokens = TOKENS[basis] if tokens is None else whole_number("tokens", tokens)
    context = whole_number("context", context)
    seed = None if seed is None else whole_number("seed", seed)
    text = load_text(str(text)) if isinstance(text, Path) else text
    if not isinstance(text, str):
        raise AquaError(f"text is {brief(text)}: give a string, or the Path of a file")
    if isinstance(model, str | os.PathLike):
        options["name"] = options.get("name") or os.fspath(model)
        model, own = load_model(model)
        tokenizer = own if tokenizer is None else tokenizer
    if not callable(tokenizer):
        raise AquaError(f"tokenizer is {brief(tokenizer)}: give the model's, AutoTokenizer.from_pretrained(its name)")
    run = CalibrationRun(model, **options)
    passes: list[Callable[..., Projections]] = {SVD: [], LEARNED: [learn], TUNED: [learn, tune]}[basis]
    states = [None] * len(passes) if run.checkpoint is None else later_checkpoints(run.checkpoint)[: len(passes)]
    for state in filter(None, states if not run.resume else []):
        check_no_unfinished(state)
    token_ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(token_ids, tokens=tokens, context=context, seed=seed, prefix=prefix)
    check_tokens(model, windows, context=windows.shape[1])
    warn_of_windows(windows, tokens)
    first = windows if basis == SVD else windows[spread(len(windows), FIRST_WINDOWS)]
    read: Tensor | list[Inputs] = first
    if last_position is not None:
        last_position = whole_number("last_position", last_position)
        places = begins(model, len(first), context=windows.shape[1], last=last_position, seed=seed or 0)
        read = [placed(*each) for each in zip(first, places, strict=True)]
    facts = {"text_sha256": text_digest(text), "tokens": windows.numel(), "context": windows.shape[1]}
    facts |= {"seed": seed, "library_version": __version__}
    facts |= {} if last_position is None else {"last_position": last_position}
    # The windows' digest stands for the tokenizer.
    identity = {"windows_sha256": hashlib.sha256(first.numpy().tobytes()).hexdigest()}
    if basis == SVD:
        return run.learn(read, {TEXT}, facts, identity)
    check_learnable(type(model).__name__, run.reached({TEXT}), windows)
    if tune in passes:
        check_tunable(model)
    run.keeps_end = True
    with _watched(run.progress) as told:
        read_again = windows_read(len(windows))
        run.progress, *others = _in_turn(told, len(first), *[read_again] * len(passes))
        found = run.learn(read, {TEXT}, facts, identity)
        for improve, kept_in, progress in zip(passes, states, others, strict=True):
            found = improve(
                model,
                found,
                windows,
                last_position=last_position,
                seed=seed or 0,
                checkpoint=kept_in,
                checkpoint_seconds=run.checkpoint_seconds,
                progress=progress,
            )
    return found


def _in_turn(told: Progress | None, *counts: int) -> list[Progress | None]:
    """Progress functions of several passes, so that they look like one pass over all windows."""

    def part(before: int) -> Progress | None:
        return told and (lambda done, _: told(before + done, sum(counts)))

    return [part(sum(counts[:place])) for place in range(len(counts))]


def calibrate_inputs(
    model: PreTrainedModel,
    inputs: Sequence[Inputs] | Inputs,
    *,
    facts: dict[str, Any] | None = None,
    **options: Unpack[RunOptions],
) -> Projections:
    """Learn the projections of `model` from whatever it reads: images, or prompts with images in them.

    Only the layers that read the inputs are calibrated. Two calibrations of a vision-language model, on images and on
    text, become one by `Projections.merged`.

    Args:
        model: its weights and its attention are left as they are.
        inputs: keyword arguments of one forward pass each, without padding: `pixel_values` (and what an image processor
            gives with them), `input_ids` (int64 [batch, tokens]), or both. One alone counts as a list of one.
        facts: recorded in `calibration`, such as how many images these are.
        options: see `RunOptions`.

    Returns:
        As `calibrate`.

    Raises:
        AquaError: as of `calibrate`; nothing to read, padded inputs, or inputs that the model does not take.
    """
    run = CalibrationRun(model, **options)
    inputs = [inputs] if isinstance(inputs, Mapping) else inputs
    if not inputs:
        raise AquaError("there is nothing to calibrate on: give at least one input")
    check_unpadded(inputs)
    known = {"inputs": len(inputs), "inputs_sha256": inputs_digest(inputs), "library_version": __version__}
    return run.learn(inputs, given_sides(inputs), known | (facts or {}))


@dataclass
class CalibrationRun:
    """One calibration: of which layers, and where its state is kept; see `RunOptions`, and `calibrate` for errors."""

    model: PreTrainedModel
    name: str = ""
    layers: str | None = None
    checkpoint: Path | str | None = None
    checkpoint_seconds: float = 10.0
    resume: bool = False
    progress: Progress | bool | None = True
    keeps_end: bool = False
    """Whether the state is kept when all is read, too: other passes follow."""

    def __post_init__(self) -> None:
        """Find the layers; nothing is read yet."""
        if self.resume and self.checkpoint is None:
            raise AquaError("resume takes a checkpoint: name the file to go on from")
        if self.checkpoint is not None:
            check_seconds(self.checkpoint_seconds)
            if not self.resume:
                check_no_unfinished(Path(self.checkpoint))
        self.found, self.gaps = capture.layers_and_gaps(self.model)

    def reached(self, given: Collection[str]) -> list[capture.AttentionLayer]:
        """The layers of these sides of the model that are to be calibrated; AquaError where there are none."""
        reached = [layer for layer in self.found if layer.side in given]
        if not reached:
            reason = "; ".join(self.gaps) or f"it does not read {' and '.join(sorted(given)) or 'that'}"
            raise AquaError(f"{type(self.model).__name__} cannot be calibrated on this: {reason}")
        return capture.chosen_layers(reached, self.layers, self.gaps)

    def learn(
        self, windows: Tensor | Sequence[Inputs], given: Collection[str], facts: Facts, identity: Facts | None = None
    ) -> Projections:
        """Read all windows, and make projections of what was seen.

        Args:
            windows: see `capture.observe_windows`; `given` are the sides of the model that they are for.
            facts: the provenance to record.
            identity: what else tells this run from another when it is resumed; not recorded.
        """
        chosen = self.reached(given)
        name, key_weights = self.name or self.model.config._name_or_path, key_weight_digest(chosen)
        shape = shape_of(self.model, chosen, named=len(chosen) < len(self.found))
        if self.checkpoint is not None:
            check_room(Path(self.checkpoint), room_for(shape, later=self.keeps_end))
        # The name tells models apart whose key weights cannot be read (quantised, offloaded).
        run = {"model": name, "shape": shape, "key_weights": key_weights, "dtype": str(self.model.dtype)}
        keeper = Checkpoint(self.checkpoint, run | facts | (identity or {}), seconds=self.checkpoint_seconds)
        with _watched(self.progress) as progress:
            statistics = collect(self.model, windows, layers=chosen, checkpoint=keeper, progress=progress)
        if self.keeps_end:
            keeper.save(statistics, len(windows))
        warn_of_few(statistics)
        tokens = {"tokens": max(layer.key_count for layer in statistics.values())}
        of_model = {"name": name, "shape": shape, "key_weights": key_weights}
        return Projections.from_statistics(statistics, of_model, tokens | facts)


@contextmanager
def _watched(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """What is told of the windows that are done, see `calibrate`."""
    if progress is True and is_progress_bar_enabled():
        with progress_bar("calibrate") as bar:
            yield bar
    else:
        yield progress if callable(progress) else None


def collect(
    model: PreTrainedModel,
    windows: Tensor | Sequence[Inputs],
    *,
    layers: list[capture.AttentionLayer] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of attention layers over token windows [count, context] or other inputs, a forward pass each.

    `layers` are those of interest, all unless given; `checkpoint` says where to begin, and keeps the sums as they grow.
    """
    every = capture.attention_layers(model)
    index_of = {layer.module: layer.index for layer in layers or every}
    checkpoint = checkpoint or Checkpoint(None, {})
    state = checkpoint.load()
    first, window = state[1], Statistics()

    def accumulate(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        if module not in index_of:
            return
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
        checkpoint.keep(*state)
        if progress:
            progress(first + count, len(windows))

    try:
        capture.observe_windows(model, every, windows[first:], accumulate, between_windows)
    except KeyboardInterrupt:
        checkpoint.save(*state)
        raise
    return state[0]
