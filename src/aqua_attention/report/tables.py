# SPDX-License-Identifier: Apache-2.0
"""Results and projections as rows of words: one source for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aqua_attention.calibration.projections import Projections
from aqua_attention.config import knobs
from aqua_attention.model.fingerprint import describe_shape

Table = tuple[list[str], list[list[str]]]
"""Column titles, and the cells of each row."""


def perplexity_table(result: dict[str, Any]) -> Table:
    """What `evaluate_perplexity` returned: gain (products left out) and loss, a row a setting."""
    titles = ["setting", "products outside the window", "perplexity", "change", "KL to dense", "same top token"]
    rows = [["dense", "100%", f"{result['dense']['perplexity']:.3f}", "", "", ""]]
    rows += [
        [
            describe_setting(row["setting"], row["basis"]),
            f"{row['mean_k']:.0%}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_change']:+.2%}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
        ]
        for row in result["rows"]
    ]
    return titles, rows


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
    titles = [
        f"cache of {result['length']} tokens, {result['dtype']}",
        "MB",
        "to DynamicCache",
        "peak MB",
        "to its peak",
    ]
    rows = []
    for row in result["rows"]:
        name = row["setting"] if isinstance(row["setting"], str) else f"AQUA, {describe_setting(row['setting'])}"
        if "absent" in row:
            rows.append([name, f"absent: {row['absent']}", "", "", ""])
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        share = "" if row["peak_ratio"] is None else f"{row['peak_ratio']:.2f}"
        rows.append([name, f"{row['bytes'] / 1e6:.1f}", f"{row['ratio']:.3f}", peak, share])
    return titles, rows


def decode_table(result: dict[str, Any]) -> Table:
    """What `measure_decode` returned: a row a kernel."""
    titles = [
        f"{result['device']}, {result['batch']} x {result['length']} tokens, {result['heads']} query and "
        f"{result['groups']} key-value heads of {result['head_dim']}, {result['dtype']}",
        "us",
        "of the read bandwidth",
        "to the best dense",
        "ceiling",
        "whole step: us",
        "to the best dense",
    ]
    low = any(row.get("low_ratio") for row in result["rows"])
    if low:
        titles.append("to the best in fp8")
    rows = []
    for row in result["rows"]:
        name = row["name"] if row["k_ratio"] is None else f"{row['name']}, k_ratio {row['k_ratio']:g}"
        if "absent" in row:
            rows.append([name, f"absent: {row['absent']}", *[""] * (len(titles) - 2)])
            continue
        keys = ("ratio", "step_ratio", "low_step_ratio")[: 3 if low else 2]
        ratio, *step_ratios = ("" if row[key] is None else f"{row[key]:.2f}" for key in keys)
        times = [f"{1e6 * row[key]:.1f}" for key in ("seconds", "step_seconds")]
        rows.append([name, times[0], f"{row['share']:.1%}", ratio, f"{row['ceiling']:.2f}", times[1], *step_ratios])
    return titles, rows


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
    titles = [
        f"{result['device']}, {result['batch']} x {result['length']} tokens, {result['layers']} layers of "
        f"{result['hidden']}, {result['dtype']}{', compiled' if result.get('compiled') else ''}",
        "tokens/s",
        "ms a token",
        "to the best dense",
        "roofline: ms",
        "of the roofline",
    ]
    rows = []
    for row in result["rows"]:
        name = row["name"] if row["k_ratio"] is None else f"{row['name']}, k_ratio {row['k_ratio']:g}"
        if "absent" in row:
            rows.append([name, f"absent: {row['absent']}", *[""] * (len(titles) - 2)])
            continue
        times = [f"{1e3 * row[key]:.2f}" for key in ("seconds", "roofline_seconds")]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        rows.append([name, f"{row['tokens_per_second']:.1f}", times[0], ratio, times[1], f"{row['share']:.1%}"])
    return titles, rows


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
    titles = ["setting", "products outside the window", "mean cosine", "lowest cosine", "same nearest neighbour"]
    rows = [
        [
            describe_setting(row["setting"], row["basis"]),
            f"{row['mean_k']:.0%}",
            f"{row['mean_cosine']:.4f}",
            f"{row['lowest_cosine']:.4f}",
            f"{row['same_neighbour']:.1%}",
        ]
        for row in result["rows"]
    ]
    return titles, rows


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
    titles = ["setting", "products outside the window", "right"]
    titles += ["only dense right", "only AQUA right", "p (paired)", "same answer"]
    rows = [["dense", "100%", f"{result['dense']['accuracy']:.1%}", "", "", "", ""]]
    rows += [
        [
            describe_setting(row["setting"], row["basis"]),
            f"{row['mean_k']:.0%}",
            f"{row['accuracy']:.1%}",
            str(row["lost"]),
            str(row["gained"]),
            f"{row['p_value']:.2g}",
            f"{row['same_answer']:.1%}",
        ]
        for row in result["rows"]
    ]
    return titles, rows


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
        ["fits", describe_shape(projections.model["shape"])],
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


def spectrum_table(projections: Projections) -> Table:
    """How many leading dimensions hold 90% and 99% of the energy of queries and keys, least to most over heads."""
    titles = ["layer", "key-value heads", "head_dim", "dims for 90%", "dims for 99%"]
    rows = []
    for row in spectrum(projections):
        spans = [f"{min(dims)}-{max(dims)}" for dims in (row["dims_90"], row["dims_99"])]
        rows.append([str(row["layer"]), str(len(row["dims_90"])), str(row["head_dim"]), *spans])
    return titles, rows


def spectrum(projections: Projections) -> list[dict[str, Any]]:
    """A row a layer: `layer`, `head_dim`, and for each key-value head `dims_90` and `dims_99`."""
    rows = []
    for index, layer in projections.layers.items():
        # In descending order whatever the basis: "how few dimensions could hold it".
        cumulated = layer.energy.double().sort(-1, descending=True).values.cumsum(-1)
        rows.append(
            {
                "layer": index,
                "head_dim": layer.energy.shape[-1],
                "dims_90": ((cumulated < 0.90).sum(-1) + 1).tolist(),
                "dims_99": ((cumulated < 0.99).sum(-1) + 1).tolist(),
            }
        )
    return rows


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with a newline at its end."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
