# SPDX-License-Identifier: Apache-2.0
"""What AQUA costs in time and memory where it saves nothing yet: calibration and prefill, on this machine.

    python benchmarks/overhead.py smollm2 --json overhead.json

Calibration: seconds and peak memory of a pass over 4k and 64k tokens, against the same forward passes alone.
Prefill: one attention layer of the model's shape, and the whole model, at 8k tokens: dense, AQUA, AQUA with an exact
window; the outputs at k_ratio 1 are compared with dense before anything is timed. Each case runs in a process of its
own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

import aqua_attention as aqua
from aqua_attention.calibration import collect
from aqua_attention.capture import attention_layers, innermost_decoder
from aqua_attention.files import write_json
from aqua_attention.ops.api import attention
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.tables import markdown

CALIBRATION_TOKENS, CONTEXT, LENGTH = (4096, 65536), 2048, 8192
WINDOWS = {"no window": (0, 0), "exact 4 + 64": (4, 64)}


def peak() -> int:
    """Largest resident size of this process so far, bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(work: Callable[[], Any], repeats: int = 1) -> dict[str, float]:
    """Best seconds of `repeats` runs, and how far the first run raised the peak memory of the process."""
    before, seconds = peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "added_memory": peak() - before, "peak_memory": peak()}


def calibration(model_name: str, tokens: int, with_statistics: bool) -> dict[str, float]:
    """Forward passes over random tokens, plain or with statistics."""
    model, _ = aqua.load_model(model_name, device="cpu")
    windows = torch.randint(0, model.config.vocab_size, (tokens // CONTEXT, CONTEXT))
    decoder = innermost_decoder(model, attention_layers(model))

    @torch.no_grad()
    def plain() -> None:
        for window in windows:
            decoder(input_ids=window[None], use_cache=False)

    with torch.no_grad():
        decoder(input_ids=windows[:1], use_cache=False)
    return measured((lambda: collect(model, windows)) if with_statistics else plain)


def layer_prefill(shape: tuple[int, int, int], kind: str) -> dict[str, float]:
    """One attention layer at `LENGTH` tokens: rotation of q and k, selection and attention, or dense SDPA."""
    heads, groups, dim = shape
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, LENGTH, dim) for n in (heads, groups, groups))
    rotation = torch.linalg.qr(torch.randn(groups, dim, dim)).Q

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(k_ratio: float = 0.5) -> torch.Tensor:
        sink, recent = WINDOWS[kind]
        config = aqua.AquaConfig(k_ratio=k_ratio, sink=sink, recent=recent)
        q, k = rotate(query, rotation), rotate(key, rotation)
        selected = select_dimensions(q, config, dim, torch.ones(groups, dim))
        return attention(q, k, value, selected, sink=sink, recent=recent, impl="fused")

    if kind == "dense":
        return measured(dense, 3)
    result = measured(ours, 3)
    error = (ours(1.0) - dense()).abs().max()
    if not error < 1e-4:
        raise SystemExit(f"wrong result: AQUA at k_ratio 1 differs from dense by {error:.1e}")
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
    with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=0.5, sink=sink, recent=recent)):
        return measured(forward)


def _shape(model: Any) -> dict[str, Any]:
    from aqua_attention.fingerprint import shape_of

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
        for name, on in (("forward alone", False), ("with statistics", True)):
            cases.append((f"calibration, {tokens} tokens", name, calibration, (options.model, tokens, on)))
    cases += [(f"one layer, {LENGTH} tokens", kind, layer_prefill, (shape, kind)) for kind in kinds]
    cases += [(f"whole model, {LENGTH} tokens", kind, model_prefill, (options.model, kind)) for kind in kinds]

    rows, cells, base = [], [], {}
    spawn = multiprocessing.get_context("spawn")
    for case, name, function, arguments in cases:
        with spawn.Pool(1) as pool:
            figures = pool.apply(function, arguments)
        base.setdefault(case, figures["seconds"])
        ratio = figures["seconds"] / base[case]
        rows.append({"case": case, "setting": name, "ratio": ratio, **figures})
        added, top = figures["added_memory"] / 1e6, figures["peak_memory"] / 1e6
        cells.append([case, name, f"{figures['seconds']:.2f}", f"{ratio:.2f}", f"{added:.0f}", f"{top:.0f}"])
        print("  ".join(cells[-1]), flush=True)
    print("\n" + markdown(["case", "setting", "seconds", "ratio", "added MB", "peak MB"], cells))
    if options.json:
        write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
