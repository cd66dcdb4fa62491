# SPDX-License-Identifier: Apache-2.0
"""One setting of one suite as the report knows it, and what its result must have."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

RETRIEVAL = ("right", "asked", "lost", "gained", "p_value")
LOSSES = ("perplexity", "perplexity_change", "kl")
REQUIRED: dict[str, tuple[str, ...]] = {
    "perplexity": LOSSES,
    "retention": ("k_ratio", "score_loss", "softmax_loss"),
    "needle": RETRIEVAL,
    "lines": RETRIEVAL,
    "tasks": ("value", "stderr", "count", "dense", "lost", "gained", "p_value"),
    "transfer": LOSSES,
    "context": ("calibrated_length", "tested_length", *LOSSES),
    "images": ("mean_cosine", "lowest_cosine", "same_neighbour", "mean_k"),
    "spectrum": (),
    "memory": (),
    "decode": (),
    "generate": (),
    "breakeven": (),
}
"""The numbers that a result of each suite must have."""
NAMES = {"retention": ("selection",), "tasks": ("task", "metric"), "transfer": ("calibrated", "tested")}
"""The words that it must have."""
COMPARED = ("perplexity", "needle", "lines", "tasks")
"""Suites of which dense attention has a record too, the one without a setting."""
RETRIEVAL_CELLS = {"needle": "length", "lines": "lines"}
"""By suite of retrieval, what the columns of its cells are."""
LISTS: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "retention": (("per_layer", ("layer",), ("score_loss", "softmax_loss")),),
    "needle": (("cells", ("length", "depth", "right", "asked"), ()),),
    "lines": (("cells", ("lines", "right", "asked"), ()),),
    "spectrum": (("layers", ("layer", "head_dim"), ("dims_90", "dims_99")),),
    "memory": (("rows", ("bytes", "ratio", "peak_bytes", "peak_ratio"), ()),),
    "decode": (("rows", ("k_ratio", "seconds", "step_seconds", "ratio", "step_ratio", "ceiling", "share"), ()),),
    "generate": (("rows", ("k_ratio", "seconds", "tokens_per_second", "ratio", "roofline_seconds", "share"), ()),),
    "breakeven": (
        ("rows", ("length", "dense", "whole"), ("aqua",)),
        ("breakeven", ("k_ratio", "k", "dense", "whole", "paper", "theory"), ()),
    ),
}
"""The lists of objects that it must have, and which of their fields are numbers, and lists of numbers."""
MEASURED_ONCE = ("memory", "decode", "generate")
"""Suites whose rows may be `absent`, with a reason in place of the numbers."""


class Unusable(Exception):
    """Why a file, or a part of it, is not used: a reason in words."""


@dataclass(frozen=True)
class Record:
    """One setting of one suite, measured or failed.

    Attributes:
        source: name of the file, in the results directory.
        setting: the AquaConfig's fields; None for dense attention, and where the suite has no setting.
        result: what was measured, None where it failed.
        error: `{"kind", "message"}` where it failed.
        command: the command line that made it, None where the file does not say.
        details: those of `DETAILS` that are known.
        key: the same for all records of one measurement; None where the file does not say what that is.
    """

    suite: str
    source: str
    model: str
    setting: dict[str, Any] | None
    basis: str = "aqua"
    options: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    command: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    key: str | None = None


def checked(record: Record) -> Record:
    """The record, whose result has what its suite must have.

    Raises:
        Unusable: it has not.
    """
    if record.suite not in REQUIRED:
        raise Unusable(f"its suite is {short(record.suite)}: it must be one of {', '.join(REQUIRED)}")
    result = record.result
    if result is None:
        return record
    if not isinstance(result, dict):
        raise Unusable(f"its result is {short(result)}, not an object")
    required = REQUIRED[record.suite]
    if record.setting is None and record.suite in COMPARED:
        # Dense attention: there is nothing to compare with.
        required = tuple(name for name in required if name in ("perplexity", "right", "asked", "value"))
    for name in required:
        if name not in result:
            raise Unusable(f"its result has no {name}")
        if not _is_number(result[name]):
            raise Unusable(f"its {name} is {short(result[name])}, not a number")
    for name in NAMES.get(record.suite, ()):
        if not isinstance(result.get(name), str):
            raise Unusable(f"its {name} is {short(result.get(name))}, not a text")
    for name, figures, lists in LISTS.get(record.suite, ()):
        _check_list(record.suite, name, result.get(name), figures, lists)
    return record


def number(value: Any) -> float:
    """A figure as a float; NaN where a file holds null, which is how JSON says it, or no number at all."""
    return float(value) if value is not None and _is_number(value) else math.nan


def numbers(value: Any) -> list[float]:
    """A list of figures; of one where there is a single one."""
    return [number(each) for each in value] if isinstance(value, list) else [number(value)]


def short(value: Any) -> str:
    """A value in the words of a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_list(suite: str, name: str, rows: Any, figures: tuple[str, ...], lists: tuple[str, ...]) -> None:
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise Unusable(f"its {name} is {short(rows)}, not a list of objects")
    for row in rows:
        if suite in MEASURED_ONCE:
            title = "setting" if suite == "memory" else "name"
            if not isinstance(row.get(title), str):
                raise Unusable(f"a row of its {name} has {title} {short(row.get(title))}, not a text")
            if "absent" in row:
                continue
        for key in figures:
            if not _is_number(row.get(key)):
                raise Unusable(f"a row of its {name} has {key} {short(row[key])}, not a number")
        for key in lists:
            values = row.get(key)
            if not (isinstance(values, list) and values and all(_is_number(value) for value in values)):
                raise Unusable(f"a row of its {name} has {key} {short(values)}, not a list of numbers")


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**63
