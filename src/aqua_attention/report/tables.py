# SPDX-License-Identifier: Apache-2.0
"""Results as rows of words: one source for the terminal, for Markdown and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aqua_attention.config import AquaConfig
from aqua_attention.evaluate.record import number

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


class YesNo(Column):
    """A fact of each row."""

    def cell(self, row: Row) -> str:
        """In a word; nothing where it is not known."""
        return {True: "yes", False: "no"}.get(row.get(self.key), "")  # type: ignore[arg-type]


def written(value: float, form: str) -> str:
    """A figure in a format; NaN and infinity as such."""
    return "NaN" if math.isnan(value) else f"{value:{form if math.isfinite(value) else ''}}".replace("inf", "infinite")


SHARE = Column("products outside the window", "mean_k", ".0%")
LOSSES = (
    Column("perplexity", "perplexity", ".3f"),
    Column("change", "perplexity_change", "+z.2%"),
    Column("KL to dense", "kl", "z.4f"),
)
PERPLEXITY = (*LOSSES, Column("same top token", "top1", ".1%"))
PAIRED = (*(Column(name, name, ".0f") for name in ("lost", "gained")), Column("p (paired)", "p_value", ".2g"))
IMAGES = (
    SHARE,
    Column("mean cosine", "mean_cosine", "z.4f"),
    Column("lowest cosine", "lowest_cosine", "z.4f"),
    Column("same neighbour", "same_neighbour", ".1%"),
)
RETRIEVAL = (
    SHARE,
    Column("right", "accuracy", ".1%"),
    *(replace(PAIRED[0], title="only dense right"), replace(PAIRED[1], title="only AQUA right"), PAIRED[2]),
    Column("same answer", "same_answer", ".1%"),
)
MEMORY = (
    Column("MB", "bytes", ".1f", per=1e6),
    Column("to DynamicCache", "ratio", ".3f"),
    Column("peak MB", "peak_bytes", ".0f", per=1e6),
    Column("to its peak", "peak_ratio", ".2f"),
)
HELD = (
    Column("MB", "bytes", ".1f", per=1e6),
    Column("to DynamicCache", "ratio", ".3f"),
    Column("keys", "keys_bytes", ".1f", per=1e6),
    Column("values", "values_bytes", ".1f", per=1e6),
    Column("copy", "copy_bytes", ".1f", per=1e6),
    Column("other", "other_bytes", ".1f", per=1e6),
    Column("by widths", "expected_bytes", ".1f", per=1e6),
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
    Column("first token: ms", "first_seconds", ".0f", 1e3),
    Column("to dense", "first_ratio", ".2f"),
    Column("ms a token", "seconds", ".2f", 1e3),
    Column("speed to dense", "ratio", ".2f"),
    Column("to default", "default_ratio", ".2f"),
    Column("peak GiB", "peak_bytes", ".1f", per=2**30),
    YesNo("recorded", "recorded", ""),
    Column("tokens read", "tokens_read", ".1%"),
    Column("generate adds: ms", "added_seconds", ".2f", 1e3),
    Column("of the roofline", "share", ".1%"),
)
SERVE = (
    Column("requests/s", "requests_per_second", ".2f"),
    Column("tokens/s", "tokens_per_second", ".1f"),
    Column("to stock", "ratio", ".2f"),
    Column("first: ms", "first_seconds", ".0f", 1e3),
    Column("first 99%", "first_p99_seconds", ".0f", 1e3),
    Column("first to stock", "first_ratio", ".2f"),
    Column("next: ms", "token_seconds", ".2f", 1e3),
    Column("next 99%", "token_p99_seconds", ".2f", 1e3),
    Column("next to stock", "token_ratio", ".2f"),
    Column("cache: tokens", "capacity", ",.0f"),
    Column("cache to stock", "capacity_ratio", ".3f"),
)
STEPS = (
    Column("tokens/s", "tokens_per_second", ".1f"),
    Column("ms a token", "seconds", ".2f", 1e3),
    Column("to the best dense", "ratio", ".2f"),
    Column("roofline: ms", "roofline_seconds", ".2f", 1e3),
    Column("of the roofline", "share", ".1%"),
)
WORDS = {name: f"{name} {{:g}}" for name in ("logit_error", "k_ratio", "s_ratio")}
WORDS |= {"bits": "int{}", "h2o_ratio": "h2o_ratio {}", "basis": "{}", "selection": "{}", "share": "shared by {}"}
WORDS["sliding"] = "sliding {}"
"""How a setting's values are written, in their order; any other knob is "name value"."""


def table_of(first: str, rows: Sequence[tuple[str, Row]], columns: Sequence[Column]) -> Table:
    """A name and its figures in each row, or the reason why there are none (`absent`)."""
    cells = []
    for name, row in rows:
        figures = [column.cell(row) for column in columns]
        if "absent" in row:
            figures = [f"absent: {row['absent']}", *[""] * (len(columns) - 1)]
        cells.append([name, *figures])
    return [first, *(column.title for column in columns)], cells


