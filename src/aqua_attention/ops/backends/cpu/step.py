# SPDX-License-Identifier: Apache-2.0
"""A decoding step on a CPU in one call: rotate query and key, choose dimensions, append to the cache, attend.

Calling takes the same time at any length, so what stays the same is found out once, and the rest is C.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from aqua_attention.config import SELECTIONS
from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.cpu.build import kernels
from aqua_attention.ops.layout import TILE, WIDEST, Chosen, TiledCache
from aqua_attention.ops.plan import LayerPlan

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
JOBS_A_THREAD, LEAST_TILES = 4, 4
"""Parts of sequences are made until each thread has so many, because other programs slow threads
unevenly; a part has that many tiles, or more."""


class Step(ctypes.Structure):
    """`Step` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "rotation", "rms")),
        *((name, ctypes.c_void_p) for name in ("tiles", "tail", "values", "lengths")),
        *((name, ctypes.c_void_p) for name in ("rotated", "chosen", "counts", "mask")),
        *((name, ctypes.c_void_p) for name in ("output", "sums", "largest", "total")),
        *((name, ctypes.c_int64) for name in ("rows", "rows_each", "group", "wide", "dims", "value_dims")),
        *((name, ctypes.c_int64) for name in ("tiles_each", "selection", "squared", "adaptive")),
        *((name, ctypes.c_int64) for name in ("most", "count", "min_length", "rotated_from")),
        *((name, ctypes.c_int64) for name in ("sink", "recent", "parts")),
        ("scaling", ctypes.c_float),
        ("logit_error", ctypes.c_float),
    ]

    def multiply(self, chosen: Chosen) -> None:
        """These dimensions are multiplied, or written there first; they must outlive the call."""
        dims, mask, counts, _ = chosen
        self.chosen, self.mask, self.most = dims.data_ptr(), mask.data_ptr(), dims.shape[2]
        self.counts = None if counts is None else counts.data_ptr()


class FixedArguments:
    """Arguments of a step that stay the same between the steps of a cache, and memory of the shapes of its results."""

    def __init__(self, query: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float) -> None:
        """For what has been checked; tensors as `decode_step` takes them."""
        batch, kv_heads, kept, value_dim, _ = cache.shape
        heads, head_dim = query.shape[1:]
        self.plan, self.scaling, self.threads = plan, scaling, torch.get_num_threads()
        self.shapes = query.shape, (batch, kv_heads, head_dim), (batch, kv_heads, value_dim)
        self.room = cache.count * TILE
        # C knows their addresses, so they are held, those of the cache too.
        matrices = plan.rotation.contiguous(), plan.key_rms.contiguous()
        self.held = *matrices, cache.tiles, cache.tail, cache.values, cache.lengths
        counted = plan.is_adaptive or plan.min_length > 0
        # Memory like this is made faster than from sizes. Where the number of dimensions differs, all have room.
        self.chosen = (
            cache.lengths.new_empty((batch, kv_heads, kept if counted else plan.k)),
            cache.lengths.new_empty((batch, kv_heads, kept), dtype=torch.int8),
            cache.lengths.new_empty((batch, kv_heads)) if counted else None,
        )
        self.rotated = cache.tail.new_empty((batch, heads, kept))
        self.output = cache.tail.new_empty((batch, heads, value_dim))
        self.call = function("step", cache)
        self.step, self.work = attending(cache, heads, sink=plan.sink, recent=plan.recent, scaling=scaling)
        self.step.rotation, self.step.rms = (tensor.data_ptr() for tensor in matrices)
        self.step.wide, self.step.min_length = head_dim, plan.min_length
        self.step.logit_error = plan.config.logit_error or 0.0
        self.step.selection = SELECTIONS.index(plan.config.selection)
        self.step.squared, self.step.adaptive = plan.config.share == "group", plan.is_adaptive
        self.pointer = ctypes.byref(self.step)
        self.everything = everything(batch, kv_heads, kept)
        self.choose(None)

    def choose(self, chosen: Chosen | None) -> None:
        """The coming steps write what they choose here, and multiply it; None: they multiply everything."""
        self.is_choosing = chosen is not None
        self.step.count = self.plan.k if self.is_choosing else 0
        self.step.multiply(chosen or self.everything)

    def is_for(self, plan: LayerPlan, scaling: float) -> bool:
        """Whether they are for these, too."""
        return self.plan is plan and self.scaling == scaling and self.threads == torch.get_num_threads()


