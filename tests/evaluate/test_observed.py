# SPDX-License-Identifier: Apache-2.0
"""Watching what is chosen changes no route: an evaluation measures the kernels that a user runs."""

from __future__ import annotations

import copy

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from conftest import VOCABULARY, subject_of

pytest.importorskip("triton")
from aqua_attention.ops.backends.triton import Triton

CONFIGS = [
    aqua.AquaConfig.paper(k_ratio=0.5),
    aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=2, recent=5),
    aqua.AquaConfig.paper(logit_error=0.2, min_length=9),
]
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def windows():
    return torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("device", DEVICES)
def test_an_evaluation_runs_the_prompt_kernels(llama, monkeypatch, device):
    """On a CPU the interpreter stands for a GPU, if it is allowed to be chosen by itself."""
    model, projections = llama
    settings = [Setting(config) for config in CONFIGS]
    plain = evaluate_perplexity(subject_of(model, projections), settings, windows())["rows"]
    watched, attend = [], Triton.attend

    def noted(self, call, plan):
        watched.append(call.is_observed)
        return attend(self, call, plan)

    monkeypatch.setattr(Triton, "attend", noted)
    if device == "cpu":
        monkeypatch.setattr(Triton, "is_automatic", lambda self, call: True)
    twin = copy.deepcopy(model).to(device)
    found = evaluate_perplexity(subject_of(twin, projections), settings, windows())["rows"]
    assert watched == [True] * len(CONFIGS) * model.config.num_hidden_layers
    for row, expected in zip(found, plain, strict=True):
        assert row["mean_k"] == pytest.approx(expected["mean_k"], abs=1e-3)
        assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
        assert row["kl"] == pytest.approx(expected["kl"], rel=1e-2)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_the_same_watched_or_not(llama, monkeypatch, device, config):
    model, projections = llama
    if device == "cpu":
        monkeypatch.setattr(Triton, "is_automatic", lambda self, call: True)
    model, seen = copy.deepcopy(model).to(device), []
    with torch.no_grad(), aqua.apply(model, projections, config) as attachment:
        unwatched = model(windows().to(device)).logits
        attachment.on_selection = lambda index, *_: seen.append(index)
        assert torch.equal(model(windows().to(device)).logits, unwatched)
    assert seen == list(range(model.config.num_hidden_layers))
