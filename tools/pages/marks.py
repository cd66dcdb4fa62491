# SPDX-License-Identifier: Apache-2.0
"""Tables that are written into pages, between two marks that name them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_MARKED = re.compile(r"<!-- begin (\S+): make docs writes this -->.*?<!-- end \1 -->", re.DOTALL)


def names(page: str) -> list[str]:
    """What is written into a page, in order."""
    return [each[1] for each in _MARKED.finditer(page)]


def filled(page: str, texts: Mapping[str, str]) -> str:
    """The page with each of these texts between its marks; what others are for stays."""

    def text(found: re.Match[str]) -> str:
        name = found[1]
        if name not in texts:
            return found[0]
        return f"<!-- begin {name}: make docs writes this -->\n\n{texts[name]}\n\n<!-- end {name} -->"

    return _MARKED.sub(text, page)


def write(path: Path, page: str) -> None:
    """Write a page, where it has changed."""
    if path.read_text() != page:
        path.write_text(page)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (headings, ["---"] * len(headings), *rows)
    return "\n".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |" for line in lines)
