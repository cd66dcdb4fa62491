# SPDX-License-Identifier: Apache-2.0
"""Scores of needles, lines, RULER and tasks; and what a table alone tells: images, and suites without a drawing."""

import math
from collections.abc import Sequence
from typing import Any

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import Block, Panel, Section, cells, count, name_of, percent, plain, right_of
from aqua_attention.report.figures import Axis, curves, heat
from aqua_attention.report.runs import OF_A_TASK, facts_of_run, runs_of, told_apart
from aqua_attention.report.tables import IMAGES, PAIRED, Column, Table

MOST_DRAWN = 24
"""Settings of one model and text that a heat map each is drawn of; the numbers hold all."""
RETRIEVAL_NOTE = (
    "Exact answers (greedy). Lost, gained: questions that only dense, only AQUA got right; p: exact McNemar test. "
    "RULER: share of the expected strings that are in an answer (question answering: any of them); lost, gained: "
    "questions of which dense, of which AQUA has more."
)
IMAGES_NOTE = (
    "Cosine of each image's embedding to its dense one. Same neighbour: share of the images whose nearest other image "
    "is the one it was."
)
TASKS_NOTE = (
    "± one standard error. Difference: in percentage points, to dense on the same items. Lost and gained: items that "
    "only dense, only AQUA got right; p: a paired test of the two. p-values are one for each setting, not corrected "
    "for asking several times. Outside the window: share of the prompts' query-key pairs outside the exact window; "
    "where it is 0%, AQUA leaves nothing out."
)


def retrieval_sections(records: Sequence[Record]) -> list[Section]:
    """Needle, lines and RULER."""
    blocks = []
    for suite, words in (("needle", "Needle in a haystack"), ("ruler", "RULER")):
        for place, (title, group) in enumerate(runs_of(records, suite).items()):
            panels = [_grid(f"{suite}{place}-{index}", record) for index, record in enumerate(group[:MOST_DRAWN])]
            more = f"The first {MOST_DRAWN} of {len(group)} settings are drawn." if len(group) > MOST_DRAWN else ""
            blocks.append(Block(f"{words}: {title}", _table(group), group, panels, more))
    for place, (title, group) in enumerate(runs_of(records, "lines").items()):
        blocks.append(Block(f"Lines: {title}", _table(group), group, [_lines(f"lines{place}", group)]))
    return [Section("Retrieval", blocks, RETRIEVAL_NOTE)]


def _grid(identity: str, record: Record) -> Panel:
    """Right answers by length, and by depth or task."""
    is_needle = record.suite == "needle"
    key, side = ("depth", "depth (0 beginning, 1 end)") if is_needle else ("task", "task")
    sums: dict[tuple[Any, float], list[float]] = {}
    for cell in record.figures["cells"]:
        row = number(cell.get(key)) if is_needle else str(cell[key])
        counts = sums.setdefault((row, number(cell.get("length"))), [0.0, 0.0])
        counts[:] = counts[0] + number(cell.get("right")), counts[1] + number(cell.get("asked"))
    rows, lengths = (_in_order(list(dict.fromkeys(each))) for each in zip(*sums, strict=True))
    counted = [[sums.get((row, length), []) for length in lengths] for row in rows]
    shares = [[_share(*cell) for cell in line] for line in counted]
    texts = [[right_of({"right": cell[0], "asked": cell[1]}) if cell else "" for cell in line] for line in counted]
    alt, name = f"Right answers by length and {key}, {name_of(record)}", name_of(record)
    sides = (side, list(map(plain, rows)) if is_needle else rows), ("length (tokens)", list(map(count, lengths)))
    return heat(identity, alt, name, *sides, shares, unit="right (%)", limits=(0.0, 1.0), texts=texts)


