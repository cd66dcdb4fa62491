# SPDX-License-Identifier: Apache-2.0
"""Questions about a long text, answered dense and with AQUA, compared item by item."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.calibration.projections import Projections
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import Continuation, continue_tokens, encode_prompt
from aqua_attention.evaluate.run import Job, Progress, counting
from aqua_attention.evaluate.setting import Multiplied, Setting, as_attached, attachments
from aqua_attention.evaluate.suites.grid import Subject
from aqua_attention.model.limits import check_tokens, position_limit

SPARE_TOKENS = 4
"""Tokens that an answer may have beyond those of the expected numbers, such as a space and a full stop."""
WORDS_BETWEEN = 8
"""Tokens that it may have between two numbers, such as "and" or a name."""


@dataclass(frozen=True)
class Question:
    """One item: what the model reads, and the numbers that it has to write.

    Attributes:
        prompt: the text and the question about it.
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    projections: Projections,
    settings: Sequence[Setting],
    questions: Sequence[Question],
    *,
    chat: bool = True,
    dense_answers: dict[int, Continuation] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer every question dense and under every setting (greedy), and test the pairs.

    Args:
        chat: put the questions into the tokenizer's chat template, if it has one.
        dense_answers: by place in `questions`, filled with the dense answers; they are not asked for again when it is
            given to a further call with the same questions.
        progress: called as progress(answers done, answers in all).

    Returns:
        `{"dense": {"accuracy", "questions"}, "rows": [...], "questions": [...]}`. A row a setting: `setting`, `basis`,
        `accuracy` (exact match), `lost` and `gained` (questions that only dense, only AQUA got right), `p_value` (see
        `paired_p_value`), `same_answer` (share of answers that are dense's, token for token), `mean_k`. An entry a
        question: its labels, `tokens`, `expected`, and the lists `answers` and `correct`, dense first.
        The p-values are one for each setting over all questions, not corrected for asking several times.

    Raises:
        AquaError: no questions, one longer than the model's positions, NaN.
    """
    encoded = encode_questions(model, tokenizer, questions, chat=chat)
    runs = attachments(model, projections, settings)
    settings = as_attached(settings, runs)
    known = {} if dense_answers is None else dense_answers
    answers: list[list[str]] = []
    same = [0] * len(runs)
    step = counting(progress, len(questions) * (1 + len(runs)))
    for index, (prompt, budget) in enumerate(encoded):
        written = []
        for attachment in (None, *(attachment for attachment, _ in runs)):
            step(1)
            if attachment is None and index in known:
                written.append(known[index])
            else:
                written.append(continue_tokens(model, tokenizer, prompt, max_new_tokens=budget, attachment=attachment))
        known[index] = written[0]
        answers.append([answer.text for answer in written])
        same = [
            count + (other.token_ids == written[0].token_ids) for count, other in zip(same, written[1:], strict=True)
        ]
    step(0)
    correct = [
        [is_correct(answer, question.expected) for answer in row]
        for question, row in zip(questions, answers, strict=True)
    ]
    return {
        "dense": {"accuracy": sum(row[0] for row in correct) / len(questions), "questions": len(questions)},
        "rows": [
            _row(setting, multiplied, [(row[0], row[place]) for row in correct], same[place - 1])
            for place, (setting, (_, multiplied)) in enumerate(zip(settings, runs, strict=True), 1)
        ],
        "questions": [
            question.labels
            | {"tokens": prompt.shape[1], "expected": list(question.expected), "answers": texts, "correct": marks}
            for question, (prompt, _), texts, marks in zip(questions, encoded, answers, correct, strict=True)
        ],
    }


def measure_retrieval(
    subject: Subject, settings: Sequence[Setting], questions: Sequence[Question], progress: Progress | None = None
) -> dict[str, Any]:
    """`evaluate_retrieval` of all settings, with what was read."""
    given = subject.model, subject.tokenizer, subject.projections, settings, questions
    found = evaluate_retrieval(*given, chat=subject.chat, progress=progress)
    return found | subject.source() | {"seed": subject.seed, "chat": subject.chat}


def retrieval_jobs(
    suite: str,
    subject: Subject,
    settings: Sequence[Setting],
    questions: list[Question],
    options: dict[str, Any],
    digest: str | None,
) -> list[Job]:
    """`evaluate_retrieval`, a job a setting; its figures are counted by cell.

    Args:
        options: what the questions are made from.
        digest: of the text that they are made from; None where there is none.
    """
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
    return subject.jobs(suite, (None, *settings), options, measure, text_sha256=digest, seed=subject.seed)


def _cells(questions: Sequence[Question], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Right answers of all, for each length (or number of lines) and depth."""
    cells: dict[tuple[tuple[str, float | None], ...], list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        labels = {"depth": None} | question.labels
        cells.setdefault(tuple(sorted(labels.items(), reverse=True)), []).append(is_right)
    return [dict(labels) | {"right": sum(marks), "asked": len(marks)} for labels, marks in cells.items()]


def encode_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, chat: bool
) -> list[tuple[Tensor, int]]:
    """Token ids [1, length] of each question, and how many tokens its answer may have.

    Raises:
        AquaError: no questions, or one longer than the model's positions.
    """
    if not questions:
        raise AquaError("there are no questions to ask: give at least one")
    prompts = [encode_prompt(tokenizer, q.prompt, chat=chat, answer_start=q.answer_start) for q in questions]
    budgets = [_answer_tokens(tokenizer, question) for question in questions]
    limit = position_limit(model)
    for question, prompt, budget in zip(questions, prompts, budgets, strict=True):
        needed = prompt.shape[1] + budget
        if limit is not None and needed > limit:
            where = ", ".join(f"{name} {value}" for name, value in question.labels.items())
            raise AquaError(
                f"a question ({where}) takes {needed} tokens with its answer, the model knows {limit} positions: ask "
                "shorter ones"
            )
        check_tokens(model, prompt, context=needed)
    return list(zip(prompts, budgets, strict=True))


def is_correct(answer: str, expected: Sequence[str]) -> bool:
    """Whether the first numbers in `answer` are the expected ones, in their order."""
    return re.findall("[0-9]+", answer)[: len(expected)] == list(expected)


def paired_p_value(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split is, if each change were a fair coin.

    Args:
        lost, gained: questions that only the first, only the second method got right. Those on which both agree say
            nothing about a difference.
    """
    changed, fewer = lost + gained, min(lost, gained)
    if changed == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(changed, count) for count in range(fewer + 1)) / 2**changed)


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    expected: list[int] = tokenizer(", ".join(question.expected), add_special_tokens=False)["input_ids"]
    return len(expected) + SPARE_TOKENS + WORDS_BETWEEN * (len(question.expected) - 1)


def _row(setting: Setting, multiplied: Multiplied, pairs: list[tuple[bool, bool]], same: int) -> dict[str, Any]:
    lost = sum(dense and not aqua for dense, aqua in pairs)
    gained = sum(aqua and not dense for dense, aqua in pairs)
    return {
        "setting": setting.config.to_dict(),
        "basis": setting.basis,
        "accuracy": sum(aqua for _, aqua in pairs) / len(pairs),
        "lost": lost,
        "gained": gained,
        "p_value": paired_p_value(lost, gained),
        "same_answer": same / len(pairs),
        "mean_k": multiplied.share(),
    }
