# SPDX-License-Identifier: Apache-2.0
"""Gain and loss of every setting: the first table, and the trade-off curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from aqua_attention.evaluate.record import Record, number, numbers
from aqua_attention.report.document import Block, Section, commands_of, loss_cells, name_of, percent, plain
from aqua_attention.report.figures import Axis, loss_curves
from aqua_attention.report.runs import facts_of_run, runs_of, same_model, told_apart
from aqua_attention.report.tables import Table, describe_setting

NOTE = (
    "Dot-product work: query-key multiplications outside the exact window, measured, times the nominal share of tokens "
    "that stays (h2o_ratio). Key and cache bytes: what the setting stores of keys, and of keys and values, to 16-bit "
    "ones, without the exact window and the scales of rounded ones. With h2o_ratio all three are nominal: windows too "
    "short to evict keep and multiply more. Change and KL divergence (nats): against the dense model of the same run. "
    "k_ratio alone stores no less, and less work is not less time: see the benchmarks."
)
KEY_BITS = {None: 16, 8: 8, 4: 5}
"""Bits of a key dimension, by `bits`: of int4, the first quarter of the dimensions has 8."""
CURVES_NOTE = (
    "Perplexity change and KL divergence against what a setting computes and stores. Lower and further left is better; "
    "dense attention is at 100% and 0. A divergence below 1e-6 is drawn there. Points above each other store the "
    "same and differ in what they multiply."
)


def work_share(record: Record) -> float:
    """Dot products computed, to dense ones."""
    return number(record.figures.get("mean_k")) * number(record.knobs["h2o_ratio"])


def key_share(setting: dict[str, Any]) -> float:
    """Bytes of keys stored outside the exact window, to those of 16-bit keys."""
    return float((1 - setting["s_ratio"]) * setting["h2o_ratio"] * KEY_BITS[setting["bits"]] / 16)


def cache_share(setting: dict[str, Any]) -> float:
    """The same of keys and values."""
    return float((key_share(setting) + setting["h2o_ratio"] * (setting["bits"] or 16) / 16) / 2)


def loss_sections(records: Sequence[Record]) -> list[Section]:
    """What you gain and lose, and the trade-offs, for each model and text."""
    groups = runs_of(records, "perplexity")
    drawn = [block for place, (title, group) in enumerate(groups.items()) if (block := _trade_off(place, title, group))]
    asked = [record for record in records if record.suite in ("needle", "lines")]
    tables = []
    left = list(asked)
    for title, group in groups.items():
        # Settings without perplexity stand in the first table of their model only.
        tables.append(_gain_and_loss(title, group, _fitting(group, asked), _fitting(group, left)))
        placed = {id(record) for record in _fitting(group, left)}
        left = [record for record in left if id(record) not in placed]
    alone: list[list[Record]] = []
    while left:
        leader = next((record for record in left if record.setting is not None), left[0])
        alone.append([leader, *(record for record in _fitting([leader], asked) if record is not leader)])
        left = [record for record in left if not any(record is each for each in alone[-1])]
    titles = told_apart([group[0].model for group in alone], [facts_of_run(group[0]) for group in alone])
    for title, group in zip(titles, alone, strict=True):
        fitting = [record for record in asked if any(record is each for each in group)]
        tables.append(_gain_and_loss(title, [], fitting, fitting))
    sections = [Section("What you gain and lose", NOTE, tables)] if tables else []
    if drawn:
        sections.append(Section("Trade-offs", CURVES_NOTE, drawn))
    return sections


def _fitting(group: Sequence[Record], asked: Sequence[Record]) -> list[Record]:
    """Those asked of the same model, dtype and projections, as far as the files say."""
    return [record for record in asked if all(same_model(record, each) for each in group)]


def _gain_and_loss(title: str, group: Sequence[Record], asked: Sequence[Record], others: Sequence[Record]) -> Block:
    """A row a setting: of `group` (perplexity), and those of `others` (retrieval) that it lacks.

    Args:
        asked: retrieval; a column for each run of it.
    """
    settings = [record for record in group if record.setting is not None]
    known = {name_of(record) for record in settings}
    settings += {name_of(r): r for r in others if r.setting is not None and name_of(r) not in known}.values()
    names = {name_of(record) for record in settings}
    runs = [run for suite in ("needle", "lines") for run in runs_of(asked, suite).values()]
    runs = [run for run in runs if not names or any(name_of(record) in names for record in run)]
    columns = told_apart([f"{run[0].suite}: right" for run in runs], [facts_of_run(run[0]) for run in runs])
    titles = ["setting", "dot-product work", "key bytes", "cache bytes"]
    titles += ["perplexity", "change", "KL to dense", "same top token", *columns]
    rows = []
    for perplexity in sorted(set(filter(math.isfinite, map(_dense_perplexity, group)))) or [math.nan]:
        shares = ["100%", "100%", "100%", plain(perplexity, ".3f") if group else "", "", "", ""]
        rows.append(["dense", *shares, *(_right(run, "dense") for run in runs)])
    for record in settings:
        measured = record.suite == "perplexity"
        losses = [*loss_cells(record.figures), percent(number(record.figures.get("top1")))] if measured else [""] * 4
        shares = ["" if math.isnan(share) else percent(share, 0) for share in _shares(record)]
        rows.append([name_of(record), *shares, *losses, *(_right(run, name_of(record)) for run in runs)])
    used = [*group, *(record for run in runs for record in run)]
    return Block(title, "", (titles, rows), commands_of(used))


def _shares(record: Record) -> tuple[float, float, float]:
    return work_share(record), key_share(record.knobs), cache_share(record.knobs)


def _dense_perplexity(record: Record) -> float:
    given = record.figures if record.setting is None else record.figures.get("dense")
    return number(given.get("perplexity") if isinstance(given, dict) else given)


def _right(run: Sequence[Record], name: str) -> str:
    """Right answers of all under a setting; each where it was asked twice, nothing where it was not asked."""
    found = [record.figures for record in run if name_of(record) == name]
    counts = [[plain(number(result[key]), ".0f") for key in ("right", "asked")] for result in found]
    return " | ".join(dict.fromkeys("/".join(pair) for pair in counts))


def _trade_off(place: int, title: str, group: Sequence[Record]) -> Block | None:
    settings = [record for record in group if record.setting is not None]
    shares: dict[str, tuple[Callable[[Record], float], Callable[[Record], str], bool]] = {
        "dot-product work": (work_share, _family, True),
        "key bytes": (lambda record: key_share(record.knobs), _means, False),
        "cache bytes": (lambda record: cache_share(record.knobs), _means, False),
    }
    panels = []
    for number_of_axis, (name, (share, label, joined)) in enumerate(shares.items()):
        if len({round(share(record), 6) for record in settings}) > 1:
            identity, alt = f"loss{place}-{number_of_axis}", f"against the share of {name}, {len(settings)} settings"
            points = [(label(record), share(record), record.figures) for record in settings]
            panels.append(loss_curves(identity, alt, Axis(f"share of {name}", "percent"), points, joined))
    if not panels:
        return None
    return Block(title, "", _numbers(settings), commands_of(settings), panels)


def _family(record: Record) -> str:
    """The setting without how many dimensions it keeps: what the points of one curve share."""
    adaptive = record.knobs["logit_error"] is not None
    words = describe_setting(record.knobs | {"k_ratio": 0.0, "logit_error": None}, record.basis)
    rest = words.removeprefix("k_ratio 0").removeprefix(", ") or "magnitude (paper)"
    return f"adaptive, {rest}" if adaptive else rest


def _means(record: Record) -> str:
    """By which means a setting stores less."""
    setting = record.knobs
    words = [f"int{setting['bits']}"] if setting["bits"] else []
    words += ["s_ratio"] if setting["s_ratio"] else []
    words += ["h2o_ratio"] if setting["h2o_ratio"] < 1 else []
    return " + ".join(words) or "everything stored"


def _numbers(records: Sequence[Record]) -> Table:
    titles = ["setting", "dot-product work", "key bytes", "cache bytes", "perplexity", "change", "KL to dense"]
    return titles, [
        [name_of(record), *(percent(share) for share in _shares(record)), *loss_cells(record.figures)]
        for record in records
    ]


def mean_k_rows(records: Sequence[Record]) -> list[tuple[str, list[float]]]:
    """Name and share of dimensions by layer of settings whose layers differ (adaptive k)."""
    rows = []
    for record in records:
        shares = numbers(record.figures.get("mean_k_per_layer"))
        if record.suite == "perplexity" and len({round(share, 3) for share in shares if math.isfinite(share)}) > 1:
            rows.append((name_of(record), shares))
    return rows
