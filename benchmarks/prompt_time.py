# SPDX-License-Identifier: Apache-2.0
"""Time to the first token through a whole model: AQUA's caches against dense attention, on a CUDA GPU.

    python benchmarks/prompt_time.py                               # 1 x 8k, 1 x 32k and 8 x 8k tokens
    python benchmarks/prompt_time.py --prompt 1x8192 --profile     # and what takes the time

The model has the shape of Llama-3.1-8B and random weights. Rows take turns, so that a GPU that gets slower as it gets
warm does so in all of them. Logits at k_ratio 1 are compared with dense ones first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.bench.random_llama import make_model, random_projections
from aqua_attention.io.files import write_json
from aqua_attention.report.tables import markdown

PROMPTS = ("1x8192", "1x32768", "8x8192")
WARM_UPS, RUNS, ROOM, TOLERANCE = 2, 5, 64, 0.1
KERNELS, NAME_WIDTH = 25, 90
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
"""What makes the host wait for the GPU, by the names of torch's profiler."""


class Case(NamedTuple):
    """A row: what is entered around the model, and what makes its cache for a prompt of so many tokens."""

    name: str
    around: AbstractContextManager[Any]
    new_cache: Callable[[int], Any]


def cases(model: Any) -> list[Case]:
    """Dense attention first, then the two of k_ratio 1, which must agree with it."""
    projections = random_projections(model)
    found = [Case("dense, DynamicCache", nullcontext(), lambda length: DynamicCache(config=model.config))]
    for ratio, bits in ((1.0, None), (0.75, None), (0.5, None), (0.5, 8)):
        config = aqua.AquaConfig(
            k_ratio=ratio, selection="weighted", share="group", sink=4, recent=64, min_length=0, bits=bits
        )
        attachment = aqua.apply(model, projections, config)
        setting = f"k_ratio {ratio:g}" + (f", bits {bits}" if bits else "")

        def tiled(length: int, attachment: aqua.Attachment = attachment) -> Any:
            return attachment.new_cache(max_length=length + ROOM, layout="tiled")

        found.append(Case(f"tiled, {setting}", attachment, tiled))
        if ratio != 0.75:
            found.append(Case(f"growing, {setting}", attachment, found[0].new_cache))
    for name, changes in (("", {}), (", decoding", {"select_in": "decoding"})):
        config = aqua.AquaConfig(k_ratio=0.25, select_p=0.95, score_bits=8, **changes)
        attachment = aqua.apply(model, projections, config)
        found.append(Case(f"growing, select_p 0.95{name}", attachment, found[0].new_cache))
    return found


@torch.no_grad()
def run(model: Any, case: Case, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Logits of the first token, and its times in milliseconds.

    `gpu` is between two events, `wall` until all is done, `host` until the model has returned.
    """
    with case.around:
        cache = case.new_cache(ids.shape[1])
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        start.record()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        stop.record()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
    times = {"gpu": start.elapsed_time(stop), "wall": 1e3 * (ended - begun), "host": 1e3 * (returned - begun)}
    return logits[:, -1].float(), times


def check(model: Any, found: list[Case], ids: torch.Tensor) -> None:
    """Leave with an error where AQUA with every dimension is not dense attention."""
    expected = run(model, found[0], ids)[0]
    for case in found[1:3]:
        logits = run(model, case, ids)[0]
        if not (error := float((logits - expected).norm() / expected.norm())) < TOLERANCE:
            raise SystemExit(f"wrong result: logits of {case.name} are off by {error:.2g}")


def measure(model: Any, found: list[Case], ids: torch.Tensor) -> list[dict[str, Any]]:
    """Median times of each case, and their ratios to those of the first."""
    taken: dict[str, list[dict[str, float]]] = {case.name: [] for case in found}
    peaks = {}
    for _ in range(WARM_UPS + RUNS):
        for case in found:
            torch.cuda.reset_peak_memory_stats()
            taken[case.name].append(run(model, case, ids)[1])
            peaks[case.name] = torch.cuda.max_memory_allocated()
    rows = []
    for name, times in taken.items():
        row = {kind: median(one[kind] for one in times[WARM_UPS:]) for kind in times[0]}
        first = rows[0] if rows else row
        ratios = {f"{kind}_ratio": row[kind] / first[kind] for kind in ("gpu", "wall")}
        rows.append({"name": name, "prompt": list(ids.shape)} | row | ratios | {"peak_bytes": peaks[name]})
    return rows


def cells_of(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    times, ratios = (row[kind] for kind in ("gpu", "wall", "host")), (row["gpu_ratio"], row["wall_ratio"])
    numbers = [f"{each:.1f}" for each in times] + [f"{each:.3f}" for each in ratios]
    return [row["name"], *numbers, f"{row['peak_bytes'] / 2**30:.1f}"]


def show_profile(model: Any, case: Case, ids: torch.Tensor) -> None:
    """Print the kernels that take longest, for each layer, and how often the host waits for the GPU."""
    layers = model.config.num_hidden_layers
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run(model, case, ids)
    events = profiled.key_averages()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    total, launched = sum(event.self_device_time_total for event in kernels), sum(event.count for event in kernels)
    print(f"\n{case.name}, {ids.shape[0]} x {ids.shape[1]}: microseconds and launches for each of {layers} layers")
    for event in kernels[:KERNELS]:
        name = " ".join(event.key.split())[:NAME_WIDTH]
        print(f"{event.self_device_time_total / layers:9.1f} {event.count / layers:6.2f}  {name}")
    print(f"{total / layers:9.1f} {launched / layers:6.2f}  all kernels")
    waits = {event.key: event.count for event in events if event.key in WAITS}
    copies = sum(event.count for event in kernels if "DtoH" in event.key)
    print(f"the host waits: {waits}; copies to it: {copies}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", help=f"sequences x tokens; repeat (default {' '.join(PROMPTS)})")
    parser.add_argument("--only", help="measure only dense attention and rows whose name contains this")
    parser.add_argument("--profile", action="store_true", help="also print kernels and waits, of one run of each row")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    model, rows = make_model(), []
    found = cases(model)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for prompt in given.prompt or PROMPTS:
        torch.manual_seed(0)
        shape = [int(number) for number in prompt.split("x")]
        ids = torch.randint(model.config.vocab_size, shape, device=model.device)
        check(model, found, ids)
        measured = [case for case in found if case is found[0] or (given.only or "") in case.name]
        new = measure(model, measured, ids)
        rows += new
        cells = [cells_of(row) for row in new]
        print(f"\n{prompt} tokens")
        heads = ["row", "GPU ms", "wall ms", "host ms", "GPU / dense", "wall / dense", "peak GiB"]
        print(markdown(heads, cells), flush=True)
        if given.profile:
            for case in measured:
                show_profile(model, case, ids)
    if given.json:
        write_json(given.json, {"device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
