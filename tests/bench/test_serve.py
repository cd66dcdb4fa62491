# SPDX-License-Identifier: Apache-2.0
"""`aqua bench serve` without vLLM: a package of its name stands for it, whose server answers at once.

What is tested is ours: processes that end, logs that stay, the check, ratios, table and record. tests/serve runs the
real one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aqua_attention.bench.serve import Load, compare, gap_between
from aqua_attention.bench.server import reason_in
from aqua_attention.errors import AquaError
from aqua_attention.report.recognise import records_of
from conftest import calibrated, make_llama

SERVER = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

port, ours = int(sys.argv[sys.argv.index("--port") + 1]), "AQUA_PROJECTIONS" in os.environ
config = json.loads(os.environ.get("AQUA_CONFIG", "{}"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["PIDS"], "a") as file:
    print(os.getpid(), child.pid, file=file)
if "--broken" in sys.argv:
    print("(EngineCore pid=7) ERROR [core.py:1] aqua_attention.errors.AquaError: AQUA_CONFIG: it is wrong")
    print("RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(1)
print("config: model='m', dtype=torch.float32, max_seq_len=2048")
print("Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN'].")
print("GPU KV cache size:", "12,000" if ours else "10,000", "tokens")
if ours and "--silent" not in sys.argv:
    print("AQUA attention: k_ratio 0.5")
sys.stdout.flush()

class Handler(BaseHTTPRequestHandler):
    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer({"speed": 150 if ours else 100})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "--dying" in sys.argv:
            os._exit(1)
        tokens = ["a"] * body["max_tokens"]
        # Keys are rotated, which k_ratio 1 would leave out, and every dimension is multiplied.
        is_gate = ours and config["k_ratio"] < 1 and config["min_length"] > 1e6 and config["s_ratio"] == 0
        if is_gate and "--wrong" in sys.argv:
            tokens[3] = "b"
        likely = [{"a": -0.1, "b": -2.5}] * len(tokens)
        self.answer({"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": likely}}]})

HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CLIENT = """
import json
from urllib.request import urlopen

def add_cli_args(parser):
    for name in ("backend", "base-url", "model", "dataset-name", "random-input-len", "random-output-len",
                 "num-prompts", "num-warmups", "max-concurrency", "seed", "temperature", "percentile-metrics",
                 "metric-percentiles", "result-dir", "result-filename"):
        parser.add_argument("--" + name)
    for name in ("save-result", "ignore-eos", "disable-tqdm"):
        parser.add_argument("--" + name, action="store_true")

def main(args):
    speed = json.load(urlopen(args.base_url + "/speed"))["speed"]
    figures = {"request_throughput": speed / 10, "output_throughput": speed, "completed": int(args.num_prompts)}
    figures |= {"median_ttft_ms": 20, "p99_ttft_ms": 40, "median_itl_ms": 1000 / speed, "p99_itl_ms": 15}
    with open(args.result_dir + "/" + args.result_filename, "w") as file:
        json.dump(figures, file)
"""
FILES = {
    "__init__.py": "__version__ = '0.0.0'",
    "benchmarks/serve.py": CLIENT,
    "utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser",
    "entrypoints/openai/api_server.py": SERVER,
    "v1/attention/backends/registry.py": "class AttentionBackendEnum:\n    register = None",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package for vLLM, in this process and in its children; `stand_in()`: ids of all that its servers started."""
    package, pids = tmp_path / "packages" / "vllm", tmp_path / "pids"
    for name, content in FILES.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PIDS", str(pids))
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "logs"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "logs"))
    pids.touch()
    yield lambda: [int(pid) for pid in pids.read_text().split()]
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def projections(tmp_path_factory):
    path = tmp_path_factory.mktemp("projections") / "tiny.safetensors"
    calibrated(make_llama()).save(path)
    return path


