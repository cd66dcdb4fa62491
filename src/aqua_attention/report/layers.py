# SPDX-License-Identifier: Apache-2.0
"""What differs from layer to layer: retention, adaptive k, and the spectrum of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aqua_attention.evaluate.record import Record, number, numbers
from aqua_attention.report.document import Block, Section, commands_of, percent, plain
from aqua_attention.report.figures import Axis, Curve, curves, heat
from aqua_attention.report.losses import mean_k_rows
from aqua_attention.report.runs import runs_of

HEAT_RATIO = 0.5
"""Heat maps of retention are drawn at the k_ratio nearest to this."""


def layer_sections(records: Sequence[Record]) -> list[Section]:
    """Retention, k by layer and spectra, where they are measured."""
    blocks = [*_retention(records), *_adaptive(records), *_spectra(records)]
    return [Section("Layers and heads", "", blocks)] if blocks else []


def _retention(records: Sequence[Record]) -> list[Block]:
    note = (
        "Score loss: squared length of what a query's scores miss over that of the scores, both without their mean. "
        "Softmax loss: half the summed absolute difference of the probabilities, 0 equal, 1 disjoint."
    )
    blocks = []
    for place, (title, group) in enumerate(runs_of(records, "retention").items()):
        lines: dict[str, list[tuple[float, list[float]]]] = {}
        rows = []
        for record in group:
            selection, ratio = _selection(record), number(record.figures["k_ratio"])
            losses = [number(record.figures[key]) for key in ("score_loss", "softmax_loss")]
            lines.setdefault(selection, []).append((ratio, losses))
            rows.append([selection, plain(ratio), *(percent(loss, 2) for loss in losses)])
        axes = [Axis("score loss", "percent"), Axis("softmax loss", "percent")]
        drawn = [Curve(selection, points) for selection, points in lines.items()]
        alt = "Loss of scores and of softmax by k_ratio and selection"
        panel = curves(f"retention{place}", alt, Axis("k_ratio"), axes, drawn)
        table = (["selection", "k_ratio", "score loss", "softmax loss"], rows)
        blocks.append(Block(f"Retention: {title}", note, table, commands_of(group), [panel]))
        blocks += _retention_heats(place, title, group)
    return blocks


def _selection(record: Record) -> str:
    basis = {"aqua": "", "none": ", not rotated"}.get(record.basis, f", basis {record.basis}")
    return f"{record.figures['selection']}{basis}"


def _retention_heats(place: int, title: str, group: Sequence[Record]) -> list[Block]:
    """Softmax loss of each layer and head, all selections in the same colours."""
    ratios = {number(record.figures["k_ratio"]) for record in group}
    finite = sorted(ratio for ratio in ratios if math.isfinite(ratio))
    if not finite:
        return []
    ratio = min(finite, key=lambda each: abs(each - HEAT_RATIO))
    used = [record for record in group if number(record.figures["k_ratio"]) == ratio]
    grids: list[tuple[str, tuple[list[str], list[list[float]]]]] = []
    for record in used:
        layers = record.figures["per_layer"]
        losses = _padded([numbers(layer["softmax_loss"]) for layer in layers])
        grids.append((_selection(record), ([plain(number(layer.get("layer"))) for layer in layers], losses)))
    values = [value for _, (_, grid) in grids for row in grid for value in row if math.isfinite(value)]
    panels = [
        heat(
            f"retention{place}-{index}",
            f"Softmax loss by layer and head at k_ratio {ratio:g}, {selection}",
            f"{selection}, k_ratio {ratio:g}",
            ("layer", "query head"),
            (names, [str(head) for head in range(len(grid[0]))]),
            grid,
            unit="softmax loss (%)",
            limits=(0.0, max(values, default=1.0)),
        )
        for index, (selection, (names, grid)) in enumerate(grids)
    ]
    heads = max(len(grid[0]) for _, (_, grid) in grids)
    rows = [
        [selection, name, *(percent(value) for value in row), *[""] * (heads - len(row))]
        for selection, (names, grid) in grids
        for name, row in zip(names, grid, strict=True)
    ]
    table = (["selection", "layer", *(f"head {head}" for head in range(heads))], rows)
    name = f"Softmax loss by layer and head, k_ratio {ratio:g}: {title}"
    return [Block(name, "", table, commands_of(used), panels)]


def _adaptive(records: Sequence[Record]) -> list[Block]:
    blocks = []
    uneven = [record for record in records if mean_k_rows([record])]
    for place, (title, group) in enumerate(runs_of(uneven, "perplexity").items()):
        named = mean_k_rows(group)
        count = max(len(shares) for _, shares in named)
        drawn = [Curve(name, [(float(x), [y]) for x, y in enumerate(shares)]) for name, shares in named]
        alt = f"Share of dimensions by layer, {len(named)} settings"
        panel = curves(
            f"adaptive{place}", alt, Axis("layer", "count"), [Axis("dimensions multiplied", "percent")], drawn
        )
        rows = [[name, *(percent(share, 0) for share in shares)] for name, shares in named]
        rows = [row + [""] * (count + 1 - len(row)) for row in rows]
        table = (["setting", *(f"layer {index}" for index in range(count))], rows)
        blocks.append(Block(f"Dimensions by layer: {title}", "", table, commands_of(group), [panel]))
    return blocks


def _spectra(records: Sequence[Record]) -> list[Block]:
    blocks = []
    note = "How many leading dimensions hold 90% and 99% of the energy of queries and keys; fewest and most over heads."
    for place, record in enumerate(record for record in records if record.suite == "spectrum"):
        spans: dict[str, list[tuple[float, list[float]]]] = {}
        rows = []
        for layer in record.figures["layers"]:
            index, dims = number(layer.get("layer")), number(layer.get("head_dim"))
            words = [plain(index), plain(dims)]
            for key, energy in (("dims_90", "90%"), ("dims_99", "99%")):
                counts = numbers(layer[key])
                words.append("-".join(plain(bound) for bound in (min(counts), max(counts))))
                for name, bound in (("fewest", min(counts)), ("most", max(counts))):
                    spans.setdefault(f"{energy}, {name} over heads", []).append(
                        (index, [bound / dims if dims else 0.0])
                    )
            rows.append(words)
        alt = "Share of dimensions that hold 90% and 99% of the energy, by layer"
        drawn = [Curve(name, points) for name, points in spans.items()]
        panel = curves(
            f"spectrum{place}", alt, Axis("layer", "count"), [Axis("of the head's dimensions", "percent")], drawn
        )
        table = (["layer", "head_dim", "dims for 90%", "dims for 99%"], rows)
        blocks.append(Block(f"Spectrum: {record.model or record.source}", note, table, commands_of([record]), [panel]))
    return blocks


def _padded(rows: list[list[float]]) -> list[list[float]]:
    """Rows of one length: models may have layers of fewer heads."""
    longest = max(map(len, rows))
    return [row + [math.nan] * (longest - len(row)) for row in rows]
