# SPDX-License-Identifier: Apache-2.0
"""The page holds what the records say, shows what failed, and lets nothing of users' files become markup."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import samples

from aqua_attention.config import AquaConfig
from aqua_attention.report.collect import collect
from aqua_attention.report.losses import cache_share, key_share
from aqua_attention.report.page import facts_of, html, report_markdown, sections_of, write_report
from aqua_attention.report.verdict import verdicts
from conftest import mostly_long

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Headings, tables and ids of a page; every element closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tables, self.headings, self.names = [], [], [], [], set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.replace("\u00a0", " ")
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1] += data


def made(folder):
    """(HTML, Markdown, images) of a results folder."""
    collected = collect(folder)
    sections, facts = sections_of(collected), facts_of(collected)
    found = verdicts(collected.records)
    return html(sections, facts, found), *report_markdown(sections, facts, found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of records of every suite."""
    return made(samples.write(tmp_path_factory.mktemp("results")))


def test_every_suite_has_its_place(whole):
    page = Page(whole[0])
    expected = ["What you gain and lose", "Trade-offs", "Retrieval", "Tasks", "Transfer", "Context length"]
    expected += ["Layers and heads", "Time and memory", "Failed settings"]
    assert [heading for heading in page.headings if heading in expected] == expected
    assert "Files not used" not in page.headings
    assert whole[0].count("<figure>") == len(whole[2]) > 20


def test_the_first_table_says_what_one_gains_and_loses(whole):
    table = Page(whole[0]).tables[0]
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert list(rows)[:3] == ["dense", "k_ratio 1", "k_ratio 0.75"]
    half = rows["k_ratio 0.5, weighted, exact 4 + 64"]
    result = samples.losses(0.5, 0.2)
    assert half["dot-product work"] == "50%"
    assert half["perplexity"] == f"{result['perplexity']:.3f}"
    assert half["change"] == f"{result['perplexity_change']:+.2%}"
    assert half["KL to dense"] == f"{result['kl']:.4f}"
    assert half["needle: right"] == "148/150"
    assert rows["dense"]["needle: right"] == "150/150"
    assert rows["k_ratio 0.75"]["needle: right"] == ""
    evicted = rows["k_ratio 1, int8, h2o_ratio 0.5, weighted, exact 4 + 64"]
    assert (evicted["key bytes"], evicted["cache bytes"]) == ("25%", "25%")


def test_a_setting_that_was_only_asked_questions_has_a_row_too(tmp_path):
    needle = samples.retrieval("length", (64,), (0.5,), lambda *_: 0.7)
    asked = [samples.record("needle", config, needle) for config in (None, AquaConfig.paper(s_ratio=0.5))]
    page, _, _ = made(samples.write(tmp_path / "alone", values=asked, files={}))
    rows = Page(page).tables[0]
    assert rows[1:] == [
        ["dense", "100%", "100%", "100%", "", "", "", "", "7/10"],
        ["k_ratio 0.75, s_ratio 0.5", "", "50%", "75%", "", "", "", "", "7/10"],
    ]
    both = [samples.record("perplexity", AquaConfig.paper(), samples.losses(0.75)), *asked]
    page, _, _ = made(samples.write(tmp_path / "both", values=both, files={}))
    assert [row[0] for row in Page(page).tables[0]] == ["setting", "dense", "k_ratio 0.75", "k_ratio 0.75, s_ratio 0.5"]


@pytest.mark.parametrize(
    ("fields", "keys", "both"),
    [
        ({}, 1.0, 1.0),
        ({"s_ratio": 0.25}, 0.75, 0.875),
        ({"bits": 8}, 0.5, 0.5),
        ({"bits": 4}, 5 / 16, 9 / 32),
        ({"h2o_ratio": 0.5, "s_ratio": 0.5, "bits": 8}, 0.125, 0.1875),
    ],
)
def test_bytes_follow_from_the_setting(fields, keys, both):
    setting = AquaConfig.paper(**fields).to_dict()
    assert key_share(setting) == pytest.approx(keys)
    assert cache_share(setting) == pytest.approx(both)


def test_on_a_phone_each_figure_stands_after_the_title_of_its_column(whole):
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", whole[0])
    titled = [("data-t=" in attributes, text) for attributes, text in cells]
    first = sum(len(table) - 1 for table in Page(whole[0]).tables)
    assert sum(has for has, _ in titled) == sum(bool(text) for _, text in titled) - first
    assert 'data-t="KL to dense"' in whole[0]
    assert "content: attr(data-t)" in whole[0].partition("@media (max-width: 40rem)")[2]


