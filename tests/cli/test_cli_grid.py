# SPDX-License-Identifier: Apache-2.0
"""`aqua eval grid`, `transfer` and `context` as a user types them, stopped and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from aqua_attention import AquaConfig, AquaError
from aqua_attention.cli.options import ModelOptions
from aqua_attention.evaluate.suites import perplexity as suites


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with two texts of sentences, of different words."""
    folder = tmp_path_factory.mktemp("texts")
    for name, low in (("one", 0), ("two", 50)):
        found = torch.randint(low, low + 44, (1200,), generator=torch.Generator().manual_seed(low)).tolist()
        lines = [" ".join(f"w{n}" for n in found[start : start + 8]) for start in range(0, len(found), 8)]
        (folder / f"{name}.txt").write_text(".\n".join(lines))
    return folder


@pytest.fixture
def grid(tiny_folder, projections_file, texts, tmp_path):
    """Arguments of a grid of eight settings in windows of 64 tokens, without its suites."""
    given = ("eval", "grid", tmp_path / "results", tiny_folder, "-p", projections_file, "--data", texts / "one.txt")
    knobs = ("--preset", "paper", "--k-ratio", 1, "--k-ratio", 0.5)
    knobs += ("--s-ratio", 0, "--s-ratio", 0.25, "--bits", "none", "--bits", 8)
    return (*given, *knobs, "--context", 64, "--tokens", 128)


def records_in(folder):
    return sorted((folder / "records").glob("*.json"))


