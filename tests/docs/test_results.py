# SPDX-License-Identifier: Apache-2.0
"""Tables of figures in README and docs/ are those of the records in results/, and so is the picture."""

from __future__ import annotations

import json
import re
import shutil
from decimal import Decimal

import pytest

from aqua_attention.config import AquaConfig
from pages import cells, commands, files, marks, picture, results
from pages import record as record_of

RECORDS, SHORT = results.load()
TEXTS = results.texts()
PAGES = [path for path in files.with_results() if any(name in TEXTS for name in marks.names(path.read_text()))]


def name_of(path):
    return str(path.relative_to(files.ROOT))


@pytest.mark.parametrize("path", files.with_results(), ids=name_of)
def test_tables_are_those_of_the_records(path):
    page = path.read_text()
    assert page == results.generated(page, TEXTS), "run: make docs"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_changed_figure_of_a_page_is_found(path):
    page = path.read_text()
    table = re.search(r"<!-- begin results/.*?<!-- end", page, re.DOTALL)
    figure = list(re.finditer(r"\d", table[0][: table[0].index("<sub>" if "<sub>" in table[0] else "<details")]))[-1]
    at = table.start() + figure.start()
    changed = f"{page[:at]}{(int(page[at]) + 1) % 10}{page[at + 1 :]}"
    assert results.generated(changed, TEXTS) == page


def test_a_changed_figure_of_a_record_changes_its_pages(tmp_path):
    shutil.copytree(results.RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "loss_group.json"
    path.write_text(path.read_text().replace('"change": 0.0158', '"change": 0.0159'))
    found = results.texts(tmp_path / "results")
    assert {name for name in found if found[name] != TEXTS[name]} == {
        f"results/{name}" for name in ("loss_group", "gain", "preset_use")
    }


def test_every_table_is_shown():
    assert set(results.used()) == TEXTS.keys()


@pytest.mark.parametrize("name", RECORDS)
def test_commands_of_records_exist_with_their_options(name):
    block = files.Block(results.RESULTS / f"{name}.json", 1, "sh", "\n".join(RECORDS[name]["command"]))
    given = commands.lines(block)
    assert given
    assert [found for found in map(commands.wrong, given) if found] == []


def test_the_picture_shows_the_records():
    shown = picture.points()
    assert len(shown) == len(SHORT["picture"]["rows"])
    for path in (files.LIGHT, files.DARK):
        assert picture.held(path.read_text()) == picture.data(shown), "run: make docs"
    moved = [(name, kl + 0.001, others) for name, kl, others in shown]
    assert picture.held(picture.drawing(moved)) != picture.data(shown)
    assert picture.drawing(shown) == picture.drawing(shown)


@pytest.fixture
def record():
    return {
        "title": "A table",
        "command": ["make demo"],
        **dict.fromkeys(("model", "data", "dtype", "device", "versions", "commit", "digests")),
        "measured": "2026-11-27",
        "recorded_in": "69c7d63",
        "columns": [{"heading": "k", "cell": "{row}"}, {"heading": "loss", "cell": ["{loss:+%} ({kl})", "{loss:+%}"]}],
        "rows": [{"row": "0.5", "loss": 0.25, "kl": 0.5}, {"row": "0.25", "loss": 0.5}],
    }


def loaded(tmp_path, value, short=None):
    (tmp_path / "short").mkdir(exist_ok=True)
    (tmp_path / "one.json").write_text(value if isinstance(value, str) else json.dumps(value))
    if short is not None:
        (tmp_path / "short" / "brief.json").write_text(json.dumps({"title": "B", "columns": ["a"], "rows": short}))
    return results.load(tmp_path)


def test_a_record_becomes_a_table(tmp_path, record):
    table = results.record_table(loaded(tmp_path, record)[0]["one"])
    assert table.splitlines()[2:] == ["| 0.5 | +25% (0.5) |", "| 0.25 | +50% |"]
    assert "| not recorded | device, versions, commit, digests |" in results.texts(tmp_path)["results/one"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": ""}, "title is missing, empty, or no str"),
        ({"command": "make demo"}, "command is missing, empty, or no list"),
        ({"rows": []}, "rows is missing"),
        ({"measured": "today"}, "measured is no day"),
        ({"speed": 1}, "there is no field speed"),
        ({"rows": [{"row": "a"}, {"row": "a"}]}, "row 'a' is no name"),
        ({"rows": [{"row": "a: b"}]}, "row 'a: b' is no name"),
        ({"columns": [{"heading": "a", "cell": "{los}"}]}, "no row has the figures of {los}"),
        ({"columns": [{"heading": "a", "cell": "{kl +}"}]}, "kl +"),
        ({"columns": [{"heading": "a", "cell": "{open('x')}"}]}, "only names"),
        ({"columns": [{"heading": "a"}]}, "a column has heading and cell"),
    ],
)
def test_a_wrong_record_is_one_clear_line(tmp_path, record, change, message):
    with pytest.raises(cells.Wrong) as error:
        loaded(tmp_path, record | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_record_says_what_was_not_recorded(tmp_path, record):
    del record["device"]
    with pytest.raises(cells.Wrong, match=r"one\.json: device is missing; write null"):
        loaded(tmp_path, record)


def test_a_file_that_is_no_json_is_named(tmp_path):
    with pytest.raises(cells.Wrong, match=r"one\.json is no JSON"):
        loaded(tmp_path, "{")


def test_a_short_table_takes_figures_of_records(tmp_path, record):
    loaded(tmp_path, record, [["{one['0.25'].loss / one['0.5'].loss:.1f} times"]])
    assert "| 2.0 times |" in results.texts(tmp_path)["results/brief"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [("{two['0.5'].loss}", "there is no record two"), ("{one['0.25'].kl}", "there is no figure kl")],
)
def test_a_short_table_without_its_figure_is_an_error(tmp_path, record, cell, message):
    with pytest.raises(cells.Wrong, match=message):
        loaded(tmp_path, record, [[cell]])
        results.texts(tmp_path)


@pytest.mark.parametrize(
    "page",
    [
        "<!-- begin results/demo: make docs writes this -->",
        "<!-- begin results/demo: make docs writes that -->\n<!-- end results/demo -->",
        "<!-- begin results/demo: make docs writes this -->\n<!-- end results/gain -->",
    ],
)
def test_a_mark_without_its_end_is_an_error(page):
    with pytest.raises(cells.Wrong, match="the marks of results/demo are wrong"):
        results.generated(page, TEXTS)


def test_a_page_that_shows_an_unknown_table_is_an_error():
    with pytest.raises(cells.Wrong, match="there is no results/none"):
        results.generated("<!-- begin results/none: make docs writes this -->\n<!-- end results/none -->", TEXTS)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("{change:+%} ({kl})", "+0.20% (0.0041)"),
        ("{least:+%}", "-0.00%"),
        ("{1 - kl * 2:.3f}", "0.992"),
        ("{min(kl, change):.4f} to {max(kl, change):.4f}", "0.0020 to 0.0041"),
        ("{many:,}", "462,944"),
        ("{word} and text", "none and text"),
    ],
)
def test_cells_keep_the_digits_of_a_record(cell, text):
    row = {"change": "0.0020", "kl": "0.0041", "least": "-0.0000", "many": "462944"}
    names = {name: Decimal(value) for name, value in row.items()} | {"word": "none"}
    assert cells.written(cell, names) == text


