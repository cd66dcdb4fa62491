# SPDX-License-Identifier: Apache-2.0
"""Time of one decoding attention step on a CPU: the kernel in C at several k, beside dense attention by torch.

Nothing is timed before it is right: each run is compared with the reference in float64 on the same data.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.cpu.decode import decode
from aqua_attention.ops.backends.cpu.step import decode_step
from aqua_attention.ops.layout import TILE, Chosen, TiledCache
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate, select_dimensions

SETTLED, MOST_SECONDS = 15, 30.0
"""Rounds without anything being faster than before, after which nothing will; and when it ends anyway."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache"), "index*/size"
"""Where Linux says how large the caches of a processor are: "48K"."""
LEAST_FLUSHED = 128 << 20
"""Bytes that are read before each run, or twice the largest cache of the processor where that is known to be more."""
FEW_TOKENS = 64
"""Of another sequence, with which each way runs just before it is timed."""
LOUD = 4.0
"""Keys of the first and the last token are so many times as large: among many, one that is missed would not be seen."""
TOLERANCE, LEAST_ERROR = 4.0, 1e-5
"""A result may be so many times as far from float64 as the reference in the same dtype is, and so far for its size."""
DENSE_ROUNDINGS = 16
"""So many units in the last place for those of torch, some of which round scores and weights to bfloat16 too."""


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`scaled_dot_product_attention` as it comes: slow here, because it reads keys once for each query head."""
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def sdpa_packed(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same with the heads of a group as the queries of one head."""
    packed = query.reshape(1, keys.shape[1], -1, query.shape[-1])
    return F.scaled_dot_product_attention(packed, keys, values).reshape(query.shape)


