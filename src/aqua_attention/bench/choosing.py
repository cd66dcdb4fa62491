# SPDX-License-Identifier: Apache-2.0
"""Rows that choose tokens (AQUA-Select) over many lengths: which settings they are, and keys whose softmax is known."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from aqua_attention.bench.problem import OURS, Problem
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError

QUIET, SPREAD = 0.05, 0.3
"""Size of what the scores do not depend on, and standard deviation of those of tokens of one kind."""


class Choosing(NamedTuple):
    """What chooses tokens, at any length.

    Attributes:
        k_ratio, score_bits: of the dimensions and of the copy of the keys that score them.
        select_p, select_tokens: see `AquaConfig`; select_share: a fixed share of the tokens. One of the three.
    """

    k_ratio: float
    score_bits: int = 8
    select_p: float | None = None
    select_tokens: int | None = None
    select_share: float | None = None

    @property
    def name(self) -> str:
        """Such as "select_p 0.95"."""
        return next(
            f"{name} {value:g}" for name, value in self._asdict().items() if name in CHOICES and value is not None
        )

    def at(self, length: int, **changes: Any) -> AquaConfig:
        """The setting at a length, with changes; an AquaError for a share that is none."""
        count = self.select_tokens
        if self.select_share is not None:
            if not 0 < self.select_share <= 1:
                raise AquaError(f"select_share is {self.select_share:g}: it must be a number with 0 < share <= 1")
            count = max(1, round(self.select_share * length))
        given = {"k_ratio": self.k_ratio, "score_bits": self.score_bits, "select_p": self.select_p}
        return replace(OURS, **given | {"select_tokens": count} | changes)


CHOICES = ("select_p", "select_tokens", "select_share")


def with_heavy(problem: Problem, mass: float, share: float) -> Problem:
    """The problem with other queries and keys: a random `share` of the tokens holds `mass` of the softmax.

    Of random keys nearly all tokens would have to be read. All scores lie along the first rotated dimension.

    Raises:
        AquaError: mass or share is not between 0 and 1.
    """
    if not (0 < mass < 1 and 0 < share < 1):
        raise AquaError(f"select_p is {mass:g} and --read-share {share:g}: both must be above 0 and below 1")
    query, (_, value), keys, values, rotation, key_rms = problem
    heads, head_dim = query.shape[1:]
    kv_heads = keys.shape[1]
    generator = torch.Generator(keys.device).manual_seed(1)
    shape, given = keys.shape[:3], dict[str, Any](generator=generator, device=keys.device)
    above = math.log(mass / (1 - mass) * (1 - share) / share)
    scores = SPREAD * torch.randn(shape, **given) + above * (torch.rand(shape, **given) < share)
    along = rotation[:, :, 0]
    keys = (QUIET * keys.float() + scores[..., None] * along[:, None]).to(keys.dtype)
    whole = head_dim**0.5 * along.repeat_interleave(heads // kv_heads, 0)
    query = (QUIET * query.float() + whole).to(query.dtype)
    return Problem(query, (keys[:, :, -1].clone(), value), keys, values, rotation, key_rms.new_ones(key_rms.shape))


def problem_for(problem: Problem, config: AquaConfig, share: float | None) -> Problem:
    """What a setting is timed on: for `select_p` keys of which a share holds it; None, or a count: random ones."""
    if config.select_p is None or share is None or config.select_p == 1:
        return problem
    return with_heavy(problem, config.select_p, share)
