# SPDX-License-Identifier: Apache-2.0
"""What a rotation is learned from: queries, and for each the keys that it attends to, as many as memory allows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.plan import Call

SINK, RECENT = 4, 64
"""The exact window of the default setting: what lies in it loses nothing, whatever the rotation."""
FIRST = 100
"""The first position of a query that is drawn: before it nearly all tokens lie in the exact window."""
KEYS = 48
"""Keys of a query taken for their weight, and as many drawn from the rest."""


class Sample(NamedTuple):
    """Queries of some key-value heads, which may be of several layers, with their keys outside the exact window.

    Attributes:
        query: times the factor of the scores, [heads, queries, group, head_dim], float32.
        key: [heads, queries, keys, head_dim]; value: [heads, queries, keys, value_dim]; both bfloat16.
        weight: attention that each key stands for, [heads, queries, group, keys], float32. The heaviest keys are there
            themselves. The others are drawn by their weight, and stand for all that are not there.
        inside: sum of attention times value in the exact window, [heads, queries, group, value_dim], float32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    inside: Tensor

    def take(self, which: Tensor | slice) -> Sample:
        """Some of the queries."""
        return Sample(*(each[:, which] for each in self))

    def covariance(self) -> Tensor:
        """How keys vary under the attention of a query, mean over queries, [heads, head_dim, head_dim].

        A dropped dimension costs this much: adding the same number to all scores of a query changes nothing.
        """
        heads, count, _, dim = self.key.shape
        total = self.query.new_zeros(heads, dim, dim)
        for start in range(0, count, 64):
            part = self.take(slice(start, start + 64))
            key = part.key.float()
            mean = (part.weight @ key).flatten(1, 2)
            heavy = (key * part.weight.sum(2)[..., None]).flatten(1, 2)
            total += heavy.transpose(-1, -2) @ key.flatten(1, 2) - mean.transpose(-1, -2) @ mean
        return total / (count * self.query.shape[2])


def draw(call: Call, queries: int, seed: int) -> Sample:
    """A sample of one attention call of one sequence: `queries` of them, at places that the seed chooses.

    An AquaError where scores have a soft limit, since dropped products then do more than add.
    """
    if call.softcap is not None:
        raise AquaError("a basis is not learned for scores with a soft limit (softcap): use basis svd")
    device, length = call.query.device, call.query.shape[2]
    generator = torch.Generator(device).manual_seed(seed)
    places = torch.randint(min(FIRST, length // 2), length, (queries,), generator=generator, device=device)
    key, value = call.key[0].float(), call.value[0].float()
    query = call.query[0].reshape(len(key), -1, *call.query.shape[2:])[:, :, places].float() * call.scaling
    visible, outside = _seen(call, places)
    scores = (query @ key[:, None].transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    if call.s_aux is not None:  # takes part in the softmax, and has no value
        extra = call.s_aux.float().reshape(len(key), -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    attention = scores.softmax(-1)[..., : key.shape[1]]
    inside = (attention * ~outside) @ value[:, None]
    attention = attention * outside
    chosen, weight = _chosen(attention, outside, generator)

    def picked(states: Tensor) -> Tensor:
        return torch.stack([each[which] for each, which in zip(states, chosen, strict=True)]).bfloat16()

    states = picked(key), picked(value)
    return Sample(
        query.transpose(1, 2).contiguous(), *states, weight.transpose(1, 2).contiguous(), inside.transpose(1, 2)
    )


def _seen(call: Call, places: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys the queries at some places see, and which of these lie outside the exact window; [queries, keys]."""
    token = torch.arange(call.key.shape[2], device=places.device)
    visible = token <= places[:, None]
    if call.mask is not None:
        visible = visible & call.mask[0, 0, places].bool()
    return visible, visible & (token >= SINK) & (token <= places[:, None] - RECENT)


def _chosen(attention: Tensor, outside: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of the chosen keys, [heads, queries, keys], and what each weighs, [heads, group, queries, keys]."""
    shared = attention.mean(1)
    count = min(KEYS, attention.shape[-1])
    heaviest = shared.topk(count, -1).indices
    rest = shared.scatter(-1, heaviest, 0.0)
    # Where nothing is left, keys that weigh nothing are drawn.
    drawn = torch.multinomial((rest + 1e-12).flatten(0, 1), KEYS, replacement=True, generator=generator)
    drawn = drawn.view(*rest.shape[:2], KEYS)
    chosen = torch.cat([heaviest, drawn], -1)
    weight = attention.gather(-1, chosen[:, None].expand(-1, attention.shape[1], -1, -1))
    share = rest.gather(-1, drawn) / rest.sum(-1, keepdim=True).clamp_min(1e-12)
    weight[..., count:] /= KEYS * share.clamp_min(1e-12)[:, None]
    # What was drawn weighs as much as all that it stands for.
    left = (attention.sum(-1) - weight[..., :count].sum(-1)).clamp_min(0)
    weight[..., count:] *= (left / weight[..., count:].sum(-1).clamp_min(1e-12)).clamp(max=10)[..., None]
    return chosen, weight


def joined(samples: list[Sample], dim: int) -> Sample:
    """Several samples in one: of other heads (dim 0), or of other queries (dim 1)."""
    return Sample(*(torch.cat(each, dim) for each in zip(*samples, strict=True)))
