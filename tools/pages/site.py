# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: files at the root of the repository are pages too, and links between all of them hold.

README.md becomes the first page. In the repository docs/ links to `../SERVING.md`, and README to `docs/start.md`; on
the site what is in docs/ lies beside them, and docs/results/ one folder below.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages.files import DARK, DOCS, LIGHT, README, ROOT, ROOT_PAGES

_FIRST = "index.md"
_DRAWING = re.compile(r'<img [^>]*src="images/([\w-]+)\.svg"[^>]*>')
_PICTURE = re.compile(r"<picture>.*?</picture>", re.DOTALL)
_DARK = re.compile(r"@media\(prefers-color-scheme:dark\)\{(.*?\})\}")


def relinked(text: str, depth: int = 0) -> str:
    """A page's text with its links as they are on the site, where it lies so many folders deep."""
    up = "../" * depth
    text = re.sub(rf"(\]\(|src=\"|srcset=\"|href=\")(?:{re.escape(up)}\.\./|docs/)", rf"\1{up}", text)
    return re.sub(r"\]\(README\.md", f"]({_FIRST}", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root."""
    for name in (README.name, *ROOT_PAGES):
        place = _FIRST if name == README.name else name
        files.append(File.generated(config, place, content=relinked((ROOT / name).read_text())))
    if (ROOT / "LICENSE").exists():
        files.append(File.generated(config, "LICENSE.txt", content=(ROOT / "LICENSE").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of pages in docs/ to those at the root."""
    return relinked(markdown, page.file.src_uri.count("/"))


def on_page_content(html: str, **_: Any) -> str:
    """Put drawings into the page itself, so that they follow its switch between light and dark."""
    html = _PICTURE.sub(lambda _: switched(LIGHT.read_text(), DARK.read_text()), html)
    return _DRAWING.sub(lambda each: inlined((DOCS / "images" / f"{each[1]}.svg").read_text()), html)


def inlined(drawing: str) -> str:
    """A drawing whose dark colours are those of the site's dark scheme, and no longer of the system's."""
    return _DARK.sub(r'[data-md-color-scheme="slate"] \1', drawing)


def switched(light: str, dark: str) -> str:
    """A drawing that has a file for light and one for dark, with the colours of the site's scheme."""
    colours = [re.search(r"<style>svg\{(.*?)\}</style>", each) for each in (light, dark)]
    if not all(colours):
        raise ValueError(f"{LIGHT.name} and {DARK.name} have no colours: run make docs")
    day, night = (re.sub(r"background:[^;]*", "max-width:100%;height:auto", each[1]) for each in colours if each)
    style = f'<style>.figure{{{day}}}[data-md-color-scheme="slate"] .figure{{{night}}}</style>'
    drawing = re.sub(r"<style>.*?</style>", style, light, count=1).strip()
    # A blank line would end the HTML block.
    return re.sub(r"\n\s*\n", "\n", drawing.replace("<svg ", '<svg class="figure" ', 1))
