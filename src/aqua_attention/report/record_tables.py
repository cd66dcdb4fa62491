# SPDX-License-Identifier: Apache-2.0
"""Records (`evaluate/records.py`) as rows of words: lists, and matrices of one label against another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aqua_attention.report.tables import Table, describe_setting

Record = dict[str, Any]


def record_table(records: Sequence[Record]) -> Table:
    """A row a record: its figures, or why there are none."""
    titles = ["suite", "setting", "result", "to dense", "besides"]
    return titles, [[record["suite"], record_setting(record), *_figures(record)] for record in records]


def record_setting(record: Record) -> str:
    """One line that names a record's setting, such as "k_ratio 0.5, weighted"; "dense" without one."""
    config = record["config"]
    return "dense" if config is None else describe_setting(config, record["basis"])


def transfer_tables(records: Sequence[Record]) -> list[Table]:
    """For each setting: loss by domain of calibration (rows) and of test (columns), and the subspaces' distances."""
    tables = []
    for setting, group in _by_setting(records).items():
        loss, distance = f"{setting}; calibrated on", "distance of the leading dimensions"
        pairs = [(record["options"]["calibrated"]["name"], record["options"]["tested"]["name"]) for record in group]
        tables.append(_matrix(loss, "tested on", pairs, group, _loss))
        tables.append(_matrix(distance, "from", pairs, group, _distance))
    return tables


def context_tables(records: Sequence[Record]) -> list[Table]:
    """For each setting: loss by calibration (length, tokens) in rows, and length tested in columns."""
    tables = []
    for setting, group in _by_setting(records).items():
        pairs = []
        for record in group:
            learned = record["options"]["calibrated"]
            row = f"{learned['tokens']} tokens in windows of {learned['context']}"
            pairs.append((row, str(record["options"]["context"])))
        tables.append(_matrix(f"{setting}; calibrated on", "windows of", pairs, group, _loss))
    return tables


def reasons(records: Sequence[Record]) -> list[str]:
    """Why records have no figures: a line for each reason, with how many have it."""
    counts: dict[str, int] = {}
    for record in records:
        if "error" in record:
            line = f"{_failure(record)}: {record['error']['message']}"
            counts[line] = counts.get(line, 0) + 1
    return [line if count == 1 else f"{line} ({count} records)" for line, count in counts.items()]


def _by_setting(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record_setting(record), []).append(record)
    return groups


def _matrix(
    title: str,
    across: str,
    pairs: Sequence[tuple[str, str]],
    records: Sequence[Record],
    cell: Callable[[Record], str],
) -> Table:
    cells = {pair: cell(record) for pair, record in zip(pairs, records, strict=True)}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    return [title, *(f"{across} {column}" for column in columns)], [
        [row, *(cells.get((row, column), "") for column in columns)] for row in rows
    ]


def _figures(record: Record) -> list[str]:
    if "error" in record:
        return [_failure(record), "", record["error"]["message"]]
    result = record["result"]
    if record["suite"] == "retention":
        return [f"scores {result['score_loss']:.2%} lost", "", f"softmax {result['softmax_loss']:.2%} lost"]
    if "cells" in result:
        right = f"{result['right']}/{result['asked']} right"
        if record["config"] is None:
            return [right, "", ""]
        return [right, f"{result['lost']} lost, {result['gained']} gained", f"p {result['p_value']:.2g}"]
    perplexity = f"perplexity {result['perplexity']:.3f}"
    if record["config"] is None:
        return [perplexity, "", f"{result['tokens']} predictions"]
    besides = f"KL {result['kl']:.4f}, same top token {result['top1']:.1%}, products {result['mean_k']:.0%}"
    return [perplexity, f"{result['perplexity_change']:+.2%}", besides]


def _failure(record: Record) -> str:
    return "out of memory" if record["error"]["kind"] == "out_of_memory" else "refused"


def _loss(record: Record) -> str:
    if "error" in record:
        return _failure(record)
    return f"{record['result']['perplexity_change']:+.2%} (KL {record['result']['kl']:.4f})"


def _distance(record: Record) -> str:
    return _failure(record) if "error" in record else f"{record['result']['distance']:.3f}"
