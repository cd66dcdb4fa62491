# SPDX-License-Identifier: Apache-2.0
"""Questions about a long text, answered dense and with AQUA, compared item by item."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import Continuation, check_fits, continue_tokens, encode_prompt
from aqua_attention.evaluate.run import Job, Progress, counting
from aqua_attention.evaluate.setting import Setting, Subject, runs_of

SPARE_TOKENS = 4
"""Tokens that an answer may have beyond those of the expected numbers, such as a space and a full stop."""
WORDS_BETWEEN = 8
"""Tokens that it may have between two numbers, such as "and" or a name."""


@dataclass(frozen=True)
class Question:
    """One item: what the model reads, and the numbers that it has to write.

    Attributes:
        answer_start: how the model's answer begins, up to the first number; it is put into the model's mouth, so that
            chatting around the answer costs neither tokens nor correctness.
        expected: the numbers, in the order asked for, as digits.
        labels: what tells this item from others, such as `{"length": 2048, "depth": 0.5}`.
    """

    prompt: str
    answer_start: str
    expected: tuple[str, ...]
    labels: dict[str, int | float]


def evaluate_retrieval(
    subject: Subject,
    settings: Sequence[Setting],
    questions: Sequence[Question],
    *,
    dense_answers: dict[int, Continuation] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer every question dense and under every setting (greedy), and test the pairs.

    Args:
        dense_answers: filled with the dense answers by place in `questions`, for further calls with the same questions.

    Returns:
        `{"dense": {"accuracy", "questions"}, "rows": [...], "questions": [...]}`. A row a setting: `Run.head`,
        `accuracy` (exact match), what `paired` gives (not corrected for asking several times), `same_answer` (share of
        answers that are dense's, token for token), `mean_k`. An entry a question: its labels, `tokens`, `expected`, and
        the lists `answers` and `correct`, dense first.

    Raises:
        AquaError: no questions, one longer than the model's positions, NaN.
    """
    model, tokenizer = subject.model, subject.tokenizer
    encoded, runs = _encoded(subject, questions), runs_of(subject, settings)
    known = {} if dense_answers is None else dense_answers
    written: list[list[Continuation]] = []
    step = counting(progress, len(questions) * (1 + len(runs)))
    for index, (prompt, budget) in enumerate(encoded):
        written.append([])
        for attachment in (None, *(run.attachment for run in runs)):
            step(1)
            answer = known.get(index) if attachment is None else None
            written[-1].append(
                answer or continue_tokens(model, tokenizer, prompt, max_new_tokens=budget, attachment=attachment)
            )
        known[index] = written[-1][0]
    step(0)
    correct = [
        [is_correct(answer.text, question.expected) for answer in answers]
        for question, answers in zip(questions, written, strict=True)
    ]
    rows = []
    for place, run in enumerate(runs, 1):
        compared = paired([(marks[0], marks[place]) for marks in correct])
        same = sum(answers[place].token_ids == answers[0].token_ids for answers in written)
        accuracy = sum(marks[place] for marks in correct) / len(questions)
        figures = {"same_answer": same / len(questions), "mean_k": run.mean_k()}
        rows.append(run.head() | {"accuracy": accuracy} | compared | figures)
    return {
        "dense": {"accuracy": sum(marks[0] for marks in correct) / len(questions), "questions": len(questions)},
        "rows": rows,
        "questions": [
            question.labels
            | {"tokens": prompt.shape[1], "expected": list(question.expected)}
            | {"answers": [answer.text for answer in answers], "correct": marks}
            for question, (prompt, _), answers, marks in zip(questions, encoded, written, correct, strict=True)
        ],
    }


def retrieval_jobs(
    suite: str,
    subject: Subject,
    settings: Sequence[Setting],
    questions: list[Question],
    options: dict[str, Any],
    digest: str | None,
) -> list[Job]:
    """A job a setting, whose figures are counted by cell; `options` and `digest` say what is asked about."""
    _encoded(subject, questions)  # what cannot be asked is known now
    answers: dict[int, Continuation] = {}
    itself = {"lost": 0, "gained": 0, "p_value": 1.0, "same_answer": 1.0, "mean_k": None}

    def measure(setting: Setting | None, progress: Progress) -> dict[str, Any]:
        settings = [] if setting is None else [setting]
        found = evaluate_retrieval(subject, settings, questions, dense_answers=answers, progress=progress)
        row = found["rows"][0] if setting else itself
        # The dense model's answer comes first, and is the only one when there is no setting.
        right = [question["correct"][-1] for question in found["questions"]]
        counted = {"cells": _cells(questions, right), "right": sum(right), "asked": len(right)}
        return counted | {name: row[name] for name in itself}

    options = options | {"chat": subject.chat}
    return subject.jobs(suite, (None, *settings), options, measure, text_sha256=digest, seed=subject.seed)


def _cells(questions: Sequence[Question], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Right answers of all, for each length (or number of lines) and depth."""
    cells: dict[tuple[tuple[str, float | None], ...], list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        labels = {"depth": None} | question.labels
        cells.setdefault(tuple(sorted(labels.items(), reverse=True)), []).append(is_right)
    return [dict(labels) | {"right": sum(marks), "asked": len(marks)} for labels, marks in cells.items()]


def _encoded(subject: Subject, questions: Sequence[Question]) -> list[tuple[Tensor, int]]:
    """Token ids [1, length] of each question, and how many tokens its answer may have."""
    if not questions:
        raise AquaError("there are no questions to ask: give at least one")
    tokenizer, encoded = subject.tokenizer, []
    for question in questions:
        prompt = encode_prompt(tokenizer, question.prompt, chat=subject.chat, answer_start=question.answer_start)
        numbers: list[int] = tokenizer(", ".join(question.expected), add_special_tokens=False)["input_ids"]
        budget = len(numbers) + SPARE_TOKENS + WORDS_BETWEEN * (len(question.expected) - 1)
        where = ", ".join(f"{name} {value}" for name, value in question.labels.items())
        check_fits(subject.model, prompt, prompt.shape[1] + budget, f"a question ({where})", "ask shorter ones")
        encoded.append((prompt, budget))
    return encoded


def is_correct(answer: str, expected: Sequence[str]) -> bool:
    """Whether the first numbers in `answer` are the expected ones, in their order."""
    return re.findall("[0-9]+", answer)[: len(expected)] == list(expected)


def paired(pairs: Iterable[tuple[float, float]], tie: float = 1.0) -> dict[str, Any]:
    """`lost`, `gained` (questions that dense, AQUA does better by `tie` or more) and `paired_p_value` of them."""
    differences = [aqua - dense for dense, aqua in pairs]
    lost, gained = (sum(sign * difference >= tie for difference in differences) for sign in (-1, 1))
    return {"lost": lost, "gained": gained, "p_value": paired_p_value(lost, gained)}


def paired_p_value(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split is, if each change were a fair coin."""
    changed, fewer = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(changed, count) for count in range(fewer + 1)) / 2**changed)
