# SPDX-License-Identifier: Apache-2.0
"""A results folder written by hand: every suite, with made-up figures of plausible shape."""

from __future__ import annotations

import hashlib
import json
import math

from aqua_attention.config import AquaConfig

MODEL = "tiny"
OPTIONS = {"data": "builtin:evaluation", "context": 2048, "tokens": 8192}
SAID = {"model": MODEL, "command": "aqua eval", "version": "0.1.0", "projections_sha256": "0" * 64}
"""What a command's file says of how it was made."""
OURS = {"selection": "weighted", "sink": 4, "recent": 64}
DENSE = {"perplexity": 20.0, "tokens": 8188}


def record(suite, config, result=None, *, error=None, options=OPTIONS, **changes):
    """One record as the grid writes it; `config` is an AquaConfig or None for dense."""
    fields = {
        "schema": 1,
        "suite": suite,
        "command": f"aqua eval grid results tiny -p tiny.safetensors --suite {suite}",
        "model": MODEL,
        "config": config and config.to_dict(),
        "basis": "aqua",
        "options": options,
        "projections_sha256": "0" * 64,
        "text_sha256": "1" * 64,
        "commit": "2" * 40,
        "version": "0.1.0",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
    }
    return fields | ({"error": error} if error else {"result": result}) | changes


def losses(ratio, factor=1.0, kept=1.0):
    """Perplexity and its company at a share of dimensions."""
    change = factor * (1 - ratio) ** 4
    return {
        "perplexity": DENSE["perplexity"] * (1 + change),
        "perplexity_change": change,
        "kl": 0.4 * change,
        "top1": 1 - 0.2 * (1 - ratio),
        "mean_k": ratio * kept,
        "mean_k_per_layer": [ratio * kept] * 4,
        "tokens": 8188,
        "dense": DENSE,
        "scored": "all",
    }


def settings():
    """Pairs of a configuration and its result."""
    pairs = []
    for ratio in (1.0, 0.75, 0.5, 0.25):
        pairs.append((AquaConfig.paper(k_ratio=ratio), losses(ratio, 3.0)))
        pairs.append((AquaConfig.paper(k_ratio=ratio, **OURS), losses(ratio, 0.2)))
        pairs.append((AquaConfig.paper(k_ratio=ratio, share="group", **OURS), losses(ratio, 0.5)))
    for ratio in (0.25, 0.5):
        pairs.append((AquaConfig.paper(k_ratio=1, s_ratio=ratio, **OURS), losses(1 - ratio, 0.8)))
    for bits in (8, 4):
        pairs.append((AquaConfig.paper(k_ratio=1, bits=bits, **OURS), losses(bits / 10)))
        pairs.append((AquaConfig.paper(k_ratio=1, bits=bits, h2o_ratio=0.5, **OURS), losses(bits / 20)))
    for bound in (0.05, 0.1, 0.2):
        uneven = losses(0.7 - bound, 0.3) | {"mean_k_per_layer": [0.2, 0.5, 0.6, 0.7 - bound]}
        pairs.append((AquaConfig.paper(logit_error=bound, **OURS), uneven))
    return pairs


def retrieval(key, columns, depths, share):
    """A needle's or lines' result, in which `share(column, depth)` of ten questions are right."""
    cells = [
        {key: column, "depth": depth, "right": round(10 * share(column, depth)), "asked": 10}
        for column in columns
        for depth in depths
    ]
    right, asked = (sum(cell[name] for cell in cells) for name in ("right", "asked"))
    return {"cells": cells, "right": right, "asked": asked, "lost": 3, "gained": 1, "p_value": 0.625}


def ruler(length_costs):
    """RULER's result: three tasks at two lengths, ten questions each, right in part."""
    tasks, lengths = ("niah_single_1", "vt", "cwe"), (4096, 8192)
    cells = [
        {"task": task, "length": length, "right": round(10 - place - length_costs * length / 4096, 4), "asked": 10}
        for place, task in enumerate(tasks)
        for length in lengths
    ]
    right, asked = (sum(cell[name] for cell in cells) for name in ("right", "asked"))
    return {"cells": cells, "right": right, "asked": asked, "lost": 3, "gained": 1, "p_value": 0.625}


