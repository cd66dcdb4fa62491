# SPDX-License-Identifier: Apache-2.0
"""The report in a sentence and a picture: which setting is best here, what it gains and what it loses."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from aqua_attention.evaluate.record import Record, number
from aqua_attention.evaluate.suites import RETRIEVAL
from aqua_attention.report.document import Panel, name_of, percent, right_of
from aqua_attention.report.figures import Axis, bars
from aqua_attention.report.losses import SHARES, shares_of
from aqua_attention.report.runs import runs_of, same_model

TOLERANCE = 0.01
"""How much more perplexity than dense attention the best setting may have."""
LARGEST_KL = 0.02
"""And how far its next-token distribution may be, in nats: on a short text perplexity falls by chance."""
RULE = (
    f"Best: of the settings with at most {percent(TOLERANCE, 0)} more perplexity than dense attention and a KL of at "
    f"most {LARGEST_KL:g}, the one whose dot-product work and cache bytes have the smallest sum. Less work is less "
    "time only where a kernel leaves it out: see the benchmarks."
)
MOST = 4
"""Verdicts on a page; each is of a model and text of its own."""


class Verdict(NamedTuple):
    """Of one run: its title, a sentence, and a picture where a setting is best."""

    title: str
    sentence: str
    panel: Panel | None = None


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """One for each model and text whose perplexity was measured. Files that stand apart count if there is no other."""
    runs = []
    for title, group in runs_of(records, "perplexity").items():
        if settings := [record for record in group if record.setting is not None and _is_known(record)]:
            runs.append((title, settings))
    runs = [run for run in runs if not run[1][0].unsaid] or runs
    return [_verdict(f"verdict{place}", *run, records) for place, run in enumerate(runs[:MOST])]


def _is_known(record: Record) -> bool:
    return all(map(math.isfinite, (*shares_of(record), number(record.figures["perplexity"]), _loss(record))))


def _loss(record: Record) -> float:
    return number(record.figures["perplexity_change"])


def _kl(record: Record) -> float:
    """0 where a file of an earlier version does not say it."""
    return number(record.figures.get("kl", 0.0))


def _cost(record: Record) -> float:
    work, _, cache = shares_of(record)
    return work + cache


def _verdict(identity: str, title: str, settings: Sequence[Record], records: Sequence[Record]) -> Verdict:
    kept = [record for record in settings if _loss(record) <= TOLERANCE and _kl(record) <= LARGEST_KL]
    if not kept:
        nearest = min(settings, key=_loss)
        limit, loss = percent(TOLERANCE, 0), percent(_loss(nearest), 2, sign=True)
        words = f"No setting that was measured stays within {limit} of dense attention's perplexity"
        words += f" and a KL of {LARGEST_KL:g}"
        return Verdict(title, f"{words}; the nearest, {name_of(nearest)}, changes perplexity by {loss}.")
    best = min(kept, key=_cost)
    work, _, cache = shares_of(best)
    asked = _answers(best, records)
    words = f"{name_of(best)} does {percent(work, 0)} of dense attention's dot-product work and stores "
    words += f"{percent(cache, 0)} of its cache bytes; perplexity changes by {percent(_loss(best), 2, sign=True)}"
    words += f" (KL {_kl(best):.4f})"
    words += "".join(
        f", {ours.suite}: {right_of(ours.figures)} right (dense {right_of(dense.figures)})" for ours, dense in asked
    )
    rows = [(SHARES[0], work), (SHARES[2], cache), ("perplexity (higher is worse)", 1 + _loss(best))]
    for ours, dense in asked:
        if dense.figures["right"]:
            share = number(ours.figures["right"]) / number(dense.figures["right"])
            rows.append((f"{ours.suite}: right answers (lower is worse)", share))
    axis, marks = Axis("to dense attention", "percent"), ("dense attention", [1.0] * len(rows))
    return Verdict(title, f"{words}.", bars(identity, f"{words}.", axis, rows, "z.1%", marks))


def _answers(best: Record, records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """What the best setting and dense attention answered to the same questions, a pair for each run."""
    pairs = []
    for suite in RETRIEVAL:
        for run in runs_of([record for record in records if same_model(record, best)], suite).values():
            ours = [record for record in run if (record.setting, record.basis) == (best.setting, best.basis)]
            dense = [record for record in run if record.is_dense]
            pairs += list(zip(ours[:1], dense[:1], strict=False))
    return pairs
