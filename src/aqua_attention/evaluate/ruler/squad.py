# SPDX-License-Identifier: Apache-2.0
"""Files in the format of SQuAD: questions about paragraphs, with answers that stand there."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aqua_attention.errors import AquaError, brief
from aqua_attention.io.files import open_text, parse_json


class Reading(NamedTuple):
    """A question, the paragraph that answers it, and the answers, each in other words."""

    question: str
    paragraph: str
    answers: tuple[str, ...]


def read_squad(path: Path) -> list[Reading]:
    """The questions of a .json or .json.gz file but for those without an answer in their paragraph, each once.

    AquaError where there is no such file, it is damaged, of another format, or has no question.
    """
    check_is_file(path)
    try:
        with open_text(path) as file:
            value = parse_json(file.read(), str(path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise AquaError(f"{path} cannot be read ({error}): fetch it again") from error
    try:
        readings = list(dict.fromkeys(_readings(value)))
    except (TypeError, KeyError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        raise AquaError(f"{path} is not in SQuAD's format ({words}): give data, paragraphs, qas, answers") from error
    for text in (text for each in readings for text in (each.question, each.paragraph)):
        # Half of a surrogate pair is what no tokenizer takes.
        if text.encode(errors="ignore").decode() != text:
            raise AquaError(f"{path} has half a surrogate pair in {brief(text)}: mend its \\u escapes")
    if not readings:
        raise AquaError(f"{path} has no question with an answer in its paragraph: give another file")
    return readings


def check_is_file(path: Path) -> None:
    """Raise AquaError where there is none."""
    if not path.is_file():
        raise AquaError(f"{path}: no such file of questions: give a .json in SQuAD's format")


def _readings(value: Any) -> Iterator[Reading]:
    for article in value["data"]:
        for paragraph in article["paragraphs"]:
            context = paragraph["context"].strip()
            for asked in paragraph["qas"]:
                given = [answer["text"].strip() for answer in asked["answers"]]
                answers = tuple(dict.fromkeys(text for text in given if text and text.lower() in context.lower()))
                if answers and (question := asked["question"].strip()):
                    yield Reading(question, context, answers)
