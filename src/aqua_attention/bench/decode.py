# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Time of one decoding attention step on a GPU: ours at several k, and every dense kernel that is installed.

Nothing is timed before it is right: each of our settings is compared with the reference in float64 on rows of the same
data, each baseline with dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.bench.dense import BASELINES
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.ops.tiled import Chosen, TiledCache
from aqua_attention.ops.triton.decode import decode
from aqua_attention.ops.triton.prepare import prepare

RUNS = 25
LEAST_SECONDS, MOST_REPEATS = 5e-4, 20
"""What takes less than this is run so often in a row: a graph of one short kernel measures the start of the graph."""
ROOM = 1024
LOUD = 4.0
TOLERANCE = 3.0
"""A result may be so many times as far from float64 as the reference in the low precision is."""


def measure_decode(
    *,
    batch: int,
    length: int,
    heads: int = 32,
    groups: int = 8,
    head_dim: int = 128,
    k_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
    sink: int = 4,
    recent: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Check and time one step of every kernel on random keys and values.

    Returns:
        `{"batch", "length", ..., "read_bandwidth", "rows"}`; a row a kernel: `name`, `k_ratio` (None: dense), `seconds`
        (median) of attention alone, `bytes` (keys and values that it needs), `share` (of the measured read bandwidth),
        `ratio` (to the fastest dense one, above 1 is faster), `ceiling` (what that could be at most: its bytes over
        ours), `step_seconds` and `step_ratio` (with what comes before: append, for ours rotate and select too); or
        `absent` (why it did not run).

    Raises:
        AquaError: no CUDA GPU, or a kernel of ours is wrong.
    """
    if not torch.cuda.is_available():
        raise AquaError("aqua bench decode measures kernels on a CUDA GPU: there is none")
    if heads % groups or not all(0 < ratio <= 1 for ratio in k_ratios):
        raise AquaError(
            f"{heads} query heads for {groups} key-value heads and k_ratio {k_ratios}: heads must divide, and ratios "
            "be above 0 and at most 1"
        )
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    query, new = random(batch, heads, head_dim), random(2, batch, groups, head_dim)
    keys, values = random(batch, groups, length, head_dim), random(batch, groups, length, head_dim)
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, dtype=torch.float32)).Q.contiguous()
    key_rms = random(groups, head_dim, dtype=torch.float32).abs() + 0.1
    rows: list[dict[str, Any]] = []
    # Tokens at both ends that matter: among so many random ones, a kernel that missed one would pass.
    for place in (0, -1):
        keys[:, :, place] *= LOUD
    new[0] *= LOUD
    wide = batch * groups * length * head_dim * keys.element_size()
    for name, make in BASELINES.items():
        try:
            run = make(query, keys, values)
            _check(run(), query, keys, values, None, 0, 0)
            row: dict[str, Any] = {"name": name, "k_ratio": None, "seconds": _seconds(run), "bytes": 2 * wide}

            def dense_step(run: Callable[[], Tensor] = run) -> Tensor:
                _append(new, keys, values)
                return run()

            rows.append(row | {"step_seconds": _seconds(dense_step)})
        except (RuntimeError, ImportError, AttributeError, OSError) as error:
            failed = "" if isinstance(error, (ImportError, AttributeError)) else "failed: "
            rows.append({"name": name, "k_ratio": None, "absent": failed + str(error).splitlines()[0][:120]})
    # Room for every step that is timed: a full cache appends nothing.
    cache = TiledCache(batch, groups, head_dim, head_dim, length + ROOM, dtype, "cuda")
    lengths = torch.full((batch,), length)
    for ratio in k_ratios:
        config = AquaConfig(k_ratio=ratio, selection="weighted", share="group", sink=sink, recent=recent)

        def step(config: AquaConfig = config) -> tuple[Tensor, ...]:
            turned, chosen = prepare(query, new[0], new[1], cache, rotation, key_rms, config)
            return decode(turned, chosen, cache, sink=sink, recent=recent, appended=True), turned

        cache.fill(keys, values, lengths)
        found, turned = step()
        _close(turned, rotate(query[:, :, None], rotation)[:, :, 0], "rotated query")
        longer = [
            torch.cat([old, one[:, :, None]], 2)
            for old, one in ((keys, rotate(new[0][:, :, None], rotation)[:, :, 0]), (values, new[1]))
        ]
        selected = select_dimensions(turned[:, :, None], config, head_dim, key_rms)
        _check(found, turned, longer[0], longer[1], selected, sink, recent)
        del longer

        turned, chosen = prepare(query, new[0], new[1], cache, rotation, key_rms, config)
        cache.fill(keys, values, lengths)

        def run(turned: Tensor = turned, chosen: Chosen | None = chosen) -> Tensor:
            return decode(turned, chosen, cache, sink=sink, recent=recent)

        _check(run(), turned, keys, values, selected, sink, recent)
        used = wide + wide * config.selected_dims(head_dim) // head_dim
        row = {"name": "aqua", "k_ratio": ratio, "seconds": _seconds(run), "bytes": used}
        rows.append(row | {"step_seconds": _seconds(step)})
        if int(cache.lengths.max()) >= length + ROOM:
            raise AquaError(f"the timed steps filled a cache of {length + ROOM} tokens: raise ROOM")
    bandwidth = read_bandwidth()
    for row in rows:
        if "seconds" in row:
            row["share"] = row["bytes"] / row["seconds"] / bandwidth
            row["ceiling"] = 2 * wide / row["bytes"]
            for time, ratio_name in (("seconds", "ratio"), ("step_seconds", "step_ratio")):
                dense = [other[time] for other in rows if other["k_ratio"] is None and time in other]
                row[ratio_name] = min(dense) / row[time] if dense else None
    return {
        "device": torch.cuda.get_device_name(),
        "batch": batch,
        "length": length,
        "heads": heads,
        "groups": groups,
        "head_dim": head_dim,
        "sink": sink,
        "recent": recent,
        "dtype": str(dtype),
        "read_bandwidth": bandwidth,
        "rows": rows,
    }


def read_sizes(sizes: list[str]) -> list[tuple[int, int]]:
    """Sequences and tokens of "8x32768" and the like.

    Raises:
        AquaError: it is written in another way.
    """
    found = []
    for size in sizes:
        batch, _, length = size.partition("x")
        if not (batch.isdecimal() and length.isdecimal() and int(batch) > 0 and int(length) > 1):
            raise AquaError(f"size is {size!r}: it must be sequences x tokens, such as 8x32768")
        found.append((int(batch), int(length)))
    return found


def read_bandwidth() -> float:
    """Bytes a second that a kernel reads which does nothing else, the best of several."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    sums = torch.empty(data.numel() // (1 << 15), device="cuda")
    seconds = _seconds(lambda: _read[(sums.numel(),)](data, sums, BLOCK=4096, BLOCKS=8, num_warps=8))
    return data.nbytes / seconds


@triton.jit
def _read(data_ptr, sums_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.static_range(0, BLOCKS):
        total += tl.load(data_ptr + start + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def _seconds(run: Callable[[], Any]) -> float:
    """Median time of one run, of several in a row in a CUDA graph, so that no launch from the CPU is waited for."""
    for _ in range(3):
        run()
    repeats = max(1, min(MOST_REPEATS, int(LEAST_SECONDS / _replay(run, 1, 3))))
    return _replay(run, repeats, RUNS)


def _replay(run: Callable[[], Any], repeats: int, runs: int) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[runs // 2] / 1e3 / repeats


def _append(new: Tensor, keys: Tensor, values: Tensor) -> None:
    """What dense attention does before: one launch writes a key and a value behind the others of each sequence."""
    batch, groups, length, dim = keys.shape
    _write[(batch * groups,)](new, keys, values, batch * groups, length - 1, length, DIM=dim)


@triton.jit
def _write(new_ptr, keys_ptr, values_ptr, rows, place, length, DIM: tl.constexpr):
    row, dim = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    tl.store(keys_ptr + (row * length + place) * DIM + dim, tl.load(new_ptr + row * DIM + dim))
    tl.store(values_ptr + (row * length + place) * DIM + dim, tl.load(new_ptr + (rows + row) * DIM + dim))


def _close(found: Tensor, expected: Tensor, name: str) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error <= torch.finfo(found.dtype).eps:
        raise AquaError(f"a kernel is wrong: the {name} is {error:.2e} from the reference")


def _check(
    found: Tensor, query: Tensor, keys: Tensor, values: Tensor, selected: Tensor | None, sink: int, recent: int
) -> None:
    """The first and the last row against float64, with the error of the low-precision reference as yardstick."""
    for row in {0, found.shape[0] - 1}:
        one = slice(row, row + 1)
        given = query[one, :, None], keys[one], values[one]
        mask = None if selected is None else selected[one]
        wide = [each.double() for each in given]
        exact = attention_reference(wide[0], wide[1], wide[2], mask, sink=sink, recent=recent)
        plain = attention_reference(given[0], given[1], given[2], mask, sink=sink, recent=recent)
        limit = TOLERANCE * float((plain.double() - exact).norm())
        error = float((found[one, :, None].double() - exact).norm())
        if not error <= limit:
            raise AquaError(f"a kernel is wrong: row {row} is {error:.2e} from the reference, {limit:.2e} is allowed")