def test_a_drawing_that_stands_alone_has_one_for_the_width_of_a_desktop(whole):
    alone = [panels for panels in whole[0].split('<div class="panels">')[1:] if panels.count("<figure>") == 1]
    widths = [re.findall(r'<svg viewBox="0 0 ([\d.]+) ', panels.partition("</figure>")[0]) for panels in alone]
    drawn = [[float(width) for width in pair] for pair in widths]
    assert len(drawn) > 5
    assert all(pair == [1120.0, 380.0] for pair in drawn)


def test_break_even_lengths_are_beside_the_theory(whole):
    (table,) = [table for table in Page(whole[0]).tables if table[0][1] == "against k = d"]
    assert table[1] == ["0.75", "5000", "none", "1024", "640"]
    assert table[2] == ["0.5", "2000", "6000", "512", "320"]
    assert any(["select_p 0.95", "4000", "none", "1000", "1.25"] in table for table in Page(whole[0]).tables)


def test_scores_are_beside_the_dense_ones(whole):
    rows = [row for table in Page(whole[0]).tables if table[0][0] == "task" for row in table[1:]]
    assert ["arc_easy", "acc", "dense", "400", "43.0% ± 2.0%", "", "", "", "", ""] in rows
    assert ["arc_easy", "acc", "k_ratio 0.75", "400", "43.0% ± 2.0%", "43.0%", "+0.0%", "1", "0", "1"] in rows
    ours = "k_ratio 0.5, weighted, exact 4 + 64"
    assert ["hellaswag", "acc_norm", ours, "400", "41.0% ± 1.2%", "43.0%", "-2.0%", "12", "4", "0.077"] in rows


def test_failed_settings_are_listed_with_their_reason(whole):
    rows = Page(whole[0]).tables[-1]
    assert [row[0] for row in rows] == ["suite", "perplexity", "needle"]
    assert rows[1][2] == "out of memory: tried to allocate 12 GiB"
    assert rows[2][2] == "refused: length is 9000: the model knows 8192 positions"


def test_every_figure_has_its_numbers_and_its_command(whole):
    assert whole[0].count("<summary>Numbers and command</summary>") == whole[0].count('<div class="panels">')
    assert "aqua eval grid results tiny -p tiny.safetensors --suite transfer" in whole[0]
    # A file that does not hold its command is named.
    assert "decode.json does not say its command" in whole[0]


def test_the_page_needs_no_network_and_ids_do_not_clash(whole):
    page = Page(whole[0])
    assert len(page.ids) == len(set(page.ids)) > 50
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', whole[0]))
    assert used <= set(page.ids)
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", whole[0]))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not {"script", "link", "img", "iframe"} & page.names
    assert len(whole[0].encode()) < 3e6
    # No colour of matplotlib's is left: all follow the page, but for the cells of heat maps.
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", whole[0]))
    assert colours <= {"#ffffff", "#000000"}


def test_images_of_the_markdown_stand_alone(whole):
    _, text, images = whole
    assert re.findall(r"\]\(report_images/([^)]+)\)", text) == list(images)
    for image in images.values():
        root = ElementTree.fromstring(image)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme:dark" in image
        assert all(variable in image for variable in ("--ink:", "--s0:"))
    assert "| k\\_ratio 0.5, weighted, exact 4 + 64 | 50% |" in text


def test_names_from_files_never_become_markup(tmp_path):
    bad = "<script>alert(1)</script>\"'&$x^2$ `*_|[a](b)"
    values = [
        samples.record("perplexity", AquaConfig.paper(k_ratio=ratio), samples.losses(ratio), model=bad, command=bad)
        for ratio in (0.5, 1.0)
    ]
    names = {"calibrated": bad, "tested": "b"}
    values.append(samples.record("transfer", AquaConfig.paper(), samples.losses(0.5) | names, model=bad))
    values.append(samples.record("tasks", None, {"task": bad, "metric": bad, "value": 0.5}, model=bad))
    samples.write(tmp_path, values=values, files={'<b>"x.json': {"x": bad}})
    page, text, images = made(tmp_path)
    parsed = Page(page)
    assert not {"script", "b"} & parsed.names
    assert bad in parsed.headings[1]
    assert any(bad in cell for table in parsed.tables for row in table for cell in row)
    # A code block (indented) is text as it stands.
    assert not [line for line in text.splitlines() if "<script>" in line and not line.startswith("    ")]
    assert all("<script" not in image for image in images.values())
    for image in images.values():
        ElementTree.fromstring(image)


