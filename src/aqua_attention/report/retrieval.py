# SPDX-License-Identifier: Apache-2.0
"""Retrieval: needles by length and depth, lines by their number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aqua_attention.evaluate.record import Record, number
from aqua_attention.report.document import Block, Panel, Section, count, name_of, plain
from aqua_attention.report.figures import Axis, curves, heat
from aqua_attention.report.runs import runs_of
from aqua_attention.report.tables import PAIRED, Row, Table

MOST_DRAWN = 24
"""Settings of one model and text that a heat map each is drawn of; the numbers hold all."""
NOTE = "Exact answers (greedy). Lost, gained: questions that only dense, only AQUA got right; p: exact McNemar test."


def retrieval_sections(records: Sequence[Record]) -> list[Section]:
    """Needle and lines."""
    blocks = []
    for place, (title, group) in enumerate(runs_of(records, "needle").items()):
        panels = [_needle(f"needle{place}-{index}", record) for index, record in enumerate(group[:MOST_DRAWN])]
        more = f"The first {MOST_DRAWN} of {len(group)} settings are drawn." if len(group) > MOST_DRAWN else ""
        blocks.append(Block(f"Needle in a haystack: {title}", _table(group), group, panels, more))
    for place, (title, group) in enumerate(runs_of(records, "lines").items()):
        blocks.append(Block(f"Lines: {title}", _table(group), group, [_lines(f"lines{place}", group)]))
    return [Section("Retrieval", blocks, NOTE)]


def _needle(identity: str, record: Record) -> Panel:
    sums: dict[tuple[float, float], list[float]] = {}
    for cell in record.figures["cells"]:
        counts = sums.setdefault((number(cell.get("depth")), number(cell.get("length"))), [0.0, 0.0])
        counts[:] = counts[0] + number(cell.get("right")), counts[1] + number(cell.get("asked"))
    depths, lengths = (sorted({place[axis] for place in sums}, key=lambda v: (math.isnan(v), v)) for axis in (0, 1))
    counted = [[sums.get((depth, length), []) for length in lengths] for depth in depths]
    shares = [[_share(*cell) for cell in line] for line in counted]
    texts = [["/".join(map(count, cell)) for cell in line] for line in counted]
    alt, name = f"Needles found by length and depth, {name_of(record)}", name_of(record)
    sides = ("depth (0 beginning, 1 end)", list(map(plain, depths))), ("length (tokens)", list(map(count, lengths)))
    return heat(identity, alt, name, *sides, shares, unit="right (%)", limits=(0.0, 1.0), texts=texts)


def _share(right: float = math.nan, asked: float = 0.0) -> float:
    return right / asked if asked else math.nan


def _lines(identity: str, group: Sequence[Record]) -> Panel:
    points = [
        (name_of(record), number(cell.get("lines")), [_share(number(cell.get("right")), number(cell.get("asked")))])
        for record in group
        for cell in record.figures["cells"]
    ]
    alt = f"Lines found by number of lines, {len(group)} settings"
    return curves(identity, alt, Axis("lines in the text"), [Axis("right", "share")], points)


def _table(group: Sequence[Record]) -> Table:
    """A row for each setting and depth, a column for each length or number of lines."""
    key, deep = ("lines", []) if group[0].suite == "lines" else ("length", ["depth"])
    columns = list({count(cell.get(key)) for record in group for cell in record.figures["cells"]})
    columns.sort(key=lambda column: (len(column), column))
    rows = []
    for record in group:
        found: dict[str, dict[str, str]] = {}
        for cell in record.figures["cells"]:
            found.setdefault(plain(cell.get("depth")), {})[count(cell.get(key))] = _of(cell)
        known = {column.key: number(record.figures[column.key]) for column in PAIRED if column.key in record.figures}
        whole = [_of(record.figures), *(column.cell(known) for column in PAIRED)]
        for depth, by_column in found.items():
            row = [name_of(record), *([depth] if deep else []), *(by_column.get(column, "") for column in columns)]
            rows.append(row + whole)
            whole = [""] * len(whole)
    titles = ["setting", *deep, *(f"{key} {column}" for column in columns), "all"]
    return [*titles, *(column.title for column in PAIRED)], rows


def _of(counts: Row) -> str:
    return f"{count(counts.get('right'))}/{count(counts.get('asked'))}"
