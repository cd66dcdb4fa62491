# SPDX-License-Identifier: Apache-2.0
"""Drawings of matplotlib as SVG that follows the page: text is text, colours are the page's own, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from aqua_attention.errors import AquaError, install_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, WIDE = 380, 1120
"""Of a drawing, in pixels: what a phone shows without shrinking the text, and a desktop."""
# Colours that nobody draws with stand for those of the page, which replace them in the SVG.
INK, LINE, PAPER = "#010101", "#010102", "#010103"
SERIES = tuple(f"#01020{place}" for place in range(8))
REST = "#010104"
_NAMES = {INK: "ink", LINE: "line", PAPER: "paper", REST: "rest"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
# Okabe and Ito's colours, which the colour-blind can tell apart, darker on white and lighter on black.
LIGHT = "ink:#1b1f24 line:#d0d7de paper:#ffffff rest:#8c959f s0:#0072b2 s1:#d55e00 s2:#00866a s3:#b3478c s4:#8f6a00"
LIGHT += " s5:#2b8cc4 s6:#5c5f66 s7:#7a3ca3"
DARK = "ink:#e6edf3 line:#3b424b paper:#14171c rest:#7d8590 s0:#4aa8e8 s1:#ff8a3d s2:#2cc79d s3:#e58fc3 s4:#e3c03a"
DARK += " s5:#9cd4f7 s6:#b4b9c1 s7:#c79af0"
STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "svg.fonttype"), "none"),
    # Names come from users' files; a dollar in one is a dollar.
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon", "text.parse_math"), False),
    **{"axes.titlesize": 11, "font.size": 11, "legend.fontsize": 10.5, "lines.linewidth": 1.6},
    **{"grid.color": LINE, "svg.hashsalt": "aqua"},
}


def variables(colours: str) -> str:
    """Declarations of the page's colours in CSS, from `LIGHT` or `DARK`."""
    return "".join(f"--{name}:{value};" for name, value in (pair.split(":") for pair in colours.split()))


@contextmanager
def styled(height: float, width: int = WIDTH) -> Iterator[Figure]:
    """An empty figure of so many pixels, to be drawn on inside the context.

    Raises:
        AquaError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise AquaError(f"aqua report needs matplotlib: {install_extra('report')}") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Whatever the user's matplotlibrc says.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # Letters that it has no width for are drawn by the browser, and what it finds no room for is in the numbers.
        warnings.simplefilter("ignore")
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def drawing(figure: Figure, name: str, alt: str) -> str:
    """The figure as an `<svg>` element; must be called inside `styled`.

    Args:
        name: begins all ids, so that figures of one page do not clash.
        alt: what the figure shows.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    # Tags only: what stands between them are names and figures, which stay as they are.
    text = re.sub(r"<[^>]+>", lambda found: _rewritten(found.group(), name, used), text)
    text = re.sub(r">\s*\n\s*<", ">\n<", text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    head = f'<svg viewBox="0 0 {size[1]} {size[2]}" width="{size[1]}" height="{size[2]}" font-family="sans-serif" '
    head += f'role="img" aria-label="{escape(alt)}" xmlns="http://www.w3.org/2000/svg" '
    head += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + text[text.index(">") + 1 :]


def _rewritten(tag: str, name: str, used: set[str]) -> str:
    """A tag with the page's colours, ids of its own, and less than half as long."""
    tag = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r'(url\(#|href="#)', rf"\1{name}-", tag)
    tag = re.sub("|".join(_NAMES), lambda found: f"var(--{_NAMES[found.group()]})", tag)
    # Page and file say which font.
    tag = re.sub(r"font-family: [^;\"]*; ", "", tag)
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", tag)
    if "base64" not in tag:
        tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    return re.sub(r"\s*\n\s*", "\n", tag)


def alone(svg: str, dark: bool | None = None) -> str:
    """The same as a file of its own, with its colours in it.

    Args:
        svg: as `drawing` returns it.
        dark: for a dark page, or for a light one; None follows the system.
    """
    style = f"svg{{{variables(DARK if dark else LIGHT)}background:var(--paper)}}"
    if dark is None:
        style += f"@media(prefers-color-scheme:dark){{svg{{{variables(DARK)}}}}}"
    end = svg.index(">") + 1
    return f"{svg[:end]}<style>{style}</style>{svg[end:]}\n"
