# SPDX-License-Identifier: Apache-2.0
"""Calibrated on one text or length, tested on another: a matrix for each setting; and how many tokens are enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aqua_attention.report.document import Block, Panel, Section, commands_of, grouped, name_of, percent, plain
from aqua_attention.report.figures import Axis, Curve, curves, heat
from aqua_attention.report.record import Record, number
from aqua_attention.tables import Table


@dataclass(frozen=True)
class _Kind:
    """What a suite calibrates and tests on.

    Attributes:
        row, column: fields of the result.
        down, across: titles of the two.
    """

    title: str
    note: str
    row: str
    column: str
    down: str
    across: str


KINDS = {
    "transfer": _Kind(
        "Transfer",
        "Calibrated on one text, tested on another. Change and KL divergence: against dense on the tested one. "
        "Distance: of the projections of the two texts, 0 the same subspaces, 1 as far apart as can be.",
        *("calibrated", "tested", "calibrated on", "tested on"),
    ),
    "context": _Kind(
        "Context length",
        "Calibrated on windows of one length, tested on windows of another. Change and KL divergence: against dense on "
        "windows of the tested length.",
        *("calibrated_length", "tested_length", "calibrated (tokens)", "tested (tokens)"),
    ),
}
MEASURES: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "perplexity_change": (
        "perplexity change",
        "perplexity change (%)",
        lambda change: percent(change, 2, sign=True),
    ),
    "kl": ("KL divergence to dense", "KL (nats)", plain),
    "distance": ("subspace distance of the projections", "distance (0 to 1)", lambda distance: plain(distance, ".2f")),
}
"""By field: its name, its unit, and how it is written into a cell."""


def transfer_sections(records: Sequence[Record]) -> list[Section]:
    """Calibrated on one text, or length, and tested on another."""
    sections = []
    for suite, kind in KINDS.items():
        blocks = []
        for place, (name, group) in enumerate(grouped(records, suite, _calibration).items()):
            table, panels = _transfer_table(group, kind), _matrices(f"{suite}{place}", name, group, kind)
            blocks.append(Block(name, "", table, commands_of(group), panels))
        if suite == "context":
            blocks += _calibration_size(records)
        if blocks:
            sections.append(Section(kind.title, kind.note, blocks))
    return sections


def _matrices(identity: str, name: str, group: Sequence[Record], kind: _Kind) -> list[Panel]:
    """A heat map for each measure that the records have."""
    rows, columns = _distinct(group, kind.row), _distinct(group, kind.column)
    panels = []
    for key, (what, unit, form) in MEASURES.items():
        cells = {
            (_label(record.result[kind.row]), _label(record.result[kind.column])): number(record.result[key])
            for record in group
            if record.result and key in record.result
        }
        if not cells:
            continue
        values = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
        texts = [[form(cells[row, column]) if (row, column) in cells else "" for column in columns] for row in rows]
        panels.append(
            heat(
                f"{identity}-{key.replace('_', '')}",
                f"{what}, {len(rows)} calibrations by {len(columns)} tests, {name}",
                what,
                (kind.down, kind.across),
                (rows, columns),
                values,
                unit=unit,
                texts=texts,
            )
        )
    return panels


def _calibration(record: Record) -> str:
    """What one matrix has in common: model, setting, and tokens that were calibrated on."""
    tokens = _calibration_tokens(record)
    words = [f"calibrated on {plain(tokens, '.0f')} tokens"] if math.isfinite(tokens) else []
    if record.suite == "transfer" and record.options.get("context"):
        words.append(f"windows of {record.options['context']}")
    return ", ".join(filter(None, [record.model, name_of(record), *words]))


def _calibration_tokens(record: Record) -> float:
    """As asked for, where the record says: how many are really read differs a little with the length of windows."""
    assert record.result is not None
    asked = record.options.get("calibrated")
    given = asked.get("tokens") if isinstance(asked, dict) else None
    return number(record.result.get("calibration_tokens") if given is None else given)


def _lengths(record: Record) -> list[float]:
    return [number((record.result or {}).get(key)) for key in ("calibrated_length", "tested_length")]


def _calibration_size(records: Sequence[Record]) -> list[Block]:
    """How many tokens are enough, where several numbers were tried."""
    blocks = []
    groups = grouped(records, "context", lambda record: ", ".join(filter(None, [record.model, name_of(record)])))
    for place, (title, group) in enumerate(groups.items()):
        if len({tokens for tokens in map(_calibration_tokens, group) if math.isfinite(tokens)}) < 2:
            continue
        lines: dict[str, list[tuple[float, list[float]]]] = {}
        rows = []
        for record in sorted(group, key=_lengths):
            result, tokens = record.result or {}, _calibration_tokens(record)
            name = f"windows of {_label(result['calibrated_length'])}, tested at {_label(result['tested_length'])}"
            losses = [number(result["perplexity_change"]), number(result["kl"])]
            lines.setdefault(name, []).append((tokens, losses))
            rows.append([name, plain(tokens, ".0f"), percent(losses[0], 2, sign=True), plain(losses[1], ".4f")])
        axes = [Axis("perplexity change", "change"), Axis("KL to dense (nats)", "log")]
        drawn = [Curve(name, points) for name, points in lines.items()]
        alt = "Perplexity change and KL divergence by the number of tokens calibrated on"
        panel = curves(f"size{place}", alt, Axis("tokens calibrated on", "log2"), axes, drawn)
        table = (["calibration", "tokens", "change", "KL to dense"], rows)
        blocks.append(Block(f"Calibration size: {title}", "", table, commands_of(group), [panel]))
    return blocks


def _distinct(group: Sequence[Record], key: str) -> list[str]:
    """Values in ascending order, or in that of the alphabet."""
    values = {record.result[key] for record in group if record.result}
    if any(isinstance(value, str) for value in values):
        return sorted(_label(value) for value in values)
    return [_label(value) for value in sorted(values, key=number)]


def _label(value: Any) -> str:
    return value if isinstance(value, str) else plain(number(value), ".0f")


def _transfer_table(group: Sequence[Record], kind: _Kind) -> Table:
    distances = any(record.result and "distance" in record.result for record in group)
    titles = [kind.down, kind.across, "perplexity", "change", "KL to dense", *(["distance"] if distances else [])]
    rows = []
    for record in group:
        assert record.result is not None
        result = record.result
        row = [_label(result[kind.row]), _label(result[kind.column]), plain(number(result["perplexity"]), ".3f")]
        row += [percent(number(result["perplexity_change"]), 2, sign=True), plain(number(result["kl"]), ".4f")]
        rows.append(row + ([plain(number(result.get("distance")), ".3f")] if distances else []))
    return titles, rows
