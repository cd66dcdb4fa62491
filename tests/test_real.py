# SPDX-License-Identifier: Apache-2.0
"""The default model: real weights, where small errors in attention have nowhere to hide."""

from __future__ import annotations

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.data.text import token_windows, tokenize
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from conftest import subject_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = aqua.load_model("smollm2", device="cpu", dtype="float32")
    projections = aqua.calibrate(
        model, tokenizer, aqua.load_text("builtin:calibration"), tokens=2048, context=512, name="smollm2"
    )
    return model, tokenizer, projections


def test_the_methods_rank_as_the_paper_and_our_findings_say(smollm2):
    model, tokenizer, projections = smollm2
    ids, prefix = tokenize(tokenizer, aqua.load_text("builtin:evaluation"))
    windows = token_windows(ids, tokens=1024, context=512, seed=None, prefix=prefix)
    half = {"k_ratio": 0.5}
    settings = {
        "dense": Setting(aqua.AquaConfig.paper(k_ratio=1)),
        "ours": Setting(aqua.AquaConfig.paper(**half, selection="weighted", sink=4, recent=64)),
        "ours, group": Setting(aqua.AquaConfig(**half, selection="weighted", sink=4, recent=64, share="group")),
        "weighted": Setting(aqua.AquaConfig.paper(**half, selection="weighted")),
        "paper": Setting(aqua.AquaConfig.paper(**half)),
        "unrotated": Setting(aqua.AquaConfig.paper(**half), basis="none"),
        "static": Setting(aqua.AquaConfig.paper(**half, selection="static")),
    }
    rows = evaluate_perplexity(subject_of(model, projections), list(settings.values()), windows)["rows"]
    kl = {name: row["kl"] for name, row in zip(settings, rows, strict=True)}
    assert abs(rows[0]["perplexity_change"]) < 1e-4
    assert kl["dense"] < 1e-5
    assert kl["ours"] < kl["ours, group"] < kl["weighted"] < kl["paper"] < kl["unrotated"] < kl["static"]
    assert rows[1]["perplexity_change"] < 0.02


def test_greedy_answers_are_the_dense_ones_at_k_ratio_1_and_readable_at_one_half(smollm2):
    model, tokenizer, projections = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    expected = model.generate(**inputs, **options)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, sink=4, recent=8)):
        assert torch.equal(model.generate(**inputs, **options), expected)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", sink=4, recent=64)):
        assert "Paris" in tokenizer.decode(model.generate(**inputs, **options)[0])
