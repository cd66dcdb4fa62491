# SPDX-License-Identifier: Apache-2.0
"""What AQUA gains in a vLLM server: vLLM's own benchmark client against a stock server, then ours."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aqua_attention.bench.server import Server, check_vllm, environment_of, reason_in, served
from aqua_attention.config import AquaConfig
from aqua_attention.data.text import load_text
from aqua_attention.errors import AquaError
from aqua_attention.vllm.settings import INT8

Progress = Callable[[int, int], None]
CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
"""`vllm bench serve`, which asks for the version of a package that the CPU build does not call by that name."""
ALWAYS = ("--no-enable-prefix-caching",)
"""Of both servers: random prompts begin with nothing in common, and what warms up must not be found again."""
FIGURES = {
    "requests_per_second": ("request_throughput", 1.0),
    "tokens_per_second": ("output_throughput", 1.0),
    "first_seconds": ("median_ttft_ms", 1e-3),
    "first_p99_seconds": ("p99_ttft_ms", 1e-3),
    "token_seconds": ("median_itl_ms", 1e-3),
    "token_p99_seconds": ("p99_itl_ms", 1e-3),
}
"""What a row calls a figure, what the client does, and the factor between."""
GATE_PROMPTS, GATE_TOKENS, GATE_CHOICES = 6, 24, 5
ENDLESS = 1 << 30
"""Tokens: more than any sequence has."""
MOST_GAP = {"float32": 0.01}
"""By dtype: how much less likely than stock's a token may be, in log-probability, where the two are not the same."""
MOST_GAP_OF_HALVES = 0.25
"""In 16 bits, where a rotation rounds once more: two logits of 16 to 32 that are neighbours are 0.125 apart."""


@dataclass(frozen=True)
class Load:
    """What the client sends.

    Attributes:
        input_len, output_len: tokens of each prompt, which are random, and of each answer.
        concurrency: requests at once, a measurement each.
        requests: how many for each of those at once.
    """

    input_len: int = 1024
    output_len: int = 128
    concurrency: tuple[int, ...] = (1, 8)
    requests: int = 4

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "requests"):
            if getattr(self, name) < 1:
                raise AquaError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if not self.concurrency or min(self.concurrency) < 1:
            raise AquaError(f"concurrency is {', '.join(map(str, self.concurrency))}: it must be 1 or more")
        if self.output_len < 2:
            raise AquaError("output_len is 1: it must be 2 or more, or there is no time between tokens")


@dataclass(frozen=True)
class ServeBenchmark:
    """A stock server and one with AQUA on the same machine with the same options, under the same load.

    Attributes:
        model: as vLLM takes it, a folder or a name on the hub.
        projections: their file.
        options: of both servers, as `vllm serve` takes them.
        backend: AQUA's name in this version of vLLM.
        folder: where logs go.
        gate: check first that a server with AQUA's rotated keys and every dimension gives stock's tokens.
    """

    model: str
    projections: Path
    config: AquaConfig
    load: Load
    folder: Path
    options: tuple[str, ...] = ()
    backend: str = "AQUA"
    gate: bool = True

    def measure(self, progress: Progress = lambda done, total: None) -> list[dict[str, Any]]:
        """Start, check, load and end each server.

        Returns:
            For each number at once `{"batch", "length", "new_tokens", "dtype", "gate", "rows"}`, stock's row and ours.
            A row: `name`, `k_ratio` (None: stock), `requests_per_second`, `tokens_per_second` (of all answers),
            `first_seconds` and `first_p99_seconds` (to the first token, median and 99th percentile), `token_seconds`
            and `token_p99_seconds` (between tokens), `capacity` (tokens that the cache has room for; None where the log
            does not say), and to stock's `ratio` (of tokens a second, above 1 is faster), `first_ratio` and
            `token_ratio` (above 1 is slower) and `capacity_ratio`.

        Raises:
            AquaError: a server that does not start or answer, or that fails the check. Its log is kept.
        """
        check_vllm()
        # Every dimension because sequences are short, and not by `k_ratio` 1, with which keys are not even rotated.
        dims = min(self.config.k_ratio, 0.5)
        whole = replace(self.config, k_ratio=dims, min_length=ENDLESS, s_ratio=0.0, bits=None)
        done, total = 0, 2 + 2 * len(self.load.concurrency) + self.gate

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        progress(0, total)
        with self._served("stock", None) as server:
            step()
            expected = greedy(server, self.load.input_len) if self.gate else []
            dtype, name = server.dtype, f"vLLM, {server.backend}" if server.backend else "vLLM"
            stock = self._rows(server, {"name": name, "k_ratio": None}, step)
        found = None
        if self.gate:
            with self._served("gate", whole) as server:
                found = compare(expected, greedy(server, self.load.input_len), dtype)
            step()
        with self._served("aqua", self.config) as server:
            step()
            stored = f", int{self.config.bits}" if self.config.bits else ""
            stored += f", s_ratio {self.config.s_ratio:g}" if self.config.s_ratio else ""
            row = {"name": f"AQUA{stored}", "k_ratio": self.config.k_ratio, "setting": self.config.to_dict()}
            ours = self._rows(server, row, step)
        results = []
        for concurrency, *rows in zip(self.load.concurrency, stock, ours, strict=True):
            result = {"batch": concurrency, "length": self.load.input_len, "new_tokens": self.load.output_len}
            results.append(result | {"dtype": dtype, "gate": found, "rows": add_ratios(rows)})
        return results

    @contextmanager
    def _served(self, name: str, config: AquaConfig | None) -> Iterator[Server]:
        options, given = (*ALWAYS, *self.options), dict[str, Any]()
        if config:
            options += ("--attention-backend", self.backend, *(("--kv-cache-dtype", INT8) if config.bits else ()))
            given |= {"projections": self.projections, "setting": config.to_dict()}
        with served(self.model, options, log=self.folder / f"{name}.log", **given) as server:
            if config and not server.has_aqua:
                raise AquaError(f"the server did not take AQUA's attention: see {server.log}")
            try:
                yield server
            except OSError as error:
                raise AquaError(f"the server no longer answers ({error}): see {server.log}") from error

    def _rows(self, server: Server, row: dict[str, Any], step: Callable[[], None]) -> list[dict[str, Any]]:
        rows = []
        for concurrency in self.load.concurrency:
            figures = run_client(server, self.load, concurrency, trusts="--trust-remote-code" in self.options)
            rows.append(row | figures | {"capacity": server.capacity})
            step()
        return rows