def test_a_grid_is_every_combination_once_and_its_second_run_measures_nothing(aqua, grid, tmp_path):
    code, out, err = aqua(*grid, "--suite", "perplexity", "--suite", "retention", "--json", tmp_path / "all.json")
    assert code == 0, err
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    assert [record["suite"] for record in records] == ["perplexity"] * 9 + ["retention"] * 2
    knobs = [tuple(r["config"][name] for name in ("k_ratio", "s_ratio", "bits")) for r in records[1:9]]
    assert len(set(knobs)) == 8
    assert all("result" in record for record in records)
    assert records[1]["command"].startswith("aqua eval grid ")
    assert "k_ratio 0.5, s_ratio 0.25, int8" in out
    assert f"11 records in {tmp_path / 'results' / 'records'}" in out
    written = {path: path.read_bytes() for path in records_in(tmp_path / "results")}
    assert sorted(map(json.loads, written.values()), key=str) == sorted(records, key=str)
    code, again, err = aqua(*grid, "--suite", "perplexity", "--suite", "retention")
    assert (code, "11 of 11 measurements are in" in err) == (0, True)
    assert again == out
    assert {path: path.read_bytes() for path in records_in(tmp_path / "results")} == written


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_a_damaged_record_is_redone(aqua, grid, tmp_path):
    command = [sys.executable, "-m", "aqua_attention.cli.main", *map(str, grid)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(found := records_in(tmp_path / "results")) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = records_in(tmp_path / "results")
    assert 2 <= len(found) < 9
    kept = {path: path.read_bytes() for path in found[1:]}
    found[0].write_text('{"schema": 1')
    code, _, err = aqua(*grid)
    assert code == 0
    assert f"{found[0]} is no whole record" in err.replace("\n", "")
    assert len(records_in(tmp_path / "results")) == 9
    assert {path: path.read_bytes() for path in kept} == kept
    assert "result" in json.loads(found[0].read_text())
    assert not list((tmp_path / "results" / "records").glob(".*.tmp"))


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(aqua, grid, tmp_path, monkeypatch):
    calls, original = [], suites.evaluate_perplexity

    def interrupted(*args, **options):
        calls.append(0)
        if len(calls) in (1, 5):
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(suites, "evaluate_perplexity", interrupted)
    code, _, err = aqua(*grid)
    assert (code, err.splitlines()[-1]) == (130, "stopped: nothing was kept yet")
    code, _, err = aqua(*grid)
    assert (code, "Traceback" in err) == (130, False)
    assert f"stopped: {tmp_path / 'results'} keeps what is done, the same command goes on" in err.replace("\n", "")
    assert len(records_in(tmp_path / "results")) == 3
    code, _, err = aqua(*grid)
    assert code == 0
    assert "3 of 9 measurements are in" in err
    assert len(calls) == 1 + 4 + 6


def test_a_setting_out_of_memory_or_impossible_does_not_end_the_grid(aqua, grid, tmp_path, monkeypatch):
    original = suites.evaluate_perplexity

    def failing(subject, settings, *args, **options):
        if settings and settings[0].config.bits == 8 and settings[0].config.k_ratio == 1:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return original(subject, settings, *args, **options)

    monkeypatch.setattr(suites, "evaluate_perplexity", failing)
    code, out, err = aqua(*grid, "--s-ratio", 0.99, "--json", tmp_path / "all.json")
    assert code == 0, err
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    kinds = [record["error"]["kind"] if "error" in record else "" for record in records]
    assert kinds.count("out_of_memory") == 3
    assert kinds.count("error") == 3, "of the four with s_ratio 0.99, one ran out of memory first"
    assert out.count("out of memory") == 3
    assert "13 records, 6 of them without figures" in out
    monkeypatch.setattr(suites, "evaluate_perplexity", original)
    aqua(*grid, "--s-ratio", 0.99, "--json", tmp_path / "all.json")
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    assert sum("error" in record for record in records) == 4


def test_needle_and_lines_with_and_without_eviction(aqua, tiny_folder, projections_file, texts, tmp_path):
    code, out, err = aqua(
        *("eval", "grid", tmp_path / "results", tiny_folder, "-p", projections_file, "--data", texts / "one.txt"),
        *("--suite", "needle", "--suite", "lines", "--k-ratio", 1, "--h2o-ratio", 1, "--h2o-ratio", 0.5),
        *("--length", 120, "--depth", 0.5, "--lines", 2, "--count", 1, "--json", tmp_path / "all.json"),
    )
    assert code == 0, err
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    assert [record["suite"] for record in records] == ["needle"] * 3 + ["lines"] * 3
    assert records[1]["result"]["same_answer"] == 1
    assert records[1]["options"]["lengths"] == [120]
    assert "k_ratio 1, h2o_ratio 0.5" in out


def test_given_lines_and_several_needles(aqua, tiny_folder, projections_file, texts, tmp_path):
    given = tmp_path / "given.jsonl"
    row = {"prompt": "line a-b: REGISTER_CONTENT is <5>", "random_idx": ["a-b", 0], "expected_number": 5}
    given.write_text(f"{json.dumps(row)}\n" * 3)
    arguments = ("eval", "grid", tmp_path / "results", tiny_folder, "-p", projections_file, "--data", texts / "one.txt")
    arguments += ("--suite", "lines", "--suite", "needle", "--k-ratio", 0.5, "--lines-file", given)
    arguments += ("--length", 180, "--depth", 0, "--needles", 2, "--count", 2, "--json", tmp_path / "all.json")
    code, _, err = aqua(*arguments)
    assert code == 0, err
    lines, needle = [json.loads((tmp_path / "all.json").read_text())["records"][place] for place in (1, 3)]
    assert lines["options"] == {"data": str(given), "count": 2, "chat": True}
    assert lines["result"]["cells"][0]["asked"] == 2
    assert lines["text_sha256"] is not None
    assert needle["options"]["needles"] == 2
    code, _, err = aqua(*arguments, "--lines", 3)
    assert (code, "give one of the two" in err) == (2, True)


def test_transfer_prints_a_matrix_and_keeps_projections(aqua, tiny_folder, texts, tmp_path):
    arguments = ("eval", "transfer", tmp_path / "results", tiny_folder)
    arguments += ("--domain", f"one={texts / 'one.txt'}", "--domain", f"two={texts / 'two.txt'}")
    arguments += ("--context", 64, "--calibration-tokens", 256, "--tokens", 128)
    code, out, err = aqua(*arguments, "--preset", "paper", "--k-ratio", 0.5, "--json", tmp_path / "all.json")
    assert code == 0, err
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    assert [(r["result"]["calibrated"], r["result"]["tested"]) for r in records] == [
        ("one", "one"),
        ("two", "one"),
        ("one", "two"),
        ("two", "two"),
    ]
    assert "tested on two" in out
    assert f"{records[1]['result']['perplexity_change']:+.2%}" in out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "projections").iterdir()}
    assert len(made) == 2
    code, _, err = aqua(*arguments, "--preset", "paper", "--k-ratio", 0.5, "--k-ratio", 0.25)
    assert (code, "4 of 8 measurements are in" in err) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_context_crosses_lengths_and_numbers_of_tokens(aqua, tiny_folder, texts, tmp_path):
    arguments = ("eval", "context", tmp_path / "results", tiny_folder, "--data", texts / "one.txt", "--tokens", 128)
    arguments += ("--calibration-data", texts / "two.txt", "--preset", "paper", "--k-ratio", 0.5)
    arguments += ("--json", tmp_path / "all.json")
    code, out, err = aqua(
        *(*arguments, "--calibrated-length", 32, "--calibrated-length", 64, "--tested-length", 64),
        *("--calibration-tokens", 64, "--calibration-tokens", 512),
    )
    assert code == 0, err
    results = [record["result"] for record in json.loads((tmp_path / "all.json").read_text())["records"]]
    pairs = [(result["calibrated_length"], result["calibration_tokens"]) for result in results]
    assert pairs == [(32, 64), (32, 512), (64, 64), (64, 512)]
    assert {result["tested_length"] for result in results} == {64}
    assert "512 tokens in windows of 32" in out
    assert all(f"{result['perplexity_change']:+.2%}" in out for result in results)


