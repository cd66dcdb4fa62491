# SPDX-License-Identifier: Apache-2.0
"""The weight of the last token that is needed: by hand, and by bins as by sorting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqua_attention.ops.heaviest import least_by_bins, least_by_sorting

WAYS = (least_by_bins, least_by_sorting)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("weights", "wanted", "least"),
    [
        ([0.5, 0.25, 0.125], 0.5, 0.5),
        ([0.125, 0.25, 0.5], 0.5625, 0.25),
        ([0.25, 0.5, 0.25], 0.75, 0.25),
        ([0.25, 0.5, 0.125], 0.875, 0.125),
        ([0.25, 0.5], 0.875, 0.0),
        ([0.25, 0.5], 0.0, math.inf),
        ([0.25, 0.5], -1.0, math.inf),
        ([0.0, 0.0], 0.5, 0.0),
        ([3.5, 2.5], 3.75, 2.5),
        ([math.nan, 0.5], 0.25, math.nan),
        ([math.nan, math.nan], math.nan, math.nan),
    ],
)
def test_by_hand(way, weights, wanted, least):
    found = way(torch.tensor([weights]), torch.tensor([wanted]))
    assert found.shape == (1, 1)
    torch.testing.assert_close(found, torch.tensor([[least]]), rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=40), st.floats(0.001, 1.5), st.integers(0, 30))
def test_by_bins_as_by_sorting(counts, wanted, smaller):
    """Exact sums, over many orders of magnitude and with ties."""
    weight = torch.tensor([counts]) / 256 / 2 ** (torch.arange(len(counts)) % (smaller + 1)).float()
    found = [way(weight, torch.tensor([wanted])) for way in WAYS]
    assert torch.equal(*found)


def test_rows_apart():
    """Softmaxes of many tokens: by bins the same set, but for what rounding of sums moves."""
    scores = 3 * torch.randn(2, 3, 50, 700, generator=torch.Generator().manual_seed(0))
    weight = scores.softmax(-1)
    wanted = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(1))
    found = [(weight >= way(weight, wanted)).sum(-1) for way in WAYS]
    assert (found[0] - found[1]).abs().max() <= 1
    assert (found[0] == found[1]).float().mean() > 0.98
