# SPDX-License-Identifier: Apache-2.0
"""AQUA-Select in plain torch: approximate scores choose the tokens that a query reads, and attention to these is exact.

This is the specification. Scores are made of a few rotated dimensions, and of keys in few bits; in the exact window
they are exact. They choose, for each query and key-value head, the tokens with most of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqua_attention.ops.heaviest import least_of
from aqua_attention.ops.mask import visible_and_exact
from aqua_attention.ops.plan import Call, LayerPlan, Reading
from aqua_attention.ops.reference import query_blocks, softmax_seen, weighted_values
from aqua_attention.ops.scored import coded, score_quantization, zero_of

SCALE_BYTES = 2
"""Of the scale of a token and head, where keys or values are in few bits."""


class Scored(NamedTuple):
    """Approximate scores, before they are scaled.

    Attributes:
        scores: [batch, num_attention_heads, queries, tokens].
        read: bytes read for each token, [batch, num_key_value_heads, queries], or a number.
    """

    scores: Tensor
    read: Tensor | float


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
    if count is not None:
        # Hidden tokens and those of the window come last.
        ordered = weight.masked_fill(~others, -1.0)
        least = ordered.topk(min(count, weight.shape[-1]), -1, sorted=False).values.amin(-1, keepdim=True)
    else:
        assert share is not None
        wanted = share * (weight * visible).sum(-1) - (weight * exact).sum(-1)
        least = least_of(weight.masked_fill(~others, 0.0), wanted)
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
    scale, mean = (each[:, None] for each in score_quantization(plan))
    states = (states - mean) / scale
    codes, scales = coded(states, bits)
    return (codes.to(states.dtype) - zero_of(bits)) * scales.to(states.dtype)[..., None] * scale + mean


def scores_by_dimensions(query: Tensor, key: Tensor, selected: Tensor | None, plan: LayerPlan) -> Scored:
    """Products of queries with the copy of the keys, in the dimensions chosen for each query.

    Args:
        query: rotated, [batch, num_attention_heads, queries, kept]; selected: boolean of that shape; None: all.
        key: as `scored_keys` gives them, [batch, num_key_value_heads, tokens, kept].
    """
    if selected is None:
        return Scored(products(query, key), scored_bytes(plan.kept, plan.config.score_bits))
    # A dimension is read once for all heads of a group.
    dims = selected.unflatten(1, (key.shape[1], -1)).any(2).sum(-1)
    return Scored(products(torch.where(selected, query, 0), key), scored_bytes(dims, plan.config.score_bits))


def scored_bytes(dims: Any, bits: int) -> Any:
    """Bytes of so many dimensions of a key that is scored in so many bits, with its scale."""
    return dims * (bits / 8) + (0 if bits == 16 else SCALE_BYTES)


class Choice(NamedTuple):
    """What one block of queries chose, for observers; all [batch, num_key_value_heads, queries, tokens].

    Attributes:
        layer: its index in the model.
        read, visible, exact: boolean.
        approximate, weight: softmax by the scores and the exact one, summed over the heads of a group.
    """

    layer: int
    read: Tensor
    visible: Tensor
    exact: Tensor
    approximate: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Way:
    """How tokens are scored, chosen and weighed. Benchmarks put others in the place of ours, to compare them.

    Attributes:
        scores: what scores tokens; choose: which are read.
        left_out: what stands for tokens that are not read: "nothing"; "mean", the mean of all values seen, as SparQ has
            it; "others", the mean of the values not read. Both weigh what the approximate softmax leaves out.
        exact_keys: chosen tokens are weighed by exact scores. If not, only those of the exact window are, and of the
            others no keys are read but those that are scored.
        watch: is told what was chosen. Exact weights of all tokens are computed for it alone.
    """

    scores: Callable[[Tensor, Tensor, Tensor | None, LayerPlan], Scored] = scores_by_dimensions
    choose: Callable[[Tensor, Tensor, Tensor, LayerPlan], Tensor] = choose_tokens
    left_out: str = "nothing"
    exact_keys: bool = True
    watch: Callable[[Choice], None] | None = None


WAY = Way()


def products(query: Tensor, key: Tensor) -> Tensor:
    """Dot products of all heads with the keys of their groups, [batch, num_attention_heads, queries, tokens]."""
    (batch, heads, queries, width), (groups, tokens) = query.shape, key.shape[1:3]
    return (query.reshape(batch, groups, -1, width) @ key.transpose(-1, -2)).view(batch, heads, queries, tokens)


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
    copy, found = scored_keys(key[..., : plan.kept], plan), []
    for block, seen, part in query_blocks(query, key.shape[2], call.mask, call.sink, call.recent):
        rows = query[:, :, block]
        given = call._replace(query=rows, key=key[:, :, :seen], value=value[:, :, :seen], mask=part)
        chosen = None if selected is None else selected[:, :, block, : plan.kept]
        found.append(_block(given, copy[:, :, :seen], plan, chosen, None if short is None else short[..., block]))
    outputs, readings = zip(*found, strict=True)
    reading = Reading(*(torch.cat(each, -1) for each in zip(*readings, strict=True)))
    return torch.cat(outputs, 2).to(call.value.dtype), reading


def _block(
    call: Call, copy: Tensor, plan: LayerPlan, selected: Tensor | None, short: Tensor | None
) -> tuple[Tensor, Reading]:
    """Some queries, and all keys that they see; `copy`: what is scored of these."""
    (heads, queries), (groups, tokens) = call.query.shape[1:3], call.key.shape[1:3]
    window = {"queries": queries, "keys": tokens, "start": tokens - queries, "sink": call.sink, "recent": call.recent}
    visible, exact = visible_and_exact(call.mask, **window, device=call.query.device)
    query, key = call.query[..., : plan.kept], call.key[..., : plan.kept]

    def limited(found: Tensor) -> Tensor:
        found = found * call.scaling
        return call.softcap * torch.tanh(found / call.softcap) if call.softcap is not None else found

    full = products(query, key)
    if call.key.shape[-1] > plan.kept:
        # Tokens of the exact window keep more dimensions than others.
        full = torch.where(exact, products(call.query, call.key), full)
    scored = WAY.scores(query, copy, selected, plan)
    likely = limited(torch.where(exact, full, scored.scores))
    approximate = softmax_seen(likely, visible, call.s_aux)
    weight = _of_groups(approximate, groups)
    # What is visible is the same for all heads.
    visible, exact = (each[:, :1].expand(weight.shape) for each in (visible, exact))
    read = WAY.choose(weight, visible, exact, plan)
    if short is not None:
        read = read | (visible & short[:, :1, :, None])
    full = limited(full)
    if WAY.watch is not None:
        dense = softmax_seen(full, visible[:, :1], call.s_aux)
        WAY.watch(Choice(plan.index, read, visible, exact, weight, _of_groups(dense, groups)))
    every = read.repeat_interleave(heads // groups, 1)
    probabilities = softmax_seen(full if WAY.exact_keys else likely, every, call.s_aux)
    if WAY.left_out != "nothing":
        probabilities = _with_others(probabilities, approximate, every, visible.repeat_interleave(heads // groups, 1))
    output = weighted_values(probabilities, lambda tall: tall @ call.value, groups)
    count, seen = read.sum(-1), visible.sum(-1)
    keys = count if WAY.exact_keys else exact.sum(-1)
    return output, reading_of(count, keys, seen, scored.read, plan, call.value.shape[-1])


def _of_groups(probabilities: Tensor, groups: int) -> Tensor:
    """Summed over the heads of each group."""
    return probabilities.unflatten(1, (groups, -1)).sum(2)


def reading_of(
    read: Tensor, keys: Tensor, seen: Tensor, scored: Tensor | float, plan: LayerPlan, value_dim: int
) -> Reading:
    """`read` tokens, exact keys of `keys` of them, and `scored` bytes of each that is seen."""
    bits = plan.config.bits
    scale = 0 if bits is None else SCALE_BYTES
    one, other = (dims * (bits or 16) / 8 + scale for dims in (plan.kept, value_dim))
    share = (scored + (one * keys + other * read) / seen.clamp_min(1)) / (2 * (plan.head_dim + value_dim))
    return Reading(read, seen, share.float())


def everything_read(call: Call, plan: LayerPlan) -> Reading:
    """What queries read that choose no tokens."""
    (batch, _, queries, _), (groups, keys) = call.query.shape, call.key.shape[1:3]
    window = {"queries": queries, "keys": keys, "start": keys - queries, "sink": 0, "recent": 0}
    visible, _ = visible_and_exact(call.mask, **window, device=call.query.device)
    seen = visible[:, :1].sum(-1).expand(batch, groups, queries)
    return reading_of(seen, seen, seen, 0.0, plan, call.value.shape[-1])


def _with_others(probabilities: Tensor, approximate: Tensor, read: Tensor, visible: Tensor) -> Tensor:
    """Probabilities in which tokens that are not read have equal parts of what the approximate softmax gives them."""
    missing = (approximate * (visible & ~read)).sum(-1, keepdim=True)
    among = visible if WAY.left_out == "mean" else visible & ~read
    return probabilities * (1 - missing) + missing * among / among.sum(-1, keepdim=True).clamp_min(1)
