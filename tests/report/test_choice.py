# SPDX-License-Identifier: Apache-2.0
"""What the report says of `benchmarks/select_curves.py`: loss by bytes read, of every method."""

import re

import pytest
import samples

pytest.importorskip("matplotlib")
from aqua_attention.report.choice import choice_sections
from aqua_attention.report.recognise import records_of


def blocks(value=None):
    (section,) = choice_sections(records_of(value or samples.choice(), "select.json"))
    return section.blocks


def test_a_block_for_each_text_and_length():
    short, long = blocks()
    assert (short.title, long.title) == (
        "tiny, wiki.txt, windows of 8192, float32",
        "tiny, wiki.txt, windows of 16384, float32",
    )
    assert short.commands == ["aqua eval"] and not short.unsaid
    titles, rows = short.table
    assert titles[:4] == ["method", "asked for", "tokens read", "bytes read"]
    assert [row[:2] for row in rows[:4]] == [["AQUA (svd)", f"p {p}"] for p in (0.8, 0.9, 0.95, 0.99)]
    assert rows[-1][:4] == ["oracle, fixed", "tokens 1638", "20.0%", "26.6%"]


def test_every_method_is_drawn_in_the_colours_of_the_page():
    by_p, fixed, held, layers = blocks()[0].panels
    for panel, names in ((by_p, ["AQUA (svd)", "SparQ", "Quest", "oracle"]), (fixed, ["AQUA (svd), fixed"])):
        assert panel.wide == "", "beside others there is no room for it"
        assert all(f">{name}<" in panel.svg for name in names)
        assert "var(--s0)" in panel.svg and not re.search("#0102|#01010", panel.svg)
    assert "bytes read, by p" in by_p.svg and "bytes read, fixed" in fixed.svg
    assert "by the scores" in held.svg and "p 0.95" in layers.svg


def test_more_methods_than_colours_are_drawn_beside_the_first():
    value = samples.choice()
    value["results"] = value["results"][:1]
    rows = value["results"][0]["rows"]
    more = [row | {"method": f"way {n}"} for n in range(9) for row in rows[:4]]
    value["results"][0]["rows"] = rows[:4] + more
    first, second, *_ = blocks(value)[0].panels
    shown = [set(re.findall(">(AQUA \\(svd\\)|way \\d)<", panel.svg)) for panel in (first, second)]
    assert shown[0] & shown[1] == {"AQUA (svd)"}
    assert shown[0] | shown[1] == {"AQUA (svd)", *(f"way {n}" for n in range(9))}
    assert "others" not in first.svg + second.svg


def test_a_run_that_was_cut_off_has_what_it_measured():
    value = samples.choice()
    value["results"][1]["rows"] = value["results"][1]["rows"][:1]
    for each in value["results"][1]["rows"]:
        del each["mass"], each["mass_per_layer"]
    del value["results"][0]["rows"][0]["kl"], value["results"][0]["rows"][1]["bytes_read"]
    whole, cut = blocks(value)
    assert len(cut.panels) == 1
    assert [row[3] for row in whole.table[1][:3]] == ["14.5%", "NaN", "18.6%"]
