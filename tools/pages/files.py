# SPDX-License-Identifier: Apache-2.0
"""Which files are pages, and their code blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
ROOT_PAGES = ("SERVING.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md")
"""Pages of the site that lie at the root of the repository, besides README.md, which is its first page."""
LIGHT, DARK = DOCS / "images" / "loss-light.svg", DOCS / "images" / "loss-dark.svg"
"""The picture of README, which picture.py draws."""
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its file, the line it begins in, its language, and what is in it."""

    path: Path
    line: int
    language: str
    code: str


def pages() -> list[Path]:
    """README and what is in docs/: those whose prose is measured and whose code is run."""
    return [README, *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("results/*.md"))]


def with_results() -> list[Path]:
    """Pages that show tables of what was measured."""
    return [*pages(), ROOT / "SERVING.md"]


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a file in these languages, in order."""
    text = path.read_text()
    found = (Block(path, text.count("\n", 0, each.start()) + 1, *each.groups()) for each in FENCE.finditer(text))
    return [each for each in found if each.language in languages]


def without_code(text: str) -> str:
    """The same text with empty lines for fenced blocks, so that line numbers stay."""
    return FENCE.sub(lambda each: "\n" * each[0].count("\n"), text)