def decode_step(
    query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float
) -> tuple[Tensor, Tensor, Chosen | None]:
    """One decoding step, see `ops.api.decode`.

    Args:
        cache: in float32 or bfloat16. With `rotated_from` shorter sequences are not rotated, and those that become so
            long are rotated now.

    Raises:
        AquaError: as `ops.api.decode` does, or there is no compiler.
    """
    fixed = cache.fixed
    if (
        fixed is None
        or not fixed.is_for(plan, scaling)
        or fixed.shapes != (query.shape, key.shape, value.shape)
        or not query.dtype == key.dtype == value.dtype == cache.dtype
    ):
        check_cache(cache, plan.recent)
        cache.check_step(query, key, value, plan)
        if cache.rotated_from and query.shape[2] != cache.shape[2]:
            raise AquaError(f"rotated_from is {cache.rotated_from}: it must be 0 where keys do not keep all dimensions")
        fixed = cache.fixed = FixedArguments(query, cache, plan, scaling)
    selects, step = plan.selects, fixed.step
    if plan.min_length or cache.rotated_from:
        # A full sequence stays as long as it is.
        longest = min(max(cache.lengths.tolist()) + 1, fixed.room)
        selects = selects and longest >= plan.min_length
        if cache.rotated_from and longest >= min(cache.rotated_from, plan.min_length):
            cache.rotate_grown(plan.rotation, plan.min_length)
        step.rotated_from = cache.rotated_from
    chosen = None
    if selects:
        dims, mask, counts = fixed.chosen
        chosen = Chosen(
            torch.empty_like(dims), torch.empty_like(mask), None if counts is None else torch.empty_like(counts)
        )
    if selects or fixed.is_choosing:
        fixed.choose(chosen)
    # Held by name until the call has ended.
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    rotated, output = torch.empty_like(fixed.rotated), torch.empty_like(fixed.output)
    step.query, step.key, step.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    step.rotated, step.output = rotated.data_ptr(), output.data_ptr()
    fixed.call(fixed.pointer)
    return output, rotated, chosen


def check_cache(cache: TiledCache, recent: int) -> None:
    """Raise AquaError where the kernels would read something else than the cache holds, or take no such cache."""
    _, _, kept, value_dim, _ = cache.shape
    if cache.quantization is not None or cache.pages is not None:
        raise AquaError(
            "the CPU kernels read neither 8-bit codes nor pages: make the cache without quantization and pages"
        )
    if cache.dtype not in DTYPES or max(kept, value_dim) > WIDEST or not 0 <= recent <= TILE:
        raise AquaError(
            f"{cache.dtype}, heads of {kept} and {value_dim} dimensions, recent {recent}: the CPU kernel takes "
            f"float32 and bfloat16, at most {WIDEST} dimensions and {TILE} recent tokens"
        )


def attending(
    cache: TiledCache, heads: int, *, sink: int, recent: int, scaling: float, parts: int | None = None
) -> tuple[Step, Tensor]:
    """What attention to a cache needs, but for queries, output and dimensions, and the memory that it works in, which
    must outlive the call.

    Args:
        parts: jobs for each sequence and key-value head; None: as many as keep the threads busy.
    """
    batch, kv_heads, kept, value_dim, _ = cache.shape
    if parts is None:
        wanted = -(-JOBS_A_THREAD * torch.get_num_threads() // (batch * kv_heads))
        parts = max(1, min(wanted, -(-cache.count // LEAST_TILES)))
    rows = batch * heads * parts
    work = torch.empty(rows * (value_dim + 2), dtype=torch.float32, device="cpu")
    sums = work.data_ptr()
    largest = sums + rows * value_dim * work.element_size()
    step = Step(
        **{name: getattr(cache, name).data_ptr() for name in ("tiles", "tail", "values", "lengths")},
        sums=sums,
        largest=largest,
        total=largest + rows * work.element_size(),
        rows=batch * kv_heads,
        rows_each=kv_heads,
        group=heads // kv_heads,
        dims=kept,
        value_dims=value_dim,
        tiles_each=cache.count,
        sink=sink,
        recent=recent,
        parts=parts,
        scaling=scaling,
    )
    return step, work


def function(name: str, cache: TiledCache) -> Callable[..., None]:
    """The function of decode.c for the dtype of a cache; it takes a pointer to a `Step`."""
    return getattr(kernels(), f"{name}_{DTYPES[cache.dtype]}")


@functools.lru_cache(maxsize=8)
def everything(batch: int, num_key_value_heads: int, kept: int) -> Chosen:
    """Every dimension of every key-value head."""
    return Chosen.of(torch.arange(kept, device="cpu").expand(batch, num_key_value_heads, kept), kept)
