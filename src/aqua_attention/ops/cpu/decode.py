# SPDX-License-Identifier: Apache-2.0
"""AQUA decoding on a CPU, attention alone: one query token a sequence, only the chosen dimensions of the keys."""

from __future__ import annotations

import ctypes

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.cpu.step import Step, check_cache, everything, function, working_memory
from aqua_attention.ops.tiled import Chosen, TiledCache


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
        query: in the basis of the keys, [batch, num_attention_heads, kept].
        chosen: the dimensions to multiply; None: all (dense attention).
        cache: keys and values, the query's own token included; keys of all sequences in one basis.
        sink, recent: size of the exact window; `recent` is at most TILE.
        scaling: factor of the scores; default 1/sqrt(kept).
        parts: jobs for each sequence and key-value head; None: as many as keep the threads busy.

    Returns:
        [batch, num_attention_heads, value_dim] in the dtype of the cache.

    Raises:
        AquaError: shapes, sizes or dtypes that the kernel does not take, or there is no compiler.
    """
    check_cache(cache, recent)
    batch, groups, kept, value_dim, _ = cache.shape
    if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != kept or query.shape[1] % groups:
        raise AquaError(f"query is {tuple(query.shape)}: it must be [{batch}, a multiple of {groups}, {kept}]")
    if chosen is not None:
        chosen.check(batch, groups, kept)
    if parts is not None and parts < 1:
        raise AquaError(f"parts is {parts}: it must be 1 or more, or None")
    heads = query.shape[1]
    query = query.to(cache.dtype).contiguous()
    output = query.new_empty((batch, heads, value_dim))
    parts, work, (sums, largest, total) = working_memory(cache, heads, parts)
    dims, mask, counts, _ = chosen or everything(batch, groups, kept)
    step = Step(
        turned=query.data_ptr(),
        chosen=dims.data_ptr(),
        counts=None if counts is None else counts.data_ptr(),
        mask=mask.data_ptr(),
        tiles=cache.tiles.data_ptr(),
        tail=cache.tail.data_ptr(),
        values=cache.values.data_ptr(),
        lengths=cache.lengths.data_ptr(),
        output=output.data_ptr(),
        sums=sums,
        largest=largest,
        total=total,
        rows=batch * groups,
        rows_each=groups,
        group=heads // groups,
        dims=kept,
        most=dims.shape[2],
        value_dims=value_dim,
        tiles_each=cache.count,
        sink=sink,
        recent=recent,
        parts=parts,
        scaling=kept**-0.5 if scaling is None else scaling,
    )
    function("decode", cache)(ctypes.byref(step))
    del work  # held until the call has ended
    return output
