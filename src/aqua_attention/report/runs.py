# SPDX-License-Identifier: Apache-2.0
"""Which records are of one run, equal in all but the setting, and the words that tell one run from another."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.report.document import DIGITS, Block, data_of

NAMES = {"context": "windows of", "sha256": "file digest", "calibration_tokens": "calibrated on", "source": "file"}
"""Words for facts that are not called by their own name."""
OF_A_RUN = ("dtype", "seed", "device")
"""Facts that stand beside a record's options; so do the digests."""
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
        for name in ("lengths", "depths", "lines", "tasks", "count", "repeats"):
            given.pop(name, None)
        given["cells"] = _cells(record.suite, result.get("cells"))
    given |= {name: value for name, value in record.details.items() if name in OF_A_RUN or _is_digest(name)}
    given |= {"dtype": str(given["dtype"]).removeprefix("torch.")} if given.get("dtype") else {}
    # What does not say how it was made may be like nothing else.
    given |= {"source": record.source} if record.unsaid else {}
    return dict(_flat({"model": record.model, "data": None, "context": None} | given))


def named_facts(record: Record) -> dict[str, str]:
    """The same for titles: projections by their name and tokens first, which say more than a digest."""
    tokens, name = number(record.details.get("calibration_tokens")), record.details.get("projections")
    names = {"projections": PurePath(name).name} if isinstance(name, str) else {}
    return names | ({} if math.isnan(tokens) else {"calibration_tokens": f"{tokens:.0f} tokens"}) | facts_of_run(record)


def measurement_of(record: Record) -> str:
    """What a record measured, as a text: equal for two that measured the same, whatever they found."""
    suite, facts, result = SUITES[record.suite], facts_of_run(record), record.figures
    what: Any = {name: result.get(name) for name in suite.words}
    setting: Any = record.setting
    if "k_ratio" in suite.numbers:
        # A suite that has no other setting; a grid gives it one.
        setting = result.get("k_ratio")
    if record.error is not None or not suite.numbers:
        what = record.error, record.result
    return json.dumps([record.suite, facts, setting, record.basis, what], sort_keys=True)


def runs_of(records: Sequence[Record], suite: str) -> dict[str, list[Record]]:
    """The records of a suite by run, each under a title that no other run has.

    Dense attention needs no projections, so that its record stands in the runs of all of them.
    """
    groups: list[tuple[dict[str, str], list[Record]]] = []
    of_suite = [record for record in records if record.suite == suite]
    for record in sorted(of_suite, key=lambda record: record.setting is None):
        facts = {name: value for name, value in facts_of_run(record).items() if name not in OF_A_TASK}
        facts = _but_projections(facts) if record.is_dense else facts
        fitting = [group for known, group in groups if (_but_projections(known) if record.is_dense else known) == facts]
        for group in fitting:
            group.append(record)
        if not fitting:
            groups.append((facts, [record]))
    places = {id(record): place for place, record in enumerate(of_suite)}
    ordered = [(facts, sorted(group, key=lambda record: places[id(record)])) for facts, group in groups]
    last = [max(places[id(group[0])], *(places[id(r)] for r in group if r.setting), -1) for _, group in ordered]
    # What stands apart comes last.
    order = sorted(range(len(ordered)), key=lambda at: (bool(ordered[at][1][0].unsaid), last[at]))
    ordered = [ordered[at] for at in order]
    leaders = [next((record for record in group if record.setting is not None), group[0]) for _, group in ordered]
    titles = told_apart([data_of(leader) for leader in leaders], list(map(named_facts, leaders)))
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


def titled_apart(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of a record each, with titles told apart by how these were made."""
    facts = [named_facts(block.records[0]) | {"source": block.records[0].source} for block in blocks]
    titles = told_apart([block.title for block in blocks], facts)
    return [replace(block, title=title) for block, title in zip(blocks, titles, strict=True)]


def in_words(name: str, value: str) -> str:
    """A fact, such as "seed 1" or "projections 0a1b2c3d"."""
    words = NAMES.get(name, name.removesuffix("_sha256").replace(".", " ").replace("_", " "))
    return f"{words} {value[:DIGITS] if _is_digest(name) else value}"


def same_model(first: Record, second: Record) -> bool:
    """Whether two records of any suites are of one model, device, dtype and projections; dense is of any of these.

    What does not say how it was made is like its own file only.
    """
    if first.unsaid or second.unsaid:
        return first.model == second.model and first.source == second.source
    names = {name for name in (*first.details, *second.details) if name in ("dtype", "device") or _is_digest(name)}
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
    words += [f"depths {', '.join(f'{depth:g}' for depth in sorted(depths))}"] if len(depths) > 1 else []
    tasks = sorted({str(cell["task"]) for cell in cells if "task" in cell})
    words += [f"tasks {', '.join(tasks)}"] if tasks else []
    return ", ".join([*words, f"{sum(number(cell.get('asked')) for cell in cells):g} asked"])


def _flat(given: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in given.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None and value is not False and value != "":
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value).strip("[]")
