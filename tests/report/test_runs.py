# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in anything but the setting stay apart, and their titles say in what."""

from __future__ import annotations

import pytest
import samples

from aqua_attention.config import AquaConfig
from aqua_attention.report.collect import collect
from aqua_attention.report.runs import told_apart

pytest.importorskip("matplotlib")
from aqua_attention.report.page import sections_of

HALF = AquaConfig.paper(k_ratio=0.5)
SEEDS = ["calibrated seed 0", "calibrated seed 1"]


def blocks(folder, section, *, values=(), files=None):
    """The blocks of a section of the report of these results."""
    collected = collect(samples.write(folder, values=list(values), files=files or {}))
    assert not collected.unused
    found = {section.title: section.blocks for section in sections_of(collected)}
    return found[section]


def test_titles_get_no_more_than_what_tells_them_apart():
    facts = [{"data": "x", "seed": "0", "limit": "5"}, {"data": "x", "seed": "1"}, {"data": "x", "seed": "1"}]
    assert told_apart(["a", "a", "b"], facts) == ["a, seed 0", "a, seed 1", "b"]
    assert told_apart(["a", "a"], [{"text_sha256": "12345678ab"}, {}]) == ["a, text 12345678", "a"]
    assert told_apart(["a", "a", "a"], [{}, {}, {}]) == ["a", "a (2)", "a (3)"]


def test_texts_of_the_same_names_have_a_matrix_each(tmp_path):
    names = ("prose", "code")
    values = [
        samples.transfer(calibrated, tested, HALF, factor, text=text)
        for text, factor in (("", 1), ("-other", 2))
        for tested in names
        for calibrated in names
    ]
    first, second = sorted(blocks(tmp_path, "Transfer", values=values), key=lambda block: block.title)
    assert first.title != second.title
    assert {"-other" in block.title for block in (first, second)} == {True, False}
    order = [["code", "code"], ["code", "prose"], ["prose", "code"], ["prose", "prose"]]
    for block in (first, second):
        change = samples.losses(0.5, 2 if "-other" in block.title else 1)["perplexity_change"]
        assert [row[:2] for row in block.table[1]] == order
        assert {row[3] for row in block.table[1]} == {f"{change:+.2%}"}
        assert len(block.panels) == 3


def test_another_seed_has_a_matrix_of_its_own(tmp_path):
    values = [samples.context(length, 512, 4096, HALF, 1, seed=seed) for length in (2048, 512) for seed in (0, 1)]
    found = blocks(tmp_path, "Context length", values=values)
    assert [block.title.rpartition(", ")[2] for block in found] in (SEEDS, SEEDS[::-1])
    assert [[row[0] for row in block.table[1]] for block in found] == [["512", "2048"]] * 2


def test_calibration_sizes_of_two_seeds_are_not_one_curve(tmp_path):
    values = [samples.context(512, 512, tokens, HALF, 1, seed=seed) for tokens in (4096, 8192) for seed in (0, 1)]
    found = [block for block in blocks(tmp_path, "Context length", values=values) if "Calibration size" in block.title]
    assert len({block.title for block in found}) == 2
    assert [[row[1] for row in block.table[1]] for block in found] == [["4096", "8192"]] * 2


def test_columns_tested_on_other_tokens_are_labelled(tmp_path):
    values = [samples.context(512, 512, 4096, HALF, 1, tested_tokens=tokens) for tokens in (1024, 2048)]
    (block,) = blocks(tmp_path, "Context length", values=values)
    assert [row[1] for row in block.table[1]] == ["512, tokens 1024", "512, tokens 2048"]


def test_a_cell_that_is_filled_twice_shows_both(tmp_path):
    values = [samples.context(512, 512, 4096, HALF, factor) for factor in (1, 2)]
    for place, value in enumerate(values):
        value["projections_sha256"] = "ab"[place] * 64
    values.append(samples.context(512, 1024, 4096, HALF, 3))
    (block,) = blocks(tmp_path, "Context length", files={"all.json": {"records": values}})
    assert block.note.startswith("1 cell was measured more than once")
    assert len(block.table[1]) == 3
    changes = [f"{samples.losses(0.5, factor)['perplexity_change']:+.2%}" for factor in (1, 2)]
    assert any(f"{first} | {second}" in block.panels[0].svg for first, second in (changes, changes[::-1]))


def test_projections_and_tokens_make_tables_of_their_own(tmp_path):
    values = [samples.record("perplexity", None, samples.losses(1) | samples.DENSE, projections_sha256=None)]
    for digest, factor in (("a" * 64, 1), ("b" * 64, 2)):
        values.append(samples.record("perplexity", HALF, samples.losses(0.5, factor), projections_sha256=digest))
    found = blocks(tmp_path, "What you gain and lose", values=values)
    assert {block.title.rpartition(", ")[2] for block in found} == {"projections aaaaaaaa", "projections bbbbbbbb"}
    assert [[row[0] for row in block.table[1]] for block in found] == [["dense", "k_ratio 0.5"]] * 2


