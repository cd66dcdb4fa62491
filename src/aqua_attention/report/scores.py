# SPDX-License-Identifier: Apache-2.0
"""What is told by a table alone: the scores of tasks, embeddings of images, and suites that have no drawing."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import Block, Section, cells, count, name_of, percent
from aqua_attention.report.runs import OF_A_TASK, facts_of_run, runs_of, told_apart
from aqua_attention.report.tables import IMAGES, PAIRED, Column

IMAGES_NOTE = (
    "Cosine of each image's embedding to its dense one. Same neighbour: share of the images whose nearest other image "
    "is the one it was."
)
NOTE = (
    "± one standard error. Difference: in percentage points, to dense on the same items. Lost and gained: items that "
    "only dense, only AQUA got right; p: a paired test of the two. p-values are one for each setting, not corrected "
    "for asking several times. Outside the window: share of the prompts' query-key pairs outside the exact window; "
    "where it is 0%, AQUA leaves nothing out."
)


def task_sections(records: Sequence[Record]) -> list[Section]:
    """A table for each model."""
    titles = ["task", "metric", "setting", "items", "score", "dense", "difference", "lost", "gained", "p (paired)"]
    blocks = []
    for title, group in runs_of(records, "tasks").items():
        outside = ["outside the window"] if any("outside_window" in record.figures for record in group) else []
        named = sorted(zip(_tasks(group), group, strict=True), key=lambda pair: pair[0])
        rows = [_row(name, record, len(titles) + len(outside)) for name, record in named]
        blocks.append(Block(title or "Tasks", ([*titles, *outside], rows), group))
    return [Section("Tasks", blocks, NOTE)]


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
