# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: files at the root of the repository are pages too, and links between all of them hold.

README.md becomes the first page. In the repository docs/ links to `../RESULTS.md`, and README to `docs/start.md`; on
the site all pages lie in one folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages.files import DOCS, README, ROOT, ROOT_PAGES

_FIRST = "index.md"
_DRAWING = re.compile(r'<img [^>]*src="images/([\w-]+)\.svg"[^>]*>')
_DARK = re.compile(r"@media\(prefers-color-scheme:dark\)\{(.*?\})\}")


def relinked(text: str) -> str:
    """A page's text with its links as they are on the site."""
    text = re.sub(r"(\]\(|src=\"|href=\")(?:\.\./|docs/)", r"\1", text)
    return re.sub(r"\]\(README\.md", f"]({_FIRST}", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root."""
    for name in (README.name, *ROOT_PAGES):
        place = _FIRST if name == README.name else name
        files.append(File.generated(config, place, content=relinked((ROOT / name).read_text())))
    if (ROOT / "LICENSE").exists():
        files.append(File.generated(config, "LICENSE.txt", content=(ROOT / "LICENSE").read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of pages in docs/ to those at the root."""
    return relinked(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Put drawings into the page itself, so that they follow its switch between light and dark."""
    return _DRAWING.sub(lambda each: inlined((DOCS / "images" / f"{each[1]}.svg").read_text()), html)


def inlined(drawing: str) -> str:
    """A drawing whose dark colours are those of the site's dark scheme, and no longer of the system's."""
    return _DARK.sub(r'[data-md-color-scheme="slate"] \1', drawing)
