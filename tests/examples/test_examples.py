# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/, each with a tiny model or a server that stands for vLLM."""

from __future__ import annotations

import os
import re
import runpy
import sys
import threading
from http.server import HTTPServer
from pathlib import Path

import fake_server
import pytest
import torch

import aqua_attention as aqua
from conftest import VOCABULARY, calibrated, make_llama
from pages import files

EXAMPLES = files.ROOT / "examples"
PAGE = files.DOCS / "examples.md"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run examples/NAME ARGS; returns (exit code, standard output, standard error)."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, word_tokenizer):
    """A tiny model that knows as many positions as a calibration window has."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama(max_position_embeddings=4096).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path, folder):
    """Options for a tiny model; the built-in texts are random words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ids = torch.randint(0, VOCABULARY - 2, (6_000,), generator=torch.Generator().manual_seed(5)).tolist()
    monkeypatch.setattr(aqua, "load_text", lambda name: " ".join(f"w{number}" for number in ids))
    return "--model", folder, "--calibration-tokens", 2048, "-p", "tiny.safetensors"


def row_of(out, name):
    """The figures in a table's row."""
    line = next(line for line in out.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_a_long_document_is_asked_about_each_way(run, small):
    options = ("--tokens", 200, "--new-tokens", 6, "--preset", "fast", "--preset", "small", "--question", "w1 w2 ?")
    code, out, err = run("long_document.py", *small, *options)
    assert code == 0, err
    assert "a prompt of 2" in out
    assert all(f"\n{name}: w" in out for name in ("dense", "fast", "small"))
    dense, fast, small_row = (row_of(out, name) for name in ("dense", "fast", "small"))
    assert all(float(cell) >= 0 for row in (dense, fast, small_row) for cell in row[:3])
    assert Path("tiny.safetensors").exists()


def test_projections_that_are_there_are_used(run, small):
    calibrated(make_llama()).save("tiny.safetensors")
    before = Path("tiny.safetensors").read_bytes()
    code, _, err = run("long_document.py", *small, "--tokens", 50, "--new-tokens", 2, "--preset", "fast")
    assert (code, "calibrate" in err) == (0, False), err
    assert Path("tiny.safetensors").read_bytes() == before


def test_the_cheapest_setting_within_a_loss_is_named(run, small):
    options = ("--tokens", 256, "--context", 128, "--length", 512, "--k-ratio", 1, "--k-ratio", 0.5)
    code, out, err = run("choose_setting.py", *small, *options, "--most", "99%")
    assert code == 0, err
    assert len(row_of(out, "--k-ratio 1.0 --bits 8")) == len(row_of(out, "--k-ratio 0.5")) == 6
    assert re.search(r"^Cheapest within 99.00%: --k-ratio 0.5 --bits 8$", out, re.MULTILINE)


def test_where_no_setting_keeps_to_the_loss_one_line_says_so(run, small):
    options = ("--tokens", 128, "--context", 128, "--length", 512, "--k-ratio", 0.1, "--most", "0%")
    code, out, err = run("choose_setting.py", *small, *options)
    assert code == 2, out
    assert err.splitlines()[-1].startswith("error: no setting of the grid keeps to 0.00%: ")


@pytest.fixture
def server():
    """Where a server listens."""
    with HTTPServer(("127.0.0.1", 0), fake_server.Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_server_that_runs_is_checked_and_asked(run, server, tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO one\nINFO AQUA attention: k_ratio 0.5; projections a for llama\n")
    code, out, err = run("serve.py", "--url", server, "--log", log, "--prompt", "one two three", "--max-tokens", 2)
    assert code == 0, err
    assert "\nAQUA attention: k_ratio 0.5; projections a for llama\n" in out
    assert re.search(r"one two three \(2 tokens in [\d.]+ s, \d+ a second\)\nthree two\n", out)


def test_without_a_log_nothing_is_claimed(run, server):
    code, out, _ = run("serve.py", "--url", server)
    assert (code, "Not checked: give the server's log" in out) == (0, True)


def test_a_stock_server_is_found_out(run, server, tmp_path):
    (tmp_path / "log").write_text("INFO Using FLASH_ATTN\n")
    code, out, err = run("serve.py", "--url", server, "--log", tmp_path / "log")
    assert (code, "this server is stock" in err, "tokens in" in out) == (2, True, False)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A package for vLLM, in this process and in its children."""
    if "vllm" in sys.modules:
        pytest.skip("vLLM is here")
    package = tmp_path / "packages" / "vllm"
    program = package / "entrypoints" / "openai" / "api_server.py"
    program.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    program.write_text(Path(fake_server.__file__).read_text())
    monkeypatch.syspath_prepend(package.parent)
    given = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *([given] if given else [])]))


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_is_started_checked_asked_and_ended(run, stand_in, projections_file, silent):
    options = ("--model", "m", "-p", projections_file, "--preset", "fast", "--prompt", "one two")
    code, out, err = run("serve.py", *options, *(("--server=--silent",) if silent else ()))
    assert f"AQUA_PROJECTIONS={projections_file} AQUA_CONFIG='{{\"k_ratio\": 0.5}}' vllm serve m" in out, err
    assert (code, "this server is stock" in err, "two one" in out) == (2 * silent, silent, not silent)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("long_document.py", ("--preset", "fst"), "preset is 'fst': it must be one of "),
        ("choose_setting.py", ("--most", "0.5"), "most is '0.5': give per cent, with the sign"),
        ("choose_setting.py", ("--most", "much%"), "most is 'much%': give per cent"),
        ("serve.py", (), "give either --model and -p, to start a server, or --url"),
        ("serve.py", ("--model", "m"), "give either --model and -p, to start a server, or --url"),
        ("serve.py", ("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9/v1/models gives no answer"),
    ],
)
def test_mistakes_are_one_line(run, name, options, words):
    code, _, err = run(name, *options)
    assert (code, len(err.splitlines()), words in err) == (2, 1, True), err


def test_a_refused_request_is_one_line(run, server):
    code, _, err = run("serve.py", "--url", server, "--prompt", "refuse")
    assert code == 2
    assert err == 'error: the server refused v1/chat/completions (400): {"message": "no chat template"}\n'


def test_without_vllm_one_line_says_what_is_missing(run, projections_file):
    if "vllm" in sys.modules:
        pytest.skip("vLLM is here")
    code, _, err = run("serve.py", "--model", "m", "-p", projections_file)
    assert (code, len(err.splitlines()), "has no vLLM: install" in err) == (2, 1, True)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_is_short_has_help_and_a_place_in_the_page(path, run):
    assert len(path.read_text().splitlines()) < 120
    code, out, _ = run(path.name, "--help")
    assert (code, "--help" in out, "%%" in out) == (0, True, False)
    assert path.name in PAGE.read_text()
