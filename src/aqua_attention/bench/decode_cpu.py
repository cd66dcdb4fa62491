# SPDX-License-Identifier: Apache-2.0
"""Time of one decoding attention step on a CPU: the kernel in C at several k, beside dense attention by torch."""

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqua_attention.bench.choosing import problem_for
from aqua_attention.bench.dense import Attend, matmul, sdpa, sdpa_packed
from aqua_attention.bench.problem import K_RATIOS, OURS, Attended, Problem
from aqua_attention.bench.select_cpu import SelectWay, select_way
from aqua_attention.config import AquaConfig
from aqua_attention.machine import Shape
from aqua_attention.ops.backends.cpu.decode import decode
from aqua_attention.ops.backends.cpu.step import decode_step
from aqua_attention.ops.layout import TILE, TiledCache
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate, select_dimensions

SETTLED, MOST_SECONDS = 15, 30.0
"""Rounds without anything being faster than before, after which nothing will; and when it ends anyway."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache"), "index*/size"
LEAST_FLUSHED = 128 << 20
"""Bytes that are read before each run, or twice the largest cache of the processor where that is known to be more."""
FEW_TOKENS = 64
"""Of another sequence, with which each way runs just before it is timed."""
TOLERANCE, LEAST_ERROR = 4.0, 1e-5
"""A result may be so many times as far from float64 as the reference in the same dtype is, and so far for its size."""
DENSE_ROUNDINGS = 16
"""So many units in the last place for those of torch, some of which round scores and weights to bfloat16 too."""
DENSE: dict[str, Attend] = {"SDPA": sdpa, "SDPA, packed": sdpa_packed, "matmul": matmul}


class Way(NamedTuple):
    """One way to compute a step: what a row says of it, what is timed, the cache and what that keeps between steps."""

    name: str
    k_ratio: float | None
    attention: Callable[[], Any]
    step: Callable[[], Any]
    cache: TiledCache | None = None
    fixed: Any = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it beside times."""
        return {"name": self.name, "k_ratio": self.k_ratio}

    def run(self, part: str, length: int) -> float:
        """Seconds of "attention" alone, or of a "step", as the newest of `length` tokens."""
        if self.cache is not None:
            self.cache.lengths.fill_(length - (part == "step"))
            self.cache.fixed = self.fixed
        call = getattr(self, part)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def measure_decode_cpu(
    shape: Shape,
    *,
    length: int,
    k_ratios: tuple[float, ...] = K_RATIOS,
    parts: tuple[str, ...] = ("attention", "step"),
    short: bool = False,
    sink: int = OURS.sink,
    recent: int = OURS.recent,
    selects: tuple[AquaConfig, ...] = (),
    heavy: float | None = None,
) -> list[dict[str, Any]]:
    """Check and time one step over random keys and values of one sequence, `length` tokens with the new one.

    Args:
        parts: what is timed, of attention alone and the whole step.
        short: also with `min_length` above `length`.
        sink, recent: the exact window.
        selects: also settings that choose tokens (AQUA-Select), from a growing cache, as `generate` has it.
        heavy: of `select_p`, the share of the tokens that holds it; None: random keys.

    Returns:
        A row a way: `name`, `k_ratio` (None: dense; 1 and "aqua, short": with `min_length`), `seconds` (of the fastest
        of many runs) of attention alone, if it was timed, and `step_seconds`, with what comes before: append, for ours
        rotate and choose too. For `selects` also `setting` and `read` (share of the tokens).

    Raises:
        AquaError: a way is wrong, or there is no compiler.
    """

    def every_way(length: int) -> list[Way | SelectWay]:
        problem = Problem.random(shape, batch=1, length=length)
        ours = replace(OURS, sink=sink, recent=recent)
        settings = [replace(ours, k_ratio=min(k_ratios), min_length=length + 1)] if short else []
        settings += [replace(ours, k_ratio=ratio) for ratio in k_ratios]
        choosing = (select_way(problem_for(problem, config, heavy), config) for config in selects)
        return [*(_dense_way(problem, *way) for way in DENSE.items()), *_our_ways(problem, settings), *choosing]

    ways = every_way(length)
    times = _fastest_seconds(ways, every_way(min(length, FEW_TOKENS)), length, parts)
    names = {"attention": "seconds", "step": "step_seconds"}
    rows = [{names[part]: times[index, part] for part in parts} for index in range(len(ways))]
    return [way.facts | row for way, row in zip(ways, rows, strict=True)]


