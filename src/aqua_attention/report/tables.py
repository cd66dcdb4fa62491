# SPDX-License-Identifier: Apache-2.0
"""Results and projections as rows of words: one source for the terminal, for Markdown and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aqua_attention.config import knobs
from aqua_attention.evaluate.record import number

if TYPE_CHECKING:
    from aqua_attention.calibration.projections import Projections

Table = tuple[list[str], list[list[str]]]
"""Column titles, and the cells of each row."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure of each row, and how it is written: in Python's format, multiplied by `times` and divided by `per`."""

    title: str
    key: str
    form: str
    times: float = 1
    per: float = 1

    def cell(self, row: Row) -> str:
        """The figure in words; nothing where there is none."""
        value = row.get(self.key)
        return "" if value is None else written(number(value) * self.times / self.per, self.form)


def written(value: float, form: str) -> str:
    """A figure in a format; NaN and infinity as such."""
    return "NaN" if math.isnan(value) else f"{value:{form if math.isfinite(value) else ''}}".replace("inf", "infinite")


SHARE = Column("products outside the window", "mean_k", ".0%")
PERPLEXITY = (
    SHARE,
    Column("perplexity", "perplexity", ".3f"),
    Column("change", "perplexity_change", "+.2%"),
    Column("KL to dense", "kl", ".4f"),
    Column("same top token", "top1", ".1%"),
)
IMAGES = (
    SHARE,
    Column("mean cosine", "mean_cosine", ".4f"),
    Column("lowest cosine", "lowest_cosine", ".4f"),
    Column("same nearest neighbour", "same_neighbour", ".1%"),
)
RETRIEVAL = (
    SHARE,
    Column("right", "accuracy", ".1%"),
    Column("only dense right", "lost", ".0f"),
    Column("only AQUA right", "gained", ".0f"),
    Column("p (paired)", "p_value", ".2g"),
    Column("same answer", "same_answer", ".1%"),
)
MEMORY = (
    Column("MB", "bytes", ".1f", per=1e6),
    Column("to DynamicCache", "ratio", ".3f"),
    Column("peak MB", "peak_bytes", ".0f", per=1e6),
    Column("to its peak", "peak_ratio", ".2f"),
)
DECODE = (
    Column("us", "seconds", ".1f", 1e6),
    Column("of the read bandwidth", "share", ".1%"),
    Column("to the best dense", "ratio", ".2f"),
    Column("ceiling", "ceiling", ".2f"),
    Column("whole step: us", "step_seconds", ".1f", 1e6),
    Column("whole step: to the best dense", "step_ratio", ".2f"),
)
GENERATE = (
    Column("tokens/s", "tokens_per_second", ".1f"),
    Column("ms a token", "seconds", ".2f", 1e3),
    Column("to the best dense", "ratio", ".2f"),
    Column("roofline: ms", "roofline_seconds", ".2f", 1e3),
    Column("of the roofline", "share", ".1%"),
)


def table_of(first: str, rows: Sequence[tuple[str, Row]], columns: Sequence[Column]) -> Table:
    """A name and its figures in each row, or the reason why there are none (`absent`)."""
    cells = []
    for name, row in rows:
        figures = [column.cell(row) for column in columns]
        if "absent" in row:
            figures = [f"absent: {row['absent']}", *[""] * (len(columns) - 1)]
        cells.append([name, *figures])
    return [first, *(column.title for column in columns)], cells


def _by_setting(result: dict[str, Any]) -> list[tuple[str, Row]]:
    return [(describe_setting(row["setting"], row["basis"]), row) for row in result["rows"]]


def row_name(row: Row) -> str:
    """Of a benchmark's row, with its k_ratio."""
    ratio = row.get("k_ratio")
    return str(row["name"]) if ratio is None else f"{row['name']}, k_ratio {written(number(ratio), 'g')}"


def row_setting(setting: Any) -> Any:
    """The setting of a memory benchmark's row in words, also where it is ours."""
    return f"AQUA, {describe_setting(setting)}" if isinstance(setting, dict) else setting


def perplexity_table(result: dict[str, Any]) -> Table:
    """What `evaluate_perplexity` returned: gain (products left out) and loss, a row a setting."""
    dense = {"mean_k": 1, "perplexity": result["dense"]["perplexity"]}
    return table_of("setting", [("dense", dense), *_by_setting(result)], PERPLEXITY)


def describe_setting(setting: dict[str, Any], basis: str = "aqua") -> str:
    """One line that names what differs from the paper's method, such as "k_ratio 0.5, weighted, exact 4 + 64".

    A knob without words of its own here is "name value".
    """
    declared = {name: knob.default for name, knob in knobs().items()}
    given = {name: setting[name] for name in declared if setting.get(name, declared[name]) != declared[name]}
    error, queries = given.pop("logit_error", None), given.pop("h2o_queries", None)
    words = [f"k_ratio {setting['k_ratio']:g}" if error is None else f"logit_error {error:g}"]
    given.pop("k_ratio", None)
    if "s_ratio" in given:
        words.append(f"s_ratio {given.pop('s_ratio'):g}")
    if "bits" in given:
        words.append(f"int{given.pop('bits')}")
    if "h2o_ratio" in given:
        words.append(f"h2o_ratio {given.pop('h2o_ratio'):g}" + (f" by {queries} queries" if queries else ""))
    if basis != "aqua":
        words.append("not rotated" if basis == "none" else f"basis {basis}")
    if "selection" in given:
        words.append(given.pop("selection"))
    if "share" in given:
        words.append(f"shared by {given.pop('share')}")
    sink, recent = given.pop("sink", 0), given.pop("recent", 0)
    if sink or recent:
        words.append(f"exact {sink} + {recent}")
    return ", ".join([*words, *(f"{name} {value}" for name, value in given.items())])


