# SPDX-License-Identifier: Apache-2.0
"""What chosen tokens hold of the softmax, and other ways to choose and weigh them, which benchmarks put in place."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_tokens import plan_of, states

from aqua_attention.ops import tokens
from aqua_attention.ops.api import attend
from aqua_attention.ops.tokens import Way

SHARES = (0.3, 0.6, 0.9, 0.97)


@pytest.fixture
def watched(monkeypatch):
    """Attention, and the choices that it told."""

    def attended(plan, *given, **changes):
        told = []
        monkeypatch.setattr(tokens, "WAY", Way(watch=told.append, **changes))
        found = attend(plan.call(*given), plan, "reference")
        monkeypatch.undo()
        return found, told[0]

    return attended


def held(weight, choice):
    return (weight * choice.read).sum(-1) / (weight * choice.visible).sum(-1)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("p", SHARES)
def test_with_exact_scores_tokens_hold_what_is_asked(heads, p, watched):
    """And no more than the last of them has: without it, or its window, they would hold less."""
    plan = plan_of(8, 2, k_ratio=1.0, select_p=p, sink=1, recent=2)
    _, choice = watched(plan, *states(plan, heads=heads, length=40))
    torch.testing.assert_close(choice.weight, choice.approximate)
    assert bool((held(choice.weight, choice) >= p - 1e-5).all())
    chosen = choice.read & ~choice.exact
    least = choice.weight.masked_fill(~chosen, torch.inf).amin(-1)
    without = (choice.weight * choice.read).sum(-1) - least
    assert bool((without < p * heads / 2 + 1e-5)[chosen.any(-1)].all())


@pytest.mark.parametrize("score_bits", [16, 8])
def test_more_is_read_for_a_larger_p(score_bits, watched):
    """By few dimensions too: every token of a smaller p is one of a larger, up to all of them."""
    options = {"k_ratio": 0.5, "score_bits": score_bits, "sink": 1, "recent": 2}
    plans = [plan_of(8, 2, select_p=p, **options) for p in (*SHARES, 1.0)]
    given = states(plans[0], heads=4, length=40)
    choices = [watched(plan, *given)[1] for plan in plans]
    for less, more in pairwise(choices):
        assert bool((more.read | ~less.read).all()) and int(more.read.sum()) > int(less.read.sum())
    assert torch.equal(choices[-1].read, choices[-1].visible)
    expected = [held(choice.approximate, choice).min() for choice in choices]
    assert all(each >= p - 1e-5 for each, p in zip(expected, (*SHARES, 1.0), strict=True))


def test_who_watches_changes_nothing(watched):
    plan = plan_of(8, 2, k_ratio=0.5, select_p=0.7, sink=1, recent=2)
    given = states(plan, heads=4, length=30)
    found, choice = watched(plan, *given)
    unseen = attend(plan.call(*given), plan, "reference")
    assert torch.equal(found.output, unseen.output)
    assert torch.equal(choice.read.sum(-1), unseen.reading.read)
    torch.testing.assert_close(choice.weight.sum(-1), torch.full((1, 2, 30), 2.0))


def test_without_exact_keys_scores_weigh(watched):
    """With every dimension scored that is as before, and fewer bytes are read: keys of the window alone."""
    plan = plan_of(8, 2, k_ratio=1.0, select_p=0.7, sink=1, recent=2)
    given = states(plan, heads=4, length=30)
    found, choice = watched(plan, *given, exact_keys=False)
    expected = attend(plan.call(*given), plan, "reference")
    torch.testing.assert_close(found.output, expected.output)
    read, seen, share = found.reading
    bytes_read = 16 * choice.exact.sum(-1) + 16 * read + 16 * seen
    torch.testing.assert_close(share, bytes_read / (32 * seen))
    few = plan_of(8, 2, k_ratio=0.5, select_p=0.7, sink=1, recent=2)
    other, _ = watched(few, *given, exact_keys=False)
    assert (other.output - attend(few.call(*given), few).output).abs().max() > 1e-3


def test_layers_may_choose_otherwise(watched):
    plan = plan_of(8, k_ratio=0.5, select_p=0.5)
    given = states(plan, length=30)

    def another(weight, visible, exact, plan):
        return tokens.choose_tokens(weight, visible, exact, replace(plan, config=replace(plan.config, select_p=0.9)))

    found, _ = watched(plan, *given, choose=another)
    nine = plan_of(8, k_ratio=0.5, select_p=0.9)
    torch.testing.assert_close(found.output, attend(nine.call(*given), nine).output)
