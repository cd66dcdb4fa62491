# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""How long something takes on a GPU, and how fast the GPU reads at most."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

RUNS, READS = 25, 3
LEAST_SECONDS, MOST_REPEATS = 5e-4, 20
"""What takes less than this is run so often in a row: a graph of one short kernel measures the start of the graph."""


def read_bandwidth() -> float:
    """Bytes a second that a kernel reads which does nothing else, the best of several."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    sums = torch.empty(data.numel() // (1 << 15), device="cuda")

    read = partial(_read[(sums.numel(),)], data, sums, BLOCK=4096, BLOCKS=8, num_warps=8)
    return data.nbytes / min(seconds_of(read) for _ in range(READS))


@triton.jit
def _read(data_ptr, sums_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.static_range(0, BLOCKS):
        total += tl.load(data_ptr + start + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def seconds_of(run: Callable[[], Any], reset: Callable[[], Any] = lambda: None) -> float:
    """Median time of one run, of several in a row in a CUDA graph, so that no launch from the CPU is waited for.

    `reset` undoes what they change; it is done before each row of runs, and not timed.
    """
    reset()
    for _ in range(3):
        run()
    repeats = max(1, min(MOST_REPEATS, int(LEAST_SECONDS / _replay(run, reset, 1, 3))))
    return _replay(run, reset, repeats, RUNS)


def _replay(run: Callable[[], Any], reset: Callable[[], Any], repeats: int, runs: int) -> float:
    reset()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    reset()
    graph.replay()
    return replay_seconds(graph.replay, runs, reset) / repeats


def replay_seconds(replay: Callable[[], Any], runs: int, reset: Callable[[], Any] = lambda: None) -> float:
    """Median time of a graph that is there, one replay behind the other."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        reset()
        start.record()
        replay()
        stop.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in events) / 1e3