def choice():
    """What `benchmarks/select_curves.py` writes: two lengths, four methods by p and two with a fixed number."""

    def row(method, budget, share, costs):
        scored = 0.0 if method == "oracle" else 0.066
        layers = [share * factor for factor in (2.0, 1.0, 0.5, 0.5)]
        figures = {"method": method} | budget | {"tokens_read": share, "bytes_read": share + scored}
        figures |= {"kl": costs, "perplexity": 20 * (1 + costs), "perplexity_change": costs, "top1": 1 - costs}
        figures |= {"tokens_read_per_layer": layers, "bytes_read_per_layer": [each + scored for each in layers]}
        held = budget.get("select_p", 1 - share) - costs / 4
        figures |= dict.fromkeys(("mass", "mass_expected", "mass_decided"), held)
        figures |= {f"{name}_per_layer": [held] * 4 for name in ("mass", "mass_expected", "mass_decided")}
        return figures | {"mass_decided_per_layer": [None, held, held, held], "seconds": 1.0}

    def rows(length):
        worse = {"AQUA (svd)": 1.0, "SparQ": 1.5, "Quest": 3.0, "oracle": 0.7}
        found = [
            row(method, {"select_p": p}, min(1.0, factor * 400 / length * (1 - p) ** -0.3), factor * (1 - p) / 9)
            for method, factor in worse.items()
            for p in (0.8, 0.9, 0.95, 0.99)
        ]
        return found + [
            row(f"{method}, fixed", {"select_tokens": int(share * length)}, share, worse[method] * 0.002 / share)
            for method in ("AQUA (svd)", "oracle")
            for share in (0.02, 0.05, 0.1, 0.2)
        ]

    of_length = [
        {"data": "wiki.txt", "context": length, "tokens": 16384, "text_sha256": "1" * 64, "rows": rows(length)}
        for length in (8192, 16384)
    ]
    return SAID | {"schema": 1, "suite": "select", "dtype": "float32", "device": "GPU", "results": of_length}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def transfer(calibrated, tested, config, factor, *, distance=0.5, text="", seed=0):
    """One cell; another `text` makes other texts of the same names."""
    first, second = f"{calibrated}{text}", f"{tested}{text}"
    source = {"name": calibrated, "text_sha256": digest(first), "tokens": 8192, "context": 2048, "seed": seed}
    options = {
        "calibrated": source | {"data": f"{first}.txt"},
        "tested": {"name": tested, "data": f"{second}.txt"},
        "context": 2048,
        "tokens": 4096,
    }
    names = {"calibrated": calibrated, "tested": tested, "distance": distance, "calibration_tokens": 8192}
    result = losses(config.k_ratio, factor) | names
    return record("transfer", config, result, options=options, text_sha256=digest(f"test of {second}"), seed=seed)


def context(calibrated, tested, tokens, config, factor, *, seed=0, tested_tokens=8192):
    """One cell, calibrated on so many tokens."""
    source = {"name": "wiki", "text_sha256": digest("wiki"), "tokens": tokens, "context": calibrated, "seed": seed}
    options = {"data": "test.txt", "calibrated": source, "context": tested, "tokens": tested_tokens}
    lengths = {"calibrated_length": calibrated, "tested_length": tested, "calibration_tokens": tokens}
    return record("context", config, losses(config.k_ratio, factor) | lengths, options=options, seed=seed)


