# SPDX-License-Identifier: Apache-2.0
"""Calibrated on one text or length, tested on another: a matrix for each setting; and how many tokens are enough."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aqua_attention.evaluate.record import Record, number
from aqua_attention.report.document import Block, Panel, Section, cells, count, name_of, percent, plain
from aqua_attention.report.figures import Axis, heat, loss_curves
from aqua_attention.report.runs import facts_of_run, told_apart
from aqua_attention.report.tables import LOSSES, Column, Table

Identity = tuple[str, ...]
"""Of a row or column: its label, and what else makes it the same."""


@dataclass(frozen=True)
class _Side:
    """The rows or the columns of a matrix: the field of the result, and what else is another for each of them."""

    key: str
    title: str
    facts: tuple[str, ...]

    def identity(self, record: Record) -> Identity:
        facts, value = facts_of_run(record), record.figures[self.key]
        return value if isinstance(value, str) else count(value), *(facts.get(name, "") for name in self.facts)

    def labels(self, records: Sequence[Record]) -> dict[Identity, str]:
        """In order: of numbers, or of the alphabet."""
        values = {self.identity(record): record.figures[self.key] for record in records}
        words = any(isinstance(value, str) for value in values.values())
        ordered = sorted(values, key=lambda each: (0.0 if words else number(values[each]), each))
        facts = [{name: value for name, value in zip(self.facts, each[1:], strict=True) if value} for each in ordered]
        return dict(zip(ordered, told_apart([each[0] for each in ordered], facts), strict=True))


@dataclass(frozen=True)
class _Kind:
    """What a suite calibrates and tests on."""

    title: str
    note: str
    down: _Side
    across: _Side


KINDS = {
    "transfer": _Kind(
        "Transfer",
        "Calibrated on one text, tested on another. Change and KL divergence: against dense on the tested one. "
        "Distance: of the projections of the two texts, 0 the same subspaces, 1 as far apart as can be.",
        _Side("calibrated", "calibrated on", ("calibrated.name", "calibrated.data", "calibrated.text_sha256")),
        _Side("tested", "tested on", ("tested.name", "tested.data", "text_sha256", "tokens", "context")),
    ),
    "context": _Kind(
        "Context length",
        "Calibrated on windows of one length, tested on windows of another. Change and KL divergence: against dense on "
        "windows of the tested length.",
        _Side("calibrated_length", "calibrated (tokens)", ("calibrated.context",)),
        _Side("tested_length", "tested (tokens)", ("context", "tokens")),
    ),
}
MEASURES: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "perplexity_change": ("perplexity change", "perplexity change (%)", lambda value: percent(value, 2, sign=True)),
    "kl": ("KL divergence to dense", "KL (nats)", plain),
    "distance": ("subspace distance of the projections", "distance (0 to 1)", lambda value: plain(value, "z.2f")),
}
"""By field: its name, its unit, and how it is written into a cell."""
DISTANCE = Column("distance", "distance", "z.3f")


@dataclass(frozen=True)
class _Matrix:
    """Measurements that differ in their row and column only: each a cell (row, column, record), in their order."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: list[tuple[str, str, Record]]

    @property
    def records(self) -> list[Record]:
        return [record for _, _, record in self.cells]


def transfer_sections(records: Sequence[Record]) -> list[Section]:
    """Calibrated on one text, or length, and tested on another."""
    sections = []
    for suite, kind in KINDS.items():
        of_suite = [record for record in records if record.suite == suite]
        if suite == "context":
            # Few tokens before many; settings stay in their order.
            order = {setting: place for place, setting in enumerate(dict.fromkeys(map(_setting, of_suite)))}
            of_suite.sort(key=lambda record: (order[_setting(record)], _calibration_tokens(record, -1.0)))
        blocks = [_block(f"{suite}{place}", each, kind) for place, each in enumerate(_matrices(of_suite, kind))]
        if suite == "context":
            blocks += _calibration_size(_matrices(of_suite, kind, apart=["calibrated.tokens"]))
        sections.append(Section(kind.title, blocks, kind.note))
    return sections


def _block(identity: str, matrix: _Matrix, kind: _Kind) -> Block:
    filled = [cell[:2] for cell in matrix.cells]
    twice = len({cell for cell in filled if filled.count(cell) > 1})
    several = "1 cell was" if twice == 1 else f"{twice} cells were"
    note = f"{several} measured more than once: all figures are given, coloured is none." if twice else ""
    columns = [*LOSSES, *([DISTANCE] if any("distance" in record.figures for record in matrix.records) else [])]
    rows = [[row, column, *cells(record.figures, columns)] for row, column, record in matrix.cells]
    table: Table = [kind.down.title, kind.across.title, *(column.title for column in columns)], rows
    # A single cell is no picture.
    panels = _panels(identity, matrix, kind) if len(matrix.rows) * len(matrix.columns) > 1 else []
    return Block(matrix.title, table, matrix.records, panels, note)