def test_quick_is_short_but_for_what_is_given(aqua, tiny_folder, texts, tmp_path, monkeypatch):
    two = [f"--domain={name}={texts / name}.txt" for name in ("one", "two")]
    data = ("--data", texts / "one.txt", "--calibration-data", texts / "two.txt")
    taken = {}

    def jobs(kind):
        def note(*_, **sizes):
            taken[kind] = sizes
            raise AquaError("enough")

        return note

    monkeypatch.setattr("aqua_attention.evaluate.suites.transfer.transfer_jobs", jobs("transfer"))
    monkeypatch.setattr("aqua_attention.evaluate.suites.transfer.context_jobs", jobs("context"))
    for given, calibration, context in ((["--quick"], 2048, 512), ([], 16384, 2048)):
        aqua("eval", "transfer", tmp_path / "results", tiny_folder, *two, *given, "--tokens", 77)
        sizes = {"calibration_tokens": calibration, "tokens": 77, "context": context, "seed": 0}
        assert taken.pop("transfer") == sizes
        aqua("eval", "context", tmp_path / "results", tiny_folder, *data, *given, "--tested-length", 99)
        sizes = taken.pop("context")
        assert sizes["calibrated_lengths"] == ([256, 512] if given else [512, 2048])
        assert (sizes["tested_lengths"], sizes["calibration_tokens"]) == ([99], [calibration])
        assert sizes["tokens"] == (1024 if given else 8192)


