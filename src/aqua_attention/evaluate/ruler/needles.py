# SPDX-License-Identifier: Apache-2.0
"""RULER's needles: sentences that each tell what opens a vault, hidden in a text; some of them are asked for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.ruler.material import Draw, Material
from aqua_attention.evaluate.suites.haystack import hide, new_numbers
from aqua_attention.evaluate.suites.names import MOST_NAMES, names
from aqua_attention.evaluate.suites.retrieval import Question, share_found

NEW_TOKENS = 128
"""That an answer may have."""
DIGITS = 7
"""Of a number that opens a vault."""
NOISE = "The lamp is lit. The door is shut. The kettle sings. The road goes on, and on it goes."
"""Repeated, a text in which nothing stands out but what is hidden there."""


@dataclass(frozen=True)
class Needles:
    """Makes questions about needles.

    Attributes:
        hay: what the needles are hidden in: "text", "noise" (one line, repeated), or "needles" of other vaults.
        vaults: how many have a needle, beside those of the hay.
        values: numbers of each vault, a needle each.
        asked: vaults that are asked for.
        names, opens: what vaults are called and what opens them: "word", "number" or "code".
    """

    hay: str = "text"
    vaults: int = 1
    values: int = 1
    asked: int = 1
    names: str = "word"
    opens: str = "number"

    def __call__(self, material: Material, draw: Draw) -> Question:
        """A question; AquaError for a text that is too short."""
        others = draw.size // self._cost(material) if self.hay == "needles" else 0
        vaults, rng = self.vaults + others, draw.rng
        if self.names == "word" and vaults > MOST_NAMES:
            raise AquaError(f"length is {draw.length}: the vaults have {MOST_NAMES} names, give a smaller length")
        called = _new(self.names, rng, vaults)
        keys = _new(self.opens, rng, vaults * self.values, material.text if self.hay == "text" else "")
        opening = {name: keys[place::vaults] for place, name in enumerate(called)}
        lines = [self._line(name, key) for name in called for key in opening[name]]
        needles, hay = lines[: self.vaults * self.values], lines[self.vaults * self.values :]
        rng.shuffle(needles)
        if self.hay == "text":
            positions = sorted(rng.random() for _ in needles)
            few = draw.size < 1
            text = " ".join(needles) if few else material.haystack.hiding(needles, positions, draw.size, rng)
        else:
            text = in_lines(hay, needles, rng) if self.hay == "needles" else in_noise(needles, material, draw)
        asked = called[: self.asked]
        return self._question(text, asked, tuple(key for name in asked for key in opening[name]))

    def _line(self, name: str, key: str) -> str:
        return f"The vault of {name} opens with the {self.opens} {key}."

    def _cost(self, material: Material) -> int:
        """Tokens of a needle that nobody asks for."""
        rng = random.Random(0)
        return material.tokens(f"\n{self._line(*_new(self.names, rng, 1), *_new(self.opens, rng, 1))}")

    def _question(self, text: str, asked: Sequence[str], expected: tuple[str, ...]) -> Question:
        named = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        vaults, opens = "vaults" if len(asked) > 1 else "vault", "open" if len(asked) > 1 else "opens"
        keys, all_of_them = self.opens, ""
        question = f"which {keys} {opens} the {vaults} of {named}?"
        if len(expected) > 1:
            keys, all_of_them = f"{keys}s", " Give all of them."
            question = f"which {keys} open the {vaults} of {named}?"
        prompt = (
            f"Somewhere in the text below it is said which {self.opens}s open which vaults. Remember them: a question "
            f"about them follows.\n\n{text}\n\nAccording to the text, {question}{all_of_them}"
        )
        start = f"The {vaults} of {named} {opens} with the {keys}"
        return Question(prompt, start, expected, {}, NEW_TOKENS, share_found)


def in_noise(needles: Sequence[str], material: Material, draw: Draw) -> str:
    """The needles, in their order, between as many lines of noise as the size has room for."""
    return in_lines([NOISE] * (draw.size // material.tokens(f"\n{NOISE}")), needles, draw.rng)


def in_lines(lines: Sequence[str], needles: Sequence[str], rng: random.Random) -> str:
    """The needles, in their order, as lines at random places between the others."""
    places = sorted(rng.randrange(len(lines) + 1) for _ in needles)
    return hide([f"\n{line}" for line in lines], needles, places, "\n")


def _new(kind: str, rng: random.Random, count: int, text: str = "") -> list[str]:
    """Different words, numbers that the text has not, or codes."""
    if kind == "word":
        return names(rng, count)
    if kind == "number":
        return new_numbers(rng, count, DIGITS, text)
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
