# SPDX-License-Identifier: Apache-2.0
"""How long sentences are: code, tables, headings and addresses of links are left out.

python tools/pages/prose.py README.md docs/*.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages.files import without_code

MOST_WORDS = 20
"""On average in a page."""
LONGEST = 40
"""Words of a single sentence."""
_LIST = re.compile(r"^\s*(?:[-*] |\d+\. )")
_END = re.compile(r"(?<=[.!?:])[\"')\]*_]*\s+(?=[^a-z])")


def paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, each in one line, without markup."""
    text = re.sub(r"<!--.*?-->", "", without_code(text), flags=re.DOTALL)
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith(("|", "#", "<", ":::", "![", "!!!", "===")):
            found.append([])
        elif _LIST.match(line):
            found.append([_LIST.sub("", line)])
        else:
            found[-1].append(line.strip())
    return [_plain(" ".join(lines)) for lines in found if lines]


def _plain(text: str) -> str:
    """Without addresses of links; code between backticks is one word."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "CODE", text).replace("**", "")


def sentences(text: str) -> list[str]:
    """The sentences of a page. A colon before a capital or a number ends one."""
    parts = (part for each in paragraphs(text) for part in _END.split(each))
    return [part for part in parts if re.search(r"[A-Za-z]", part)]


def words(sentence: str) -> int:
    """How many words a sentence has; signs alone are none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def average(text: str) -> float:
    """Words of a sentence on average; 0 where there is none."""
    lengths = [words(each) for each in sentences(text)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def main() -> None:
    """Print the average and the longest sentence of each file."""
    for name in sys.argv[1:]:
        text = Path(name).read_text()
        longest = max(sentences(text), key=words, default="")
        print(f"{average(text):5.1f} words on average, longest {words(longest):3}: {name}\n        {longest}")


if __name__ == "__main__":
    main()
