# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Time of one decoding attention step on a GPU: ours at several k, and every dense kernel that is installed.

Nothing is timed before it is right: each of our settings is compared with the reference in float64 on rows of the same
data, each baseline with dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from itertools import cycle
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.bench.dense import BASELINES, LOW_PRECISION
from aqua_attention.bench.timing import MOST_REPEATS, read_bandwidth, seconds_of
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.decode import decode
from aqua_attention.ops.backends.triton.prepare import prepare
from aqua_attention.ops.backends.triton.step import decode_step
from aqua_attention.ops.layout import TILE, Pages, Quantization, TiledCache
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate, select_dimensions

ROOM = 1
ALIGNED = 4
"""Numbers of 4 bytes in 16."""
LOUD = 4.0
LOW_TOLERANCE = 0.1
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
    layouts: tuple[tuple[int | None, int | None], ...] = ((None, None),),
) -> dict[str, Any]:
    """Check and time one step of every kernel on random keys and values.

    Args:
        layouts: of our cache, bits (None or 8) and tokens of a page (None: no pages).

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
    baselines: list[tuple[str, Callable[..., Any], int | None]] = [
        (name, make, None) for name, make in BASELINES.items()
    ]
    if any(bits == 8 for bits, _ in layouts):
        baselines += [(name, make, 8) for name, make in LOW_PRECISION.items()]
    for name, make, bits in baselines:
        kind: dict[str, Any] = {"name": name, "k_ratio": None, "bits": bits, "page": None}
        try:
            run = make(query, keys, values)
            if bits is None:
                _check(run(), query, keys, values, None, 0, 0)
            else:
                low = query, *(states[-1:].to(torch.float8_e4m3fn).to(dtype) for states in (keys, values))
                _near(run()[-1:], low[0][-1:], *low[1:])
            row = kind | {"seconds": seconds_of(run), "bytes": 2 * wide // (1 if bits is None else keys.element_size())}

            def dense_step(run: Callable[[], Tensor] = run) -> Tensor:
                _append(new, keys, values)
                return run()

            rows.append(row | {"step_seconds": seconds_of(dense_step)})
        except (RuntimeError, ImportError, AttributeError, OSError) as error:
            failed = "" if isinstance(error, (ImportError, AttributeError)) else "failed: "
            rows.append(kind | {"absent": failed + str(error).splitlines()[0][:120]})
    rounding = Quantization(key_rms.square() + 0.5, random(groups, head_dim, dtype=torch.float32))
    # For the step that is checked: a full cache appends nothing.
    room = length + ROOM
    for bits, page in layouts:
        pages = None
        if page is not None:
            blocks = -(-room // TILE) * TILE // page
            table = torch.randperm(batch * blocks, generator=generator, device="cuda").view(batch, blocks)
            pages = Pages(table.to(torch.int32), page, batch * blocks)
        cache = TiledCache(
            batch, groups, head_dim, head_dim, room, dtype, "cuda", quantization=rounding if bits else None, pages=pages
        )
        for ratio in k_ratios:
            config = AquaConfig(k_ratio=ratio, selection="weighted", share="group", sink=sink, recent=recent)
            seconds = _measure_ours(cache, config, query, new, keys, values, rotation, key_rms)
            used = wide + wide * config.selected_dims(head_dim) // head_dim
            if bits:
                used = used // keys.element_size() + batch * groups * length * 4
            name = "".join(["aqua", ", int8" if bits else "", f", pages of {page}" if page else ""])
            rows.append({"name": name, "k_ratio": ratio, "bits": bits, "page": page, "bytes": used} | seconds)
        del cache
    bandwidth = read_bandwidth()
    for row in rows:
        if "seconds" in row:
            row["share"] = row["bytes"] / row["seconds"] / bandwidth
            row["ceiling"] = 2 * wide / row["bytes"]
            for time, ratio_name in (("seconds", "ratio"), ("step_seconds", "step_ratio")):
                for prefix, bits in (("", None), ("low_", 8)):
                    dense = [
                        other[time]
                        for other in rows
                        if other["k_ratio"] is None and other["bits"] == bits and time in other
                    ]
                    row[prefix + ratio_name] = min(dense) / row[time] if dense else None
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


def _measure_ours(
    cache: TiledCache,
    config: AquaConfig,
    query: Tensor,
    new: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Tensor,
    key_rms: Tensor,
) -> dict[str, float]:
    """Seconds of attention alone and of a whole step, after both are found right."""
    head_dim, (batch, _, length, _) = query.shape[2], keys.shape
    lengths = torch.full((batch,), length)
    window: dict[str, Any] = {"sink": config.sink, "recent": config.recent}

    def step(cache: TiledCache) -> tuple[Tensor, ...]:
        return decode_step(query, new[0], new[1], cache, rotation, key_rms, config)[:2]

    cache.fill(keys, values, lengths)
    found, turned = step(cache)
    _close(turned, rotate(query[:, :, None], rotation)[:, :, 0], "rotated query")
    _close(cache.tail[:, :, length % (2 * TILE)], rotate(new[0][:, :, None], rotation)[:, :, 0], "appended key")
    selected = select_dimensions(turned[:, :, None], config, head_dim, key_rms)
    _check_cache(found, turned, cache, selected, config)
    turned, chosen = prepare(query, new[0], new[1], cache, rotation, key_rms, config)
    cache.fill(keys, values, lengths)

    def run() -> Tensor:
        return decode(turned, chosen, cache, **window)

    _check_cache(run(), turned, cache, selected, config)
    seconds = seconds_of(run)
    # A step counts its new token, as dense attention does here.
    cache.fill(keys, values, lengths - 1)
    turns, start_again = at_one_length(cache)
    return {"seconds": seconds, "step_seconds": seconds_of(lambda: step(next(turns)), start_again)}


def at_one_length(cache: TiledCache) -> tuple[Iterator[TiledCache], Callable[[], Any]]:
    """The same cache again and again, each with lengths of its own, so that steps in a row do not lengthen it.

    Returns:
        Caches in turn, and what sets the lengths of all back.
    """
    batch = len(cache.lengths)
    # Each begins where a kernel may expect it to.
    lengths = cache.lengths.new_empty(MOST_REPEATS, -(-batch // ALIGNED) * ALIGNED)[:, :batch]
    start = cache.lengths.clone()
    caches = [copy(cache) for _ in lengths]
    for each, row in zip(caches, lengths, strict=True):
        each.lengths = row
    return cycle(caches), lambda: lengths.copy_(start.expand_as(lengths))


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


def _near(found: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Whether dense attention in 8 bits is within their rounding of the weights and the query."""
    exact = attention_reference(query[:, :, None].double(), keys.double(), values.double(), None)[:, :, 0]
    error = float((found.double() - exact).norm() / exact.norm())
    if not error <= LOW_TOLERANCE:
        raise AquaError(f"a kernel in 8 bits is {error:.2e} from the reference, {LOW_TOLERANCE} is allowed")


def _check_cache(found: Tensor, query: Tensor, cache: TiledCache, selected: Tensor | None, config: AquaConfig) -> None:
    """`_check` on what the cache gives back."""
    rows = torch.tensor([0, len(found) - 1], device=found.device)
    keys, values = cache.read(rows=rows.tolist(), dtype=torch.float32)
    mask = None if selected is None else selected[rows]
    _check(found[rows], query[rows], keys, values, mask, config.sink, config.recent)


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
        low = [each.to(query.dtype) for each in given]
        plain = attention_reference(low[0], low[1], low[2], mask, sink=sink, recent=recent)
        limit = TOLERANCE * float((plain.double() - exact).norm())
        error = float((found[one, :, None].double() - exact).norm())
        if not error <= limit:
            raise AquaError(f"a kernel is wrong: row {row} is {error:.2e} from the reference, {limit:.2e} is allowed")
