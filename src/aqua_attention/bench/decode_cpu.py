# SPDX-License-Identifier: Apache-2.0
"""Time of one decoding attention step on a CPU: the kernel in C at several k, beside dense attention by torch.

Nothing is timed before it is right: each run is compared with the reference in float64 on the same data.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.cpu.decode import decode
from aqua_attention.ops.cpu.prepare import prepare
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.ops.tiled import TILE, Chosen, TiledCache

SECONDS, MOST_SECONDS, MOST_ROUNDS = 2.0, 30.0, 1000
"""What the runs of one size take together: the first where nothing else runs, at most the second."""
SETTLED = 15
"""Rounds without anything being faster than before, after which nothing will."""
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
    steps_only: bool = False,
) -> list[dict[str, Any]]:
    """Check and time one step over random keys and values of one sequence, `length` tokens with the new one.

    Args:
        steps_only: attention alone is not timed.

    Returns:
        A row a way: `name`, `k_ratio` (None: dense), `seconds` (of the fastest of many runs) of attention alone, if it
        was timed, and `step_seconds`, with what comes before: append, for ours rotate and choose too.

    Raises:
        AquaError: a way is wrong, or there is no compiler.
    """
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
    cache = TiledCache(1, groups, head_dim, head_dim, length + TILE, dtype, "cpu")
    cache.fill(rotated[:, :, :-1], values[:, :, :-1], torch.tensor([length - 1]))
    window: dict[str, Any] = {"sink": sink, "recent": recent}
    kinds: list[tuple[str, float | None]] = []
    # Of each way, what is timed and what the cache holds before it.
    runs: list[tuple[Callable[[], Any], int]] = []
    dense_error = max(LEAST_ERROR, DENSE_ROUNDINGS * torch.finfo(dtype).eps)
    for name, attend in DENSE.items():
        _check(name, dense_error, attend(query, keys, values), query, keys, values)

        def dense(attend: Callable[..., Tensor] = attend) -> Tensor:
            return attend(query, keys, values)

        def dense_step(attend: Callable[..., Tensor] = attend) -> Tensor:
            keys[:, :, -1], values[:, :, -1] = newest
            return attend(query, keys, values)

        kinds.append((name, None))
        runs += [(dense, length), (dense_step, length - 1)]
    for ratio in k_ratios:
        config = AquaConfig(k_ratio=ratio, selection="weighted", share="group", sink=sink, recent=recent)

        def step(config: AquaConfig = config) -> tuple[Tensor, Tensor, Chosen | None]:
            turned, chosen = prepare(query[:, :, 0], *newest, cache, rotation, key_rms, config)
            return decode(turned, chosen, cache, **window), turned, chosen

        cache.lengths.fill_(length - 1)
        found, turned, chosen = step()
        wide = turned[:, :, None]
        selected = select_dimensions(wide, config, head_dim, key_rms)
        _check(f"k_ratio {ratio:g}", LEAST_ERROR, found[:, :, None], wide, rotated, values, selected, **window)

        def attention(turned: Tensor = turned, chosen: Chosen | None = chosen) -> Tensor:
            return decode(turned, chosen, cache, **window)

        kinds.append(("aqua", ratio))
        runs += [(attention, length), (step, length - 1)]
    times = iter(_fastest_seconds(runs[1::2] if steps_only else runs, cache))
    rows: list[dict[str, Any]] = []
    for name, kind in kinds:
        row = {"name": name, "k_ratio": kind} | ({} if steps_only else {"seconds": next(times)})
        rows.append(row | {"step_seconds": next(times)})
    return rows


def _fastest_seconds(runs: list[tuple[Callable[[], Any], int]], cache: TiledCache) -> list[float]:
    """Of each run the fastest, because what makes others slower is other programs.

    All run in turn, so that a slow time of the machine slows all, and in another order each time, because one that
    reads what the one before has read is faster.
    """
    shuffle, order = random.Random(0), list(range(len(runs)))
    fastest, settled, began = [math.inf] * len(runs), 0, time.perf_counter()
    for _ in range(MOST_ROUNDS):
        shuffle.shuffle(order)
        settled += 1
        for place in order:
            run, held = runs[place]
            cache.lengths.fill_(held)
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            settled = 0 if seconds < 0.99 * fastest[place] else settled
            fastest[place] = min(fastest[place], seconds)
        spent = time.perf_counter() - began
        if spent > MOST_SECONDS or (spent > SECONDS and settled >= SETTLED):
            break
    return fastest


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