def records():
    """Of every suite some."""
    made = [record("perplexity", None, losses(1.0) | DENSE)]
    made += [record("perplexity", config, result) for config, result in settings()]
    half, ours = AquaConfig.paper(k_ratio=0.5), AquaConfig.paper(k_ratio=0.5, **OURS)
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    for config, loss in ((None, 0.0), (half, 0.4), (ours, 0.1)):
        needle = retrieval("length", (1024, 2048, 4096), depths, lambda n, d, loss=loss: 1 - loss * d * n / 4096)
        made.append(record("needle", config, needle, options={"data": "builtin:evaluation", "lengths": [1024]}))
        lines = retrieval("lines", (50, 100, 200), (None,), lambda n, _, loss=loss: 0.9 - loss * n / 200)
        made.append(record("lines", config, lines, options={}))
        made.append(record("ruler", config, ruler(loss), options={"data": "builtin:evaluation"}))
    for selection, worse in (("static", 2.0), ("magnitude", 1.2), ("weighted", 1.0)):
        for ratio in (0.25, 0.5, 0.75):
            heads = [[worse * (1 - ratio) ** 2 * (1 + layer + head) / 12 for head in range(8)] for layer in range(4)]
            result = {
                "selection": selection,
                "k_ratio": ratio,
                "score_loss": 0.3 * worse * (1 - ratio) ** 2,
                "softmax_loss": 0.5 * worse * (1 - ratio) ** 2,
                "per_layer": [
                    {"layer": layer, "score_loss": values, "softmax_loss": values} for layer, values in enumerate(heads)
                ],
            }
            made.append(record("retention", AquaConfig.paper(k_ratio=ratio, selection=selection), result))
    for task, metric in (("hellaswag", "acc_norm"), ("arc_easy", "acc"), ("truthfulqa", "mc2")):
        result = {"task": task, "metric": metric, "value": 0.41, "stderr": 0.012, "count": 400, "dense": 0.43}
        made.append(
            record("tasks", ours, result | {"lost": 12, "gained": 4, "p_value": 0.0768}, options={"file": task})
        )
    for i, calibrated in enumerate(("english", "हिन्दी", "code")):
        for j, tested in enumerate(("english", "हिन्दी", "code")):
            made.append(transfer(calibrated, tested, half, 1 + abs(i - j), distance=0.1 * abs(i - j)))
    for calibrated in (512, 2048):
        for tested in (512, 2048, 8192):
            for tokens in (4096, 16384):
                far = abs(math.log2(tested / calibrated)) + 4096 / tokens
                made.append(context(calibrated, tested, tokens, half, far))
    refused = {"kind": "error", "message": "length is 9000: the model knows 8192 positions"}
    made.append(record("needle", half, error=refused, options={"lengths": [9000]}))
    memory = {"kind": "out_of_memory", "message": "tried to allocate 12 GiB"}
    return [*made, record("perplexity", AquaConfig.paper(k_ratio=0.9), error=memory)]


