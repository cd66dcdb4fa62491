# SPDX-License-Identifier: Apache-2.0
"""Records of a grid as rows of words: lists, and matrices of one label against another."""

from collections import Counter
from collections.abc import Callable, Sequence

from aqua_attention.evaluate.record import Record
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import name_of, right_of
from aqua_attention.report.tables import Table, matrix


def record_table(records: Sequence[Record]) -> Table:
    """A row a record: its figures, or why there are none."""
    titles = ["suite", "setting", "result", "to dense", "besides"]
    return titles, [[record.suite, name_of(record), *_figures(record)] for record in records]


def transfer_tables(records: Sequence[Record]) -> list[Table]:
    """For each setting: loss by domain of calibration (rows) and of test (columns), and the subspaces' distances."""
    tables = []
    for setting, group in _by_setting(records).items():
        tables.append(_matrix(f"{setting}; calibrated on", "tested on", group))
        distance = "distance of the leading dimensions"
        tables.append(_matrix(distance, "from", group, lambda record: f"{record.figures['distance']:.3f}"))
    return tables


def context_tables(records: Sequence[Record]) -> list[Table]:
    """For each setting: loss by calibration (length, tokens) in rows, and length tested in columns."""
    groups = _by_setting(records).items()
    return [_matrix(f"{setting}; calibrated on", "windows of", group) for setting, group in groups]


def reasons(records: Sequence[Record]) -> list[str]:
    """Why records have no figures: a line for each reason, with how many have it."""
    lines = Counter(reason(record) for record in records if record.error is not None)
    return [line if count == 1 else f"{line} ({count} records)" for line, count in lines.items()]


def reason(record: Record) -> str:
    """Why a record has no figures."""
    return f"{_failure(record)}: {(record.error or {})['message']}"


def _failure(record: Record) -> str:
    """The same in two words."""
    kind = (record.error or {}).get("kind", "error")
    return {"out_of_memory": "out of memory", "error": "refused"}.get(kind, kind)


def _by_setting(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(name_of(record), []).append(record)
    return groups


def _loss(record: Record) -> str:
    return f"{record.figures['perplexity_change']:+.2%} (KL {record.figures['kl']:.4f})"


def _places(record: Record) -> tuple[str, str]:
    """Row and column of a record."""
    options, learned = record.options, record.options["calibrated"]
    if record.suite == "transfer":
        return learned["name"], options["tested"]["name"]
    return f"{learned['tokens']} tokens in windows of {learned['context']}", str(options["context"])


def _matrix(title: str, across: str, records: Sequence[Record], cell: Callable[[Record], str] = _loss) -> Table:
    cells = {}
    for record in records:
        row, column = _places(record)
        cells[row, f"{across} {column}"] = _failure(record) if record.result is None else cell(record)
    return matrix(title, cells)


def _figures(record: Record) -> list[str]:
    """Result, compared with dense, and besides."""
    if record.error is not None:
        return [_failure(record), "", record.error["message"]]
    result, dense = record.figures, record.setting is None
    if "score_loss" in result:
        return [f"scores {result['score_loss']:.2%} lost", "", f"softmax {result['softmax_loss']:.2%} lost"]
    if "cells" in result:
        right = f"{right_of(result)} right"
        if dense:
            return [right, "", ""]
        return [right, f"{result['lost']} lost, {result['gained']} gained", f"p {result['p_value']:.2g}"]
    if "perplexity" not in result:
        return [", ".join(f"{name} {result[name]:.4g}" for name in SUITES[record.suite].figures), "", ""]
    perplexity = f"perplexity {result['perplexity']:.3f}"
    if dense:
        return [perplexity, "", f"{result['tokens']} predictions"]
    besides = f"KL {result['kl']:.4f}, same top token {result['top1']:.1%}, products {result['mean_k']:.0%}"
    return [perplexity, f"{result['perplexity_change']:+.2%}", besides]
