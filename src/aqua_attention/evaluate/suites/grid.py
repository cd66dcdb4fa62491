# SPDX-License-Identifier: Apache-2.0
"""What a grid measures, and how much of it; its suites turn that into jobs that share one dense reference."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.run import Job
from aqua_attention.evaluate.setting import Setting, Subject, resolved_settings
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.model.capture import attention_layers

QUESTIONS = 50
"""For each number of lines, and each task and length of RULER, unless told otherwise."""


@dataclass(frozen=True)
class Sizes:
    """How much each suite of a grid reads.

    Attributes:
        context: tokens in a window (perplexity, retention).
        tokens: tokens of all windows of perplexity; retention_tokens: the same of retention.
        lengths: tokens of a needle's prompt. depths: where the needle is, 0 the haystack's beginning, 1 its end.
        needles: how many. repeats: haystacks a cell, each cut from another place of the text, with other needles.
        lines: in a question. count: questions for each number of lines.
        lines_file: see `read_lines_questions`; asked instead of generated ones.
        tasks: of RULER, empty for all; `lengths` and `count` are theirs, too. questions: see `read_squad`.
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
    tasks: tuple[str, ...] = ()
    questions: Path | None = None


QUICK = Sizes(
    context=1024,
    tokens=2048,
    retention_tokens=1024,
    lengths=(512, 1024),
    depths=(0.0, 0.5, 1.0),
    lines=(10, 20),
    count=4,
    tasks=("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "vt"),
)
"""Small enough for the default model on two CPU cores: minutes for a suite over eight settings."""


def grid_jobs(subject: Subject, suites: Sequence[str], settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """The jobs of all suites, one suite after the other, its dense reference first.

    AquaError as `check_suites` and `resolved_settings`; a text too short, projections that are not for this model.
    """
    check_suites(suites, settings)
    settings = resolved_settings(subject.model, settings)
    # Otherwise every setting would be refused, one after the other.
    subject.projections.check_model(subject.model, attention_layers(subject.model))
    makers = (resolve_name(SUITES[suite].jobs) for suite in dict.fromkeys(suites))
    return [job for maker in makers for job in maker(subject, settings, sizes)]


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
