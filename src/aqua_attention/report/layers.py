# SPDX-License-Identifier: Apache-2.0
"""What differs from layer to layer: retention, adaptive k, and the spectrum of queries and keys."""

import math
from collections.abc import Sequence

from aqua_attention.evaluate.record import Record, number, numbers
from aqua_attention.report.document import Block, Section, name_of, percent, plain
from aqua_attention.report.figures import Axis, curves, heat
from aqua_attention.report.runs import runs_of, titled_apart

HEAT_RATIO = 0.5
"""Heat maps of retention are drawn at the k_ratio nearest to this."""
RETENTION_NOTE = (
    "Score loss: squared length of what a query's scores miss over that of the scores, both without their mean. "
    "Softmax loss: half the summed absolute difference of the probabilities, 0 equal, 1 disjoint."
)
SPECTRUM_NOTE = (
    "How many leading dimensions hold 90% and 99% of the energy of queries and keys; fewest and most over heads."
)


def layer_sections(records: Sequence[Record]) -> list[Section]:
    """Retention, k by layer and spectra, where they are measured."""
    return [Section("Layers and heads", [*_retention(records), *_adaptive(records), *_spectra(records)])]


def _retention(records: Sequence[Record]) -> list[Block]:
    blocks = []
    axes = [Axis("score loss", "percent"), Axis("softmax loss", "percent")]
    for place, (title, group) in enumerate(runs_of(records, "retention").items()):
        points = []
        for record in group:
            losses = [number(record.figures[key]) for key in ("score_loss", "softmax_loss")]
            points.append((_selection(record), number(record.figures["k_ratio"]), losses))
        rows = [[name, plain(ratio), *(percent(loss, 2) for loss in losses)] for name, ratio, losses in points]
        alt = "Loss of scores and of softmax by k_ratio and selection"
        panel = curves(f"retention{place}", alt, Axis("k_ratio"), axes, points)
        table = ["selection", "k_ratio", "score loss", "softmax loss"], rows
        blocks.append(Block(f"Retention: {title}", table, group, [panel], RETENTION_NOTE))
        blocks += _retention_heats(place, title, group)
    return blocks


def _selection(record: Record) -> str:
    basis = {"aqua": "", "none": ", not rotated"}.get(record.basis, f", basis {record.basis}")
    return f"{record.figures['selection']}{basis}"


def _retention_heats(place: int, title: str, group: Sequence[Record]) -> list[Block]:
    """Softmax loss of each layer and head, all selections in the same colours."""
    ratios = sorted(filter(math.isfinite, {number(record.figures["k_ratio"]) for record in group}))
    if not ratios:
        return []
    ratio = min(ratios, key=lambda each: abs(each - HEAT_RATIO))
    used = [record for record in group if number(record.figures["k_ratio"]) == ratio]
    losses = [[numbers(layer["softmax_loss"]) for layer in record.figures["per_layer"]] for record in used]
    limits = 0.0, max((v for grid in losses for row in grid for v in row if math.isfinite(v)), default=1.0)
    most = max(len(row) for grid in losses for row in grid)
    panels, rows = [], []
    for index, (record, grid) in enumerate(zip(used, losses, strict=True)):
        selection = _selection(record)
        names = [plain(layer.get("layer")) for layer in record.figures["per_layer"]]
        # Models may have layers of fewer heads.
        heads = max(map(len, grid))
        grid = [row + [math.nan] * (heads - len(row)) for row in grid]
        for name, row in zip(names, grid, strict=True):
            rows.append(_filled([selection, name, *map(percent, row)], most + 2))
        alt = f"Softmax loss by layer and head at k_ratio {ratio:g}, {selection}"
        sides = ("layer", names), ("query head", list(map(str, range(heads))))
        named = f"retention{place}-{index}", alt, f"{selection}, k_ratio {ratio:g}"
        panels.append(heat(*named, *sides, grid, unit="softmax loss (%)", limits=limits))
    table = ["selection", "layer", *(f"head {head}" for head in range(most))], rows
    return [Block(f"Softmax loss by layer and head, k_ratio {ratio:g}: {title}", table, used, panels)]


def _adaptive(records: Sequence[Record]) -> list[Block]:
    """Share of dimensions by layer, of settings whose layers differ (adaptive k)."""
    blocks = []
    for place, (title, group) in enumerate(runs_of(list(filter(_is_uneven, records)), "perplexity").items()):
        named = [(name_of(record), numbers(record.figures["mean_k_per_layer"])) for record in group]
        points = [(name, float(layer), [share]) for name, shares in named for layer, share in enumerate(shares)]
        axes = Axis("layer", "count"), [Axis("dimensions multiplied", "percent")]
        panel = curves(f"adaptive{place}", f"Share of dimensions by layer, {len(named)} settings", *axes, points)
        most = max(len(shares) for _, shares in named)
        rows = [_filled([name, *(percent(share, 0) for share in shares)], most + 1) for name, shares in named]
        table = ["setting", *(f"layer {index}" for index in range(most))], rows
        blocks.append(Block(f"Dimensions by layer: {title}", table, group, [panel]))
    return blocks


def _is_uneven(record: Record) -> bool:
    shares = numbers(record.figures.get("mean_k_per_layer"))
    return record.suite == "perplexity" and len({round(share, 3) for share in shares if math.isfinite(share)}) > 1


def _spectra(records: Sequence[Record]) -> list[Block]:
    blocks = []
    for place, record in enumerate(record for record in records if record.suite == "spectrum"):
        points, rows = [], []
        for layer in record.figures["layers"]:
            index, dims = number(layer.get("layer")), number(layer.get("head_dim"))
            rows.append([plain(index), plain(dims)])
            for key, energy in (("dims_90", "90%"), ("dims_99", "99%")):
                bounds = {"fewest": min(numbers(layer[key])), "most": max(numbers(layer[key]))}
                rows[-1].append("-".join(map(plain, bounds.values())))
                for name, bound in bounds.items():
                    points.append((f"{energy}, {name} over heads", index, [bound / dims if dims else 0.0]))
        alt = "Share of dimensions that hold 90% and 99% of the energy, by layer"
        axes = Axis("layer", "count"), [Axis("of the head's dimensions", "percent")]
        panel = curves(f"spectrum{place}", alt, *axes, points)
        table = ["layer", "head_dim", "dims for 90%", "dims for 99%"], rows
        blocks.append(Block(f"Spectrum: {record.model or record.source}", table, [record], [panel], SPECTRUM_NOTE))
    return titled_apart(blocks)


def _filled(row: list[str], length: int) -> list[str]:
    return row + [""] * (length - len(row))
