# SPDX-License-Identifier: Apache-2.0
"""Which records are of one run, equal in all but the setting, and the words that tell one run from another."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import data_of

DIGITS = 8
"""So much of a digest tells two apart."""
NAMES = {"text_sha256": "text", "projections_sha256": "projections", "context": "windows of", "sha256": "file digest"}
"""Words for facts that are not called by their own name."""
OF_A_TASK = ("few_shot", "file", "file_sha256")
"""Facts of one task; a run asks several."""


def facts_of_run(record: Record) -> dict[str, str]:
    """All that is known of how a record was measured, but its setting: name and value in words.

    Names of nested options are joined by dots. What was counted is taken from the result where each kind of file says
    it in words of its own: predictions (perplexity), and the cells of retrieval.
    """
    result, given = record.figures, dict(record.options)
    if record.suite == "perplexity":
        given.pop("tokens", None)
        dense = result.get("dense")
        known = result.get("tokens"), dense.get("tokens") if isinstance(dense, dict) else None
        given["predictions"] = next((each for each in known if each is not None), None)
        given["scored"] = given.get("scored") or result.get("scored")
    if SUITES[record.suite].cells:
        for name in ("lengths", "depths", "lines", "count", "repeats"):
            given.pop(name, None)
        given["cells"] = _cells(record.suite, result.get("cells"))
    given |= {name: value for name, value in record.details.items() if name in ("dtype", "seed") or _is_digest(name)}
    given |= {"dtype": str(given["dtype"]).removeprefix("torch.")} if given.get("dtype") else {}
    return dict(_flat({"model": record.model, "data": None, "context": None} | given))


def runs_of(records: Sequence[Record], suite: str) -> dict[str, list[Record]]:
    """The records of a suite by run, each under a title that no other run has.

    Dense attention needs no projections, so that its record stands in the runs of all of them.
    """
    groups: list[tuple[dict[str, str], list[Record]]] = []
    of_suite = [record for record in records if record.suite == suite]
    for record in sorted(of_suite, key=lambda record: record.setting is None):
        facts = {name: value for name, value in facts_of_run(record).items() if name not in OF_A_TASK}
        if dense := record.setting is None and bool(SUITES[suite].of_dense):
            facts = _but_projections(facts)
        fitting = [group for known, group in groups if (_but_projections(known) if dense else known) == facts]
        for group in fitting:
            group.append(record)
        if not fitting:
            groups.append((facts, [record]))
    places = {id(record): place for place, record in enumerate(of_suite)}
    ordered = [(facts, sorted(group, key=lambda record: places[id(record)])) for facts, group in groups]
    ordered.sort(key=lambda pair: max(places[id(pair[1][0])], *(places[id(r)] for r in pair[1] if r.setting), -1))
    titles = told_apart([data_of(group[0]) for _, group in ordered], [facts for facts, _ in ordered])
    return {title: group for title, (_, group) in zip(titles, ordered, strict=True)}


def told_apart(titles: Sequence[str], facts: Sequence[dict[str, str]]) -> list[str]:
    """The same titles; those that are equal are given those facts in which they differ, as few as are needed."""
    found = list(titles)
    for name in dict.fromkeys(name for each in facts for name in each):
        values = {(title, each.get(name)) for title, each in zip(found, facts, strict=True)}
        ways = Counter(title for title, _ in values)
        added = [in_words(name, each[name]) if name in each else "" for each in facts]
        words = [word if ways[title] > 1 else "" for title, word in zip(found, added, strict=True)]
        found = [", ".join(filter(None, pair)) for pair in zip(found, words, strict=True)]
    # Facts that are equal as far as they are written down: digests whose beginnings are.
    for place, title in enumerate(found):
        count = 1
        while found[place] in found[:place]:
            count += 1
            found[place] = f"{title} ({count})"
    return found


def in_words(name: str, value: str) -> str:
    """A fact, such as "seed 1" or "projections 0a1b2c3d"."""
    words = NAMES.get(name, name.removesuffix("_sha256").replace(".", " ").replace("_", " "))
    return f"{words} {value[:DIGITS] if _is_digest(name) else value}"


def same_model(first: Record, second: Record) -> bool:
    """Whether two records of any suites can be of one model, dtype and projections, as far as both say."""
    names = {name for name in (*first.details, *second.details) if name == "dtype" or _is_digest(name)}
    pairs = [(first.details.get(name), second.details.get(name)) for name in names - {"text_sha256"}]
    known = [[str(each).removeprefix("torch.") for each in pair] for pair in pairs if None not in pair]
    return first.model == second.model and all(one == other for one, other in known)


def _but_projections(facts: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if name != "projections_sha256"}


def _is_digest(name: str) -> bool:
    return name.endswith("sha256")


def _cells(suite: str, cells: Any) -> str | None:
    """Which questions there were, such as "length 512, 1024, 3 depths, 6 asked"."""
    if not isinstance(cells, list):
        return None
    key = SUITES[suite].cells
    columns = sorted({number(cell.get(key)) for cell in cells})
    depths = {number(cell.get("depth")) for cell in cells if cell.get("depth") is not None}
    words = [f"{key} {', '.join(f'{column:g}' for column in columns)}"]
    words += [f"{len(depths)} depths"] if len(depths) > 1 else []
    return ", ".join([*words, f"{sum(number(cell.get('asked')) for cell in cells):g} asked"])


def _flat(given: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in given.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None and value is not False and value != "":
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value).strip("[]")
