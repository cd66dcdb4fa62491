# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/settings.md, made from the declaration of knobs and presets in `aqua_attention.config`.

python tools/pages/settings.py     # writes them into the page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aqua_attention.config import DEFAULT_PRESET, PAPER, PRESETS, knobs
from pages.files import DOCS

PAGE = DOCS / "settings.md"


def _row(*cells: str) -> str:
    escaped = (each.replace("|", "\\|") for each in cells)
    return f"| {' | '.join(escaped)} |"


def _value(value: Any) -> str:
    return f"`{value}`"


def knob_table() -> str:
    """Every knob: what it does, what it may be, its default, and the paper's value."""
    rows = [_row("knob", "what it does", "values", "default", "paper"), _row(*["---"] * 5)]
    for name, knob in knobs().items():
        paper = PAPER.get(name, knob.default)
        rows.append(_row(_value(name), knob.help, knob.allowed(), _value(knob.default), _value(paper)))
    return "\n".join(rows)


def preset_table() -> str:
    """Every preset: what it changes of the defaults."""
    rows = [_row("preset", "what it changes of the defaults"), _row("---", "---")]
    for name, changes in PRESETS.items():
        words = ", ".join(f"`{knob}={value!r}`" for knob, value in changes.items())
        rows.append(_row(_value(name), words or ("nothing" if name == DEFAULT_PRESET else "")))
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {"knobs": knob_table, "presets": preset_table}


def generated(page: str) -> str:
    """The page with each table between its marks as it must be."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name}: make docs writes this table -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{PAGE} has no {begin}")
        text = f"{begin}\n\n{table()}\n\n{end}"
        page = pattern.sub(lambda _, text=text: text, page)
    return page


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text()))
