# SPDX-License-Identifier: Apache-2.0
"""Where results go: what is not ours stays, what is may be replaced, and what cannot be written is said early."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile

import pytest

from aqua_attention.calibration import run
from aqua_attention.cli import demo
from aqua_attention.errors import AquaError


@pytest.fixture
def text_file(tmp_path, words):
    path = tmp_path / "words.txt"
    path.write_text(words)
    return path


@pytest.fixture
def model(tmp_path, tiny_folder):
    """A copy that a mistake may spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(ran, path):
    """Whether a command was refused in one line that names the file and the remedy."""
    code, _, err = ran
    (line,) = err.splitlines()
    return code == 2 and line.startswith(f"error: {path} ") and "give another name, or delete it" in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_calibrating_over_a_file_of_the_model_is_refused(name, aqua, model, text_file):
    before = contents(model)
    ran = aqua("calibrate", model, "--data", text_file, "--context", 64, "--tokens", 64, "-o", model / name)
    assert refused(ran, model / name)
    assert contents(model) == before


def test_merging_into_one_of_the_inputs_is_refused(aqua, projections_file, tmp_path):
    first, second, link = tmp_path / "a", tmp_path / "b", tmp_path / "link"
    for path in (first, second):
        shutil.copy(projections_file, path)
    link.symlink_to(second)
    before = contents(tmp_path)
    for output in (first, second, link):
        code, _, err = aqua("merge", first, second, "-o", output)
        assert (code, err) == (2, f"error: {output} is read here, and would be replaced: give -o another name\n")
    assert contents(tmp_path) == before
    shutil.copy(projections_file, tmp_path / "c")
    assert aqua("merge", first, second, "-o", tmp_path / "c")[0] == 0, "of others it is replaced, as before"


def test_projections_among_the_weights_of_a_model_are_warned_of(aqua, model, text_file, tmp_path):
    calibrate = ("calibrate", model, "--data", text_file, "--context", 64, "--tokens", 256, "-o")
    for output, is_warned in ((model / "p.safetensors", 1), (model / "p", 0), (tmp_path / "p.safetensors", 0)):
        code, _, err = aqua(*calibrate, output)
        found = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert (code, len(found)) == (0, is_warned), err
        assert all(f"{output} lies in the model's folder, and vLLM loads every" in line for line in found)
        assert all(line.endswith("to serve the model, write to another folder") for line in found)


