# SPDX-License-Identifier: Apache-2.0
"""Retrieval: needles by length and depth, lines by their number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aqua_attention.evaluate.record import Record, number
from aqua_attention.report.document import Block, Panel, Section, commands_of, name_of, plain
from aqua_attention.report.figures import Axis, Curve, curves, heat
from aqua_attention.report.runs import runs_of
from aqua_attention.report.tables import Table

MOST_DRAWN = 24
"""Settings of one model and text that a heat map each is drawn of; the numbers hold all."""
_PAIRED = (("lost", ".0f"), ("gained", ".0f"), ("p_value", ".2g"))


def retrieval_sections(records: Sequence[Record]) -> list[Section]:
    """Needle and lines."""
    note = (
        "Exact answers (greedy). Lost, gained: questions that only dense, only AQUA got right; p: exact McNemar test."
    )
    blocks = []
    for place, (title, group) in enumerate(runs_of(records, "needle").items()):
        panels = [_needle(f"needle{place}-{index}", record) for index, record in enumerate(group[:MOST_DRAWN])]
        more = f"The first {MOST_DRAWN} of {len(group)} settings are drawn." if len(group) > MOST_DRAWN else ""
        table = _retrieval_table(group)
        blocks.append(Block(f"Needle in a haystack: {title}", more, table, commands_of(group), panels))
    for place, (title, group) in enumerate(runs_of(records, "lines").items()):
        blocks.append(
            Block(f"Lines: {title}", "", _retrieval_table(group), commands_of(group), [_lines(f"lines{place}", group)])
        )
    return [Section("Retrieval", note, blocks)] if blocks else []


def _needle(identity: str, record: Record) -> Panel:
    sums: dict[tuple[float, float], list[float]] = {}
    for cell in record.figures["cells"]:
        place = number(cell.get("depth")), number(cell.get("length"))
        cell_sums = sums.setdefault(place, [0.0, 0.0])
        cell_sums[0] += number(cell.get("right"))
        cell_sums[1] += number(cell.get("asked"))
    depths, lengths = (sorted({place[axis] for place in sums}, key=lambda v: (math.isnan(v), v)) for axis in (0, 1))

    def share(place: tuple[float, float]) -> float:
        right, asked = sums.get(place, (math.nan, 0.0))
        return right / asked if asked else math.nan

    values = [[share((depth, length)) for length in lengths] for depth in depths]
    texts = [["/".join(plain(v, ".0f") for v in sums.get((d, n), [])) for n in lengths] for d in depths]
    return heat(
        identity,
        f"Needles found by length and depth, {name_of(record)}",
        name_of(record),
        ("depth (0 beginning, 1 end)", "length (tokens)"),
        ([plain(depth) for depth in depths], [plain(length, ".0f") for length in lengths]),
        values,
        unit="right (%)",
        limits=(0.0, 1.0),
        texts=texts,
    )


def _lines(identity: str, group: Sequence[Record]) -> Panel:
    drawn = []
    for record in group:
        cells = [
            (number(c.get("lines")), number(c.get("right")), number(c.get("asked"))) for c in record.figures["cells"]
        ]
        points = [(lines, [right / asked if asked else math.nan]) for lines, right, asked in cells]
        drawn.append(Curve(name_of(record), points))
    alt = f"Lines found by number of lines, {len(group)} settings"
    return curves(identity, alt, Axis("lines in the text"), [Axis("right", "share")], drawn)


def _retrieval_table(group: Sequence[Record]) -> Table:
    """A row for each setting and depth, a column for each length or number of lines."""
    key = "lines" if group[0].suite == "lines" else "length"
    cells = [cell for record in group for cell in record.figures["cells"]]
    columns = list(dict.fromkeys(sorted(plain(number(cell.get(key)), ".0f") for cell in cells)))
    columns.sort(key=lambda column: (len(column), column))
    titles = ["setting", *([] if key == "lines" else ["depth"]), *(f"{key} {column}" for column in columns)]
    rows = []
    for record in group:
        found: dict[str, dict[str, str]] = {}
        for cell in record.figures["cells"]:
            depth = plain(number(cell.get("depth")))
            found.setdefault(depth, {})[plain(number(cell.get(key)), ".0f")] = _of(cell)
        whole = [
            plain(number(record.figures.get(name)), form) if name in record.figures else "" for name, form in _PAIRED
        ]
        for place, (depth, by_column) in enumerate(found.items()):
            row = [name_of(record), *([] if key == "lines" else [depth])]
            row += [by_column.get(column, "") for column in columns]
            rows.append([*row, *([_of(record.figures), *whole] if place == 0 else [""] * 4)])
    return [*titles, "all", "lost", "gained", "p (paired)"], rows


def _of(counts: dict[str, object]) -> str:
    return "/".join(plain(number(counts.get(name)), ".0f") for name in ("right", "asked"))
