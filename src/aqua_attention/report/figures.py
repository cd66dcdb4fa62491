# SPDX-License-Identifier: Apache-2.0
"""The three kinds of drawings: curves, heat maps, bars."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from aqua_attention.evaluate.record import number
from aqua_attention.report import svg
from aqua_attention.report.document import Panel, plain
from aqua_attention.report.tables import Row

MOST_WRITTEN = 6
"""So many columns of a heat map have room for a figure in each cell."""
LEAST_SPAN = 4.0
"""Largest to smallest value of a logarithmic axis, at least."""
MARKERS, OTHERS, DENSE = "osD^vPXh", "others: see the numbers", "dense"
FEW = 6
"""So many places on an axis have a tick each."""
CLOSEST = 25
"""And if none is closer to the next than the axis divided by this, because numbers would run into each other."""
BESIDE = 14
"""Pixels between curves over a single place."""
SMALLEST, LARGEST = 1e-6, 1e9
"""What a logarithmic axis shows of anything smaller, and any axis of anything larger."""

WIDTHS = ("", svg.WIDTH), ("-wide", svg.WIDE)
"""What ends the name of each drawing of a panel, and its width."""

Point = tuple[str, float, Sequence[float]]
"""Label of its curve, x, and a y for each of the axes above each other; NaN leaves a gap."""
Labels = tuple[str, Sequence[str]]


class Axis(NamedTuple):
    """Title with unit, and scale: "percent", "share" (the same, all of 0 to 100%), "change" (per cent, linear near 0,
    logarithmic beyond 1%), "log", "log2", "count" (whole numbers) or "linear".
    """

    title: str
    scale: str = "linear"


def curves(
    name: str,
    alt: str,
    x: Axis,
    ys: Sequence[Axis],
    points: Iterable[Point],
    joined: bool = True,
    width: int = svg.WIDE,
) -> Panel:
    """Curves over a common x, their points joined by lines or not, an axis for each of `ys`.

    The axes stand above each other, and beside each other in the wide drawing. Where there are more curves than
    colours, the longest are coloured, and all others are one grey. Dense attention is a ring, which shows around
    whatever has the same value. Curves over a single x stand beside each other. `width` is that of the wide drawing.
    """
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point[0], []).append(point)
    narrow = _curves(name, alt, x, ys, lines, joined)
    return Panel(narrow, alt, _curves(f"{name}-wide", alt, x, ys, lines, joined, wide=width))


def _curves(
    name: str, alt: str, x: Axis, ys: Sequence[Axis], lines: dict[str, list[Point]], joined: bool, wide: int = 0
) -> str:
    looks = _looks(lines, "-" if joined else "")
    xs = sorted({at for line in lines.values() for _, at, _ in line if abs(at) < LARGEST})
    entries = len({look["label"] for look in looks.values()})
    columns, rows = (len(ys), 1) if wide else (1, len(ys))
    legend = 3 if wide else 1
    height = 50 + (300 if wide else 200) * rows + 17 * -(-entries // legend)
    with svg.styled(height, wide or svg.WIDTH) as figure:
        axes: Any = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
        for place, (axis, y) in enumerate(zip(axes, ys, strict=True)):
            for number_of, (label, look) in enumerate(looks.items()):
                line = sorted((at, values[place]) for _, at, values in lines[label] if abs(at) < LARGEST)
                heights = [max(value, SMALLEST) if y.scale.startswith("log") else value for _, value in line]
                heights = [
                    min(max(value, -LARGEST), LARGEST) if math.isfinite(value) else math.nan for value in heights
                ]
                (drawn,) = axis.plot([at for at, _ in line], heights, **look)
                if len(xs) == 1:
                    _move(drawn, (number_of - (len(looks) - 1) / 2) * min(BESIDE, 200 / len(looks)))
            _scale(axis.xaxis, x)
            _scale(axis.yaxis, y)
            _at_places(axis.xaxis, x, xs)
            axis.set_ylabel(y.title)
            axis.grid(True, linewidth=0.7)
        for axis in axes if wide else axes[-1:]:
            axis.set_xlabel(x.title)
        named = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(list(named.values()), list(named), loc="outside lower left", ncols=legend)
        return svg.drawing(figure, name, alt)


def _looks(lines: dict[str, list[Point]], style: str) -> dict[str, dict[str, Any]]:
    """How each curve is drawn, those that share a grey last, and before them dense attention."""
    coloured = [label for label in lines if label != DENSE]
    if len(coloured) > len(svg.SERIES):
        longest = sorted(coloured, key=lambda label: -len(lines[label]))[: len(svg.SERIES)]
        coloured = [label for label in coloured if label in longest and len(lines[label]) > 1]
    same: dict[str, Any] = {"markeredgecolor": svg.PAPER, "markeredgewidth": 0.6, "linestyle": style}
    same["markersize"] = 5.5 if style else 8
    looks = {
        label: same | {"color": colour, "marker": marker, "label": _shortened(label)}
        for label, colour, marker in zip(coloured, svg.SERIES, MARKERS, strict=False)
    }
    if DENSE in lines:
        ring = {"markersize": 11, "markeredgecolor": svg.INK, "markeredgewidth": 1.3, "markerfacecolor": "none"}
        looks[DENSE] = ring | {"color": svg.INK, "marker": "o", "label": DENSE, "linestyle": ":" if style else ""}
    grey = same | {"color": svg.REST, "marker": "o", "label": OTHERS}
    return looks | {label: grey for label in lines if label not in looks}


def _move(line: Any, pixels: float) -> None:
    """Shift a line of matplotlib to the right by so many pixels."""
    from matplotlib.transforms import ScaledTranslation

    axis = line.axes
    line.set_transform(axis.transData + ScaledTranslation(pixels / 72, 0, axis.figure.dpi_scale_trans))


def _at_places(axis: Any, kind: Axis, places: Sequence[float]) -> None:
    """Ticks of an x axis at the places themselves, where they are few and no scale has ticks of its own."""
    if len(places) == 1 and kind.scale.startswith("log") and places[0] > 0:
        axis.axes.set_xlim(places[0] / 2, places[0] * 2)
    elif len(places) == 1:
        axis.axes.set_xlim(places[0] - 1, places[0] + 1)
    least = (places[-1] - places[0]) / CLOSEST if places else 0.0
    are_apart = all(after - before >= least for before, after in pairwise(places))
    if len(places) == 1 or (len(places) <= FEW and are_apart and kind.scale == "linear"):
        shown = axis.get_major_formatter()
        axis.set_ticks(list(places))
        axis.set_major_formatter(shown if kind.scale != "linear" else (lambda value, _: f"{value:g}"))


def loss_curves(name: str, alt: str, x: Axis, records: Iterable[tuple[str, float, Row]], joined: bool = True) -> Panel:
    """Perplexity change and KL divergence over a common x, of records as (label of the curve, x, figures)."""
    axes = [Axis("perplexity change", "change"), Axis("KL to dense (nats)", "log")]
    alt = f"Perplexity change and KL divergence {alt}"
    points = [(label, at, [number(row.get(key)) for key in ("perplexity_change", "kl")]) for label, at, row in records]
    return curves(name, alt, x, axes, points, joined)


def heat(
    name: str,
    alt: str,
    title: str,
    down: Labels,
    across: Labels,
    values: Sequence[Sequence[float]],
    *,
    unit: str,
    limits: tuple[float, float] | None = None,
    texts: Sequence[Sequence[str]] = (),
) -> Panel:
    """A matrix in colours.

    Args:
        down, across: title and names of the rows, and of the columns.
        values: [rows, columns]; NaN is grey.
        unit: title of the colour bar; one that ends in "(%)" shows shares in per cent.
        limits: of the colours; the smallest and largest value when left out.
        texts: what is written into the cells, where there is room.
    """
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = limits or (min(finite, default=0.0), max(finite, default=1.0))
    high = high if high > low else low + (abs(low) or 1.0)
    with svg.styled(120 + min(340, max(100, 26 * len(values)))) as figure:
        import matplotlib

        axis = figure.subplots()
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#8c959f")
        grid = [[value if math.isfinite(value) else math.nan for value in row] for row in values]
        image = axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
        for target, (what, names) in ((axis.yaxis, down), (axis.xaxis, across)):
            step = -(-len(names) // 12)
            shown = [_shortened(name, 14) for name in names[::step]]
            target.set_ticks(list(range(0, len(names), step)), shown)
            target.set_label_text(what)
            if target is axis.xaxis and max(map(len, shown), default=0) * len(shown) > 40:
                axis.tick_params(axis="x", rotation=90)
        kept = title.replace(" + ", "\u00a0+\u00a0")
        axis.set_title("\n".join(textwrap.wrap(kept, 50, max_lines=3, placeholder="…")), loc="left")
        for side in axis.spines.values():
            side.set_visible(False)
        for i, row in enumerate(texts if len(values[0]) <= MOST_WRITTEN else ()):
            for j, text in enumerate(row):
                known = math.isfinite(values[i][j])
                pale = known and (values[i][j] - low) / (high - low) < 0.45
                axis.text(j, i, text, ha="center", va="center", color="white" if pale else "black", fontsize=9.5)
        bar = figure.colorbar(image, ax=axis, orientation="horizontal", pad=0.02, shrink=0.9, aspect=40)
        bar.outline.set_visible(False)  # type: ignore[operator,unused-ignore]
        bar.set_label(unit)
        if unit.endswith("(%)"):
            bar.ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        return Panel(svg.drawing(figure, name, alt), alt)


def bars(
    name: str,
    alt: str,
    x: Axis,
    rows: Sequence[tuple[str, float]],
    form: str,
    marks: tuple[str, Sequence[float]] | None = None,
) -> Panel:
    """Lying bars, the first on top.

    Args:
        rows: label and value of each.
        form: how a value is written at its bar, see `plain`.
        marks: a name, and for each bar a place to mark beside it, such as what could be reached at most.
    """
    narrow, wide = (_bars(f"{name}{end}", alt, x, rows, form, marks, width) for end, width in WIDTHS)
    return Panel(narrow, alt, wide)


def _bars(
    name: str,
    alt: str,
    x: Axis,
    rows: Sequence[tuple[str, float]],
    form: str,
    marks: tuple[str, Sequence[float]] | None,
    width: int,
) -> str:
    labels, values = zip(*rows, strict=True)
    with svg.styled(74 + 32 * len(values) + (20 if marks else 0), width) as figure:
        axis = figure.subplots()
        places = [-float(place) - 0.18 for place in range(len(values))]
        shown = [value if math.isfinite(value) else 0.0 for value in values]
        axis.barh(places, shown, height=0.42, color=svg.SERIES[0])
        limits = marks[1] if marks else [0.0] * len(shown)
        largest = max([*shown, *filter(math.isfinite, limits)], default=1.0) or 1.0
        for place, label, value, end, mark in zip(places, labels, values, shown, limits, strict=True):
            # Behind a mark, where the bar's value would run into it.
            end = mark if end <= mark < end + 0.2 * largest else end
            # Names stand above their bars: beside them they would take half of a phone.
            axis.text(0, place + 0.42, _shortened(label, 52), ha="left", va="center", fontsize=10)
            axis.text(end + largest * 0.015, place, plain(value, form), ha="left", va="center", fontsize=10)
        if marks:
            axis.scatter(marks[1], places, marker="|", s=160, color=svg.SERIES[1], label=marks[0])
            figure.legend(loc="outside lower left")
        axis.set_xlim(0, largest * 1.18)
        axis.set_ylim(places[-1] - 0.42, 0.6)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        _scale(axis.xaxis, x)
        axis.set_xlabel(x.title)
        return svg.drawing(figure, name, alt)


def _scale(axis: Any, kind: Axis) -> None:
    """Set scale and ticks of an x or y axis of matplotlib."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    set_scale, set_limits = (getattr(axis.axes, f"set_{axis.axis_name}{what}") for what in ("scale", "lim"))
    if kind.scale in ("percent", "share"):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        if kind.scale == "share":
            set_limits(-0.03, 1.03)
    elif kind.scale == "change":
        set_scale("symlog", linthresh=0.01)
        # Room for the markers: the margins of matplotlib are none on this scale. With 0, as no change is what one
        # compares with; otherwise values close to each other have no tick beside them.
        low, high = axis.get_view_interval()
        low, high = min(1.3 * low, 0.0), max(1.3 * high, 0.0)
        most = float(max(-low, high))
        steps = [0.001] * (most < 0.02) + [0.01] + [0.02, 0.05] * (most < 0.15) + [0.1, 1.0, 10.0, 100.0]
        axis.set_ticks([*(-step for step in reversed(steps)), 0.0, *steps])
        set_limits(low, high)
        axis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{100 * value:+g}%")
    elif kind.scale == "log":
        set_scale("log")
        low, high = axis.get_view_interval()
        if 0 < low < high < LEAST_SPAN * low:
            # Values nearly equal look so, and not like the whole height of the picture.
            middle = math.sqrt(low * high)
            low, high = middle / math.sqrt(LEAST_SPAN), middle * math.sqrt(LEAST_SPAN)
            set_limits(low, high)
        if 0 < low < high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    elif kind.scale == "count":
        axis.set_major_locator(MaxNLocator(integer=True))
    elif kind.scale == "log2":
        set_scale("log", base=2)
        axis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    axis.set_minor_formatter(lambda *_: "")


def _shortened(text: str, most: int = 54) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