def _dense_way(problem: Problem, name: str, attend: Attend) -> Way:
    """A baseline, checked."""
    query, newest, keys, values = problem.query[:, :, None], *problem[1:4]
    least = max(LEAST_ERROR, DENSE_ROUNDINGS * torch.finfo(query.dtype).eps)

    attention = partial(attend, query, keys, values)

    def step() -> Tensor:
        keys[:, :, -1], values[:, :, -1] = newest
        return attention()

    _check(name, attention()[:, :, 0], Attended(problem.query, keys, values), least)
    return Way(name, None, attention, step)


def _our_ways(problem: Problem, configs: list[AquaConfig]) -> list[Way]:
    """AQUA by each setting, checked; below `min_length` with keys that are not rotated, in a cache of their own."""
    query, newest, keys, values, rotation, key_rms = problem
    rotated = rotate(keys, rotation)

    def filled(rotated_from: int = 0) -> TiledCache:
        _, kv_heads, length, dim = keys.shape
        cache = TiledCache(1, kv_heads, dim, dim, length + TILE, keys.dtype, "cpu", rotated_from=rotated_from)
        held = keys if rotated_from else rotated
        cache.fill(held[:, :, :-1], values[:, :, :-1], torch.tensor([length - 1]))
        return cache

    def way(config: AquaConfig, cache: TiledCache) -> Way:
        plan = LayerPlan.of(rotation, key_rms, config)
        step = partial(decode_step, query, *newest, cache, plan, plan.scaling)
        cache.lengths.fill_(keys.shape[2] - 1)
        found, turned, chosen = step()
        attention = partial(decode, turned, chosen, cache, sink=plan.sink, recent=plan.recent, scaling=plan.scaling)
        name, k_ratio, seen, selected = "aqua, short", 1.0, keys, None
        if not config.min_length:
            name, k_ratio, seen = "aqua", config.k_ratio, rotated
            selected = select_dimensions(turned[:, :, None], plan)
        right = Attended(turned, seen, values, selected, config.sink, config.recent)
        _check(f"{name}, k_ratio {k_ratio:g}", found, right, LEAST_ERROR)
        return Way(name, k_ratio, attention, step, cache, cache.fixed)

    shared = filled()
    return [way(config, filled(int(config.min_length)) if config.min_length else shared) for config in configs]


def _fastest_seconds(
    ways: list[Way | SelectWay], others: list[Way | SelectWay], length: int, parts: tuple[str, ...]
) -> dict[Any, float]:
    """Of each way, by its index, and part the fastest run, because what makes others slower is other programs.

    Before each the caches of the processor are filled with something else, as a model's weights fill them between two
    steps of a layer; then another sequence of few tokens takes the same way, because the code does come back sooner.
    All run in turn, so that a slow time of the machine slows all, in another order each time.
    """
    flushed = torch.ones(max(LEAST_FLUSHED, 2 * largest_cache()) // 4)
    shuffle, order = random.Random(0), list(itertools.product(range(len(ways)), parts))
    fastest = dict.fromkeys(order, math.inf)
    settled, began = 0, time.perf_counter()
    while settled < SETTLED and time.perf_counter() - began < MOST_SECONDS:
        shuffle.shuffle(order)
        settled += 1
        for index, part in order:
            flushed.sum()
            others[index].run(part, min(length, FEW_TOKENS))
            seconds = ways[index].run(part, length)
            settled = 0 if seconds < 0.99 * fastest[index, part] else settled
            fastest[index, part] = min(fastest[index, part], seconds)
    return fastest


def largest_cache() -> int:
    """Bytes of the processor's largest cache, of which Linux says "48K" and the like; 0 where nothing is known."""
    folder, pattern = CACHES
    sizes = [path.read_text().strip() for path in folder.glob(pattern)]
    units = {"K": 10, "M": 20, "G": 30}
    known = [int(size[:-1]) << units[size[-1]] for size in sizes if size[:-1].isdecimal() and size[-1] in units]
    return max(known, default=0)


def _check(name: str, found: Tensor, right: Attended, least: float) -> None:
    """Against float64, with the error of the reference in the same dtype as yardstick; a group at a time."""
    for head, part in enumerate(found.chunk(right.keys.shape[1], 1)):
        right.part(slice(None), slice(head, head + 1)).check(part, name, TOLERANCE, least)
