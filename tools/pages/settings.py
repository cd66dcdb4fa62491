# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/settings.md, made from the declaration of knobs and presets in `aqua_attention.config`.

python tools/pages/settings.py     # writes them into the page
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aqua_attention.config import DEFAULT_PRESET, PAPER, PRESETS, knobs
from pages import marks
from pages.files import DOCS

PAGE = DOCS / "settings.md"


def _value(value: Any) -> str:
    return f"`{value}`"


def knob_table() -> str:
    """Every knob: what it does, what it may be, its default, and the paper's value."""
    rows = []
    for name, knob in knobs().items():
        paper = PAPER.get(name, knob.default)
        rows.append([_value(name), knob.help, knob.allowed(), _value(knob.default), _value(paper)])
    return marks.table(["knob", "what it does", "values", "default", "paper"], rows)


def preset_table() -> str:
    """Every preset: what it changes of the defaults."""
    rows = []
    for name, changes in PRESETS.items():
        words = ", ".join(f"`{knob}={value!r}`" for knob, value in changes.items())
        rows.append([_value(name), words or ("nothing" if name == DEFAULT_PRESET else "")])
    return marks.table(["preset", "what it changes of the defaults"], rows)


TABLES: dict[str, Callable[[], str]] = {"knobs": knob_table, "presets": preset_table}


def generated(page: str) -> str:
    """The page with each table between its marks as it must be.

    Raises:
        SystemExit: a table has no place in the page.
    """
    missing = sorted(TABLES.keys() - set(marks.names(page)))
    if missing:
        raise SystemExit(f"{PAGE.name} has no place for {missing[0]}")
    return marks.filled(page, {name: table() for name, table in TABLES.items()})


if __name__ == "__main__":
    marks.write(PAGE, generated(PAGE.read_text()))
