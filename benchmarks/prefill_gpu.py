# SPDX-License-Identifier: Apache-2.0
"""Prefill of one attention layer on a GPU: AQUA against the fastest dense kernel of torch, checked before it is timed.

python benchmarks/prefill_gpu.py --json prefill.json
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

import aqua_attention as aqua
from aqua_attention.io.files import write_json
from aqua_attention.ops.api import attend, rotate
from aqua_attention.ops.backend import choose
from aqua_attention.ops.backends.triton.rotate import rotate_and_narrow
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate as select_rotate
from aqua_attention.ops.select import select_dimensions
from aqua_attention.report.tables import markdown

HEADS, GROUPS, DIM = 32, 8, 128
CHECKED_QUERIES = 256
TOLERANCE = 3.0
"""A result may be so many times as far from float64 as the reference in bfloat16 is."""


def check(name, plan, query, key, value):
    """The first and last queries against float64, on the choices and the rounded states of the kernels."""
    rotated = rotate_and_narrow(query, plan, plan.scaling)[0]
    turned_key = rotate(key, plan.rotation)
    for turned, states in ((rotated, query), (turned_key, key)):
        exact = select_rotate(states, plan.rotation)
        if not float((turned.float() - exact.float()).norm() / exact.float().norm()) <= torch.finfo(turned.dtype).eps:
            raise SystemExit("wrong result: the kernel rotates otherwise than the reference")
    output = attend(plan.call(query, turned_key, value), plan, impl="triton").output
    for part in (slice(CHECKED_QUERIES), slice(-CHECKED_QUERIES, None)):
        seen = slice(None if part.start else part.stop)
        states = rotated[:, :, part], turned_key[:, :, seen], value[:, :, seen]
        check_part(name, plan, output[:, :, part], states)


def check_part(name, plan, found, states):
    """Queries at the end of their keys against float64."""
    selected = select_dimensions(states[0], plan)
    plain, exact = [], []
    for group in range(GROUPS):  # a few heads at a time, for the memory of float64
        heads, one = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS), slice(group, group + 1)
        for results, dtype in ((plain, torch.bfloat16), (exact, torch.float64)):
            given = states[0][:, heads], states[1][:, one], states[2][:, one]
            given = [each.to(dtype) for each in given]
            results.append(attention_reference(*given, selected[:, heads], sink=plan.sink, recent=plan.recent).double())
    plain, exact = torch.cat(plain, 1), torch.cat(exact, 1)
    error, limit = float((found.double() - exact).norm()), TOLERANCE * float((plain - exact).norm())
    if not error <= limit:
        raise SystemExit(f"wrong result: {name} is {error:.2e} from float64, {limit:.2e} is allowed")


def main() -> None:
    """Run 8k and 32k tokens, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--length", type=int, action="append", help="tokens; repeat (default 8192 and 32768)")
    options = parser.parse_args()
    rows, cells = [], []
    for length in options.length or (8192, 32768):
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, n, length, DIM, device="cuda", dtype=torch.bfloat16) for n in (HEADS, GROUPS, GROUPS)
        )
        rotation = torch.linalg.qr(torch.randn(GROUPS, DIM, DIM)).Q.contiguous().cuda()
        rms = torch.rand(GROUPS, DIM, device="cuda") + 0.1

        def ours(plan: LayerPlan, query=query, key=key, value=value):
            return attend(plan.call(query, rotate(key, plan.rotation), value), plan)

        def dense(backend: SDPBackend, query=query, key=key, value=value):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        runs = {
            f"dense, {name}": lambda backend=backend: dense(backend)
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION))
        }
        for ratio in (0.75, 0.5, 0.25):
            for share in ("head", "group"):
                for window in ((0, 0), (4, 64)):
                    config = aqua.AquaConfig(
                        k_ratio=ratio, selection="weighted", share=share, sink=window[0], recent=window[1]
                    )
                    name = f"k_ratio {ratio}, {share}" + (", exact 4 + 64" if sum(window) else "")
                    plan = LayerPlan.of(rotation, rms, config)
                    if choose(plan.call(query, key, value), plan).name != "triton":
                        raise SystemExit("the kernels do not take this call")
                    check(name, plan, query, key, value)
                    runs[name] = lambda plan=plan: ours(plan)
        times, peaks = {}, {}
        for name, run in runs.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peaks[name] = torch.cuda.max_memory_allocated() - before
            times[name] = do_bench(run, return_mode="median")
        base = min(time for name, time in times.items() if name.startswith("dense"))
        for name, time in times.items():
            rows.append(
                {"length": length, "setting": name, "ms": time, "speed": base / time, "added_bytes": peaks[name]}
            )
            cells.append([str(length), name, f"{time:.2f}", f"{base / time:.2f}", f"{peaks[name] / 1e6:.0f}"])
    print(torch.cuda.get_device_name(), torch.__version__)
    print(markdown(["tokens", "setting", "ms", "speed to the best dense", "added MB"], cells))
    if options.json:
        write_json(options.json, {"device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
