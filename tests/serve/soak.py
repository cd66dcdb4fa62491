# SPDX-License-Identifier: Apache-2.0
"""A soak of a vLLM server with AQUA on a CPU: mixed requests, some given up, for so many minutes.

    make soak-vllm ARGS="--minutes 30 --json soak.json"

The cache is too small for all requests at once, so that some are preempted, and prompts share beginnings. Answers are
greedy, in float32, and are held to those of the same prompts asked alone before. A batch adds numbers up in another
order than a single request does. So an answer may part from that one where the other token is as likely as the first
to `TIE` in log-probability, and what comes after that is another text. The rest must be equal.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

from engine import ENVIRONMENT, export_smollm2

from aqua_attention.bench.serve import gap_between
from aqua_attention.bench.server import HOST, served
from aqua_attention.data.text import load_text

TIE = 1e-3
FLAT = 0.02
"""By how much the mean memory of the last third may be above that of the third before."""
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"]
OPTIONS += ["--num-gpu-blocks-override", "96", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
SETTING = {"k_ratio": 0.5}
SHORT, LONG = (1, 5, 17, 33, 64, 129, 300, 511, 777, 1100), 600
CHOICES = 5


def prompts_of(tokenizer):
    """(token ids, new tokens) of prompts of many lengths, and of six that begin with the same 600 tokens."""
    ids, chance = tokenizer(load_text("builtin:evaluation"))["input_ids"], random.Random(0)
    starts = [1000 + 1500 * place for place in range(len(SHORT))]
    prompts = [ids[start : start + length] for start, length in zip(starts, SHORT, strict=True)]
    prompts += [ids[:LONG] + ids[20000 + 400 * place : 20000 + 400 * place + 60 * place] for place in range(6)]
    return [(prompt, chance.choice((4, 16, 32, 64))) for prompt in prompts]


class Client(threading.Thread):
    """Asks for one random prompt after the other until the time is over."""

    def __init__(self, server, prompts, expected, end, seed):
        super().__init__(daemon=True)
        self.server, self.prompts, self.expected, self.end = server, prompts, expected, end
        self.chance, self.counts, self.gaps, self.wrong = random.Random(seed), Counter(), [], []

    def run(self):
        while time.monotonic() < self.end:
            place = self.chance.randrange(len(self.prompts))
            kind = self.chance.choices(("whole", "streamed", "given up", "given up at once"), (5, 2, 2, 1))[0]
            try:
                getattr(self, kind.replace(" ", "_"))(place)
                self.counts[kind] += 1
            except Exception as error:
                self.wrong.append(f"{kind}, prompt {place}: {type(error).__name__}: {error}")
                time.sleep(1)

    def judge(self, place, tokens):
        gap = parted(self.expected[place], tokens)
        self.gaps.append(gap)
        if gap > TIE:
            self.wrong.append(f"prompt {place}: its answer is another, by {gap:.3g} of log-probability: {tokens}")

    def whole(self, place):
        self.judge(place, self.server.complete(*self.prompts[place])["token_ids"])

    def streamed(self, place):
        tokens = []
        for event in self._events(place):
            tokens += event["choices"][0].get("token_ids") or []
        self.judge(place, tokens)

    def given_up(self, place):
        events = self._events(place)
        for _ in range(self.chance.randrange(1, 1 + self.prompts[place][1])):
            next(events, None)
        events.close()

    def given_up_at_once(self, place):
        connection = self._asked(place)
        time.sleep(self.chance.random())
        connection.close()

    def _asked(self, place):
        prompt, new = self.prompts[place]
        body = {"model": self.server.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        connection = HTTPConnection(HOST, self.server.port, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def _events(self, place):
        connection = self._asked(place)
        try:
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {answer.read()[:200]}")
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()


def parted(expected, tokens):
    """By how much less likely than the expected token ours is where two answers part; 0 where they do not."""
    if len(tokens) != len(expected["tokens"]):
        return float("inf")
    return gap_between(expected, {"tokens": [f"token_id:{token}" for token in tokens]})


def memory(group):
    """Bytes that all processes of a process group have in memory."""
    total = 0
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getpgid(int(folder.name)) == group:
                total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return total


def metric(server, name):
    """The sum of a counter of the server."""
    values = re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", server.ask("metrics").decode(), re.MULTILINE)
    return sum(map(float, values))


def quiet(server, seconds=60):
    """Wait until no request is left, also of those given up; whether that came about, with no page in use."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if metric(server, "num_requests_running") + metric(server, "num_requests_waiting") == 0:
            return metric(server, "kv_cache_usage_perc") == 0
        time.sleep(0.5)
    return False


def alone(server, prompts):
    """The answer to each prompt, asked alone."""
    wanted = {"logprobs": CHOICES, "return_tokens_as_token_ids": True}
    return [server.complete(*each, **wanted)["logprobs"] for each in prompts]


def soak(server, prompts, minutes, clients):
    """What was asked, found and used."""
    expected = alone(server, prompts)
    start = time.monotonic()
    workers = [Client(server, prompts, expected, start + 60 * minutes, seed) for seed in range(clients)]
    for worker in workers:
        worker.start()
    used = []
    while any(worker.is_alive() for worker in workers):
        used.append((time.monotonic() - start, memory(server.process.pid)))
        time.sleep(1)
    thirds = [[size for at, size in used if third <= at / (20 * minutes) < third + 1] for third in range(3)]
    first, middle, last = (sum(third) / len(third) for third in thirds)
    counts, gaps = sum((worker.counts for worker in workers), Counter()), [g for w in workers for g in w.gaps]
    wrong = [each for worker in workers for each in worker.wrong]
    is_quiet, last_answers = quiet(server), alone(server, prompts)
    return {
        "minutes": (time.monotonic() - start) / 60,
        "clients": clients,
        "requests": dict(counts),
        "answers": len(gaps),
        "parted_at_a_tie": sum(0 < gap <= TIE for gap in gaps),
        "largest_tie": max((gap for gap in gaps if gap <= TIE), default=0.0),
        "wrong": wrong,
        "wrong_alone_at_the_end": sum(gap_between(*pair) > TIE for pair in zip(expected, last_answers, strict=True)),
        "all_pages_free": is_quiet,
        "preemptions": metric(server, "num_preemptions_total"),
        "prefix_hits": metric(server, "prefix_cache_hits_total"),
        "memory_of_thirds": [first, middle, last],
        "growth": last / middle - 1,
        "memory_by_minute": [size for place, (_, size) in enumerate(used) if place % 60 == 0],
        "alive": server.process.poll() is None,
    }


def main():
    """Serve SmolLM2, soak, and say whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--stock", action="store_true", help="without AQUA, to compare memory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        model, _, tokenizer, file = export_smollm2(Path(folder))
        log = Path(folder) / "log"
        ours = {} if given.stock else {"projections": file, "setting": SETTING}
        with served(str(model), OPTIONS, log=log, **ours) as server:
            found = soak(server, prompts_of(tokenizer), given.minutes, given.clients) | {"aqua": server.has_aqua}
        errors = [
            line for line in log.read_text(errors="replace").splitlines() if "Traceback" in line or " ERROR " in line
        ]
    found["errors_in_log"] = errors[:20]
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    good = found["alive"] and found["aqua"] != given.stock and found["all_pages_free"] and found["growth"] <= FLAT
    sys.exit(not (good and not found["wrong"] and not found["wrong_alone_at_the_end"] and not errors))


if __name__ == "__main__":
    main()
