# SPDX-License-Identifier: Apache-2.0
"""What a grid measures, and how much of it; its suites turn that into jobs that share one dense reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.calibration.projections import Projections
from aqua_attention.data.text import text_digest, token_windows, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import Key, dtype_of, record_key
from aqua_attention.evaluate.run import Job, Progress
from aqua_attention.evaluate.setting import Setting, resolved_settings
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.limits import check_tokens

QUESTIONS = 50
"""For each number of lines, unless told otherwise."""


@dataclass(frozen=True)
class Sizes:
    """How much each suite of a grid reads.

    Attributes:
        context: tokens in a window (perplexity, retention).
        tokens: tokens of all windows of perplexity; retention_tokens: the same of retention.
        lengths, depths, needles, repeats: of the needle, see `needle_questions`.
        lines: lines in a question; count: questions for each number of lines.
        lines_file: LongEval's questions, of which the first `count` (None: all) are asked instead of generated ones.
    """

    context: int = 2048
    tokens: int = 8192
    retention_tokens: int = 4096
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 1
    repeats: int = 1
    lines: tuple[int, ...] = (100, 200)
    count: int | None = QUESTIONS
    lines_file: Path | None = None


QUICK = Sizes(
    context=1024,
    tokens=2048,
    retention_tokens=1024,
    lengths=(512, 1024),
    depths=(0.0, 0.5, 1.0),
    lines=(10, 20),
    count=4,
)
"""Small enough for the default model on two CPU cores: minutes for a suite over eight settings."""


@dataclass(frozen=True)
class Subject:
    """What a grid measures: a model with its projections, and the text that it reads.

    Attributes:
        name: the model, as the user named it.
        data, text: the text, and what the user named it by; questions may have no text.
        projections_sha256: of the projections' file.
        seed: chooses needles, haystacks and lines.
        chat: put questions into the tokenizer's chat template.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    projections: Projections
    data: str
    text: str = ""
    projections_sha256: str = ""
    seed: int = 0
    chat: bool = True

    def windows(self, tokens: int, context: int) -> Tensor:
        """Windows from the text's start, [count, context]."""
        return first_windows(self.model, tokenize(self.tokenizer, self.text), tokens, context)

    def read(self, windows: Tensor) -> dict[str, Any]:
        """What the options of a record say of windows of the subject's text."""
        return {"data": self.data, "context": windows.shape[1], "tokens": windows.numel()}

    def source(self) -> dict[str, Any]:
        """What a command says of it beside the figures."""
        digest = {"text_sha256": text_digest(self.text)} if self.text else {}
        return {"model": self.name, "dtype": dtype_of(self.model), "data": self.data} | digest

    def jobs(
        self,
        suite: str,
        settings: Sequence[Setting | None],
        options: dict[str, Any],
        measure: Callable[[Any, Progress], dict[str, Any]],
        **other: Any,
    ) -> list[Job]:
        """A job a setting.

        Args:
            settings: None is the dense model, whose figures are the same whatever the projections.
            options, other: of the record's key.
            measure: called as measure(setting, progress).
        """
        jobs = []
        for setting in settings:
            digest = None if setting is None else self.projections_sha256
            key = measured_key(suite, self.name, self.model, setting, options, projections_sha256=digest, **other)
            jobs.append(Job(key, partial(measure, setting)))
        return jobs


def first_windows(model: PreTrainedModel, tokenized: tuple[list[int], list[int]], tokens: int, context: int) -> Tensor:
    """Windows from the start of a text, [count, context], checked; see `text.tokenize` for `tokenized`."""
    ids, prefix = tokenized
    windows = token_windows(ids, tokens=tokens, context=context, seed=None, prefix=prefix)
    check_tokens(model, windows, context=windows.shape[1])
    return windows


def measured_key(
    suite: str, name: str, model: PreTrainedModel, setting: Setting | None, options: dict[str, Any], **other: Any
) -> Key:
    """The key of a record; without a setting, of the dense model. See `record_key` for the others."""
    config, basis = (None, "aqua") if setting is None else (setting.config.to_dict(), setting.basis)
    return record_key(suite, model=name, dtype=dtype_of(model), config=config, basis=basis, options=options, **other)


def grid_jobs(subject: Subject, suites: Sequence[str], settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """The jobs of all suites, one suite after the other, its dense reference first.

    Raises:
        AquaError: an unknown suite, one without anything to measure, a text too short for it, projections that are not
            for this model, a `min_length` of "auto" where nothing is known of this machine.
    """
    check_suites(suites, settings)
    settings = resolved_settings(subject.model, settings)
    # Otherwise every setting would be refused, one after the other.
    subject.projections.check_model(subject.model, attention_layers(subject.model))
    jobs: list[Job] = []
    for suite in dict.fromkeys(suites):
        module, _, function = SUITES[suite].jobs.partition(":")
        jobs += getattr(import_module(module), function)(subject, settings, sizes)
    return jobs


def check_suites(suites: Sequence[str], settings: Sequence[Setting]) -> None:
    """Raise AquaError for an unknown suite, and for one that has nothing to measure of these settings."""
    known = [name for name, suite in SUITES.items() if suite.jobs]
    if unknown := [name for name in suites if name not in known]:
        raise AquaError(f"suite is {unknown[0]!r}: it must be one of {', '.join(known)}")
    if "retention" in suites and all(setting.config.logit_error is not None for setting in settings):
        raise AquaError("suite retention measures k_ratios only, and every setting has a logit_error: give a k_ratio")


def sizes_of(quick: bool, **given: Any) -> Sizes:
    """The sizes of a quick or full grid, but for those that are given."""
    return replace(QUICK if quick else Sizes(), **{name: value for name, value in given.items() if value is not None})
