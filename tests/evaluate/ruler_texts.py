# SPDX-License-Identifier: Apache-2.0
"""A text and questions of which items of RULER are made, for its tests."""

from __future__ import annotations

import json
import random

from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.evaluate.suites.names import names
from aqua_attention.evaluate.suites.ruler import ruler_questions
from conftest import subject_of

LENGTH = 700


def essay(sentences=700):
    """Sentences of eight words each, of a thousand words, none of which stands in another one."""
    rng = random.Random(1)
    vocabulary = [name.replace("-", "") for name in names(rng, 1000)]
    return " ".join(" ".join(rng.choices(vocabulary, k=8)) + "." for _ in range(sentences))


ESSAY = essay()


def squad(count=12):
    """Questions whose answers are words that no essay holds."""
    qas = [
        {
            "context": f"Number {'abcdefghijklm'[n]}{'zyxwvutsrqpon'[n]}qq was found by a sailor in the {n}th year.",
            "qas": [
                {
                    "question": f"What was found in the {n}th year?",
                    "answers": [{"text": f"{'abcdefghijklm'[n]}{'zyxwvutsrqpon'[n]}qq"}, {"text": "elsewhere"}],
                }
            ],
        }
        for n in range(count)
    ]
    return {"data": [{"paragraphs": qas}]}


def write_squad(folder):
    """The questions in a file."""
    path = folder / "questions.json"
    path.write_text(json.dumps(squad()))
    return path


def maker(tokenizer, path):
    """What makes questions of tasks about the essay, or another text."""

    def make(*tasks, text=ESSAY, seed=0, **sizes):
        subject = subject_of(None, None, tokenizer, text=text, seed=seed, chat=False)
        given = {"lengths": (LENGTH,), "count": 2, "questions": path} | sizes
        return ruler_questions(subject, Sizes(tasks=tasks, **given))

    return make
