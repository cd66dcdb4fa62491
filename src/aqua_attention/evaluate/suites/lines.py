# SPDX-License-Identifier: Apache-2.0
"""Line retrieval: many lines "line NAME: REGISTER_CONTENT is <NUMBER>", and a question for one of them.

The task of LongEval (the LongChat project), whose files of questions are read as they are; or generated, with
sentences of our own around the same lines.
"""

import json
import random
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import file_digest
from aqua_attention.evaluate.run import Job
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.grid import QUESTIONS, Sizes
from aqua_attention.evaluate.suites.names import MOST_NAMES, names
from aqua_attention.evaluate.suites.retrieval import Question, retrieval_jobs
from aqua_attention.io.files import open_text

MOST_LINES = MOST_NAMES


def lines_questions(lines: int, *, count: int, seed: int = 0) -> list[Question]:
    """Generate `count` questions about `lines` lines each; AquaError for numbers out of range.

    Names are adjective-noun pairs, numbers 1 to 50 000, all different within a question.
    """
    if not 1 <= lines <= MOST_LINES:
        raise AquaError(f"lines is {lines}: it must be 1 to {MOST_LINES}, as many as there are names")
    if count < 1:
        raise AquaError(f"count is {count}: it must be at least 1")
    rng = random.Random(f"{seed}/{lines}")
    return [_generated(lines, rng) for _ in range(count)]


def read_lines_questions(path: Path, *, count: int | None = None) -> list[Question]:
    """The first `count` (None: all) of LongEval's line questions in a .jsonl or .jsonl.gz file.

    AquaError where there is no such file, it is damaged, or a line lacks `prompt`, `random_idx` or `expected_number`.
    """
    if count is not None and count < 1:
        raise AquaError(f"count is {count}: it must be at least 1")
    if not path.is_file():
        raise AquaError(f"{path}: no such file of line questions: give a LongEval .jsonl, or --lines to generate")
    try:
        with open_text(path) as file:
            lines = ((line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.strip())
            questions = [_parsed(*each) for each in islice(lines, count)]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise AquaError(f"{path} cannot be read ({error}): fetch it again") from error
    if not questions:
        raise AquaError(f"{path} is empty: give a file with questions")
    return questions


def lines_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """One of many numbered lines, see `sized_questions`."""
    questions, file = sized_questions(sizes, subject.seed), sizes.lines_file
    if file is None:
        options = {"data": "generated", "lines": sizes.lines, "count": sizes.count}
        return retrieval_jobs("lines", subject, settings, questions, options, None)
    options = {"data": str(file), "count": len(questions)}
    return retrieval_jobs("lines", subject, settings, questions, options, file_digest(file))


def sized_questions(sizes: Sizes, seed: int) -> list[Question]:
    """The questions of a file, or so many of each number of lines."""
    if sizes.lines_file is not None:
        return read_lines_questions(sizes.lines_file, count=sizes.count)
    # A number given twice would count the same questions twice.
    numbers, count = dict.fromkeys(sizes.lines), QUESTIONS if sizes.count is None else sizes.count
    return [question for lines in numbers for question in lines_questions(lines, count=count, seed=seed)]


def _generated(lines: int, rng: random.Random) -> Question:
    named, numbers = names(rng, lines), rng.sample(range(1, 50_001), lines)
    asked = rng.randrange(lines)
    record = "\n".join(
        f"line {name}: REGISTER_CONTENT is <{number}>" for name, number in zip(named, numbers, strict=True)
    )
    prompt = (
        "Each line of the record below has a name and, in angle brackets, a number, its REGISTER_CONTENT. Read them "
        f"all: a question about one of them follows.\n\n{record}\n\n"
        f"That was the record. What is the REGISTER_CONTENT of line {named[asked]}? Answer with its number."
    )
    return _question(prompt, named[asked], numbers[asked], lines)


def _parsed(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        prompt, name, number = row["prompt"], row["random_idx"], row["expected_number"]
    except (ValueError, TypeError, RecursionError) as error:
        raise AquaError(f"{where} is no LongEval line question ({error}): mend or drop it") from error
    except KeyError as error:
        raise AquaError(f"{where} has no field {error}, so it is no LongEval line question: mend or drop it") from error
    name = name[0] if isinstance(name, list) and name else name
    for field, value in (("prompt", prompt), ("random_idx", name)):
        # Half of a surrogate pair is what no tokenizer takes.
        if not (isinstance(value, str) and value.strip() and value.encode(errors="ignore").decode() == value):
            raise AquaError(f"{where}: its {field} is no text: mend or drop it")
    if type(number) is not int or number < 0:
        raise AquaError(f"{where}: its expected_number is {number!r}, not a whole number: mend or drop it")
    return _question(prompt, name, number, prompt.count("REGISTER_CONTENT is <"))


def _question(prompt: str, name: str, number: int, lines: int) -> Question:
    # As the record has it: the small models that this suite is for find more lines than after a sentence.
    start = f"line {name}: REGISTER_CONTENT is <"
    return Question(prompt=prompt, answer_start=start, expected=(str(number),), labels={"lines": lines})
