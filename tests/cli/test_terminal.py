# SPDX-License-Identifier: Apache-2.0
"""What the command says besides its results: mistakes in a line, progress where there is no terminal, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from aqua_attention.calibration import statistics
from aqua_attention.io import progress


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval perplexity m -p p --k-ratio abc", ("--k-ratio", "'abc'", "aqua eval perplexity --help")),
        ("eval perplexity m -p p --sink 1.5", ("--sink", "'1.5'", "integer")),
        ("eval perplexity m -p p --k-ratio 0.5 --k-ratio x", ("--k-ratio", "'x'")),
        ("calibrate m -o o --tokens many", ("--tokens", "'many'")),
        ("calibrate", ("model", "aqua calibrate --help")),
        ("calibrate m", ("--output",)),
        ("merge a", ("second",)),
        ("inspect a b", ("b",)),
        ("eval perplexity m -p", ("-p",)),
        ("inspect f --jsn x", ("--jsn",)),
        ("inspct", ("inspct", "aqua --help")),
        ("eval perplexty", ("perplexty", "aqua eval --help")),
        ("generate m -p p --prompt w1 --compare=yes", ("--compare",)),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(arguments, words, aqua):
    code, out, err = aqua(*arguments.split())
    (line,) = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_an_option_is_proposed_only_where_it_is_near(aqua):
    near = aqua("bench", "breakeven", "--devcie", "cpu")[2]
    assert "--device" in near and "--devcie" in near
    far = aqua("bench", "breakeven", "--preset", "fast")[2]
    assert far == "error: No such option: --preset; see `aqua bench breakeven --help`\n"


@pytest.mark.parametrize("group", [(), ("eval",), ("bench",)])
def test_a_group_alone_shows_its_commands(group, aqua):
    code, out, err = aqua(*group)
    assert (code, "error" in err, "Usage: aqua" in out + err) == (2, False, True)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_keeps_the_state_and_says_so(name, aqua, monkeypatch, tmp_path, tiny_folder, words):
    text, out, calls = tmp_path / "words.txt", tmp_path / "p", []
    text.write_text(words)
    original = statistics.LayerStatistics.of

    def signalled(query, key):
        calls.append(0)
        if len(calls) == 3 * 2 + 1:  # in the third window
            os.kill(os.getpid(), getattr(signal, name))
        return original(query, key)

    arguments = ("calibrate", tiny_folder, "--data", text, "--tokens", 256, "--context", 64, "-o", out)
    monkeypatch.setattr(statistics.LayerStatistics, "of", signalled)
    before = signal.getsignal(getattr(signal, name))
    code, _, err = aqua(*arguments)
    assert code == 128 + getattr(signal, name)
    by = "" if name == "SIGINT" else f" by {name}"
    assert err.splitlines()[-1] == (
        f"stopped{by}: {out}.partial keeps what is done, the same command with --resume goes on"
    )
    assert signal.getsignal(getattr(signal, name)) == before
    assert aqua(*arguments, "--resume")[0] == 0


def test_a_command_that_keeps_nothing_says_that_it_was_stopped(aqua, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "aqua_attention.cli.main.load_projections", lambda path: os.kill(os.getpid(), signal.SIGTERM) or path
    )
    assert aqua("inspect", tmp_path / "p") == (143, "", "stopped by SIGTERM\n")


def test_a_signal_that_is_ignored_stays_so():
    """As nohup asks for."""
    code = "import signal, os; from aqua_attention.cli.terminal import ended_by_signals as ended\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith ended(): os.kill(os.getpid(), signal.SIGHUP); print(1)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_without_a_terminal_a_step_is_a_line_when_it_begins_goes_on_and_ends(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bars() as report:
        for name, total in (("load", 1), ("calibrate", 100)):
            for done in range(total + 1):
                report(name, done, total)
                now[0] += 1.0
            assert capsys.readouterr().err, "it is said at once, not at the end"
            report(name, total, total)
    with progress.progress_bars() as report:
        for done in range(101):
            report("evaluate", done, 100)
            now[0] += 1.0
        report("evaluate", 100, 100)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 0 of 100",
        "evaluate: 30 of 100, 30 s, about 70 s left",
        "evaluate: 60 of 100, 60 s, about 40 s left",
        "evaluate: 90 of 100, 90 s, about 10 s left",
        "evaluate: 100 of 100, 100 s",
    ]


def test_lines_of_progress_come_from_every_command(aqua, tmp_path, tiny_folder, words):
    text = tmp_path / "words.txt"
    text.write_text(words)
    calibrate = ("calibrate", tiny_folder, "--data", text, "--tokens", 256, "--context", 64, "-o", tmp_path / "p")
    code, _, err = aqua(*calibrate)
    assert (code, "calibrate: 0 of 4" in err, "calibrate: 4 of 4" in err) == (0, True, True), err
    evaluate = ("eval", "perplexity", tiny_folder, "-p", tmp_path / "p", "--data", text, "--context", 64)
    code, _, err = aqua(*evaluate, "--tokens", 128)
    assert (code, "evaluate: " in err) == (0, True), err
