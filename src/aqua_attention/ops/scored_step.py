# SPDX-License-Identifier: Apache-2.0
"""A decoding step that chooses tokens in plain torch, over a `ScoredCache` or pages: what the kernels are held to."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aqua_attention.ops.layout import TILE
from aqua_attention.ops.mask import visible_and_exact
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.reference import softmax_seen, weighted_values
from aqua_attention.ops.scored import ScoredCache
from aqua_attention.ops.scored_pages import PagedSequences
from aqua_attention.ops.select import rotate, select_dimensions
from aqua_attention.ops.tokens import choose_tokens, products


class SelectedStep(NamedTuple):
    """What a step found.

    Attributes:
        output: [batch, num_attention_heads, value_dim] in the dtype of the cache.
        read: boolean [batch, num_key_value_heads, tiles * TILE], the tokens that were attended to.
        weight: float32 of that shape, the approximate softmax summed over the heads of a group.
        rotated: queries, [batch, num_attention_heads, kept].
    """

    output: Tensor
    read: Tensor
    weight: Tensor
    rotated: Tensor


def selected_step(
    query: Tensor, key: Tensor, value: Tensor, cache: ScoredCache, plan: LayerPlan, scaling: float
) -> SelectedStep:
    """Rotate and append one token a sequence, score all, choose, attend to what was chosen.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        cache: gets the token.
        scaling: factor of the scores.
    """
    cache.check_step(query, key, value, plan)
    rotated, new = (rotate(states[:, :, None], plan.rotation)[:, :, 0] for states in (query, key))
    cache.append(new, value)
    return attend_selected(rotated, cache, plan, scaling)


def attend_selected(
    rotated: Tensor,
    cache: ScoredCache | PagedSequences,
    plan: LayerPlan,
    scaling: float,
    softcap: float | None = None,
) -> SelectedStep:
    """The same of rotated queries, once the token is in the cache; `softcap`: see `Call`."""
    batch, kv_heads, _, value_dim, tiles = cache.shape
    read = torch.zeros(batch, kv_heads, tiles * TILE, dtype=torch.bool, device=rotated.device)
    weight = torch.zeros(read.shape, device=rotated.device)
    output = rotated.new_zeros(*rotated.shape[:2], value_dim)
    for row, length in enumerate(cache.lengths.tolist()):
        if length <= 0:
            continue
        seen, query = slice(0, length), rotated[row : row + 1, :, None]
        keys, values, copy = (each[None] for each in cache.read(row, length))
        taken, weight[row, :, seen] = _chosen(query, keys, copy, plan, scaling, softcap)
        read[row, :, seen] = taken
        scores = _limited(products(query.float(), keys) * scaling, softcap)
        every = taken[None, :, None].repeat_interleave(rotated.shape[1] // kv_heads, 1)
        probabilities = softmax_seen(scores, every, None)
        found = weighted_values(probabilities, partial(torch.matmul, other=values), kv_heads)
        output[row] = found[0, :, 0].to(output.dtype)
    return SelectedStep(output, read, weight, rotated)


def _limited(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _chosen(
    query: Tensor, key: Tensor, copy: Tensor, plan: LayerPlan, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Which tokens one query reads and what they weigh, [num_key_value_heads, tokens]; `copy`: keys to be scored."""
    (_, heads, _, _), (_, kv_heads, length, _) = query.shape, key.shape
    short = torch.zeros(1, heads, 1, dtype=torch.bool, device=query.device)
    selected = select_dimensions(query, plan, short, scaling=scaling)
    window = {"queries": 1, "keys": length, "start": length - 1, "sink": plan.sink, "recent": plan.recent}
    visible, exact = visible_and_exact(None, **window, device=query.device)
    query = query.float()
    scored = products(query if selected is None else torch.where(selected, query, 0), copy)
    scores = _limited(torch.where(exact, products(query, key), scored) * scaling, softcap)
    weight = softmax_seen(scores, visible, None).view(1, kv_heads, heads // kv_heads, 1, length).sum(2)
    visible, exact = (each[:, :1].expand(weight.shape) for each in (visible, exact))
    read = visible if length < plan.min_length else choose_tokens(weight, visible, exact, plan)
    return read[0, :, 0], weight[0, :, 0]