def benchmarks():
    """What `aqua bench` and `aqua inspect` write with --json, by file name."""
    shape = {"device": "GPU", "batch": 8, "length": 32768, "heads": 32, "groups": 8, "head_dim": 128}
    shape |= {"dtype": "torch.bfloat16", "read_bandwidth": 3e12}

    def step(name, ratio, seconds, ceiling):
        row = {"name": name, "k_ratio": ratio, "bits": None, "page": None, "seconds": seconds, "bytes": 1e9}
        row |= {"share": 0.9, "ratio": 4e-4 / seconds, "ceiling": ceiling, "step_seconds": 1.1 * seconds}
        return row | {"step_ratio": 0.95 * 4e-4 / seconds, "low_ratio": None, "low_step_ratio": None}

    dense = [step("SDPA cuDNN", None, 4e-4, 1.0), {"name": "FlashInfer", "k_ratio": None, "absent": "not installed"}]
    aqua = [step("aqua", 1.0, 4.1e-4, 1.0), step("aqua", 0.5, 3.1e-4, 1.33), step("aqua, int8", 0.5, 2e-4, 2.5)]
    tokens = [
        {"name": name, "k_ratio": ratio, "bits": None, "seconds": time, "tokens_per_second": 8 / time, "bytes": 2e10}
        | {"ratio": 0.02 / time, "roofline_seconds": 0.015, "share": 0.015 / time}
        for name, ratio, time in (("SDPA flash", None, 0.02), ("aqua", 1.0, 0.021), ("aqua", 0.5, 0.018))
    ]
    model = {"layers": 32, "hidden": 4096, "weight_bytes": 16_000_000_000}
    rows = [
        {"setting": "DynamicCache", "bytes": 10**8, "ratio": 1.0, "peak_bytes": 2 * 10**8, "peak_ratio": 1.0},
        {"setting": "QuantizedCache int8", "absent": "hqq is not installed"},
        {"setting": AquaConfig.paper(bits=8).to_dict() | {"effective_ratio": 0.75}, "bytes": 55 * 10**6, "ratio": 0.55}
        | {"peak_bytes": None, "peak_ratio": None},
    ]
    layers = [
        {"layer": layer, "head_dim": 64, "dims_90": [20 + layer, 24], "dims_99": [40, 50 - layer]} for layer in range(4)
    ]
    served = [
        {"name": name, "k_ratio": ratio, "requests_per_second": 10 * speed, "tokens_per_second": 1280 * speed}
        | {"first_seconds": 0.2, "first_p99_seconds": 0.4, "first_ratio": 1.0, "token_ratio": 1 / speed, "ratio": speed}
        | {"token_seconds": 0.01 / speed, "token_p99_seconds": 0.02, "capacity": 100_000, "capacity_ratio": 1.0}
        for name, ratio, speed in (("vLLM, FLASH_ATTN", None, 1.0), ("AQUA", 0.5, 1.2))
    ]
    small = {"device": "CPU", "heads": 32, "groups": 8, "head_dim": 128, "dtype": "torch.float32"}
    times = [
        {"length": length, "dense": 2e-8 * length + 1e-5, "dense_name": "matmul", "whole": 2e-8 * length + 3e-5}
        | {"aqua": [1.8e-8 * length + 4e-5, 1.5e-8 * length + 4e-5]}
        | {"select": [0.8e-8 * length + 6e-5], "select_short": [2e-8 * length + 5e-5], "read": [0.2]}
        for length in (64, 256, 1024, 4096, 16384)
    ]
    lengths = [
        {"k_ratio": 0.75, "k": 96, "whole": 5000.0, "dense": None, "paper": 1024.0, "theory": 640.0},
        {"k_ratio": 0.5, "k": 64, "whole": 2000.0, "dense": 6000.0, "paper": 512.0, "theory": 320.0},
    ]
    of_choice = {"dense": 4000.0, "dimensions": None, "short": 1000.0, "min_length": 1000, "slowest": 1.25}
    choices = [{"k_ratio": 0.5, "select_p": 0.95, "select_tokens": None, "select_share": None} | of_choice]
    items = {"task": "arc_easy", "metric": "acc", "value": 0.43, "stderr": 0.02, "count": 400}
    paired = {
        "setting": AquaConfig.paper().to_dict(),
        "basis": "aqua",
        "dense": 0.43,
        "lost": 1,
        "gained": 0,
        "p_value": 1.0,
    }
    return {
        "breakeven.json": small | {"rows": times, "breakeven": lengths, "selects": choices, "profile": "profile.json"},
        "tasks.json": {"model": "other", "dense": [items], "rows": [items | paired]},
        "decode.json": {"results": [shape | {"rows": dense + aqua}]},
        "generate.json": {"results": [shape | model | {"rows": tokens}]},
        "serve.json": SAID
        | {"schema": 1, "suite": "serve", "device": "GPU"}
        | {"results": [{"batch": 8, "length": 1024, "new_tokens": 128, "dtype": "bfloat16", "rows": served}]},
        "memory.json": {"length": 8192, "batch": 1, "dtype": "torch.bfloat16", "model": MODEL, "rows": rows},
        "select.json": choice(),
        "spectrum.json": {"model": {"name": MODEL, "shape": {}}, "calibration": {"tokens": 8192}, "layers": layers},
    }


def write(folder, *, values=None, files=None):
    """The folder with records and benchmarks in their places."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for value in records() if values is None else values:
        name = digest(json.dumps(value, sort_keys=True))[:12]
        (folder / "records" / f"{name}.json").write_text(json.dumps(value))
    for name, value in (benchmarks() if files is None else files).items():
        (folder / name).write_text(json.dumps(value))
    return folder
