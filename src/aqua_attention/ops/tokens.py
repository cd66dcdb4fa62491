# SPDX-License-Identifier: Apache-2.0
"""AQUA-Select in plain torch: approximate scores choose the tokens that a query reads, and attention to these is exact.

This is the specification. Scores are made of a few rotated dimensions, and of keys in few bits; in the exact window
they are exact. They choose, for each query and key-value head, the tokens with most of the softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aqua_attention.ops.layout import quantized
from aqua_attention.ops.mask import visible_and_exact
from aqua_attention.ops.plan import Call, LayerPlan
from aqua_attention.ops.reference import query_blocks, weighted_values

FEW_BITS_LARGEST = 7
"""Codes of 4 bits go from minus this to this."""


class Reading(NamedTuple):
    """What each query and key-value head read, int64 [batch, num_key_value_heads, queries].

    Attributes:
        read: tokens attended to; seen: tokens that it sees.
    """

    read: Tensor
    seen: Tensor


def choose_tokens(weight: Tensor, visible: Tensor, exact: Tensor, plan: LayerPlan) -> Tensor:
    """Which tokens are read: those of the exact window, and those that weigh most of the others.

    With `select_p` the fewest tokens are read that weigh that share of all; with `select_tokens` so many besides the
    exact window. Tokens that weigh as much as the last one chosen are read, too. NaN weighs most.

    Args:
        weight: the approximate softmax, summed over the heads of a group, [batch, num_key_value_heads, queries,
            tokens], float32 or wider.
        visible, exact: boolean, of that shape; exact tokens are visible.
        plan: its settings.

    Returns:
        Boolean, of that shape.
    """
    share, count = plan.config.select_p, plan.config.select_tokens
    others = visible & ~exact
    if share == 1:
        return visible
    ordered = weight.masked_fill(~others, -1.0).sort(-1, descending=True).values
    if share is None:
        wanted = others.sum(-1).clamp(max=count)
    else:
        heavy = ordered.clamp_min(0)
        before = (weight * exact).sum(-1, keepdim=True) + heavy.cumsum(-1) - heavy
        target = share * (weight * visible).sum(-1, keepdim=True)
        wanted = torch.minimum((before < target).sum(-1), others.sum(-1))
    last = ordered.gather(-1, (wanted - 1).clamp_min(0)[..., None])
    least = torch.where(wanted[..., None] > 0, last, torch.inf)
    # Not `weight >= least`, which NaN would not be.
    return exact | (others & ~(weight < least))


def scored_keys(key: Tensor, plan: LayerPlan) -> Tensor:
    """Rotated keys as the copy that scores are made of gives them back; with `score_bits` 16 as they came.

    In 8 and 4 bits a channel is stored in units of its standard deviation around its mean, as calibrated, and a token
    and head has one scale.

    Args:
        key: [batch, num_key_value_heads, tokens, kept].
    """
    bits, states = plan.config.score_bits, key.to(torch.promote_types(key.dtype, torch.float32))
    if bits == 16:
        return states
    assert plan.key_scale is not None and plan.key_mean is not None
    mean, scale = (each[:, None, : key.shape[-1]] for each in (plan.key_mean, plan.key_scale.clamp_min(1e-12)))
    states = (states - mean) / scale
    if bits == 8:
        codes, scales = quantized(states)
        states = (codes.float() - 128) * scales.float()[..., None]
    else:
        scales = (states.abs().amax(-1, keepdim=True) / FEW_BITS_LARGEST).to(torch.bfloat16).float()
        codes = (states / scales.clamp_min(1e-30)).round().clamp(-FEW_BITS_LARGEST, FEW_BITS_LARGEST)
        states = codes * scales
    return states * scale + mean


def attend_to_chosen(
    call: Call, plan: LayerPlan, selected: Tensor | None, short: Tensor | None
) -> tuple[Tensor, Reading]:
    """Attention to the chosen tokens alone, a block of queries at a time.

    Args:
        call: its queries are rotated.
        selected: the dimensions that score, boolean of the queries' shape; None: all.
        short: queries that read every token, see `select_dimensions`.

    Returns:
        As `attention_reference`, and what was read.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (states.to(dtype) for states in call[:3])
    cheap = scored_keys(key[..., : plan.kept], plan)
    found = []
    for block, seen, part in query_blocks(query, key.shape[2], call.mask, call.sink, call.recent):
        rows = query[:, :, block]
        chosen = rows if selected is None else torch.where(selected[:, :, block], rows, 0)
        visible, exact = visible_and_exact(
            part,
            queries=rows.shape[2],
            keys=seen,
            start=seen - rows.shape[2],
            sink=call.sink,
            recent=call.recent,
            device=query.device,
        )
        given = call._replace(query=rows, key=key[:, :, :seen], value=value[:, :, :seen])
        whole = short[..., block] if short is not None else None
        found.append(_block(given, chosen[..., : plan.kept], cheap[:, :, :seen], (visible, exact), whole, plan))
    outputs, readings = zip(*found, strict=True)
    read, tokens = (torch.cat(each, -1) for each in zip(*readings, strict=True))
    return torch.cat(outputs, 2).to(call.value.dtype), Reading(read, tokens)


def _block(
    call: Call, scoring: Tensor, cheap: Tensor, seen: tuple[Tensor, Tensor], short: Tensor | None, plan: LayerPlan
) -> tuple[Tensor, Reading]:
    """Some queries, and all keys that they see.

    Args:
        scoring: queries with the dimensions that score, others zero; cheap: the keys they score.
        seen: what is visible, and what of it is exact.
    """
    (batch, heads, queries, _), (groups, tokens) = call.query.shape, call.key.shape[1:3]
    visible, exact = seen

    def scores_of(states: Tensor, keys: Tensor) -> Tensor:
        tall = states.reshape(batch, groups, heads // groups * queries, -1)
        found = (tall @ keys.transpose(-1, -2)).view(batch, heads, queries, tokens) * call.scaling
        return call.softcap * torch.tanh(found / call.softcap) if call.softcap is not None else found

    def softmax_of(scores: Tensor) -> Tensor:
        if call.s_aux is not None:
            extra = call.s_aux.to(scores.dtype).reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
            scores = torch.cat([scores, extra], -1)
        return scores.softmax(-1)[..., :tokens]

    # Tokens of the exact window may keep more dimensions than others.
    full = scores_of(call.query[..., : plan.kept], call.key[..., : plan.kept])
    if call.key.shape[-1] > plan.kept:
        full = torch.where(exact, scores_of(call.query, call.key), full)
    approximate = torch.where(exact, full, scores_of(scoring, cheap)).masked_fill(~visible, -torch.inf)
    weight = softmax_of(approximate).view(batch, groups, -1, queries, tokens).sum(2)
    # What is visible is the same for all heads.
    visible, exact = (each[:, :1].expand(weight.shape) for each in seen)
    read = choose_tokens(weight, visible, exact, plan)
    if short is not None:
        read = read | (visible & short[:, :1, :, None])
    every = read.repeat_interleave(heads // groups, 1)
    probabilities = softmax_of(full.masked_fill(~every, -torch.inf)).masked_fill(~every.any(-1, keepdim=True), 0.0)
    output = weighted_values(probabilities, lambda tall: tall @ call.value, groups)
    return output, Reading(read.sum(-1), visible.sum(-1))