def _matrices(records: Sequence[Record], kind: _Kind, apart: Sequence[str] = ()) -> Iterable[_Matrix]:
    """All measurements of a suite in as few matrices as have no cell for two that differ in more than their place.

    Those of texts that have nothing to do with each other, although named alike, get a matrix each. `apart`: further
    facts that may differ within one.
    """
    sides = kind.down, kind.across
    placed = {*kind.down.facts, *kind.across.facts, *apart, "projections_sha256"}
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        common = {name: value for name, value in facts_of_run(record).items() if name not in placed}
        groups.setdefault((_title(record, apart), *common.items()), []).append(record)
    parts = [part for group in groups.values() for part in _connected(group, sides)]
    titles = told_apart([_title(part[0], apart) for part in parts], [_common(part, sides, placed) for part in parts])
    for title, part in zip(titles, parts, strict=True):
        rows, columns = (side.labels(part) for side in sides)
        placed_in = [(rows[sides[0].identity(r)], columns[sides[1].identity(r)], r) for r in part]
        down, across = list(rows.values()), list(columns.values())
        placed_in.sort(key=lambda cell: (down.index(cell[0]), across.index(cell[1])))
        yield _Matrix(title, down, across, placed_in)


def _connected(group: Sequence[Record], sides: Sequence[_Side]) -> list[list[Record]]:
    """The records by what their rows and columns have to do with each other, over any number of cells."""
    parts: list[tuple[set[object], list[Record]]] = []
    for record in group:
        ends: set[object] = {(side.key, side.identity(record)) for side in sides}
        touched = [part for part in parts if part[0] & ends]
        parts = [part for part in parts if not part[0] & ends]
        joined = [each for _, members in touched for each in members]
        parts.append((ends.union(*(known for known, _ in touched)), [*joined, record]))
    return [members for _, members in parts]


def _common(part: Sequence[Record], sides: Sequence[_Side], placed: set[str]) -> dict[str, str]:
    """Facts of a matrix: those of all its records, then those of its rows and columns."""
    facts = [facts_of_run(record) for record in part]
    common = {name: value for name, value in facts[0].items() if name not in placed}
    for name in (name for side in sides for name in side.facts):
        if values := sorted({each[name] for each in facts if name in each}):
            common[name] = values[0] if len(values) == 1 else f"{values[0]} and {len(values) - 1} more"
    return common


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
        filled = [[found.get((row, column), []) for column in columns] for row in rows]
        values = [[cell[0] if len(cell) == 1 else math.nan for cell in line] for line in filled]
        texts = [[" | ".join(map(form, cell)) for cell in line] for line in filled]
        name, alt = f"{identity}-{key.replace('_', '')}", f"{what}, {len(rows)} calibrations by {len(columns)} tests"
        sides = (kind.down.title, rows), (kind.across.title, columns)
        panels.append(heat(name, f"{alt}, {matrix.title}", what, *sides, values, unit=unit, texts=texts))
    return panels


def _title(record: Record, apart: Sequence[str] = ()) -> str:
    """What one matrix has in common: model, setting, and tokens that were calibrated on."""
    tokens = _calibration_tokens(record)
    words = [f"calibrated on {count(tokens)} tokens"] if math.isfinite(tokens) and not apart else []
    if record.suite == "transfer" and record.options.get("context"):
        words.append(f"windows of {record.options['context']}")
    return ", ".join(filter(None, [record.model, name_of(record), *words]))


def _calibration_tokens(record: Record, unknown: float = math.nan) -> float:
    """As asked for, where the record says: how many are read differs a little with the length of windows."""
    asked = record.options.get("calibrated")
    given = asked.get("tokens") if isinstance(asked, dict) else None
    tokens = number(record.figures.get("calibration_tokens") if given is None else given)
    return tokens if math.isfinite(tokens) else unknown


def _calibration_size(matrices: Iterable[_Matrix]) -> list[Block]:
    """How many tokens are enough, where several numbers were tried."""
    blocks = []
    for place, matrix in enumerate(matrices):
        if len({tokens for tokens in map(_calibration_tokens, matrix.records) if math.isfinite(tokens)}) < 2:
            continue
        places = {cell[:2]: place for place, cell in enumerate(matrix.cells)}
        ordered = sorted(matrix.cells, key=lambda cell: (places[cell[:2]], _calibration_tokens(cell[2])))
        points = [
            (f"windows of {calibrated}, tested at {tested}", _calibration_tokens(record), record.figures)
            for calibrated, tested, record in ordered
        ]
        rows = [[name, count(tokens), *cells(result, LOSSES[1:])] for name, tokens, result in points]
        alt = "by the number of tokens calibrated on"
        panel = loss_curves(f"size{place}", alt, Axis("tokens calibrated on", "log2"), points)
        table: Table = ["calibration", "tokens", *(column.title for column in LOSSES[1:])], rows
        blocks.append(Block(f"Calibration size: {matrix.title}", table, matrix.records, [panel]))
    return blocks


def _setting(record: Record) -> str:
    return json.dumps([record.setting, record.basis], sort_keys=True)
