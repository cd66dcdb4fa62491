# SPDX-License-Identifier: Apache-2.0
"""Every command measures a tiny model on two texts into one folder; the report's tables hold the figures of both."""

from __future__ import annotations

import json
import sys
import warnings

import pytest

from aqua_attention.cli import main as cli
from aqua_attention.report.collect import collect

pytest.importorskip("matplotlib")
from aqua_attention.report.page import sections_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts of sentences of different words, each also cut into two domains of the same names."""
    folder = tmp_path_factory.mktemp("texts")
    for name, step in (("one", 7), ("two", 13)):
        lines = [" ".join(f"w{(step * (8 * row + place)) % 97}" for place in range(8)) for row in range(400)]
        (folder / f"{name}.txt").write_text(".\n".join(lines))
        (folder / f"{name}-reverse.txt").write_text(".\n".join(line[::-1].replace("w", " w") for line in lines[::-1]))
        items = [
            {"question": lines[place], "choices": {"text": lines[place + 1 : place + 3], "label": ["A", "B"]}}
            | {"answerKey": "AB"[place % 2], "id": f"{name}{place}"}
            for place in range(6)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_folder, llama, texts):
    """The folder, with what each command wrote with --json beside it."""
    folder, ratios = tmp_path_factory.mktemp("measured") / "results", ("--k-ratio", 0.5, "--k-ratio", 0.25)
    given = ("--preset", "paper", *ratios)
    folder.mkdir()
    projections = folder.parent / "tiny.safetensors"
    llama[1].save(projections)
    short, learn = ("--context", 64, "--tokens", 128), ("--calibration-tokens", 128)
    lengths = ("--calibrated-length", 32, "--calibrated-length", 64, "--tested-length", 32)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("one", "two"):
            text = ("--data", texts / f"{name}.txt")
            domains = (f"first={texts / name}.txt", f"second={texts / name}-reverse.txt")
            known = (tiny_folder, "-p", projections)
            commands = {
                "perplexity": (*known, *text, *short, *given),
                "retention": (*known, *text, *short, *ratios),
                "tasks": (*known, "--task", f"arc_easy={texts / name}.jsonl", "--few-shot", 0, *given),
                "grid": (folder, *known, *text, *short, *given, "--suite", "perplexity"),
                "transfer": (
                    folder,
                    tiny_folder,
                    "--domain",
                    domains[0],
                    "--domain",
                    domains[1],
                    *short,
                    *given,
                    *learn,
                ),
                "context": (
                    *(folder, tiny_folder, "--calibration-data", texts / "two-reverse.txt", *text, *given),
                    *(*lengths, *learn, "--calibration-tokens", 256, "--tokens", 128),
                ),
            }
            for command, arguments in commands.items():
                kept = folder if command in ("perplexity", "retention", "tasks") else folder.parent
                words = ("aqua", "eval", command, *arguments, "--json", kept / f"{command}-{name}.json")
                patch.setattr(sys, "argv", [*map(str, words)])
                with pytest.raises(SystemExit) as leaving, warnings.catch_warnings():
                    warnings.simplefilter("always")  # few tokens, for a test
                    cli.main()
                    raise SystemExit(0)
                assert not leaving.value.code, (command, leaving.value.code)
    return folder


@pytest.fixture(scope="module")
def blocks(results):
    collected = collect(results)
    assert not collected.unused
    assert not collected.failed
    return {section.title: section.blocks for section in sections_of(collected)}


def figures(folder, name):
    return [json.loads((folder / f"{name}-{text}.json").read_text()) for text in ("one", "two")]


def rows_of(blocks):
    return [row for block in blocks for row in block.table[1]]


def test_titles_are_all_different(blocks):
    for section in blocks.values():
        titles = [block.title for block in section]
        assert len(titles) == len(set(titles))


@pytest.mark.parametrize("suite", ["transfer", "context"])
def test_matrices_hold_every_record_once_and_no_table_mixes_texts(results, blocks, suite):
    title, keys = {
        "transfer": ("Transfer", ("calibrated", "tested")),
        "context": ("Context length", ("calibrated_length", "tested_length")),
    }[suite]
    matrices = [block for block in blocks[title] if not block.title.startswith("Calibration size")]
    runs = [file["records"] for file in figures(results.parent, suite)]
    for block in matrices:
        assert not block.note
        cells = [tuple(row[:2]) for row in block.table[1]]
        assert len(set(cells)) == len(cells)
        assert cells == sorted(cells)
        shown = {tuple(row[:3]) for row in block.table[1]}
        made = [
            {(*(str(r["result"][key]) for key in keys), f"{r['result']['perplexity']:.3f}") for r in run}
            for run in runs
        ]
        assert sum(shown <= each for each in made) == 1
    assert sum(len(block.table[1]) for block in matrices) == sum(map(len, runs))


def test_calibration_sizes_are_of_one_text_each(results, blocks):
    sizes = [block for block in blocks["Context length"] if block.title.startswith("Calibration size")]
    runs = [file["records"] for file in figures(results.parent, "context")]
    assert len(sizes) == 4
    assert sum(len(block.table[1]) for block in sizes) == sum(map(len, runs))
    for block in sizes:
        losses = {row[3] for row in block.table[1]}
        assert sum(losses <= {f"{r['result']['kl']:.4f}" for r in run} for run in runs) == 1


def test_the_first_tables_are_of_one_text_each(results, blocks):
    runs = [file["rows"] for file in figures(results, "perplexity")]
    grids = [[r["result"] for r in file["records"] if r["config"]] for file in figures(results.parent, "grid")]
    tables = blocks["What you gain and lose"]
    for run in runs + grids:
        expected = [f"{row['perplexity']:.3f}" for row in run]
        assert any([row[4] for row in block.table[1]][1:] == expected for block in tables)


def test_retention_and_tasks_hold_both_texts(results, blocks):
    retention = [block for block in blocks["Layers and heads"] if block.title.startswith("Retention")]
    assert len(retention) == 2
    for block, file in zip(
        sorted(retention, key=lambda block: block.title), figures(results, "retention"), strict=True
    ):
        assert {row[2] for row in block.table[1]} == {f"{row['score_loss']:.2%}" for row in file["rows"]}
    rows = rows_of(blocks["Tasks"])
    assert len({row[0] for row in rows}) == 2
    made = [row for file in figures(results, "tasks") for row in file["rows"]]
    assert sorted(row[-1] for row in rows if row[2] != "dense") == sorted(
        f"{row['outside_window']:.1%}" for row in made
    )
