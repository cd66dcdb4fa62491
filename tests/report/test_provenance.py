# SPDX-License-Identifier: Apache-2.0
"""Every file says how it was made; the report sets side by side what was made alike, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import samples
import torch

from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.evaluate.record import file_digest
from aqua_attention.report.collect import collect

pytest.importorskip("matplotlib")
from aqua_attention.report.page import html, report_markdown, sections_of

HALF = AquaConfig.paper(k_ratio=0.5)
SIZES = ("--context", 64, "--tokens", 128)


@pytest.fixture
def measure(aqua, tmp_path, tiny_folder, words):
    """Run an evaluation of a model with the projections of a name, and write its figures to a results folder."""
    (tmp_path / "words.txt").write_text(words.replace(" w7 ", ". "))
    (tmp_path / "results").mkdir()

    def run(suite, projections, target, *options, model=tiny_folder):
        command = ("eval", suite, *([tmp_path / "results"] if suite == "grid" else []), model)
        given = ("-p", tmp_path / projections, "--preset", "paper", "--k-ratio", 0.5, *options)
        code, _, err = aqua(*command, *given, "--json", tmp_path / "results" / target)
        assert code == 0, err

    run.text = ("--data", tmp_path / "words.txt")
    run.sized = (*run.text, *SIZES)
    return run


@pytest.fixture
def calibrate(aqua, tmp_path, tiny_folder, words):
    """Calibrate the tiny model on so many tokens into a file of that name."""

    def run(name, tokens, seed=0):
        (tmp_path / "words.txt").write_text(words.replace(" w7 ", ". "))
        given = ("--data", tmp_path / "words.txt", "--tokens", tokens, "--context", 64, "--seed", seed)
        code, _, err = aqua("calibrate", tiny_folder, *given, "-o", tmp_path / name)
        assert code == 0, err
        return file_digest(tmp_path / name)

    return run


def blocks_of(folder):
    """The blocks of each section of the report."""
    collected = collect(folder)
    assert not collected.unused
    return {section.title: section.blocks for section in sections_of(collected)}


def test_rows_of_two_projections_are_two_tables_each_with_its_projections(measure, calibrate, tmp_path):
    for name, tokens in (("much", 1024), ("little", 128)):
        calibrate(f"{name}.safetensors", tokens)
        measure("perplexity", f"{name}.safetensors", f"{name}.json", *measure.sized)
    tables = blocks_of(tmp_path / "results")["What you gain and lose"]
    assert [[row[0] for row in block.table[1]] for block in tables] == [["dense", "k_ratio 0.5"]] * 2
    said = {block.title.rpartition(", ")[2]: block for block in tables}
    assert set(said) == {"projections much.safetensors", "projections little.safetensors"}
    for name, tokens in (("much", 1024), ("little", 128)):
        block = said[f"projections {name}.safetensors"]
        digest = file_digest(tmp_path / f"{name}.safetensors")[:8]
        assert block.rests_on == [f"{name}.safetensors ({digest}), calibrated on {tokens} tokens"]
        (command,) = block.commands
        assert command.startswith("aqua eval perplexity ")
        assert f"{name}.safetensors" in command
        assert not block.unsaid


def test_projections_written_over_under_the_same_name_stay_apart(measure, calibrate, tmp_path):
    for seed in (0, 1):
        calibrate("mine.safetensors", 128, seed)
        measure("perplexity", "mine.safetensors", f"{seed}.json", *measure.sized)
    tables = blocks_of(tmp_path / "results")["What you gain and lose"]
    assert len({block.title for block in tables}) == 2
    assert len({tuple(block.rests_on) for block in tables}) == 2


def test_a_grid_and_the_files_of_commands_that_measured_the_same_are_one_table(measure, calibrate, tmp_path):
    calibrate("mine.safetensors", 256)
    shutil.copy(tmp_path / "mine.safetensors", tmp_path / "copy.safetensors")
    needle = ("--length", 120, "--depth", 0, "--depth", 1, "--no-chat")
    lines = ("--lines", 2, "--count", 2, "--no-chat")
    suites = [word for suite in ("perplexity", "retention", "needle", "lines") for word in ("--suite", suite)]
    measure("grid", "mine.safetensors", "all.json", *suites, *measure.sized, *needle, *lines[:-1])
    alone = blocks_of(tmp_path / "results")
    measure("perplexity", "mine.safetensors", "perplexity.json", *measure.sized)
    measure("needle", "copy.safetensors", "needle.json", *measure.text, *needle)
    measure("lines", "mine.safetensors", "lines.json", *lines)
    found = blocks_of(tmp_path / "results")
    assert {title: [block.table for block in blocks] for title, blocks in found.items()} == {
        title: [block.table for block in blocks] for title, blocks in alone.items()
    }
    (table,) = found["What you gain and lose"]
    assert table.table[0][-2:] == ["needle: right", "lines: right"]
    for blocks in found.values():
        for block in blocks:
            assert block.commands
            assert all(command.startswith("aqua eval ") for command in block.commands)


def test_retention_of_a_grid_and_of_its_command_is_one_row(aqua, measure, calibrate, tmp_path, tiny_folder):
    calibrate("mine.safetensors", 256)
    measure("grid", "mine.safetensors", "all.json", "--suite", "retention", *measure.sized)
    given = (tiny_folder, "-p", tmp_path / "mine.safetensors", *measure.sized, "--k-ratio", 0.5)
    assert aqua("eval", "retention", *given, "--json", tmp_path / "results" / "retention.json")[0] == 0
    curves, *others = blocks_of(tmp_path / "results")["Layers and heads"]
    assert not any(block.title.startswith("Retention") for block in others)
    assert sorted(row[:2] for row in curves.table[1]) == [["magnitude", "0.5"], ["static", "0.5"], ["weighted", "0.5"]]


def test_another_model_of_the_same_name_has_a_table_of_its_own(measure, calibrate, tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM

    calibrate("mine.safetensors", 256)
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    measure("perplexity", "mine.safetensors", "first.json", *measure.sized, model=model)
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.k_proj.weight += 0.002 * layer.self_attn.k_proj.weight.flip(0)
    changed.save_pretrained(model)
    measure("perplexity", "mine.safetensors", "second.json", *measure.sized, model=model)
    tables = blocks_of(tmp_path / "results")["What you gain and lose"]
    assert [[row[0] for row in block.table[1]] for block in tables] == [["dense", "k_ratio 0.5"]] * 2
    assert all(", weights sha256 " in block.title or ", weights " in block.title for block in tables)


def older(value):
    """A command's file without what later versions say."""
    return {name: each for name, each in value.items() if name not in ("command", "version", "projections_sha256")}