MISTAKES = {
    "min_length": (["--min-length", "few"], "min_length is 'few': it must be a whole number of tokens"),
    "short": (["--tokens", "1"], "tokens is 1: it must be at least 2"),
    "suite": (["--suite", "speed"], "suite is 'speed': it must be one of perplexity, retention, needle, lines"),
    "bits": (["--bits", "3"], "bits is '3': it must be one of none, 8, 4"),
    "k_ratio": (["--k-ratio", "2"], "k_ratio is 2.0: it must be a number"),
    "basis": (["--basis", "pca"], "basis is 'pca': it must be one of"),
    "context": (["--context", "512"], "the model knows 256 positions"),
    "json": (["--json", "/no/such/folder/all.json"], "cannot write /no/such/folder/all.json"),
    "length": (["--suite", "needle", "--length", "9"], "length is 9"),
    "many lines": (["--suite", "lines", "--lines", "40", "--count", "1"], "the model knows 256 positions"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_a_mistake_is_one_line_before_anything_is_measured(case, aqua, grid, tmp_path):
    arguments, message = MISTAKES[case]
    code, _, err = aqua(*grid, *arguments)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err
    assert not (tmp_path / "results").exists()


def test_mistakes_are_known_before_the_model_is_loaded(
    aqua, tiny_folder, projections_file, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(ModelOptions, "load", lambda *_: pytest.fail("the model was loaded"))
    folder, one, blocked = tmp_path / "results", texts / "one.txt", tmp_path / "file"
    blocked.write_text("")
    grid = ("grid", folder, tiny_folder, "-p", projections_file, "--data", one)
    two = ("--domain", f"a={one}", "--domain", f"b={texts / 'two.txt'}")
    transfer = ("transfer", folder, tiny_folder)
    context = ("context", folder, tiny_folder, "--data", one, "--calibration-data", texts / "two.txt")
    for arguments, message in [
        ((*grid, "--suite", "speed"), "suite is 'speed'"),
        ((*grid, "--suite", "retention", "--logit-error", 0.1), "suite retention measures k_ratios only"),
        ((*grid, "--tokens", 1), "tokens is 1: it must be at least 2 tokens"),
        ((*grid, "--json", folder), "it is the results folder; give a file, such as"),
        (("grid", blocked, *grid[2:]), "cannot make the folder"),
        (("transfer", blocked, tiny_folder, *two), "cannot make the folder"),
        ((*transfer, *two[:2]), "give at least two"),
        ((*transfer, *two[:2], "--domain", f"a={texts / 'two.txt'}"), "each with a name of its own"),
        ((*transfer, *two, "--domain", f"c={one}"), "are the same text"),
        ((*transfer, *two, "--context", 1), "context is 1"),
        ((*transfer, *two, "--basis", "pca"), "basis is 'pca'"),
        ((*transfer, *two, "--json", tmp_path / "none" / "all.json"), "cannot write"),
        ((*context, "--tested-length", 1), "tested length is 1"),
        ((*context, "--calibration-tokens", 0), "calibration tokens is 0"),
        ((*context, "--min-length", "few"), "min_length is 'few'"),
    ]:
        code, _, err = aqua("eval", *arguments)
        assert (code, message in err.replace("\n", " "), "Traceback" in err) == (2, True, False), (arguments, err)
        assert not folder.exists()


def test_json_may_lie_in_a_folder_that_the_run_makes(aqua, grid, tmp_path):
    for written in (tmp_path / "results" / "all.json", tmp_path / "results" / "deep" / "all.json"):
        code, _, err = aqua(*grid, "--json", written)
        assert code == 0, err
        assert len(json.loads(written.read_text())["records"]) == 9


def test_min_length_of_grid_transfer_and_context(aqua, tiny_folder, projections_file, texts, tmp_path):
    written, one, two = tmp_path / "all.json", texts / "one.txt", texts / "two.txt"
    sizes = ("--preset", "paper", "--k-ratio", 0.25, "--tokens", 128, "--json", written)
    grid = ("grid", tmp_path / "g", tiny_folder, "-p", projections_file, "--data", one, "--context", 64, *sizes)
    code, _, err = aqua("eval", *grid, "--min-length", 0, "--min-length", 48)
    assert code == 0, err
    records = json.loads(written.read_text())["records"][1:]
    assert [record["config"]["min_length"] for record in records] == [0, 48]
    assert records[1]["result"]["kl"] < records[0]["result"]["kl"]
    domains = ("--domain", f"a={one}", "--domain", f"b={two}", "--context", 64, "--calibration-tokens", 256)
    lengths = ("--calibrated-length", 64, "--tested-length", 64, "--calibration-tokens", 256)
    for command in (
        ("transfer", tmp_path / "t", tiny_folder, *domains, *sizes),
        ("context", tmp_path / "c", tiny_folder, "--data", one, "--calibration-data", two, *lengths, *sizes),
    ):
        found = {}
        for length in (0, 48):
            code, _, err = aqua("eval", *command, "--min-length", length)
            assert code == 0, err
            found[length] = json.loads(written.read_text())["records"]
        assert {record["config"]["min_length"] for record in found[48]} == {48}
        for short, whole in zip(found[48], found[0], strict=True):
            assert short["result"]["kl"] < whole["result"]["kl"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--preset", "fast"), [AquaConfig(k_ratio=0.5)]),
        (("--preset", "fast", "--logit-error", 0.1), [AquaConfig(logit_error=0.1)]),
        (("--preset", "paper", "--sink", 0, "--sink", 4), [AquaConfig.paper(), AquaConfig.paper(sink=4)]),
        ((), [AquaConfig()]),
    ],
)
def test_a_grid_measures_the_preset_but_for_what_is_given(
    aqua, tiny_folder, projections_file, texts, tmp_path, options, expected
):
    arguments = ("eval", "grid", tmp_path / "grid", tiny_folder, "-p", projections_file, "--data", texts / "one.txt")
    code, _, err = aqua(*arguments, "--context", 64, "--tokens", 64, *options, "--json", tmp_path / "all.json")
    assert code == 0, err
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    assert [record["config"] for record in records] == [None, *(config.to_dict() for config in expected)]


def test_reasons_are_printed_once_and_nothing_measured_is_exit_code_1(aqua, tiny_folder, texts, tmp_path):
    arguments = ("eval", "context", tmp_path / "results", tiny_folder, "--data", texts / "one.txt", "--tokens", 128)
    arguments += ("--calibration-data", texts / "two.txt", "--calibrated-length", 64, "--tested-length", 64)
    code, out, err = aqua(*arguments, "--calibration-tokens", 32, "--k-ratio", 0.5, "--k-ratio", 0.25)
    assert code == 1, err
    assert out.count("fewer than one window of 64") == 1
    assert "(2 records)" in out
    assert "2 records, 2 of them without figures" in out
    code, out, _ = aqua(*arguments, "--calibration-tokens", 32, "--calibration-tokens", 128, "--k-ratio", 0.5)
    assert (code, out.count("fewer than one window of 64")) == (0, 1)


def test_mistakes_of_transfer_and_context(aqua, tiny_folder, texts, tmp_path):
    folder, text = tmp_path / "results", texts / "one.txt"
    blocked = tmp_path / "file"
    blocked.write_text("")
    for arguments, message in [
        (["transfer", folder, tiny_folder, "--domain", text], "write NAME=TEXT, such as prose=novel.txt"),
        (["transfer", folder, tiny_folder, "--domain", f"a={text}"], "give at least two"),
        (["transfer", folder, tiny_folder, "--domain", f"a={text}", "--domain", "b=none.txt"], "no file or folder"),
        (["context", folder, tiny_folder, "--data", text, "--calibration-data", text], "two different texts"),
        (
            ["grid", folder, tiny_folder, "-p", tmp_path / "none.safetensors", "--data", text],
            "no such projections file",
        ),
        (
            [
                *("transfer", blocked, tiny_folder, "--domain", f"a={text}", "--domain", f"b={texts / 'two.txt'}"),
                *("--context", 64, "--calibration-tokens", 64),
            ],
            "cannot make the folder",
        ),
    ]:
        code, _, err = aqua("eval", *arguments)
        assert (code, message in err.replace("\n", " "), "Traceback" in err) == (2, True, False), err
        assert not folder.exists()


def test_answers_that_a_stopped_run_leaves_are_said(aqua, grid, tmp_path, monkeypatch):
    def stopped(folder, *_, **__):
        (folder / "records").mkdir(parents=True)
        (folder / "records" / "lines-0.state").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("aqua_attention.evaluate.run.run_jobs", stopped)
    code, _, err = aqua(*grid)
    assert (code, err.splitlines()[-1]) == (
        130,
        f"stopped: {tmp_path / 'results'} keeps what is done, the same command goes on",
    )
