# SPDX-License-Identifier: Apache-2.0
"""What the commands write with --json, known by its keys, as records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import CALIBRATING, KEY_FIELDS
from aqua_attention.report.record import Record, Unusable, checked, short
from aqua_attention.report.tables import describe_setting

SCHEMA = 1
DETAILS = (
    "version commit versions device dtype seed started seconds projections_sha256 text_sha256 inputs_sha256".split()
)
SOURCE_KEYS = "data context tokens seed needles chat scored length batch limit quick images".split()
OWN_KEYS = {"settings", "failed", "unused", "written"}
"""Of what `aqua report --json` writes."""


def records_of(value: Any, source: str) -> list[Record]:
    """The records in one file's value: one of the grid's, a list of them, or the figures of another command.

    Args:
        source: the file's name.

    Raises:
        Unusable: it is nothing that we know, or damaged.
    """
    if not isinstance(value, dict):
        raise Unusable(f"it holds a {type(value).__name__}, not an object")
    if "schema" in value:
        return read_record(value, source)
    if isinstance(value.get("records"), list):
        if not all(isinstance(each, dict) for each in value["records"]):
            raise Unusable("its records are not all objects")
        return [record for each in value["records"] for record in read_record(each, source)]
    if isinstance(value.get("results"), list):
        return [_benchmark(each, source) for each in value["results"]]
    if isinstance(value.get("layers"), list):
        model = value.get("model")
        return [_record("spectrum", source, {"model": model.get("name") if isinstance(model, dict) else model}, value)]
    rows = value.get("rows")
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise Unusable("it is no result of this library: neither a record nor what `aqua eval` and `aqua bench` write")
    if "questions" in value:
        return _retrieval(value, source)
    if "score_loss" in rows[0]:
        given = _record("retention", source, value, None)
        return [
            checked(replace(given, result=row, basis=str(row.get("basis") or value.get("basis") or "aqua")))
            for row in rows
        ]
    if "task" in rows[0] and "metric" in rows[0]:
        dense = value.get("dense")
        dense = [row for row in dense if isinstance(row, dict)] if isinstance(dense, list) else []
        return [_of_task(_setting_row("tasks", source, value, row), value.get("tasks")) for row in (*dense, *rows)]
    if "perplexity" in rows[0]:
        return _perplexity(value, source)
    if "same_neighbour" in rows[0]:
        return _images(value, source)
    if "setting" in rows[0] and "length" in value:
        return [_memory(value, source)]
    return [_benchmark(value, source)]


def read_record(value: dict[str, Any], source: str) -> list[Record]:
    """One record in the grid's format; several where its result has a row for each ratio or task.

    Raises:
        Unusable: another version of the format, or a field is missing or of the wrong kind.
    """
    if value.get("schema") != SCHEMA:
        raise Unusable(f"its schema is {value.get('schema')!r}, this version reads {SCHEMA}")
    for name, kind in (("suite", str), ("model", str), ("options", dict)):
        if not isinstance(value.get(name), kind):
            raise Unusable(f"its {name} is {short(value.get(name))}, not {'a text' if kind is str else 'an object'}")
    result, error = value.get("result"), value.get("error")
    if (result is None) == (error is None):
        raise Unusable("it must have either a result or an error")
    if error is not None:
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            raise Unusable("its error has no message")
        error = {"kind": str(error.get("kind", "error")), "message": error["message"]}
    command = value.get("command")
    record = Record(
        suite=value["suite"],
        source=source,
        model=value["model"],
        setting=read_setting(value.get("config")),
        basis=str(value.get("basis") or "aqua"),
        options=value["options"],
        result=result,
        error=error,
        command=command if isinstance(command, str) else None,
        details=_details(value),
        key=_key(value),
    )
    if record.suite in ("retention", "tasks") and isinstance(result, dict) and isinstance(result.get("rows"), list):
        return [checked(replace(record, result=row)) for row in result["rows"]]
    return [checked(record)]


def read_setting(value: Any) -> dict[str, Any] | None:
    """The fields of an AquaConfig, all of them, also where an older version wrote fewer.

    Raises:
        Unusable: they are none, or a value is out of range.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Unusable(f"its config is {short(value)}, not an object")
    fields = {name: each for name, each in value.items() if name != "effective_ratio"}
    try:
        return AquaConfig(**fields).to_dict()
    except AquaError as error:
        raise Unusable(f"its config is wrong: {error}") from error
    except TypeError:
        known = set(AquaConfig().to_dict())
        unknown = ", ".join(sorted(set(fields) - known)) or "of the wrong kind"
        raise Unusable(f"its config has fields that this version does not know: {unknown}") from None


def is_own_summary(value: Any) -> bool:
    """Whether a file's value is what `aqua report --json` wrote."""
    return isinstance(value, dict) and set(value) == OWN_KEYS


