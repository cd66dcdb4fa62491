# SPDX-License-Identifier: Apache-2.0
"""What tests of the kernels that choose tokens share: problems, and which choices are right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from decoding import DEVICE, random

import aqua_attention as aqua
from aqua_attention.ops import scored_step
from aqua_attention.ops.backends.triton.token_step import attend_selected
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.layout import TILE
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization

WAYS = {"one program": {"chunks": 1}}
if DEVICE == "cuda":
    # The interpreter runs one program after the other.
    WAYS |= {"programs that meet": {"chunks": 4}, "many programs": {"chunks": 16}}
    WAYS |= {"scored by the compiler": {"chunks": 1, "by_hand": False}}
WEIGHT_EPS = 2.0**-9
"""Of a weight, relative: it is kept in 11 bits twice."""
MASS_EPS = 1e-3


class Problem(NamedTuple):
    plan: LayerPlan
    cache: ScoredCache
    rotated: torch.Tensor
    dims: torch.Tensor


def plan_of(kv_heads, dim, *, seed=0, **knobs):
    """A plan with a random rotation; channels of keys differ in scale and mean."""
    given = {"k_ratio": 0.5, "share": "group", "selection": "weighted", "sink": 3, "recent": 20, "score_bits": 8}
    rotation = torch.linalg.qr(random(kv_heads, dim, dim, seed=seed)).Q.contiguous()
    return LayerPlan(
        rotation,
        random(kv_heads, dim, seed=seed + 1).abs() + 0.1,
        aqua.AquaConfig(**given | knobs),
        dim**-0.5,
        key_scale=random(kv_heads, dim, seed=seed + 2).abs() + 0.5,
        key_mean=random(kv_heads, dim, seed=seed + 3),
    )


def problem(heads, lengths, dim, value_dim, dtype=torch.float32, *, seed=0, keys=None, sharp=2.0, held=None, **knobs):
    """Rows of these lengths with their queries; NaN behind the ends. `keys`: [tokens] of scores, the same in all rows,
    along the first dimension, which the query then reads. `held`: bits of keys and values.
    """
    (count, kv_heads), batch, longest = heads, len(lengths), max(1, *lengths)
    plan = plan_of(kv_heads, dim, seed=seed, **knobs)
    rotated = sharp * random(batch, count, dim, seed=seed + 4, dtype=dtype)
    states = random(batch, kv_heads, longest, dim, seed=seed + 5, dtype=dtype)
    if keys is not None:
        plan.key_scale.fill_(1), plan.key_mean.zero_()
        rotated = torch.zeros_like(rotated)
        rotated[..., 0] = dim**0.5
        states = torch.zeros_like(states)
        states[..., 0] = keys.to(states)
    given = {"dtype": dtype, "device": rotated.device, "bits": held, "score_bits": plan.config.score_bits}
    cache = ScoredCache.empty(batch, value_dim, longest + 5, score_quantization(plan), **given)
    values = random(batch, kv_heads, longest, value_dim, seed=seed + 6, dtype=dtype)
    hidden = torch.arange(longest, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]
    hidden = hidden[:, None, :, None]
    cache.fill(
        states.masked_fill(hidden, torch.nan),
        values.masked_fill(hidden, torch.nan),
        torch.tensor(lengths, device=DEVICE),
    )
    size = rotated.float().view(batch, kv_heads, count // kv_heads, dim).square().sum(2) * plan.key_rms.square()
    dims = size.sort(dim=-1, descending=True, stable=True).indices[..., : plan.k].to(torch.int32)
    return Problem(plan, cache, rotated, dims)


def work_for(given, *, splits=2, programs=3, **way):
    """Memory for the kernels, full of what must not be read."""
    work = TokenWork.of(given.cache, given.rotated.shape[1], given.plan.k, splits=splits, programs=programs, **way)
    for name, tensor in work.scratch._asdict().items():
        if name != "arrived":
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    work.rotated.copy_(given.rotated)
    work.dims.copy_(given.dims)
    work.scratch.step.fill_(1)  # as the kernel before would
    return work


def run(given, **options):
    """Output, and which tokens were read, [batch, num_key_value_heads, room]."""
    work = work_for(given, **options)
    output = torch.full((*given.rotated.shape[:2], given.cache.shape[3]), torch.nan, device=DEVICE)
    output = output.to(given.rotated.dtype)
    attend_selected(given.cache, given.plan, work, output, scaling=given.plan.scaling, appended=False)
    assert not work.scratch.arrived.any()
    return output, listed(work, given.cache)


def listed(work, cache):
    """The lists of tokens as a mask; they are in order, and name each token once."""
    batch, kv_heads, _, _, tiles = cache.shape
    read = torch.zeros(batch * kv_heads, tiles * TILE, dtype=torch.bool, device=work.rotated.device)
    for place, count in enumerate(work.scratch.counts.tolist()):
        tokens = work.scratch.tokens[place, :count].long()
        assert (tokens.diff() > 0).all()
        read[place, tokens] = True
    return read.view(batch, kv_heads, -1)


def check_choice(read, given, expected):
    """Right up to what the precision of a weight leaves open: greater weights before smaller ones, and as many as are
    asked for.
    """
    plan, config = given.plan, given.plan.config
    group = given.rotated.shape[1] // given.cache.shape[1]
    for row, length in enumerate(given.cache.lengths.tolist()):
        assert not read[row, :, length:].any()
        if length == 0:
            continue
        position = torch.arange(length, device=read.device)
        exact = (position < plan.sink) | (position >= length - plan.recent)
        for head in range(read.shape[1]):
            chosen, weight = read[row, head, :length], expected.weight[row, head, :length].double()
            assert chosen[exact].all()
            if length < plan.min_length or config.select_p == 1 or weight.isnan().any():
                assert chosen.all()
                continue
            weight_eps, mass_eps = WEIGHT_EPS, MASS_EPS
            if given.rotated.dtype != torch.float32 or given.cache.value_scales is not None:
                # Queries are rounded to float16 once more.
                query = given.rotated[row].view(-1, group, given.rotated.shape[-1])[head].float().abs()
                keys = torch.stack(given.cache.read(row, length)[::2]).abs().amax(0)[head]
                rounded = 2.0**-10 * float((query @ keys.T).max()) * plan.scaling
                weight_eps, mass_eps = weight_eps + rounded, mass_eps + rounded
            others, left = chosen & ~exact, ~chosen & ~exact
            if others.any() and left.any():
                assert weight[others].min() >= (1 - weight_eps) * weight[left].max() - 2.0**-30
            least = weight[others].min() if others.any() else torch.inf
            fewer = exact | (others & (weight > (1 + weight_eps) * least + 2.0**-30))
            if config.select_p is None:
                wanted = min(config.select_tokens, int((~exact).sum()))
                # None is read that weighs nothing beside the others.
                assert others.sum() >= wanted or weight[left].max() <= 2.0**-30 * weight[~exact].max()
                assert wanted == 0 or (fewer & ~exact).sum() < wanted
            else:
                target = config.select_p * group
                assert weight[chosen].sum() >= target - mass_eps * group
                assert not others.any() or weight[fewer].sum() < target + mass_eps * group


def check_output(output, read, given):
    """As close to float64, of the same tokens, as a few times the same in the dtype."""
    cache, scaling = given.cache, given.plan.scaling
    group = given.rotated.shape[1] // cache.shape[1]
    eps = torch.finfo(output.dtype if cache.value_scales is None else torch.float16).eps
    for row, length in enumerate(cache.lengths.tolist()):
        if length == 0:
            assert (output[row] == 0).all()
            continue
        keys, values = (each.double() for each in cache.read(row, length)[:2])
        query = given.rotated[row].double().unflatten(0, (-1, group))
        scores = (query @ keys.transpose(-1, -2) * scaling).masked_fill(~read[row, :, None, :length], -torch.inf)
        exact = (scores.softmax(-1) @ values).flatten(0, 1)
        if exact.isnan().any():
            assert (output[row].isnan() == exact.isnan()).all()
        scale = values.abs().nan_to_num().max() + scores[scores.isfinite()].abs().max()
        there = ~exact.isnan()
        assert (output[row].double() - exact)[there].abs().max() <= 8 * eps * scale if there.any() else True


def expected_of(given):
    """What plain torch finds."""
    return scored_step.attend_selected(given.rotated, given.cache, given.plan, given.plan.scaling)
