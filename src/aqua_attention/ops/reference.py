# SPDX-License-Identifier: Apache-2.0
"""AQUA attention in plain torch: the specification that every other path is tested against.

It forms the whole score matrix. `attention_chunked` evaluates the same code a few queries at a time: rows of
attention do not depend on each other, so it is the same function in bounded memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from aqua_attention.ops.mask import mask_rows, visible_and_exact

CHUNK_SCORES = 1 << 21
"""Scores held at once by `attention_chunked` on a CPU: 8 MB in float32, for each of the few copies in flight. Larger
blocks are slower there, because they leave the caches."""
GPU_CHUNKS = 8
"""So many times as many on a GPU, where small blocks wait for launches."""


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor | None,
    *,
    mask: Tensor | None = None,
    sink: int = 0,
    recent: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention whose scores use the selected dimensions outside the exact window and all of them inside.

    score(i, j) = scaling * sum_{c in S} q_ic k_jc, with S = selected_i, or every dimension when token j is one of the
    first `sink` tokens of its row or of the last `recent` up to query i (and visible to it). Softmax and product with
    the values as usual, computed in at least float32.

    Args:
        query: rotated, [batch, num_attention_heads, queries, kept].
        key: rotated, [batch, num_key_value_heads, keys, kept].
        value: [batch, num_key_value_heads, keys, value_dim], not rotated.
        selected: boolean, shape of `query`, from `select_dimensions`; None: every dimension (dense attention).
        mask: see `ops.mask`; None is causal with the queries at the end of the keys.
        sink, recent: size of the exact window in tokens (uint8 masks carry it already).
        scaling: factor of the scores; default 1/sqrt(kept).
        softcap: soft limit c of the scores, c * tanh(score / c), as in Gemma 2.
        s_aux: [num_attention_heads], one extra logit a head that takes part in the softmax and has no value
            (gpt-oss).

    Returns:
        [batch, num_attention_heads, queries, value_dim] in the dtype of `value`. A query that sees no key gets
        zeros; a NaN in a query, or in a key that it sees, gives NaN, and a NaN in a value gives NaN to every query.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    tall_key = key.to(torch.promote_types(query.dtype, torch.float32)).transpose(-1, -2)
    probabilities = attention_probabilities(
        query,
        lambda tall: tall @ tall_key,
        selected,
        num_key_value_heads=key.shape[1],
        keys=key.shape[2],
        mask=mask,
        sink=sink,
        recent=recent,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
    )
    return weighted_values(probabilities, lambda tall: tall @ value.to(tall.dtype), value.shape[1]).to(value.dtype)


def attention_probabilities(
    query: Tensor,
    products: Callable[[Tensor], Tensor],
    selected: Tensor | None,
    *,
    num_key_value_heads: int,
    keys: int,
    mask: Tensor | None = None,
    sink: int = 0,
    recent: int = 0,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The softmax of `attention_reference`, [batch, num_attention_heads, queries, keys], in at least float32.

    Args:
        products: dot products with the keys, wherever they are kept: maps the queries of all heads of a group,
            [batch, num_key_value_heads, any, kept], to [batch, num_key_value_heads, any, keys].
        keys: how many there are.
    """
    batch, heads, queries, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)

    def scores_of(states: Tensor) -> Tensor:
        tall = states.to(dtype).reshape(batch, num_key_value_heads, heads // num_key_value_heads * queries, -1)
        scores = products(tall).reshape(batch, heads, queries, keys) * scaling
        return softcap * torch.tanh(scores / softcap) if softcap is not None else scores

    visible, exact = visible_and_exact(
        mask, queries=queries, keys=keys, start=keys - queries, sink=sink, recent=recent, device=query.device
    )
    if selected is None:
        scores = scores_of(query)
    else:
        # where, not a product: the dropped entries of a query must not let a NaN or an infinity through.
        scores = scores_of(torch.where(selected, query, 0))
        if sink + recent > 0 or (mask is not None and mask.dtype == torch.uint8):
            scores = torch.where(exact, scores_of(query), scores)
    return softmax_seen(scores, visible, s_aux)


def softmax_seen(scores: Tensor, visible: Tensor, s_aux: Tensor | None) -> Tensor:
    """Softmax over what is visible, zeros where nothing is; `s_aux`: see `attention_reference`.

    Args:
        scores: [batch, num_attention_heads, queries, keys]; visible: boolean, broadcasts to that.
    """
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        extra = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)


def weighted_values(probabilities: Tensor, mixture: Callable[[Tensor], Tensor], num_key_value_heads: int) -> Tensor:
    """Sums of values by probabilities, [batch, num_attention_heads, queries, value_dim].

    Args:
        probabilities: [batch, num_attention_heads, queries, keys].
        mixture: product with the values, wherever they are kept: maps [batch, num_key_value_heads, any, keys] to
            [batch, num_key_value_heads, any, value_dim].
    """
    batch, heads, queries, keys = probabilities.shape
    tall = probabilities.reshape(batch, num_key_value_heads, heads // num_key_value_heads * queries, keys)
    return mixture(tall).reshape(batch, heads, queries, -1)


def attention_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor | None,
    *,
    mask: Tensor | None = None,
    sink: int = 0,
    recent: int = 0,
    **options: Any,
) -> Tensor:
    """`attention_reference`, a block of queries at a time: no more than `CHUNK_SCORES` scores in memory."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, result_dtype, value = key.to(dtype), value.dtype, value.to(dtype)
    blocks = []
    for block, seen, part in query_blocks(query, key.shape[2], mask, sink, recent):
        given = query[:, :, block], key[:, :, :seen], value[:, :, :seen]
        chosen = None if selected is None else selected[:, :, block]
        blocks.append(attention_reference(*given, chosen, mask=part, sink=sink, recent=recent, **options))
    return torch.cat(blocks, 2).to(result_dtype)


def query_blocks(
    query: Tensor, keys: int, mask: Tensor | None, sink: int, recent: int
) -> Iterator[tuple[slice, int, Tensor | None]]:
    """Blocks of as many queries as fit into memory: queries, how many first keys they see, their part of the mask."""
    queries = query.shape[2]
    scores = CHUNK_SCORES * (1 if query.device.type == "cpu" else GPU_CHUNKS)
    rows = max(1, scores // max(1, query.shape[0] * query.shape[1] * keys))
    for start in range(0, queries, rows):
        block = slice(start, min(start + rows, queries))
        # Causal: the keys after the block's last query are hidden from all of it.
        seen = keys if mask is not None else keys - queries + block.stop
        yield block, seen, mask_rows(mask, block, sink=sink, recent=recent)
