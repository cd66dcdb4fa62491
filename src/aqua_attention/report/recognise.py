# SPDX-License-Identifier: Apache-2.0
"""What is in a file of results, as records: a grid's, or the figures of a command for several settings.

A command's file says its suite. One of an older version does not, and is known by its keys.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aqua_attention.evaluate.record import Record, Unusable, check_schema, read_setting, short
from aqua_attention.evaluate.suites import RETRIEVAL, SUITES
from aqua_attention.report.tables import row_name

DETAILS = "command version versions commit device dtype started projections calibration_tokens key_weights".split()
PROJECTIONS = {"projections", "projections_sha256", "calibration_tokens"}
SOURCE_KEYS = "data context tokens seed needles questions_file chat scored length batch limit quick images".split()
OF_COMMANDS = ("rows", "results", "layers", "records")
"""What holds the figures of a command; a record of a grid has them in `result`."""
OWN_KEYS = {"settings", "failed", "unused", "written"}
"""Of what `aqua report --json` writes, whatever else stands beside them."""
BENCHMARKS = {"generate": "weight_bytes", "decode": "read_bandwidth", "breakeven": "breakeven"}
"""Keys by which the files of older versions are known, and those of evaluations by a key of their rows."""
EVALUATIONS = {"retention": "score_loss", "tasks": "metric", "perplexity": "perplexity", "images": "same_neighbour"}

_File = dict[str, Any]


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
        check_schema(value)
        if not any(isinstance(value.get(name), list) for name in OF_COMMANDS):
            return _of_grid(value, source)
    if isinstance(value.get("records"), list):
        if not all(isinstance(each, dict) for each in value["records"]):
            raise Unusable("its records are not all objects")
        return [record for each in value["records"] for record in _of_grid(each, source)]
    if isinstance(value.get("results"), list):
        # Several sizes of one benchmark.
        shared = {name: each for name, each in value.items() if name != "results"}
        return [record for each in value["results"] for record in _of_command(each, shared, source)]
    return _of_command(value, {}, source)


def is_own_summary(value: Any) -> bool:
    """Whether a file's value is what `aqua report --json` wrote."""
    return isinstance(value, dict) and set(value) >= OWN_KEYS


def _of_grid(value: _File, source: str) -> list[Record]:
    record = Record.read(value, source)
    rows = record.result.get("rows") if isinstance(record.result, dict) else None
    if record.suite in SUITES and SUITES[record.suite].apart and isinstance(rows, list):
        return [replace(record, result=row).checked() for row in rows]
    return [record.checked()]


def _of_command(value: Any, shared: _File, source: str) -> list[Record]:
    if not isinstance(value, dict):
        raise Unusable("one of its results is no object")
    value = shared | value
    suite = value["suite"] if isinstance(value.get("suite"), str) else _guessed(value)
    if suite in READERS and not _are_rows(value.get("rows")):
        raise Unusable(f"its rows is {short(value.get('rows'))}, not a list of objects")
    return READERS.get(suite, _whole)(suite, value, source)


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _guessed(value: _File) -> str:
    """The suite of a file that does not say it."""
    if isinstance(value.get("layers"), list):
        return "spectrum"
    if found := [suite for suite, key in BENCHMARKS.items() if key in value]:
        return found[0]
    rows: Any = value.get("rows")
    if not _are_rows(rows):
        raise Unusable("it is no result of this library: neither a record nor what `aqua eval` and `aqua bench` write")
    if "questions" in value:
        questions = value["questions"]
        first = questions[0] if isinstance(questions, list) and questions else None
        return "lines" if isinstance(first, dict) and "lines" in first else "needle"
    for suite, key in EVALUATIONS.items():
        if key in rows[0]:
            return suite
    if "setting" in rows[0] and "length" in value:
        return "memory"
    raise Unusable("it is no result of this library: its keys are those of no benchmark")


def _record(suite: str, value: _File, source: str, result: Any, **fields: Any) -> Record:
    """A record whose options and details are those of its file."""
    model = value.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    details = {name: value[name] for name in value if name in DETAILS or name.endswith("_sha256")}
    fields["options"] = {name: value[name] for name in SOURCE_KEYS if value.get(name) is not None}
    record = Record(suite, name if isinstance(name, str) else "", result=result, source=source, **fields).checked()
    # As in a grid, dense attention is the same whatever the projections.
    named = PROJECTIONS & details.keys() if record.is_dense else ()
    return replace(record, details=details | dict.fromkeys(named))


