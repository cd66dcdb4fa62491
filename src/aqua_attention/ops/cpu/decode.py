# SPDX-License-Identifier: Apache-2.0
"""AQUA decoding on a CPU: one query token a sequence, reading only the chosen dimensions of the keys."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.cpu.build import kernels
from aqua_attention.ops.tiled import TILE, WIDEST, Chosen, TiledCache

FUNCTIONS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}
JOBS_A_THREAD, LEAST_TILES = 4, 4
"""Parts of sequences are made until each thread has so many, because other programs slow threads
unevenly; a part has that many tiles, or more."""


class _Step(ctypes.Structure):
    """`Step` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "chosen", "counts", "mask", "tiles", "tail", "values")),
        *((name, ctypes.c_void_p) for name in ("lengths", "output", "sums", "largest", "total")),
        *((name, ctypes.c_int64) for name in ("rows", "rows_each", "group", "dims", "most", "value_dims")),
        *((name, ctypes.c_int64) for name in ("tiles_each", "sink", "recent", "parts")),
        ("scaling", ctypes.c_float),
    ]


def decode(
    query: Tensor,
    chosen: Chosen | None,
    cache: TiledCache,
    *,
    sink: int = 0,
    recent: int = 0,
    scaling: float | None = None,
    parts: int | None = None,
) -> Tensor:
    """`ops.triton.decode.decode` on a CPU, in float32 or bfloat16; everything is computed in float32.

    Args:
        query: rotated, [batch, num_attention_heads, kept].
        chosen: the dimensions to multiply; None: all (dense attention).
        cache: keys and values, the query's own token included.
        sink, recent: size of the exact window; `recent` is at most TILE.
        scaling: factor of the scores; default 1/sqrt(kept).
        parts: jobs for each sequence and key-value head; None: as many as keep the threads busy.

    Returns:
        [batch, num_attention_heads, value_dim] in the dtype of the cache.

    Raises:
        AquaError: shapes, sizes or dtypes that the kernel does not take, or there is no compiler.
    """
    check_layout(cache)
    (batch, groups, kept, value_dim, _), count = cache.shape, cache.count
    heads, rows = query.shape[1], batch * groups
    if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != kept or heads % groups:
        raise AquaError(f"query is {tuple(query.shape)}: it must be [{batch}, a multiple of {groups}, {kept}]")
    if cache.tiles.dtype not in FUNCTIONS or max(kept, value_dim) > WIDEST or not 0 <= recent <= TILE:
        raise AquaError(
            f"{cache.tiles.dtype}, heads of {kept} and {value_dim} dimensions, recent {recent}: the CPU kernel takes "
            f"float32 and bfloat16, at most {WIDEST} dimensions and {TILE} recent tokens"
        )
    if chosen is not None:
        chosen.check(batch, groups, kept)
    if parts is not None and parts < 1:
        raise AquaError(f"parts is {parts}: it must be 1 or more, or None")
    if chosen is None:
        chosen = _everything(batch, groups, kept)
    if parts is None:
        parts = max(1, min(-(-JOBS_A_THREAD * torch.get_num_threads() // rows), -(-count // LEAST_TILES)))
    wide = query.float().contiguous()
    output = torch.empty(batch, heads, value_dim, dtype=cache.tiles.dtype)
    # Sums, largest score and sum of weights of each part, one behind the other: three tensors take longer to make.
    places = rows * parts * (heads // groups)
    work = torch.empty(places * (value_dim + 2))
    sums = work.data_ptr()
    largest = sums + places * value_dim * work.element_size()
    step = _Step(
        query=wide.data_ptr(),
        chosen=chosen.dims.data_ptr(),
        counts=None if chosen.counts is None else chosen.counts.data_ptr(),
        mask=chosen.mask.data_ptr(),
        tiles=cache.tiles.data_ptr(),
        tail=cache.tail.data_ptr(),
        values=cache.values.data_ptr(),
        lengths=cache.lengths.data_ptr(),
        output=output.data_ptr(),
        sums=sums,
        largest=largest,
        total=largest + places * work.element_size(),
        rows=rows,
        rows_each=groups,
        group=heads // groups,
        dims=kept,
        most=chosen.dims.shape[2],
        value_dims=value_dim,
        tiles_each=count,
        sink=sink,
        recent=recent,
        parts=parts,
        scaling=kept**-0.5 if scaling is None else scaling,
    )
    getattr(kernels(), FUNCTIONS[cache.tiles.dtype])(ctypes.byref(step))
    return output


def check_layout(cache: TiledCache) -> None:
    """Raise AquaError where the kernels would read something else than the cache holds."""
    if cache.rounding is not None or cache.pages is not None:
        raise AquaError("the CPU kernels read neither 8-bit codes nor pages: make the cache without rounding and pages")


@functools.lru_cache(maxsize=8)
def _everything(batch: int, groups: int, kept: int) -> Chosen:
    return Chosen.of(torch.arange(kept).expand(batch, groups, kept), kept)
