# SPDX-License-Identifier: Apache-2.0
"""What is saved: the benchmarks of memory, decoding kernels, whole steps, and the break-even length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from aqua_attention.report.document import Block, Panel, Section, commands_of, percent, plain
from aqua_attention.report.figures import Axis, Curve, bars, curves
from aqua_attention.report.record import Record, number, numbers
from aqua_attention.report.tables import Table

Columns = dict[str, tuple[str, Callable[[float], str]]]
"""By title: the field, and how it is written."""


def speed_sections(records: Sequence[Record]) -> list[Section]:
    """A block for each benchmark, in the order of the files."""
    makers: dict[str, Callable[[int, Record], list[Block]]] = {
        "decode": _decode,
        "generate": _generate,
        "memory": _memory,
        "breakeven": _breakeven,
    }
    found = [record for record in records if record.suite in makers]
    blocks = [block for place, record in enumerate(found) for block in makers[record.suite](place, record)]
    return [Section("Time and memory", "", blocks)] if blocks else []


def _decode(place: int, record: Record) -> list[Block]:
    result = _result(record)
    title = f"One attention step: {_size(result)}"
    note = (
        "Times faster than the fastest dense kernel of the same run, attention alone; whole step: with what comes "
        "before it. The mark is what the bytes read would allow at most."
    )
    columns: Columns = {
        "us": ("seconds", _micro),
        "of the read bandwidth": ("share", percent),
        "to the best dense": ("ratio", _two),
        "ceiling": ("ceiling", _two),
        "whole step: us": ("step_seconds", _micro),
        "whole step: to the best dense": ("step_ratio", _two),
    }
    rows, table = _table("kernel", result["rows"], columns)
    panel = _bars(f"speed{place}", "to the best dense attention (higher is faster)", rows, "ratio", "ceiling")
    return [Block(title, note, table, commands_of([record]), panel)]


def _generate(place: int, record: Record) -> list[Block]:
    result = _result(record)
    columns: Columns = {
        "tokens/s": ("tokens_per_second", lambda value: plain(value, ".1f")),
        "ms a token": ("seconds", lambda value: plain(1e3 * value, ".2f")),
        "to the best dense": ("ratio", _two),
        "roofline: ms": ("roofline_seconds", lambda value: plain(1e3 * value, ".2f")),
        "of the roofline": ("share", percent),
    }
    rows, table = _table("setting", result["rows"], columns)
    panel = _bars(f"speed{place}", "tokens a second (higher is faster)", rows, "tokens_per_second")
    note = "A whole decoding step of a model; roofline: what reading its bytes takes at the measured bandwidth."
    title = f"A whole step{', compiled' if result.get('compiled') else ''}: {_size(result)}"
    return [Block(title, note, table, commands_of([record]), panel)]


def _memory(place: int, record: Record) -> list[Block]:
    result = _result(record)
    columns: Columns = {
        "MB": ("bytes", lambda value: plain(value / 1e6, ".1f")),
        "to DynamicCache": ("ratio", lambda value: plain(value, ".3f")),
        "peak MB": ("peak_bytes", lambda value: plain(value / 1e6, ".0f")),
        "to its peak": ("peak_ratio", _two),
    }
    rows = [row | {"name": row["setting"]} for row in result["rows"]]
    rows, table = _table("cache", rows, columns)
    panel = _bars(f"speed{place}", "bytes to DynamicCache (lower is smaller)", rows, "ratio")
    note = "Bytes of the cache as allocated, and the most that the whole generation added."
    title = f"Memory: {', '.join(filter(None, [record.model, _size(result)]))}"
    return [Block(title, note, table, commands_of([record]), panel)]


def _breakeven(place: int, record: Record) -> list[Block]:
    result = _result(record)
    size, commands = _size(result), commands_of([record])
    names = [
        "fastest dense",
        "k = d",
        *(f"k_ratio {plain(number(e.get('k_ratio')))}" for e in result["breakeven"]),
    ]
    points: list[list[tuple[float, list[float]]]] = [[] for _ in names]
    rows = []
    for row in result["rows"]:
        length, times = number(row.get("length")), [*map(number, (row.get("dense"), row.get("whole")))]
        times += numbers(row["aqua"])
        rows.append([plain(length, ".0f"), *(_micro(seconds) for seconds in times[: len(names)])])
        rows[-1] += [""] * (len(names) + 1 - len(rows[-1])) + [str(row.get("dense_name", ""))]
        for line, seconds in zip(points, times, strict=False):
            line.append((length, [1e6 * seconds]))
    drawn = [Curve(name, line) for name, line in zip(names, points, strict=True)]
    axes = Axis("length (tokens)", "log2"), [Axis("one step of a layer (us)", "log")]
    panel = curves(f"speed{place}", "Time of a decoding step by length, dense and AQUA", *axes, drawn)
    note = "Rotate, choose, append and attend, of one sequence; lower is faster."
    table = (["length", *(f"{name}: us" for name in names), "the dense one"], rows)
    lengths = [
        [plain(number(each.get("k_ratio"))), *(_crossing(each.get(key)) for key in ("whole", "dense")), *_theory(each)]
        for each in result["breakeven"]
    ]
    titles = ["k_ratio", "against k = d", "against the fastest dense", "theory (paper)", "theory (shared keys)"]
    words = (
        "From which length on choosing dimensions is faster, and stays so, among the lengths measured. Theory counts "
        "multiplications against dense attention: 2 d² / (d - k), and d² (1 + 1/G) / (d - k) where G query heads share "
        "keys."
    )
    return [
        Block(f"Time by length: {size}", note, table, commands, [panel]),
        Block(f"Break-even (tokens): {size}", words, (titles, lengths), commands),
    ]


def _crossing(length: Any) -> str:
    return "none" if length is None else plain(number(length), ".0f")


def _theory(row: dict[str, Any]) -> list[str]:
    return [plain(number(row.get(key)), ".0f") for key in ("paper", "theory")]


def _result(record: Record) -> dict[str, Any]:
    assert record.result is not None
    return record.result


def _size(result: dict[str, Any]) -> str:
    words = [str(result["device"])] if "device" in result else []
    if "length" in result:
        words.append(f"{plain(number(result.get('batch')))} x {plain(number(result['length']), '.0f')} tokens")
    if "layers" in result:
        words.append(f"{result['layers']} layers of {result.get('hidden')}")
    elif "heads" in result:
        words.append(f"{result['heads']} query and {result.get('groups')} key-value heads of {result.get('head_dim')}")
    words.append(str(result.get("dtype", "")).removeprefix("torch."))
    return ", ".join(words)


def _table(first: str, rows: list[dict[str, Any]], columns: Columns) -> tuple[list[dict[str, Any]], Table]:
    """Those that ran, each with its `name`, and the table of all."""
    named = []
    for row in rows:
        ratio = row.get("k_ratio")
        named.append(row | {"name": row["name"] if ratio is None else f"{row['name']}, k_ratio {plain(number(ratio))}"})
    cells = []
    for row in named:
        if "absent" in row:
            cells.append([row["name"], f"absent: {row['absent']}", *[""] * (len(columns) - 1)])
        else:
            cells.append([row["name"], *("" if row.get(k) is None else f(number(row[k])) for k, f in columns.values())])
    return [row for row in named if "absent" not in row], ([first, *columns], cells)


def _bars(identity: str, x: str, rows: list[dict[str, Any]], key: str, mark: str | None = None) -> list[Panel]:
    shown = [row for row in rows if math.isfinite(number(row.get(key)))]
    if not shown:
        return []
    marks = (mark, [number(row.get(mark)) for row in shown]) if mark else None
    names, values = [row["name"] for row in shown], [number(row[key]) for row in shown]
    alt = f"{x}, {len(shown)} rows"
    return [bars(identity, alt, Axis(x), names, values, marks=marks, text=_two if key == "ratio" else plain)]


def _micro(seconds: float) -> str:
    return plain(1e6 * seconds, ".1f")


def _two(value: float) -> str:
    return plain(value, ".2f")
