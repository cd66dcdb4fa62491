# SPDX-License-Identifier: Apache-2.0
"""One decoding attention step on a CPU: our kernel in C beside dense attention by torch, checked before it is timed.

python benchmarks/decode_cpu.py --json decode-cpu.json
"""

from __future__ import annotations

import argparse

import torch

from aqua_attention.bench.decode_cpu import DENSE, measure_decode_cpu
from aqua_attention.io.files import write_json
from aqua_attention.machine import Shape
from aqua_attention.report.tables import markdown

SHAPES = [(32, 8, 128), (9, 3, 64)]
"""Query heads, key-value heads, head_dim."""
RATIOS = (1.0, 0.75, 0.5, 0.25)


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
                shape = Shape(torch.device("cpu"), heads, groups, dim, dtype)
                measured = measure_decode_cpu(shape, length=length, k_ratios=RATIOS)
                dense = {row["name"]: 1e3 * row["seconds"] for row in measured if row["k_ratio"] is None}
                ours = {row["k_ratio"]: 1e3 * row["seconds"] for row in measured if row["k_ratio"] is not None}
                step = next(1e3 * row["step_seconds"] for row in measured if row["k_ratio"] == 0.5)
                best = min(dense.values())
                rows.append({"dtype": str(dtype), "heads": heads, "length": length, "rows": measured})
                cells.append(
                    [f"{str(dtype)[6:]}, {heads}/{groups} heads of {dim}, {length}"]
                    + [f"{dense[name]:.2f}" for name in DENSE]
                    + [f"{ours[ratio]:.2f} ({best / ours[ratio]:.2f})" for ratio in RATIOS]
                    + [f"{step:.2f} ({best / step:.2f})"]
                )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ms (to the best dense)")
    titles = ["", *DENSE, *(f"AQUA {ratio}" for ratio in RATIOS), "whole step, 0.5"]
    print(markdown(titles, cells))
    if options.json:
        write_json(options.json, {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