def matmul(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Two products and a softmax."""
    packed = query.reshape(1, keys.shape[1], -1, query.shape[-1])
    scores = (packed @ keys.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ values).reshape(query.shape)


DENSE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "SDPA": sdpa,
    "SDPA, packed": sdpa_packed,
    "matmul": matmul,
}


class Way(NamedTuple):
    """One way to compute a step: what a row says of it, what is timed, the cache and what that keeps between steps."""

    name: str
    k_ratio: float | None
    attention: Callable[[], Any]
    step: Callable[[], Any]
    cache: TiledCache
    plan: Any = None

    def run(self, part: str, length: int) -> float:
        """Seconds of "attention" alone, or of a "step", as the newest of `length` tokens."""
        self.cache.lengths.fill_(length - (part == "step"))
        self.cache.plan = self.plan
        call = getattr(self, part)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def measure_decode_cpu(
    *,
    length: int,
    heads: int = 32,
    groups: int = 8,
    head_dim: int = 128,
    k_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
    sink: int = 4,
    recent: int = 64,
    dtype: torch.dtype = torch.float32,
    parts: tuple[str, ...] = ("attention", "step"),
    short: bool = False,
) -> list[dict[str, Any]]:
    """Check and time one step over random keys and values of one sequence, `length` tokens with the new one.

    Args:
        parts: what is timed, of attention alone and the whole step.
        short: also with `min_length` above `length`.

    Returns:
        A row a way: `name`, `k_ratio` (None: dense; 1 and "aqua, short": with `min_length`), `seconds` (of the fastest
        of many runs) of attention alone, if it was timed, and `step_seconds`, with what comes before: append, for ours
        rotate and choose too.

    Raises:
        AquaError: a way is wrong, or there is no compiler.
    """
    given: dict[str, Any] = {"k_ratios": k_ratios, "sink": sink, "recent": recent, "dtype": dtype, "short": short}
    shape = heads, groups, head_dim
    ways, others = _ways(length, *shape, **given), _ways(min(length, FEW_TOKENS), *shape, **given)
    times = _fastest_seconds(ways, others, length, parts)
    names = {"attention": "seconds", "step": "step_seconds"}
    return [
        {"name": way.name, "k_ratio": way.k_ratio} | {names[part]: times[place, part] for part in parts}
        for place, way in enumerate(ways)
    ]


def _ways(
    length: int,
    heads: int,
    groups: int,
    head_dim: int,
    *,
    k_ratios: tuple[float, ...],
    sink: int,
    recent: int,
    dtype: torch.dtype,
    short: bool,
) -> list[Way]:
    """Every way, checked, with keys and values of its own for the dense ones, in a cache for ours."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query, keys, values = normal(1, heads, 1, head_dim), *(normal(1, groups, length, head_dim) for _ in range(2))
    for place in (0, -1):
        keys[:, :, place] *= LOUD
    newest = keys[:, :, -1].clone(), values[:, :, -1].clone()
    rotation = torch.linalg.qr(torch.randn(groups, head_dim, head_dim, generator=generator)).Q.contiguous()
    key_rms = torch.rand(groups, head_dim, generator=generator) + 0.1
    rotated = rotate(keys, rotation)
    window: dict[str, Any] = {"sink": sink, "recent": recent}

    def filled(held: Tensor, rotated_from: int = 0) -> TiledCache:
        cache = TiledCache(1, groups, head_dim, head_dim, length + TILE, dtype, "cpu", rotated_from=rotated_from)
        cache.fill(held[:, :, :-1], values[:, :, :-1], torch.tensor([length - 1]))
        return cache

    cache = filled(rotated)
    dense_error = max(LEAST_ERROR, DENSE_ROUNDINGS * torch.finfo(dtype).eps)
    ways = []
    for name, attend in DENSE.items():
        _check(name, dense_error, attend(query, keys, values), query, keys, values)

        def dense(attend: Callable[..., Tensor] = attend) -> Tensor:
            return attend(query, keys, values)

        def dense_step(attend: Callable[..., Tensor] = attend) -> Tensor:
            keys[:, :, -1], values[:, :, -1] = newest
            return attend(query, keys, values)

        ways.append(Way(name, None, dense, dense_step, cache))
    settings = [("aqua, short", 1.0, min(k_ratios), length + 1)] if short else []
    settings += [("aqua", ratio, ratio, 0) for ratio in k_ratios]
    for name, multiplied, ratio, min_length in settings:
        config = AquaConfig(k_ratio=ratio, selection="weighted", share="group", min_length=min_length, **window)
        held = filled(keys, min_length) if min_length else cache

        def step(config: AquaConfig = config, held: TiledCache = held) -> tuple[Tensor, Tensor, Chosen | None]:
            return decode_step(query[:, :, 0], *newest, held, rotation, key_rms, config)

        held.lengths.fill_(length - 1)
        found, turned, chosen = step()
        wide = turned[:, :, None]
        selected = None if min_length else select_dimensions(wide, config, head_dim, key_rms)
        seen = keys if min_length else rotated
        _check(
            f"{name}, k_ratio {multiplied:g}", LEAST_ERROR, found[:, :, None], wide, seen, values, selected, **window
        )

        def attention(turned: Tensor = turned, chosen: Chosen | None = chosen, held: TiledCache = held) -> Tensor:
            return decode(turned, chosen, held, **window)

        ways.append(Way(name, multiplied, attention, step, held, held.plan))
    return ways


def _fastest_seconds(
    ways: list[Way], others: list[Way], length: int, parts: tuple[str, ...]
) -> dict[tuple[int, str], float]:
    """Of each way and part the fastest run, because what makes others slower is other programs.

    Before each the caches of the processor are filled with something else, as a model's weights fill them between two
    steps of a layer; then another sequence of few tokens takes the same way, because the code does come back sooner.
    All run in turn, so that a slow time of the machine slows all, in another order each time.
    """
    flushed = torch.ones(max(LEAST_FLUSHED, 2 * largest_cache()) // 4)
    shuffle, order = random.Random(0), [(place, part) for place in range(len(ways)) for part in parts]
    fastest = dict.fromkeys(order, math.inf)
    settled, began = 0, time.perf_counter()
    while settled < SETTLED and time.perf_counter() - began < MOST_SECONDS:
        shuffle.shuffle(order)
        settled += 1
        for place, part in order:
            flushed.sum()
            others[place].run(part, min(length, FEW_TOKENS))
            seconds = ways[place].run(part, length)
            settled = 0 if seconds < 0.99 * fastest[place, part] else settled
            fastest[place, part] = min(fastest[place, part], seconds)
    return fastest


def largest_cache() -> int:
    """Bytes of the processor's largest cache; 0 where nothing is known."""
    folder, pattern = CACHES
    sizes = [path.read_text().strip() for path in folder.glob(pattern)]
    units = {"K": 10, "M": 20, "G": 30}
    known = [int(size[:-1]) << units[size[-1]] for size in sizes if size[:-1].isdecimal() and size[-1] in units]
    return max(known, default=0)


def _check(
    name: str,
    least_error: float,
    found: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    selected: Tensor | None = None,
    **window: Any,
) -> None:
    """Against float64, with the error of the reference in the same dtype as yardstick; a group at a time."""
    groups = keys.shape[1]
    each = query.shape[1] // groups
    for group in range(groups):
        heads, one = slice(group * each, (group + 1) * each), slice(group, group + 1)
        given = query[:, heads], keys[:, one], values[:, one]
        mask = None if selected is None else selected[:, heads]
        wide = query[:, heads].double(), keys[:, one].double(), values[:, one].double()
        exact = attention_reference(wide[0], wide[1], wide[2], mask, **window)
        plain = attention_reference(given[0], given[1], given[2], mask, **window).double()
        limit = TOLERANCE * float((plain - exact).norm()) + least_error * float(exact.norm())
        error = float((found[:, heads].double() - exact).norm())
        if not error <= limit:
            raise AquaError(f"a kernel is wrong: {name} is {error:.2e} from float64, {limit:.2e} is allowed")