def rows(factor, **changes):
    row = {"setting": HALF.to_dict(), "basis": "aqua"} | samples.losses(0.5, factor)
    return samples.SAID | {"data": "x", "scored": "all", "dense": samples.DENSE, "rows": [row]} | changes


def test_files_that_do_not_say_how_they_were_made_stand_apart_and_say_so(tmp_path):
    questions = [{"lines": 10, "correct": [True, place > 1]} for place in range(4)]
    asked = {"setting": HALF.to_dict(), "basis": "aqua", "lost": 2, "gained": 0, "p_value": 0.5}
    lines = {"suite": "lines", "model": "tiny", "schema": 1, "rows": [asked], "questions": questions}
    files = {"a.json": older(rows(1)), "b.json": older(rows(2)), "c.json": rows(3), "lines.json": lines}
    samples.write(tmp_path, values=[], files=files)
    tables = blocks_of(tmp_path)["What you gain and lose"]
    tables.sort(key=lambda block: ("lines" in block.title, block.title))
    assert [block.title for block in tables] == ["tiny, x", "tiny, x, a.json", "tiny, x, b.json", "tiny, lines.json"]
    assert [[row[0] for row in block.table[1]] for block in tables] == [["dense", "k_ratio 0.5"]] * 4
    assert not any("right" in title for block in tables[:3] for title in block.table[0])
    assert [block.unsaid for block in tables] == [
        [],
        *[[f"{name}.json does not say its projections, command and version, so it stands apart."] for name in "ab"],
        ["lines.json does not say its projections, command and version, so it stands apart."],
    ]
    collected = collect(tmp_path)
    page, text = html(sections_of(collected), []), report_markdown(sections_of(collected), [])[0]
    for written in (page, text):
        assert "a.json does not say its projections, command and version, so it stands apart." in written
        assert "a.json does not say its command" in written
        assert "the rest is not recorded" not in written


def test_of_what_was_measured_again_the_newest_counts(tmp_path):
    grid = samples.record("perplexity", HALF, samples.losses(0.5, 1), options={"data": "x"}, seed=None)
    grid |= {"text_sha256": None, "device": None, "dtype": None}
    again = rows(2) | {"started": "2027-01-01T00:00:00+00:00", "command": "aqua eval perplexity again"}
    samples.write(tmp_path, values=[grid], files={"again.json": again})
    (table,) = blocks_of(tmp_path)["What you gain and lose"]
    assert [row[5] for row in table.table[1]][1:] == [f"{samples.losses(0.5, 2)['perplexity_change']:+.2%}"]
    assert table.commands == ["aqua eval perplexity again"]


