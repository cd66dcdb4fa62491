# SPDX-License-Identifier: Apache-2.0
"""One decoding step on a CPU that chooses tokens (AQUA-Select), from a growing cache as `generate` has it."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from aqua_attention.bench.problem import Problem
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.config import AquaConfig
from aqua_attention.errors import REPORT, AquaError
from aqua_attention.ops.api import attend
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.select import rotate

ROUNDINGS, LEAST_ERROR = 16, 1e-5
"""So many units in the last place a result may be from plain torch, and so far for its size."""
TIES = 2
"""Tokens of a head that may differ: rounding decides between those that weigh the same."""
TIED_ERROR = 1e-2
"""How far it may be then."""


@dataclass
class SelectWay:
    """What is timed: a cache layer that holds all tokens, and what a row says of it."""

    layer: RotatedLayer
    call: Call
    new: tuple[torch.Tensor, torch.Tensor]
    facts: dict[str, Any]

    def run(self, part: str, length: int) -> float:
        """Seconds of "attention" alone, or of a "step": rotate the key, append, attend as the newest of the tokens."""
        if part == "step":
            self.layer.crop(length - 1)
        start = time.perf_counter()
        self.step() if part == "step" else self.layer.attend(self.call, False)
        return time.perf_counter() - start

    def step(self) -> Attended:
        """The newest token goes to the cache, then its query attends."""
        key, value = self.layer.update(*self.new)
        return self.layer.attend(self.call._replace(key=key, value=value), False)


def select_way(problem: Problem, config: AquaConfig) -> SelectWay:
    """One setting, checked against plain torch; an AquaError where it is wrong."""
    query, (key, value), keys, values, rotation, key_rms = problem
    rotated = rotate(keys, rotation).float()
    scale, mean = rotated.std((0, 2)), rotated.mean((0, 2))
    plan = LayerPlan(rotation, key_rms, config, rotation.shape[1] ** -0.5, key_scale=scale, key_mean=mean)
    layer = RotatedLayer(plan)
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    new = key[:, :, None], value[:, :, None]
    call = plan.call(query[:, :, None], *layer.update(*new))
    way = SelectWay(layer, call, new, {})
    # Named once, so that a setting that C does not take is an error and not a slow row.
    attend(call._replace(score_copy=layer.score_copy), plan, "cpu")
    way.layer.crop(keys.shape[2] - 1)
    key, value = layer.update(*new)
    asked = call._replace(key=key, value=value, is_observed=True)
    read = _check(layer.attend(asked, False), attend(call, plan, "reference"))
    way.facts = {"name": "aqua, select", "k_ratio": config.k_ratio, "setting": config.changes, "read": read}
    return way


def _check(found: Attended, right: Attended) -> float:
    """The share of tokens that was read; an AquaError where that, or the output, is wrong."""
    assert found.reading is not None and right.reading is not None
    several = int((found.reading.read - right.reading.read).abs().max())
    error = float((found.output.double() - right.output.double()).norm() / right.output.double().norm())
    allowed = max(LEAST_ERROR, ROUNDINGS * torch.finfo(found.output.dtype).eps) if several == 0 else TIED_ERROR
    if several > TIES or not error <= allowed:
        raise AquaError(f"choosing tokens is wrong: {several} others are read, and the error is {error:.1e}: {REPORT}")
    return float(found.reading.read.double().mean() / found.reading.seen.double().mean())
