# SPDX-License-Identifier: Apache-2.0
"""RULER's words to count: the common ones of a long list, and the frequent ones of a text in code."""

import random
from collections.abc import Sequence
from math import pi
from string import ascii_lowercase

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.ruler.material import Draw, Material
from aqua_attention.evaluate.suites.retrieval import Question, share_found

COMMON_TOKENS, FREQUENT_TOKENS = 120, 50
"""That an answer may have."""
COMMON = 10
"""Words that occur more often than all others of the list, and as many others at least."""
LONG = 4096
"""Tokens from which on words occur more often, in list and example."""
FREQUENT = 3
"""Code words that are asked for."""
CODE_LETTERS = 6
NOISE = "..."
"""Stands for the most frequent code word, which is not asked for."""
TOKENS_A_WORD = 50
"""A text in code has a word more for so many tokens."""


def common(material: Material, draw: Draw) -> Question:
    """A question for the common words of a numbered list, behind an example; AquaError for a text of few words."""
    often, seldom, example_often, example_seldom = (30, 3, 10, 3) if draw.length >= LONG else (6, 1, 3, 1)
    in_example = COMMON * (3 if draw.length >= LONG else 1)
    words = material.words
    sample = words[:: max(1, len(words) // 100)]
    # Numbers of three digits, as most of a list are.
    cost = material.tokens(_numbered(sample, 100)) / max(1, len(sample))
    others = COMMON + int(draw.size / max(1, cost * seldom))
    needed = 2 * COMMON + in_example + others
    if needed > len(words):
        raise AquaError(
            f"the text has {len(words)} different words that are long enough, cwe of {draw.length} tokens takes "
            f"{needed}: give more text, a smaller length, or other tasks (--task). Scripts without spaces have none"
        )
    drawn = draw.rng.sample(words, needed)
    shown, shown_others, asked, rest = _cut(drawn, COMMON, in_example, COMMON, others)
    example = f"{_common_prompt(_list(draw.rng, (shown, example_often), (shown_others, example_seldom)))}"
    answer = f"{_COMMON_START} {_numbered(shown)}"
    prompt = f"{example}\n{answer}\n\n{_common_prompt(_list(draw.rng, (asked, often), (rest, seldom)))}"
    return Question(prompt, _COMMON_START, tuple(asked), {}, COMMON_TOKENS, share_found)


def _cut(words: Sequence[str], *sizes: int) -> list[Sequence[str]]:
    """The words in parts of these sizes."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [words[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _list(rng: random.Random, *parts: tuple[Sequence[str], int]) -> str:
    """Words of each part as often as it says, mixed and numbered."""
    words = [word for part, times in parts for word in part for _ in range(times)]
    rng.shuffle(words)
    return _numbered(words)


def _numbered(words: Sequence[str], first: int = 1) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, first))


def _common_prompt(text: str) -> str:
    return (
        "Here is a numbered list of words, some of which come up more often than the rest. Remember those.\n\n"
        f"{text}\n\nQuestion: which {COMMON} words come up most often in the list above?"
    )


_COMMON_START = f"Answer: the {COMMON} words that come up most often are:"


def frequent(material: Material, draw: Draw) -> Question:
    """A question for the three most frequent code words; how often each comes follows Zipf's law with exponent 2."""
    vocabulary = max(FREQUENT + 2, draw.length // TOKENS_A_WORD)
    codes: dict[str, None] = {}
    while len(codes) < vocabulary - 1:
        codes["".join(draw.rng.choices(ascii_lowercase, k=CODE_LETTERS))] = None
    words = [NOISE, *codes]
    sample = 200
    cost = material.tokens(_coded(words, sample, random.Random(0))) / sample
    text = _coded(words, int(draw.size / max(0.1, cost)), draw.rng)
    prompt = (
        f"The text below is in code. Apart from the dots, {FREQUENT} of its words come up more often than the rest; "
        f"find them.\n\n{text}\n\nQuestion: which {FREQUENT} words come up most often in the text above, apart from "
        "the dots? Write nothing but the words."
    )
    start = f"Answer: the {FREQUENT} words that come up most often are:"
    return Question(prompt, start, tuple(words[1 : FREQUENT + 1]), {}, FREQUENT_TOKENS, share_found)


def _coded(words: Sequence[str], size: int, rng: random.Random) -> str:
    """A text of about `size` words, or as many as it takes for those asked for to be the most frequent ones."""
    counts = _counts(len(words), size)
    while not counts[FREQUENT] > counts[FREQUENT + 1]:
        size += 1
        counts = _counts(len(words), size)
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return " ".join(text)


def _counts(words: int, size: int) -> list[int]:
    """How often the word of each rank comes: by its rank's square, of all words together `size`."""
    return [int(size / (rank**2 * pi**2 / 6)) for rank in range(1, words + 1)]
