# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Time of one decoding attention step on a GPU: ours at several k, and every dense kernel that is installed."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.bench.dense import BASELINES, LOW_PRECISION, Maker
from aqua_attention.bench.problem import K_RATIOS, OURS, Attended, Problem
from aqua_attention.bench.timing import MOST_REPEATS, read_bandwidth, seconds_of
from aqua_attention.config import AquaConfig
from aqua_attention.errors import REPORT, AquaError
from aqua_attention.machine import Shape
from aqua_attention.ops.backends.triton.decode import decode
from aqua_attention.ops.backends.triton.prepare import prepare
from aqua_attention.ops.backends.triton.step import decode_step
from aqua_attention.ops.layout import TILE, Pages, Quantization, TiledCache
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate, select_dimensions

Layout = tuple[int | None, int | None]
"""Of our cache: bits (None or 8), and tokens of a page (None: no pages)."""
ROOM = 1
LOW_TOLERANCE, TOLERANCE = 0.1, 3.0
"""In 8 bits of the result; else a result may be so many times as far from float64 as the reference in its dtype is."""


def measure_decode(
    shape: Shape,
    *,
    batch: int,
    length: int,
    k_ratios: tuple[float, ...] = K_RATIOS,
    layouts: Sequence[Layout] = ((None, None),),
    sink: int = OURS.sink,
    recent: int = OURS.recent,
) -> dict[str, Any]:
    """Check and time one step of every kernel on random keys and values, with this exact window.

    Returns:
        `{"batch", "length", ..., "read_bandwidth", "rows"}`; a row a kernel: `name`, `k_ratio` (None: dense), `bits`
        (None: those of dtype), `page`, `seconds` (median) of attention alone, `bytes` (keys and values that it needs),
        `share` (of the measured read bandwidth), `ratio` (to the fastest dense one in dtype, above 1 is faster),
        `ceiling` (what that could be at most: its bytes over ours), `step_seconds` and `step_ratio` (with what comes
        before: append, for ours rotate and select too; a kernel of its own where one launch does it all), `low_ratio`
        and `low_step_ratio` (to the fastest dense one in 8 bits, or None); or `absent` (why it did not run).

    Raises:
        AquaError: no CUDA GPU, or a kernel of ours is wrong.
    """
    if not torch.cuda.is_available():
        raise AquaError("aqua bench decode measures kernels on a CUDA GPU, and there is none: try aqua bench generate")
    shape.check_heads()
    ours = replace(OURS, sink=sink, recent=recent)
    configs = [replace(ours, k_ratio=ratio) for ratio in k_ratios]
    problem = Problem.random(shape, batch=batch, length=length)
    rows = [_dense_row(problem, name, make, None) for name, make in BASELINES.items()]
    if any(bits == 8 for bits, _ in layouts):
        rows += [_dense_row(problem, name, make, 8) for name, make in LOW_PRECISION.items()]
    for bits, page in layouts:
        cache = _empty_cache(problem, bits, page)
        name = "".join(["aqua", ", int8" if bits else "", f", pages of {page}" if page else ""])
        for config in configs:
            kind = {"name": name, "k_ratio": config.k_ratio, "bits": bits, "page": page}
            rows.append(kind | _measure_ours(problem, cache, config))
        del cache
    bandwidth = read_bandwidth()
    _compare(rows, problem.keys.nbytes + problem.values.nbytes, bandwidth)
    measured = {"device": torch.cuda.get_device_name(), "batch": batch, "length": length} | shape.facts
    return measured | {"sink": ours.sink, "recent": ours.recent, "read_bandwidth": bandwidth, "rows": rows}


def _dense_row(problem: Problem, name: str, make: Maker, bits: int | None) -> dict[str, Any]:
    """A baseline, found right and timed, or why it did not run."""
    row: dict[str, Any] = {"name": name, "k_ratio": None, "bits": bits, "page": None}
    try:
        run = make(problem.query, problem.keys, problem.values)
        if bits is None:
            _check(run(), Attended(problem.query, problem.keys, problem.values))
        else:
            # Weights and query are rounded to 8 bits too; the last sequence stands for all.
            keys, values = (kept[-1:].to(torch.float8_e4m3fn).to(kept.dtype) for kept in (problem.keys, problem.values))
            exact = Attended(problem.query[-1:], keys, values).reference(torch.float64)
            _close(run()[-1:], exact, "result in 8 bits", LOW_TOLERANCE)

        def step() -> Tensor:
            _append(problem)
            return run()

        size = problem.keys.nbytes + problem.values.nbytes
        used = size if bits is None else size // problem.keys.element_size()
        return row | {"seconds": seconds_of(run), "bytes": used, "step_seconds": seconds_of(step)}
    except (RuntimeError, ImportError, AttributeError, OSError) as error:
        failed = "" if isinstance(error, (ImportError, AttributeError)) else "failed: "
        return row | {"absent": failed + str(error).splitlines()[0][:120]}


