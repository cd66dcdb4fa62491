# SPDX-License-Identifier: Apache-2.0
"""Questions about a long text, answered dense and with AQUA, compared item by item."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.answer_state import AnswerState, asked
from aqua_attention.evaluate.generation import check_fits, continue_tokens, encode_prompt
from aqua_attention.evaluate.run import Job, Progress, counting, state_path
from aqua_attention.evaluate.setting import READ, Setting, Subject, runs_of

SPARE_TOKENS = 4
"""Tokens that an answer may have beyond those of the expected numbers, such as a space and a full stop."""
WORDS_BETWEEN = 8
"""Tokens that it may have between two numbers, such as "and" or a name."""
TIE = 1e-9
"""Shares of an answer that differ by less are the same."""
Labels = dict[str, int | float | str]
"""What tells a question from others, such as `{"length": 2048, "depth": 0.5}`."""


def is_correct(answer: str, expected: Sequence[str]) -> bool:
    """Whether the first numbers in `answer` are the expected ones, in their order."""
    return re.findall("[0-9]+", answer)[: len(expected)] == list(expected)


def share_found(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that are in `answer`, in whatever case and order."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def any_found(answer: str, expected: Sequence[str]) -> bool:
    """Whether one of the expected strings is in `answer`, in whatever case."""
    return any(text.lower() in answer.lower() for text in expected)


@dataclass(frozen=True)
class Question:
    """One item: what the model reads, and the numbers or words that it has to write.

    Attributes:
        answer_start: how the model's answer begins, up to the first number; it is put into the model's mouth, so that
            chatting around the answer costs neither tokens nor correctness.
        expected: the numbers, in the order asked for, as digits; or other strings.
        new_tokens: that the answer may have; None is as many as the expected numbers take.
        score: called as score(answer, expected); how right an answer is, 0 to 1.
    """

    prompt: str
    answer_start: str
    expected: tuple[str, ...]
    labels: Labels
    new_tokens: int | None = None
    score: Callable[[str, Sequence[str]], float] = is_correct


def evaluate_retrieval(
    subject: Subject,
    settings: Sequence[Setting],
    questions: Sequence[Question],
    *,
    answers: Sequence[AnswerState] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer every question dense and under every setting (greedy), and test the pairs.

    Args:
        answers: of the dense model, then of each setting: those there are, which are added to. Empty: none, nowhere.

    Returns:
        `{"dense": {"accuracy", "questions"}, "rows": [...], "questions": [...]}`. A row a setting: `Run.head`,
        `accuracy` (the mean score), what `counted` and `paired` give (a question whose score differs at all is lost or
        gained; not corrected for asking several times), `same_answer` (share of answers that are dense's, token for
        token), `Run.shares`. An entry a question: its labels, `tokens`, `expected`, and the lists `answers` and
        `correct` (scores), dense first.

    Raises:
        AquaError: no questions, one longer than the model's positions, NaN.
    """
    model, tokenizer = subject.model, subject.tokenizer
    encoded, runs = _encoded(subject, questions), runs_of(subject, settings)
    answers = answers or [AnswerState() for _ in range(1 + len(runs))]
    for run, kept in zip(runs, answers[1:], strict=True):
        run.restore(kept.counts)
    step = counting(progress, len(questions) * len(answers), sum(len(kept.given) for kept in answers))
    under = [(None, dict), *((run.attachment, run.counts) for run in runs)]
    for index, (prompt, budget) in enumerate(encoded):
        for (attachment, counts), kept in zip(under, answers, strict=True):
            if index >= len(kept.given):
                step(1)
                answer = continue_tokens(model, tokenizer, prompt, max_new_tokens=budget, attachment=attachment)
                kept.add(answer, counts)
    step(0)
    for (_, counts), kept in zip(under, answers, strict=True):
        kept.save(counts)
    written = list(zip(*(kept.given for kept in answers), strict=True))
    correct = [
        [question.score(answer.text, question.expected) for answer in answers]
        for question, answers in zip(questions, written, strict=True)
    ]
    rows = []
    for place, run in enumerate(runs, 1):
        compared = paired([(marks[0], marks[place]) for marks in correct], TIE)
        same = sum(answers[place].token_ids == answers[0].token_ids for answers in written)
        given = [marks[place] for marks in correct]
        accuracy = {"accuracy": sum(given) / len(questions)} | counted(questions, given)
        rows.append(run.head() | accuracy | compared | {"same_answer": same / len(questions)} | run.shares())
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
    """A job a setting, whose figures are counted by cell; `options` and `digest` say what is asked about.

    `resumed` in a result: how many answers an earlier run had kept.
    """
    run = asked(subject, _encoded(subject, questions))  # what cannot be asked is known now
    dense: list[AnswerState] = []
    itself = {"lost": 0, "gained": 0, "p_value": 1.0, "same_answer": 1.0, "mean_k": None}

    def measure(setting: Setting | None, progress: Progress, state: Path) -> dict[str, Any]:
        if not dense:
            dense.append(AnswerState(state_path(state.parents[1], first.key), run))
        settings, own = ([], []) if setting is None else ([setting], [AnswerState(state, run)])
        found = evaluate_retrieval(subject, settings, questions, answers=[*dense, *own], progress=progress)
        row = found["rows"][0] if setting else itself
        # The dense model's answer comes first, and is the only one when there is no setting.
        right = [question["correct"][-1] for question in found["questions"]]
        earlier = (own or dense)[0].resumed
        figures = {name: row[name] for name in (*itself, *READ) if name in row}
        return counted(questions, right) | figures | ({"resumed": earlier} if earlier else {})

    options = options | {"chat": subject.chat}
    first, *others = subject.jobs(suite, (None, *settings), options, measure, text_sha256=digest, seed=subject.seed)
    return [replace(first, keeps_state=True), *others]


