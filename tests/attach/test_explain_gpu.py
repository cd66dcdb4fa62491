# SPDX-License-Identifier: Apache-2.0
"""`explain` on a CUDA GPU: kernels for prompts and steps, real graphs, compiled parts."""

from __future__ import annotations

import pytest
import torch

import aqua_attention as aqua
from conftest import calibrated, make_gemma3, make_llama

pytestmark = pytest.mark.gpu
GROUP = {"k_ratio": 0.5, "selection": "weighted", "share": "group", "sink": 0, "recent": 0}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def llama():
    model = make_llama()
    projections = calibrated(model)
    return model.to(torch.bfloat16).cuda(), projections


def prompt():
    return torch.arange(5, 13, device="cuda")[None]


def explained(subject, settings=None, **options):
    """What is said before and after a call."""
    model, projections = subject
    with aqua.apply(model, projections, aqua.AquaConfig(**GROUP | (settings or {})), **options) as attachment:
        before = attachment.explain()
        model.generate(prompt(), **GREEDY)
        return before, attachment.explain()


def test_everything_runs_as_fast_as_it_can(llama):
    before, after = explained(llama)
    for found in (before, after):
        assert (found.prompt.backends, found.decoding.backends) == ({"triton": 3}, {"triton": 3})
        assert (found.reason, found.decoding.recorded, found.decoding.layout) == (None, True, "tiled")
        assert {"LlamaRMSNorm": 7, "LlamaMLP": 3}.items() <= found.decoding.compiled.items()
        assert "not compiled" not in str(found)
    assert before.last is None
    assert (after.last.steps, after.last.replays, after.last.unreplayed) == (5, 3, None)
    # 3 layers, 2 heads, 8 of 16 dimensions of a key and a value of 16, 2 bytes each.
    assert (after.decoding.bytes.token, after.decoding.bytes.dense_token) == (3 * 2 * 24 * 2, 3 * 2 * 32 * 2)
    assert "last call: tiled cache, 3 of 5 steps replayed, recorded in" in str(after)


@pytest.mark.parametrize(
    ("settings", "options", "words", "remedy"),
    [
        ({"share": "head"}, {}, "share is 'head'", "set share='group' to read fewer bytes"),
        ({"bits": 4}, {}, "neither bits=4", "set bits=8, or leave bits out"),
        ({}, {"record": False}, "record is False", "set record=True"),
        ({}, {"compile": False}, "compile is False", "set compile=True"),
        ({}, {"layout": "plain"}, "layout is 'plain'", "leave layout out"),
    ],
)
def test_what_prevents_it(llama, settings, options, words, remedy):
    for found in explained(llama, settings, **options):
        assert words in found.reason
        assert found.remedy == remedy
    assert (found.last.replays > 0) == ("compile" in options)


def test_eight_bits_are_read_as_such(llama):
    _, after = explained(llama, {"bits": 8})
    assert (after.reason, after.decoding.backends, after.last.replays) == (None, {"triton": 3}, 3)
    assert after.decoding.bytes.token == 3 * 2 * (8 + 16 + 4)


def test_the_prompt_says_what_its_kernels_do_not_take(llama):
    before, _ = explained(llama, {"s_ratio": 0.25, "sink": 2})
    assert (before.prompt.backends, before.prompt.reason.remedy) == (
        {"fused": 3},
        "leave s_ratio out, or sink and recent",
    )


def test_wide_heads_in_float32():
    model = make_llama(head_dim=144)
    projections = calibrated(model)
    before, after = explained((model.cuda(), projections))
    assert "heads have 144 dimensions, and in float32 it takes 128 at most" in before.reason
    assert before.remedy == "load the model with dtype='bfloat16'"
    assert after.last.layout == "growing"


def test_a_hybrid_model():
    model = make_gemma3()
    projections = calibrated(model)
    before, after = explained((model.cuda(), projections))
    assert (before.decoding.layers, before.decoding.sliding) == ({"ring": 2, "tiled": 1}, 2)
    assert (after.last.steps, after.last.replays, after.reason) == (5, 3, None)
