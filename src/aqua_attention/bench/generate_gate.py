# SPDX-License-Identifier: Apache-2.0
"""Nothing is timed before it is right: what `model.generate` computes in every row, on short prompts.

`generate` itself is asked for its logits, while each token it chooses is forced to be the same: of two that are equally
likely rounding would choose, and all that follows be another text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from aqua_attention.attach.door import apply
from aqua_attention.bench.clocked import Task, default_options, own_options
from aqua_attention.bench.generate_dense import Parts, Reasons, recorded_dense, static_options, why_failed
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.errors import REPORT, AquaError

SHORT = 300
"""Tokens of the prompts at most, or of filled caches: full tiles and a tail."""
FORCED = 5
"""Tokens generated: after the prompt one step as it is, one that is recorded, and two replayed."""
TOLERANCE, NOISE, MOST = 0.02, 3.0, 0.2
"""Relative difference of logits that is allowed, or so many times what another dense attention makes, if that is more,
but never more than the last: in 16 bits, 32 layers of random weights make 0.04 of the order of a sum, and 0.5 of a
token of `SHORT` that is missed."""


@dataclass(frozen=True)
class Gate:
    """What was found right.

    Attributes:
        limit: the relative difference of logits that was allowed.
        kernels: dense kernels by name, and why one does not run here; None where it does.
    """

    limit: float
    kernels: Reasons


class Forced(LogitsProcessor):
    """Makes `generate` choose given tokens, [batch, steps]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token."""
        tokens = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


@torch.no_grad()
def check_generate(
    tasks: Sequence[Task],
    projections: Projections,
    settings: tuple[AquaConfig, ...],
    *,
    kernels: tuple[str, ...],
    parts: Parts,
    compile: bool,
) -> Gate:
    """Compare the logits of every row, of short prompts or caches of `FORCED` new tokens.

    AQUA at k_ratio 1 and dense attention in recorded steps must be dense attention as transformers computes it, and
    recorded steps of every setting those that are not recorded. An AquaError where they are not.
    """
    limits, found = [], dict[str, str | None].fromkeys(kernels)
    for task in tasks:
        forced = task.ids[:, :FORCED].flip(1)
        expected = forced_logits(task, forced, default_options(task)())
        check_near(expected, None, "dense", 0)
        limits.append(min(max(TOLERANCE, NOISE * difference(_eager(task, forced), expected)), MOST))
        for name in (name for name in kernels if found[name] is None):
            try:
                logits, right = dense_logits(task, name, forced, parts), expected[:, 0 if task.is_filled else 1]
            except (RuntimeError, ImportError) as error:
                found[name] = why_failed(error)
                continue
            check_near(logits, right, f"{name} in a recorded step", limits[-1])
        for config in dict.fromkeys((_exact(settings), *settings)):
            _check_setting(task, projections, config, forced, expected, limits[-1], compile)
    return Gate(max(limits), found)


def forced_logits(task: Task, forced: Tensor, options: dict[str, Any]) -> Tensor:
    """Logits of what `generate` does, [batch, steps, vocabulary], while it writes the tokens `forced`."""
    given = {"attention_mask": torch.ones_like(task.ids), "max_new_tokens": forced.shape[1], "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True} | options
    output: Any = task.model.generate(task.ids, logits_processor=LogitsProcessorList([Forced(forced)]), **given)
    return torch.stack(output.logits, 1)


def dense_logits(task: Task, kernel: str, forced: Tensor, parts: Parts) -> Tensor:
    """Logits of the first token after the prompt, by a kernel that sees exactly these tokens, [batch, vocabulary].

    The step is recorded in one call and replayed in another.
    """
    options = static_options(task)
    with recorded_dense(task.model, kernel, task.length + 1, parts):

        def after_prompt() -> dict[str, Any]:
            given = options()
            if not task.is_filled:
                forced_logits(task, forced[:, :1], given)
            return given

        # Of a filled cache the next token is there already.
        rest = forced if task.is_filled else forced[:, 1:]
        ids = task.ids if task.is_filled else torch.cat([task.ids, forced[:, :1]], 1)
        longer = replace(task, ids=ids)
        forced_logits(longer, rest, after_prompt())
        return forced_logits(longer, rest[:, :1], after_prompt())[:, 0]


def check_near(found: Tensor, expected: Tensor | None, name: str, limit: float) -> None:
    """Raise AquaError when logits, [..., vocabulary], are further from the expected ones than `limit`.

    Where these are not known (None), they must be finite.
    """
    if expected is None and not bool(torch.isfinite(found).all()):
        raise AquaError(f"generate is wrong: the logits of {name} are not all finite: {REPORT}")
    error = 0.0 if expected is None else difference(found, expected)
    if not error <= limit:
        raise AquaError(
            f"generate is wrong: the logits of {name} are off by {error:.2g}, {limit:.2g} is allowed: {REPORT}"
        )


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference of logits, [..., vocabulary], of the worst token; infinite where they are no numbers."""
    errors = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(errors.nan_to_num(torch.inf).max())


def is_exact(config: AquaConfig) -> bool:
    """Whether it is dense attention up to rounding to the model's dtype."""
    leaves_nothing_out = config.k_ratio == 1 and config.s_ratio == 0 and config.logit_error is None
    return leaves_nothing_out and config.bits is None and not config.chooses_tokens


def _check_setting(
    task: Task,
    projections: Projections,
    config: AquaConfig,
    forced: Tensor,
    expected: Tensor,
    limit: float,
    compile: bool,
) -> None:
    bits = f"int{config.bits}" if config.bits else ""
    name = ", ".join(filter(None, ("AQUA", f"k_ratio {config.k_ratio:g}", bits, config.choice)))
    with apply(task.model, projections, config, record=False) as attachment:
        plain = forced_logits(task, forced, own_options(task, attachment)())
    check_near(plain, None, name, limit)
    if is_exact(config):
        check_near(plain, expected, name, limit)
    # What is compiled rounds otherwise, so that some queries choose other dimensions: only all of them are compared.
    compile = compile and is_exact(config)
    with apply(task.model, projections, config, compile=compile) as attachment:
        found = forced_logits(task, forced, own_options(task, attachment)())
        check_near(found, plain, f"{name}, in recorded steps", limit)


def _exact(settings: tuple[AquaConfig, ...]) -> AquaConfig:
    """The first setting that multiplies every dimension; if none does, the first setting changed so that it does."""
    first = settings[0]
    exact = AquaConfig(k_ratio=1, selection=first.selection, share=first.share, sink=first.sink, recent=first.recent)
    return next(filter(is_exact, settings), exact)


def _eager(task: Task, forced: Tensor) -> Tensor:
    before = task.model.config._attn_implementation
    task.model.set_attn_implementation("eager")
    try:
        return forced_logits(task, forced, default_options(task)())
    finally:
        task.model.set_attn_implementation(before)
