# SPDX-License-Identifier: Apache-2.0
"""A calibration that is stopped, killed or damaged goes on, or says why it cannot."""

from __future__ import annotations

import multiprocessing
import random
import re
import time

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.calibration import run as calibration
from aqua_attention.calibration.checkpoint import Checkpoint, discard
from conftest import calibrated, make_llama

KILLS = 20


@pytest.fixture
def run(llama, word_tokenizer, words):
    """Calibrate the tiny Llama on 12 windows; the file's bytes."""

    def calibrate(path, **options):
        options = {
            "name": "tiny",
            "tokens": 768,
            "context": 64,
            "checkpoint": f"{path}.partial",
            "checkpoint_seconds": 0,
        } | options
        model = options.pop("model", llama[0])
        aqua.calibrate(model, word_tokenizer, options.pop("text", words), **options).save(path)
        return path.read_bytes()

    return calibrate


def stop_after(count):
    """A progress function that presses Ctrl-C when `count` windows are done."""

    def progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_keeps_whole_windows_and_resume_gives_the_same_file(run, tmp_path):
    whole = run(tmp_path / "whole")
    assert (tmp_path / "whole.partial").exists(), "the caller discards it"
    for stop in (1, 5, 12):
        path = tmp_path / f"stopped{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(path, progress=stop_after(stop), checkpoint_seconds=1e9)
        ticks = []
        assert run(path, resume=True, progress=lambda done, total, ticks=ticks: ticks.append((done, total))) == whole
        assert ticks == [(done, 12) for done in range(stop, 13)]


def test_an_interrupt_within_a_window_leaves_the_windows_before_it(run, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    seen = []

    def interrupted(query, key):
        seen.append(0)
        if len(seen) == 3 * 4 + 2:  # the second of three layers, in the fifth window
            raise KeyboardInterrupt
        return original(query, key)

    original = calibration.LayerStatistics.of
    monkeypatch.setattr(calibration.LayerStatistics, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", checkpoint_seconds=1e9)
    monkeypatch.undo()
    assert run(tmp_path / "stopped", resume=True) == whole


def test_nothing_is_kept_before_the_first_window_and_resume_then_begins_anew(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", progress=stop_after(0))
    assert not (tmp_path / "stopped.partial").exists()
    assert run(tmp_path / "stopped", resume=True) == run(tmp_path / "whole")


def test_the_state_is_written_only_every_few_seconds(run, tmp_path):
    run(tmp_path / "quick", checkpoint_seconds=60)
    assert not (tmp_path / "quick.partial").exists()


def test_an_unfinished_run_is_not_overwritten_without_resume(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "p", progress=stop_after(3))
    with pytest.raises(aqua.AquaError, match=r"p.partial holds an unfinished calibration: go on with --resume, or"):
        run(tmp_path / "p")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": 512}, r"tokens \(768, now 512\)"),
        ({"context": 32}, r"context \(64, now 32\)"),
        ({"seed": 1}, r"seed \(0, now 1\)"),
        (
            {"text": " ".join(f"w{n}" for n in torch.randperm(3000).remainder(95).tolist())},
            "text_sha256, windows_sha256",
        ),
        ({"model": make_llama(num_hidden_layers=2)}, "shape"),
        ({"model": make_llama().bfloat16()}, r"dtype \(torch.float32, now torch.bfloat16\)"),
        ({"model": make_llama()}, "key_weights"),
        ({"name": "other"}, r"model \(tiny, now other\)"),
    ],
)
def test_another_run_is_not_continued(run, tmp_path, changes, named):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "p", progress=stop_after(3))
    if named == "key_weights":
        changes["model"].model.layers[0].self_attn.k_proj.weight.data[0] *= 2
    with pytest.raises(
        aqua.AquaError, match=f"of another run, which differs in {named}: repeat the options of that run, or"
    ):
        run(tmp_path / "p", resume=True, **changes)


def test_damaged_state_is_refused(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "p", progress=stop_after(3))
    partial = tmp_path / "p.partial"
    good = partial.read_bytes()
    for damaged in (good[:-9], b"", good[:-1] + bytes([good[-1] ^ 1]), b"\0" * 100):
        partial.write_bytes(damaged)
        with pytest.raises(aqua.AquaError, match=r"p.partial: .*delete it, and calibrate without --resume"):
            run(tmp_path / "p", resume=True)
    calibrated(make_llama()).save(partial)
    with pytest.raises(aqua.AquaError, match="but not of an unfinished calibration"):
        run(tmp_path / "p", resume=True)


