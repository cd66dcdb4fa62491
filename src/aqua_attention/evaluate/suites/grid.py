# SPDX-License-Identifier: Apache-2.0
"""The suites of a grid: each turns a text and settings into jobs that share one dense reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.run import check_tokens
from aqua_attention.config import AquaConfig
from aqua_attention.data.text import text_digest, token_windows, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.record import dtype_of, file_digest, record_key
from aqua_attention.evaluate.run import Job, Progress
from aqua_attention.evaluate.setting import Setting, resolved_settings
from aqua_attention.evaluate.suites.lines import lines_questions, read_lines_questions
from aqua_attention.evaluate.suites.needle import needle_questions
from aqua_attention.evaluate.suites.perplexity import DenseLogits, evaluate_perplexity
from aqua_attention.evaluate.suites.retention import evaluate_retention
from aqua_attention.evaluate.suites.retrieval import Question, encode_questions, evaluate_retrieval
from aqua_attention.model.capture import attention_layers


@dataclass(frozen=True)
class Sizes:
    """How much each suite of a grid reads.

    Attributes:
        context: tokens in a window (perplexity, retention).
        tokens: tokens of all windows of perplexity; retention_tokens: the same of retention.
        lengths, depths, needles, repeats: of the needle, see `needle_questions`.
        lines: lines in a question; count: questions for each number of lines.
        lines_file: LongEval's questions, of which the first `count` are asked instead of generated ones.
    """

    context: int = 2048
    tokens: int = 8192
    retention_tokens: int = 4096
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 1
    repeats: int = 1
    lines: tuple[int, ...] = (100, 200)
    count: int = 50
    lines_file: Path | None = None


FULL = Sizes()
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
        projections_sha256: of the projections' file.
        data, text: the text, and what the user named it by.
        seed: chooses needles, haystacks and lines.
        chat: put questions into the tokenizer's chat template.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    projections: Projections
    projections_sha256: str
    data: str
    text: str
    seed: int = 0
    chat: bool = True

    def windows(self, tokens: int, context: int) -> Tensor:
        """Windows from the text's start, [count, context]."""
        ids, prefix = tokenize(self.tokenizer, self.text)
        windows = token_windows(ids, tokens=tokens, context=context, seed=None, prefix=prefix)
        check_tokens(self.model, windows, context=windows.shape[1])
        return windows

    def key(self, suite: str, setting: Setting | None, options: dict[str, Any], **other: Any) -> dict[str, Any]:
        """The key of a record; without a setting, of the dense model."""
        return record_key(
            suite,
            model=self.name,
            dtype=dtype_of(self.model),
            config=None if setting is None else setting.config.to_dict(),
            basis="aqua" if setting is None else setting.basis,
            options=options,
            # The dense model's figures are the same whatever the projections.
            projections_sha256=None if setting is None else self.projections_sha256,
            **other,
        )


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
    return [job for name in dict.fromkeys(suites) for job in SUITES[name](subject, settings, sizes)]


def check_suites(suites: Sequence[str], settings: Sequence[Setting]) -> None:
    """Raise AquaError for an unknown suite, and for one that has nothing to measure of these settings."""
    if unknown := [name for name in suites if name not in SUITES]:
        raise AquaError(f"suite is {unknown[0]!r}: it must be one of {', '.join(SUITES)}")
    if "retention" in suites and all(setting.config.logit_error is not None for setting in settings):
        raise AquaError("suite retention measures k_ratios only, and every setting has a logit_error: give a k_ratio")


def perplexity_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """`evaluate_perplexity`, a job a setting. As soon as one evicts, all score second halves, to be comparable."""
    windows = subject.windows(sizes.tokens, sizes.context)
    continued = any(setting.config.h2o_ratio < 1 for setting in settings)
    options = {
        "data": subject.data,
        "context": windows.shape[1],
        "tokens": windows.numel(),
        "scored": "second half" if continued else "all",
    }
    dense_logits = DenseLogits()

    def measure(setting: Setting | None, progress: Progress) -> dict[str, Any]:
        return perplexity_figures(
            *(subject.model, subject.projections, setting, windows, dense_logits),
            continued=continued,
            progress=progress,
        )

    digest = text_digest(subject.text)
    return [
        Job(subject.key("perplexity", setting, options, text_sha256=digest), partial(measure, setting))
        for setting in (None, *settings)
    ]


