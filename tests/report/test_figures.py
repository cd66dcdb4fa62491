# SPDX-License-Identifier: Apache-2.0
"""What a drawing shows: its words, its ticks, and dense attention beside what is as good."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")
from aqua_attention.report.figures import Axis, curves

SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_labels_of_a_drawing_stay_as_they_are():
    """Whatever looks like the SVG that is rewritten around them."""
    labels = ['id="axes_1" url(#x) #010101', "0.0001234567", "<text>&amp;", "$x^2$", "हिन्दी"]
    points = [(label, at, [value]) for label in labels for at, value in ((0.0, 1.0), (1.0, 0.001))]
    image = curves("a", 'in "words"', Axis("x"), [Axis("loss", "log")], points).svg
    root = ElementTree.fromstring(image)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert set(labels) <= set(texts)
    assert {"0.001", "0.01", "0.1", "1"} <= set(texts)
    assert root.get("aria-label") == 'in "words"'


def test_changes_close_to_each_other_are_inside_their_axis():
    points = [("a", 4096.0, [0.058]), ("a", 16384.0, [0.066])]
    image = curves("a", "close", Axis("x", "log2"), [Axis("change", "change")], points).svg
    texts = [element.text for element in ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text")]
    assert "0" in texts
    (line,) = re.findall(r'<path d="M ([\d.]+) ([\d.]+)\s*L ([\d.]+) ([\d.]+)\s*" clip-path[^>]*--s0', image)
    (box,) = re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', image)
    assert all(float(box[0]) < float(line[place]) < float(box[0]) + float(box[1]) for place in (1, 3))


def markers(svg):
    """x and colour of each curve's markers, in the order of drawing."""
    found = re.findall(
        r'<use xlink:href="#[^"]+" x="([\d.]+)" y="[\d.]+" style="([^"]*stroke-width: (?:0.6|1.3)[^"]*)', svg
    )
    return [(x, re.search(r"--(s\d|ink)", style)[1]) for x, style in found]


@pytest.mark.parametrize("scale", ["linear", "log2"])
def test_a_single_length_has_one_tick_and_curves_beside_each_other(scale):
    points = [(label, 20.0, [0.5]) for label in ("k_ratio 0.5", "dense", "k_ratio 0.25")]
    panel = curves("a", "alt", Axis("lines", scale), [Axis("right", "share")], points)
    for svg in (panel.svg, panel.wide):
        ticks = [text for text in texts_of(svg) if text and re.fullmatch(r"[\d.k]+", text)]
        assert ticks == ["20"]
        # In the order of drawing, each marker beside the one before: the last is dense attention's ring.
        places = [float(x) for x, _ in markers(svg)][:3]
        assert all(abs(one - other) >= 10 for place, one in enumerate(places) for other in places[:place])


def test_few_lengths_have_a_tick_each_and_dense_is_a_ring_around_what_is_as_good():
    points = [(label, at, [0.5]) for label in ("dense", "k_ratio 0.5") for at in (10.0, 35.0, 200.0)]
    svg = curves("a", "alt", Axis("lines"), [Axis("right", "share")], points).svg
    assert [text for text in texts_of(svg) if text and text.isdigit()] == ["10", "35", "200"]
    drawn = markers(svg)[:6]
    assert [colour for _, colour in drawn] == ["s0"] * 3 + ["ink"] * 3
    assert [x for x, _ in drawn[:3]] == [x for x, _ in drawn[3:]]
    assert svg.count("fill-opacity: 0; stroke: var(--ink)") == 4, "three rings, one in the legend: what is inside shows"