def test_more_curves_than_colours_are_grey_and_a_long_table_is_cut(tmp_path):
    values = [
        samples.record("perplexity", AquaConfig.paper(k_ratio=0.5, sink=sink), samples.losses(0.5))
        for sink in range(400)
    ]
    values += [
        samples.record("perplexity", AquaConfig.paper(k_ratio=ratio), samples.losses(ratio)) for ratio in (0.25, 0.75)
    ]
    page, text, _ = made(samples.write(tmp_path, values=values, files={}))
    assert "others: see the numbers" in page
    assert "The first 300 of 403 rows; report.md has all." in page
    assert len(Page(page).tables[0]) == 301
    assert text.count("| k\\_ratio 0.5, exact 399 + 0 |") == 2


def test_nan_is_shown_as_such(tmp_path):
    result = samples.losses(0.5) | {"perplexity": math.nan, "perplexity_change": None, "kl": math.inf}
    needle = samples.retrieval("length", (64, 128), (0.0, 1.0), lambda *_: 0.5)
    needle["cells"][0] |= {"right": math.nan, "asked": 0}
    far = {"calibrated_length": None, "tested_length": 64, "calibration_tokens": None}
    values = [
        samples.record("perplexity", AquaConfig.paper(k_ratio=0.5), result),
        samples.record("perplexity", AquaConfig.paper(k_ratio=0.25), samples.losses(0.25)),
        samples.record("needle", AquaConfig.paper(), needle | {"p_value": None}),
        samples.record("context", AquaConfig.paper(), result | far),
    ]
    values.append(samples.record("perplexity", AquaConfig.paper(k_ratio=1), samples.losses(1) | {"kl": -1e-9}))
    page = Page(made(samples.write(tmp_path, values=values, files={}))[0])
    assert next(row for row in page.tables[0] if row[0] == "k_ratio 1")[5:7] == ["+0.00%", "0.0000"]
    row = next(row for row in page.tables[0] if row[0] == "k_ratio 0.5")
    assert row[4:7] == ["NaN", "NaN", "infinite"]
    assert any("NaN/0" in cell for table in page.tables for line in table for cell in line)


def test_a_report_is_the_same_each_time_and_leaves_no_older_images(tmp_path):
    samples.write(tmp_path, values=samples.records()[:6], files={})
    write_report(tmp_path, collect(tmp_path))
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report_images" / "figure-999.svg").write_text("old")
    (tmp_path / "report_images" / "mine.svg").write_text("not ours")
    write_report(tmp_path, collect(tmp_path))
    assert (tmp_path / "report.html").read_bytes() == first
    names = {path.name for path in (tmp_path / "report_images").iterdir()}
    assert "figure-999.svg" not in names
    assert {"mine.svg", "figure-1.svg"} <= names


ODD = [None, "x", "", [], {}, math.nan, math.inf, -1, 0, 1e300, 10**30, True, [[1]], [None], "<b>$", -0.5]


def changed(value, rng):
    """The same JSON value with something odd, or nothing, in one place."""
    value = json.loads(json.dumps(value))
    at = value
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not (isinstance(at[key], (dict, list)) and at[key]) or rng.random() < 0.1:
            break
        at = at[key]
    if rng.random() < 0.2:
        del at[key]
    else:
        at[key] = rng.choice(ODD)
    return value


def test_a_row_that_lacks_a_figure_is_shown_without_it(tmp_path):
    files = samples.benchmarks()
    for name, rows, key in (
        ("spectrum.json", files["spectrum.json"]["layers"], "head_dim"),
        ("breakeven.json", files["breakeven.json"]["rows"], "dense"),
        ("breakeven.json", files["breakeven.json"]["breakeven"], "whole"),
    ):
        assert rows[0].pop(key) is not None, name
    page, _, _ = made(samples.write(tmp_path, values=[], files=files))
    tables = Page(page).tables
    assert ["0", "NaN", "20-24", "40-50"] in [row for table in tables for row in table]
    assert ["0.75", "none", "none", "1024", "640"] in [row for table in tables for row in table]


