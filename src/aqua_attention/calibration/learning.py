# SPDX-License-Identifier: Apache-2.0
"""A rotation learned for what AQUA does with it: to drop, for each query, the dimensions that matter least.

The loss of a query is what dropping does to its attention: the KL divergence of the softmax, and the squared error of
the head's output. Both are taken for several numbers of dimensions, each relative to the singular vectors' loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aqua_attention.calibration.rotations import orthogonal, spread_along, stepped, turnable
from aqua_attention.calibration.sample import Sample, joined

RATE = 0.006
BATCH, KEPT = 64, 4
"""Queries in a step, drawn from the samples of the last few windows."""
MEASURES = (1.0, 1.0)
"""How much the divergence of the softmax counts, and the error of the head's output."""
EVALUATED = 128
"""Queries evaluated at once."""
MARGIN = 0.03
"""A rotation must lose so much less than the singular vectors, or these are kept: the held-out sample is small."""
NOT_MEASURED = 1e30
"""In place of a loss; a file holds no infinity."""
ORIGINS = ("svd", "none", "learned")
"""Where a head's rotation comes from."""
STATE = ("rotation", "momentum", "scale", "best", "loss", "covariance")
"""Attributes of a `Learner` that change; samples are drawn again."""


class Target(NamedTuple):
    """One way in which dimensions are dropped, and how much it counts.

    Attributes:
        ratio: share of the dimensions that are multiplied.
        kind: "group" or "head", see `share` of AquaConfig; "stored": the first ones, as `s_ratio` keeps them.
    """

    ratio: float
    kind: str
    weight: float


TARGETS = (
    Target(0.25, "group", 3.0),
    Target(0.5, "group", 1.0),
    Target(0.75, "group", 1.0),
    Target(0.5, "head", 1.0),
    Target(0.75, "stored", 1.0),
)


class Chosen(NamedTuple):
    """What is kept of some heads.

    Attributes:
        rotation: [heads, head_dim, head_dim], the dimensions that matter most first.
        spread: what "weighted" selection multiplies queries by, [heads, head_dim].
        loss: on the sample that chose, relative to the singular vectors, [heads].
        origin: places in `ORIGINS`, [heads].
    """

    rotation: Tensor
    spread: Tensor
    loss: Tensor
    origin: Tensor


@dataclass
class Learner:
    """Rotations of some key-value heads that are learned together.

    Attributes:
        start, start_spread: the singular vectors, [heads, head_dim, head_dim], and the root mean square of keys along
            them, [heads, head_dim]: what a file of singular vectors holds.
        held: a sample that no step sees. It decides for each head which rotation is kept.
        covariance: of keys under attention, see `Sample.covariance`, mean over the `windows` read.
        rotation: the present one; momentum, scale: of its steps; steps: taken.
        best: the best rotation so far; loss: its loss on `held`, relative to the singular vectors.
    """

    start: Tensor
    start_spread: Tensor
    held: Sample
    windows: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        """Begin at the singular vectors."""
        self.rotation, self.best = self.start.clone(), self.start.clone()
        self.momentum, self.scale = torch.zeros_like(self.start), torch.zeros_like(self.start)
        self.covariance = torch.zeros_like(self.start)
        self.loss = self.start.new_full((len(self.start),), NOT_MEASURED)
        self._base = losses(self.held, self.start, self.start_spread)
        self._recent: list[Sample] = []

    def see(self, sample: Sample) -> None:
        """Take in what one window gave."""
        mean = self.covariance * (self.windows / (self.windows + 1))
        self.covariance, self.windows = mean + sample.covariance() / (self.windows + 1), self.windows + 1
        self._recent = [*self._recent, sample][-KEPT:]

    def step(self, progress: float, seed: int) -> None:
        """One step on some of the queries seen last; `progress` goes from 0 to 1, and the rate falls with it."""
        counts = [each.query.shape[1] for each in self._recent]
        chosen = torch.randint(sum(counts), (BATCH,), generator=torch.Generator().manual_seed(seed))
        parts = torch.split(torch.arange(sum(counts)), counts)
        taken = [chosen[(chosen >= part[0]) & (chosen <= part[-1])] - part[0] for part in parts]
        recent = zip(self._recent, taken, strict=True)
        batch = joined([each.take(which.to(self.start.device)) for each, which in recent], 1)
        with torch.enable_grad():
            turn, turned = turnable(self.rotation)
            found = self._relative(losses(batch, turned, spread_along(self.rotation, self.covariance)))
            (gradient,) = torch.autograd.grad(found.sum(), turn)
        self.steps += 1
        moments = self.momentum, self.scale, self.steps
        self.rotation, self.momentum, self.scale = stepped(self.rotation, gradient, *moments, RATE * (1 - progress))

    def consider(self) -> None:
        """Remember the present rotation for the heads for which it is the best so far."""
        self.rotation = orthogonal(self.rotation)
        found = self._held_loss(self.rotation)
        better = found < self.loss
        self.loss = torch.where(better, found, self.loss)
        self.best = torch.where(better[:, None, None], self.rotation, self.best)

    def chosen(self) -> Chosen:
        """For each head the best of the rotation learned, none, and the singular vectors, measured as they are kept."""
        dim = self.start.shape[-1]
        unrotated = torch.eye(dim, dtype=self.start.dtype, device=self.start.device).expand_as(self.start)
        found = Chosen(self.start, self.start_spread, torch.ones_like(self.loss), torch.zeros_like(self.loss).long())
        for origin, rotation in (("none", unrotated), ("learned", self.best)):
            turned = sorted_by_energy(rotation, self.held, self.covariance)
            loss = self._held_loss(turned)
            better = loss < torch.clamp(found.loss, max=1 - MARGIN)
            spread = spread_along(turned, self.covariance)
            # As long as before, so that `logit_error` means the same.
            spread = spread * (self.start_spread.norm(dim=-1) / spread.norm(dim=-1).clamp_min(1e-30))[:, None]
            found = Chosen(
                torch.where(better[:, None, None], turned, found.rotation),
                torch.where(better[:, None], spread, found.spread),
                torch.where(better, loss, found.loss),
                found.origin.masked_fill(better, ORIGINS.index(origin)),
            )
        return found

    def _held_loss(self, rotation: Tensor) -> Tensor:
        return self._relative(losses(self.held, rotation, spread_along(rotation, self.covariance)))

    def _relative(self, found: Tensor) -> Tensor:
        """Losses of each head in one number, 1 for the singular vectors; [heads]."""
        weights = found.new_tensor(MEASURES)[:, None] * found.new_tensor([target.weight for target in TARGETS])
        # Where nothing is lost, nothing is better.
        return torch.einsum("mth,mt->h", (found + 1e-12) / (self._base + 1e-12), weights) / weights.sum()


