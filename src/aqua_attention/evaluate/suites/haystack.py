# SPDX-License-Identifier: Apache-2.0
"""A haystack: a long text, from which pieces are cut in whole sentences, and sentences that are hidden in them."""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from aqua_attention.errors import AquaError

TRIES = 1000
# White space stays with the sentence behind it, so that joining the pieces gives the text back.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？।])|(?=\n[ \t\r]*\n)")


class Haystack:
    """A text in sentences.

    Attributes:
        sentences: joined, they are the text.
        ends: tokens up to each sentence's beginning, and up to the end of the last.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence]
        self.ends = [0, *accumulate(token_counts(tokenizer, self.sentences))]

    def hiding(self, needles: Sequence[str], positions: Sequence[float], room: int, rng: random.Random) -> str:
        """A random piece of 90 to 100 per cent of `room` tokens, in which each needle is at its position.

        Positions are 0 to 1, and do not fall; a needle stands at the sentence boundary nearest to it. AquaError for a
        text that has no such piece.
        """
        start, stop = self._span(room, rng)
        ends = self.ends[start : stop + 1]
        return hide(self.sentences[start:stop], needles, [_boundary(ends, position) for position in positions])

    def _span(self, room: int, rng: random.Random) -> tuple[int, int]:
        """First and last-plus-one sentence of the piece."""
        ends = self.ends
        if ends[-1] < room:
            raise AquaError(f"the text has {ends[-1]} tokens, the haystack {room}: give more text or a smaller length")
        for _ in range(TRIES):
            start = rng.randrange(bisect_right(ends, ends[-1] - room))
            stop = bisect_right(ends, ends[start] + room) - 1
            if ends[stop] - ends[start] >= 0.9 * room:
                return start, stop
        raise AquaError(
            f"too few parts of the text that end with a sentence have about {room} tokens: give a text with more full "
            "stops or empty lines, or another length"
        )


def hide(sentences: Sequence[str], needles: Sequence[str], places: Sequence[int], between: str = " ") -> str:
    """The sentences with needle i before sentence places[i], behind `between`; places do not fall."""
    pieces, taken = [], 0
    for needle, place in zip(needles, places, strict=True):
        pieces += [*sentences[taken:place], f"{between}{needle}"]
        taken = place
    return "".join([*pieces, *sentences[taken:]]).strip()


def new_numbers(rng: random.Random, count: int, digits: int, text: str) -> list[str]:
    """`count` different numbers of `digits` digits that the text does not hold; AquaError if it holds too many."""
    numbers: dict[str, None] = {}
    for _ in range(TRIES + count):
        if len(numbers) == count:
            return list(numbers)
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if number not in text:
            numbers[number] = None
    raise AquaError(f"the text is full of {digits}-digit numbers, so that no needle would stand out: give another text")


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without special ones."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def _boundary(ends: Sequence[int], position: float) -> int:
    """The sentence boundary nearest to `position`, 0 to 1, counted in tokens."""
    target = ends[0] + position * (ends[-1] - ends[0])
    return min(range(len(ends)), key=lambda index: abs(ends[index] - target))
