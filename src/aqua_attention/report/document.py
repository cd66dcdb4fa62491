# SPDX-License-Identifier: Apache-2.0
"""What a report says, whatever it is written in: sections of tables and figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from aqua_attention.evaluate.record import Record, number
from aqua_attention.report.tables import Column, Row, Table, describe_setting, written

DIGITS = 8
"""So much of a digest tells two apart."""


class Panel(NamedTuple):
    """One drawing: an `<svg>` element, see `svg.drawing`, and the same in a few words for those who do not see it.

    It may have a `wide` one too, for the width of a desktop, which is shown where the drawing stands alone.
    """

    svg: str
    alt: str
    wide: str = ""


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

    def __post_init__(self) -> None:
        """Drawings side by side have no room for wide ones."""
        if len(self.panels) > 1:
            object.__setattr__(self, "panels", [panel._replace(wide="") for panel in self.panels])

    @property
    def commands(self) -> list[str]:
        """What made the figures as it was recorded, each line once; which file does not say it."""
        lines = (record.command or f"# {record.source} does not say its command" for record in self._measured)
        return list(dict.fromkeys(lines))

    @property
    def rests_on(self) -> list[str]:
        """The projections behind the figures, each once."""
        return list(dict.fromkeys(filter(None, map(projections_of, self._measured))))

    @property
    def _measured(self) -> Sequence[Record]:
        """The settings' records. Each has measured dense attention too, whatever else has."""
        return [record for record in self.records if not record.is_dense] or self.records

    @property
    def unsaid(self) -> list[str]:
        """Why figures stand apart, a sentence a file."""
        said = ((record.source, record.unsaid) for record in self.records)
        lines = (f"{file} does not say its {listed(missing)}, so it stands apart." for file, missing in said if missing)
        return list(dict.fromkeys(lines))


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
    """A figure of a file in a format. NaN (also for a missing figure) and infinity are written as such."""
    return written(number(value), form)


def count(value: Any) -> str:
    """The same without decimals."""
    return plain(value, "z.0f")


def right_of(figures: Row) -> str:
    """Right answers of all, such as "3/4"; of answers that are right in part, the sum of their shares."""
    right = number(figures.get("right"))
    return f"{plain(right, 'z.1f' if right % 1 else 'z.0f')}/{count(figures.get('asked'))}"


def cells(figures: Row, columns: Sequence[Column]) -> list[str]:
    """Figures as the columns write them; NaN where there is none."""
    return [column.cell({column.key: number(figures.get(column.key))}) for column in columns]


def name_of(record: Record) -> str:
    """The setting in words."""
    return "dense" if record.setting is None else describe_setting(record.setting, record.basis)


def projections_of(record: Record) -> str:
    """The projections that a record rests on, such as "smollm2.safetensors (0a1b2c3d), calibrated on 16384 tokens"."""
    details, tokens = record.details, number(record.details.get("calibration_tokens"))
    name, digest = (str(details.get(key) or "") for key in ("projections", "projections_sha256"))
    short = digest[:DIGITS]
    words = f"{PurePath(name).name} ({short})" if name and short else PurePath(name).name or short
    return words and (words if math.isnan(tokens) else f"{words}, calibrated on {tokens:.0f} tokens")


def listed(words: Sequence[str]) -> str:
    """Words of a sentence, such as "one, two and three"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def model_of(record: Record, *words: str) -> str:
    """A record's model, further words, and its file where that stands apart."""
    return ", ".join(filter(None, [record.model, *words, record.source if record.unsaid else ""]))


def data_of(record: Record) -> str:
    """On what a record was measured, such as "builtin:evaluation, windows of 2048, float32"."""
    options, dtype = record.options, str(record.details.get("dtype") or "").removeprefix("torch.")
    windows = f"windows of {options['context']}" if options.get("context") else ""
    scored = "second halves scored" if options.get("scored") == "second half" else ""
    return model_of(record, str(options.get("data") or ""), windows, scored, dtype)
