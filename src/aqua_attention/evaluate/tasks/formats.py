# SPDX-License-Identifier: Apache-2.0
"""The tasks: how a row of each one's files becomes prompts and answers, as lm-evaluation-harness words them.

Rows are read as the data sets are published, by their authors or on the hub, or as llm-foundry has them (`query`,
`choices`, `gold`; for WinoGrande `context_options`, `continuation`, `gold`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.tasks.files import Row, has_split, question_files, read_rows

LETTERS = "ABCDEFGH"
NUMBER = re.compile(r"#### (-?[0-9.,]+)")


@dataclass(frozen=True)
class ChoiceItem:
    """A question whose answers are given: the model says how likely each is, log p(continuation given context).

    Attributes:
        right: index of the right one.
        offered: indices of the answers among which `right` is to be found; None: all.
        true: for TruthfulQA, of each answer whether it is true, or None where it does not count.
        example: the question with its right answer, as an example to others. preface: stands before all examples.
        group: a `limit` counts within it, such as a subject.
        where: file and line, for messages.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    right: int
    example: str
    offered: tuple[int, ...] | None = None
    true: tuple[bool | None, ...] = ()
    preface: str = ""
    group: str = ""
    where: str = field(default="", repr=False, compare=False)  # the same question in another place is the same

    def after(self, prefix: str) -> ChoiceItem:
        """The same with `prefix` before each context."""
        return replace(self, contexts=tuple(prefix + context for context in self.contexts))


@dataclass(frozen=True)
class WrittenItem:
    """A question that the model answers in words, among them a `number`, see `final_number`, and `ChoiceItem`."""

    prompt: str
    number: str
    example: str
    preface: str = ""
    group: str = ""
    where: str = field(default="", repr=False, compare=False)

    def after(self, prefix: str) -> WrittenItem:
        """The same with `prefix` before the prompt."""
        return replace(self, prompt=prefix + self.prompt)


Item = ChoiceItem | WrittenItem


@dataclass(frozen=True)
class Task:
    """Questions to ask, each with `few_shot` examples before it, and the files that both were read from."""

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


@dataclass(frozen=True)
class Format:
    """What is particular to a task.

    Attributes:
        metrics: see `tasks.METRICS`.
        questions, examples: splits that hold them, the best first.
        few_shot: examples before a question, unless told otherwise.
        columns: of .csv files without a line of names.
        by_subject: a split may have several files, one a subject, whose first questions are the examples; otherwise
            those are drawn at random for each question.
    """

    parse: Callable[[Row], Item]
    metrics: tuple[str, ...]
    questions: tuple[str, ...]
    examples: tuple[str, ...] = ("train",)
    few_shot: int = 0
    columns: tuple[str, ...] | None = None
    by_subject: bool = False


def final_number(answer: str) -> str | None:
    """The number after "####", without thousands separators and a full stop at its end; None when there is none."""
    found = NUMBER.search(answer)
    return None if found is None else found.group(1).replace(",", "").removesuffix(".")


def _hellaswag(row: Row) -> ChoiceItem:
    if "query" in row.fields:
        context, endings, right = _text(row, "query"), _texts(row, "choices"), _index(row, "gold")
    else:
        context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b', True).capitalize()}"
        endings, right = _texts(row, "endings"), _index(row, "label")
    return _choice(row, _without_wikihow_marks(context), [_without_wikihow_marks(text) for text in endings], right)


def _winogrande(row: Row) -> ChoiceItem:
    """The blank is filled with each option; scored is the rest of the sentence, which both share."""
    if "context_options" in row.fields:
        contexts, rest, right = _texts(row, "context_options"), _text(row, "continuation"), _index(row, "gold")
    else:
        sentence, options = _text(row, "sentence"), [_text(row, f"option{number}") for number in (1, 2)]
        before, blank, rest = sentence.partition("_")
        if not blank or not rest.strip():
            raise _error(row, "its sentence has no blank (_) with words after it")
        contexts, right = [before + option for option in options], _index(row, "answer", first=1)
    return _choice(row, contexts, [rest.strip()] * len(contexts), right)


