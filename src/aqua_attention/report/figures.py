# SPDX-License-Identifier: Apache-2.0
"""The three kinds of drawings: curves, heat maps, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aqua_attention.evaluate.record import number
from aqua_attention.report import svg
from aqua_attention.report.document import Panel, plain
from aqua_attention.report.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_WRITTEN = 6
"""So many columns of a heat map have room for a figure in each cell."""
LEAST_SPAN = 4.0
"""Largest to smallest value of a logarithmic axis, at least."""
MARKERS = "osD^vPXh"
LONGEST = 54
SMALLEST, LARGEST = 1e-6, 1e9
"""What a logarithmic axis shows of anything smaller, and any axis of anything larger."""


@dataclass(frozen=True)
class Curve:
    """One line of a drawing.

    Attributes:
        points: (x, a y for each of the axes above each other); NaN leaves a gap.
        joined: whether a line joins the points.
    """

    label: str
    points: Sequence[tuple[float, Sequence[float]]]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """Title with unit, and scale.

    Attributes:
        scale: "percent", "share" (the same, all of 0 to 100%), "change" (per cent, linear near 0 and logarithmic beyond
            1%), "log", "log2", "count" (whole numbers) or "linear".
    """

    title: str
    scale: str = "linear"


def curves(name: str, alt: str, x: Axis, ys: Sequence[Axis], lines: Sequence[Curve]) -> Panel:
    """Curves over a common x, an axis for each of `ys` above each other.

    Where there are more curves than colours, the longest are coloured, and all others are one grey.
    """
    coloured = list(range(len(lines)))
    if len(lines) > len(svg.SERIES):
        coloured.sort(key=lambda place: -len(lines[place].points))
        coloured = [place for place in coloured[: len(svg.SERIES)] if len(lines[place].points) > 1]
    named = [line for place, line in enumerate(lines) if place in coloured]
    others = [line for place, line in enumerate(lines) if place not in coloured]
    with svg.styled(50 + 200 * len(ys) + 17 * (len(named) + bool(others))) as figure:
        axes: Any = figure.subplots(len(ys), 1, sharex=True, squeeze=False)[:, 0]
        for row, (axis, y) in enumerate(zip(axes, ys, strict=True)):
            for place, line in enumerate(named):
                _plot(axis, line, row, y, svg.SERIES[place], MARKERS[place], label=_shortened(line.label))
            for line in others:
                _plot(axis, line, row, y, svg.REST, "o", label="others: see the numbers" if line is others[0] else None)
            _scale(axis.xaxis, x)
            _scale(axis.yaxis, y)
            axis.set_ylabel(y.title)
            axis.grid(True, linewidth=0.7)
        axes[-1].set_xlabel(x.title)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=1)
        return Panel(svg.drawing(figure, name, alt), alt)


def loss_curves(name: str, alt: str, x: Axis, records: Iterable[tuple[str, float, Row]], joined: bool = True) -> Panel:
    """Perplexity change and KL divergence over a common x.

    Args:
        records: label of the curve, x, and the figures of each point.
    """
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for label, place, figures in records:
        losses = [number(figures[key]) for key in ("perplexity_change", "kl")]
        lines.setdefault(label, []).append((place, losses))
    axes = [Axis("perplexity change", "change"), Axis("KL to dense (nats)", "log")]
    alt = f"Perplexity change and KL divergence {alt}"
    return curves(name, alt, x, axes, [Curve(label, points, joined) for label, points in lines.items()])


def heat(
    name: str,
    alt: str,
    title: str,
    axes: tuple[str, str],
    labels: tuple[Sequence[str], Sequence[str]],
    values: Sequence[Sequence[float]],
    *,
    unit: str,
    limits: tuple[float, float] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
) -> Panel:
    """A matrix in colours.

    Args:
        axes: titles of rows and columns.
        labels: names of rows and columns.
        values: [rows, columns]; NaN is grey.
        unit: title of the colour bar; one that ends in "(%)" shows shares in per cent.
        limits: of the colours; the smallest and largest value when left out.
        texts: what is written into the cells, where there is room.
    """
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = limits or (min(finite, default=0.0), max(finite, default=1.0))
    high = high if high > low else low + (abs(low) or 1.0)
    rows, columns = len(values), len(values[0])
    with svg.styled(120 + min(340, max(100, 26 * rows))) as figure:
        import matplotlib

        axis = figure.subplots()
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#8c959f")
        grid = [[value if math.isfinite(value) else math.nan for value in row] for row in values]
        image = axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
        for (place, count), each, turn in zip(((0, rows), (1, columns)), labels, (False, True), strict=True):
            target = axis.yaxis if place == 0 else axis.xaxis
            step = -(-count // 12)
            shown = [_shortened(label, 14) for label in each[::step]]
            target.set_ticks(list(range(0, count, step)), shown)
            if turn and max(map(len, shown), default=0) * len(shown) > 40:
                axis.tick_params(axis="x", rotation=90)
        axis.set_ylabel(axes[0])
        axis.set_xlabel(axes[1])
        axis.set_title(_wrapped(title), loc="left")
        for side in axis.spines.values():
            side.set_visible(False)
        for i, row in enumerate(texts if texts and columns <= MOST_WRITTEN else ()):
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
    labels: Sequence[str],
    values: Sequence[float],
    *,
    marks: tuple[str, Sequence[float]] | None = None,
    text: Callable[[float], str] = plain,
) -> Panel:
    """Lying bars, the first on top.

    Args:
        marks: a name, and for each bar a place to mark beside it, such as what could be reached at most.
        text: how a value is written at its bar.
    """
    with svg.styled(74 + 32 * len(values) + (20 if marks else 0)) as figure:
        axis = figure.subplots()
        places = [-float(place) for place in range(len(values))]
        shown = [value if math.isfinite(value) else 0.0 for value in values]
        axis.barh([place - 0.18 for place in places], shown, height=0.42, color=svg.SERIES[0])
        limits = marks[1] if marks else [0.0] * len(shown)
        largest = max([*shown, *filter(math.isfinite, limits)], default=1.0) or 1.0
        # Behind a mark, where the bar's value would run into it.
        near = [
            mark if width <= mark < width + 0.2 * largest else width for width, mark in zip(shown, limits, strict=True)
        ]
        for place, label, value, end in zip(places, labels, values, near, strict=True):
            # Names stand above their bars: beside them they would take half of a phone.
            axis.text(0, place + 0.24, _shortened(label, 52), ha="left", va="center", fontsize=10)
            axis.text(end + largest * 0.015, place - 0.18, text(value), ha="left", va="center", fontsize=10)
        if marks:
            axis.scatter(
                marks[1], [place - 0.18 for place in places], marker="|", s=160, color=svg.SERIES[1], label=marks[0]
            )
            figure.legend(loc="outside lower left")
        axis.set_xlim(0, largest * 1.18)
        axis.set_ylim(places[-1] - 0.6, 0.6)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        _scale(axis.xaxis, x)
        axis.set_xlabel(x.title)
        return Panel(svg.drawing(figure, name, alt), alt)


def _plot(axis: Axes, line: Curve, row: int, y: Axis, colour: str, marker: str, label: str | None) -> None:
    points = sorted((x, ys[row]) for x, ys in line.points if abs(x) < LARGEST)
    heights = [max(value, SMALLEST) if y.scale.startswith("log") else value for _, value in points]
    axis.plot(
        [x for x, _ in points],
        [min(max(value, -LARGEST), LARGEST) if math.isfinite(value) else math.nan for value in heights],
        color=colour,
        marker=marker,
        markersize=5.5,
        markeredgecolor=svg.PAPER,
        markeredgewidth=0.6,
        linestyle="-" if line.joined else "",
        label=label,
    )


def _scale(axis: Any, kind: Axis) -> None:
    """Set scale and ticks of an x or y axis of matplotlib."""
    which, owner = axis.axis_name, axis.axes
    set_scale = owner.set_xscale if which == "x" else owner.set_yscale
    if kind.scale in ("percent", "share"):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        if kind.scale == "share":
            (owner.set_xlim if which == "x" else owner.set_ylim)(-0.03, 1.03)
    elif kind.scale == "change":
        set_scale("symlog", linthresh=0.01)
        # Room for the markers: the margins of matplotlib are none on this scale. With 0, as no change is what one
        # compares with; otherwise values close to each other have no tick beside them.
        low, high = (1.3 * limit for limit in (owner.get_ylim() if which == "y" else owner.get_xlim()))
        low, high = min(low, 0.0), max(high, 0.0)
        steps = [value for value in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0) if value >= 0.01 or max(-low, high) < 0.02]
        axis.set_ticks([*(-step for step in reversed(steps)), 0.0, *steps])
        (owner.set_ylim if which == "y" else owner.set_xlim)(low, high)
        axis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{100 * value:+g}%")
    elif kind.scale == "log":
        set_scale("log")
        low, high = axis.get_view_interval()
        if 0 < low < high < LEAST_SPAN * low:
            # Values nearly equal look so, and not like the whole height of the picture.
            middle = math.sqrt(low * high)
            low, high = middle / math.sqrt(LEAST_SPAN), middle * math.sqrt(LEAST_SPAN)
            (owner.set_ylim if which == "y" else owner.set_xlim)(low, high)
        if 0 < low < high < 100 * low:
            from matplotlib.ticker import LogLocator

            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    elif kind.scale == "count":
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(integer=True))
    elif kind.scale == "log2":
        set_scale("log", base=2)
        axis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    axis.set_minor_formatter(lambda *_: "")


def _shortened(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _wrapped(text: str) -> str:
    import textwrap

    kept = text.replace(" + ", "\u00a0+\u00a0")
    return "\n".join(textwrap.wrap(kept, 50, max_lines=3, placeholder="…"))
