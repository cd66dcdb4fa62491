# SPDX-License-Identifier: Apache-2.0
"""Time of one decoded token against the length of the cache: dense and AQUA, to see that neither grows faster.

    python benchmarks/decode_growth.py --json growth.json

A model of SmolLM2-135M's shape with random weights and long positions; caches are filled with random states. Steps of
all settings alternate, and the best of each counts. First every setting is checked against the same tokens at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.progress import track
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import aqua_attention as aqua
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.run import collect
from aqua_attention.io.files import write_json
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest, shape_of
from aqua_attention.report.tables import describe_setting

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32768,
    "initializer_range": 0.05,
}
CONFIGS = [
    None,
    aqua.AquaConfig.paper(k_ratio=0.5),
    aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", sink=4, recent=64),
    aqua.AquaConfig.paper(k_ratio=0.5, bits=8),
    aqua.AquaConfig.paper(k_ratio=0.5, bits=4),
    aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25, sink=4, recent=64),
    aqua.AquaConfig.paper(k_ratio=0.5, h2o_ratio=0.5),
    aqua.AquaConfig.paper(k_ratio=1.0, share="group", sink=4, recent=64),
    aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64),
]
"""Those shared by a group have a cache of fixed size for the decoding kernel."""
ROOM = 1024
"""Tokens beyond the first ones, for the steps."""


def main() -> None:
    """Parse the command line, check, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, action="append", help="tokens in the cache; repeat (1024 4096 16384)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    lengths = options.length or [1024, 4096, 16384]

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(options.device, getattr(torch, options.dtype))
    layers = attention_layers(model)
    identity = {"shape": shape_of(model, layers), "key_weights": key_weight_digest(layers)}
    sums = collect(model, torch.randint(0, SHAPE["vocab_size"], (2, 512)))
    projections = Projections.from_statistics(sums, identity, {})
    check(model, projections)

    seconds = {}
    for length in track(lengths, console=Console(stderr=True)):
        best = [float("inf")] * len(CONFIGS)
        caches = [filled(model, projections, config, length) for config in CONFIGS]
        for _ in range(options.steps):
            for place, (config, cache) in enumerate(zip(CONFIGS, caches, strict=True)):
                best[place] = min(best[place], step(model, projections, config, cache))
        seconds[length] = best
    names = ["dense", *(f"AQUA, {describe_setting(config.to_dict())}" for config in CONFIGS[1:])]
    first = seconds[lengths[0]]
    print("| setting | " + " | ".join(f"{length} tokens" for length in lengths) + " | growth | to dense's |")
    print("|---|" + "---|" * (len(lengths) + 2))
    rows = []
    for place, name in enumerate(names):
        times = [seconds[length][place] for length in lengths]
        growth, dense_growth = times[-1] - first[place], seconds[lengths[-1]][0] - first[0]
        rows.append({"setting": name, "seconds": times, "growth_ratio": growth / dense_growth})
        cells = " | ".join(f"{1000 * each:.1f} ms" for each in times)
        print(f"| {name} | {cells} | {1000 * growth:+.1f} ms | {growth / dense_growth:.2f} |")
    if options.json:
        write_json(options.json, {"lengths": lengths, "dtype": options.dtype, "device": options.device, "rows": rows})


def attached(model, projections, config):
    """AQUA by `config`, or nothing for None."""
    return nullcontext() if config is None else aqua.apply(model, projections, config)


def new_cache(model, attachment, length):
    """A growing one, or one in the kernel's layout where dimensions are shared."""
    if attachment is None or attachment.config.share != "group":
        return DynamicCache(config=model.config)
    return attachment.new_cache(max_length=length, layout="tiled")


@torch.no_grad()
def check(model, projections) -> None:
    """The gate: one token after 199 cached ones is what 200 tokens at once give."""
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 200), device=model.device)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    for config in CONFIGS:
        if config is not None and config.h2o_ratio < 1:
            config = dataclasses.replace(config, recent=256)  # so many stay that nothing is lost
        with attached(model, projections, config) as attachment:
            cache = new_cache(model, attachment, 200)
            model(input_ids=tokens[:, :199], past_key_values=cache)
            found = model(input_ids=tokens[:, 199:], past_key_values=cache).logits[0, -1].float()
            expected = model(input_ids=tokens, past_key_values=DynamicCache(config=model.config)).logits[0, -1].float()
        difference = float((found - expected).norm() / expected.norm())
        limit = tolerance if config is None or config.bits is None else 0.1
        assert difference < limit, f"{config}: the cached step differs by {difference:.1e}"


@torch.no_grad()
def filled(model, projections, config, length) -> Cache:
    """A cache of `length` random tokens."""
    with attached(model, projections, config) as attachment:
        cache = new_cache(model, attachment, length + ROOM)
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
        for index in range(SHAPE["num_hidden_layers"]):
            states = torch.randn(2, 1, 3, length - 1, 64, dtype=model.dtype, device=model.device)
            cache.update(states[0], states[1], index)
            if isinstance(cache.layers[index], TiledLayer):
                cache.layers[index].store(None)
    return cache


@torch.no_grad()
def step(model, projections, config, cache) -> float:
    """Seconds of one decoded token, after another that finds everything attached."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with attached(model, projections, config):
        model(input_ids=token, past_key_values=cache)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(input_ids=token, past_key_values=cache)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
