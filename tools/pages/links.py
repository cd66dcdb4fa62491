# SPDX-License-Identifier: Apache-2.0
"""Links between files of the repository: the file is there, and so is the heading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pages.files import without_code

_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors(path: Path) -> set[str]:
    """What `#...` may name in a Markdown file: its headings, as GitHub and the site call them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each).replace("`", "") for each in headings)
    return {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in plain}


def broken(path: Path) -> Iterator[str]:
    """Relative links of a file that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", without_code(path.read_text()))
    for match in _LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            yield f"{link}: there is no {name}"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: {target.name} has no heading {anchor}"
