# SPDX-License-Identifier: Apache-2.0
"""Tables of what was measured, written into README and docs/ from the records in results/.

python tools/pages/results.py     # writes them into the pages

**A record**, `results/NAME.json`, holds one table as measured:

| field | what it is |
|---|---|
| title, command | what is measured; the commands that measured it |
| model, data, dtype, device, versions, commit, digests | on what; null where there is none or none was recorded |
| measured | the day; or that of the commit which brought the figures, where only this is known |
| recorded_in | that commit; null where `commit` says what was measured |
| columns | for each: `heading`, and `cell`, a text with figures in braces; see `pages.cells` |
| rows | for each: `row`, its name, and figures. What has no figure stays empty |

A `cell` that is a list holds alternatives: the first whose figures are all there is written. Numbers keep the digits
that stand in the file. A ratio that the command printed is a figure like others, because it knew more digits.
`pages.record` makes the draft of a record from a command's `--json`.

**A short table**, `results/short/NAME.json`, has `title`, `columns` (headings) and `rows` of cells, with figures of
several records: `{memory_bytes['int8'].whole.ratio:.2f}`. It has no figures of its own.

A page shows either between the marks `begin results/NAME` and `end results/NAME` of `pages.marks`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import marks
from pages.cells import Absent, Wrong, names_in, written
from pages.files import ROOT, with_results

RESULTS = ROOT / "results"
MARK = "results/"
_FACTS = ("model", "data", "dtype", "device", "versions", "commit", "digests")
_RECORD = {"title": str, "command": list, "measured": str, "columns": list, "rows": list}
_SHORT = {"title": str, "columns": list, "rows": list}

Tables = dict[str, dict[str, Any]]


def load(folder: Path = RESULTS) -> tuple[Tables, Tables]:
    """The records and the short tables of a folder, by name.

    Raises:
        Wrong: a file is none of these, in one line.
    """
    records = {path.stem: _read(path, _RECORD, (*_FACTS, "recorded_in")) for path in sorted(folder.glob("*.json"))}
    for name, record in records.items():
        _check(name, record)
    short = {path.stem: _read(path, _SHORT, ()) for path in sorted((folder / "short").glob("*.json"))}
    for name, table in short.items():
        if name in records:
            raise Wrong(f"short/{name}.json has the name of a record")
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            raise Wrong(f"short/{name}.json: a row has not as many cells as there are columns")
        unknown = {each for row in table["rows"] for cell in row for each in names_in(cell)} - records.keys()
        if unknown:
            raise Wrong(f"short/{name}.json: there is no record {min(unknown)}")
    return records, short


def _read(path: Path, needed: Mapping[str, type], known: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(), parse_float=Decimal, parse_int=Decimal)
    except ValueError as error:
        raise Wrong(f"{path.name} is no JSON: {error}") from error
    for field, kind in needed.items():
        if not isinstance(found.get(field), kind) or not found[field]:
            raise Wrong(f"{path.name}: {field} is missing, empty, or no {kind.__name__}")
    missing = [field for field in known if field not in found]
    if missing:
        raise Wrong(f"{path.name}: {missing[0]} is missing; write null where it was not recorded")
    unknown = found.keys() - needed.keys() - set(known)
    if unknown:
        raise Wrong(f"{path.name}: there is no field {min(unknown)}")
    return dict(found)


def _check(name: str, record: Mapping[str, Any]) -> None:
    """Rows and columns of a record belong together."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", record["measured"]):
        raise Wrong(f"{name}.json: measured is no day such as 2026-11-27")
    rows = [row.get("row") for row in record["rows"]]
    for row in rows:
        if not isinstance(row, str) or re.search(r"[{}:]", row) or rows.count(row) > 1:
            raise Wrong(f"{name}.json: row {row!r} is no name, has one of {{}}:, or is there twice")
    for column in record["columns"]:
        if column.keys() != {"heading", "cell"}:
            raise Wrong(f"{name}.json: a column has heading and cell, and nothing else")
        for form in _forms(column):
            if not any(_filled(form, row) is not None for row in record["rows"]):
                raise Wrong(f"{name}.json: no row has the figures of {form}")


