# SPDX-License-Identifier: Apache-2.0
"""What AQUA costs in time and memory where it saves nothing yet: calibration and prefill, on this machine.

    python benchmarks/overhead.py smollm2 --json overhead.json

Calibration: a pass over 4k and 64k tokens against the same forward passes alone, and the memory it adds.
Prefill: one attention layer of the model's shape, and the whole model, at 8k tokens: dense, AQUA, AQUA with an exact
window; a layer's output is compared with the reference in the same run. Each case runs in a process of its own, so
that its memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import aqua_attention as aqua
from aqua_attention.calibration.run import collect
from aqua_attention.calibration.statistics import Statistics, merge
from aqua_attention.io.files import write_json
from aqua_attention.model.capture import attention_layers, innermost_decoder
from aqua_attention.ops.api import attention
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.report.tables import markdown

CALIBRATION_TOKENS, CONTEXT, LENGTH = (4096, 65536), 2048, 8192
WINDOWS = {"no window": (0, 0), "exact 4 + 64": (4, 64)}


def status(field: str) -> int:
    """A memory figure of this process in bytes: VmRSS (now) or VmHWM (largest so far). Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measured(work: Callable[[], Any], repeats: int = 1) -> dict[str, float]:
    """Best seconds of `repeats` runs, and how far they raised the memory of the process above where it stood."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before, seconds = status("VmRSS"), []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "added_memory": status("VmHWM") - before, "peak_memory": status("VmHWM")}


def calibration(model_name: str, tokens: int) -> dict[str, float]:
    """A pass over random tokens; each window alone first, then with statistics, so that both see the same machine."""
    model, _ = aqua.load_model(model_name, device="cpu")
    windows = torch.randint(0, model.config.vocab_size, (tokens // CONTEXT, CONTEXT))
    decoder = innermost_decoder(model, attention_layers(model))
    statistics: Statistics = {}
    alone = 0.0

    @torch.no_grad()
    def forward(window: torch.Tensor) -> None:
        decoder(input_ids=window, use_cache=False)

    def both() -> None:
        nonlocal alone, statistics
        for window in windows.split(1):
            start = time.perf_counter()
            forward(window)
            alone += time.perf_counter() - start
            found = collect(model, window)
            statistics = merge(statistics, found) if statistics else found

    forward(windows[:1])
    figures = measured(both)
    with_statistics = figures["seconds"] - alone
    return figures | {"seconds": with_statistics, "alone": alone, "ratio": with_statistics / alone}


def layer_prefill(shape: tuple[int, int, int], kind: str) -> dict[str, float]:
    """One attention layer at `LENGTH` tokens: rotation of q and k, selection and attention, or dense SDPA."""
    heads, groups, dim = shape
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, LENGTH, dim) for n in (heads, groups, groups))
    rotation = torch.linalg.qr(torch.randn(groups, dim, dim)).Q

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(impl: str) -> torch.Tensor:
        sink, recent = WINDOWS[kind]
        config = aqua.AquaConfig.paper(k_ratio=0.5, sink=sink, recent=recent)
        q, k = rotate(query, rotation), rotate(key, rotation)
        selected = select_dimensions(q, LayerPlan.of(rotation, torch.ones(groups, dim), config))
        return attention(q, k, value, selected, sink=sink, recent=recent, impl=impl)

    if kind == "dense":
        return measured(dense, 3)
    result = measured(lambda: ours("fused"), 3)
    error = (ours("fused") - ours("chunked")).abs().max()
    if not error < 1e-4:
        raise SystemExit(f"wrong result: AQUA through fused kernels differs from the reference by {error:.1e}")
    return result


def model_prefill(model_name: str, kind: str) -> dict[str, float]:
    """The whole model (without its head) at `LENGTH` tokens."""
    model, _ = aqua.load_model(model_name, device="cpu")
    tokens = torch.randint(0, model.config.vocab_size, (1, LENGTH))
    decoder = innermost_decoder(model, attention_layers(model))

    @torch.no_grad()
    def forward() -> None:
        decoder(input_ids=tokens, use_cache=False)

    with torch.no_grad():
        decoder(input_ids=tokens[:, :64], use_cache=False)
    if kind == "dense":
        return measured(forward)
    sink, recent = WINDOWS[kind]
    projections = aqua.Projections.from_statistics(
        collect(model, tokens[:, :256]), {"shape": _shape(model), "key_weights": None}, {}
    )
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, sink=sink, recent=recent)):
        return measured(forward)


def _shape(model: Any) -> dict[str, Any]:
    from aqua_attention.model.fingerprint import shape_of

    return shape_of(model, attention_layers(model))


def main() -> None:
    """Run every case in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    model, _ = aqua.load_model(options.model, device="cpu")
    first = attention_layers(model)[0]
    shape = (first.num_attention_heads, first.num_key_value_heads, first.head_dim)
    del model

    kinds = ["dense", *WINDOWS]
    cases: list[tuple[str, str, Callable[..., dict[str, float]], tuple[Any, ...]]] = []
    for tokens in CALIBRATION_TOKENS:
        cases.append((f"calibration, {tokens} tokens", "to forward alone", calibration, (options.model, tokens)))
    cases += [(f"one layer, {LENGTH} tokens", kind, layer_prefill, (shape, kind)) for kind in kinds]
    cases += [(f"whole model, {LENGTH} tokens", kind, model_prefill, (options.model, kind)) for kind in kinds]

    rows, cells, base = [], [], {}
    spawn = multiprocessing.get_context("spawn")
    for case, name, function, arguments in cases:
        with spawn.Pool(1) as pool:
            figures = pool.apply(function, arguments)
            pool.close()
            pool.join()
        base.setdefault(case, figures["seconds"])
        ratio = figures.get("ratio", figures["seconds"] / base[case])
        rows.append({"case": case, "setting": name, **figures, "ratio": ratio})
        added, top = figures["added_memory"] / 1e6, figures["peak_memory"] / 1e6
        cells.append([case, name, f"{figures['seconds']:.2f}", f"{ratio:.2f}", f"{added:.0f}", f"{top:.0f}"])
        print("  ".join(cells[-1]), flush=True)
    print("\n" + markdown(["case", "setting", "seconds", "ratio", "added MB", "peak MB"], cells))
    if options.json:
        write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
