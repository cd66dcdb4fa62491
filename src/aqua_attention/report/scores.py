# SPDX-License-Identifier: Apache-2.0
"""What is told by a table alone: the scores of tasks, embeddings of images, and suites that have no drawing."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import Block, Section, commands_of, name_of, percent, plain
from aqua_attention.report.runs import OF_A_TASK, facts_of_run, runs_of, told_apart

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
        outside = any("outside_window" in record.figures for record in group)
        named = sorted(zip(_tasks(group), group, strict=True), key=lambda pair: pair[0])
        rows = [_row(name, record)[: None if outside else -1] for name, record in named]
        used = [*titles, "outside the window"] if outside else titles
        blocks.append(Block(title or "Tasks", "", (used, rows), commands_of(group)))
    return [Section("Tasks", NOTE, blocks)] if blocks else []


def image_sections(records: Sequence[Record]) -> list[Section]:
    """A table for each set of images."""
    titles = ["setting", "products outside the window", "mean cosine", "lowest cosine", "same neighbour"]
    blocks = []
    for title, group in runs_of(records, "images").items():
        rows = []
        for record in group:
            names = ("mean_k", "mean_cosine", "lowest_cosine", "same_neighbour")
            kept, mean, lowest, same = (number(record.figures.get(name)) for name in names)
            rows.append([name_of(record), percent(kept, 0), plain(mean, ".4f"), plain(lowest, ".4f"), percent(same)])
        blocks.append(Block(title or "Images", "", (titles, rows), commands_of(group)))
    return [Section("Images", IMAGES_NOTE, blocks)] if blocks else []


def other_sections(records: Sequence[Record], drawn: Sequence[str]) -> list[Section]:
    """A section for each suite that is not `drawn` elsewhere: its figures by setting."""
    sections = []
    for suite in dict.fromkeys(record.suite for record in records if record.suite not in drawn):
        figures, blocks = SUITES[suite].figures, []
        for title, group in runs_of(records, suite).items():
            rows = [[name_of(r), *(plain(number(r.figures.get(name)), ".4g") for name in figures)] for r in group]
            titles = ["setting", *(name.replace("_", " ") for name in figures)]
            blocks.append(Block(title or suite, "", (titles, rows), commands_of(group)))
        sections.append(Section(suite.replace("_", " ").capitalize(), "", blocks))
    return sections


def _tasks(group: Sequence[Record]) -> list[str]:
    """The task of each; one that was asked in several ways is told apart by examples, file or questions."""
    own = []
    for record in group:
        facts = facts_of_run(record)
        own.append({"task": str(record.figures["task"])} | {name: facts[name] for name in OF_A_TASK if name in facts})
    distinct = list({tuple(facts.items()): facts for facts in own}.values())
    names = told_apart([facts["task"] for facts in distinct], distinct)
    return [names[distinct.index(facts)] for facts in own]


def _row(name: str, record: Record) -> list[str]:
    result = record.figures
    assert result is not None
    score, error, dense = (number(result.get(name)) for name in ("value", "stderr", "dense"))
    words = [name, result["metric"], name_of(record), plain(number(result.get("count")), ".0f")]
    words.append(f"{percent(score)} ± {percent(error)}")
    if record.setting is None:
        return [*words, "", "", "", "", "", ""]
    words += [percent(dense), percent(score - dense, 1, sign=True)]
    forms = (("lost", ".0f"), ("gained", ".0f"), ("p_value", ".2g"))
    words += [plain(number(result.get(name)), form) for name, form in forms]
    return [*words, percent(number(result["outside_window"])) if "outside_window" in result else ""]