def _arc(row: Row) -> ChoiceItem:
    if "query" in row.fields:
        context = f"Question: {_text(row, 'query').removeprefix('Question: ')}\nAnswer:"
        return _choice(row, context, _texts(row, "choices"), _index(row, "gold"))
    question, choices = row.fields.get("question"), row.fields.get("choices")
    if isinstance(question, dict):  # as AI2 publishes it; the hub has the same in columns
        choices = question.get("choices")
        question = question.get("stem")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not (isinstance(question, str) and isinstance(choices, dict)):
        raise _error(row, "it lacks a question with choices, each a text and a label")
    inner = replace(row, fields=choices)
    texts, labels, answer = _texts(inner, "text"), _texts(inner, "label"), _text(row, "answerKey")
    if len(texts) != len(labels) or answer not in labels:
        raise _error(row, f"its answerKey {answer!r} is none of its labels, one for each text")
    return _choice(row, f"Question: {question}\nAnswer:", texts, labels.index(answer))


def _truthfulqa(row: Row) -> ChoiceItem:
    """All answers of MC1 (one is right) and MC2 (several are true), each once; no examples are put before them."""
    if "Best Answer" in row.fields:
        best = _sentence(_text(row, "Best Answer"))
        lists = (_text(row, f"{name} Answers").split(";") for name in ("Correct", "Incorrect"))
        true, false = ([_sentence(answer) for answer in answers if answer.strip()] for answers in lists)
        question, single = _text(row, "Question"), {best: True} | dict.fromkeys(false, False)
        several = dict.fromkeys([best, *true], True) | dict.fromkeys(false, False)
    else:
        question = _text(row, "question")
        single, several = _targets(row, "mc1_targets"), _targets(row, "mc2_targets")
    if sum(single.values()) != 1 or len(set(several.values())) != 2:
        raise _error(row, "it needs one right answer, and both true and false ones")
    answers = list(single | several)
    right = next(answer for answer in single if single[answer])
    item = _choice(row, f"Q: {question.strip()}\nA:", answers, answers.index(right))
    offered = tuple(place for place, answer in enumerate(answers) if answer in single)
    return replace(item, offered=offered, true=tuple(several.get(answer) for answer in answers))


def _mmlu(row: Row) -> ChoiceItem:
    choices = [_text(row, letter) for letter in "ABCD"] if "A" in row.fields else _texts(row, "choices")
    answer = row.fields.get("answer", row.fields.get("gold"))
    # The authors' files and the hub's differ in this.
    right = LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    if type(right) is not int:
        raise _error(row, f"its answer {answer!r} is neither a letter nor an index")
    letters = LETTERS[: len(choices)]
    lines = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
    question = _text(row, "question" if "question" in row.fields else "query").strip()
    subject = str(row.fields.get("subject") or row.stem).replace("_", " ")
    item = _choice(row, f"{question}{lines}\nAnswer:", list(letters), right)
    preface = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return replace(item, preface=preface, group=subject)


def _gsm8k(row: Row) -> WrittenItem:
    answer = _text(row, "answer")
    number = final_number(answer)
    if number is None:
        raise _error(row, "its answer has no number after '#### '")
    prompt = f"Question: {_text(row, 'question')}\nAnswer:"
    return WrittenItem(prompt, number, f"{prompt} {answer}")


TEST = ("test", "validation", "val", "valid", "dev")
LABELLED = ("validation", "val", "valid", "dev")
"""Splits of data sets that keep the answers of their test split to themselves."""
FORMATS = {
    "hellaswag": Format(_hellaswag, ("acc", "acc_norm"), LABELLED),
    "winogrande": Format(_winogrande, ("acc",), LABELLED),
    "arc_easy": Format(_arc, ("acc", "acc_norm"), TEST),
    "arc_challenge": Format(_arc, ("acc", "acc_norm"), TEST),
    "truthfulqa": Format(_truthfulqa, ("mc1", "mc2"), LABELLED),
    "mmlu": Format(*(_mmlu, ("acc",), TEST[:-1], ("dev",)), columns=("question", *"ABCD", "answer"), by_subject=True),
    "gsm8k": Format(_gsm8k, ("exact_match",), TEST, few_shot=5),
}


