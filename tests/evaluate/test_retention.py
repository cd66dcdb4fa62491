# SPDX-License-Identifier: Apache-2.0
"""Retention against its definition on a tiny model, and the order that the paper reports."""

from __future__ import annotations

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.evaluate.suites.retention import evaluate_retention
from aqua_attention.model.capture import observed
from aqua_attention.ops.select import rotate, select_dimensions
from conftest import VOCABULARY, subject_of


@pytest.fixture(scope="module")
def windows():
    return torch.randint(2, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(5))


def test_every_dimension_loses_nothing_and_fewer_lose_more(llama, windows):
    rows = evaluate_retention(subject_of(*llama), windows, k_ratios=(1.0, 0.75, 0.5, 0.25))["rows"]
    for selection in ("static", "magnitude", "weighted"):
        scores = [row["score_loss"] for row in rows if row["selection"] == selection]
        softmax = [row["softmax_loss"] for row in rows if row["selection"] == selection]
        assert scores[0] == softmax[0] == 0
        assert scores == sorted(scores)
        assert softmax == sorted(softmax)
        assert 0 < softmax[-1] < 1
    at_half = {row["selection"]: row["score_loss"] for row in rows if row["k_ratio"] == 0.5}
    assert at_half["magnitude"] < at_half["static"]


def test_the_figures_follow_their_definition(llama, windows):
    """One window, its last query, first layer, by hand."""
    model, projections = llama
    row = evaluate_retention(
        subject_of(model, projections), windows[:1], k_ratios=(0.5,), selections=("magnitude",), queries=1
    )
    seen = []
    with torch.no_grad(), observed(model, lambda module, query, key, scaling: seen.append((query, key, scaling))):
        model(input_ids=windows[:1], use_cache=False)
    query, key, scaling = seen[0]
    layer = projections.layers[0]
    query, key = rotate(query[:, :, 24:25], layer.rotation), rotate(key, layer.rotation)[:, :, :25]
    selected = select_dimensions(query, layer.plan(aqua.AquaConfig.paper(k_ratio=0.5)))
    key = key.repeat_interleave(2, dim=1)
    dense = (query @ key.transpose(-1, -2))[0, :, 0] * scaling
    found = ((query * selected) @ key.transpose(-1, -2))[0, :, 0] * scaling
    centred, difference = dense - dense.mean(-1, keepdim=True), (found - dense)
    difference = difference - difference.mean(-1, keepdim=True)
    expected = difference.square().sum(-1) / centred.square().sum(-1)
    figures = row["rows"][0]["per_layer"][0]
    assert figures["score_loss"] == pytest.approx(expected.tolist(), rel=1e-3)
    expected = (found.softmax(-1) - dense.softmax(-1)).abs().sum(-1) / 2
    assert figures["softmax_loss"] == pytest.approx(expected.tolist(), rel=1e-3)
