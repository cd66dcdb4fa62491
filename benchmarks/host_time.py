# SPDX-License-Identifier: Apache-2.0
"""What the host does for one decoding step that is not recorded: milliseconds until the last kernel is launched.

    python benchmarks/host_time.py            # a Llama in the shape of Llama-3.1-8B, on a CUDA GPU

The GPU is not waited for. Each row is the median and the fastest of many steps of one sequence; logits at k_ratio 1 are
compared with dense ones first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import StaticCache

import aqua_attention as aqua
from aqua_attention.bench.random_llama import make_model, random_projections
from aqua_attention.io.files import write_json

PROMPT, STEPS, FIRST = 1000, 120, 20
TOLERANCE = 0.1


@torch.no_grad()
def step_seconds(model, cache) -> tuple[torch.Tensor, list[float]]:
    """Logits after the prompt and one token, and host seconds of the steps that follow."""
    generator = torch.Generator(model.device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator, device=model.device)
    model(ids, past_key_values=cache, logits_to_keep=1)
    token, times = ids[:, :1], []
    logits = model(token, past_key_values=cache).logits[:, -1].float()
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(token, past_key_values=cache)
        times.append(time.perf_counter() - start)
    return logits, times[FIRST:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    model = make_model()
    projections, length, rows = random_projections(model), PROMPT + STEPS + 2, []
    expected, times = step_seconds(model, StaticCache(config=model.config, max_cache_len=length))
    rows.append({"name": "transformers, static cache", "median": statistics.median(times), "least": min(times)})
    for ratio in (1.0, 0.5):
        config = aqua.AquaConfig(k_ratio=ratio, selection="weighted", share="group", sink=4, recent=64)
        with aqua.apply(model, projections, config) as attachment:
            logits, times = step_seconds(model, attachment.new_cache(max_length=length, layout="tiled"))
        if ratio == 1 and not (error := float((logits - expected).norm() / expected.norm())) < TOLERANCE:
            raise SystemExit(f"logits at k_ratio 1 are off by {error:.2g}")
        name = f"AQUA, tiled, k_ratio {ratio:g}"
        rows.append({"name": name, "median": statistics.median(times), "least": min(times)})
    for row in rows:
        print(f"{row['name']:28} {1e3 * row['median']:7.2f} ms (fastest {1e3 * row['least']:.2f})")
    if given.json:
        write_json(given.json, {"device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
