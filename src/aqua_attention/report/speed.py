# SPDX-License-Identifier: Apache-2.0
"""What is saved: the benchmarks of memory, decoding kernels, whole steps, and the break-even length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aqua_attention.evaluate.record import Record, number, numbers
from aqua_attention.report.document import Block, Panel, Section, commands_of, plain
from aqua_attention.report.figures import Axis, Curve, bars, curves
from aqua_attention.report.tables import DECODE, GENERATE, MEMORY, Column, Row, row_name, table_of


@dataclass(frozen=True)
class _Benchmark:
    """A benchmark with a bar for each row.

    Attributes:
        title: of the block, before the size.
        first: title of the rows' names.
        x, key: the axis, and the figure that is drawn; mark: one that is marked beside it.
    """

    title: str
    note: str
    first: str
    columns: Sequence[Column]
    x: str
    key: str
    mark: str = ""


BENCHMARKS = {
    "decode": _Benchmark(
        "One attention step",
        "Times faster than the fastest dense kernel of the same run, attention alone; whole step: with what comes "
        "before it. The mark is what the bytes read would allow at most.",
        *("kernel", DECODE, "to the best dense attention (higher is faster)", "ratio", "ceiling"),
    ),
    "generate": _Benchmark(
        "A whole step",
        "A whole decoding step of a model; roofline: what reading its bytes takes at the measured bandwidth.",
        *("setting", GENERATE, "tokens a second (higher is faster)", "tokens_per_second"),
    ),
    "memory": _Benchmark(
        "Memory",
        "Bytes of the cache as allocated, and the most that the whole generation added.",
        *("cache", MEMORY, "bytes to DynamicCache (lower is smaller)", "ratio"),
    ),
}


def speed_sections(records: Sequence[Record]) -> list[Section]:
    """A block for each benchmark, in the order of the files."""
    blocks: list[Block] = []
    for place, record in enumerate(r for r in records if r.suite in BENCHMARKS or r.suite == "breakeven"):
        blocks += _breakeven(place, record) if record.suite == "breakeven" else [_measured(place, record)]
    return [Section("Time and memory", "", blocks)] if blocks else []


def _measured(place: int, record: Record) -> Block:
    kind, result = BENCHMARKS[record.suite], record.figures
    is_memory = record.suite == "memory"
    words = [record.model] if is_memory and record.model else []
    rows = [(row["setting"] if is_memory else row_name(row), row) for row in result["rows"]]
    title = f"{kind.title}{', compiled' if result.get('compiled') else ''}: {', '.join([*words, _size(result)])}"
    panels = _bars(f"speed{place}", kind, [(name, row) for name, row in rows if "absent" not in row])
    return Block(title, kind.note, table_of(kind.first, rows, kind.columns), commands_of([record]), panels)


def _breakeven(place: int, record: Record) -> list[Block]:
    result = record.figures
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


def _bars(identity: str, kind: _Benchmark, rows: Sequence[tuple[str, Row]]) -> list[Panel]:
    shown = [(name, row) for name, row in rows if math.isfinite(number(row.get(kind.key)))]
    if not shown:
        return []
    marks = (kind.mark, [number(row.get(kind.mark)) for _, row in shown]) if kind.mark else None
    form: Callable[[float], str] = _two if kind.key == "ratio" else plain
    names, values = [name for name, _ in shown], [number(row[kind.key]) for _, row in shown]
    return [bars(identity, f"{kind.x}, {len(shown)} rows", Axis(kind.x), names, values, marks=marks, text=form)]


def _micro(seconds: float) -> str:
    return plain(1e6 * seconds, ".1f")


def _two(value: float) -> str:
    return plain(value, ".2f")
