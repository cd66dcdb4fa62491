# SPDX-License-Identifier: Apache-2.0
"""AQUA decoding on a CPU, attention alone: one query token a sequence, only the chosen dimensions of the keys."""

import ctypes

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.cpu.step import attending, check_cache, everything, function
from aqua_attention.ops.layout import Chosen, TiledCache


def decode(
    query: Tensor,
    chosen: Chosen | None,
    cache: TiledCache,
    *,
    sink: int = 0,
    recent: int = 0,
    scaling: float,
    parts: int | None = None,
) -> Tensor:
    """One step of `attention_reference` for one query token a sequence, with dimensions shared by a group.

    Everything is computed in float32.

    Args:
        query: in the basis of the keys, [batch, num_attention_heads, kept].
        chosen: the dimensions to multiply; None: all (dense attention).
        cache: keys and values, the query's own token included; keys of all sequences in one basis.
        sink, recent: size of the exact window; `recent` is at most TILE.
        scaling: factor of the scores.
        parts: jobs for each sequence and key-value head; None: as many as keep the threads busy.

    Returns:
        [batch, num_attention_heads, value_dim] in the dtype of the cache.

    Raises:
        AquaError: shapes, sizes or dtypes that the kernel does not take, or there is no compiler.
    """
    check_cache(cache, recent)
    batch, kv_heads, kept, value_dim, _ = cache.shape
    cache.check_query(query, chosen)
    if parts is not None and parts < 1:
        raise AquaError(f"parts is {parts}: it must be 1 or more, or None")
    query, chosen = query.to(cache.dtype).contiguous(), chosen or everything(batch, kv_heads, kept)
    output = query.new_empty((batch, query.shape[1], value_dim))
    step, work = attending(cache, query.shape[1], sink=sink, recent=recent, scaling=scaling, parts=parts)
    step.rotated, step.output = query.data_ptr(), output.data_ptr()
    step.multiply(chosen)
    function("decode", cache)(ctypes.byref(step))
    del work  # held until the call has ended
    return output