def counted(questions: Sequence[Question], marks: Sequence[float]) -> dict[str, Any]:
    """`right` (the sum of the scores) and `asked`, and in `cells` the same for each combination of labels."""
    cells: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for question, mark in zip(questions, marks, strict=True):
        labels = {"depth": None} | question.labels
        cells.setdefault(tuple(sorted(labels.items(), reverse=True)), []).append(mark)
    return {"cells": [dict(labels) | _sum(each) for labels, each in cells.items()]} | _sum(marks)


def _sum(marks: Sequence[float]) -> dict[str, float]:
    return {"right": round(sum(marks), 4), "asked": len(marks)}


def _encoded(subject: Subject, questions: Sequence[Question]) -> list[tuple[Tensor, int]]:
    """Token ids [1, length] of each question, and how many tokens its answer may have."""
    if not questions:
        raise AquaError("there are no questions to ask: give at least one")
    tokenizer, encoded = subject.tokenizer, []
    for question in questions:
        prompt = encode_prompt(tokenizer, question.prompt, chat=subject.chat, answer_start=question.answer_start)
        budget = question.new_tokens or _budget(tokenizer, question.expected)
        where = ", ".join(f"{name} {value}" for name, value in question.labels.items())
        check_fits(subject.model, prompt, prompt.shape[1] + budget, f"a question ({where})", "ask shorter ones")
        encoded.append((prompt, budget))
    return encoded


def _budget(tokenizer: Any, numbers: Sequence[str]) -> int:
    """Tokens that an answer of these numbers may have."""
    ids: list[int] = tokenizer(", ".join(numbers), add_special_tokens=False)["input_ids"]
    return len(ids) + SPARE_TOKENS + WORDS_BETWEEN * (len(numbers) - 1)


def paired(pairs: Iterable[tuple[float, float]], tie: float = 1.0) -> dict[str, Any]:
    """`lost`, `gained` (questions that dense, AQUA does better by `tie` or more) and `paired_p_value` of them."""
    differences = [aqua - dense for dense, aqua in pairs]
    lost, gained = (sum(sign * difference >= tie for difference in differences) for sign in (-1, 1))
    return {"lost": lost, "gained": gained, "p_value": paired_p_value(lost, gained)}


def paired_p_value(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split is, if each change were a fair coin."""
    changed, fewer = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(changed, count) for count in range(fewer + 1)) / 2**changed)
