# SPDX-License-Identifier: Apache-2.0
"""A decoding step on a CPU in one call: rotate query and key, choose dimensions, append to the cache, attend.

Calling takes the same time at any length, so what stays the same is found out once, and the rest is C.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from aqua_attention.config import SELECTIONS, AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.cpu.build import kernels
from aqua_attention.ops.layout import TILE, WIDEST, Chosen, TiledCache

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
JOBS_A_THREAD, LEAST_TILES = 4, 4
"""Parts of sequences are made until each thread has so many, because other programs slow threads
unevenly; a part has that many tiles, or more."""


class Step(ctypes.Structure):
    """`Step` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "rotation", "rms")),
        *((name, ctypes.c_void_p) for name in ("tiles", "tail", "values", "lengths")),
        *((name, ctypes.c_void_p) for name in ("turned", "chosen", "counts", "mask")),
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


class Plan:
    """What stays the same between the steps of a cache."""

    def __init__(
        self, query: Tensor, cache: TiledCache, rotation: Tensor, key_rms: Tensor, config: AquaConfig, scaling: float
    ) -> None:
        """For what has been checked; tensors as `decode_step` takes them."""
        batch, groups, kept, value_dim, _ = cache.shape
        heads, head_dim = query.shape[1:]
        self.rotation, self.key_rms, self.config, self.scaling = rotation, key_rms, config, scaling
        self.shapes = query.shape, (batch, groups, head_dim), (batch, groups, value_dim)
        self.threads, self.threshold = torch.get_num_threads(), config.threshold
        self.room = cache.count * TILE
        # C knows their addresses, so they are held, those of the cache too.
        self.held = rotation.contiguous(), key_rms.contiguous(), cache.tiles, cache.tail, cache.values, cache.lengths
        adaptive = config.logit_error is not None
        self.count = kept if adaptive else min(config.selected_dims(head_dim), kept)
        self.chooses = adaptive or self.count < kept
        counted = adaptive or self.threshold > 0
        # Memory like this is made faster than from sizes. Where the number of dimensions differs, all have room.
        self.chosen = (
            cache.lengths.new_empty((batch, groups, kept if counted else self.count)),
            cache.lengths.new_empty((batch, groups, kept), dtype=torch.int8),
            cache.lengths.new_empty((batch, groups)) if counted else None,
        )
        self.turned = cache.tail.new_empty((batch, heads, kept))
        self.output = cache.tail.new_empty((batch, heads, value_dim))
        self.call = function("step", cache)
        self.step, self.work = attending(cache, heads, sink=config.sink, recent=config.recent, scaling=scaling)
        self.step.rotation, self.step.rms = (tensor.data_ptr() for tensor in self.held[:2])
        self.step.wide, self.step.min_length, self.step.logit_error = (
            head_dim,
            self.threshold,
            config.logit_error or 0.0,
        )
        self.step.selection = SELECTIONS.index(config.selection)
        self.step.squared, self.step.adaptive = config.share == "group", adaptive
        self.pointer = ctypes.byref(self.step)
        self.everything = everything(batch, groups, kept)
        self.choose(None)

    def choose(self, chosen: Chosen | None) -> None:
        """The coming steps write what they choose here, and multiply it; None: they multiply everything."""
        self.is_choosing = chosen is not None
        self.step.count = self.count if self.is_choosing else 0
        self.step.multiply(chosen or self.everything)

    def is_for(self, rotation: Tensor, key_rms: Tensor, config: AquaConfig, scaling: float) -> bool:
        """Whether it is for these, too."""
        return (
            self.rotation is rotation
            and self.key_rms is key_rms
            and self.config is config
            and self.scaling == scaling
            and self.threads == torch.get_num_threads()
        )


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TiledCache,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    scaling: float | None = None,
) -> tuple[Tensor, Tensor, Chosen | None]:
    """`ops.triton.step.decode_step` on a CPU; the sequences are one longer afterwards, where they have room.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        cache: in float32 or bfloat16. With `rotated_from` shorter sequences are not rotated, and those that become so
            long are rotated now.
        rotation: float32 [num_key_value_heads, head_dim, kept]; key_rms: float32 [num_key_value_heads, kept].
        config: the selection, its `min_length` and the exact window; dimensions are shared by a group.
        scaling: factor of the scores; default 1/sqrt(head_dim).

    Returns:
        The output [batch, num_attention_heads, value_dim], queries as keys were multiplied with them, [batch,
        num_attention_heads, kept], and what was multiplied; None: every dimension.

    Raises:
        AquaError: shapes or dtypes that do not fit the cache, dimensions that are not shared by a group, or there is no
            compiler.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    plan, dtype = cache.plan, cache.dtype
    if (
        plan is None
        or not plan.is_for(rotation, key_rms, config, scaling)
        or plan.shapes != (query.shape, key.shape, value.shape)
        or not query.dtype == key.dtype == value.dtype == dtype
    ):
        check_cache(cache, config.recent)
        cache.check_step(query, key, value, rotation, key_rms, config)
        if cache.rotated_from and query.shape[2] != cache.shape[2]:
            raise AquaError(f"rotated_from is {cache.rotated_from}: it must be 0 where keys do not keep all dimensions")
        plan = cache.plan = Plan(query, cache, rotation, key_rms, config, scaling)
    chooses, step = plan.chooses, plan.step
    if plan.threshold or cache.rotated_from:
        # A full sequence stays as long as it is.
        longest = min(max(cache.lengths.tolist()) + 1, plan.room)
        chooses = chooses and longest >= plan.threshold
        if cache.rotated_from and longest >= min(cache.rotated_from, plan.threshold):
            cache.rotate_grown(plan.rotation, plan.threshold)
        step.rotated_from = cache.rotated_from
    chosen = None
    if chooses:
        dims, mask, counts = plan.chosen
        chosen = Chosen(
            torch.empty_like(dims), torch.empty_like(mask), None if counts is None else torch.empty_like(counts)
        )
    if chooses or plan.is_choosing:
        plan.choose(chosen)
    # Held by name until the call has ended.
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    turned, output = torch.empty_like(plan.turned), torch.empty_like(plan.output)
    step.query, step.key, step.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    step.turned, step.output = turned.data_ptr(), output.data_ptr()
    plan.call(plan.pointer)
    return output, turned, chosen


def check_cache(cache: TiledCache, recent: int) -> None:
    """Raise AquaError where the kernels would read something else than the cache holds, or take no such cache."""
    _, _, kept, value_dim, _ = cache.shape
    if cache.quantization is not None or cache.pages is not None:
        raise AquaError("the CPU kernels read neither 8-bit codes nor pages: make the cache without rounding and pages")
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
    batch, groups, kept, value_dim, _ = cache.shape
    if parts is None:
        parts = max(
            1, min(-(-JOBS_A_THREAD * torch.get_num_threads() // (batch * groups)), -(-cache.count // LEAST_TILES))
        )
    places = batch * heads * parts
    work = torch.empty(places * (value_dim + 2), dtype=torch.float32, device="cpu")
    sums = work.data_ptr()
    largest = sums + places * value_dim * work.element_size()
    step = Step(
        tiles=cache.tiles.data_ptr(),
        tail=cache.tail.data_ptr(),
        values=cache.values.data_ptr(),
        lengths=cache.lengths.data_ptr(),
        sums=sums,
        largest=largest,
        total=largest + places * work.element_size(),
        rows=batch * groups,
        rows_each=groups,
        group=heads // groups,
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
def everything(batch: int, groups: int, kept: int) -> Chosen:
    """Every dimension of every key-value head."""
    return Chosen.of(torch.arange(kept, device="cpu").expand(batch, groups, kept), kept)