def test_nan_ends_the_run_at_its_window_and_is_not_kept(run, tmp_path):
    model = make_llama()
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(aqua.AquaError, match="NaN"):
        run(tmp_path / "p", model=model)
    assert not (tmp_path / "p.partial").exists()


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_impossible_times_between_savings_are_refused(run, tmp_path, seconds):
    with pytest.raises(aqua.AquaError, match=f"checkpoint_seconds is {seconds}: it must be a number of seconds"):
        run(tmp_path / "p", checkpoint_seconds=seconds)


def test_resume_takes_a_checkpoint(run, tmp_path):
    with pytest.raises(aqua.AquaError, match="resume takes a checkpoint"):
        run(tmp_path / "p", checkpoint=None, resume=True)


def test_discard_removes_the_state_and_what_killed_writes_left(tmp_path):
    for name in ("p.partial", ".p.partial-abcdefgh.tmp", ".p.partial-2.partial-abcdefgh.tmp"):
        (tmp_path / name).touch()
    discard(tmp_path / "p.partial")
    discard(tmp_path / "p.partial")
    assert [path.name for path in tmp_path.iterdir()] == [".p.partial-2.partial-abcdefgh.tmp"], "another run's"


def test_digests_of_key_weights_may_differ_in_the_last_digit(tmp_path):
    run = {"shape": {"layers": []}, "key_weights": [[0.5, 0.25]]}
    Checkpoint(tmp_path / "p", run).save({}, 1)
    assert Checkpoint(tmp_path / "p", run | {"key_weights": [[0.500001, 0.25]]}).load() == ({}, 1)
    for other in ([[0.51, 0.25]], None):
        with pytest.raises(aqua.AquaError, match="differs in key_weights"):
            Checkpoint(tmp_path / "p", run | {"key_weights": other}).load()


def command(arguments):
    """In a process of its own: `aqua ARGUMENTS`."""
    import sys

    from aqua_attention.cli import main as cli

    torch.set_num_threads(1)
    sys.argv = ["aqua", *arguments]
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: PTH123, SIM115
    cli.main()


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_file_is_the_same(tiny_folder, words, tmp_path, capsys):
    """kill -9 of `aqua calibrate` at 20 moments spread over its whole run, then --resume."""
    text, rng = tmp_path / "words.txt", random.Random(0)
    text.write_text(words)
    # Forked from a server that has imported torch: starting takes no longer than calibrating.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers.models.llama.modeling_llama", "aqua_attention.calibration.run"])

    def start(output, *more):
        arguments = ["calibrate", str(tiny_folder), "--data", str(text), "--tokens", "2880", "--context", "64"]
        arguments += ["--checkpoint-seconds", "0", "-o", str(output), *more]
        process = processes.Process(target=command, args=(arguments,))
        process.start()
        return process

    def finish(process):
        process.join()
        assert process.exitcode == 0

    finish(start(tmp_path / "first"))  # the server starts
    began = time.monotonic()
    finish(start(tmp_path / "whole"))
    duration, whole = time.monotonic() - began, (tmp_path / "whole").read_bytes()
    kept = []
    for turn in range(KILLS):
        output, partial = tmp_path / f"run{turn}", tmp_path / f"run{turn}.partial"
        delay, process = duration * (turn + rng.random()) / KILLS, start(output)
        while True:
            if turn % 2:  # half of them once there is something to keep
                while process.is_alive() and not partial.exists():
                    time.sleep(0.001)
                process.join(delay / 4)
            else:
                process.join(delay)
            process.kill()
            process.join()
            if process.exitcode == -9:
                break
            # It was faster than the one that was timed: once more, and earlier.
            output.unlink()
            delay, process = delay * 0.6, start(output)
        kept.append(partial.exists())
        finish(start(output, "--resume"))
        assert output.read_bytes() == whole
        assert not [path.name for path in tmp_path.iterdir() if re.search(rf"run{turn}\b.", path.name)], "left behind"
    with capsys.disabled():
        print(f"\n{KILLS} kills of a live process, {sum(kept)} with windows done; {KILLS} files the same")
    assert sum(kept) >= KILLS // 4
