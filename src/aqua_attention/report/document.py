# SPDX-License-Identifier: Apache-2.0
"""What a report says, whatever it is written in: sections of tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.tables import Table, describe_setting, written


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        svg: an `<svg>` element, see `svg.drawing`.
        alt: the same in a few words, for those who do not see it.
    """

    svg: str
    alt: str


@dataclass(frozen=True)
class Block:
    """A table, and the drawings of it if there are any.

    Attributes:
        title: plain text, as everything here.
        note: what the figures mean, in which units.
        panels: drawn side by side where there is room. Without any, the table itself is shown.
        commands: what made the figures.
        words: the table holds sentences, not figures.
    """

    title: str
    note: str
    table: Table
    commands: Sequence[str]
    panels: Sequence[Panel] = ()
    words: bool = False


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    title: str
    note: str = ""
    blocks: list[Block] = field(default_factory=list)


def percent(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """A share in per cent; NaN as such, and no minus before what is rounded to zero."""
    return written(value, f"{'+' if sign else ''}z.{digits}%")


def plain(value: float, form: str = ".3g") -> str:
    """A number; NaN and infinity as such, and no minus before what is rounded to zero."""
    return written(value, f"z{form}")


def loss_cells(result: dict[str, Any]) -> list[str]:
    """Perplexity, its change and KL divergence."""
    change = percent(number(result["perplexity_change"]), 2, sign=True)
    return [plain(number(result["perplexity"]), ".3f"), change, plain(number(result["kl"]), ".4f")]


def name_of(record: Record) -> str:
    """The setting in words."""
    return "dense" if record.setting is None else describe_setting(record.setting, record.basis)


def data_of(record: Record) -> str:
    """On what a record was measured, such as "builtin:evaluation, windows of 2048, float32"."""
    options, words = record.options, [record.model] if record.model else []
    if options.get("data"):
        words.append(str(options["data"]))
    if options.get("context"):
        words.append(f"windows of {options['context']}")
    if options.get("scored") == "second half":
        words.append("second halves scored")
    if dtype := record.details.get("dtype"):
        words.append(str(dtype).removeprefix("torch."))
    return ", ".join(words)


def commands_of(records: Sequence[Record]) -> list[str]:
    """The command lines that made these, each once; where a file does not say, which command it was and which file."""
    lines = []
    for record in records:
        command = (record.suite in SUITES and SUITES[record.suite].command) or f"aqua eval {record.suite}"
        lines.append(record.command or f"{command} ... --json {record.source}  # the rest is not recorded")
    return list(dict.fromkeys(lines))