def memory_table(result: dict[str, Any]) -> Table:
    """What `measure_memory` returned: a row a cache."""
    rows = [(row_setting(row["setting"]), row) for row in result["rows"]]
    return table_of(f"cache of {result['length']} tokens, {result['dtype']}", rows, MEMORY)


def decode_table(result: dict[str, Any]) -> Table:
    """What `measure_decode` returned: a row a kernel."""
    first = (
        f"{result['device']}, {result['batch']} x {result['length']} tokens, {result['heads']} query and "
        f"{result['groups']} key-value heads of {result['head_dim']}, {result['dtype']}"
    )
    columns = [*DECODE[:-1], replace(DECODE[-1], title="to the best dense")]
    if any(row.get("low_ratio") for row in result["rows"]):
        columns.append(Column("to the best in fp8", "low_step_ratio", ".2f"))
    return table_of(first, [(row_name(row), row) for row in result["rows"]], columns)


def breakeven_tables(result: dict[str, Any]) -> tuple[Table, Table]:
    """What `measure_breakeven` returned: a row a length, and a row a k_ratio."""
    ratios = [row["k_ratio"] for row in result["breakeven"]]
    titles = [
        f"{result['device']}, {result['heads']} query and {result['groups']} key-value heads of {result['head_dim']}, "
        f"{result['dtype']}: tokens",
        "best dense: us",
        "k = d: us",
        *(f"k_ratio {ratio:g}: us (to k = d, to dense)" for ratio in ratios),
    ]
    rows = [
        [
            str(row["length"]),
            f"{1e6 * row['dense']:.1f} ({row['dense_name']})",
            f"{1e6 * row['whole']:.1f}",
            *(f"{1e6 * ours:.1f} ({row['whole'] / ours:.2f}, {row['dense'] / ours:.2f})" for ours in row["aqua"]),
        ]
        for row in result["rows"]
    ]
    longest = result["rows"][-1]["length"]
    low, high = result["lengths"][0], "64 to 1024"
    crossings = []
    for row in result["breakeven"]:
        cells = []
        for name in ("whole", "dense"):
            never = f"not up to {longest}"
            cells.append(never if row[name] is None else f"{'up to ' if row[name] <= low else ''}{row[name]:.0f}")
        experiment = row["paper_experiment"]
        cells += [f"{row['theory']:.0f}", f"{row['paper']:.0f}"]
        cells.append("" if experiment is None else f"{experiment[0]:.2f} to {experiment[1]:.2f}")
        crossings.append([f"{row['k_ratio']:g}", *cells])
    heads = ["k_ratio", "faster than k = d from", "than dense from", "theory", "the paper's", f"speed, {high} tokens"]
    return (titles, rows), (heads, crossings)


def generate_table(result: dict[str, Any]) -> Table:
    """What `measure_generate` returned: a row a setting."""
    first = (
        f"{result['device']}, {result['batch']} x {result['length']} tokens, {result['layers']} layers of "
        f"{result['hidden']}, {result['dtype']}{', compiled' if result.get('compiled') else ''}"
    )
    return table_of(first, [(row_name(row), row) for row in result["rows"]], GENERATE)


def retention_table(result: dict[str, Any]) -> Table:
    """What `evaluate_retention` returned: a row a ratio, the loss of each selection beside each other."""
    selections = list(dict.fromkeys(row["selection"] for row in result["rows"]))
    cells = {(row["k_ratio"], row["selection"]): row for row in result["rows"]}
    titles = ["k_ratio", *(f"{loss} lost, {name}" for loss in ("scores", "softmax") for name in selections)]
    rows = []
    for ratio in dict.fromkeys(row["k_ratio"] for row in result["rows"]):
        figures = [cells[ratio, name][key] for key in ("score_loss", "softmax_loss") for name in selections]
        rows.append([f"{ratio:g}", *(f"{figure:.2%}" for figure in figures)])
    return titles, rows


def images_table(result: dict[str, Any]) -> Table:
    """What `evaluate_images` returned: a row a setting."""
    return table_of("setting", _by_setting(result), IMAGES)


def layers_table(result: dict[str, Any]) -> Table:
    """The same's retention: softmax lost in each layer, mean over heads, under the paper's selection at each ratio."""
    rows = [row for row in result["retention"] if (row["selection"], row["basis"]) == ("magnitude", "aqua")]
    cells: dict[int, list[str]] = {}
    for row in rows:
        for layer in row["per_layer"]:
            lost = layer["softmax_loss"]
            cells.setdefault(layer["layer"], []).append(f"{sum(lost) / len(lost):.1%}")
    titles = ["softmax lost in layer", *(f"k_ratio {row['k_ratio']:g}" for row in rows)]
    return titles, [[str(index), *figures] for index, figures in cells.items()]


