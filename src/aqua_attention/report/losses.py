# SPDX-License-Identifier: Apache-2.0
"""Gain and loss of every setting: the first table, and the trade-off curves."""

import math
from collections.abc import Sequence
from typing import Any

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import RETRIEVAL
from aqua_attention.report.document import Block, Section, cells, model_of, name_of, percent, plain, right_of
from aqua_attention.report.figures import Axis, loss_curves
from aqua_attention.report.runs import named_facts, runs_of, same_model, told_apart
from aqua_attention.report.tables import LOSSES, PERPLEXITY, describe_setting

NOTE = (
    "Dot-product work: query-key multiplications outside the exact window, measured, times the nominal share of tokens "
    "that stays (h2o_ratio). Key and cache bytes: what the setting stores of keys, and of keys and values, to 16-bit "
    "ones, without the exact window and the scales of rounded ones. With h2o_ratio all three are nominal: windows too "
    "short to evict keep and multiply more. Change and KL divergence (nats): against the dense model of the same run. "
    "k_ratio alone stores no less, and less work is not less time: see the benchmarks."
)
SHARES = ("dot-product work", "key bytes", "cache bytes")
KEY_BITS = {None: 16, 8: 8, 4: 5}
"""Bits of a key dimension, by `bits`: of int4, the first quarter of the dimensions has 8."""
CURVES_NOTE = (
    "Perplexity change and KL divergence against what a setting computes and stores. Lower and further left is better; "
    "dense attention is at 100% and 0. A divergence below 1e-6 is drawn there. Points above each other store the "
    "same and differ in what they multiply."
)


def key_share(setting: dict[str, Any]) -> float:
    """Bytes of keys stored outside the exact window, to those of 16-bit keys."""
    return float((1 - setting["s_ratio"]) * setting["h2o_ratio"] * KEY_BITS[setting["bits"]] / 16)


def cache_share(setting: dict[str, Any]) -> float:
    """The same of keys and values."""
    return float((key_share(setting) + setting["h2o_ratio"] * (setting["bits"] or 16) / 16) / 2)


def shares_of(record: Record) -> list[float]:
    """What a setting computes and stores, to dense attention: see `SHARES`."""
    setting = record.knobs
    work = number(record.figures.get("mean_k")) * number(setting["h2o_ratio"])
    return [work, key_share(setting), cache_share(setting)]


def loss_sections(records: Sequence[Record]) -> list[Section]:
    """What you gain and lose, and the trade-offs, for each model and text."""
    groups = runs_of(records, "perplexity")
    drawn = [block for place, (title, group) in enumerate(groups.items()) if (block := _trade_off(place, title, group))]
    asked = [record for record in records if record.suite in RETRIEVAL]
    tables, left = [], asked
    for title, group in groups.items():
        # Settings without perplexity stand in the first table of their model only.
        others = _fitting(group, left)
        tables.append(_gain_and_loss(title, group, _fitting(group, asked), others))
        left = _without(left, others)
    alone: list[list[Record]] = []
    leaders: list[Record] = []
    while left:
        leaders.append(next((record for record in left if record.setting is not None), left[0]))
        alone.append(_fitting(leaders[-1:], asked))
        left = _without(left, alone[-1])
    titles = told_apart([model_of(leader) for leader in leaders], list(map(named_facts, leaders)))
    tables += [_gain_and_loss(title, [], group, group) for title, group in zip(titles, alone, strict=True)]
    return [Section("What you gain and lose", tables, NOTE), Section("Trade-offs", drawn, CURVES_NOTE)]


def _fitting(group: Sequence[Record], asked: Sequence[Record]) -> list[Record]:
    """Those asked of the same model, dtype and projections, as far as the files say."""
    return [record for record in asked if all(same_model(record, each) for each in group)]


def _without(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    return [record for record in records if not any(record is each for each in others)]


def _gain_and_loss(title: str, group: Sequence[Record], asked: Sequence[Record], others: Sequence[Record]) -> Block:
    """A row a setting: of `group` (perplexity), and those of `others` that it lacks; a column a run of `asked`."""
    settings = [record for record in group if record.setting is not None]
    known = {name_of(record) for record in settings}
    settings += {name_of(r): r for r in others if r.setting is not None and name_of(r) not in known}.values()
    names = {name_of(record) for record in settings}
    runs = [run for suite in RETRIEVAL for run in runs_of(asked, suite).values()]
    runs = [run for run in runs if not names or any(name_of(record) in names for record in run)]
    columns = told_apart([f"{run[0].suite}: right" for run in runs], [named_facts(run[0]) for run in runs])
    rows = []
    for perplexity in sorted(set(filter(math.isfinite, map(_dense_perplexity, group)))) or [math.nan]:
        losses = [plain(perplexity, ".3f") if group else "", "", "", ""]
        rows.append(["dense", *["100%"] * len(SHARES), *losses, *(_right(run, "dense") for run in runs)])
    for record in settings:
        losses = cells(record.figures, PERPLEXITY) if record.suite == "perplexity" else [""] * 4
        shares = ["" if math.isnan(value) else percent(value, 0) for value in shares_of(record)]
        rows.append([name_of(record), *shares, *losses, *(_right(run, name_of(record)) for run in runs)])
    titles = ["setting", *SHARES, *(column.title for column in PERPLEXITY), *columns]
    return Block(title, (titles, rows), [*group, *(record for run in runs for record in run)])


def _dense_perplexity(record: Record) -> float:
    given = record.figures if record.setting is None else record.figures.get("dense")
    return number(given.get("perplexity") if isinstance(given, dict) else given)


def _right(run: Sequence[Record], name: str) -> str:
    """Right answers of all under a setting; each where it was asked twice, nothing where it was not asked."""
    found = [record.figures for record in run if name_of(record) == name]
    return " | ".join(dict.fromkeys(map(right_of, found)))


def _trade_off(place: int, title: str, group: Sequence[Record]) -> Block | None:
    settings = [record for record in group if record.setting is not None]
    panels = []
    by_axis = list(zip(*map(shares_of, settings), strict=True))
    varied = [axis for axis, shares in enumerate(by_axis) if len({round(share, 6) for share in shares}) > 1]
    for axis in varied:
        name, joined = SHARES[axis], axis == 0
        label = _family if joined else _means
        points = [(label(record), share, record.figures) for record, share in zip(settings, by_axis[axis], strict=True)]
        identity, alt = f"loss{place}-{axis}", f"against the share of {name}, {len(settings)} settings"
        where = Axis(f"share of {name}", "percent")
        panels.append(loss_curves(identity, alt, where, points, joined))
    rows = [[name_of(r), *map(percent, shares_of(r)), *cells(r.figures, LOSSES)] for r in settings]
    titles = ["setting", *SHARES, *(column.title for column in LOSSES)]
    return Block(title, (titles, rows), settings, panels) if panels else None


def _family(record: Record) -> str:
    """The setting without how many dimensions it keeps: what the points of one curve share."""
    words = describe_setting(record.knobs | {"k_ratio": 0.0, "logit_error": None}, record.basis)
    rest = words.removeprefix("k_ratio 0").removeprefix(", ") or "magnitude (paper)"
    return f"adaptive, {rest}" if record.knobs["logit_error"] is not None else rest


def _means(record: Record) -> str:
    """By which means a setting stores less."""
    bits, s_ratio, h2o_ratio = (record.knobs[name] for name in ("bits", "s_ratio", "h2o_ratio"))
    used = {f"int{bits}": bits, "s_ratio": s_ratio, "h2o_ratio": h2o_ratio < 1}
    return " + ".join(filter(used.get, used)) or "everything stored"
