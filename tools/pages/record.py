# SPDX-License-Identifier: Apache-2.0
"""A record of results/ from the file that a command wrote with --json: the first draft of a table.

python tools/pages/record.py perplexity.json results/loss_mine.json

It takes over what the file says of how it was made, and every number of its rows. What is left to do by hand: a title,
and of the columns those that say something, with headings and formats (see `pages.results`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aqua_attention.io.files import write_json
from aqua_attention.report.tables import describe_setting
from pages.cells import Wrong

_DIGESTS = ("projections_sha256", "text_sha256")


def draft(found: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a command's file.

    Raises:
        Wrong: it has no rows, or does not say its command or when it was started.
    """
    rows = [{"row": name, **figures} for name, figures in _rows(found) if figures]
    missing = [field for field in ("command", "started") if not found.get(field)] + ["rows"] * (not rows)
    if missing:
        raise Wrong(f"the file does not say its {missing[0]}: measure again with --json")
    model = found.get("model")
    version = {"aqua_attention": found["version"]} if "version" in found else {}
    fields = dict.fromkeys(name for row in rows for name in row if name != "row")
    return {
        "title": found.get("suite") or "What is measured",
        "command": [found["command"]],
        "model": model.get("name") if isinstance(model, Mapping) else model,
        **{name: found.get(name) for name in ("data", "dtype", "device")},
        "versions": found.get("versions", {}) | version or None,
        "commit": found.get("commit"),
        "digests": {name: found[name] for name in _DIGESTS if found.get(name)} or None,
        "measured": found["started"][:10],
        "recorded_in": None,
        "columns": [
            {"heading": "setting", "cell": "{row}"},
            *({"heading": name, "cell": f"{{{name}:.4g}}"} for name in fields),
        ],
        "rows": rows,
    }


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and numbers of each row; those of several sizes begin with theirs."""
    if isinstance(found.get("dense"), Mapping):
        yield "dense", _numbers(found["dense"])
    parts = found.get("results") or [found]
    for part in parts:
        size = f"{part['batch']} x {part['length']}, " if part is not found and "length" in part else ""
        for row in part.get("rows", []):
            yield size + _name(row).replace(":", ","), _numbers(row)


def _name(row: Mapping[str, Any]) -> str:
    setting = row.get("setting")
    if isinstance(setting, Mapping):
        return describe_setting(dict(setting), row.get("basis", "aqua"))
    name = str(row.get("name") or setting or "")
    ratio = row.get("k_ratio")
    return name if ratio is None else f"{name}, k_ratio {ratio}"


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: each for name, each in row.items() if isinstance(each, int | float) and not isinstance(each, bool)}


def main(given: list[str]) -> None:
    """Write the draft; a file that is there is not replaced."""
    if len(given) != 2:
        raise SystemExit("usage: python tools/pages/record.py FILE.json results/NAME.json")
    source, target = map(Path, given)
    if target.exists():
        raise SystemExit(f"{target} is there: take another name")
    try:
        write_json(target, draft(json.loads(source.read_text())))
    except (Wrong, ValueError) as error:
        raise SystemExit(f"{source}: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
