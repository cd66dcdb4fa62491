# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack: sentences with a secret number, put between the sentences of a long text, and asked for."""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, product

from aqua_attention.data.text import text_digest
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import encode_prompt
from aqua_attention.evaluate.run import Job
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.evaluate.suites.retrieval import Question, retrieval_jobs

CITIES = (
    "Bergen Cusco Dakar Esfahan Fukuoka Granada Havana Innsbruck Jakarta Kyoto Lagos Mombasa Nairobi Oslo Porto Quito "
    "Riga Samarkand Tbilisi Utrecht Valencia Warsaw Yerevan Zagreb"
).split()
TRIES = 1000
# White space stays with the sentence behind it, so that joining the pieces gives the text back.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？।])|(?=\n[ \t\r]*\n)")


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
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence]
    ids = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
    ends = [0, *accumulate(len(sentence) for sentence in ids)]
    questions = []
    # A cell given twice would count the same questions twice.
    for length, depth, repeat in product(dict.fromkeys(sizes.lengths), dict.fromkeys(sizes.depths), range(repeats)):
        rng = random.Random(f"{subject.seed}/{length}/{depth}/{repeat}")
        cities, numbers = rng.sample(CITIES, needles), _numbers(rng, needles, text)
        labels = {"length": length, "depth": depth}
        bare = _question("", cities, numbers, labels)
        overhead = encode_prompt(tokenizer, bare.prompt, chat=subject.chat, answer_start=bare.answer_start).shape[1]
        hidden = [f"The secret number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
        overhead += len(tokenizer(" ".join(hidden), add_special_tokens=False)["input_ids"]) + needles
        if (room := length - overhead) < 1:
            raise AquaError(
                f"length is {length}: question and needles alone take {overhead} tokens, give a larger length"
            )
        start, stop = _span(ends, room, rng)
        positions = [depth + (1 - depth) * index / needles for index in range(needles)]
        places = [_boundary(ends[start : stop + 1], position) for position in positions]
        hay = _hide(sentences[start:stop], hidden, places)
        questions.append(_question(hay, cities, numbers, labels))
    return questions


def needle_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """A needle at each depth of texts of each length, see `needle_questions`."""
    options = {name: getattr(sizes, name) for name in ("lengths", "depths", "needles", "repeats")}
    given = needle_questions(subject, sizes), options | {"data": subject.data}
    return retrieval_jobs("needle", subject, settings, *given, text_digest(subject.text))


def _numbers(rng: random.Random, count: int, text: str) -> list[str]:
    """Different six-digit ones, none of which the text holds."""
    numbers: list[str] = []
    for _ in range(TRIES):
        if len(numbers) == count:
            return numbers
        number = str(rng.randrange(100_000, 1_000_000))
        if number not in numbers and number not in text:
            numbers.append(number)
    raise AquaError("the text is full of six-digit numbers, so that no needle would stand out: give another text")


def _span(ends: Sequence[int], room: int, rng: random.Random) -> tuple[int, int]:
    """First and last-plus-one sentence of a random piece of the text, of 90 to 100 per cent of `room` tokens."""
    if ends[-1] < room:
        raise AquaError(f"the text has {ends[-1]} tokens, the haystack {room}: give more text or a smaller length")
    for _ in range(TRIES):
        start = rng.randrange(bisect_right(ends, ends[-1] - room))
        stop = bisect_right(ends, ends[start] + room) - 1
        if ends[stop] - ends[start] >= 0.9 * room:
            return start, stop
    raise AquaError(
        f"hardly a piece of the text from one sentence end to another has about {room} tokens: give a text with more "
        "full stops or empty lines, or another length"
    )


def _boundary(ends: Sequence[int], position: float) -> int:
    """The sentence boundary nearest to `position`, 0 to 1, counted in tokens."""
    target = ends[0] + position * (ends[-1] - ends[0])
    return min(range(len(ends)), key=lambda index: abs(ends[index] - target))


def _hide(sentences: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """The sentences with needle i before sentence places[i]; places do not fall."""
    pieces, taken = [], 0
    for needle, place in zip(needles, places, strict=True):
        pieces += [*sentences[taken:place], f" {needle}"]
        taken = place
    return "".join([*pieces, *sentences[taken:]]).strip()


def _question(hay: str, cities: Sequence[str], numbers: Sequence[str], labels: dict[str, int | float]) -> Question:
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
