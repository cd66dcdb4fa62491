# SPDX-License-Identifier: Apache-2.0
"""A task from its files: questions in their order, each with examples before it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.tasks.files import has_split, question_files, read_rows
from aqua_attention.evaluate.tasks.formats import FORMATS, Format, Item


@dataclass(frozen=True)
class Task:
    """Questions to ask, ready for the model.

    Attributes:
        few_shot: how many examples stand before each question.
        files, example_files: where the questions and the examples were read; without examples, none for them.
    """

    name: str
    path: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...]
    few_shot: int
    files: tuple[str, ...] = ()
    example_files: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of all prompts and answers."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()


def load_task(
    name: str, path: Path | str, *, limit: int | None = None, few_shot: int | None = None, seed: int = 0
) -> Task:
    """Read a task's questions, and put examples before them.

    Examples come from the train split (MMLU: dev) when `path` is a folder that has one, otherwise from the other
    questions. They are drawn anew for each question; for MMLU they are the first ones of its subject.

    Args:
        name: one of FORMATS.
        path: a file, or a folder of splits; see `question_files`.
        limit: only the first so many questions; for MMLU, of each subject.
        few_shot: how many examples; None takes what is usual (GSM8K 5, all others 0).
        seed: draws the examples. A question's examples depend neither on `limit` nor on the other questions.

    Raises:
        AquaError: an unknown task, a value out of range, fewer examples than wanted, or unreadable files.
    """
    if name not in FORMATS:
        raise AquaError(f"there is no task {name!r}: it must be one of {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise AquaError(f"limit is {limit}: it must be at least 1")
    form = FORMATS[name]
    shots = form.few_shot if few_shot is None else few_shot
    if shots < 0:
        raise AquaError(f"few_shot is {shots}: it must be 0 or more")
    if shots and name == "truthfulqa":
        raise AquaError(f"few_shot is {shots}: truthfulqa has no examples, ask it with 0")
    files, items = _read(form, path, form.questions)
    pool_files, pool = (files if shots else ()), items
    if shots and has_split(path, form.examples):
        pool_files, pool = _read(form, path, form.examples)
    examples: dict[str, list[Item]] = {}
    for item in pool:
        examples.setdefault(item.group, []).append(item)
    counts: dict[str, int] = {}
    prompts = []
    for place, item in enumerate(items):
        counts[item.group] = counts.get(item.group, 0) + 1
        if limit is None or counts[item.group] <= limit:
            rng = random.Random(f"{seed}/{place}") if form.draws_examples else None
            chosen = _examples(examples.get(item.group, []), item, shots, rng)
            if len(chosen) < shots:
                raise AquaError(f"{path} has {len(chosen)} examples for a question of {name}: ask for fewer (few_shot)")
            prompts.append(item.after(item.preface + "".join(f"{example}\n\n" for example in chosen)))
    return Task(name, str(path), tuple(prompts), form.metrics, shots, files, pool_files)


def _read(form: Format, path: Path | str, splits: Sequence[str]) -> tuple[tuple[str, ...], list[Item]]:
    files = question_files(path, splits, by_subject=form.by_subject)
    items = [replace(form.parse(row), where=row.where) for row in read_rows(files, form.columns)]
    return tuple(map(str, files)), items


def _examples(pool: list[Item], item: Item, count: int, rng: random.Random | None) -> list[str]:
    """Examples for `item`, which is none itself: drawn, or the first ones."""
    if not count:
        return []
    # One more, because it may be among them.
    taken = min(count + 1, len(pool))
    chosen = rng.sample(pool, taken) if rng else pool[:taken]
    return [other.example for other in chosen if other is not item][:count]