def matrix(first: str, cells: Mapping[tuple[str, str], str]) -> Table:
    """Cells by the labels of their row and column; empty where there is none."""
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*cells, strict=True))
    return [first, *columns], [[row, *(cells.get((row, column), "") for column in columns)] for row in rows]


def _by_setting(result: dict[str, Any]) -> list[tuple[str, Row]]:
    return [(describe_setting(row["setting"], row["basis"]), row) for row in result["rows"]]


def row_name(row: Row) -> str:
    """Of a benchmark's row: a kernel with its k_ratio, or a cache by its own name or by our setting."""
    setting, ratio = row.get("setting"), row.get("k_ratio")
    if "name" in row:
        return str(row["name"]) if ratio is None else f"{row['name']}, k_ratio {written(number(ratio), 'g')}"
    return f"AQUA, {describe_setting(setting)}" if isinstance(setting, dict) else str(setting)


def benchmark_table(first: str, result: Row, columns: Sequence[Column]) -> Table:
    """A row for each of a benchmark's."""
    return table_of(first, [(row_name(row), row) for row in result["rows"]], columns)


def perplexity_table(result: dict[str, Any]) -> Table:
    """What `evaluate_perplexity` returned: gain (products left out) and loss, a row a setting."""
    dense = {"mean_k": 1, "perplexity": result["dense"]["perplexity"]}
    return table_of("setting", [("dense", dense), *_by_setting(result)], (SHARE, *PERPLEXITY))


def describe_setting(setting: dict[str, Any], basis: str = "aqua") -> str:
    """One line that names what differs from the paper's method, such as "k_ratio 0.5, weighted, exact 4 + 64"."""
    paper = AquaConfig.paper().to_dict()
    given = {name: setting[name] for name in paper if setting.get(name, paper[name]) != paper[name]}
    queries, sink, recent = given.pop("h2o_queries", None), given.pop("sink", 0), given.pop("recent", 0)
    given["k_ratio"] = setting["k_ratio"]
    if "logit_error" in given:
        del given["k_ratio"]
    if "h2o_ratio" in given:
        given["h2o_ratio"] = f"{given['h2o_ratio']:g}" + (f" by {queries} queries" if queries else "")
    if basis != "aqua":
        given["basis"] = "not rotated" if basis == "none" else f"basis {basis}"
    words = [form.format(given.pop(name)) for name, form in WORDS.items() if name in given]
    words += [f"exact {sink} + {recent}"] if sink or recent else []
    return ", ".join([*words, *(f"{name} {value}" for name, value in given.items())])


def size_of(result: Row) -> str:
    """Device, shape and dtype of a benchmark, as far as it says them."""
    words = [str(result["device"])] if "device" in result else []
    if "length" in result:
        batch, length = number(result.get("batch")), number(result["length"])
        words.append(f"{written(batch, '.3g')} x {written(length, '.0f')} tokens")
    if "layers" in result:
        words.append(f"{result['layers']} layers of {result.get('hidden')}")
    elif "heads" in result:
        words.append(f"{result['heads']} query and {result.get('groups')} key-value heads of {result.get('head_dim')}")
    return ", ".join([*words, str(result.get("dtype", ""))])


def memory_tables(result: dict[str, Any]) -> tuple[Table, ...]:
    """What `measure_memory` returned: a row a cache, and where tokens are chosen the parts of these."""
    table = benchmark_table(f"cache of {result['length']} tokens, {result['dtype']}", result, MEMORY)
    parts = held_table(result)
    return (table, parts) if parts[1] else (table,)


def held_table(result: Row) -> Table:
    """A row for each cache that says its parts. "by widths": what keys, values and copy of so many tokens need."""
    rows = [row for row in result["rows"] if "copy_bytes" in row]
    return benchmark_table("where tokens are chosen", {"rows": rows}, HELD)


def decode_table(result: dict[str, Any]) -> Table:
    """What `measure_decode` returned: a row a kernel."""
    columns = [*DECODE[:-1], replace(DECODE[-1], title="to the best dense")]
    if any(row.get("low_ratio") for row in result["rows"]):
        columns.append(Column("to the best in fp8", "low_step_ratio", ".2f"))
    return benchmark_table(size_of(result), result, columns)


def generate_columns(result: Row) -> Sequence[Column]:
    """Of a result of `aqua bench generate` those that some row has; files of earlier versions measured steps alone."""
    if "new_tokens" not in result:
        return STEPS
    return [column for column in GENERATE if any(column.cell(row) for row in result["rows"])]


def generate_table(result: dict[str, Any]) -> Table:
    """What `GenerateBenchmark.measure` returned: a row a setting."""
    size = f"{size_of(result)}{', compiled' if result.get('compiled') else ''}"
    return benchmark_table(size, result, generate_columns(result))


def serve_table(results: Sequence[dict[str, Any]]) -> Table:
    """What `ServeBenchmark.measure` returned: stock's row and ours for each load."""
    rows = [(f"{result['batch']}: {row_name(row)}", row) for result in results for row in result["rows"]]
    return table_of("requests at once", rows, SERVE)


