# SPDX-License-Identifier: Apache-2.0
"""Records of a grid as rows of words: lists, and matrices of one label against another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from aqua_attention.evaluate.record import Record
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import name_of
from aqua_attention.report.tables import Table


def record_table(records: Sequence[Record]) -> Table:
    """A row a record: its figures, or why there are none."""
    titles = ["suite", "setting", "result", "to dense", "besides"]
    return titles, [[record.suite, name_of(record), *_figures(record)] for record in records]


def transfer_tables(records: Sequence[Record]) -> list[Table]:
    """For each setting: loss by domain of calibration (rows) and of test (columns), and the subspaces' distances."""

    def names(record: Record) -> tuple[str, str]:
        return record.options["calibrated"]["name"], record.options["tested"]["name"]

    tables = []
    for setting, group in _by_setting(records).items():
        tables.append(_matrix(f"{setting}; calibrated on", "tested on", names, group, _loss))
        tables.append(_matrix("distance of the leading dimensions", "from", names, group, _distance))
    return tables


def context_tables(records: Sequence[Record]) -> list[Table]:
    """For each setting: loss by calibration (length, tokens) in rows, and length tested in columns."""

    def names(record: Record) -> tuple[str, str]:
        learned = record.options["calibrated"]
        return f"{learned['tokens']} tokens in windows of {learned['context']}", str(record.options["context"])

    groups = _by_setting(records).items()
    return [_matrix(f"{setting}; calibrated on", "windows of", names, group, _loss) for setting, group in groups]


def reasons(records: Sequence[Record]) -> list[str]:
    """Why records have no figures: a line for each reason, with how many have it."""
    lines = [f"{failure(record)}: {record.error['message']}" for record in records if record.error is not None]
    return [line if count == 1 else f"{line} ({count} records)" for line, count in Counter(lines).items()]


def failure(record: Record) -> str:
    """In two words, why a record has no figures."""
    kind = (record.error or {}).get("kind", "error")
    return {"out_of_memory": "out of memory", "error": "refused"}.get(kind, kind)


def _by_setting(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(name_of(record), []).append(record)
    return groups


def _matrix(
    title: str,
    across: str,
    names: Callable[[Record], tuple[str, str]],
    records: Sequence[Record],
    cell: Callable[[Record], str],
) -> Table:
    cells = {names(record): cell(record) for record in records}
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*map(names, records), strict=True))
    return [title, *(f"{across} {column}" for column in columns)], [
        [row, *(cells.get((row, column), "") for column in columns)] for row in rows
    ]


def _figures(record: Record) -> list[str]:
    if record.error is not None:
        return [failure(record), "", record.error["message"]]
    result = record.figures
    if "score_loss" in result:
        return [f"scores {result['score_loss']:.2%} lost", "", f"softmax {result['softmax_loss']:.2%} lost"]
    if "cells" in result:
        right = f"{result['right']}/{result['asked']} right"
        if record.setting is None:
            return [right, "", ""]
        return [right, f"{result['lost']} lost, {result['gained']} gained", f"p {result['p_value']:.2g}"]
    if "perplexity" not in result:
        words = [f"{name} {result[name]:.4g}" for name in SUITES[record.suite].figures]
        return [", ".join(words), "", ""]
    perplexity = f"perplexity {result['perplexity']:.3f}"
    if record.setting is None:
        return [perplexity, "", f"{result['tokens']} predictions"]
    besides = f"KL {result['kl']:.4f}, same top token {result['top1']:.1%}, products {result['mean_k']:.0%}"
    return [perplexity, f"{result['perplexity_change']:+.2%}", besides]


def _loss(record: Record) -> str:
    if record.result is None:
        return failure(record)
    return f"{record.figures['perplexity_change']:+.2%} (KL {record.figures['kl']:.4f})"


def _distance(record: Record) -> str:
    return failure(record) if record.result is None else f"{record.figures['distance']:.3f}"
