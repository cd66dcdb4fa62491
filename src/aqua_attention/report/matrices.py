# SPDX-License-Identifier: Apache-2.0
"""Figures over two dimensions: needle (length x depth), transfer and context (calibrated x tested); and lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from aqua_attention.report.document import Block, Panel, Section, commands_of, data_of, name_of, percent, plain
from aqua_attention.report.figures import Axis, Curve, curves, heat
from aqua_attention.report.record import Record, number
from aqua_attention.tables import Table

NOTES = {
    "transfer": "Calibrated on one text, tested on another. Change and KL divergence: against dense on the tested one. "
    "Distance: of the projections of the two texts, 0 the same subspaces, 1 as far apart as can be.",
    "context": "Calibrated on windows of one length, tested on windows of another. Change and KL divergence: against "
    "dense on windows of the tested length.",
}
MOST_DRAWN = 24
"""Settings of one model and text that a heat map each is drawn of; the numbers hold all."""
MOST_WRITTEN = 6
"""So many columns of a heat map have room for a figure in each cell."""


def retrieval_sections(records: Sequence[Record]) -> list[Section]:
    """Needle and lines."""
    note = (
        "Exact answers (greedy). Lost, gained: questions that only dense, only AQUA got right; p: exact McNemar test."
    )
    blocks = []
    for place, (title, group) in enumerate(_grouped(records, "needle", data_of).items()):
        panels = [_needle(f"needle{place}-{index}", record) for index, record in enumerate(group[:MOST_DRAWN])]
        more = f"The first {MOST_DRAWN} of {len(group)} settings are drawn." if len(group) > MOST_DRAWN else ""
        table = _retrieval_table(group)
        blocks.append(Block(f"Needle in a haystack: {title}", more, table, commands_of(group), panels))
    for place, (title, group) in enumerate(_grouped(records, "lines", data_of).items()):
        blocks.append(
            Block(f"Lines: {title}", "", _retrieval_table(group), commands_of(group), [_lines(f"lines{place}", group)])
        )
    return [Section("Retrieval", note, blocks)] if blocks else []


def transfer_sections(records: Sequence[Record]) -> list[Section]:
    """Calibrated on one text, or length, and tested on another."""
    sections = []
    kinds = {
        "transfer": ("Transfer", "calibrated on", "tested on", "calibrated", "tested"),
        "context": (
            "Context length",
            "calibrated (tokens)",
            "tested (tokens)",
            "calibrated_length",
            "tested_length",
        ),
    }
    for suite, (title, down, across, row_key, column_key) in kinds.items():
        blocks = []
        groups = _grouped(records, suite, _calibration)
        for place, (name, group) in enumerate(groups.items()):
            rows, columns = (_distinct(group, key) for key in (row_key, column_key))
            panels = []
            for key, unit in (
                ("perplexity_change", "perplexity change (%)"),
                ("kl", "KL (nats)"),
                ("distance", "distance"),
            ):
                cells = {
                    (_label(r.result[row_key]), _label(r.result[column_key])): number(r.result.get(key))
                    for r in group
                    if r.result and key in r.result
                }
                if not cells:
                    continue
                values = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
                form = (
                    (lambda v: percent(v, 2, sign=True)) if key == "perplexity_change" else (lambda v: plain(v, ".2g"))
                )
                what = {"distance": "subspace distance of the projections"}.get(key, unit.partition(" (")[0])
                texts = _texts(values, cells, rows, columns, form)
                panels.append(
                    heat(
                        f"{suite}{place}-{key.replace('_', '')}",
                        f"{what}, {len(rows)} calibrations by {len(columns)} tests, {name}",
                        what,
                        (down, across),
                        (rows, columns),
                        values,
                        unit=unit,
                        texts=texts,
                    )
                )
            table = _transfer_table(group, row_key, column_key, down, across)
            blocks.append(Block(name, "", table, commands_of(group), panels))
        if suite == "context":
            blocks += _calibration_size(records)
        if blocks:
            sections.append(Section(title, NOTES[suite], blocks))
    return sections


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
    groups = _grouped(records, "context", lambda record: ", ".join(filter(None, [record.model, name_of(record)])))
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


def _grouped(records: Sequence[Record], suite: str, key: Callable[[Record], str]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.suite == suite:
            groups.setdefault(key(record), []).append(record)
    return groups


def _distinct(group: Sequence[Record], key: str) -> list[str]:
    """Values in ascending order, or in that of the alphabet."""
    values = {record.result[key] for record in group if record.result}
    if any(isinstance(value, str) for value in values):
        return sorted(_label(value) for value in values)
    return [_label(value) for value in sorted(values, key=number)]


def _label(value: Any) -> str:
    return value if isinstance(value, str) else plain(number(value), ".0f")


def _texts(
    values: Sequence[Sequence[float]],
    cells: dict[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    form: Callable[[float], str],
) -> list[list[str]] | None:
    if len(columns) > MOST_WRITTEN:
        return None
    return [
        [form(value) if (row, column) in cells else "" for column, value in zip(columns, line, strict=True)]
        for row, line in zip(rows, values, strict=True)
    ]


def _needle(identity: str, record: Record) -> Panel:
    assert record.result is not None
    sums: dict[tuple[float, float], list[float]] = {}
    for cell in record.result["cells"]:
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
        texts=texts if len(lengths) <= MOST_WRITTEN else None,
    )


def _lines(identity: str, group: Sequence[Record]) -> Panel:
    drawn = []
    for record in group:
        assert record.result is not None
        cells = [
            (number(c.get("lines")), number(c.get("right")), number(c.get("asked"))) for c in record.result["cells"]
        ]
        points = [(lines, [right / asked if asked else math.nan]) for lines, right, asked in cells]
        drawn.append(Curve(name_of(record), points))
    alt = f"Lines found by number of lines, {len(group)} settings"
    return curves(identity, alt, Axis("lines in the text"), [Axis("right", "share")], drawn)


def _retrieval_table(group: Sequence[Record]) -> Table:
    """A row for each setting and depth, a column for each length or number of lines."""
    key = "lines" if group[0].suite == "lines" else "length"
    cells = [cell for record in group if record.result for cell in record.result["cells"]]
    columns = list(dict.fromkeys(sorted(plain(number(cell.get(key)), ".0f") for cell in cells)))
    columns.sort(key=lambda column: (len(column), column))
    titles = ["setting", *([] if key == "lines" else ["depth"]), *(f"{key} {column}" for column in columns)]
    rows = []
    for record in group:
        assert record.result is not None
        found: dict[str, dict[str, str]] = {}
        for cell in record.result["cells"]:
            depth = plain(number(cell.get("depth")))
            found.setdefault(depth, {})[plain(number(cell.get(key)), ".0f")] = _of(cell)
        whole = [
            plain(number(record.result.get(name)), form) if name in record.result else "" for name, form in _PAIRED
        ]
        for place, (depth, by_column) in enumerate(found.items()):
            row = [name_of(record), *([] if key == "lines" else [depth])]
            row += [by_column.get(column, "") for column in columns]
            rows.append([*row, *([_of(record.result), *whole] if place == 0 else [""] * 4)])
    return [*titles, "all", "lost", "gained", "p (paired)"], rows


_PAIRED = (("lost", ".0f"), ("gained", ".0f"), ("p_value", ".2g"))


def _of(counts: dict[str, object]) -> str:
    return "/".join(plain(number(counts.get(name)), ".0f") for name in ("right", "asked"))


def _transfer_table(group: Sequence[Record], row_key: str, column_key: str, down: str, across: str) -> Table:
    distances = any(record.result and "distance" in record.result for record in group)
    titles = [down, across, "perplexity", "change", "KL to dense", *(["distance"] if distances else [])]
    rows = []
    for record in group:
        assert record.result is not None
        result = record.result
        figures = [
            plain(number(result["perplexity"]), ".3f"),
            percent(number(result["perplexity_change"]), 2, sign=True),
        ]
        figures.append(plain(number(result["kl"]), ".4f"))
        figures += [plain(number(result.get("distance")), ".3f")] if distances else []
        rows.append([_label(result[row_key]), _label(result[column_key]), *figures])
    return titles, rows
