# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack: sentences with a secret number, put between the sentences of a long text, and asked for."""

import random
from collections.abc import Sequence
from itertools import product

from aqua_attention.data.text import text_digest
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import encode_prompt
from aqua_attention.evaluate.run import Job
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.evaluate.suites.haystack import Haystack, new_numbers, token_counts
from aqua_attention.evaluate.suites.retrieval import Labels, Question, retrieval_jobs

CITIES = (
    "Bergen Cusco Dakar Esfahan Fukuoka Granada Havana Innsbruck Jakarta Kyoto Lagos Mombasa Nairobi Oslo Porto Quito "
    "Riga Samarkand Tbilisi Utrecht Valencia Warsaw Yerevan Zagreb"
).split()
DIGITS = 6
"""Of a secret number."""


def needle_questions(subject: Subject, sizes: Sizes) -> list[Question]:
    """One question for each length, depth and repeat, about a haystack cut from the subject's text in whole sentences.

    The prompt takes 90 to 100 per cent of the tokens of its length. With more needles, the first is at the depth and
    the others at equal distances behind it, up to the end; all of them are asked for, in their order. AquaError for a
    value out of range, and a text shorter than the longest haystack.
    """
    tokenizer, text, needles, repeats = subject.tokenizer, subject.text, sizes.needles, sizes.repeats
    if not 1 <= needles <= len(CITIES):
        raise AquaError(f"needles is {needles}: it must be 1 to {len(CITIES)}")
    if repeats < 1:
        raise AquaError(f"repeats is {repeats}: it must be at least 1")
    for depth in sizes.depths:
        if not 0 <= depth <= 1:
            raise AquaError(f"depth is {depth}: it must be a number with 0 <= depth <= 1")
    haystack, questions = Haystack(tokenizer, text), []
    # A cell given twice would count the same questions twice.
    for length, depth, repeat in product(dict.fromkeys(sizes.lengths), dict.fromkeys(sizes.depths), range(repeats)):
        rng = random.Random(f"{subject.seed}/{length}/{depth}/{repeat}")
        cities, numbers = rng.sample(CITIES, needles), new_numbers(rng, needles, DIGITS, text)
        labels: Labels = {"length": length, "depth": depth}
        bare = _question("", cities, numbers, labels)
        overhead = encode_prompt(tokenizer, bare.prompt, chat=subject.chat, answer_start=bare.answer_start).shape[1]
        hidden = [f"The secret number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
        overhead += token_counts(tokenizer, [" ".join(hidden)])[0] + needles
        if (room := length - overhead) < 1:
            raise AquaError(
                f"length is {length}: question and needles alone take {overhead} tokens, give a larger length"
            )
        positions = [depth + (1 - depth) * index / needles for index in range(needles)]
        hay = haystack.hiding(hidden, positions, room, rng)
        questions.append(_question(hay, cities, numbers, labels))
    return questions


def needle_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """A needle at each depth of texts of each length, see `needle_questions`."""
    options = {name: getattr(sizes, name) for name in ("lengths", "depths", "needles", "repeats")}
    given = needle_questions(subject, sizes), options | {"data": subject.data}
    return retrieval_jobs("needle", subject, settings, *given, text_digest(subject.text))


def _question(hay: str, cities: Sequence[str], numbers: Sequence[str], labels: Labels) -> Question:
    several = len(cities) > 1
    named = cities[0] if not several else f"{', '.join(cities[:-1])} and {cities[-1]}"
    asked = f"the secret numbers of {named}, in this order" if several else f"the secret number of {named}"
    verb = "are" if several else "is"
    return Question(
        prompt=f"Read this text; a question about it follows.\n\n{hay}\n\nAccording to the text, what {verb} {asked}?",
        answer_start=f"{asked[0].upper()}{asked[1:]}{',' if several else ''} {verb}",
        expected=tuple(numbers),
        labels=labels,
    )