def test_retrieval_is_counted_by_run_and_not_summed(tmp_path):
    right = samples.retrieval("length", (64,), (0.5,), lambda *_: 0.7)
    values = [samples.record("needle", HALF, right, options={"data": "x"}, seed=seed) for seed in (0, 1)]
    values += [samples.record("perplexity", HALF, samples.losses(0.5))]
    (block,) = blocks(tmp_path, "What you gain and lose", values=values)
    titles, rows = block.table
    assert sorted(titles[-2:]) == ["needle: right, seed 0", "needle: right, seed 1"]
    assert rows[1][-2:] == ["7/10", "7/10"]


def test_retention_of_another_basis_is_a_line_of_its_own(tmp_path):
    layer = {"layer": 0, "score_loss": [0.1], "softmax_loss": [0.1]}
    row = {"selection": "magnitude", "k_ratio": 0.5, "score_loss": 0.1, "softmax_loss": 0.1, "per_layer": [layer]}
    value = samples.SAID | {"data": "x", "rows": [row]}
    files = {
        "a.json": value,
        "b.json": value | {"basis": "none"},
        "c.json": value | {"rows": [row | {"basis": "none", "k_ratio": 0.25}]},
    }
    lines, heats = blocks(tmp_path, "Layers and heads", files=files)
    assert [row[0] for row in lines.table[1]] == ["magnitude", *["magnitude, not rotated"] * 2]
    assert len(heats.panels) == 2


def test_tasks_asked_in_two_ways_are_told_apart(tmp_path):
    item = {"task": "arc_easy", "metric": "acc", "value": 0.43, "stderr": 0.02, "count": 400}
    paired = item | {"setting": HALF.to_dict(), "basis": "aqua", "dense": 0.43, "lost": 1, "gained": 0, "p_value": 1.0}
    task = {"path": "arc.jsonl", "sha256": "5" * 64}
    files = {
        f"{shots}{seed}.json": samples.SAID
        | {
            "dense": [],
            "seed": seed,
            "tasks": {"arc_easy": task | {"few_shot": shots}},
        }
        | {"rows": [paired | {"outside_window": 0.25}]}
        for shots, seed in ((0, 0), (5, 0), (5, 1))
    }
    found = blocks(tmp_path, "Tasks", files=files)
    assert [block.title for block in found] == ["tiny, seed 0", "tiny, seed 1"]
    assert [row[0] for row in found[0].table[1]] == ["arc_easy, few shot 0", "arc_easy, few shot 5"]
    assert found[0].table[0][-1] == "outside the window"
    assert found[0].table[1][0][-1] == "25.0%"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_whole_step_says_whether_the_rest_was_compiled(tmp_path, compiled):
    results = samples.benchmarks()["generate.json"]["results"]
    value = {"results": [results[0] | {"compiled": compiled}]}
    titles = [block.title for block in blocks(tmp_path, "Time and memory", files={"generate.json": value})]
    assert [title.startswith("A whole step, compiled: ") for title in titles] == [compiled]


def test_generate_has_its_own_columns_and_the_users_model(tmp_path):
    result = samples.benchmarks()["generate.json"]["results"][0]
    new = {"first_seconds": 0.3, "first_ratio": 1.02, "default_ratio": 3.5, "peak_bytes": 2**34, "recorded": True}
    rows = [row | new for row in result["rows"]]
    value = {"model": "mine", "results": [result | {"new_tokens": 72, "rows": rows}]}
    block = blocks(tmp_path, "Time and memory", files={"generate.json": value})[0]
    assert block.title.startswith("model.generate: mine, GPU, 8 x 32768 tokens")
    titles, cells = block.table
    assert titles[:5] == ["setting", "first token: ms", "to dense", "ms a token", "speed to dense"]
    assert cells[2][:5] == ["aqua, k_ratio 0.5", "300", "1.02", "18.00", "1.11"]
    assert dict(zip(titles, cells[2], strict=True))["recorded"] == "yes"
    assert "generate adds: ms" not in titles


def test_few_tokens_stand_before_many_within_a_setting(tmp_path):
    whole = AquaConfig.paper(k_ratio=1)
    values = [
        samples.context(512, 512, tokens, config, 1) for tokens in (65536, 4096, 16384) for config in (whole, HALF)
    ]
    titles = [block.title for block in blocks(tmp_path, "Context length", values=values)]
    found = [title.split("calibrated on ")[1] for title in titles if "calibrated on" in title]
    assert found == 2 * ["4096 tokens", "16384 tokens", "65536 tokens"]
    assert ["k_ratio 0.5" in title for title in titles if "calibrated on" in title] == 3 * [False] + 3 * [True]
