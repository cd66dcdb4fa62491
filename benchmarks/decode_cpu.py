# SPDX-License-Identifier: Apache-2.0
"""One decoding attention step on a CPU: our kernel in C beside dense attention by torch, checked before it is timed.

python benchmarks/decode_cpu.py --json decode-cpu.json
python benchmarks/decode_cpu.py --length 16384 --select-share 0.1 --score-bits 8 --score-ratio 0.25
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from aqua_attention.bench.decode_cpu import DENSE, measure_decode_cpu
from aqua_attention.bench.problem import OURS
from aqua_attention.config import AquaConfig
from aqua_attention.io.files import write_json
from aqua_attention.machine import Shape
from aqua_attention.report.tables import markdown

SHAPES = [(32, 8, 128), (9, 3, 64)]
"""Query heads, key-value heads, head_dim."""
RATIOS = (1.0, 0.75, 0.5, 0.25)
DTYPES = ("float32", "bfloat16")


def chosen_by(options: argparse.Namespace) -> list[float]:
    """What says how many tokens are read: shares of them, then of the softmax."""
    return [*(options.select_share or []), *(options.select_p or [])]


def settings(options: argparse.Namespace, length: int) -> tuple[AquaConfig, ...]:
    """Those that choose tokens, in the order of `chosen_by`."""
    given = {"k_ratio": options.score_ratio, "score_bits": options.score_bits}
    shares = [{"select_tokens": max(1, round(share * length))} for share in options.select_share or []]
    return tuple(
        replace(OURS, **given | each) for each in [*shares, *({"select_p": p} for p in options.select_p or [])]
    )


def main() -> None:
    """Run all shapes, dtypes and lengths, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--length", type=int, action="append", help="tokens; repeat (default 4096 and 16384)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeat (default both)")
    parser.add_argument("--select-share", type=float, action="append", help="AQUA-Select: tokens read; repeat")
    parser.add_argument("--select-p", type=float, action="append", help="the same by their softmax; repeat")
    parser.add_argument("--score-bits", type=int, default=8, help="of the keys that choose tokens (default 8)")
    parser.add_argument("--score-ratio", type=float, default=0.25, help="of the dimensions that do (default 0.25)")
    options = parser.parse_args()
    rows, cells = [], []
    for dtype in (getattr(torch, name) for name in options.dtype or DTYPES):
        for heads, groups, dim in SHAPES:
            for length in options.length or (4096, 16384):
                shape = Shape(torch.device("cpu"), heads, groups, dim, dtype)
                measured = measure_decode_cpu(shape, length=length, k_ratios=RATIOS, selects=settings(options, length))
                dense = {row["name"]: 1e3 * row["seconds"] for row in measured if row["k_ratio"] is None}
                ours = {row["k_ratio"]: 1e3 * row["seconds"] for row in measured if row["name"] == "aqua"}
                steps = {row["k_ratio"]: 1e3 * row["step_seconds"] for row in measured if row["name"] == "aqua"}
                step = steps[0.5]
                chosen = [(row["read"], 1e3 * row["step_seconds"]) for row in measured if "read" in row]
                best = min(dense.values())
                rows.append({"dtype": str(dtype), "heads": heads, "length": length, "rows": measured})
                cells.append(
                    [f"{str(dtype)[6:]}, {heads}/{groups} heads of {dim}, {length}"]
                    + [f"{dense[name]:.2f}" for name in DENSE]
                    + [f"{ours[ratio]:.2f} ({best / ours[ratio]:.2f})" for ratio in RATIOS]
                    + [f"{step:.2f} ({best / step:.2f})"]
                    + [f"{taken:.2f} ({best / taken:.2f}; {step / taken:.2f}), {read:.0%}" for read, taken in chosen]
                )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ms (to the best dense)")
    titles = ["", *DENSE, *(f"AQUA {ratio}" for ratio in RATIOS), "whole step, 0.5"]
    titles += [f"Select {given:g} (to dense; to the step at 0.5), read" for given in chosen_by(options)]
    print(markdown(titles, cells))
    if options.json:
        write_json(options.json, {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
