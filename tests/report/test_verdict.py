# SPDX-License-Identifier: Apache-2.0
"""The first words of the page: the best setting by the rule that stands below, and what it gains and loses."""

from __future__ import annotations

import re
from html import unescape
from xml.etree import ElementTree

import pytest
import samples

from aqua_attention.config import AquaConfig
from aqua_attention.report.collect import collect

pytest.importorskip("matplotlib")
from aqua_attention.report.figures import Axis, curves
from aqua_attention.report.page import html, report_markdown
from aqua_attention.report.verdict import RULE, TOLERANCE, verdicts

SVG = "{http://www.w3.org/2000/svg}"


def measured(change, ratio=0.5, **fields):
    """A record of a setting that changes perplexity by so much."""
    result = samples.losses(ratio) | {"perplexity": 20 * (1 + change), "perplexity_change": change}
    return samples.record("perplexity", AquaConfig.paper(k_ratio=ratio, **fields), result)


def found(folder, values, files=None):
    return verdicts(collect(samples.write(folder, values=values, files=files or {})).records)


def texts_of(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_best_setting_is_the_cheapest_within_the_tolerance(tmp_path):
    right = samples.retrieval("length", (64,), (0.5,), lambda *_: 0.9)
    dense = samples.retrieval("length", (64,), (0.5,), lambda *_: 1.0)
    asked = [samples.record("needle", *pair) for pair in ((None, dense), (AquaConfig.paper(k_ratio=0.5), right))]
    values = [measured(0.0001, 0.75), measured(TOLERANCE, 0.5), measured(TOLERANCE + 1e-4, 0.25), *asked]
    (verdict,) = found(tmp_path, values)
    assert verdict.sentence == (
        "k_ratio 0.5 does 50% of dense attention's dot-product work and stores 100% of its cache bytes; perplexity "
        "changes by +1.00%, needle: 9/10 right (dense 10/10)."
    )
    shown = texts_of(verdict.panel.svg)
    assert {"50.0%", "100.0%", "101.0%", "90.0%", "dot-product work", "cache bytes"} <= set(shown)
    assert shown == texts_of(verdict.panel.wide)


def test_what_is_stored_counts_beside_what_is_multiplied(tmp_path):
    (verdict,) = found(tmp_path, [measured(0, 0.75), measured(0.001, 1.0, bits=8, sink=4, recent=64)])
    assert verdict.sentence.startswith("k_ratio 1, int8, exact 4 + 64 does 100% of")
    assert "stores 50% of its cache bytes" in verdict.sentence


def test_where_nothing_stays_within_the_tolerance_it_says_so(tmp_path):
    (verdict,) = found(tmp_path, [measured(0.5, 0.25), measured(0.02, 0.75)])
    assert verdict.panel is None
    assert verdict.sentence.endswith("the nearest, k_ratio 0.75, changes it by +2.00%.")
    assert verdict.sentence.startswith("No setting that was measured stays within 1% of dense attention's perplexity")


def test_figures_that_are_none_and_files_that_stand_apart_are_not_best(tmp_path):
    nan = measured(0, 0.25)
    nan["result"] |= {"perplexity": None}
    row = {"setting": AquaConfig.paper(k_ratio=0.1).to_dict(), "basis": "aqua"} | samples.losses(0.1, 0)
    old = {"model": "tiny", "dense": samples.DENSE, "rows": [row]}
    (verdict,) = found(tmp_path, [nan, measured(0, 0.75)], {"old.json": old})
    assert verdict.sentence.startswith("k_ratio 0.75 does 75%")
    needle = samples.record("needle", None, samples.retrieval("length", (1,), (0,), max))
    assert found(tmp_path / "none", [needle]) == []


def test_the_verdict_is_the_first_thing_on_both_pages(tmp_path):
    values = [measured(0.001), measured(0.002) | {"model": "second"}]
    verdict, other = given = found(tmp_path, values)
    page, (text, images) = html([], ["on a machine"], given), report_markdown([], ["on a machine"], given)
    for written in (unescape(page), text.replace("\\", "")):
        places = [
            written.index(words) for words in (verdict.title, verdict.sentence, other.title, RULE, "on a machine")
        ]
        assert places == sorted(places)
    assert list(images) == ["figure-1.svg", "figure-2.svg"]


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