def breakeven_tables(result: dict[str, Any]) -> tuple[Table, ...]:
    """What `measure_breakeven` returned: a row a length, a row a k_ratio, and a row a choice of tokens, if any."""
    selects = result.get("selects") or []
    titles = [f"{size_of(result)}: tokens", "best dense: us", "k = d: us"]
    titles += [f"k_ratio {row['k_ratio']:g}: us (to k = d, to dense)" for row in result["breakeven"]]
    titles += [f"{select_name(row)}: us (to k = d, to dense), read" for row in selects]
    rows = []
    for row in result["rows"]:
        dense, whole = row["dense"], row["whole"]
        cells = [str(row["length"]), f"{1e6 * dense:.1f} ({row['dense_name']})", f"{1e6 * whole:.1f}"]
        cells += [f"{1e6 * ours:.1f} ({whole / ours:.2f}, {dense / ours:.2f})" for ours in row["aqua"]]
        chosen = zip(row["select"], row["read"], strict=True) if selects else ()
        cells += [f"{1e6 * ours:.1f} ({whole / ours:.2f}, {dense / ours:.2f}), {read:.0%}" for ours, read in chosen]
        rows.append(cells)

    crossings = []
    for row in result["breakeven"]:
        cells = [f"{row['k_ratio']:g}", *(_crossing(row[key], result) for key in ("whole", "dense"))]
        experiment = row["paper_experiment"]
        speed = "" if experiment is None else f"{experiment[0]:.2f} to {experiment[1]:.2f}"
        crossings.append([*cells, f"{row['theory']:.0f}", f"{row['paper']:.0f}", speed])
    columns = ["k_ratio", "faster than k = d from", "than dense from", "theory", "the paper's"]
    tables = (titles, rows), ([*columns, "speed, 64 to 1024 tokens"], crossings)
    return (*tables, _choices_table(result)) if selects else tables


def _choices_table(result: Row) -> Table:
    """From which length on each choice of tokens pays, as `select_crossings` found it."""
    titles = ["tokens chosen by", "faster than dense from", "than dimensions alone from", "min_length"]
    rows = []
    for row in result["selects"]:
        cells = [select_name(row), *(_crossing(row[key], result) for key in ("dense", "dimensions", "min_length"))]
        rows.append([*cells, f"{row['slowest']:.2f}"])
    return [*titles, "time with it to dimensions alone, at most"], rows


def select_name(row: Row) -> str:
    """Such as "select_p 0.95"."""
    names = ("select_p", "select_tokens", "select_share")
    return next((f"{name} {row[name]}" for name in names if row.get(name) is not None), "")


def _crossing(length: float | None, result: Row) -> str:
    if length is None:
        return f"not up to {result['rows'][-1]['length']}"
    return f"{'up to ' if length <= result['lengths'][0] else ''}{length:.0f}"


def retention_table(result: dict[str, Any]) -> Table:
    """What `evaluate_retention` returned: a row a ratio, the loss of each selection beside each other."""
    cells = {}
    for what, key in (("scores", "score_loss"), ("softmax", "softmax_loss")):
        for row in result["rows"]:
            cells[f"{row['k_ratio']:g}", f"{what} lost, {row['selection']}"] = f"{row[key]:.2%}"
    return matrix("k_ratio", cells)


def images_table(result: dict[str, Any]) -> Table:
    """What `evaluate_images` returned: a row a setting."""
    columns = [*IMAGES[:-1], replace(IMAGES[-1], title="same nearest neighbour")]
    return table_of("setting", _by_setting(result), columns)


def layers_table(result: dict[str, Any]) -> Table:
    """The same's retention: softmax lost in each layer, mean over heads, under the paper's selection at each ratio."""
    cells = {}
    for row in result["retention"]:
        for layer in row["per_layer"] if (row["selection"], row["basis"]) == ("magnitude", "aqua") else ():
            lost = layer["softmax_loss"]
            cells[str(layer["layer"]), f"k_ratio {row['k_ratio']:g}"] = f"{sum(lost) / len(lost):.1%}"
    return matrix("softmax lost in layer", cells)


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
    """Right answers of all, for each combination of the questions' labels, dense and under each setting.

    Questions of several tasks have a row more for each length: all of them together.
    """
    figures = ("tokens", "expected", "answers", "correct")
    labels = [name for name in result["questions"][0] if name not in figures]
    marks: dict[tuple[str, ...], list[list[float]]] = {}
    together: dict[tuple[str, ...], list[list[float]]] = {}
    for question in result["questions"]:
        at = tuple(str(question[name]) for name in labels)
        marks.setdefault(at, []).append(question["correct"])
        if "task" in labels:
            together.setdefault(("all", *at[1:]), []).append(question["correct"])
    marks |= together if len(marks) > len(together) else {}
    counts = {at: [f"{sum(each):.4g}/{len(each)}" for each in zip(*found, strict=True)] for at, found in marks.items()}
    rows = [[*at, *cells] for at, cells in counts.items()]
    return [*labels, "dense", *(name for name, _ in _by_setting(result))], rows


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with a newline at its end."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
