# SPDX-License-Identifier: Apache-2.0
"""Prompts whose queries choose tokens: kernels against the reference, in triton's interpreter or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decoding import DEVICE, random
from selecting import plan_of

from aqua_attention.errors import AquaError
from aqua_attention.ops import tokens
from aqua_attention.ops.api import attend
from aqua_attention.ops.backend import choose
from aqua_attention.ops.mask import bidirectional

pytest.importorskip("triton")
from aqua_attention.ops.backends.triton import token_prompt

pytestmark = pytest.mark.select
ON_GPU = DEVICE == "cuda"
SIZES = {
    "grouped": {"heads": (4, 2), "queries": 130, "tokens": 130, "widths": (64, 64)},
    "continued, odd": {"heads": (3, 1), "queries": 70, "tokens": 201, "widths": (80, 64)},
    "one head each": {"heads": (2, 2), "queries": 65, "tokens": 65, "widths": (64, 32)},
}
if ON_GPU:
    SIZES["long"] = {"heads": (12, 2), "queries": 1000, "tokens": 3001, "widths": (128, 128), "batch": 2}
CHOICES = {
    "share": {"select_p": 0.9},
    "count": {"select_tokens": 20},
    "short ones": {"select_tokens": 9, "min_length": 100},
    "no window": {"select_p": 0.8, "sink": 0, "recent": 0, "score_bits": 16},
    "by head": {"select_p": 0.7, "share": "head", "score_bits": 4},
    "logit error": {"select_p": 0.9, "logit_error": 0.1, "sink": 1, "recent": 150},
}


def problem(heads, queries, tokens, widths, batch=1, dtype=torch.float32, **knobs):
    """A plan and an observed call."""
    (count, groups), (dim, value_dim) = heads, widths
    plan = plan_of(groups, dim, **knobs)
    shapes = (count, queries, dim), (groups, tokens, dim), (groups, tokens, value_dim)
    states = [random(batch, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes, 20)]
    return plan, plan.call(2 * states[0], *states[1:], is_observed=True)


def compared(plan, call, *, tolerance=1e-5, differing=0.01):
    """What the kernels give, once it is as the reference's, but for few queries that rounding gives another dimension
    or token.
    """
    found, expected = attend(call, plan, "triton"), attend(call, plan, "reference")
    assert torch.equal(found.reading.seen, expected.reading.seen)
    same = found.reading.read == expected.reading.read
    assert (found.reading.read - expected.reading.read).abs().max() <= 0.02 * call.key.shape[2]
    torch.testing.assert_close(found.reading.share[same], expected.reading.share[same], rtol=1e-6, atol=1e-6)
    close = torch.isclose(found.output, expected.output, rtol=tolerance, atol=tolerance, equal_nan=True).all(-1)
    close &= same.repeat_interleave(call.query.shape[1] // plan.num_key_value_heads, 1)
    assert (~close).float().mean() <= differing
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("size", SIZES)
def test_kernels_read_what_the_reference_reads(size, choice):
    plan, call = problem(**SIZES[size], **CHOICES[choice])
    read = compared(plan, call).reading.read
    assert (read < call.key.shape[2]).any()


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes, and computes bfloat16 wrongly")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_in_16_bits(dtype, choice):
    """By rounding another dimension may be taken, or another one of hundreds of tokens."""
    plan, call = problem(**SIZES["long"], dtype=dtype, **CHOICES[choice])
    found, expected = attend(call, plan, "triton"), attend(call, plan, "reference")
    read, wanted = found.reading.read.float(), expected.reading.read.float()
    assert (read - wanted).abs().mean() <= 0.01 * wanted.mean()
    assert (read.mean() - wanted.mean()).abs() <= 0.003 * wanted.mean()
    error = (found.output.float() - expected.output.float()).norm() / expected.output.float().norm()
    # A dimension that rounding exchanges gives another token in ten or twenty.
    assert error <= 0.1
    # That would see it if tokens were chosen wrongly.
    dense = attend(call, plan.dense, "reference").output.float()
    assert (dense - expected.output.float()).norm() > 3 * error * dense.norm()


def test_blocks_of_queries_and_of_sequences_are_as_all(monkeypatch):
    plan, call = problem(**SIZES["one head each"] | {"batch": 2}, select_p=0.9)
    whole = attend(call, plan, "triton")
    monkeypatch.setattr(token_prompt, "MOST_WEIGHTS", 1)
    monkeypatch.setattr(token_prompt, "MOST_COPIED", 1)
    parts = attend(call, plan, "triton")
    torch.testing.assert_close(parts.output, whole.output, rtol=0, atol=0)
    assert torch.equal(parts.selected, whole.selected)
    assert parts.rotated == whole.rotated
    for part, expected in zip(parts.reading, whole.reading, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("choice", [{"select_p": 0.9}, {"select_tokens": 7}])
def test_tokens_that_do_not_fit_into_registers_are_read_again(choice, monkeypatch):
    for name, value in (("MOST_AT_ONCE", 64), ("LEAST_AT_ONCE", 64), ("A_THREAD", 2)):
        monkeypatch.setattr(token_prompt, name, value)
    compared(*problem(**SIZES["continued, odd"], **choice))


@pytest.mark.parametrize("choice", [{"select_p": 1.0}, {"select_tokens": 500}])
def test_all_tokens_are_dense_attention(choice):
    plan, call = problem(**SIZES["grouped"], **choice)
    found = compared(plan, call)
    assert torch.equal(found.reading.read, found.reading.seen)
    dense = attend(call, plan.dense, "reference").output
    torch.testing.assert_close(found.output, dense, rtol=1e-5, atol=1e-5)


def test_equal_scores_are_ties_that_are_all_read():
    plan, call = problem(**SIZES["grouped"], select_tokens=5)
    call = call._replace(key=torch.zeros_like(call.key))
    plan.key_mean.zero_()
    found = compared(plan, call)
    assert torch.equal(found.reading.read, found.reading.seen)


def test_nan_spoils_only_what_sees_it():
    plan, call = problem(**SIZES["grouped"], select_p=0.9)
    clean = attend(call, plan, "triton").output
    call.query[0, 3, 70, 5] = torch.nan
    call.key[0, 0, 100, 2] = torch.nan
    found = attend(call, plan, "triton").output
    spoilt = torch.zeros(found.shape[:3], dtype=torch.bool, device=found.device)
    spoilt[0, 3, 70] = spoilt[0, :2, 100:] = True
    assert found[spoilt].isnan().all()
    # The other head of its group reads every token, as NaN weighs most.
    spoilt[0, 2, 70] = True
    torch.testing.assert_close(found[~spoilt], clean[~spoilt], rtol=0, atol=0)
    torch.testing.assert_close(found, attend(call, plan, "reference").output, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_watching_changes_nothing():
    plan, call = problem(**SIZES["grouped"], select_p=0.9)
    unwatched = attend(call._replace(is_observed=False), plan, "triton")
    assert unwatched.reading is None
    torch.testing.assert_close(unwatched.output, attend(call, plan, "triton").output, rtol=0, atol=0)


def test_what_they_do_not_take(monkeypatch):
    plan, call = problem(**SIZES["grouped"], select_p=0.9)
    seen = bidirectional(130, 130, sink=0, device=call.query.device)
    refused = [
        (call._replace(mask=seen), plan, "it knows no mask"),
        (call._replace(softcap=3.0), plan, "softcap"),
        (call, dataclasses.replace(plan, config=dataclasses.replace(plan.config, s_ratio=0.5)), "keep more dimensions"),
    ]
    wide, wide_call = problem((2, 1), 66, 66, (192, 192), select_p=0.9)
    refused.append((wide_call, wide, "128 at most"))
    for each, of, reason in refused:
        with pytest.raises(AquaError, match=reason):
            choose(each, of, "triton")
    assert choose(call, plan, "triton").name == "triton"
    monkeypatch.setattr(tokens, "WAY", tokens.Way(left_out="mean"))
    with pytest.raises(AquaError, match="another way"):
        choose(call, plan, "triton")
