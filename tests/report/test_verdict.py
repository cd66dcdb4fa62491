# SPDX-License-Identifier: Apache-2.0
"""The first words of the page: the best setting by the rule that stands below, and what it gains and loses."""

from __future__ import annotations

from html import unescape
from xml.etree import ElementTree

import pytest
import samples

from aqua_attention.config import AquaConfig
from aqua_attention.report.collect import collect

pytest.importorskip("matplotlib")
from aqua_attention.report.page import html, report_markdown
from aqua_attention.report.verdict import RULE, TOLERANCE, verdicts

SVG = "{http://www.w3.org/2000/svg}"


def measured(change, ratio=0.5, *, kl=0.001, **fields):
    """A record of a setting that changes perplexity by so much."""
    result = samples.losses(ratio) | {"perplexity": 20 * (1 + change), "perplexity_change": change, "kl": kl}
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
        "changes by +1.00% (KL 0.0010), needle: 9/10 right (dense 10/10)."
    )
    shown = texts_of(verdict.panel.svg)
    assert {"50.0%", "100.0%", "101.0%", "90.0%", "dot-product work", "cache bytes"} <= set(shown)
    assert shown == texts_of(verdict.panel.wide)


def test_a_perplexity_that_fell_by_chance_is_not_enough(tmp_path):
    (verdict,) = found(tmp_path, [measured(-0.02, 0.25, kl=0.207), measured(0.001, 0.75, kl=0.02)])
    assert verdict.sentence.startswith("k_ratio 0.75 does 75%")


def test_what_is_stored_counts_beside_what_is_multiplied(tmp_path):
    (verdict,) = found(tmp_path, [measured(0, 0.75), measured(0.001, 1.0, bits=8, sink=4, recent=64)])
    assert verdict.sentence.startswith("k_ratio 1, int8, exact 4 + 64 does 100% of")
    assert "stores 50% of its cache bytes" in verdict.sentence


def test_where_nothing_stays_within_the_tolerance_it_says_so(tmp_path):
    (verdict,) = found(tmp_path, [measured(0.5, 0.25), measured(0.02, 0.75)])
    assert verdict.panel is None
    assert verdict.sentence.endswith("the nearest, k_ratio 0.75, changes perplexity by +2.00%.")
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
    facts = ["on a machine"]
    page, (text, images) = html([], facts, given), report_markdown([], facts, given)
    for written in (unescape(page), text.replace("\\", "")):
        places = [
            written.index(words) for words in (verdict.title, verdict.sentence, other.title, RULE, "on a machine")
        ]
        assert places == sorted(places)
    assert list(images) == ["figure-1.svg", "figure-2.svg"]
