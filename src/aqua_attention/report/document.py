# SPDX-License-Identifier: Apache-2.0
"""What a report says, whatever it is written in: sections of tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.tables import Column, Row, Table, describe_setting, written


class Panel(NamedTuple):
    """One drawing: an `<svg>` element, see `svg.drawing`, and the same in a few words for those who do not see it."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Block:
    """A table, and the drawings of it if there are any.

    Attributes:
        title: plain text, as everything here.
        records: what holds the figures.
        panels: drawn side by side where there is room. Without any, the table itself is shown.
        note: what the figures mean, in which units.
        words: the table holds sentences, not figures.
    """

    title: str
    table: Table
    records: Sequence[Record] = ()
    panels: Sequence[Panel] = ()
    note: str = ""
    words: bool = False

    @property
    def commands(self) -> list[str]:
        """What made the figures, each line once; where a file does not say, which command it was and which file."""
        lines = {}
        for record in self.records:
            command = (record.suite in SUITES and SUITES[record.suite].command) or f"aqua eval {record.suite}"
            lines[record.command or f"{command} ... --json {record.source}  # the rest is not recorded"] = record
        return list(lines)


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


def percent(value: Any, digits: int = 1, *, sign: bool = False) -> str:
    """A share in per cent, as `plain` writes it."""
    return plain(value, f"{'+' if sign else ''}z.{digits}%")


def plain(value: Any, form: str = "z.3g") -> str:
    """A figure of a file in a format; NaN, where there is none, and infinity as such."""
    return written(number(value), form)


def count(value: Any) -> str:
    """The same without decimals."""
    return plain(value, "z.0f")


def cells(figures: Row, columns: Sequence[Column]) -> list[str]:
    """Figures as the columns write them; NaN where there is none."""
    return [column.cell({column.key: number(figures.get(column.key))}) for column in columns]


def name_of(record: Record) -> str:
    """The setting in words."""
    return "dense" if record.setting is None else describe_setting(record.setting, record.basis)


def data_of(record: Record) -> str:
    """On what a record was measured, such as "builtin:evaluation, windows of 2048, float32"."""
    options, dtype = record.options, str(record.details.get("dtype") or "").removeprefix("torch.")
    windows = f"windows of {options['context']}" if options.get("context") else ""
    scored = "second halves scored" if options.get("scored") == "second half" else ""
    return ", ".join(filter(None, [record.model, str(options.get("data") or ""), windows, scored, dtype]))
