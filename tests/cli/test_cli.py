# SPDX-License-Identifier: Apache-2.0
"""The command `aqua` as a user types it: figures when it works, one line and exit code 2 when the user is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aqua_attention.calibration.projections import Projections
from aqua_attention.cli import main as cli
from aqua_attention.report.recognise import records_of
from conftest import make_llama
from pages import prose


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words)
    return path


@pytest.fixture(scope="session")
def projections_file(tmp_path_factory, tiny_folder, text_file):
    """Made by the command itself, in a process of its own."""
    path = tmp_path_factory.mktemp("projections") / "tiny.safetensors"
    command = [sys.executable, "-m", "aqua_attention.cli.main", "calibrate", tiny_folder, "--data", text_file]
    command += ["--tokens", "512", "--context", "64", "-o", path, "--json", path.with_suffix(".json")]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}" in done.stdout
    return path


def test_calibrate_writes_projections_and_figures(projections_file, tiny_folder):
    projections = Projections.load(projections_file)
    assert sorted(projections.layers) == [0, 1, 2]
    assert projections.model["name"] == str(tiny_folder)
    figures = json.loads(projections_file.with_suffix(".json").read_text())
    assert figures["calibration"]["tokens"] == 512
    assert len(figures["layers"]) == 3


def test_inspect_shows_spectrum_and_provenance(aqua, projections_file, tmp_path):
    code, out, _ = aqua("inspect", projections_file, "--json", tmp_path / "figures.json")
    assert code == 0
    assert "512 tokens in windows of 64" in out
    assert "llama, 3 layers, 4 query and 2 key-value heads of 16" in out
    rows = json.loads((tmp_path / "figures.json").read_text())["layers"]
    assert len(rows) == 3
    for row in rows:
        assert all(0 < few <= many <= 16 for few, many in zip(row["dims_90"], row["dims_99"], strict=True))


def test_merge_is_one_run_over_both_texts(aqua, projections_file, tmp_path):
    both = tmp_path / "both.safetensors"
    code, out, err = aqua("merge", projections_file, projections_file, "-o", both, "--json", tmp_path / "figures.json")
    assert code == 0, err
    assert "1024 tokens in windows of 64" in out
    one, two = Projections.load(projections_file), Projections.load(both)
    assert two.calibration["merged"] == [one.calibration, one.calibration]
    for index, layer in one.statistics.items():
        assert torch.equal(two.statistics[index].key_gram, 2 * layer.key_gram)
        assert two.statistics[index].key_count == 1024
        assert torch.allclose(two.layers[index].key_rms, one.layers[index].key_rms)


def test_eval_perplexity_prints_and_writes_a_row_a_setting(aqua, projections_file, tiny_folder, text_file, tmp_path):
    code, out, err = aqua(
        *("eval", "perplexity", tiny_folder, "-p", projections_file, "--data", text_file),
        *("--preset", "paper", "--k-ratio", 1, "--k-ratio", 0.25),
        *("--context", 64, "--tokens", 128, "--json", tmp_path / "rows.json"),
    )
    assert code == 0, err
    assert "k_ratio 0.25" in out
    result = json.loads((tmp_path / "rows.json").read_text())
    first, second = result["rows"]
    expected = {"setting", "perplexity", "perplexity_change", "kl", "top1", "mean_k", "tokens"}
    assert expected <= set(first)
    assert result["dtype"] == "float32"
    assert first["setting"]["k_ratio"] == 1
    assert abs(first["perplexity_change"]) < 1e-4
    assert second["kl"] > 0.01
    assert second["mean_k"] == 0.25
    assert second["tokens"] == 126


def test_eval_with_an_allowed_error_and_another_basis(aqua, projections_file, tiny_folder, text_file, tmp_path):
    code, out, err = aqua(
        *("eval", "perplexity", tiny_folder, "-p", projections_file, "--data", text_file, "--context", 64),
        *("--preset", "paper", "--logit-error", 1.0, "--basis", "key-pca"),
        *("--tokens", 64, "--json", tmp_path / "rows.json"),
    )
    assert code == 0, err
    assert "logit_error 1, basis key-pca" in out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["setting"]["logit_error"] == 1.0
    assert row["basis"] == "key-pca"
    assert 0 < min(row["mean_k_per_layer"]) <= row["mean_k"] <= max(row["mean_k_per_layer"]) < 1


def test_bits_are_a_setting_and_memory_is_measured(aqua, projections_file, tiny_folder, text_file, tmp_path):
    given = (tiny_folder, "-p", projections_file, "--json", tmp_path / "out.json")
    windows = ("--data", text_file, "--context", 250, "--tokens", 250)
    code, out, err = aqua("eval", "perplexity", *given, *windows, "--k-ratio", 1, "--bits", 8)
    assert code == 0, err
    assert "k_ratio 1, int8" in out
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert 0 < row["kl"] < 0.05
    narrow = ("--s-ratio", 0.5, "--sink", 0, "--recent", 0)
    code, out, err = aqua(
        *("bench", "memory", *given, "--length", 200, *narrow, "--h2o-ratio", 1, "--h2o-ratio", 0.5),
        *("--dtype", "float32"),
    )
    assert code == 0, err
    rows = [row for row in json.loads((tmp_path / "out.json").read_text())["rows"] if "absent" not in row]
    ours = [row for row in rows if isinstance(row["setting"], dict)]
    assert [row["setting"]["bits"] for row in ours] == [None, None, 8, 8, 4, 4]
    assert [row["setting"]["effective_ratio"] for row in ours] == pytest.approx([0.45] * 6)
    assert rows[0]["setting"] == "DynamicCache"
    assert 0.75 <= ours[0]["ratio"] <= 0.78
    assert 0.37 <= ours[1]["ratio"] <= 0.46, "half of that, sixteen tokens until the next eviction, and the mass"
    assert "AQUA, k_ratio 0.9, s_ratio 0.5, int8" in out
    assert "h2o_ratio 0.5" in out and "where tokens are chosen" not in out
    one = ("--s-ratio", 0, "--h2o-ratio", 1, "--select-p", 0.9, "--select-tokens", 30)
    code, out, err = aqua("bench", "memory", *given, "--length", 200, *one, "--dtype", "float32")
    assert code == 0, err
    rows = [row for row in json.loads((tmp_path / "out.json").read_text())["rows"] if "copy_bytes" in row]
    settings = [row["setting"] for row in rows]
    assert [(each["bits"], each["select_p"], each["select_tokens"]) for each in settings] == [
        *((None, 0.9, None), (None, None, 30), (8, 0.9, None), (8, None, 30))
    ]
    assert all((each["k_ratio"], each["score_bits"]) == (0.25, 8) for each in settings)
    assert "where tokens are chosen" in out and "by widths" in " ".join(out.split())
    code, _, err = aqua("eval", "perplexity", *given[:3], "--bits", 3)
    assert (code, "bits is 3: it must be one of None, 8, 4" in err) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is not")
def test_bench_decode_needs_a_gpu_and_a_size(aqua):
    pytest.importorskip("triton")
    for arguments, words in (
        ([], "measures kernels on a CUDA GPU, and there is none: try "),
        (["--size", "8"], "size is '8': it must be sequences x tokens, such as 8x32768"),
        (["--dtype", "int8"], "dtype is 'int8': it must be bfloat16 or float16"),
    ):
        code, _, err = aqua("bench", "decode", *arguments)
        assert (code, words in err.replace("\n", " ")) == (2, True)


def test_bench_breakeven_measures_a_processor_and_min_length_auto_reads_it(
    aqua, projections_file, tiny_folder, text_file, tmp_path, monkeypatch
):
    from aqua_attention.bench import decode_cpu
    from aqua_attention.ops.backends.cpu.build import no_kernel_reason

    if reason := no_kernel_reason():
        pytest.skip(reason)
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(decode_cpu, "MOST_SECONDS", 0.01)
    shape = ("--device", "cpu", "--heads", 4, "--groups", 2, "--head-dim", 16)
    evaluate = ("eval", "perplexity", tiny_folder, "-p", projections_file, "--data", text_file, "--context", 64)
    evaluate += ("--preset", "paper", "--tokens", 64, "--k-ratio", 0.25, "--min-length", "auto", "--device", "cpu")
    code, _, err = aqua(*evaluate)
    assert (code, "aqua bench breakeven --device cpu --heads 4 --groups 2 --head-dim 16" in err.replace("\n", " ")) == (
        2,
        True,
    )
    choices = ("--select-p", 0.95, "--select-share", 0.25, "--read-share", 0.3)
    code, out, err = aqua("bench", "breakeven", *shape, *choices, "--lengths", "64..256", "--json", tmp_path / "b.json")
    assert code == 0, err
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["length"] for row in result["rows"]] == [64, 128, 256]
    assert [row["k_ratio"] for row in result["breakeven"]] == [0.75, 0.5]
    assert [(row["k_ratio"], row["select_p"]) for row in result["selects"]] == [(0.5, 0.95), (0.5, None)]
    assert "tokens chosen by" in out and "select_share 0.25" in " ".join(out.split())
    assert "the paper's" in out and f"wrote {result['profile']}" in out.replace("\n", "")
    # What such short sequences take is chance: each way to read the profile is tried on what it might have said.
    profile = json.loads(Path(result["profile"]).read_text())
    for length, expected in ((30, (0, True)), (None, (2, False))):
        rows = [{"k_ratio": 0.5, "min_length": length}]
        Path(result["profile"]).write_text(json.dumps(profile | {"thresholds": rows}))
        code, out, err = aqua(*evaluate)
        assert (code, "min_length 30" in out) == expected, err
        assert length or "was not faster up to 256 tokens" in err.replace("\n", " ")
    code, out, err = aqua(*evaluate[:-3], 9, "--device", "cpu")
    assert code == 0, err
    assert "min_length 9" in out
    for arguments, words in (
        (["--device", "tpux"], "device is 'tpux': it must be cpu, cuda or cuda:NUMBER"),
        (["--device", "cpu", "--dtype", "float16"], "dtype 'float16': it must be cpu with float32 or bfloat16"),
        (["--lengths", "64"], "it must be FIRST..LAST"),
        (["--k-ratio", "1"], "each must leave out some dimensions"),
        (["--select-share", "2"], "select_share is 2: it must be a number with 0 < share <= 1"),
        (["--select-p", "0.9", "--read-share", "1"], "--read-share 1: both must be above 0 and below 1"),
    ):
        code, _, err = aqua("bench", "breakeven", "--device", "cpu", *arguments)
        assert (code, words in err.replace("\n", " ")) == (2, True), err


def test_eval_retention_prints_and_writes_every_selection(aqua, projections_file, tiny_folder, text_file, tmp_path):
    code, out, err = aqua(
        *("eval", "retention", tiny_folder, "-p", projections_file, "--data", text_file, "--context", 64),
        *("--tokens", 64, "--k-ratio", 0.5, "--json", tmp_path / "rows.json"),
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["selection"] for row in rows] == ["static", "magnitude", "weighted"]
    assert all(len(row["per_layer"]) == 3 and len(row["per_layer"][0]["score_loss"]) == 4 for row in rows)
    assert f"{rows[0]['score_loss']:.2%}" in out


def test_eval_retention_says_its_basis_and_dtype(aqua, projections_file, tiny_folder, text_file, tmp_path):
    """So that the report does not take two bases for one."""
    given = ("eval", "retention", tiny_folder, "-p", projections_file, "--data", text_file, "--context", 64)
    for basis in ("aqua", "none"):
        written = tmp_path / f"{basis}.json"
        code, _, err = aqua(*given, "--tokens", 64, "--k-ratio", 0.5, "--basis", basis, "--json", written)
        assert code == 0, err
        result = json.loads(written.read_text())
        assert (result["basis"], result["dtype"]) == (basis, "float32")
        assert {record.basis for record in records_of(result, written.name)} == {basis}


def test_eval_lines_asks_generated_and_given_questions(aqua, projections_file, tiny_folder, tmp_path):
    arguments = ("eval", "lines", tiny_folder, "-p", projections_file, "--k-ratio", 1, "--json", tmp_path / "out.json")
    code, out, err = aqua(*arguments, "--lines", 3, "--lines", 5, "--count", 2)
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [q["lines"] for q in result["questions"]] == [3, 3, 5, 5]
    assert result["dtype"] == "float32"
    assert result["rows"][0]["same_answer"] == 1
    assert "p (paired)" in out
    given = tmp_path / "given.jsonl"
    record = "line a-b: REGISTER_CONTENT is <5>"
    given.write_text(json.dumps({"prompt": record, "random_idx": ["a-b", 0], "expected_number": 5}))
    code, out, err = aqua(*arguments, "--data", given)
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(q["lines"], q["expected"]) for q in result["questions"]] == [(1, ["5"])]
    code, _, err = aqua(*arguments, "--data", given, "--lines", 3)
    assert (code, "give one of the two" in err) == (2, True)
    assert aqua(*arguments, "--lines", 3, "--lines", 3, "--count", 2)[0] == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["questions"]) == 2
    assert result["data"] == str(given)


def test_eval_needle_asks_in_a_grid(aqua, projections_file, tiny_folder, tmp_path):
    essay = tmp_path / "essay.txt"
    essay.write_text(" ".join(f"w{i % 7} w{i % 11} w{i % 13}." for i in range(200)))
    code, out, err = aqua(
        *("eval", "needle", tiny_folder, "-p", projections_file, "--data", essay, "--length", 100, "--length", 200),
        *("--depth", 0, "--depth", 1, "--k-ratio", 1, "--k-ratio", 0.5, "--json", tmp_path / "out.json"),
    )
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(q["length"], q["depth"]) for q in result["questions"]] == [(100, 0), (100, 1), (200, 0), (200, 1)]
    assert result["rows"][0]["same_answer"] == 1
    assert "k_ratio 0.5" in out
    code, _, err = aqua("eval", "needle", tiny_folder, "-p", projections_file, "--data", essay, "--length", 9)
    assert code == 2
    assert "length is 9" in err


def test_generate_compares_dense_and_aqua(aqua, projections_file, tiny_folder, tmp_path):
    arguments = ("generate", tiny_folder, "-p", projections_file, "--prompt", "w1 w2 w3 w4", "--max-new-tokens", 8)
    code, out, err = aqua(*arguments, "--k-ratio", 1, "--compare", "--json", tmp_path / "out.json")
    assert code == 0
    steps = [line.split(":")[0] for line in err.splitlines() if ": 0 of 1" in line]
    assert steps == ["load", "dense", "AQUA"], "it may take minutes, so that each is said when it begins"
    assert [line.split(":")[0] for line in err.splitlines() if ": 1 of 1" in line] == steps
    assert out.startswith("--- dense\n")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dense"] == result["aqua"]
    assert len(result["aqua"].split()) == 8
    assert out.count(result["aqua"]) == 2


def test_generate_takes_the_fast_path_and_explains_it(aqua, projections_file, tiny_folder, tmp_path, monkeypatch):
    from aqua_attention.ops.backends.cpu.build import no_kernel_reason

    if reason := no_kernel_reason():
        pytest.skip(reason)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ("generate", tiny_folder, "-p", projections_file, "--prompt", "w1 w2 w3 w4", "--max-new-tokens", 8)
    arguments += ("--device", "cpu", "--k-ratio", 0.5, "--share", "group", "--sink", 0, "--recent", 0)
    code, out, _ = aqua(*arguments, "--explain", "--json", tmp_path / "out.json")
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    explained = result["explain"]
    assert (explained["length"], explained["last"]["layout"], explained["last"]["steps"]) == (4, "tiled", 7)
    assert (explained["decoding"]["backends"], explained["reason"]) == ({"cpu": 3}, None)
    answer, lines = out.split("\n\n")
    assert answer == result["aqua"]
    assert lines.startswith("prompt of 4 tokens: fused\ndecoding after 4 tokens: cpu, tiled cache")
    assert lines.endswith("last call: tiled cache, 7 steps\n")
    assert aqua(*arguments)[1] == f"{answer}\n", "it explains itself to those who ask"
    code, out, _ = aqua(*arguments, "--layout", "plain", "--no-record", "--no-compile", "--explain")
    assert (code, out.startswith(answer)) == (0, True)
    assert "  not faster, because layout is 'plain': leave layout out\n" in out
    assert "last call: growing cache, 7 steps" in out
    code, _, err = aqua(*arguments, "--share", "head", "--layout", "tiled")
    assert (code, "layout='tiled' is impossible here, because share is 'head'" in err) == (2, True)


MODEL_ERRORS = {
    "k_ratio 0": (["--k-ratio", "0"], r"k_ratio is 0.0: it must be a number with 0 < k_ratio <= 1"),
    "k_ratio 1.5": (["--k-ratio", "1.5"], r"k_ratio is 1.5"),
    "k_ratio nan": (["--k-ratio", "nan"], r"k_ratio is nan"),
    "s_ratio 1": (["--s-ratio", "1"], r"s_ratio is 1.0: it must be a number with 0 <= s_ratio < 1"),
    "selection": (["--selection", "best"], r"selection is 'best': it must be one of magnitude, weighted, static"),
    "share": (["--share", "all"], r"share is 'all': it must be one of head, group"),
    "sink": (["--sink", "-1"], r"sink is -1"),
    "basis": (["--basis", "pca"], r"basis is 'pca': it must be one of aqua, svd, none"),
    "data": (["--data", "nowhere.txt"], r"nowhere.txt"),
    "context": (["--context", "1"], r"context is 1: it must be at least 2"),
    "long context": (["--context", "512"], r"context is 512: the model knows 256 positions"),
    "tokens": (["--tokens", "0"], r"tokens is 0: it must be at least 1"),
    "dtype": (["--dtype", "int4"], r"dtype 'int4' is not one of auto, float32, bfloat16, float16"),
    "device": (["--device", "abacus"], r"device 'abacus' is not available"),
    "json": (["--json", "/no/such/folder/rows.json"], r"cannot write /no/such/folder/rows.json"),
}


@pytest.mark.parametrize("case", sorted(MODEL_ERRORS))
def test_a_mistake_is_one_line_and_exit_code_2(case, aqua, projections_file, tiny_folder, text_file):
    arguments, message = MODEL_ERRORS[case]
    base = ["eval", "perplexity", tiny_folder, "-p", projections_file, "--data", text_file, "--context", 64]
    code, _, err = aqua(*base, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in err


def test_wrong_files_and_models(aqua, tmp_path, projections_file, tiny_folder, text_file):
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(projections_file.read_bytes()[:1000])
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    calibrate = ["calibrate", tiny_folder, "--data", text_file, "-o"]
    for arguments, message in [
        (["inspect", tmp_path / "none.safetensors"], "no such projections file"),
        (["inspect", truncated], "not a complete safetensors file"),
        (["inspect", text_file], f"{text_file} is no projections file: make one with `aqua calibrate MODEL -o "),
        (["inspect", tiny_folder / "config.json"], "config.json is no projections file: make one with `aqua calibrate"),
        (["inspect", tmp_path], f"{tmp_path} is a folder: give the file that `aqua calibrate` wrote"),
        (["inspect", projections_file, "--json", tmp_path], f"{tmp_path}: it is a folder, give a file, such as "),
        (["calibrate", tiny_folder, "--data", empty, "-o", tmp_path / "p"], "is blank"),
        (["calibrate", tmp_path / "no-model", "--data", text_file, "-o", tmp_path / "p"], "no-model"),
        (["calibrate", tiny_folder, "--data", text_file, "-o", tmp_path / "no" / "p"], "cannot write"),
        ([*calibrate, "."], "cannot write .: it is a folder, give a file, such as projections.safetensors"),
        ([*calibrate, tmp_path / "p", "--json", tmp_path / "p"], "two results"),
        ([*calibrate, tmp_path / "p", "--checkpoint-seconds", "nan"], "checkpoint_seconds is nan"),
        (["merge", projections_file, projections_file, "-o", tmp_path / "p", "--json", tmp_path / "p"], "two results"),
        (["eval", "lines", tiny_folder, "-p", projections_file, "--lines", 100], "the model knows 256 positions"),
        (["eval", "lines", tiny_folder, "-p", projections_file, "--data", tmp_path], "no such file of line questions"),
        (["eval", "needle", tiny_folder, "-p", projections_file, "--length", -5], "give a larger length"),
        (["generate", tiny_folder, "-p", projections_file, "--prompt", " "], "the prompt is empty"),
        (["generate", tiny_folder, "-p", projections_file, "--prompt", "w1", "--max-new-tokens", 0], "max_new_tokens"),
        (["generate", tiny_folder, "-p", projections_file, "--prompt", "w1", "--max-new-tokens", 999], "256 positions"),
    ]:
        code, _, err = aqua(*arguments)
        assert code == 2, arguments
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "p").exists()


def test_every_command_has_an_example_in_its_help(aqua):
    commands = [[c.name or c.callback.__name__] for c in cli.app.registered_commands]
    commands += [["eval", c.name or c.callback.__name__] for c in cli.evaluations.registered_commands]
    commands += [["bench", c.name or c.callback.__name__] for c in cli.benchmarks.registered_commands]
    assert len(commands) >= 10
    for command in commands:
        code, out, _ = aqua(*command, "--help")
        assert code == 0
        assert "Example" in out
        # All arguments of lm-eval are the harness's own.
        assert ("--output_path" if command == ["lm-eval"] else "--json") in out


def test_help_is_in_short_sentences_and_every_option_is_explained():
    from typer.main import get_command

    def commands(command):
        yield command
        for each in getattr(command, "commands", {}).values():
            yield from commands(each)

    found = list(commands(get_command(cli.app)))
    assert len(found) > 20
    for command in found:
        assert "`aqua " in command.help, command.name
        assert prose.average(command.help) <= prose.MOST_WORDS, command.name
        for option in command.params:
            assert option.help.endswith("."), (command.name, option.name)
            assert max(map(prose.words, prose.sentences(option.help))) <= prose.MOST_WORDS, option.help


def test_version(aqua):
    from aqua_attention.version import __version__

    assert aqua("--version")[:2] == (0, f"aqua-attention {__version__}\n")


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(aqua, monkeypatch, tmp_path, tiny_folder, text_file):
    from aqua_attention.calibration.statistics import LayerStatistics

    arguments = ("calibrate", tiny_folder, "--data", text_file, "--tokens", 256, "--context", 64, "-o")
    assert aqua(*arguments, tmp_path / "whole")[0] == 0
    whole, calls, original = (tmp_path / "whole").read_bytes(), [], LayerStatistics.of

    def interrupted(query, key):
        calls.append(0)
        if len(calls) in (1, 3 + 3 * 2):  # before any window is done; in the third window after that
            raise KeyboardInterrupt
        return original(query, key)

    monkeypatch.setattr(LayerStatistics, "of", interrupted)
    code, _, err = aqua(*arguments, tmp_path / "p")
    assert (code, "stopped: nothing was kept yet" in err, "Traceback" in err) == (130, True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    code, _, err = aqua(*arguments, tmp_path / "p")
    assert (code, "Traceback" in err) == (130, False)
    assert f"stopped: {tmp_path / 'p.partial'} keeps what is done, the same command with --resume" in err
    code, _, err = aqua(*arguments, tmp_path / "p")
    assert code == 2
    assert "holds an unfinished calibration: go on with --resume, or delete it" in err
    assert aqua(*arguments, tmp_path / "p", "--resume")[0] == 0
    assert (tmp_path / "p").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "whole"]
    code, _, err = aqua(*arguments, tmp_path / "p", "--resume")
    assert (code, "there is no" in err) == (0, True)


def test_a_model_of_nan_gives_no_figures(aqua, projections_file, text_file, word_tokenizer, tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    word_tokenizer.save_pretrained(tmp_path / "nan")
    given = (tmp_path / "nan", "-p", projections_file, "--json", tmp_path / "out.json")
    windows, essay = ["--data", text_file, "--context", 64], tmp_path / "essay.txt"
    essay.write_text("w1 w2 w3. " * 200)
    for command in (
        ["perplexity", *windows],
        ["retention", *windows],
        ["lines", "--lines", 3],
        ["needle", "--data", essay, "--length", 150],
    ):
        code, _, err = aqua("eval", command[0], *given, *command[1:])
        assert (code, "gives NaN" in err, "Traceback" in err) == (2, True, False), err
    assert not (tmp_path / "out.json").exists()


def test_a_full_disk_behind_standard_output_is_one_line(tmp_path, projections_file):
    command = [sys.executable, "-m", "aqua_attention.cli.main", "inspect", str(projections_file)]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_json_to_a_device_leaves_the_device(aqua, projections_file):
    assert aqua("inspect", projections_file, "--json", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


def test_a_learned_basis_is_calibrated_and_inspected(aqua, tiny_folder, text_file, tmp_path, monkeypatch):
    from aqua_attention.calibration import learned, learning, reading

    monkeypatch.setattr(reading, "LEAST_READ", 6)
    for name, value in (("QUERIES", 48), ("QUERIES_HELD", 96), ("STEPS", 16)):
        monkeypatch.setattr(learned, name, value)
    monkeypatch.setattr(learning, "MARGIN", 0.0)
    path = tmp_path / "learned.safetensors"
    sizes = ("--tokens", 1152, "--context", 144, "--basis", "learned", "--positions", "0:200")
    code, out, err = aqua("calibrate", tiny_folder, "--data", text_file, *sizes, "-o", path)
    assert code == 0, err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["learned.safetensors"]
    projections = Projections.load(path)
    assert (projections.basis, projections.calibration["last_position"]) == ("learned", 200)
    assert "learned" in str(projections.calibration["learned"]["held_out"])
    code, out, _ = aqua("inspect", path)
    assert code == 0
    for said in ("held-out loss", "of the singular vectors'", "positions up to 200", "learned: loss to svd's"):
        assert said in out
    code, out, _ = aqua(
        "eval", "perplexity", tiny_folder, "-p", path, "--data", text_file, "--tokens", 128, "--context", 64
    )
    assert code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--basis", "pca"), "basis is 'pca': it must be one of svd, learned, tuned"),
        (("--positions", "5:9"), "positions is '5:9': it must be 0:LAST, such as 0:32768"),
        (("--positions", "0:400"), "positions go to 400: the model knows 256, choose at most that"),
        (("--positions", "0:32"), "positions go to 32, and a window has 64: choose at least that"),
    ],
)
def test_a_basis_or_positions_that_cannot_be_are_one_line(aqua, tiny_folder, text_file, tmp_path, options, message):
    given = ("--tokens", 512, "--context", 64, *options, "-o", tmp_path / "p.safetensors")
    code, _, err = aqua("calibrate", tiny_folder, "--data", text_file, *given)
    assert (code, err.strip()) == (2, f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_what_needs_more_memory_than_there_is_is_one_line(aqua, monkeypatch, tiny_folder, text_file, tmp_path):
    def full(*_, **__):
        torch.empty(1 << 55)

    monkeypatch.setattr("aqua_attention.calibration.statistics.LayerStatistics.of", full)
    arguments = ("calibrate", tiny_folder, "--data", text_file, "--tokens", 256, "--context", 64, "-o", tmp_path / "p")
    code, _, err = aqua(*arguments)
    last = err.splitlines()[-1]
    assert (code, "Traceback" in err) == (1, False)
    assert last == "error: this needs more memory than there is (144115188075855872 bytes at once): ask for less"
