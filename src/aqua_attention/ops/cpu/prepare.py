# SPDX-License-Identifier: Apache-2.0
"""What comes before decoding attention on a CPU: rotate query and key, choose dimensions, append to the cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aqua_attention.config import SELECTIONS, AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.cpu.build import kernels
from aqua_attention.ops.cpu.decode import FUNCTIONS, check_layout
from aqua_attention.ops.tiled import WIDEST, Chosen, TiledCache


class _Preparation(ctypes.Structure):
    """`Preparation` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "rotation", "rms", "tiles", "tail", "values")),
        *((name, ctypes.c_void_p) for name in ("lengths", "turned", "chosen", "counts", "mask")),
        *((name, ctypes.c_int64) for name in ("rows", "rows_each", "group", "wide", "dims", "most", "value_dims")),
        *((name, ctypes.c_int64) for name in ("tiles_each", "selection", "squared", "adaptive")),
        *((name, ctypes.c_int64) for name in ("count", "min_length")),
        *((name, ctypes.c_float) for name in ("scaling", "logit_error")),
    ]


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TiledCache,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    scaling: float | None = None,
) -> tuple[Tensor, Chosen | None]:
    """`ops.triton.prepare.prepare` on a CPU; the sequences are one longer afterwards, where they have room.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        rotation: float32 [num_key_value_heads, head_dim, kept]; key_rms: float32 [num_key_value_heads, kept].
        config: the selection, and from which length on there is one; its dimensions are shared by a group.
        scaling: factor of the scores, read by `logit_error`; default 1/sqrt(head_dim).

    Returns:
        Rotated queries [batch, num_attention_heads, kept], and what `decode` multiplies; None: every dimension.

    Raises:
        AquaError: shapes or dtypes that do not fit the cache, or dimensions that are not shared by a group.
    """
    check_layout(cache)
    batch, groups, kept, value_dim, _ = cache.shape
    heads, head_dim, dtype = query.shape[1], query.shape[2], cache.tiles.dtype
    cache.check_step(query, key, value, rotation, key_rms, config)
    if dtype not in FUNCTIONS or max(kept, value_dim) > WIDEST:
        raise AquaError(f"{dtype}, {value_dim} dimensions: the CPU kernel takes float32, bfloat16 and {WIDEST} at most")
    adaptive = config.logit_error is not None
    count = kept if adaptive else min(config.selected_dims(head_dim), kept)
    # Where the number of dimensions differs, there is room for all.
    counted = adaptive or (count < kept and config.threshold > 0)
    places = kept if counted else count
    turned = query.new_empty((batch, heads, kept))
    chosen = None
    if adaptive or count < kept:
        chosen = Chosen(
            torch.empty((batch, groups, places), dtype=torch.int32),
            torch.empty((batch, groups, kept), dtype=torch.int8),
            torch.empty((batch, groups), dtype=torch.int32) if counted else None,
        )
    # Held by name until the call has ended.
    given = [states.contiguous() for states in (query, key, value, rotation, key_rms)]
    dims, mask, counts = (None, None, None) if chosen is None else chosen[:3]
    step = _Preparation(
        *(states.data_ptr() for states in given),
        cache.tiles.data_ptr(),
        cache.tail.data_ptr(),
        cache.values.data_ptr(),
        cache.lengths.data_ptr(),
        turned.data_ptr(),
        *(None if tensor is None else tensor.data_ptr() for tensor in (dims, counts, mask)),
        rows=batch * groups,
        rows_each=groups,
        group=heads // groups,
        wide=head_dim,
        dims=kept,
        most=places,
        value_dims=value_dim,
        tiles_each=cache.tiles.shape[2],
        selection=SELECTIONS.index(config.selection),
        squared=config.share == "group",
        adaptive=adaptive,
        count=count,
        min_length=config.threshold,
        scaling=head_dim**-0.5 if scaling is None else scaling,
        logit_error=config.logit_error or 0.0,
    )
    getattr(kernels(), FUNCTIONS[dtype].replace("decode", "prepare"))(ctypes.byref(step))
    return turned, chosen
