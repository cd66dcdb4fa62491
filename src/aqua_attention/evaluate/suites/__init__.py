# SPDX-License-Identifier: Apache-2.0
"""The suites, and the one list of what the result of each must have, which grid and report check alike.

A suite is a module of this package and an entry in `SUITES`. Nothing here loads torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """A list of objects in a result: which of their fields are numbers, and which are lists of numbers.

    `title` is a field that holds a text. Such rows may be `absent`, with a reason in place of the figures.
    """

    name: str
    numbers: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Suite:
    """What a suite's result must have, and how the suite is run.

    Attributes:
        numbers, words, rows: the figures, texts and lists of a result. A record without them is none.
        newer: figures that a grid measures again without, and that files of older versions may lack.
        of_dense: the numbers that the dense model's record must have; empty where the dense model has none.
        cells: what the columns of its cells are, for suites of retrieval.
        calibrates: by itself, as its options say, so that its projections are a result and no part of the key.
        bare: rests on no projections and on no model.
        apart: each of a result's `rows` is a measurement of its own.
        command: what writes the suite's file; `aqua eval NAME` when empty.
        jobs: "module:function", called as function(subject, settings, sizes), see `grid.grid_jobs`; empty for a suite
            that is no part of a grid.
    """

    numbers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    rows: tuple[Rows, ...] = ()
    newer: tuple[str, ...] = ()
    of_dense: tuple[str, ...] = ()
    cells: str = ""
    calibrates: bool = False
    bare: bool = False
    apart: bool = False
    command: str = ""
    jobs: str = ""

    @property
    def figures(self) -> tuple[str, ...]:
        """All numbers that a grid's record must have."""
        return self.numbers + self.newer


def _jobs(name: str) -> str:
    return f"aqua_attention.evaluate.suites.{name}:{name}_jobs"


_LOSSES, _NEWER = ("perplexity", "perplexity_change", "kl"), ("top1", "mean_k", "tokens")
_COUNTS, _PAIRED = ("right", "asked"), ("lost", "gained", "p_value")
_DECODE = ("k_ratio", "seconds", "step_seconds", "ratio", "step_ratio", "ceiling", "share")
_GENERATE = ("k_ratio", "seconds", "tokens_per_second", "ratio", "roofline_seconds", "share")
_SERVE = (
    "k_ratio",
    *(f"{each}_per_second" for each in ("requests", "tokens")),
    "first_seconds",
    "token_seconds",
    "ratio",
)
_CHOICE = Rows("rows", ("tokens_read", "bytes_read", "kl", "perplexity_change"), title="method")
_HEADS = Rows("per_layer", ("layer",), ("score_loss", "softmax_loss"))


def _retrieval(name: str, cells: str, *labels: str, title: str = "") -> Suite:
    rows = (Rows("cells", (*labels, *_COUNTS), title=title),)
    return Suite((*_COUNTS, *_PAIRED), rows=rows, of_dense=_COUNTS, cells=cells, jobs=_jobs(name))


def _benchmark(command: str, *rows: Rows, bare: bool = False) -> Suite:
    return Suite(rows=rows, command=f"aqua {command}", bare=bare)


SUITES = {
    "perplexity": Suite(_LOSSES, newer=_NEWER, of_dense=("perplexity",), jobs=_jobs("perplexity")),
    "retention": Suite(
        *(("k_ratio", "score_loss", "softmax_loss"), ("selection",), (_HEADS,)), apart=True, jobs=_jobs("retention")
    ),
    "needle": _retrieval("needle", "length", "length", "depth"),
    "lines": _retrieval("lines", "lines", "lines"),
    "ruler": _retrieval("ruler", "length", "length", title="task"),
    "tasks": Suite(
        ("value", "stderr", "count", "dense", *_PAIRED), ("task", "metric"), of_dense=("value",), apart=True
    ),
    "transfer": Suite(_LOSSES, ("calibrated", "tested"), newer=(*_NEWER, "distance"), calibrates=True),
    "context": Suite(("calibrated_length", "tested_length", *_LOSSES), newer=_NEWER, calibrates=True),
    "select": Suite(rows=(_CHOICE,), command="benchmarks/select_curves.py"),
    "images": Suite(("mean_cosine", "lowest_cosine", "same_neighbour", "mean_k")),
    "spectrum": _benchmark("inspect", Rows("layers", ("layer", "head_dim"), ("dims_90", "dims_99"))),
    "memory": _benchmark("bench memory", Rows("rows", ("bytes", "ratio", "peak_bytes", "peak_ratio"), title="setting")),
    "decode": _benchmark("bench decode", Rows("rows", _DECODE, title="name"), bare=True),
    "generate": _benchmark("bench generate", Rows("rows", _GENERATE, title="name")),
    "serve": _benchmark("bench serve", Rows("rows", _SERVE, title="name")),
    "breakeven": _benchmark(
        "bench breakeven",
        Rows("rows", ("length", "dense", "whole"), ("aqua",)),
        Rows("breakeven", ("k_ratio", "k", "dense", "whole", "paper", "theory")),
        bare=True,
    ),
}
"""By name. A new suite is a line here and a module."""
RETRIEVAL = tuple(name for name, suite in SUITES.items() if suite.cells)
"""Those that count right answers in cells."""