def losses(sample: Sample, rotation: Tensor, spread: Tensor) -> Tensor:
    """Mean loss of each head for each target, by divergence and by output, [2, targets, heads]."""
    count = sample.query.shape[1]
    if torch.is_grad_enabled():
        return _losses(sample, rotation, spread)
    parts = [sample.take(slice(start, start + EVALUATED)) for start in range(0, count, EVALUATED)]
    return torch.stack([part.query.shape[1] / count * _losses(part, rotation, spread) for part in parts]).sum(0)


def sorted_by_energy(rotation: Tensor, sample: Sample, covariance: Tensor) -> Tensor:
    """The same dimensions, those whose loss would matter most first: `s_ratio` leaves out the last."""
    turned = sample.query @ rotation[:, None]
    energy = turned.square().sum((1, 2)) * spread_along(rotation, covariance).square()
    order = torch.sort(energy, dim=-1, descending=True, stable=True).indices
    return rotation.gather(-1, order[:, None].expand_as(rotation))


def _losses(sample: Sample, rotation: Tensor, spread: Tensor) -> Tensor:
    query = sample.query @ rotation[:, None]
    heads, count, group, dim = query.shape
    dropped = torch.stack([query.masked_fill(_kept(query.detach(), spread, target), 0.0) for target in TARGETS], 2)
    # Turned back, because there are fewer queries than keys.
    dropped = dropped.view(heads, count, -1, dim) @ rotation.transpose(-1, -2)[:, None]
    change = (dropped @ sample.key.float().transpose(-1, -2)).view(heads, count, len(TARGETS), group, -1)
    change, weight = -change, sample.weight[:, :, None]
    attention = weight * change.clamp(max=60).exp()
    total = (1 - weight.sum(-1) + attention.sum(-1)).clamp_min(1e-30)
    divergence = total.log() - (weight * change).sum(-1)
    moved = (attention / total[..., None] - weight).view(heads, count, len(TARGETS) * group, -1) @ sample.value.float()
    moved = moved.view(*total.shape, -1) + sample.inside[:, :, None] * (1 / total - 1)[..., None]
    return torch.stack([divergence.mean((1, 3)).T, moved.square().sum(-1).mean((1, 3)).T])


def _kept(query: Tensor, spread: Tensor, target: Target) -> Tensor:
    """Which dimensions are multiplied, boolean, shape of `query`; as `select_dimensions` with "weighted" chooses."""
    count = math.ceil(target.ratio * query.shape[-1])
    if target.kind == "stored":
        return (torch.arange(query.shape[-1], device=query.device) < count).expand_as(query)
    energy = (query * spread[:, None, None]).square()
    energy = energy.sum(2, keepdim=True) if target.kind == "group" else energy
    chosen = torch.zeros_like(energy, dtype=torch.bool).scatter_(-1, energy.topk(count, -1).indices, True)
    return chosen.expand_as(query)
