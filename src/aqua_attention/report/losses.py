# SPDX-License-Identifier: Apache-2.0
"""Gain and loss of every setting: the first table, and the trade-off curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from aqua_attention.report.document import Block, Panel, Section, commands_of, data_of, grouped, name_of, percent, plain
from aqua_attention.report.figures import Axis, Curve, curves
from aqua_attention.report.record import Record, number, numbers
from aqua_attention.tables import Table, describe_setting

NOTE = (
    "Dot-product work: query-key multiplications outside the exact window, measured, times the share of tokens that "
    "stays. Key and cache bytes: what the setting stores of keys, and of keys and values, to 16-bit ones, without the "
    "exact window and the scales of rounded ones. Change and KL divergence (nats): against the dense model of the same "
    "run. k_ratio alone stores no less, and less work is not less time: see the benchmarks."
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
    assert record.setting is not None and record.result is not None
    return number(record.result.get("mean_k")) * number(record.setting["h2o_ratio"])


def key_share(setting: dict[str, Any]) -> float:
    """Bytes of keys stored outside the exact window, to those of 16-bit keys."""
    return float((1 - setting["s_ratio"]) * setting["h2o_ratio"] * KEY_BITS[setting["bits"]] / 16)


def cache_share(setting: dict[str, Any]) -> float:
    """The same of keys and values."""
    return float((key_share(setting) + setting["h2o_ratio"] * (setting["bits"] or 16) / 16) / 2)


def loss_sections(records: Sequence[Record]) -> list[Section]:
    """What you gain and lose, and the trade-offs, for each model and text."""
    groups = grouped(records, "perplexity", data_of)
    drawn = [block for place, (title, group) in enumerate(groups.items()) if (block := _trade_off(place, title, group))]
    asked = [record for record in records if record.suite in ("needle", "lines")]
    tables, seen = [], set()
    for title, group in groups.items():
        model = group[0].model
        # Settings without perplexity stand in the first table of their model only.
        tables.append(_gain_and_loss(title, group, [r for r in asked if r.model == model], others=model not in seen))
        seen.add(model)
    for model in dict.fromkeys(record.model for record in asked if record.model not in seen):
        tables.append(_gain_and_loss(model, [], [r for r in asked if r.model == model], others=True))
    sections = [Section("What you gain and lose", NOTE, tables)] if tables else []
    if drawn:
        sections.append(Section("Trade-offs", CURVES_NOTE, drawn))
    return sections


def _gain_and_loss(title: str, group: Sequence[Record], asked: Sequence[Record], *, others: bool) -> Block:
    """A row a setting: of `group` (perplexity), and with `others` those of `asked` (retrieval) that it lacks."""
    settings = [record for record in group if record.setting is not None]
    known = {name_of(record) for record in settings}
    if others:
        settings += {name_of(r): r for r in asked if r.setting is not None and name_of(r) not in known}.values()
    names = {name_of(record) for record in settings}
    suites = [suite for suite in ("needle", "lines") if any(r.suite == suite and name_of(r) in names for r in asked)]
    titles = ["setting", "dot-product work", "key bytes", "cache bytes"]
    titles += ["perplexity", "change", "KL to dense", "same top token", *(f"{suite}: right" for suite in suites)]
    rows = []
    for perplexity in sorted(set(filter(math.isfinite, map(_dense_perplexity, group)))) or [math.nan]:
        shares = ["100%", "100%", "100%", plain(perplexity, ".3f") if group else "", "", "", ""]
        rows.append(["dense", *shares, *(_right(asked, suite, "dense") for suite in suites)])
    for record in settings:
        assert record.result is not None and record.setting is not None
        measured = record.suite == "perplexity"
        losses = [*_loss_cells(record.result), percent(number(record.result.get("top1")))] if measured else [""] * 4
        shares = ["" if math.isnan(share) else percent(share, 0) for share in _shares(record)]
        rows.append([name_of(record), *shares, *losses, *(_right(asked, s, name_of(record)) for s in suites)])
    used = [*group, *(record for record in asked if record.suite in suites)]
    return Block(title, "", (titles, rows), commands_of(used))


def _shares(record: Record) -> tuple[float, float, float]:
    assert record.setting is not None
    return work_share(record), key_share(record.setting), cache_share(record.setting)


def _loss_cells(result: dict[str, Any]) -> list[str]:
    change = percent(number(result["perplexity_change"]), 2, sign=True)
    return [plain(number(result["perplexity"]), ".3f"), change, plain(number(result["kl"]), ".4f")]


def _dense_perplexity(record: Record) -> float:
    assert record.result is not None
    given = record.result if record.setting is None else record.result.get("dense")
    return number(given.get("perplexity") if isinstance(given, dict) else given)


def _right(asked: Sequence[Record], suite: str, name: str) -> str:
    """Right answers of all questions asked under a setting, over all files; nothing where none was asked."""
    found = [record.result for record in asked if record.suite == suite and name_of(record) == name and record.result]
    right, count = (sum(number(result[key]) for result in found) for key in ("right", "asked"))
    return f"{plain(right, '.0f')}/{plain(count, '.0f')}" if found else ""


def _trade_off(place: int, title: str, group: Sequence[Record]) -> Block | None:
    settings = [record for record in group if record.setting is not None]
    shares: dict[str, tuple[Callable[[Record], float], Callable[[Record], str], bool]] = {
        "dot-product work": (work_share, _family, True),
        "key bytes": (lambda record: key_share(record.setting or {}), _means, False),
        "cache bytes": (lambda record: cache_share(record.setting or {}), _means, False),
    }
    panels = []
    for number_of_axis, (name, (share, label, joined)) in enumerate(shares.items()):
        if len({round(share(record), 6) for record in settings}) > 1:
            panels.append(_panel(f"loss{place}-{number_of_axis}", name, settings, share, label, joined))
    if not panels:
        return None
    return Block(title, "", _numbers(settings), commands_of(settings), panels)


def _panel(
    identity: str,
    name: str,
    records: Sequence[Record],
    share: Callable[[Record], float],
    label: Callable[[Record], str],
    joined: bool,
) -> Panel:
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for record in records:
        assert record.result is not None
        losses = [number(record.result[key]) for key in ("perplexity_change", "kl")]
        lines.setdefault(label(record), []).append((share(record), losses))
    alt = f"Perplexity change and KL divergence against the share of {name}, {len(records)} settings"
    axes = [Axis("perplexity change", "change"), Axis("KL to dense (nats)", "log")]
    drawn = [Curve(family, points, joined) for family, points in lines.items()]
    return curves(identity, alt, Axis(f"share of {name}", "percent"), axes, drawn)


def _family(record: Record) -> str:
    """The setting without how many dimensions it keeps: what the points of one curve share."""
    assert record.setting is not None
    adaptive = record.setting["logit_error"] is not None
    words = describe_setting(record.setting | {"k_ratio": 0.0, "logit_error": None}, record.basis)
    rest = words.removeprefix("k_ratio 0").removeprefix(", ") or "magnitude (paper)"
    return f"adaptive, {rest}" if adaptive else rest


def _means(record: Record) -> str:
    """By which means a setting stores less."""
    assert record.setting is not None
    setting = record.setting
    words = [f"int{setting['bits']}"] if setting["bits"] else []
    words += ["s_ratio"] if setting["s_ratio"] else []
    words += ["h2o_ratio"] if setting["h2o_ratio"] < 1 else []
    return " + ".join(words) or "everything stored"


def _numbers(records: Sequence[Record]) -> Table:
    titles = ["setting", "dot-product work", "key bytes", "cache bytes", "perplexity", "change", "KL to dense"]
    rows = []
    for record in records:
        assert record.result is not None
        rows.append([name_of(record), *(percent(share) for share in _shares(record)), *_loss_cells(record.result)])
    return titles, rows


def mean_k_rows(records: Sequence[Record]) -> list[tuple[str, list[float]]]:
    """Name and share of dimensions by layer of settings whose layers differ (adaptive k)."""
    rows = []
    for record in records:
        shares = numbers(record.result.get("mean_k_per_layer")) if record.result else []
        if record.suite == "perplexity" and len({round(share, 3) for share in shares if math.isfinite(share)}) > 1:
            rows.append((name_of(record), shares))
    return rows