def retrieval_table(result: dict[str, Any]) -> Table:
    """What `evaluate_retrieval` returned: exact answers dense and under each setting, and the paired test."""
    dense = {"mean_k": 1, "accuracy": result["dense"]["accuracy"]}
    return table_of("setting", [("dense", dense), *_by_setting(result)], RETRIEVAL)


def tasks_table(result: dict[str, Any]) -> Table:
    """What `evaluate_tasks` returned: a row a task, metric and setting, dense first."""
    titles = ["task", "metric", "questions", "setting", "outside the window", "value"]
    titles += ["to dense", "lost", "gained", "p (paired)"]
    rows = []
    for dense in result["dense"]:
        name = [dense["task"], dense["metric"], str(dense["count"])]
        rows.append([*name, "dense", "", f"{dense['value']:.1%} ± {dense['stderr']:.1%}", "", "", "", ""])
        for row in result["rows"]:
            if (row["task"], row["metric"]) == (dense["task"], dense["metric"]):
                figures = [f"{row['value']:.1%} ± {row['stderr']:.1%}", f"{100 * (row['value'] - row['dense']):+.1f}"]
                figures += [str(row["lost"]), str(row["gained"]), f"{row['p_value']:.2g}"]
                setting = [describe_setting(row["setting"], row["basis"]), f"{row['outside_window']:.0%}"]
                rows.append(["", "", "", *setting, *figures])
    return titles, rows


def retrieval_grid(result: dict[str, Any]) -> Table:
    """Right answers of all, for each combination of the questions' labels, dense and under each setting."""
    figures = ("tokens", "expected", "answers", "correct")
    labels = [name for name in result["questions"][0] if name not in figures]
    cells: dict[tuple[float, ...], list[list[bool]]] = {}
    for question in result["questions"]:
        cells.setdefault(tuple(question[name] for name in labels), []).append(question["correct"])
    settings = [describe_setting(row["setting"], row["basis"]) for row in result["rows"]]
    rows = [
        [*(str(value) for value in cell), *(f"{sum(marks)}/{len(marks)}" for marks in zip(*correct, strict=True))]
        for cell, correct in cells.items()
    ]
    return [*labels, "dense", *settings], rows


def provenance_table(projections: Projections) -> Table:
    """Where projections come from and what they fit."""
    calibration = projections.calibration
    if "merged" in calibration:
        parts = [row for part in calibration["merged"] for row in _read(part)]
        windows = f" in windows of {calibration['context']}" if "context" in calibration else ""
        read = [["all together", f"{calibration.get('tokens', '?')} tokens{windows}"], *parts]
    else:
        read = _read(calibration)
    if names := projections.model["shape"].get("names"):
        read.append(["only the layers", f"{names[0]} to {names[-1]}"])
    rows = [
        ["model", projections.model.get("name") or "not recorded"],
        ["fits", projections.fits],
        *read,
        ["basis", projections.basis],
        ["library version", _versions(calibration)],
    ]
    return ["", ""], rows


def _read(calibration: dict[str, Any]) -> list[list[str]]:
    """What one calibration has read, or each of those that were merged."""
    if "merged" in calibration:
        return [row for part in calibration["merged"] for row in _read(part)]
    tokens = f"{calibration.get('tokens', '?')} tokens"
    if "inputs" in calibration:
        what = "images" if "images" in calibration else "inputs"
        return [
            ["calibrated on", f"{calibration.get('images', calibration['inputs'])} {what}, {tokens}"],
            [f"{what} SHA-256", str(calibration.get("inputs_sha256", "?"))],
        ]
    return [
        ["calibrated on", f"{tokens} in windows of {calibration.get('context', '?')}"],
        ["text SHA-256", str(calibration.get("text_sha256", "?"))],
        ["window seed", str(calibration.get("seed", "?"))],
    ]


def _versions(calibration: dict[str, Any]) -> str:
    """The library's version in a calibration, or in those that were merged."""
    parts = calibration.get("merged") or [calibration]
    found = [_versions(part) if "merged" in part else str(part.get("library_version", "?")) for part in parts]
    return ", ".join(dict.fromkeys(found))


def spectrum_table(rows: Sequence[dict[str, Any]]) -> Table:
    """How many leading dimensions hold 90% and 99% of the energy of queries and keys, least to most over heads.

    Args:
        rows: see `projections.spectrum`.
    """
    titles = ["layer", "key-value heads", "head_dim", "dims for 90%", "dims for 99%"]
    spans = [[f"{min(dims)}-{max(dims)}" for dims in (row["dims_90"], row["dims_99"])] for row in rows]
    return titles, [
        [str(row["layer"]), str(len(row["dims_90"])), str(row["head_dim"]), *span]
        for row, span in zip(rows, spans, strict=True)
    ]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with a newline at its end."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
