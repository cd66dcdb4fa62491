# SPDX-License-Identifier: Apache-2.0
"""Decoding in a whole vLLM engine, stock against AQUA: a Llama of random weights, one process for each setting.

Prompts of random tokens are put into the prefix cache first, and then asked for again. So what is timed is decoding
alone: from the first token of a request to its last. A batch that does not fit the cache is cut to the largest that
does, and settings with more room get the stock engine's batch as well as their own. Weights are vLLM's dummies, so
answers mean nothing here: `tests/serve` compares those.

python benchmarks/serve_engine.py --json serve_engine.json
python benchmarks/serve_engine.py --size 1x8192 --layers 8 --only stock --only 'k_ratio 0.5' --profile
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from aqua_attention.bench.server import check_vllm, environment_of, reason_in
from aqua_attention.io.files import write_json
from aqua_attention.report.tables import markdown
from aqua_attention.vllm.settings import INT8

SETTINGS = {
    "stock": (None, {}),
    "stock, fp8": (None, {"kv_cache_dtype": "fp8"}),
    "k_ratio 0.5": ({"k_ratio": 0.5}, {}),
    "k_ratio 0.5, int8": ({"k_ratio": 0.5, "bits": 8}, {"kv_cache_dtype": INT8}),
    "select_p 0.95": ({"k_ratio": 0.25, "select_p": 0.95, "score_bits": 8}, {}),
    "s_ratio 0.25": ({"k_ratio": 1.0, "s_ratio": 0.25, "sink": 0, "recent": 0}, {}),
}
SIZES = ["1x8192", "8x8192", "32x8192", "1x32768", "8x32768", "32x32768"]
QUICK = ["1x8192", "32x8192", "8x32768"]
MARK = "MEASURED "
PROFILED, KERNELS = 32, 12
"""Tokens of the answers that are profiled, whose prompts are in the cache; kernels that are named."""


def main():
    """Measure each setting in a process of its own, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="sequences x tokens, as 32x32768; repeat for several")
    parser.add_argument("--quick", action="store_true", help="three sizes and one round")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2, help="the fastest of so many counts")
    parser.add_argument("--layers", type=int, default=32, help="fewer leave more room for tokens")
    parser.add_argument("--memory", type=float, default=0.92, help="gpu_memory_utilization")
    parser.add_argument("--only", action="append", help="a setting by its name; repeat for several")
    parser.add_argument(
        "--set", action="append", default=[], help="a constant of our kernels, as paged_decode.WARPS=8; repeat"
    )
    parser.add_argument("--profile", action="store_true", help="also say which kernels take the time of a step")
    parser.add_argument("--engine", default="{}", help="options of the engine as JSON")
    parser.add_argument("--logs", type=Path, help="a folder for the engines' logs")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return measure(json.loads(given.one))
    check_vllm()
    if unknown := set(given.only or ()) - SETTINGS.keys():
        parser.error(f"no setting is called {', '.join(unknown)}: there are {'; '.join(SETTINGS)}")
    sizes = [tuple(map(int, size.split("x"))) for size in given.size or (QUICK if given.quick else SIZES)]
    with tempfile.TemporaryDirectory() as folder:
        folder, logs = Path(folder), given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        make(folder, given.layers)
        engine = {"gpu_memory_utilization": given.memory, "max_num_seqs": max(batch for batch, _ in sizes)}
        engine |= {"max_model_len": max(length for _, length in sizes) + given.new, "max_num_batched_tokens": 8192}
        engine |= json.loads(given.engine)
        asked = {"new": given.new, "rounds": 1 if given.quick else given.rounds, "model": str(folder / "model")}
        asked |= {"set": given.set, "profile": given.profile}
        results, wanted = [], sizes
        for name in given.only or SETTINGS:
            config, options = SETTINGS[name]
            request = asked | {"sizes": wanted, "ours": config is not None, "engine": engine | options}
            start = time.monotonic()
            found = run(request, config, folder / "projections.safetensors", logs / f"{name.replace(', ', '-')}.log")
            results += [{"name": name, **row} for row in found]
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
            # Of what the first has no room for, also the batch that it had.
            if found and wanted is sizes:
                wanted = list(dict.fromkeys([*((row["batch"], row["length"]) for row in found), *sizes]))
            if given.json:
                write_json(given.json, {"layers": given.layers, "results": results})
    show(results)


