# SPDX-License-Identifier: Apache-2.0
"""One decoding attention step on a CPU: our kernel in C beside dense attention by torch, checked before it is timed.

python benchmarks/decode_cpu.py --json decode-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import aqua_attention as aqua
from aqua_attention.files import write_json
from aqua_attention.ops.cpu.decode import decode
from aqua_attention.ops.cpu.prepare import prepare
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import select_dimensions
from aqua_attention.ops.tiled import TILE, TiledCache
from aqua_attention.tables import markdown

SHAPES = [(32, 8, 128), (9, 3, 64)]
"""Query heads, key-value heads, head_dim."""
RATIOS = (1.0, 0.75, 0.5, 0.25)
SINK, RECENT, RUNS = 4, 64, 30
TOLERANCE = 4.0
"""A result may be so many times as far from float64 as the reference in the same dtype is."""


def milliseconds(runs: dict) -> dict:
    """Median time of each, all of them in turn, so that a slow moment of the machine slows all."""
    times = {name: [] for name in runs}
    for _ in range(RUNS + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found[2:]) for name, found in times.items()}


def check(name, found, query, key, value, selected=None, **window):
    """Against float64, with the error of the reference in the same dtype as yardstick."""
    exact = attention_reference(query.double(), key.double(), value.double(), selected, **window)
    plain = attention_reference(query, key, value, selected, **window).double()
    limit = TOLERANCE * float((plain - exact).norm()) + 1e-6 * float(exact.norm())
    error = float((found.double().reshape(exact.shape) - exact).norm())
    if not error <= limit:
        raise SystemExit(f"wrong result: {name} is {error:.2e} from float64, {limit:.2e} is allowed")


def main() -> None:
    """Run all shapes, dtypes and lengths, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--length", type=int, action="append", help="tokens; repeat (default 4096 and 16384)")
    options = parser.parse_args()
    rows, cells = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for heads, groups, dim in SHAPES:
            for length in options.length or (4096, 16384):
                torch.manual_seed(0)
                query, key, value = (
                    torch.randn(1, n, size, dim).to(dtype)
                    for n, size in ((heads, 1), (groups, length), (groups, length))
                )
                packed = query.view(1, groups, heads // groups, dim)
                cache = TiledCache(1, groups, dim, dim, length + TILE, dtype, "cpu")
                cache.fill(key, value, torch.tensor([length]))
                rotation, rms = torch.eye(dim).expand(groups, dim, dim).contiguous(), torch.rand(groups, dim) + 0.1
                new = torch.randn(2, 1, groups, dim).to(dtype)
                runs = {
                    "SDPA": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                    "SDPA, packed": lambda q=packed, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
                    "matmul": lambda q=packed, k=key, v=value, d=dim: (
                        ((q @ k.transpose(-1, -2)) * d**-0.5).softmax(-1) @ v
                    ),
                }
                for name, run in runs.items():
                    check(name, run(), query, key, value)
                for ratio in RATIOS:
                    config = aqua.AquaConfig(k_ratio=ratio, selection="weighted", share="group")
                    given = query[:, :, 0], new[0], new[1]

                    def step(config=config, given=given, cache=cache, rotation=rotation, rms=rms):
                        turned, chosen = prepare(*given, cache, rotation, rms, config)
                        return decode(turned, chosen, cache, sink=SINK, recent=RECENT), turned, chosen

                    _, turned, chosen = step()
                    cache.fill(key, value, torch.tensor([length]))

                    def attend(turned=turned, chosen=chosen, cache=cache):
                        return decode(turned, chosen, cache, sink=SINK, recent=RECENT)

                    selected = select_dimensions(turned[:, :, None], config, dim, rms)
                    check(
                        f"k_ratio {ratio}", attend(), turned[:, :, None], key, value, selected, sink=SINK, recent=RECENT
                    )
                    runs[f"AQUA {ratio}"] = attend
                    runs[f"step {ratio}"] = step
                times = milliseconds(runs)
                best = min(time for name, time in times.items() if not name.startswith(("AQUA", "step")))
                rows.append({"dtype": str(dtype), "heads": heads, "length": length, "ms": times, "best_dense": best})
                cells.append(
                    [f"{str(dtype)[6:]}, {heads}/{groups} heads of {dim}, {length}"]
                    + [f"{times[name]:.2f}" for name in ("SDPA", "SDPA, packed", "matmul")]
                    + [f"{times[f'AQUA {r}']:.2f} ({best / times[f'AQUA {r}']:.2f})" for r in RATIOS]
                    + [f"{times['step 0.5']:.2f} ({best / times['step 0.5']:.2f})"]
                )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ms (to the best dense)")
    titles = ["", "SDPA", "packed", "matmul", *(f"AQUA {ratio}" for ratio in RATIOS), "whole step, 0.5"]
    print(markdown(titles, cells))
    if options.json:
        write_json(options.json, {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
