# SPDX-License-Identifier: Apache-2.0
"""What choosing tokens loses by the bytes read, of every method; and which share of the softmax was read, by layer."""

import math
from collections.abc import Iterator, Sequence

from aqua_attention.evaluate.record import Record, number, numbers
from aqua_attention.report import svg
from aqua_attention.report.document import Block, Panel, Section, cells, data_of, plain
from aqua_attention.report.figures import Axis, curves, loss_curves
from aqua_attention.report.runs import titled_apart
from aqua_attention.report.tables import LOSSES, Column, Row, Table

NOTE = (
    "Bytes read: of keys and values, scores included, to those of dense attention in 16 bits. Lower and further left "
    "is better. An oracle scores exactly, and for free. By p: the fewest tokens that hold this share of the softmax, "
    "as the scores have it. Fixed: the same number of tokens for every query. Held: the exact share that they hold."
)
COLUMNS = (
    Column("tokens read", "tokens_read", ".1%"),
    Column("bytes read", "bytes_read", ".1%"),
    *LOSSES[1:],
    Column("held", "mass", ".4f"),
    Column("held by the scores", "mass_expected", ".4f"),
    Column("held where p decides", "mass_decided", ".4f"),
)
BUDGETS = {"select_p": ("by p", "p"), "select_tokens": ("fixed", "tokens")}
"""By what asks for tokens: words for it, and its unit."""


def choice_sections(records: Sequence[Record]) -> list[Section]:
    """A block for each text and length."""
    found = [_block(f"choice{n}", each) for n, each in enumerate(r for r in records if r.suite == "select")]
    return [Section("Tokens chosen", titled_apart(found), NOTE)]


def _block(identity: str, record: Record) -> Block:
    rows: list[Row] = [row for row in record.figures["rows"] if "absent" not in row]
    panels = []
    for budget, (words, _) in BUDGETS.items():
        asked = [row for row in rows if row.get(budget) is not None]
        for place, part in enumerate(_together(asked)):
            points = [(row["method"], number(row.get("bytes_read")), row) for row in part]
            alt = f"by the bytes read, {len({row['method'] for row in part})} ways to choose tokens, {words}"
            panels.append(
                loss_curves(f"{identity}-{budget}{place}", alt, Axis(f"bytes read, {words}", "percent"), points)
            )
    panels += _calibration(identity, rows)
    return Block(data_of(record), _table(rows), [record], panels)


def _together(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """As many methods at once as there are colours, the first of all beside others each time."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    first, others, room = methods[:1], methods[1:], len(svg.SERIES) - 1
    for start in range(0, max(1, len(others)) if rows else 0, room):
        shown = [*first, *others[start : start + room]]
        yield [row for method in shown for row in rows if row["method"] == method]


def _calibration(identity: str, rows: Sequence[Row]) -> list[Panel]:
    """Of the first method that is asked for p: what it held beyond that, and what it read and held in each layer."""
    asked = [row for row in rows if row.get("select_p") is not None and math.isfinite(number(row.get("mass")))]
    if not asked:
        return []
    first = asked[0]["method"]
    mine = [row for row in asked if row["method"] == first]
    lines = (("exact", "mass"), ("by the scores", "mass_expected"), ("exact, where p decides", "mass_decided"))
    points = [
        (label, number(row["select_p"]), [number(row.get(key)) - number(row["select_p"])])
        for label, key in lines
        for row in mine
    ]
    alt = f"Share of the softmax that the tokens hold, less p, {first}"
    axes = Axis(f"p, {first}"), [Axis("held, less p", "percent")]
    layers = [
        (f"p {plain(row['select_p'])}", float(layer), [read, held])
        for row in mine
        for layer, (read, held) in enumerate(
            zip(numbers(row.get("tokens_read_per_layer")), numbers(row.get("mass_per_layer")), strict=False)
        )
    ]
    by_layer = Axis(f"layer, {first}", "count"), [Axis("tokens read", "percent"), Axis("held", "percent")]
    return [
        curves(f"{identity}-held", alt, *axes, points),
        curves(f"{identity}-layers", f"Tokens read and softmax held by layer, {first}", *by_layer, layers),
    ]


def _table(rows: Sequence[Row]) -> Table:
    titles = ["method", "asked for", *(column.title for column in COLUMNS)]
    return titles, [[row["method"], _asked(row), *cells(row, COLUMNS)] for row in rows]


def _asked(row: Row) -> str:
    given = ((unit, row.get(name)) for name, (_, unit) in BUDGETS.items())
    return next((f"{unit} {plain(value, 'z.6g')}" for unit, value in given if value is not None), "")
