# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a results directory, each checked: a record, or the reason why it is not used."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import Record, Unusable
from aqua_attention.report.recognise import is_own_summary, records_of

LONGEST_TEXT = 2000
LARGEST_FILE = 64 << 20


class Collected(NamedTuple):
    """What a results directory holds: what is measured, what failed (see `Record.error`), and the name and reason of
    each file that is no record, damaged, or of another version.
    """

    records: list[Record]
    failed: list[Record]
    unused: list[tuple[str, str]]


def collect(folder: Path) -> Collected:
    """Read `folder`/*.json and `folder`/records/*.json.

    Raises:
        AquaError: no such folder, or no JSON file in it but the report's own.
    """
    if not folder.is_dir():
        raise AquaError(f"{folder} is no folder: give the one that `aqua eval grid` or --json wrote into")
    paths = [*sorted(folder.glob("*.json")), *sorted((folder / "records").glob("*.json"))]
    found: list[Record] = []
    unused, own = [], 0
    for path in paths:
        name = cleaned(str(path.relative_to(folder)))
        try:
            value = _load(path)
            if is_own_summary(value):
                own += 1
            else:
                found += records_of(value, name)
        except Unusable as reason:
            unused.append((name, str(reason)))
    if own == len(paths):
        raise AquaError(
            f"{folder} holds no results: run `aqua eval grid {folder} ...`, or any `aqua eval` or `aqua bench` command "
            f"with --json {folder / 'NAME.json'}, then the report"
        )
    # The grid's --json holds the same records as its folder.
    kept: dict[str, Record] = {}
    for record in _newest(found):
        made = record.options, record.key, *(record.details.get(name) for name in ("dtype", "text_sha256"))
        value = record.suite, record.model, record.setting, record.basis, made, record.result, record.error
        kept.setdefault(json.dumps(value, sort_keys=True), record)
    records = sorted(kept.values(), key=_order)
    return Collected([r for r in records if r.error is None], [r for r in records if r.error is not None], unused)


def _newest(found: list[Record]) -> list[Record]:
    """Without older records of the same measurement: a grid's --json keeps failures that its folder has outgrown."""

    def age(record: Record) -> tuple[str, bool]:
        return str(record.details.get("started", "")), record.error is None

    keys = [str(n) if r.key is None else json.dumps(r.key, sort_keys=True) for n, r in enumerate(found)]
    newest: dict[str, Record] = {}
    for key, record in zip(keys, found, strict=True):
        newest[key] = max(newest.get(key, record), record, key=age)
    # Of one measurement there can be several records, all from one file: a row for each task.
    best = [newest[key] for key in keys]
    return [r for r, b in zip(found, best, strict=True) if (age(r), r.source) == (age(b), b.source)]


def _order(record: Record) -> str:
    """Dense first, then settings of a kind together, from the most dimensions to the fewest."""
    if record.setting is None:
        return ""
    setting = record.setting
    amount = setting["logit_error"] if setting["logit_error"] is not None else 1 - setting["k_ratio"]
    kinds = [setting[name] for name in ("h2o_ratio", "bits", "s_ratio")]
    stored = [record.basis != "aqua", kinds != [1.0, None, 0.0], *(str(kind) for kind in kinds)]
    words = [*stored, setting["logit_error"] is not None, setting["selection"], setting["share"]]
    return json.dumps([*map(str, words), f"{setting['sink']:9}", f"{setting['recent']:9}", f"{amount:12.6f}"])


def cleaned(value: Any) -> Any:
    """The same JSON value without what no page can hold: control characters, half surrogate pairs, endless text."""
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode()
        text = "".join(sign if sign.isprintable() else " " for sign in text)
        return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
    if isinstance(value, list):
        return [cleaned(each) for each in value]
    if isinstance(value, dict):
        return {cleaned(name): cleaned(each) for name, each in value.items()}
    return value


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise Unusable(f"it has more than {LARGEST_FILE >> 20} MB, no result has")
        return cleaned(json.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise Unusable(f"it cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise Unusable("it is no text in UTF-8") from error
    except RecursionError as error:
        raise Unusable("it is nested too deep") from error
    except ValueError as error:
        raise Unusable(f"it is no JSON ({error}): damaged, or cut off") from error
