#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ask a vLLM server that attends with AQUA: one that this starts, or one that runs.

    python examples/serve.py --model MODEL -p projections/model.safetensors --preset fast
    python examples/serve.py --url http://127.0.0.1:8000 --log server.log

The first line starts a server, sends a few requests, and ends it. The second asks a server of yours, whose log tells
whether AQUA attends in it: vLLM's interface does not. SERVING.md says how to start one.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console

import aqua_attention as aqua
from aqua_attention.bench.server import ANSWER_SECONDS, OURS, check_vllm, served
from aqua_attention.cli.terminal import ended_by_signals
from aqua_attention.vllm.settings import CONFIG, INT8, PROJECTIONS, Serving

PROMPTS = ("What is a list in Python?", "Name three rivers in Europe.", "Write one sentence about the sea.")
CONSOLE = Console(highlight=False, soft_wrap=True, markup=False)


@contextmanager
def started(given: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Where a server with AQUA listens, and its log; an AquaError where vLLM or the projections are missing."""
    check_vllm()
    config = aqua.AquaConfig.preset(given.preset)
    setting = json.dumps(config.changes)
    Serving.of(str(given.projections), setting)  # says now what the server would say after a minute
    options = ["--attention-backend", "AQUA", *(("--kv-cache-dtype", INT8) if config.bits else ()), *given.server]
    names = f"{PROJECTIONS}={shlex.quote(str(given.projections))} {CONFIG}={shlex.quote(setting)}"
    CONSOLE.print(f"{names} vllm serve {shlex.join([given.model, *options])}")
    with TemporaryDirectory() as folder:
        log = given.log or Path(folder, "server.log")
        files: dict[str, Any] = {"log": log, "projections": given.projections, "setting": config.changes}
        with served(given.model, options, **files) as server:
            yield server.url, log


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the server answers; an AquaError where it does not."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return json.loads(answer.read())
    except HTTPError as error:
        raise aqua.AquaError(f"the server refused {path} ({error.code}): {error.read().decode()[:200]}") from error
    except (OSError, ValueError) as error:
        raise aqua.AquaError(f"{url}/{path} gives no answer ({error}): is a vLLM server there?") from error


def aqua_line(log: Path) -> str:
    """The line of a server's log that says how AQUA attends; an AquaError where the server is stock."""
    lines = log.read_text(errors="replace").splitlines()
    found = next((line[line.index(OURS) :] for line in lines if OURS in line), None)
    if found is None:
        remedy = f"set {PROJECTIONS}, and start it with --attention-backend AQUA"
        raise aqua.AquaError(f"{log} has no line with {OURS!r}, so this server is stock: {remedy}")
    return found


def main() -> None:
    """Start or find a server, check it, ask it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="start a server of this model: a folder, or a name on the hub")
    parser.add_argument("-p", "--projections", type=Path, help="made by `aqua calibrate` for that model")
    parser.add_argument("--preset", default="fast", help="the setting of that server (%(default)s)")
    parser.add_argument(
        "--server", type=shlex.split, default=[], help='other options of it: --server="--max-model-len 4096"'
    )
    parser.add_argument("--url", help="ask this server instead, such as http://127.0.0.1:8000")
    parser.add_argument("--log", type=Path, help="the server's log")
    parser.add_argument("--prompt", action="append", help="what to ask; may be repeated (default: three questions)")
    parser.add_argument("--max-tokens", type=int, default=48, help="how long an answer may be (%(default)s)")
    given = parser.parse_args()
    if (given.url is None) == (given.model is None) or (given.model is None) != (given.projections is None):
        raise aqua.AquaError("give either --model and -p, to start a server, or --url, to ask one that runs")
    with nullcontext((given.url.rstrip("/"), given.log)) if given.url else started(given) as (url, log):
        model = ask(url, "v1/models")["data"][0]["id"]
        CONSOLE.print(f"{model} at {url}")
        checked = aqua_line(log) if log else "AQUA or stock? Not checked: give the server's log by --log"
        CONSOLE.print(checked)
        for prompt in given.prompt or PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            body = {"model": model, "messages": messages, "max_tokens": given.max_tokens, "temperature": 0}
            begun = time.perf_counter()
            answer = ask(url, "v1/chat/completions", body)
            seconds, tokens = time.perf_counter() - begun, answer["usage"]["completion_tokens"]
            took = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} a second"
            CONSOLE.print(f"\n{prompt} ({took})", style="bold")
            CONSOLE.print(answer["choices"][0]["message"]["content"].strip())


if __name__ == "__main__":
    try:
        with ended_by_signals():  # a server that was started ends with this
            main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (aqua.AquaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