def _in_order(values: list[Any]) -> list[Any]:
    """Numbers by size, NaN last; names as they come."""
    is_named = any(isinstance(value, str) for value in values)
    return values if is_named else sorted(values, key=lambda value: (math.isnan(value), value))


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
    """A row for each setting and depth or task, a column for each length or number of lines."""
    key, deep = {"lines": ("lines", []), "ruler": ("length", ["task"])}.get(group[0].suite, ("length", ["depth"]))
    columns = list({count(cell.get(key)) for record in group for cell in record.figures["cells"]})
    columns.sort(key=lambda column: (len(column), column))
    rows = []
    for record in group:
        found: dict[str, dict[str, str]] = {}
        for cell in record.figures["cells"]:
            label = str(cell["task"]) if "task" in deep else plain(cell.get("depth"))
            found.setdefault(label, {})[count(cell.get(key))] = right_of(cell)
        if "task" in deep and len(found) > 1:
            found["all"] = {column: right_of(each) for column, each in _by_length(record).items()}
        # Dense attention has nothing to be compared with.
        whole = [right_of(record.figures), *(cells(record.figures, PAIRED) if record.setting else [""] * len(PAIRED))]
        for depth, by_column in found.items():
            row = [name_of(record), *([depth] if deep else []), *(by_column.get(column, "") for column in columns)]
            rows.append(row + whole)
            whole = [""] * len(whole)
    titles = ["setting", *deep, *(f"{key} {column}" for column in columns), "all"]
    return [*titles, *(column.title for column in PAIRED)], rows


def _by_length(record: Record) -> dict[str, dict[str, float]]:
    """Right answers to all tasks of each length."""
    sums: dict[str, dict[str, float]] = {}
    for cell in record.figures["cells"]:
        counts = sums.setdefault(count(cell.get("length")), {"right": 0.0, "asked": 0.0})
        for name in counts:
            counts[name] += number(cell.get(name))
    return sums


def task_sections(records: Sequence[Record]) -> list[Section]:
    """A table for each model."""
    titles = ["task", "metric", "setting", "items", "score", "dense", "difference", "lost", "gained", "p (paired)"]
    blocks = []
    for title, group in runs_of(records, "tasks").items():
        outside = ["outside the window"] if any("outside_window" in record.figures for record in group) else []
        named = sorted(zip(_tasks(group), group, strict=True), key=lambda pair: pair[0])
        rows = [_row(name, record, len(titles) + len(outside)) for name, record in named]
        blocks.append(Block(title or "Tasks", ([*titles, *outside], rows), group))
    return [Section("Tasks", blocks, TASKS_NOTE)]


def image_sections(records: Sequence[Record]) -> list[Section]:
    """A table for each set of images."""
    return [Section("Images", _by_setting(records, "images", IMAGES), IMAGES_NOTE)]


def other_sections(records: Sequence[Record], drawn: Sequence[str]) -> list[Section]:
    """A section for each suite that is not `drawn` elsewhere: its figures by setting."""
    sections = []
    for suite in dict.fromkeys(record.suite for record in records if record.suite not in drawn):
        columns = [Column(name.replace("_", " "), name, "z.4g") for name in SUITES[suite].figures]
        sections.append(Section(suite.replace("_", " ").capitalize(), _by_setting(records, suite, columns)))
    return sections


def _by_setting(records: Sequence[Record], suite: str, columns: Sequence[Column]) -> list[Block]:
    titles, blocks = ["setting", *(column.title for column in columns)], []
    for title, group in runs_of(records, suite).items():
        rows = [[name_of(record), *cells(record.figures, columns)] for record in group]
        blocks.append(Block(title or suite, (titles, rows), group))
    return blocks


def _tasks(group: Sequence[Record]) -> list[str]:
    """The task of each; one that was asked in several ways is told apart by examples, file or questions."""
    own = []
    for record in group:
        facts = facts_of_run(record)
        own.append({"task": str(record.figures["task"])} | {name: facts[name] for name in OF_A_TASK if name in facts})
    distinct = list({tuple(facts.items()): facts for facts in own}.values())
    names = told_apart([facts["task"] for facts in distinct], distinct)
    return [names[distinct.index(facts)] for facts in own]


def _row(name: str, record: Record, width: int) -> list[str]:
    """The cells of one task, `width` of them; dense has nothing to compare with."""
    result = record.figures
    score, dense = number(result["value"]), number(result.get("dense"))
    words = [name, result["metric"], name_of(record), count(result.get("count"))]
    words.append(f"{percent(score)} ± {percent(result.get('stderr'))}")
    if record.setting is not None:
        words += [percent(dense), percent(score - dense, sign=True), *cells(result, PAIRED)]
        words += [percent(result["outside_window"])] if "outside_window" in result else []
    return words + [""] * (width - len(words))
