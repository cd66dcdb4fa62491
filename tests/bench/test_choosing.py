# SPDX-License-Identifier: Apache-2.0
"""Keys whose softmax is known, and settings that choose tokens at any length."""

from __future__ import annotations

import pytest
import torch

from aqua_attention.bench.choosing import Choosing, problem_for, with_heavy
from aqua_attention.bench.problem import OURS, Problem
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.machine import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_problem(dtype=torch.float32, length=4096):
    return Problem.random(Shape(torch.device("cpu"), 6, 2, 32, dtype), batch=1, length=length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mass", "share"), [(0.95, 0.2), (0.9, 0.05), (0.5, 0.5)])
def test_a_share_of_the_tokens_holds_the_mass(mass, share, dtype):
    plain = random_problem(dtype)
    made = with_heavy(plain, mass, share)
    assert [each.shape for each in (made.query, made.keys)] == [each.shape for each in (plain.query, plain.keys)]
    assert made.keys.dtype == made.query.dtype == dtype
    assert torch.equal(made.new[0], made.keys[:, :, -1]) and torch.equal(made.values, plain.values)
    keys = made.keys.float().repeat_interleave(3, 1)
    weights = (keys @ made.query.float()[..., None])[..., 0].mul(32**-0.5).softmax(-1)
    # Mean over the heads of a group; as many of the heaviest as are said to hold it.
    heaviest = weights.view(2, 3, -1).mean(1).sort(-1, descending=True).values
    held = heaviest[:, : round(share * 4096)].sum(-1)
    assert ((held - mass).abs() < 0.12).all()


def test_a_problem_is_changed_for_a_share_of_the_softmax_only():
    plain = random_problem(length=100)
    for config in (AquaConfig(select_tokens=5), AquaConfig(select_p=1)):
        assert problem_for(plain, config, 0.2) is plain
    assert problem_for(plain, AquaConfig(select_p=0.9), None) is plain
    assert problem_for(plain, AquaConfig(select_p=0.9), 0.2) is not plain
    with pytest.raises(AquaError, match=r"select_p is 0\.9 and --read-share 1: both must be above 0 and below 1"):
        problem_for(plain, AquaConfig(select_p=0.9), 1.0)


def test_settings_at_a_length():
    changed = {"k_ratio": 0.25, "score_bits": 8, "selection": "weighted", "share": "group"}
    assert Choosing(0.25, select_p=0.9).at(400) == AquaConfig(**changed, select_p=0.9)
    assert Choosing(0.25, select_tokens=7).at(400, sink=1) == AquaConfig(**changed, select_tokens=7, sink=1)
    shares = Choosing(0.25, 16, select_share=0.1)
    assert [shares.at(length).select_tokens for length in (400, 64, 1)] == [40, 6, 1]
    assert [shares.name, Choosing(0.5, select_p=0.95).name] == ["select_share 0.1", "select_p 0.95"]
    with pytest.raises(AquaError, match="select_share is 0: it must be"):
        Choosing(0.25, select_share=0.0).at(64)


@pytest.mark.parametrize("choice", [{"select_p": 0.9}, {"select_tokens": 30}])
def test_a_step_of_a_gpu_is_checked_before_it_is_timed(monkeypatch, choice):
    """In triton's interpreter here, without a clock."""
    pytest.importorskip("triton")
    from aqua_attention.bench import select_gpu

    if DEVICE == "cpu":
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.sm_count", lambda _: 2)

    def ran(run, reset):
        reset()
        run()
        return 1.0

    monkeypatch.setattr(select_gpu, "seconds_of", ran)
    problem = Problem.random(Shape(torch.device(DEVICE), 4, 2, 32, torch.float32), batch=1, length=300)
    settings = {"k_ratio": 0.25, "score_bits": 8, "sink": 2, "recent": 8} | choice
    config = AquaConfig(**settings)
    short = AquaConfig(**settings, min_length=301)
    rows = select_gpu.measure_select(problem, [config, short], heavy=0.2)
    assert [row["step_seconds"] for row in rows] == [1.0, 1.0]
    assert 0.1 < rows[0]["read"] < 0.4 and rows[1]["read"] == 1
    assert rows[0]["setting"] == config.changes and OURS.share == "group"
    right = select_gpu.decode_scored

    def wrong(*given):
        output, chosen, counts = right(*given)
        return 1.2 * output, chosen, counts

    monkeypatch.setattr(select_gpu, "decode_scored", wrong)
    with pytest.raises(AquaError, match=r"choosing tokens is wrong: 0\.0% others are read, the error is 20\.0%"):
        select_gpu.measure_select(problem, [config], heavy=0.2)