def _forms(column: Mapping[str, Any]) -> list[str]:
    return [column["cell"]] if isinstance(column["cell"], str) else column["cell"]


def _filled(form: str, names: Mapping[str, Any]) -> str | None:
    try:
        return written(form, names)
    except Absent:
        return None


def record_table(record: Mapping[str, Any]) -> str:
    """The table of a record in Markdown."""
    rows = []
    for row in record["rows"]:
        cells = ((_filled(form, row) for form in _forms(column)) for column in record["columns"])
        rows.append([next(filter(None, each), "") for each in cells])
    return marks.table([column["heading"] for column in record["columns"]], rows)


def provenance(record: Mapping[str, Any]) -> str:
    """Where the figures of a record come from, to be unfolded."""
    lost = ", ".join(field for field in ("device", "versions", "commit", "digests") if record[field] is None)
    facts = [[field, _fact(record[field])] for field in _FACTS if record[field] is not None]
    facts += [["in the repository since", f"commit {record['recorded_in']}"]] if record["recorded_in"] else []
    facts += [["not recorded", lost]] if lost else []
    heads = [each for each in (record["device"], record["measured"]) if each]
    return "\n".join(
        [
            f"<details markdown><summary>{', '.join(heads)}: the command</summary>",
            "",
            "```sh",
            *record["command"],
            "```",
            "",
            marks.table(["", ""], facts),
            "",
            "</details>",
        ]
    )


def _fact(found: Any) -> str:
    if isinstance(found, Mapping):
        return ", ".join(f"{name} {each}" for name, each in found.items())
    return str(found)


def short_rows(table: Mapping[str, Any], records: Tables) -> list[list[str]]:
    """The cells of a short table with their figures.

    Raises:
        Wrong: a figure is not there.
    """
    names = {name: {row["row"]: row for row in record["rows"]} for name, record in records.items()}
    try:
        return [[written(cell, names) for cell in row] for row in table["rows"]]
    except Absent as missing:
        raise Wrong(f"{table['title']}: there is no figure {missing}") from missing


def sources(table: Mapping[str, Any]) -> list[str]:
    """The records that a short table has figures of."""
    return list(dict.fromkeys(each for row in table["rows"] for cell in row for each in sorted(names_in(cell))))


def texts(folder: Path = RESULTS) -> dict[str, str]:
    """What is written between the marks, by their names."""
    records, short = load(folder)
    found = {MARK + name: f"{record_table(each)}\n\n{provenance(each)}" for name, each in records.items()}
    for name, table in short.items():
        files = ", ".join(f"`{each}`" for each in sources(table))
        rows = marks.table(table["columns"], short_rows(table, records))
        found[MARK + name] = f"{rows}\n\n<sub>Made of these records in `results/`: {files}.</sub>"
    return found


def generated(page: str, found: Mapping[str, str]) -> str:
    """The page with its tables as they must be.

    Raises:
        Wrong: it names a table that is not there, or has a mark without an end.
    """
    begun, whole = re.findall(r"<!-- begin ([^\s:]+)", page), marks.names(page)
    for name in begun:
        if begun.count(name) != whole.count(name):
            raise Wrong(f"the marks of {name} are wrong")
    missing = [name for name in begun if name.startswith(MARK) and name not in found]
    if missing:
        raise Wrong(f"there is no {missing[0]}.json")
    return marks.filled(page, found)


def used() -> Iterator[str]:
    """The names of all tables that pages show."""
    for path in with_results():
        yield from (name for name in marks.names(path.read_text()) if name.startswith(MARK))


def main() -> None:
    """Write the tables into all pages."""
    try:
        found = texts()
        for path in with_results():
            marks.write(path, generated(path.read_text(), found))
    except Wrong as error:
        raise SystemExit(f"results: {error}") from error


if __name__ == "__main__":
    main()