def test_needles_at_other_depths_are_another_run(tmp_path):
    found = [samples.retrieval("length", (64,), depths, lambda *_: 0.7) for depths in ((0.0, 0.5), (0.25, 1.0))]
    values = [samples.record("needle", HALF, found[n], options={"data": "x", "depths": [n]}) for n in (0, 1)]
    found = blocks_of(samples.write(tmp_path, values=values, files={}))["Retrieval"]
    assert sorted(block.title.rpartition("cells ")[2] for block in found) == [
        "length 64, depths 0, 0.5, 20 asked",
        "length 64, depths 0.25, 1, 20 asked",
    ]


def test_spectra_and_caches_of_two_projections_are_named(tmp_path):
    files = samples.benchmarks()
    both = {}
    for name in ("memory.json", "spectrum.json"):
        for digit in "ab":
            said = {"projections": f"{digit}.safetensors", "projections_sha256": digit * 64}
            both[f"{digit}-{name}"] = files[name] | samples.SAID | {"model": files[name]["model"]} | said
    found = blocks_of(samples.write(tmp_path, values=[], files=both))
    for section in ("Layers and heads", "Time and memory"):
        titles = [block.title for block in found[section]]
        assert [title[-25:] for title in titles] == ["projections a.safetensors", "projections b.safetensors"]


def test_every_command_says_how_its_file_was_made(aqua, measure, calibrate, tmp_path, tiny_folder, monkeypatch):
    cache = {"length": 64, "dtype": "float32", "rows": samples.benchmarks()["memory.json"]["rows"]}
    monkeypatch.setattr("aqua_attention.bench.memory.measure_memory", lambda *_, **__: cache)  # a matter of seconds
    digest = calibrate("mine.safetensors", 256)
    file = tmp_path / "mine.safetensors"
    given = (tiny_folder, "-p", file)
    task = {"question": "w1 w2", "choices": {"text": ["w3", "w4"], "label": ["A", "B"]}, "answerKey": "A", "id": "1"}
    (tmp_path / "arc.jsonl").write_text(json.dumps(task))
    commands = {
        "perplexity": ("eval", "perplexity", *given, *measure.sized),
        "retention": ("eval", "retention", *given, *measure.sized),
        "needle": ("eval", "needle", *given, *measure.text, "--length", 120, "--depth", 0, "--no-chat"),
        "lines": ("eval", "lines", *given, "--lines", 2, "--count", 1, "--no-chat"),
        "tasks": ("eval", "tasks", *given, "--task", f"arc_easy={tmp_path / 'arc.jsonl'}"),
        "memory": ("bench", "memory", *given, "--length", 64),
        "generate": ("generate", *given, "--prompt", "w1 w2", "--max-new-tokens", 2, "--no-chat"),
        "inspect": ("inspect", file),
        "merge": ("merge", file, file, "-o", tmp_path / "both.safetensors"),
    }
    for name, command in commands.items():
        target = tmp_path / f"{name}.json"
        code, _, err = aqua(*command, "--json", target)
        assert code == 0, (name, err)
        value = json.loads(target.read_text())
        merged = name == "merge"
        assert value["projections"] == str(tmp_path / ("both.safetensors" if merged else "mine.safetensors")), name
        assert value["projections_sha256"] == (file_digest(tmp_path / "both.safetensors") if merged else digest), name
        assert value["calibration_tokens"] == (512 if merged else 256), name
        assert value["basis"] == "aqua", name
        assert value["command"].startswith("aqua "), name
        assert set(value["versions"]) == {"torch", "transformers", "python"}, name
        assert value["versions"]["torch"] == torch.__version__, name
        assert value["version"], name
        assert value["model"], name
        assert value["started"].startswith("20"), name
    measure("grid", "mine.safetensors", "all.json", *measure.sized)
    for record in json.loads((tmp_path / "results" / "all.json").read_text())["records"]:
        dense = record["config"] is None
        assert record.get("projections") == (None if dense else str(file))
        assert record.get("calibration_tokens") == (None if dense else 256)
        assert record["projections_sha256"] == (None if dense else digest)
    assert Projections.load(file).calibration["tokens"] == 256