def _rows(suite: str, value: _File, source: str) -> list[Record]:
    """A record for each row, and before them those of the dense model, if there are any."""
    dense, tasks = value.get("dense"), value.get("tasks")
    rows: list[_File] = value["rows"]
    if suite == "perplexity":
        if not isinstance(dense, dict):
            raise Unusable(f"its dense is {short(dense)}, not an object: it has nothing to compare with")
        rows = [dense, *(row | {"dense": dense} for row in rows)]
    elif isinstance(dense, list):
        rows = [*(row for row in dense if isinstance(row, dict)), *rows]
    found = []
    for row in rows:
        setting = read_setting(row.get("setting", row.get("config")))
        basis = str(row.get("basis") or value.get("basis") or "aqua")
        record = _record(suite, value, source, row, setting=setting, basis=basis)
        # A task's own options: file, digest of its questions and examples given.
        task: Any = tasks.get(row.get("task")) if isinstance(tasks, dict) else None
        names = {"few_shot": "few_shot", "path": "file", "sha256": "file_sha256"} if isinstance(task, dict) else {}
        own = {word: task[name] for name, word in names.items() if task.get(name) is not None}
        found.append(replace(record, options=record.options | own))
    return found


def _whole(suite: str, value: _File, source: str) -> list[Record]:
    return [_record(suite, value, source, value)]


def _images(suite: str, value: _File, source: str) -> list[Record]:
    layers = value.get("retention")
    layers = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    return [*_rows(suite, value, source), *_rows("retention", value | {"rows": layers}, source)]


def _retrieval(suite: str, value: _File, source: str) -> list[Record]:
    """Needle, lines or RULER: how many are right in each cell follows from the questions."""
    questions: Any = value.get("questions")
    rows, column, title = value["rows"], SUITES[suite].cells, SUITES[suite].rows[0].title
    names = (column, title or "depth")
    try:
        labels = [(question[column], question.get(names[1])) for question in questions]
        marks = [question["correct"] for question in questions]
        lengths = {len(row) for row in marks}
    except (TypeError, KeyError, IndexError, AttributeError):
        lengths = set()
    if not lengths:
        raise Unusable("its questions are damaged")
    if title and (odd := [each for _, each in labels if not isinstance(each, str)]):
        raise Unusable(f"a question has {title} {short(odd[0])}, not a text")
    numeric = [each for pair in labels for each in pair[: 1 if title else 2]]
    if odd := [each for each in numeric if each is not None and not isinstance(each, (int, float))]:
        raise Unusable(f"a question has length, depth or lines {short(odd[0])}, not a number")
    if lengths != {len(rows) + 1}:
        raise Unusable("its questions have not an answer for each setting")

    def result(place: int) -> _File:
        cells: dict[Any, list[float]] = {label: [0, 0] for label in labels}
        for label, row in zip(labels, marks, strict=True):
            cells[label][0] += _mark(row[place])
            cells[label][1] += 1
        counted = [dict(zip(names, at, strict=True)) | _counts(*each) for at, each in cells.items()]
        return {"cells": counted} | _counts(sum(_mark(row[place]) for row in marks), len(marks))

    counted = [row | result(place) for place, row in enumerate(rows, 1)]
    return _rows(suite, value | {"dense": [result(0)], "rows": counted}, source)


def _mark(value: Any) -> float:
    """How right an answer is: a share, or whether it is right."""
    return value if isinstance(value, float) else bool(value)


def _counts(right: float, asked: float) -> _File:
    return {"right": round(right, 4), "asked": asked}


def _memory(suite: str, value: _File, source: str) -> list[Record]:
    """Rows are named by words, also ours."""
    rows = [dict(row) for row in value["rows"]]
    for row in rows:
        if isinstance(row.get("setting"), dict):
            row["setting"] = row_name({"setting": read_setting(row["setting"])})
    return _whole(suite, value | {"rows": rows}, source)


READERS: dict[str, Callable[[str, _File, str], list[Record]]] = {
    **dict.fromkeys(("perplexity", "retention", "tasks"), _rows),
    **dict.fromkeys(RETRIEVAL, _retrieval),
    "images": _images,
    "memory": _memory,
}
"""By suite; of the others, the whole file is one result."""