def running(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_rows_ratios_and_record(stand_in, projections, aqua, tmp_path):
    record = tmp_path / "serve.json"
    load = ("--input-len", 64, "--output-len", 8, "--concurrency", 2, "--concurrency", 3)
    code, out, err = aqua("bench", "serve", "m", "-p", projections, "--k-ratio", 0.5, *load, "--json", record)
    assert code == 0, err
    assert all(word in out for word in ("FLASH_ATTN", "AQUA", "1.50", "12,000", "1.200"))
    value = json.loads(record.read_text())
    assert [result["batch"] for result in value["results"]] == [2, 3]
    stock, ours = value["results"][1]["rows"]
    assert (stock["tokens_per_second"], ours["tokens_per_second"], ours["ratio"]) == (100, 150, 1.5)
    assert (ours["first_ratio"], ours["capacity"], ours["capacity_ratio"]) == (1.0, 12_000, 1.2)
    assert ours["token_ratio"] == pytest.approx(100 / 150)
    assert value["results"][0]["gate"] == {"prompts": 6, "equal": 6, "gap": 0.0}
    assert [each.suite for each in records_of(value, "serve.json")] == ["serve", "serve"]
    assert len(stand_in()) == 6
    assert not running(stand_in())
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize(
    ("options", "server", "words", "servers"),
    [
        ((), "--broken", "did not start (AQUA_CONFIG: it is wrong): see ", 1),
        (("--k-ratio", 1), "--wrong", "AQUA's answer to prompt 0 is not stock's (a token is 2.4 less likely", 2),
        ((), "--wrong", "AQUA's answer to prompt 0 is not stock's (a token is 2.4 less likely", 2),
        ((), "--dying", "the server no longer answers (", 1),
        (("--no-gate",), "--silent", "the server did not take AQUA's attention: see ", 2),
        ((), "'", "it must be options as a shell takes them", 0),
        (("--output-len", 1), "", "output_len is 1: it must be 2 or more", 0),
        (("--concurrency", 0), "", "concurrency is 1, 0: it must be 1 or more", 0),
        (("--h2o-ratio", 0.5), "", "h2o_ratio is 0.5, which is not served in vLLM yet", 0),
    ],
)
def test_what_fails_is_one_line_ends_all_servers_and_keeps_the_logs(
    stand_in, projections, aqua, tmp_path, options, server, words, servers
):
    code, _, err = aqua("bench", "serve", "m", "-p", projections, "--concurrency", 1, *options, "--server", server)
    last = err.splitlines()[-1]
    assert (code, words in last) == (2, True), err
    assert (len(stand_in()), running(stand_in())) == (2 * servers, [])
    assert len(list((tmp_path / "logs").rglob("*.log"))) >= servers


def test_without_a_gate_two_servers_are_enough(stand_in, projections, aqua):
    code, _, _ = aqua("bench", "serve", "m", "-p", projections, "--no-gate", "--server", "--wrong")
    assert (code, len(stand_in())) == (0, 4)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_servers(stand_in, projections, name):
    command = [sys.executable, "-m", "aqua_attention.cli.main", "bench", "serve", "m", "-p", str(projections)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not stand_in():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    assert len(running(stand_in())) == 2
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, "stopped" in out) == (128 + getattr(signal, name), True), out
    assert not running(stand_in())


def test_without_vllm_one_line_says_so(projections, aqua):
    if "vllm" in sys.modules:
        pytest.skip("vLLM is here")
    code, _, err = aqua("bench", "serve", "m", "-p", projections)
    assert (code, "has no vLLM: install" in err) == (2, True)


def answer(tokens, choices):
    return {"tokens": tokens, "top_logprobs": choices}


def test_answers_may_part_at_a_tie_only():
    near, far = [{"a": -0.7, "b": -0.705}], [{"a": -0.1, "b": -2.1, "c": -3.0}]
    assert gap_between(answer(["a"], near), answer(["b"], near)) == pytest.approx(0.005)
    # What comes after the first difference answers another text.
    assert gap_between(answer(["a", "a"], near + far), answer(["b", "c"], near + far)) == pytest.approx(0.005)
    assert gap_between(answer(["a"], far), answer(["z"], far)) == math.inf
    pairs = [answer(["a"], near), answer(["a"], near)], [answer(["a"], near), answer(["b"], near)]
    assert compare(*pairs, "float32") == {"prompts": 2, "equal": 1, "gap": pytest.approx(0.005)}
    with pytest.raises(AquaError, match="prompt 0 is not stock's"):
        compare([answer(["a"], far)], [answer(["b"], far)], "bfloat16")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("ValueError: first\nmore\nRuntimeError: Engine core failed", "ValueError: first"),
        ("x.AquaError: AQUA_CONFIG: no\nRuntimeError: Engine core failed", "AQUA_CONFIG: no"),
        (
            "usage: ...\napi_server.py: error: unrecognized arguments: --x",
            "api_server.py: error: unrecognized arguments: --x",
        ),
        (
            "WARNING [x.py:1] This can cause `OSError: [Errno 24]`.\n(API pid=1) ERROR 11-26 [c.py:2] KeyError: 'a'",
            "KeyError: 'a'",
        ),
        ("", "it wrote nothing"),
    ],
)
def test_the_reason_in_a_log(tmp_path, log, reason):
    (tmp_path / "log").write_text(log)
    assert reason_in(tmp_path / "log") == reason


def test_a_load_is_checked():
    with pytest.raises(AquaError, match="requests is 0"):
        Load(requests=0)