def perplexity_figures(
    model: PreTrainedModel,
    projections: Projections,
    setting: Setting | None,
    windows: Tensor,
    dense_logits: DenseLogits,
    *,
    continued: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `evaluate_perplexity` says of one setting, with `dense` and `scored`; without a setting, of dense itself."""
    settings = [] if setting is None else [setting]
    found = evaluate_perplexity(
        model, projections, settings, windows, continued=continued, dense_logits=dense_logits, progress=progress
    )
    reference = {"dense": found["dense"], "scored": found["scored"]}
    if setting is None:
        itself = {"perplexity_change": 0.0, "kl": 0.0, "top1": 1.0, "mean_k": 1.0}
        return found["dense"] | itself | reference
    return {name: value for name, value in found["rows"][0].items() if name not in ("setting", "basis")} | reference


def retention_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """`evaluate_retention`, a job for each basis, selection and k_ratio; the other knobs are not looked at.

    All of a basis are measured at once, by the first of its jobs.
    """
    windows = subject.windows(sizes.retention_tokens, sizes.context)
    options = {"data": subject.data, "context": windows.shape[1], "tokens": windows.numel()}
    distinct = dict.fromkeys(
        Setting(AquaConfig(k_ratio=setting.config.k_ratio, selection=setting.config.selection), setting.basis)
        for setting in settings
        if setting.config.logit_error is None
    )
    known: dict[Setting, dict[str, Any]] = {}

    def measure(setting: Setting, progress: Progress) -> dict[str, Any]:
        if setting not in known:
            same = [other for other in distinct if other.basis == setting.basis]
            found = evaluate_retention(
                subject.model,
                subject.projections.with_basis(setting.basis),
                windows,
                k_ratios=list(dict.fromkeys(other.config.k_ratio for other in same)),
                selections=list(dict.fromkeys(other.config.selection for other in same)),
                progress=progress,
            )
            for row in found["rows"]:
                known[Setting(AquaConfig(k_ratio=row["k_ratio"], selection=row["selection"]), setting.basis)] = row
        return known[setting]

    digest = text_digest(subject.text)
    return [
        Job(subject.key("retention", setting, options, text_sha256=digest), partial(measure, setting))
        for setting in distinct
    ]


def needle_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """A needle at each depth of texts of each length, see `needle_questions`."""
    shape: dict[str, Any] = {name: getattr(sizes, name) for name in ("lengths", "depths", "needles", "repeats")}
    questions = needle_questions(*(subject.tokenizer, subject.text), **shape, seed=subject.seed, chat=subject.chat)
    digest = text_digest(subject.text)
    return _retrieval_jobs("needle", subject, settings, questions, shape | {"data": subject.data}, digest)


def lines_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """One of many numbered lines, generated or from a file, see `lines_questions` and `read_lines_questions`."""
    if sizes.lines_file is not None:
        questions = read_lines_questions(sizes.lines_file, count=sizes.count)
        options = {"data": str(sizes.lines_file), "count": len(questions)}
        return _retrieval_jobs("lines", subject, settings, questions, options, file_digest(sizes.lines_file))
    questions = [
        question
        for lines in dict.fromkeys(sizes.lines)
        for question in lines_questions(lines, count=sizes.count, seed=subject.seed)
    ]
    options = {"data": "generated", "lines": sizes.lines, "count": sizes.count}
    return _retrieval_jobs("lines", subject, settings, questions, options, None)


def _retrieval_jobs(
    suite: str,
    subject: Subject,
    settings: Sequence[Setting],
    questions: list[Question],
    options: dict[str, Any],
    digest: str | None,
) -> list[Job]:
    encode_questions(subject.model, subject.tokenizer, questions, chat=subject.chat)
    answers: dict[int, Continuation] = {}

    def measure(setting: Setting | None, progress: Progress) -> dict[str, Any]:
        found = evaluate_retrieval(
            *(subject.model, subject.tokenizer, subject.projections),
            *([] if setting is None else [setting], questions),
            chat=subject.chat,
            dense_answers=answers,
            progress=progress,
        )
        row = found["rows"][0] if setting else {"lost": 0, "gained": 0, "p_value": 1.0, "same_answer": 1.0}
        # The dense model's answer comes first, and is the only one when there is no setting.
        right = [question["correct"][-1] for question in found["questions"]]
        return {
            "cells": _cells(questions, right),
            "right": sum(right),
            "asked": len(right),
            **{name: row[name] for name in ("lost", "gained", "p_value", "same_answer")},
            "mean_k": row.get("mean_k"),
        }

    options = options | {"chat": subject.chat}
    return [
        Job(subject.key(suite, setting, options, text_sha256=digest, seed=subject.seed), partial(measure, setting))
        for setting in (None, *settings)
    ]


def _cells(questions: Sequence[Question], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Right answers of all, for each length (or number of lines) and depth."""
    cells: dict[tuple[tuple[str, float | None], ...], list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        labels = {"depth": None} | question.labels
        cells.setdefault(tuple(sorted(labels.items(), reverse=True)), []).append(is_right)
    return [dict(labels) | {"right": sum(marks), "asked": len(marks)} for labels, marks in cells.items()]


SUITES: dict[str, Callable[[Subject, Sequence[Setting], Sizes], list[Job]]] = {
    "perplexity": perplexity_jobs,
    "retention": retention_jobs,
    "needle": needle_jobs,
    "lines": lines_jobs,
}


def sizes_of(quick: bool, **given: Any) -> Sizes:
    """The sizes of a quick or full grid, but for those that are given."""
    return replace(QUICK if quick else FULL, **{name: value for name, value in given.items() if value is not None})