def _empty_cache(problem: Problem, bits: int | None, page: int | None) -> TiledCache:
    """With room for one token more than `problem` has: in the step that is checked a full cache appends nothing."""
    keys = problem.keys
    batch, kv_heads, length, head_dim = keys.shape
    pages = quantization = None
    if page is not None:
        blocks = -(-(length + ROOM) // TILE) * TILE // page
        generator = torch.Generator(keys.device).manual_seed(0)
        block_table = torch.randperm(batch * blocks, generator=generator, device=keys.device).view(batch, blocks)
        pages = Pages(block_table.to(torch.int32), page, batch * blocks)
    if bits:
        quantization = Quantization(problem.key_rms.square() + 0.5, 0.5 - problem.key_rms)
    sizes = batch, kv_heads, head_dim, head_dim, length + ROOM
    return TiledCache(*sizes, keys.dtype, keys.device, quantization=quantization, pages=pages)


def _measure_ours(problem: Problem, cache: TiledCache, config: AquaConfig) -> dict[str, float]:
    """`seconds` of attention alone and `step_seconds`, after both are found right, and `bytes`."""
    batch, kv_heads, length, head_dim = problem.keys.shape
    plan = LayerPlan.of(problem.rotation, problem.key_rms, config)
    token = problem.query, *problem.new

    def fill(length: int) -> None:
        cache.fill(problem.keys, problem.values, torch.full((batch,), length))

    fill(length)
    found, turned = decode_step(*token, cache, plan, plan.scaling)[:2]
    _close(turned, rotate(problem.query[:, :, None], problem.rotation)[:, :, 0], "rotated query")
    appended = rotate(problem.new[0][:, :, None], problem.rotation)[:, :, 0]
    _close(cache.tail[:, :, length % (2 * TILE)], appended, "appended key")
    selected = select_dimensions(turned[:, :, None], plan)
    _check_cache(found, turned, cache, selected, config)
    turned, chosen = prepare(*token, cache, plan, plan.scaling)
    fill(length)

    run = partial(decode, turned, chosen, cache, sink=plan.sink, recent=plan.recent, scaling=plan.scaling)
    _check_cache(run(), turned, cache, selected, config)
    seconds = seconds_of(run)
    # A step counts its new token, as dense attention does here.
    fill(length - 1)
    turns, start_again = at_one_length(cache)
    step_seconds = seconds_of(lambda: decode_step(*token, next(turns), plan, plan.scaling), start_again)
    used = problem.values.nbytes + problem.keys.nbytes * config.selected_dims(head_dim) // head_dim
    if cache.quantization is not None:
        used = used // problem.keys.element_size() + batch * kv_heads * length * 4
    return {"bytes": used, "seconds": seconds, "step_seconds": step_seconds}


def _compare(rows: list[dict[str, Any]], dense_bytes: int, bandwidth: float) -> None:
    """Add what follows from `seconds` and `bytes` to the rows that have them; see `measure_decode`."""

    def fastest(time: str, bits: int | None) -> float | None:
        dense = (row for row in rows if row["k_ratio"] is None and row["bits"] == bits)
        return min((row[time] for row in dense if time in row), default=None)

    for row in (row for row in rows if "seconds" in row):
        row["share"] = row["bytes"] / row["seconds"] / bandwidth
        row["ceiling"] = dense_bytes / row["bytes"]
        for (prefix, bits), part in product((("", None), ("low_", 8)), ("", "step_")):
            best = fastest(f"{part}seconds", bits)
            row[f"{prefix}{part}ratio"] = best / row[f"{part}seconds"] if best else None


def at_one_length(cache: TiledCache) -> tuple[Iterator[TiledCache], Callable[[], Any]]:
    """Caches in turn, and what sets the lengths of all back, so that steps in a row do not lengthen one.

    All are the same cache, with lengths of their own.
    """
    batch = len(cache.lengths)
    # Each begins where a kernel may expect it to, at a multiple of 16 bytes.
    lengths = cache.lengths.new_empty(MOST_REPEATS, -(-batch // 4) * 4)[:, :batch]
    start = cache.lengths.clone()
    caches = [copy(cache) for _ in lengths]
    for each, row in zip(caches, lengths, strict=True):
        each.lengths = row
    return cycle(caches), lambda: lengths.copy_(start.expand_as(lengths))


def _append(problem: Problem) -> None:
    """What dense attention does before: one launch writes a key and a value behind the others of each sequence."""
    batch, kv_heads, length, dim = problem.keys.shape
    _write[(batch * kv_heads,)](*problem.new, problem.keys, problem.values, length - 1, length, DIM=dim)


@triton.jit
def _write(key_ptr, value_ptr, keys_ptr, values_ptr, token, length, DIM: tl.constexpr):
    row, dim = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    tl.store(keys_ptr + (row * length + token) * DIM + dim, tl.load(key_ptr + row * DIM + dim))
    tl.store(values_ptr + (row * length + token) * DIM + dim, tl.load(value_ptr + row * DIM + dim))


def _close(found: Tensor, expected: Tensor, name: str, limit: float | None = None) -> None:
    """Raise AquaError where it is further from the reference than `limit`, of its size; None: than rounding."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error <= (limit or torch.finfo(found.dtype).eps):
        raise AquaError(f"a kernel is wrong: the {name} is {error:.2e} from the reference: {REPORT}")


def _check_cache(found: Tensor, query: Tensor, cache: TiledCache, selected: Tensor | None, config: AquaConfig) -> None:
    """`_check` of the first and the last sequence on what the cache gives back."""
    rows = [0, len(found) - 1]
    mask = None if selected is None else selected[rows]
    _check(found[rows], Attended(query[rows], *cache.read(rows, torch.float32), mask, config.sink, config.recent))


def _check(found: Tensor, given: Attended) -> None:
    """The first and the last row against float64."""
    for row in {0, len(found) - 1}:
        given.part(slice(row, row + 1)).check(found[row : row + 1], f"row {row}", TOLERANCE)
