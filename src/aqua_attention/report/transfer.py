# SPDX-License-Identifier: Apache-2.0
"""Calibrated on one text or length, tested on another: a matrix for each setting; and how many tokens are enough."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aqua_attention.evaluate.record import Record, number
from aqua_attention.report.document import Block, Panel, Section, commands_of, loss_cells, name_of, percent, plain
from aqua_attention.report.figures import Axis, heat, loss_curves
from aqua_attention.report.runs import facts_of_run, told_apart
from aqua_attention.report.tables import Table


@dataclass(frozen=True)
class _Kind:
    """What a suite calibrates and tests on.

    Attributes:
        row, column: fields of the result.
        down, across: titles of the two.
        of_row, of_column: what else is another for each of the rows (the columns), beside the field.
    """

    title: str
    note: str
    row: str
    column: str
    down: str
    across: str
    of_row: tuple[str, ...]
    of_column: tuple[str, ...]


KINDS = {
    "transfer": _Kind(
        "Transfer",
        "Calibrated on one text, tested on another. Change and KL divergence: against dense on the tested one. "
        "Distance: of the projections of the two texts, 0 the same subspaces, 1 as far apart as can be.",
        *("calibrated", "tested", "calibrated on", "tested on"),
        ("calibrated.name", "calibrated.data", "calibrated.text_sha256"),
        ("tested.name", "tested.data", "text_sha256", "tokens", "context"),
    ),
    "context": _Kind(
        "Context length",
        "Calibrated on windows of one length, tested on windows of another. Change and KL divergence: against dense on "
        "windows of the tested length.",
        *("calibrated_length", "tested_length", "calibrated (tokens)", "tested (tokens)"),
        ("calibrated.context",),
        ("context", "tokens"),
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


@dataclass(frozen=True)
class _Matrix:
    """Measurements that differ in their row and column only.

    Attributes:
        title: another for each matrix.
        cells: (row, column, record); a row is a label, or with what tells it from another of the same label.
    """

    title: str
    rows: list[str]
    columns: list[str]
    cells: list[tuple[str, str, Record]] = field(default_factory=list)


def transfer_sections(records: Sequence[Record]) -> list[Section]:
    """Calibrated on one text, or length, and tested on another."""
    sections = []
    for suite, kind in KINDS.items():
        blocks = []
        of_suite = [record for record in records if record.suite == suite]
        if suite == "context":
            # Few tokens before many; settings stay in their order.
            order = {setting: place for place, setting in enumerate(dict.fromkeys(map(_setting, of_suite)))}
            of_suite.sort(key=lambda record: (order[_setting(record)], _tokens_or_none(record)))
        for place, matrix in enumerate(_matrices(of_suite, kind)):
            group = [record for _, _, record in matrix.cells]
            filled = [(row, column) for row, column, _ in matrix.cells]
            twice = len({cell for cell in filled if filled.count(cell) > 1})
            cells = "1 cell was" if twice == 1 else f"{twice} cells were"
            note = f"{cells} measured more than once: all figures are given, coloured is none." if twice else ""
            table = _transfer_table(matrix, kind)
            # A single cell is no picture.
            panels = _panels(f"{suite}{place}", matrix, kind) if len(matrix.rows) * len(matrix.columns) > 1 else []
            blocks.append(Block(matrix.title, note, table, commands_of(group), panels))
        if suite == "context":
            blocks += _calibration_size(of_suite, kind)
        if blocks:
            sections.append(Section(kind.title, kind.note, blocks))
    return sections


def _matrices(records: Sequence[Record], kind: _Kind, apart: Sequence[str] = ()) -> list[_Matrix]:
    """All measurements of a suite in as few matrices as have no cell for two that differ in more than their place.

    Those of texts that have nothing to do with each other, although named alike, get a matrix each.

    Args:
        apart: further facts that may differ within a matrix.
    """
    placed = {*kind.of_row, *kind.of_column, *apart, "projections_sha256"}
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        common = {name: value for name, value in facts_of_run(record).items() if name not in placed}
        groups.setdefault((_title(record, apart), *common.items()), []).append(record)
    parts = [part for group in groups.values() for part in _connected(group, kind)]
    facts = [_common(part, kind, placed) for part in parts]
    titles = told_apart([_title(part[0], apart) for part in parts], facts)
    return [_matrix(title, part, kind) for title, part in zip(titles, parts, strict=True)]


def _connected(group: Sequence[Record], kind: _Kind) -> list[list[Record]]:
    """The records by what their rows and columns have to do with each other, over any number of cells."""
    parts: list[tuple[set[object], list[Record]]] = []
    for record in group:
        ends: set[object] = {("row", _identity(record, kind.row, kind.of_row))}
        ends.add(("column", _identity(record, kind.column, kind.of_column)))
        touched = [part for part in parts if part[0] & ends]
        parts = [part for part in parts if not part[0] & ends]
        joined = [each for _, members in touched for each in members]
        parts.append((ends.union(*(known for known, _ in touched)), [*joined, record]))
    return [members for _, members in parts]


def _common(part: Sequence[Record], kind: _Kind, placed: set[str]) -> dict[str, str]:
    """Facts of a matrix: those of all its records, then those of its rows and columns."""
    facts = [facts_of_run(record) for record in part]
    common = {name: value for name, value in facts[0].items() if name not in placed}
    for name in (*kind.of_row, *kind.of_column):
        if values := sorted({each[name] for each in facts if name in each}):
            common[name] = values[0] if len(values) == 1 else f"{values[0]} and {len(values) - 1} more"
    return common


def _matrix(title: str, part: Sequence[Record], kind: _Kind) -> _Matrix:
    rows, columns = (_labels(part, *axis) for axis in ((kind.row, kind.of_row), (kind.column, kind.of_column)))
    cells = [
        (rows[_identity(r, kind.row, kind.of_row)], columns[_identity(r, kind.column, kind.of_column)], r) for r in part
    ]
    down, across = list(rows.values()), list(columns.values())
    cells.sort(key=lambda cell: (down.index(cell[0]), across.index(cell[1])))
    return _Matrix(title, down, across, cells)


def _identity(record: Record, key: str, names: Sequence[str]) -> tuple[str, ...]:
    """Of a row or column: its label, and what else makes it the same."""
    facts = facts_of_run(record)
    return _label(record.figures[key]), *(facts.get(name, "") for name in names)


def _labels(part: Sequence[Record], key: str, names: Sequence[str]) -> dict[tuple[str, ...], str]:
    """A label for each row or column, in order: of numbers, or of the alphabet."""
    values = {_identity(record, key, names): record.figures[key] for record in part}
    words = any(isinstance(value, str) for value in values.values())
    ordered = sorted(values, key=lambda each: (0.0 if words else number(values[each]), each))
    facts = [{name: value for name, value in zip(names, each[1:], strict=True) if value} for each in ordered]
    return dict(zip(ordered, told_apart([each[0] for each in ordered], facts), strict=True))


def _panels(identity: str, matrix: _Matrix, kind: _Kind) -> list[Panel]:
    """A heat map for each measure that the records have; a cell that is filled twice has all its figures, no colour."""
    rows, columns, panels = matrix.rows, matrix.columns, []
    for key, (what, unit, form) in MEASURES.items():
        found: dict[tuple[str, str], list[float]] = {}
        for row, column, record in matrix.cells:
            if key in record.figures:
                found.setdefault((row, column), []).append(number(record.figures[key]))
        if not found:
            continue
        cells = [[found.get((row, column), []) for column in columns] for row in rows]
        values = [[cell[0] if len(cell) == 1 else math.nan for cell in line] for line in cells]
        texts = [[" | ".join(map(form, cell)) for cell in line] for line in cells]
        panels.append(
            heat(
                f"{identity}-{key.replace('_', '')}",
                f"{what}, {len(rows)} calibrations by {len(columns)} tests, {matrix.title}",
                what,
                (kind.down, kind.across),
                (rows, columns),
                values,
                unit=unit,
                texts=texts,
            )
        )
    return panels


def _title(record: Record, apart: Sequence[str] = ()) -> str:
    """What one matrix has in common: model, setting, and tokens that were calibrated on."""
    tokens = _calibration_tokens(record)
    words = [f"calibrated on {plain(tokens, '.0f')} tokens"] if math.isfinite(tokens) and not apart else []
    if record.suite == "transfer" and record.options.get("context"):
        words.append(f"windows of {record.options['context']}")
    return ", ".join(filter(None, [record.model, name_of(record), *words]))


def _calibration_tokens(record: Record) -> float:
    """As asked for, where the record says: how many are really read differs a little with the length of windows."""
    asked = record.options.get("calibrated")
    given = asked.get("tokens") if isinstance(asked, dict) else None
    return number(record.figures.get("calibration_tokens") if given is None else given)


def _calibration_size(records: Sequence[Record], kind: _Kind) -> list[Block]:
    """How many tokens are enough, where several numbers were tried."""
    blocks = []
    for place, matrix in enumerate(_matrices(records, kind, apart=["calibrated.tokens"])):
        group = [record for _, _, record in matrix.cells]
        if len({tokens for tokens in map(_calibration_tokens, group) if math.isfinite(tokens)}) < 2:
            continue
        places = {cell[:2]: place for place, cell in enumerate(matrix.cells)}
        cells = sorted(matrix.cells, key=lambda cell: (places[cell[:2]], _calibration_tokens(cell[2])))
        points = [
            (f"windows of {calibrated}, tested at {tested}", _calibration_tokens(record), record.figures)
            for calibrated, tested, record in cells
        ]
        rows = [[name, plain(tokens, ".0f"), *loss_cells(result)[1:]] for name, tokens, result in points]
        alt = "by the number of tokens calibrated on"
        panel = loss_curves(f"size{place}", alt, Axis("tokens calibrated on", "log2"), points)
        table = (["calibration", "tokens", "change", "KL to dense"], rows)
        blocks.append(Block(f"Calibration size: {matrix.title}", "", table, commands_of(group), [panel]))
    return blocks


def _setting(record: Record) -> str:
    return json.dumps([record.setting, record.basis], sort_keys=True)


def _tokens_or_none(record: Record) -> float:
    tokens = _calibration_tokens(record)
    return tokens if math.isfinite(tokens) else -1.0


def _label(value: Any) -> str:
    return value if isinstance(value, str) else plain(number(value), ".0f")


def _transfer_table(matrix: _Matrix, kind: _Kind) -> Table:
    distances = any("distance" in record.figures for _, _, record in matrix.cells)
    titles = [kind.down, kind.across, "perplexity", "change", "KL to dense", *(["distance"] if distances else [])]
    rows = []
    for calibrated, tested, record in matrix.cells:
        result = record.figures
        distance = [plain(number(result.get("distance")), ".3f")] if distances else []
        rows.append([calibrated, tested, *loss_cells(result), *distance])
    return titles, rows