def load_task(
    name: str, path: Path | str, *, limit: int | None = None, few_shot: int | None = None, seed: int = 0
) -> Task:
    """Read a task's questions, and put examples before them.

    Examples come from the train split (MMLU: dev) when `path` is a folder that has one, otherwise from the other
    questions. They are drawn anew for each question, by `seed` and its place; for MMLU they are the first ones of its
    subject.

    Args:
        name: one of FORMATS.
        path: see `question_files`.
        limit: only the first so many questions; for MMLU, of each subject.
        few_shot: how many examples; None takes what is usual (GSM8K 5, all others 0).

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
    pool_files, pool = (files, items) if shots else ((), [])
    if shots and has_split(path, form.examples):
        pool_files, pool = _read(form, path, form.examples)
    examples: dict[str, list[Item]] = {}
    for item in pool:
        examples.setdefault(item.group, []).append(item)
    counts: Counter[str] = Counter()
    prompts = []
    for place, item in enumerate(items):
        counts[item.group] += 1
        if limit is None or counts[item.group] <= limit:
            of_group = examples.get(item.group, [])
            # One more, because the question may be among them.
            most = min(shots + 1, len(of_group))
            drawn = of_group[:most] if form.by_subject else random.Random(f"{seed}/{place}").sample(of_group, most)
            chosen = [other.example for other in drawn if other is not item][:shots]
            if len(chosen) < shots:
                raise AquaError(f"{path} has {len(chosen)} examples for a question of {name}: ask for fewer (few_shot)")
            prompts.append(item.after(item.preface + "".join(f"{example}\n\n" for example in chosen)))
    return Task(name, str(path), tuple(prompts), form.metrics, shots, files, pool_files)


def _read(form: Format, path: Path | str, splits: Sequence[str]) -> tuple[tuple[str, ...], list[Item]]:
    files = question_files(path, splits, by_subject=form.by_subject)
    items = [replace(form.parse(row), where=row.where) for row in read_rows(files, form.columns)]
    return tuple(map(str, files)), items


def _choice(row: Row, context: str | list[str], texts: list[str], right: int) -> ChoiceItem:
    """`context` is one of all texts, or one of each."""
    if not 0 <= right < len(texts):
        raise _error(row, f"its right answer is none of its {len(texts)} answers")
    contexts = [context] * len(texts) if isinstance(context, str) else context
    continuations = tuple(f" {text}" for text in texts)
    return ChoiceItem(tuple(contexts), continuations, right, contexts[right] + continuations[right])


def _without_wikihow_marks(text: str) -> str:
    """HellaSwag's WikiHow part has marks in brackets, of which [title] stands for the end of a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _sentence(text: str) -> str:
    """With a full stop at its end, as the authors' multiple-choice answers have."""
    return f"{text.strip().removesuffix('.')}."


def _targets(row: Row, name: str) -> dict[str, bool]:
    targets = row.fields.get(name)
    pairs = list(targets.items()) if isinstance(targets, dict) else []
    if isinstance(targets, dict) and {"choices", "labels"} <= set(targets):  # as on the hub
        choices, labels = targets["choices"], targets["labels"]
        is_whole = isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels)
        pairs = list(zip(choices, labels, strict=True)) if is_whole else []
    if not pairs or not all(isinstance(answer, str) and label in (0, 1) for answer, label in pairs):
        raise _error(row, f"its {name} is no list of answers with a label 0 or 1 each")
    return {answer: bool(label) for answer, label in pairs}


def _text(row: Row, name: str, may_be_empty: bool = False) -> str:
    value = row.fields.get(name)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise _error(row, f"its field {name!r} is {'missing' if name not in row.fields else 'no text'}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _error(row, f"its field {name!r} has half a surrogate pair in it")
    return value


def _texts(row: Row, name: str) -> list[str]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
        missing = "missing" if name not in row.fields else f"no list of 2 to {len(LETTERS)} texts"
        raise _error(row, f"its field {name!r} is {missing}")
    return [_text(replace(row, fields={name: value}), name) for value in values]


def _index(row: Row, name: str, first: int = 0) -> int:
    value = row.fields.get(name)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int:
        raise _error(row, f"its field {name!r} is {row.fields.get(name, 'missing')!r}, not the right answer's number")
    return value - first


def _error(row: Row, problem: str) -> AquaError:
    return AquaError(f"{row.where}: {problem}: mend or drop it, or check that it is of this task")
