# SPDX-License-Identifier: Apache-2.0
"""Words that say nothing, or say a plain thing grandly: none of them is in the documentation or in the sources' words.

python tools/pages/style.py README.md docs/*.md src/aqua_attention/*.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages.files import ROOT, without_code

INSTEAD = {
    "simply": "leave it out",
    "just": "leave it out, or say only",
    "obviously": "leave it out",
    "of course": "leave it out",
    "clearly": "leave it out",
    "basically": "leave it out",
    "actually": "leave it out",
    "really": "leave it out",
    "easily": "say how",
    "trivially": "say why",
    "seamless": "say what works",
    "seamlessly": "say what works",
    "robust": "say what it survives",
    "powerful": "say what it does",
    "blazing": "give the figure",
    "state-of-the-art": "name what it is compared with",
    "utilize": "use",
    "utilise": "use",
    "leverage": "use",
    "facilitate": "say what it does",
    "in order to": "to",
    "due to the fact that": "because",
    "it should be noted that": "leave it out",
    "please": "leave it out",
}
"""A word or phrase, in small letters, and what to do about it."""
OF_TIME = {"just"}
"""Words that comments need: "a token that was just written"."""
_UNWANTED = re.compile(rf"\b({'|'.join(map(re.escape, INSTEAD))})(?:s|d|ing)?\b".replace(r"\ ", r"\s+"), re.IGNORECASE)


def unwanted(path: Path) -> Iterator[str]:
    """A line for each unwanted word of a page, outside of its code, or of a source file."""
    text, is_page = path.read_text(), path.suffix == ".md"
    if is_page:
        text = re.sub(r"`[^`\n]*`", lambda each: " " * len(each[0]), without_code(text))
    for found in _UNWANTED.finditer(text):
        word = " ".join(found[1].lower().split())
        if is_page or word not in OF_TIME:
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path.name}:{line}: {word!r}: {INSTEAD[word]}"


def sources() -> list[Path]:
    """Files whose docstrings, comments and messages are held to this."""
    folders = ("src", "examples", "benchmarks")
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def main() -> None:
    """Print what is unwanted in the files named; exit code 1 where there is something."""
    found = [line for name in sys.argv[1:] for line in unwanted(Path(name))]
    print("\n".join(found) or "nothing unwanted")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