@pytest.mark.parametrize(
    "command", ["calibrate", "inspect", "merge", "generate", "perplexity", "tasks", "grid", "report", "memory"]
)
def test_figures_never_replace_what_is_no_result(command, aqua, model, text_file, projections_file, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    with_model = (model, "-p", projections_file)
    lines = {
        "calibrate": ("calibrate", model, "--data", text_file, "-o", tmp_path / "p"),
        "inspect": ("inspect", projections_file),
        "merge": ("merge", projections_file, projections_file, "-o", tmp_path / "p"),
        "generate": ("generate", *with_model, "--prompt", "w1"),
        "perplexity": ("eval", "perplexity", *with_model, "--data", text_file),
        "tasks": ("eval", "tasks", *with_model, "--task", f"gsm8k={text_file}"),
        "grid": ("eval", "grid", results, *with_model, "--data", text_file),
        "report": ("report", results),
        "memory": ("bench", "memory", *with_model),
    }
    before = contents(tmp_path) | contents(projections_file.parent)
    for path in (model / "config.json", model / "model.safetensors", text_file, projections_file):
        assert refused(aqua(*lines[command], "--json", path), path)
    assert contents(tmp_path) | contents(projections_file.parent) == before


def test_one_kind_of_ours_does_not_replace_another(aqua, model, text_file, projections_file, tmp_path):
    """Projections take hours, and figures are theirs to lose."""
    figures = tmp_path / "figures.json"
    assert aqua("inspect", projections_file, "--json", figures)[0] == 0
    calibrate = ("calibrate", model, "--data", text_file, "--context", 64, "--tokens", 64, "-o")
    task = ("eval", "tasks", model, "-p", projections_file, "--task", f"gsm8k={text_file}", "--state")
    before = contents(tmp_path)
    assert refused(aqua(*calibrate, figures), figures)
    assert refused(aqua(*task, figures), figures)
    assert refused(aqua(*task, model / "config.json"), model / "config.json")
    assert contents(tmp_path) == before


def test_what_is_ours_is_replaced(aqua, model, text_file, projections_file, tmp_path):
    figures, empty = tmp_path / "figures.json", tmp_path / "empty"
    empty.write_bytes(b"")
    calibrate = ("calibrate", model, "--data", text_file, "--context", 64, "--tokens", 64, "-o")
    windows = ("--data", text_file, "--context", 64, "--tokens", 64)
    for _ in range(2):
        for arguments in (
            (*calibrate, empty, "--json", figures),
            ("eval", "perplexity", model, "-p", projections_file, *windows, "--json", figures),
            ("generate", model, "-p", projections_file, "--prompt", "w1", "--max-new-tokens", 1, "--json", figures),
            ("inspect", projections_file, "--json", figures),
        ):
            code, _, err = aqua(*arguments)
            assert code == 0, err
    link = tmp_path / "link"
    link.symlink_to(model / "config.json")
    assert refused(aqua("inspect", projections_file, "--json", link), link)


@pytest.mark.parametrize("name", ["report.md", "report.html", "report_images/figure-1.svg"])
def test_a_report_keeps_pages_of_others(name, aqua, projections_file, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    assert aqua("inspect", projections_file, "--json", tmp_path / "spectrum.json")[0] == 0
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("AQUA attention: what was measured, in my own words")
    before = contents(tmp_path)
    assert refused(aqua("report", tmp_path), foreign)
    assert contents(tmp_path) == before
    foreign.unlink()
    for _ in range(2):
        code, _, err = aqua("report", tmp_path, "--json", tmp_path / "summary.json")
        assert code == 0, err
    assert (tmp_path / "report_images" / "figure-1.svg").exists()


@pytest.mark.parametrize("name", ["smollm2.safetensors", "table.md", "summary.json"])
def test_the_demo_keeps_files_of_others(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(AquaError, match=f"{name} is there and holds no .* of aqua: give another name"):
        demo.run_demo(tmp_path, lambda *step: pytest.fail("it has begun"))
    assert (tmp_path / name).read_text() == "{}"


def test_a_place_that_takes_nothing_is_refused_before_the_model_is_loaded(
    aqua, model, text_file, projections_file, tmp_path, monkeypatch
):
    """os.access does not know everything: quotas, full disks, folders of the system."""
    monkeypatch.setattr("aqua_attention.data.models.load_model", lambda *args, **more: pytest.fail("it has begun"))
    results = ("eval", "grid", tmp_path / "results", model, "-p", projections_file)
    calibrate, windows = ("calibrate", model, "--data", text_file, "-o"), ("--data", text_file)
    code, _, err = aqua("eval", "perplexity", model, "-p", projections_file, *windows, "--json", "/dev/full")
    assert (code, "cannot write /dev/full (No space left on device)" in err) == (2, True)
    code, _, err = aqua(*calibrate, "/dev/full")
    assert (code, "cannot write /dev/full (No space left on device)" in err) == (2, True)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    for arguments in ((*calibrate, tmp_path / "p"), results, ("inspect", projections_file, "--json", tmp_path / "p")):
        code, _, err = aqua(*arguments)
        assert (code, "(No space left on device): give a file in a folder that is writable and" in err) == (2, True)
    assert not (tmp_path / "p").exists()


def test_a_disk_too_small_for_the_projections_is_refused_before_the_first_window(
    aqua, model, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "collect", lambda *args, **more: pytest.fail("it has begun"))
    taken, trial = [], run.check_room

    def small(path, size):
        taken.append(size)
        trial(path, size)
        raise AquaError(f"cannot write {path}")

    monkeypatch.setattr(run, "check_room", small)
    arguments = ("calibrate", model, "--data", text_file, "--context", 64, "--tokens", 64, "-o", tmp_path / "p")
    assert aqua(*arguments)[0] == 2
    monkeypatch.undo()
    assert aqua(*arguments)[0] == 0
    written = (tmp_path / "p").stat().st_size
    assert written < taken[0] < 3 * written + (1 << 17)


def test_figures_of_every_command_say_what_made_them(aqua, projections_file, tmp_path):
    path = tmp_path / "figures.json"
    assert aqua("merge", projections_file, projections_file, "-o", tmp_path / "both", "--json", path)[0] == 0
    assert json.loads(path.read_text())["command"].startswith(f"aqua merge {projections_file}")