def make(folder, layers):
    """The model's folder, without weights, and a file of random projections."""
    import torch
    from transformers import LlamaConfig

    from aqua_attention.bench.random_llama import LLAMA_8B
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.calibration.statistics import LayerStatistics

    shape = LLAMA_8B | {"num_hidden_layers": layers}
    LlamaConfig(
        **shape, architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False
    ).save_pretrained(folder / "model")
    heads, kv_heads, dim = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    torch.manual_seed(0)
    statistics = {
        layer: LayerStatistics.of(*(torch.randn(1, count, 2 * dim, dim) for count in (heads, kv_heads)))
        for layer in range(layers)
    }
    fits = {"model_type": "llama", "layers": [[layer, heads, kv_heads, dim] for layer in range(layers)]}
    identity = {"name": "random", "shape": fits, "key_weights": None}
    Projections.from_statistics(statistics, identity, {"tokens": 2 * dim}).save(folder / "projections.safetensors")


def run(request, config, projections, log):
    """What a process with one engine measures; its log is shown where it fails."""
    environment = environment_of(None if config is None else projections, config)
    command = [sys.executable, __file__, "--one", json.dumps(request)]
    with log.open("wb") as file:
        done = subprocess.run(
            command,
            # In one process, where its steps can be timed.
            env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    text = log.read_text(errors="replace")
    found = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    if done.returncode:
        print(f"failed ({reason_in(log)}); the end of its log:\n{text[-3000:]}", flush=True)
    return [json.loads(line) for line in found]


def measure(request):
    """One engine: each size, a line of JSON for each."""
    from vllm import LLM, SamplingParams

    for name, value in (each.split("=") for each in request["set"]):
        module, constant = name.split(".")
        module = import_module(f"aqua_attention.ops.backends.triton.{module}")
        assert hasattr(module, constant), name
        setattr(module, constant, int(value))
    if request["ours"]:
        from aqua_attention.vllm.plugin import backend_name

        request["engine"]["attention_backend"] = backend_name()
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": True, "seed": 0}
    llm = LLM(request["model"], disable_log_stats=False, **options | request["engine"])
    cache, new = llm.llm_engine.vllm_config.cache_config, request["new"]
    capacity, done = cache.num_gpu_blocks * cache.block_size, set()

    def ask(prompts, tokens):
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.monotonic()
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.monotonic() - start, answers

    for batch, length in request["sizes"]:
        batch = min(batch, capacity // (length + new + 2 * cache.block_size))
        if batch == 0 or (batch, length) in done:
            continue
        done.add((batch, length))
        # The beginnings of longer prompts are the shorter ones, which the cache has already.
        prompts = [random.Random(place).choices(range(1000, 100_000), k=length) for place in range(batch)]
        seconds, answers = ask(prompts, 1)
        filled = sum(length - answer.num_cached_tokens for answer in answers)
        steps = []
        for _ in range(request["rounds"]):
            _, answers = ask(prompts, new)
            times = [answer.metrics for answer in answers]
            each = sorted((time.last_token_ts - time.first_token_ts) / (new - 1) for time in times)
            steps.append(each[len(each) // 2])
        row = {"batch": batch, "length": length, "new": new, "capacity": capacity, "step_seconds": min(steps)}
        row |= {"steps": steps, "tokens_per_second": batch / min(steps), "filled": filled, "fill_seconds": seconds}
        row["cached"] = sum(answer.num_cached_tokens for answer in answers) / (batch * length)
        if request["profile"]:
            row["kernels"] = kernels_of(lambda prompts=prompts: ask(prompts, PROFILED), PROFILED - 1)
        print("\n" + MARK + json.dumps(row), flush=True)


def kernels_of(run, steps):
    """Microseconds and launches of the kernels of a step that take longest, over all layers."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    found = [each for each in profiled.key_averages() if each.device_type == DeviceType.CUDA]
    found.sort(key=lambda each: each.self_device_time_total, reverse=True)
    return [[each.key[:70], each.self_device_time_total / steps, each.count / steps] for each in found[:KERNELS]]


def show(results):
    """A table, each row beside the first setting's of the same size, where there is one."""
    first = {(each["batch"], each["length"]): each for each in reversed(results) if each["name"] == results[0]["name"]}
    rows = []
    for each in results:
        size = each["batch"], each["length"]
        speed, room = (
            f"{each[key] / first[size][key]:.2f}" if size in first else "" for key in ("tokens_per_second", "capacity")
        )
        figures = [f"{each['tokens_per_second']:.0f}", speed, f"{1e3 * each['step_seconds']:.2f}"]
        rows.append([f"{size[0]} x {size[1]}", each["name"], *figures, f"{each['capacity']:,}", room])
    rows.sort(key=lambda row: [int(part) for part in row[0].split(" x ")])
    titles = ["batch x tokens", "engine", "tokens a second", "to the first", "ms a step", "room for tokens"]
    print(markdown([*titles, "to the first"], rows))
    for each in results:
        if each.get("kernels"):
            print(f"\n{each['name']}, {each['batch']} x {each['length']}: kernels of a step\n")
            print(
                markdown(["kernel", "us", "launches"], [[k, f"{us:.1f}", f"{n:.1f}"] for k, us, n in each["kernels"]])
            )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
