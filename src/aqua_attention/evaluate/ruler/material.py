# SPDX-License-Identifier: Apache-2.0
"""What items of RULER are made of: a text in sentences, documents and words, and questions about paragraphs."""

import random
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from aqua_attention.evaluate.ruler.squad import Reading
from aqua_attention.evaluate.suites.haystack import Haystack, token_counts

LEAST_LETTERS = 4
"""Of a word that is asked for: shorter ones stand in other words."""
NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts that put no spaces between words, so that none can be told from another."""
MOST_WORDS = 20_000
"""Different words that are looked at, from the text's beginning."""
DOCUMENT_TOKENS = 150
"""At most so many make a document, as a paragraph of SQuAD has; one longer sentence is one, too."""


class Draw(NamedTuple):
    """Which item is made: the source of chance, its place among the items, and tokens of the whole item.

    `size` is how many tokens may be filled beside the least that the task takes; 0 makes the smallest item.
    """

    rng: random.Random
    place: int
    length: int
    size: int


class Document(NamedTuple):
    """A piece of the text, the same in lower case, and its tokens."""

    text: str
    lower: str
    tokens: int


class Material:
    """A text and questions, cut up when a task needs it.

    Attributes:
        readings: questions about paragraphs; each item asks the one at its place.
    """

    def __init__(self, tokenizer: Any, text: str, readings: Sequence[Reading] = ()) -> None:
        self.tokenizer, self.text, self.readings = tokenizer, text, readings

    def tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return token_counts(self.tokenizer, [text])[0]

    @cached_property
    def haystack(self) -> Haystack:
        """The text in sentences."""
        return Haystack(self.tokenizer, self.text)

    @cached_property
    def words(self) -> list[str]:
        """Different words of the text in lower case, none of which stands in another one; see `NO_SPACES`."""
        text = self.text.lower()
        letters = "".join(sorted(filter(_is_of_words, set(text))))
        found = re.findall(rf"[{re.escape(letters)}]{{{LEAST_LETTERS},}}", text) if letters else []
        words, kept = list(dict.fromkeys(found))[:MOST_WORDS], ""
        for word in sorted(words, key=lambda word: (-len(word), word)):
            if word not in kept:
                kept += f"{word} "
        return kept.split()

    @cached_property
    def documents(self) -> list[Document]:
        """The text in pieces of whole sentences."""
        sentences, ends = self.haystack.sentences, self.haystack.ends
        found, first = [], 0
        for last in range(1, len(sentences) + 1):
            if last == len(sentences) or ends[last + 1] - ends[first] > DOCUMENT_TOKENS:
                text = "".join(sentences[first:last]).strip()
                found += [Document(text, text.lower(), ends[last] - ends[first])] if text else []
                first = last
        return found


def _is_of_words(sign: str) -> bool:
    """Letters and the marks on them, which in Hindi and others are characters of their own."""
    is_letter = sign.isalpha() or unicodedata.category(sign).startswith("M")
    return is_letter and not unicodedata.name(sign, "").startswith(NO_SPACES)