@pytest.mark.slow
@pytest.mark.parametrize("seed", mostly_long(range(6), 0, 1))
def test_whatever_is_in_a_file_there_is_a_page(tmp_path, seed):
    rng = random.Random(seed)
    values, files = [], {}
    for suite in ("perplexity", "needle", "lines", "ruler", "retention", "tasks", "transfer", "context"):
        first, *others = rng.sample([value for value in samples.records() if value["suite"] == suite], 3)
        values += [changed(first, rng), *others]
    for name, value in samples.benchmarks().items():
        files[name] = changed(value, rng)
    page, text, images = made(samples.write(tmp_path, values=values, files=files))
    Page(page)
    assert text.startswith("# AQUA attention")
    for image in images.values():
        ElementTree.fromstring(image)


def test_the_command_writes_both_pages_and_says_what_it_left_out(aqua, tmp_path):
    results = samples.write(tmp_path / "results")
    (results / "notes.json").write_text("{}")
    code, out, err = aqua("report", results, "--json", tmp_path / "summary.json")
    assert code == 0, err
    assert "not used: notes.json: it is no result of this library" in err
    assert f"wrote {results / 'report.html'}" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["transfer"] == 9
    assert [failure["suite"] for failure in summary["failed"]] == ["perplexity", "needle"]
    assert summary["unused"][0]["file"] == "notes.json"
    assert (results / "report.md").read_text().startswith("# AQUA attention: what was measured")


def test_its_own_figures_are_no_file_that_is_left_out(aqua, tmp_path):
    results = samples.write(tmp_path / "results", values=samples.records()[:3])
    for _ in range(2):
        code, _, err = aqua("report", results, "--json", results / "report.json")
        assert (code, "not used" in err) == (0, False)
    assert json.loads((results / "report.json").read_text())["unused"] == []


def test_what_the_commands_write_is_understood(aqua, tmp_path, tiny_folder, llama, words):
    """Every evaluation and benchmark that runs on a CPU, on a tiny model: no file is left out."""
    projections, text, results = tmp_path / "tiny.safetensors", tmp_path / "words.txt", tmp_path / "results"
    llama[1].save(projections)
    text.write_text(words)
    results.mkdir()
    given = (tiny_folder, "-p", projections, "--data", text)
    short = ("--context", 64, "--tokens", 128)
    ratios = ("--preset", "paper", "--k-ratio", 1, "--k-ratio", 0.25)
    commands = {
        "perplexity": ("eval", "perplexity", *given, *short, *ratios),
        "adaptive": ("eval", "perplexity", *given, *short, "--logit-error", 1),
        "retention": ("eval", "retention", *given, *short),
        "lines": ("eval", "lines", tiny_folder, "-p", projections, "--lines", 2, "--count", 2, *ratios, "--no-chat"),
        "memory": ("bench", "memory", tiny_folder, "-p", projections, "--length", 64, "--select-tokens", 9),
        "spectrum": ("inspect", projections),
    }
    for name, command in commands.items():
        code, _, err = aqua(*command, "--json", results / f"{name}.json")
        assert code == 0, err
    code, _, err = aqua("report", results, "--json", tmp_path / "summary.json")
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["unused"] == []
    # Dense perplexity is in two files, and counts once.
    assert summary["settings"] == {"perplexity": 4, "retention": 12, "lines": 3, "memory": 1, "spectrum": 1}
    page = Page((results / "report.html").read_text())
    rows = json.loads((results / "perplexity.json").read_text())["rows"]
    table = {row[0]: row for row in page.tables[0]}
    assert table["k_ratio 0.25"][5] == f"{rows[1]['perplexity_change']:+.2%}"
    assert {"Trade-offs", "Retrieval", "Layers and heads", "Time and memory"} <= set(page.headings)
    assert ("where tokens are chosen", "by widths") in [(table[0][0], table[0][-1]) for table in page.tables]


def test_mistakes_are_one_line_with_the_remedy(aqua, tmp_path, monkeypatch):
    code, _, err = aqua("report", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no results: run `aqua eval grid" in err
    samples.write(tmp_path)
    for module in ("matplotlib", "jinja2"):
        with monkeypatch.context() as blocked:
            blocked.setitem(sys.modules, module, None)
            code, _, err = aqua("report", tmp_path)
        assert code == 2
        assert (
            f"aqua report needs {module}: install it beside this package (pip install '.[report]' in the clone)" in err
        )
    assert not (tmp_path / "report.html").exists()


def test_only_unusable_files_still_make_a_page(tmp_path):
    (tmp_path / "odd.json").write_text("{}")
    page = Page(made(tmp_path)[0])
    assert page.headings == ["Files not used"]
    assert page.tables[0][1][0] == "odd.json"
