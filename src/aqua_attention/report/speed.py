# SPDX-License-Identifier: Apache-2.0
"""What is saved: the benchmarks of memory, decoding kernels, whole steps, and the break-even length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aqua_attention.evaluate.record import Record, number, numbers
from aqua_attention.report.document import Block, Section, count, plain
from aqua_attention.report.figures import Axis, bars, curves
from aqua_attention.report.runs import titled_apart
from aqua_attention.report.tables import (
    DECODE,
    GENERATE,
    MEMORY,
    SERVE,
    STEPS,
    Column,
    Row,
    Table,
    benchmark_table,
    generate_columns,
    held_table,
    row_name,
    select_name,
    size_of,
)


@dataclass(frozen=True)
class _Benchmark:
    """A benchmark with a bar for each row: the figure `key` along the axis `x`, and `mark` marked beside it."""

    title: str
    note: str
    first: str
    columns: Sequence[Column]
    x: str
    key: str = "ratio"
    form: str = "z.2f"
    mark: str = ""


BENCHMARKS = {
    "decode": _Benchmark(
        "One attention step",
        "Times faster than the fastest dense kernel of the same run, attention alone; whole step: with what comes "
        "before it. The mark is what the bytes read would allow at most.",
        *("kernel", DECODE, "to the best dense attention (higher is faster)"),
        mark="ceiling",
    ),
    "generate": _Benchmark(
        "model.generate",
        "Times as often as dense attention, whose steps are recorded too where ours are (the fastest kernel), writes a "
        "token. First token: from the call on, and times as long as dense attention's. Roofline: what reading weights, "
        "keys and values takes at the measured bandwidth.",
        *("setting", GENERATE, "speed to dense attention (higher is faster)"),
    ),
    "serve": _Benchmark(
        "vLLM server",
        "What vLLM's own client measures of a stock server and of one with AQUA, with the same options. First: from "
        "sending a request to its first token; next: from each token to the one after; medians, and times as long as "
        "stock's. Cache: tokens that there is room for, as vLLM's log says.",
        *("server", SERVE, "tokens a second to stock (higher is faster)"),
    ),
    "memory": _Benchmark(
        "Memory",
        "Bytes of the cache as allocated, and the most that the whole generation added.",
        *("cache", MEMORY, "bytes to DynamicCache (lower is smaller)"),
    ),
}
STEPS_ALONE = _Benchmark(
    "A whole step",
    "A whole decoding step of a model; roofline: what reading its bytes takes at the measured bandwidth.",
    *("setting", STEPS, "tokens a second (higher is faster)", "tokens_per_second", "z.3g"),
)
"""What `aqua bench generate` of earlier versions measured."""
PARTS_NOTE = (
    "As allocated, with room that is not used yet. The copy of the keys is scored; other: what kernels work in. By "
    "widths: what keys, values and copy of so many tokens need."
)
LENGTHS_NOTE = "Rotate, choose, append and attend, of one sequence; lower is faster."
SELECTS_NOTE = (
    "Of a step that reads chosen tokens only. Dimensions alone: the fastest of k = d and the k_ratios. min_length "
    "switches to reading all tokens in the same cache; with it, a step takes at most so many times as long as without "
    "a choice of tokens."
)
BREAKEVEN_NOTE = (
    "From which length on choosing dimensions is faster, and stays so, among the lengths measured. Theory counts "
    "multiplications against dense attention: 2 d² / (d - k), and d² (1 + 1/G) / (d - k) where G query heads share "
    "keys."
)


def speed_sections(records: Sequence[Record]) -> list[Section]:
    """A block for each benchmark, in the order of the files."""
    blocks: list[Block] = []
    for place, record in enumerate(r for r in records if r.suite in BENCHMARKS or r.suite == "breakeven"):
        blocks += (_breakeven if record.suite == "breakeven" else _measured)(f"speed{place}", record)
    return [Section("Time and memory", titled_apart(blocks))]


def _measured(identity: str, record: Record) -> list[Block]:
    kind, result, columns = BENCHMARKS[record.suite], record.figures, BENCHMARKS[record.suite].columns
    if record.suite == "generate":
        columns = generate_columns(result)
        kind = kind if "new_tokens" in result else STEPS_ALONE
    drawn = [row for row in result["rows"] if "absent" not in row and math.isfinite(number(row.get(kind.key)))]
    panels = []
    if drawn:
        marks = (kind.mark, [number(row.get(kind.mark)) for row in drawn]) if kind.mark else None
        values = [(row_name(row), number(row[kind.key])) for row in drawn]
        panels = [bars(identity, f"{kind.x}, {len(drawn)} rows", Axis(kind.x), values, kind.form, marks)]
    size = ", ".join(
        filter(
            None,
            [
                record.model if record.suite in ("memory", "generate", "serve") else "",
                size_of(result).replace("torch.", ""),
            ],
        )
    )
    title = f"{kind.title}{', compiled' if result.get('compiled') else ''}: {size}"
    blocks = [Block(title, benchmark_table(kind.first, result, columns), [record], panels, kind.note)]
    if record.suite == "memory" and (parts := held_table(result))[1]:
        blocks.append(Block(f"Parts of caches that choose tokens (MB): {size}", parts, [record], note=PARTS_NOTE))
    return blocks


def _of_choices(selects: Sequence[Row]) -> Table:
    """From which length on each choice of tokens pays."""
    titles = ["tokens chosen by", "against the fastest dense", "against dimensions alone", "min_length"]
    rows = []
    for row in selects:
        cells = ["none" if row.get(key) is None else count(row[key]) for key in ("dense", "dimensions", "min_length")]
        rows.append([select_name(row), *cells, plain(row.get("slowest"), "z.2f")])
    return [*titles, "time with it to dimensions alone, at most"], rows


def _breakeven(identity: str, record: Record) -> list[Block]:
    result, size = record.figures, size_of(record.figures).replace("torch.", "")
    names = ["fastest dense", "k = d", *(f"k_ratio {plain(e.get('k_ratio'))}" for e in result["breakeven"])]
    given = result.get("selects")
    selects = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    names += [select_name(each) for each in selects]
    points, rows = [], []
    for row in result["rows"]:
        times = [number(row.get("dense")), number(row.get("whole")), *numbers(row["aqua"])]
        chosen = row.get("select")
        times = [*times, *numbers(chosen if isinstance(chosen, list) else [])][: len(names)]
        points += [(name, number(row.get("length")), [1e6 * time]) for name, time in zip(names, times, strict=False)]
        written = [plain(1e6 * time, "z.1f") for time in times] + [""] * (len(names) - len(times))
        rows.append([count(row.get("length")), *written, str(row.get("dense_name", ""))])
    axes = Axis("length (tokens)", "log2"), [Axis("one step of a layer (us)", "log")]
    panel = curves(identity, "Time of a decoding step by length, dense and AQUA", *axes, points)
    times_table = ["length", *(f"{name}: us" for name in names), "the dense one"], rows
    titles = ["k_ratio", "against k = d", "against the fastest dense", "theory (paper)", "theory (shared keys)"]
    lengths = []
    for row in result["breakeven"]:
        crossings = ["none" if row.get(key) is None else count(row[key]) for key in ("whole", "dense")]
        lengths.append([plain(row.get("k_ratio")), *crossings, count(row.get("paper")), count(row.get("theory"))])
    blocks = [
        Block(f"Time by length: {size}", times_table, [record], [panel], LENGTHS_NOTE),
        Block(f"Break-even (tokens): {size}", (titles, lengths), [record], note=BREAKEVEN_NOTE),
    ]
    if selects:
        table = _of_choices(selects)
        blocks.append(Block(f"Break-even of choosing tokens: {size}", table, [record], note=SELECTS_NOTE))
    return blocks