def _key(value: dict[str, Any]) -> str:
    """What makes two records the same measurement, whatever came out: see `evaluate.records`."""
    names = [name for name in KEY_FIELDS if not (name == "projections_sha256" and value["suite"] in CALIBRATING)]
    return json.dumps({name: value.get(name) for name in names}, sort_keys=True)


def _details(given: dict[str, Any]) -> dict[str, Any]:
    """`DETAILS`, and whatever else has a digest."""
    known = {name: given[name] for name in DETAILS if given.get(name) is not None}
    return known | {name: value for name, value in given.items() if name.endswith("_sha256") and isinstance(value, str)}


def _record(suite: str, source: str, given: dict[str, Any], result: Any) -> Record:
    options = {name: given[name] for name in SOURCE_KEYS if given.get(name) is not None}
    details = {name: each for name, each in _details(given).items() if isinstance(each, str)}
    model = given.get("model")
    model = model if isinstance(model, str) else ""
    return checked(Record(suite, source, model, None, options=options, result=result, details=details))


def _setting_row(suite: str, source: str, given: dict[str, Any], row: dict[str, Any]) -> Record:
    """A row that has its own `setting` and `basis`."""
    record = _record(suite, source, given, None)
    basis = str(row.get("basis") or "aqua")
    setting = read_setting(row.get("setting", row.get("config")))
    return checked(
        Record(suite, source, record.model, setting, basis, record.options, row, details=record.details),
    )


def _perplexity(value: dict[str, Any], source: str) -> list[Record]:
    dense = value.get("dense")
    if not isinstance(dense, dict):
        raise Unusable(f"its dense is {short(dense)}, not an object: it has nothing to compare with")
    rows = [_setting_row("perplexity", source, value, row | {"dense": dense}) for row in value["rows"]]
    return [_record("perplexity", source, value, dense), *rows]


def _images(value: dict[str, Any], source: str) -> list[Record]:
    given, layers = _record("retention", source, value, None), value.get("retention")
    layers = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    return [
        *(_setting_row("images", source, value, row) for row in value["rows"]),
        *(checked(replace(given, result=row, basis=str(row.get("basis") or "aqua"))) for row in layers),
    ]


def _of_task(record: Record, tasks: Any) -> Record:
    """With the task's own options: file, digest of its questions and examples given."""
    result = record.result
    task = tasks.get(result["task"]) if isinstance(tasks, dict) and result else None
    if not isinstance(task, dict):
        return record
    names = {"few_shot": "few_shot", "path": "file", "sha256": "file_sha256"}
    own = {words: task[name] for name, words in names.items() if task.get(name) is not None}
    return replace(record, options=record.options | own)


def _retrieval(value: dict[str, Any], source: str) -> list[Record]:
    """Needle or lines: how many are right in each cell follows from the questions."""
    questions, rows = value["questions"], value["rows"]
    try:
        suite = "lines" if "lines" in questions[0] else "needle"
        labels = [(q[("lines" if suite == "lines" else "length")], q.get("depth")) for q in questions]
        marks = [q["correct"] for q in questions]
        if odd := [each for pair in labels for each in pair if each is not None and not isinstance(each, (int, float))]:
            raise Unusable(f"a question has length, depth or lines {short(odd[0])}, not a number")
        if any(len(row) != len(rows) + 1 for row in marks):
            raise Unusable("its questions have not an answer for each setting")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise Unusable("its questions are damaged") from None

    def result(column: int) -> dict[str, Any]:
        cells = {label: [0, 0] for label in labels}
        for label, row in zip(labels, marks, strict=True):
            cells[label][0] += bool(row[column])
            cells[label][1] += 1
        key = "lines" if suite == "lines" else "length"
        return {
            "cells": [{key: a, "depth": b, "right": right, "asked": asked} for (a, b), (right, asked) in cells.items()],
            "right": sum(bool(row[column]) for row in marks),
            "asked": len(marks),
        }

    dense = _record(suite, source, value, result(0))
    return [
        dense,
        *(_setting_row(suite, source, value, row | result(place)) for place, row in enumerate(rows, 1)),
    ]


def _memory(value: dict[str, Any], source: str) -> Record:
    """Rows are named by words, also ours."""

    def named(row: dict[str, Any]) -> dict[str, Any]:
        setting = row.get("setting")
        fields = read_setting(setting) if isinstance(setting, dict) else None
        return row | {"setting": setting if fields is None else f"AQUA, {describe_setting(fields)}"}

    return _record("memory", source, value, value | {"rows": [named(row) for row in value["rows"]]})


def _benchmark(value: Any, source: str) -> Record:
    if not isinstance(value, dict):
        raise Unusable("one of its results is no object")
    for suite, key in (("generate", "weight_bytes"), ("decode", "read_bandwidth"), ("breakeven", "breakeven")):
        if key in value:
            return _record(suite, source, value, value)
    raise Unusable("it is no result of this library: its keys are those of no benchmark")
