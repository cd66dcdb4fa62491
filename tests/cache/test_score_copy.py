# SPDX-License-Identifier: Apache-2.0
"""AQUA-Select in a model on a CPU: the step in C finds what plain torch does, whatever became of its cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.bench.memory import storage_bytes
from aqua_attention.ops.backends.cpu import Cpu, build
from conftest import VOCABULARY

pytestmark = pytest.mark.skipif(build.no_kernel_reason() is not None, reason=str(build.no_kernel_reason()))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
LAYERS = 3
"""Of the model."""
SETTINGS = [
    {"select_p": 0.7, "score_bits": 8},
    {"select_p": 0.7, "score_bits": 16},
    {"select_tokens": 20, "score_bits": 8},
    {"select_p": 0.7, "score_bits": 8, "min_length": 155},
]


def config_of(**knobs):
    return aqua.AquaConfig(**{"k_ratio": 0.5, "sink": 2, "recent": 8} | knobs)


def tokens(length=150, batch=2, seed=7):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def steps(monkeypatch):
    """The layers of the steps that C takes, and what calls a function with none of them."""
    taken, attend, why_not = [], Cpu.attend, Cpu.why_not

    def counted(self, call, plan):
        taken.append(plan.index)
        return attend(self, call, plan)

    monkeypatch.setattr(Cpu, "attend", counted)

    def plainly(function):
        with monkeypatch.context() as patch:
            patch.setattr(Cpu, "why_not", lambda self, call, plan: "a test says so")
            before = len(taken)
            result = function()
            assert len(taken) == before
        assert Cpu.why_not is why_not
        return result

    return taken, plainly


@torch.no_grad()
def step(model, cache, ids, mask=None):
    return model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits


@pytest.mark.parametrize("knobs", SETTINGS)
@pytest.mark.parametrize("padding", [0, 30])
def test_generate_goes_through_it_and_finds_the_same(llama, steps, knobs, padding):
    model, projections = llama
    taken, plainly = steps
    ids, mask = tokens(), torch.ones(2, 150, dtype=torch.long)
    mask[0, :padding] = 0
    options = GREEDY | {"attention_mask": mask, "output_scores": True, "return_dict_in_generate": True}
    with aqua.apply(model, projections, config_of(**knobs)) as attachment:
        expected = plainly(lambda: model.generate(ids, **options))
        assert attachment.explain(150).decoding.backends == {"cpu": LAYERS}
        readings = []
        found = model.generate(ids, **options)
        assert len(taken) == LAYERS * 11
        attachment.on_reading = lambda index, reading: readings.append(reading)
        attachment.on_selection = lambda *given: None
        watched = model.generate(ids, **options)
        assert len(taken) == 2 * LAYERS * 11, "watching changes no route"
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert (one - other).abs().max() < 1e-3
    assert all(torch.equal(one, other) for one, other in zip(found.scores, watched.scores, strict=True))
    assert readings[-1].seen[:, 0, 0].tolist() == [161 - padding, 161]


@pytest.mark.parametrize("knobs", SETTINGS[:3])
def test_whatever_becomes_of_the_cache(llama, steps, knobs, tmp_path):
    """After each change the next step is that of plain torch over the same keys."""
    model, projections = llama
    taken, plainly = steps
    with aqua.apply(model, projections, config_of(**knobs)) as attachment:
        cache = DynamicCache(config=model.config)
        step(model, cache, tokens())

        def check(cache):
            rows, length = cache.layers[0].batch, cache.get_seq_length()
            new = tokens(1, rows, seed=length)
            expected = plainly(lambda: step(model, copy.deepcopy(cache), new))
            before = len(taken)
            found = step(model, cache, new)
            assert len(taken) == before + LAYERS
            assert (found - expected).abs().max() < 1e-3

        for _ in range(3):
            check(cache)
        cache.crop(-20)
        check(cache)
        check(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        check(cache)
        cache.batch_repeat_interleave(2)
        check(cache)
        cache.batch_select_indices(torch.tensor([3, 0, 2]))
        check(cache)
        step(model, cache, tokens(5, 3))
        check(cache)
        attachment.save_cache(cache, tmp_path / "cache.safetensors")
        check(attachment.load_cache(tmp_path / "cache.safetensors"))
        check(cache)
        cache.reset()
        step(model, cache, tokens(40, 1))
        check(cache)
    # The same projections, other scores: codes of the first setting are of no use.
    with aqua.apply(model, projections, config_of(select_p=0.5, score_bits=8, k_ratio=0.25)):
        check(cache)


def test_the_copy_is_counted_and_there_only_once_a_step_was_taken(llama):
    model, projections = llama
    with aqua.apply(model, projections, config_of(select_p=0.7, score_bits=8)):
        cache = DynamicCache(config=model.config)
        step(model, cache, tokens(256, 1))
        before = storage_bytes(cache)
        step(model, cache, tokens(1, 1))
        added, layers = storage_bytes(cache) - before, cache.layers
        codes = sum(each.score_copy.codes.nbytes + each.score_copy.scales.nbytes for each in layers)
        assert codes == LAYERS * 2 * 3 * 128 * (16 + 2)
        assert codes <= added
    with aqua.apply(model, projections, config_of()):
        cache = DynamicCache(config=model.config)
        step(model, cache, tokens(20, 1))
        assert cache.layers[0].score_copy is None
