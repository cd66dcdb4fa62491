# SPDX-License-Identifier: Apache-2.0
"""Prefill of one attention layer on a GPU: AQUA's plain torch path against dense SDPA, checked before it is timed.

python benchmarks/prefill_gpu.py --json prefill.json
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from triton.testing import do_bench

import aqua_attention as aqua
from aqua_attention.files import write_json
from aqua_attention.ops.api import attention
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.tables import markdown

HEADS, GROUPS, DIM = 32, 8, 128


def main() -> None:
    """Run 8k and 32k tokens, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    rows, cells = [], []
    for length in (8192, 32768):
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, n, length, DIM, device="cuda", dtype=torch.bfloat16) for n in (HEADS, GROUPS, GROUPS)
        )
        rotation = torch.linalg.qr(torch.randn(GROUPS, DIM, DIM)).Q.cuda()
        rms = torch.ones(GROUPS, DIM, device="cuda")

        def ours(config: aqua.AquaConfig, impl="fused", query=query, key=key, value=value, rotation=rotation, rms=rms):
            q, k = rotate(query, rotation), rotate(key, rotation)
            selected = select_dimensions(q, config, DIM, rms)
            return attention(q, k, value, selected, sink=config.sink, recent=config.recent, impl=impl)

        def dense(query=query, key=key, value=value):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        settings = {
            "no window": aqua.AquaConfig(k_ratio=0.5),
            "exact 4 + 64": aqua.AquaConfig(k_ratio=0.5, sink=4, recent=64),
        }
        for name, config in settings.items():
            exact = ours(config, impl="chunked").float()
            error = float((ours(config).float() - exact).norm() / exact.norm())
            if not error < 1e-2:
                raise SystemExit(f"wrong result: {name} differs from the reference by {error:.1e}")
        base = do_bench(dense, return_mode="median")
        for name, config in {"dense SDPA": None, **settings}.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _ = dense() if config is None else ours(config)
            peak = torch.cuda.max_memory_allocated() - before
            seconds = base if config is None else do_bench(lambda c=config: ours(c), return_mode="median")
            rows.append(
                {"length": length, "setting": name, "ms": seconds, "speed": base / seconds, "added_bytes": peak}
            )
            cells.append([str(length), name, f"{seconds:.2f}", f"{base / seconds:.2f}", f"{peak / 1e6:.0f}"])
    print(torch.cuda.get_device_name(), torch.__version__)
    print(markdown(["tokens", "setting", "ms", "speed to dense", "added MB"], cells))
    if options.json:
        write_json(options.json, {"device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