def written_by_a_command():
    setting = AquaConfig(k_ratio=0.5).to_dict()
    return {
        "suite": "perplexity",
        "command": "aqua eval perplexity tiny -p tiny.safetensors --preset fast --json x.json",
        "version": "0.1.0",
        "versions": {"torch": "2.13.0"},
        "commit": "69c7d63",
        "started": "2026-11-27T10:00:00+00:00",
        "model": "tiny",
        "projections_sha256": "0" * 64,
        "dense": {"perplexity": 20.0},
        "rows": [{"setting": setting, "basis": "aqua", "perplexity": 20.5, "kl": 0.0205, "per_layer": [1, 2]}],
    }


def test_a_file_of_a_command_becomes_the_draft_of_a_record(tmp_path):
    source, target = tmp_path / "x.json", tmp_path / "results" / "mine.json"
    target.parent.mkdir()
    source.write_text(json.dumps(written_by_a_command()))
    record_of.main([str(source), str(target)])
    mine = results.load(target.parent)[0]["mine"]
    assert mine["versions"] == {"torch": "2.13.0", "aqua_attention": "0.1.0"}
    assert mine["digests"] == {"projections_sha256": "0" * 64}
    assert mine["measured"] == "2026-11-27"
    assert results.record_table(mine).splitlines()[2:] == [
        "| dense | 20.0 |  |",
        "| k_ratio 0.5, weighted, shared by group, sliding exact, exact 4 + 64 | 20.5 | 0.0205 |",
    ]
    with pytest.raises(SystemExit, match="take another name"):
        record_of.main([str(source), str(target)])


def test_rows_of_several_sizes_are_told_apart():
    step = {"name": "aqua", "k_ratio": 0.5, "seconds": 0.018}
    sizes = [{"batch": batch, "length": 1024, "rows": [step]} for batch in (1, 8)]
    found = {"command": "aqua bench generate", "started": "2026-11-27", "results": sizes}
    assert [row["row"] for row in record_of.draft(found)["rows"]] == [
        "1 x 1024, aqua, k_ratio 0.5",
        "8 x 1024, aqua, k_ratio 0.5",
    ]


@pytest.mark.parametrize("field", ["command", "started", "rows"])
def test_a_file_that_does_not_say_how_it_was_made_becomes_no_record(field):
    found = {name: value for name, value in written_by_a_command().items() if name not in (field, "dense")}
    with pytest.raises(cells.Wrong, match=field):
        record_of.draft(found)
