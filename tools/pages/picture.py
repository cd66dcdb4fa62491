# SPDX-License-Identifier: Apache-2.0
"""The picture of README: loss against speed and memory, drawn by the report's code from the short table `picture`.

python tools/pages/picture.py     # draws it for light and for dark pages, where its figures have changed
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from aqua_attention.report import figures, svg
from pages import results
from pages.files import DARK, LIGHT

WIDTH = 800
"""Pixels: what a page of GitHub has."""
ALT = "Six settings by the KL divergence to dense attention: how fast they decode, and how many bytes their cache has"
AXES = ("decoding speed, 8 x 8k tokens", "decoding speed, 8 x 32k tokens", "bytes of the cache")
"""Each is relative to dense attention, which is 1."""

Point = tuple[str, float, list[float]]


def points() -> list[Point]:
    """Name, KL and a figure for each of `AXES` of every setting, as the records have them; NaN where there is none."""
    records, short = results.load()
    rows = results.short_rows(short["picture"], records)
    return [(name, float(kl), [float(each or "nan") for each in others]) for name, kl, *others in rows]


def drawing(shown: list[Point]) -> str:
    """These points as an `<svg>` element, with its figures in it as JSON."""
    axes = [figures.Axis(title) for title in AXES]
    shown = [(figures.DENSE, 0.0, [1.0] * len(AXES)), *shown]
    panel = figures.curves("loss", ALT, figures.Axis("KL to dense (nats)"), axes, shown, joined=False, width=WIDTH)
    end = panel.wide.index(">") + 1
    return f"{panel.wide[:end]}<metadata>{json.dumps(data(shown[1:]))}</metadata>{panel.wide[end:]}"


def data(shown: list[Point]) -> dict[str, object]:
    """What a drawing of these points says, as JSON has it."""
    rows = [[name, kl, *(None if math.isnan(each) else each for each in others)] for name, kl, others in shown]
    return {"alt": ALT, "axes": list(AXES), "points": rows}


def held(drawn: str) -> object:
    """The figures that a drawing was made of; None where it does not say."""
    found = re.search(r"<metadata>(.*?)</metadata>", drawn)
    return json.loads(found[1]) if found else None


def main() -> None:
    """Draw both files. Another version of matplotlib alone does not change them."""
    shown = points()
    for path, dark in ((LIGHT, False), (DARK, True)):
        if not path.exists() or held(path.read_text()) != data(shown):
            path.write_text(svg.alone(drawing(shown), dark))


if __name__ == "__main__":
    main()
