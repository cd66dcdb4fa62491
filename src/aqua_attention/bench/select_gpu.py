# SPDX-License-Identifier: Apache-2.0
"""One decoding step on a GPU that chooses tokens (AQUA-Select), over a cache of fixed size as `generate` has it."""

import dataclasses
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from aqua_attention.bench.choosing import problem_for
from aqua_attention.bench.problem import Problem
from aqua_attention.bench.timing import MOST_REPEATS, seconds_of
from aqua_attention.config import AquaConfig
from aqua_attention.errors import REPORT, AquaError
from aqua_attention.ops import scored_step
from aqua_attention.ops.backends.triton.token_step import decode_scored
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization
from aqua_attention.ops.select import rotate

TOLERANCE = 0.05
"""How far a result and the number of tokens may be from plain torch's, relative: weights have 11 bits."""


def measure_select(problem: Problem, configs: list[AquaConfig], *, heavy: float | None = None) -> list[dict[str, Any]]:
    """Check and time a step (rotate, choose dimensions, append, score, choose tokens, attend) of one sequence.

    Args:
        problem: its last token is the new one.
        heavy: of `select_p`, the share of the tokens that holds it; None: random keys.

    Returns:
        A row a setting, as `measure_decode_cpu` has it: `name`, `k_ratio`, `setting`, `read` and `step_seconds`.

    Raises:
        AquaError: a kernel is wrong, or does not take the setting.
    """
    return [_row(problem_for(problem, config, heavy), config) for config in configs]


def _row(problem: Problem, config: AquaConfig) -> dict[str, Any]:
    query, (key, value), keys, values, rotation, key_rms = problem
    batch, _, length, head_dim = keys.shape
    rotated = rotate(keys, rotation)
    scale, mean = rotated.float().std((0, 2)), rotated.float().mean((0, 2))
    plan = LayerPlan(rotation, key_rms, config, head_dim**-0.5, key_scale=scale, key_mean=mean)
    given: dict[str, Any] = {"dtype": keys.dtype, "device": keys.device, "score_bits": config.score_bits}
    cache = ScoredCache.empty(batch, values.shape[3], length, score_quantization(plan), **given)
    held = torch.full((batch,), length - 1, dtype=torch.int32, device=keys.device)
    cache.fill(rotated[:, :, :-1], values[:, :, :-1], held)
    expected = scored_step.selected_step(query, key, value, cache, plan, plan.scaling)
    cache.lengths.copy_(held)
    output, _, counts = decode_scored(query, key, value, cache, plan, plan.scaling)
    _check(output, counts, expected)
    read = float(counts.float().mean()) / length
    # Steps in a row do not lengthen one another's sequence: each has lengths of its own, aligned as a kernel wants.
    lengths = held.new_empty(MOST_REPEATS, -(-batch // 4) * 4)[:, :batch]
    turns = cycle([dataclasses.replace(cache, lengths=row) for row in lengths])
    seconds = seconds_of(
        lambda: decode_scored(query, key, value, next(turns), plan, plan.scaling),
        lambda: lengths.copy_(held.expand_as(lengths)),
    )
    facts = {"name": "aqua, select", "k_ratio": config.k_ratio, "setting": config.changes, "read": read}
    return facts | {"step_seconds": seconds}


def _check(output: Tensor, counts: Tensor, expected: scored_step.SelectedStep) -> None:
    """Raise AquaError where a step is far from plain torch's."""
    wanted = expected.read.sum(-1)
    others = float(((counts.view(wanted.shape) - wanted).abs() / wanted).max())
    right = expected.output.double()
    error = float((output.double() - right).norm() / right.norm())
    if not (error <= TOLERANCE and others <= TOLERANCE):
        raise AquaError(f"choosing tokens is wrong: {others:.1%} others are read, the error is {error:.1%}: {REPORT}")
