# SPDX-License-Identifier: Apache-2.0
"""AQUA-H2O: which tokens of a cache stay (paper, section on token eviction; H2O, arXiv 2306.14048).

A key-value head keeps the tokens that were given most attention, its heavy hitters, and as many of the most recent.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 7
"""With `h2o_queries`, a token counts as much as the best of so many around it: whole phrases stay (SnapKV)."""


@dataclass(frozen=True)
class Eviction:
    """How many tokens stay, and by which scores.

    Attributes:
        ratio: share of a sequence's tokens so far that stays, in (0, 1].
        queries: attention of the last so many queries counts; None: of all so far.
        sink, recent: first and last tokens that always stay.
    """

    ratio: float
    queries: int | None
    sink: int
    recent: int

    def kept(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens of sequences of these lengths stay, and how many of them are the last ones; [batch] each."""
        # The small term keeps 0.28 * 25 = 7.000000000000001 from becoming 8.
        budget = (lengths.double() * self.ratio - 1e-9).ceil().long()
        last = (budget // 2).clamp_min(max(self.recent, 1))
        return torch.maximum(budget, last + self.sink), last

    def at_most(self, length: int) -> int:
        """The largest number that stays of a sequence of `length`, by `ratio`."""
        return max(1, math.ceil(length * self.ratio - 1e-9))

    def counted(self, real: Tensor) -> Tensor:
        """Whose attention counts of new queries, boolean [batch, queries]; `real` says which are no padding."""
        if self.queries is None:
            return real
        later = real.flip(-1).long().cumsum(-1).flip(-1)  # 1 for the last real query
        return real & (later <= self.queries)

    def added(self, mass: Tensor, new: Tensor, real: Tensor) -> Tensor:
        """Attention so far, and that of new queries; with a limit on queries the old fades as real ones pass."""
        if self.queries is None:
            return mass + new
        return mass * (1 - real.sum(-1) / self.queries).clamp_min(0)[:, None, None] + new

    def chosen(self, mass: Tensor, real: Tensor, lengths: Tensor, whole: int = 0) -> tuple[Tensor, Tensor]:
        """Which tokens stay: places, [batch, num_key_value_heads, kept], in order, and whether real, [batch, kept].

        Rows that keep fewer tokens than others begin with places that are not real.

        Args:
            mass: attention that each stored token was given, [batch, num_key_value_heads, stored].
            real: boolean [batch, stored]; False is padding.
            lengths: tokens of each sequence so far, evicted ones included, padding not; [batch].
            whole: stored tokens at the end that all stay, real or not, and come last.
        """
        old = mass.shape[2] - whole
        budget, last = self.kept(lengths)
        rank = real.long().cumsum(-1)  # 1 for the first real token
        protected = real & ((rank <= self.sink) | (rank > rank[:, -1:] - last[:, None]))
        if self.queries is not None:
            mass = F.max_pool1d(mass, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)
        # A NaN is the largest number there is, and no more: the protected are above it.
        mass = mass.nan_to_num(torch.finfo(mass.dtype).max)
        mass, tail, real, protected = mass[..., :old], real[:, old:], real[:, :old], protected[:, :old]
        budget = torch.maximum(budget - tail.sum(-1), protected.sum(-1)).minimum(real.sum(-1))
        kept = int(budget.max())
        worth = mass.masked_fill(protected[:, None], torch.inf).masked_fill(~real[:, None], -torch.inf)
        places = torch.sort(worth, dim=-1, descending=True, stable=True).indices[..., :kept]
        stays = torch.arange(kept, device=mass.device) < budget[:, None]
        places = torch.where(stays[:, None], places, -1).sort(-1).values.clamp_min(0)
        end = torch.arange(old, old + whole, device=mass.device).expand(*places.shape[:2], whole)
        return torch.cat([places, end], -1), torch.cat([stays.flip(-1), tail], -1)