def run_client(server: Server, load: Load, concurrency: int, *, trusts: bool = False) -> dict[str, Any]:
    """What vLLM's client measures; an AquaError where a request has failed."""
    # As many requests again warm up first.
    count = concurrency * load.requests
    result, log = (server.log.with_suffix(f".{concurrency}.{kind}") for kind in ("json", "client.log"))
    options: dict[str, Any] = {
        "backend": "openai",
        "base-url": server.url,
        "model": server.model,
        "dataset-name": "random",
        "random-input-len": load.input_len,
        "random-output-len": load.output_len,
        "num-prompts": count,
        "num-warmups": concurrency,
        "max-concurrency": concurrency,
        "seed": concurrency,
        "temperature": 0,
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": 99,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    command = [sys.executable, "-P", "-c", CLIENT, "--save-result", "--ignore-eos", "--disable-tqdm"]
    command += [f"--{name}={value}" for name, value in options.items()] + ["--trust-remote-code"] * trusts
    with log.open("wb") as file:
        ended = subprocess.run(
            command, env=environment_of(None), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    if ended.returncode or not result.is_file():
        raise AquaError(f"vLLM's benchmark client failed ({reason_in(log)}): see {log}")
    measured = json.loads(result.read_text())
    if (completed := measured["completed"]) < count:
        raise AquaError(f"{completed} of {count} requests were answered: see {log} and {server.log}")
    return {name: measured[theirs] * factor for name, (theirs, factor) in FIGURES.items()}


def greedy(server: Server, most: int) -> list[dict[str, Any]]:
    """Answers to prompts of many lengths, with the log-probabilities of the likeliest tokens; `most`: tokens of one."""
    # A token has a character or more.
    text = load_text("builtin:evaluation")
    lengths = [max(1, most * (place + 1) // GATE_PROMPTS) for place in range(GATE_PROMPTS)]
    wanted = {"logprobs": GATE_CHOICES, "return_tokens_as_token_ids": True}
    starts = (place * len(text) // (2 * GATE_PROMPTS) for place in range(GATE_PROMPTS))
    prompts = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return [server.complete(prompt, GATE_TOKENS, **wanted)["logprobs"] for prompt in prompts]


def compare(stock: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], dtype: str | None) -> dict[str, Any]:
    """How far answers of `greedy` agree: `{"prompts", "equal", "gap"}`.

    Answers may part where two tokens are as good as equally likely; `gap` is the largest difference in stock's
    log-probability there. An AquaError where it is more than rounding explains.
    """
    gaps = [gap_between(*pair) for pair in zip(stock, ours, strict=True)]
    most = MOST_GAP.get(dtype or "", MOST_GAP_OF_HALVES)
    if max(gaps) > most:
        place = gaps.index(max(gaps))
        raise AquaError(
            f"with every dimension AQUA's answer to prompt {place} is not stock's (a token is {gaps[place]:.3g} less "
            f"likely, {most:g} may be rounding): its figures would mean nothing, see --no-gate"
        )
    return {"prompts": len(gaps), "equal": gaps.count(0.0), "gap": max(gaps)}


def gap_between(stock: dict[str, Any], ours: dict[str, Any]) -> float:
    """By how much less likely our token is to stock where two answers part first; 0 where they do not."""
    for expected, found, choices in zip(stock["tokens"], ours["tokens"], stock["top_logprobs"], strict=True):
        if expected != found:
            return float(choices[expected] - choices.get(found, -math.inf))
    return 0.0


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one load, stock's first, with their ratios to it."""
    stock = rows[0]
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / stock["tokens_per_second"]
        row["first_ratio"] = row["first_seconds"] / stock["first_seconds"]
        row["token_ratio"] = row["token_seconds"] / stock["token_seconds"]
        known = row["capacity"] is not None and stock["capacity"] is not None
        row["capacity_ratio"] = row["capacity"] / stock["capacity"] if known else None
    return rows
