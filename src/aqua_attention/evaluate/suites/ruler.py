# SPDX-License-Identifier: Apache-2.0
"""The tasks of RULER (arXiv 2404.06654), generated from any text at any length, under RULER's own names.

Sentences, words and names are ours, so that scores are near to those of RULER's own prompts, and not the same.
"""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from aqua_attention.data.text import text_digest
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import encode_prompt
from aqua_attention.evaluate.record import file_digest
from aqua_attention.evaluate.ruler.material import Draw, Material
from aqua_attention.evaluate.ruler.needles import Needles
from aqua_attention.evaluate.ruler.reading import reading
from aqua_attention.evaluate.ruler.squad import check_is_file, read_squad
from aqua_attention.evaluate.ruler.tracking import tracking
from aqua_attention.evaluate.ruler.words import common, frequent
from aqua_attention.evaluate.run import Job, Progress, counting
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.grid import QUESTIONS, Sizes
from aqua_attention.evaluate.suites.retrieval import Question, retrieval_jobs

QA = "qa"
TASKS: dict[str, Callable[[Material, Draw], Question]] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(opens="code"),
    "niah_multikey_1": Needles(vaults=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", names="code", opens="code"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(vaults=4, asked=4),
    "vt": tracking,
    "cwe": common,
    "fwe": frequent,
    QA: reading,
}
"""By RULER's names; its `qa_1` and `qa_2` are `qa` of one file of questions or another."""
TRIES = 8
FULL = 0.9
"""Share of its tokens that an item has at least, where the text allows."""


def asked_tasks(sizes: Sizes) -> list[str]:
    """The tasks that are asked for, each once; of all of them, question answering needs a file of questions.

    AquaError for an unknown task, for question answering by name without questions, and for a file that is not there.
    """
    for name in sizes.tasks:
        if name not in TASKS:
            raise AquaError(f"task is {name!r}: it must be one of {', '.join(TASKS)}")
        if name == QA and sizes.questions is None:
            raise AquaError(f"task {QA} has no questions: give a file in SQuAD's format (--questions)")
    tasks = list(dict.fromkeys(sizes.tasks or TASKS))
    if QA in tasks and sizes.questions is None:
        warnings.warn(f"task {QA} is left out: it takes a file in SQuAD's format (--questions)", stacklevel=3)
        tasks.remove(QA)
    if QA in tasks and sizes.questions is not None:
        check_is_file(sizes.questions)
    return tasks


def ruler_questions(subject: Subject, sizes: Sizes, progress: Progress | None = None) -> list[Question]:
    """So many items of each task and length, in this order; `length` is tokens of prompt and answer together.

    Item i of a task and length follows the seed, whatever else is asked for. AquaError as `asked_tasks`; for a length
    that is too short for a task, a text that is too short for a length, and fewer questions than items.
    """
    tasks, count = asked_tasks(sizes), QUESTIONS if sizes.count is None else sizes.count
    if count < 1:
        raise AquaError(f"count is {count}: it must be at least 1")
    readings = read_squad(sizes.questions) if QA in tasks and sizes.questions else []
    if QA in tasks and len(readings) < count:
        raise AquaError(f"count is {count}: {sizes.questions} has {len(readings)} questions, give a smaller count")
    random.Random(f"{subject.seed}/{QA}").shuffle(readings)
    material, questions = Material(subject.tokenizer, subject.text, readings), []
    places = list(product(tasks, dict.fromkeys(sizes.lengths), range(count)))
    step = counting(progress, len(places))
    for task, length, index in places:
        step(1)
        questions.append(_fitted(partial(_made, subject, material, task, length, index), task, length))
    step(0)
    return questions


def ruler_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """Items of each task and length, see `ruler_questions`."""
    sizes = replace(sizes, tasks=tuple(asked_tasks(sizes)))
    options: dict[str, Any] = {name: getattr(sizes, name) for name in ("lengths", "tasks", "count")}
    given = ruler_questions(subject, sizes), options | {"data": subject.data} | questions_named(sizes)
    return retrieval_jobs("ruler", subject, settings, *given, text_digest(subject.text))


def questions_named(sizes: Sizes) -> dict[str, str]:
    """What a record says of the file of questions, if one of the tasks reads it."""
    if QA not in sizes.tasks or sizes.questions is None:
        return {}
    return {"questions_file": str(sizes.questions), "questions_sha256": file_digest(sizes.questions)}


@dataclass(frozen=True)
class _Item:
    """A question, and its tokens with its answer."""

    question: Question
    tokens: int


def _made(subject: Subject, material: Material, task: str, length: int, index: int, size: int) -> _Item:
    """An item of a task, filled by about `size` tokens."""
    rng = random.Random(f"{subject.seed}/{task}/{length}/{index}")
    made = TASKS[task](material, Draw(rng, index, length, size))
    question = replace(made, labels={"task": task, "length": length})
    ids = encode_prompt(subject.tokenizer, question.prompt, chat=subject.chat, answer_start=question.answer_start)
    return _Item(question, ids.shape[1] + (question.new_tokens or 0))


def _fitted(make: Callable[[int], _Item], task: str, length: int) -> Question:
    """The item that has `length` tokens at most, and nearly so many."""
    least = make(0)
    if least.tokens > length:
        words = f"{task} takes at least {least.tokens} tokens with its answer"
        raise AquaError(f"length is {length}: {words}, give a larger length or other tasks (--task)")
    best, size = least, length - least.tokens
    for _ in range(TRIES):
        item = make(size)
        if item.tokens <= length and item.tokens > best.tokens:
            best = item
        if FULL * length <= item.tokens <= length:
            break
        scaled = int(size * (length - least.tokens) / max(1, item.tokens - least.tokens))
        # A little less than that: with another size come other words, of other tokens.
        size = int(0.99 * scaled) if item.tokens > length else scaled
    return best.question
