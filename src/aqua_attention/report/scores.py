# SPDX-License-Identifier: Apache-2.0
"""Tasks: scores with standard errors, dense and AQUA on the same items."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.report.document import Block, Section, commands_of, name_of, percent, plain
from aqua_attention.report.record import Record, number
from aqua_attention.report.runs import OF_A_TASK, facts_of_run, runs_of, told_apart

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
        outside = any(record.result and "outside_window" in record.result for record in group)
        named = sorted(zip(_tasks(group), group, strict=True), key=lambda pair: pair[0])
        rows = [_row(name, record)[: None if outside else -1] for name, record in named]
        used = [*titles, "outside the window"] if outside else titles
        blocks.append(Block(title or "Tasks", "", (used, rows), commands_of(group)))
    return [Section("Tasks", NOTE, blocks)] if blocks else []


def _tasks(group: Sequence[Record]) -> list[str]:
    """The task of each; one that was asked in several ways is told apart by examples, file or questions."""
    own = []
    for record in group:
        facts = facts_of_run(record)
        own.append(
            {"task": str((record.result or {})["task"])} | {name: facts[name] for name in OF_A_TASK if name in facts}
        )
    distinct = list({tuple(facts.items()): facts for facts in own}.values())
    names = told_apart([facts["task"] for facts in distinct], distinct)
    return [names[distinct.index(facts)] for facts in own]


def _row(name: str, record: Record) -> list[str]:
    result = record.result
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
