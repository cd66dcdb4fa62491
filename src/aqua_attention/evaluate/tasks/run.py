# SPDX-License-Identifier: Apache-2.0
"""Tasks that others measure too, dense and with AQUA on the same questions."""

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.run import Progress, counting
from aqua_attention.evaluate.setting import Run, Setting, Subject, runs_of, warn_of_dense_prompts
from aqua_attention.evaluate.suites.retrieval import paired
from aqua_attention.evaluate.tasks.answers import Answers, answer_items, check_items
from aqua_attention.evaluate.tasks.formats import ChoiceItem, Task, WrittenItem, final_number
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest, shape_of

SAME_MASS = 1e-4
"""Probabilities of MC2 that differ by less are a tie: rounding alone moves them by some 1e-6."""


def evaluate_tasks(
    subject: Subject,
    settings: Sequence[Setting],
    tasks: Sequence[Task],
    *,
    batch: int = 8,
    state: Path | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask every question of every task dense and under every setting, and test the pairs.

    Metrics, as lm-evaluation-harness defines them but for `acc_norm`: `acc`, the likeliest answer is right; `acc_norm`,
    the likeliest per UTF-8 byte (the harness's `acc_norm` counts characters, its `acc_bytes` bytes); `mc1`,
    `acc` among one true and several false answers; `mc2`, the probability of all true answers among all; `exact_match`,
    the number after "####" is right (commas, and a full stop at its end, do not count).

    Args:
        batch: questions at once. Written answers are padded to the longest prompt of a batch.
        state: file that keeps the answers so far, see `Answers`; where it exists, the run goes on from it.

    Returns:
        `{"dense": [...], "rows": [...], "tasks": {...}}`. An entry of `dense` for each task and metric: `task`,
        `metric`, `value` (mean over the questions), `stderr` (its standard error), `count`. A row for each setting,
        task and metric: `Run.head`, the same figures, `dense` (the value without AQUA), what `paired` gives (for mc2 of
        the probability of the true answers: a sign test), and `outside_window`: the share of the prompts' query-key
        pairs outside the exact window, without those of queries that see fewer than `min_length` tokens; where it is
        0, AQUA leaves nothing out. An entry of `tasks` says which files were read.

    Raises:
        AquaError: no tasks, one given twice, a prompt too long, NaN, a state of another run.
        KeyboardInterrupt: after `state` was written.
    """
    check_request([task.name for task in tasks], batch)
    warn_of_dense_prompts(settings)
    model, tokenizer, runs = subject.model, subject.tokenizer, runs_of(subject, settings)
    for run in runs:
        run.attachment.on_selection = None  # what is multiplied is not asked here, and counting costs
    columns = [None, *(run.attachment for run in runs)]
    # All of them before the first answer: what cannot be asked is known now, not after hours.
    lengths = {task.name: check_items(model, tokenizer, task) for task in tasks}
    answers = Answers(_identity(subject, runs, tasks, batch), state)
    known = {task.name: len(answers.of_task.get(task.name, [])) for task in tasks}
    total = sum(len(task.items) for task in tasks)
    step = counting(progress, total * len(columns), sum(known.values()) * len(columns))
    try:
        for task in tasks:
            for start in range(known[task.name], len(task.items), batch):
                part = task.items[start : start + batch]
                given, answered = [], answer_items(model, tokenizer, part, columns)
                for _ in columns:
                    step(len(part))
                    given.append(next(answered))
                answers.add(task.name, [list(row) for row in zip(*given, strict=True)])
    finally:
        answers.save()
    step(0)
    figures = {
        (task.name, metric): [
            [METRICS[metric](item, answer) for answer in row]
            for item, row in zip(task.items, answers.of_task[task.name], strict=True)
        ]
        for task in tasks
        for metric in task.metrics
    }
    return {
        "dense": [_mean(task, metric, [row[0] for row in rows]) for (task, metric), rows in figures.items()],
        "rows": [
            run.head()
            | _compared(task, metric, [(row[0], row[place]) for row in rows])
            | {"outside_window": _outside(run.setting, lengths[task])}
            for place, run in enumerate(runs, 1)
            for (task, metric), rows in figures.items()
        ],
        "tasks": {
            task.name: {
                "path": task.path,
                "files": list(task.files),
                "example_files": list(task.example_files),
                "questions": len(task.items),
                "few_shot": task.few_shot,
                "mean_tokens": statistics.fmean(lengths[task.name]),
                "sha256": task.digest(),
            }
            for task in tasks
        },
    }


def check_request(names: Sequence[str], batch: int) -> None:
    """Raise AquaError for no tasks, one given twice, or no questions at once."""
    if not names or len(set(names)) < len(names):
        raise AquaError(f"the tasks are {', '.join(names) or 'none'}: give at least one, and each once")
    if batch < 1:
        raise AquaError(f"batch is {batch}: it must be at least 1")


def _accuracy(item: ChoiceItem, scores: list[float]) -> float:
    return float(max(item.offered or range(len(scores)), key=scores.__getitem__) == item.right)


def _normalised_accuracy(item: ChoiceItem, scores: list[float]) -> float:
    # The space before an answer is no part of it.
    bytes_of = [max(1, len(text.removeprefix(" ").encode())) for text in item.continuations]
    return _accuracy(item, [score / length for score, length in zip(scores, bytes_of, strict=True)])


def _true_mass(item: ChoiceItem, scores: list[float]) -> float:
    pairs = [(score, true) for score, true in zip(scores, item.true, strict=True) if true is not None]
    largest = max(score for score, _ in pairs)
    masses = [(math.exp(score - largest), true) for score, true in pairs]
    return sum(mass for mass, true in masses if true) / sum(mass for mass, _ in masses)


def _exact_match(item: WrittenItem, answer: str) -> float:
    return float(final_number(answer) == item.number)


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "acc": _accuracy,
    "acc_norm": _normalised_accuracy,
    "mc1": _accuracy,
    "mc2": _true_mass,
    "exact_match": _exact_match,
}
"""What an answer to an item is worth, 0 to 1."""


def _mean(task: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    return {"task": task, "metric": metric, "value": statistics.fmean(values), "stderr": error, "count": count}


def _compared(task: str, metric: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    dense, aqua = zip(*pairs, strict=True)
    return _mean(task, metric, aqua) | {"dense": statistics.fmean(dense)} | paired(pairs, SAME_MASS)


def _outside(setting: Setting, lengths: list[int]) -> float:
    window, short = setting.config.sink + setting.config.recent, max(0, setting.config.threshold - 1)
    beyond = sum(_pairs(length - window) - _pairs(min(length, short) - window) for length in lengths)
    return beyond / sum(map(_pairs, lengths))


def _pairs(tokens: int) -> int:
    """How many pairs of a query and a visible key there are in so many tokens."""
    return max(0, tokens) * max(0, tokens + 1) // 2


def _identity(subject: Subject, runs: Sequence[Run], tasks: Sequence[Task], batch: int) -> dict[str, Any]:
    """What answers depend on, for `Answers`."""
    model, layers = subject.model, attention_layers(subject.model)
    rotations = b"".join(layer.rotation.cpu().numpy().tobytes() for layer in subject.projections.layers.values())
    return {
        "model": {"shape": shape_of(model, layers), "dtype": str(model.dtype)},
        "key_weights": key_weight_digest(layers),
        "projections": hashlib.sha256(rotations).hexdigest(),
        "settings": [run.setting.config.to_dict() | {"basis": run.setting.basis} for run in runs],
        "tasks": {task.name: task.digest() for task in tasks},
        "batch": batch,
    }
