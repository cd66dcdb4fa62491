# SPDX-License-Identifier: Apache-2.0
"""Tasks: scores with standard errors, dense and AQUA on the same items."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.report.document import Block, Section, commands_of, data_of, grouped, name_of, percent, plain
from aqua_attention.report.record import Record, number

NOTE = (
    "± one standard error. Difference: in percentage points, to dense on the same items. Lost and gained: items that "
    "only dense, only AQUA got right; p: a paired test of the two. p-values are one for each setting, not corrected "
    "for asking several times."
)


def task_sections(records: Sequence[Record]) -> list[Section]:
    """A table for each model."""
    titles = ["task", "metric", "setting", "items", "score", "dense", "difference", "lost", "gained", "p (paired)"]
    blocks = []
    for title, group in grouped(records, "tasks", data_of).items():
        rows = [_row(record) for record in sorted(group, key=lambda r: str((r.result or {}).get("task")))]
        blocks.append(Block(title or "Tasks", "", (titles, rows), commands_of(group)))
    return [Section("Tasks", NOTE, blocks)] if blocks else []


def _row(record: Record) -> list[str]:
    result = record.result
    assert result is not None
    score, error, dense = (number(result.get(name)) for name in ("value", "stderr", "dense"))
    words = [result["task"], result["metric"], name_of(record), plain(number(result.get("count")), ".0f")]
    words.append(f"{percent(score)} ± {percent(error)}")
    if record.setting is None:
        return [*words, "", "", "", "", ""]
    words += [percent(dense), percent(score - dense, 1, sign=True)]
    forms = (("lost", ".0f"), ("gained", ".0f"), ("p_value", ".2g"))
    return words + [plain(number(result.get(name)), form) for name, form in forms]
