# SPDX-License-Identifier: Apache-2.0
"""What `aqua bench generate` checks before it times anything, and its dense steps, recorded by a stand-in on a CPU."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import aqua_attention as aqua
from aqua_attention.attach import recording
from aqua_attention.attach.apply import Attachment
from aqua_attention.bench import clocked, random_llama
from aqua_attention.bench import generate as bench
from aqua_attention.bench import generate_dense as dense
from aqua_attention.bench import generate_gate as gate
from aqua_attention.bench.clocked import Task, default_options
from aqua_attention.cache.cache import AquaCache
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.ops.backends.triton import Triton
from conftest import VOCABULARY, make_llama, make_mistral

sys.path.append(str(Path(__file__).parents[1] / "attach"))
from standin import StandIn, decode

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
HALF = aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64)
INT8 = aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64, bits=8)
FLASH = ("SDPA flash", "SDPA flash, packed")
OFF_LINE = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for a CPU")


@pytest.fixture(scope="module")
def model():
    """A tiny Llama of random weights on the CPU."""
    return random_llama.make_model(**SHAPE, vocab_size=VOCABULARY, dtype=torch.float32, device="cpu")


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded on the CPU, by the stand-in; the kernel for CPUs decodes, not triton's interpreter."""
    monkeypatch.setattr(recording, "CudaGraph", StandIn)
    monkeypatch.setattr(TiledLayer, "_decode", decode)
    monkeypatch.setattr(Triton, "serves_tiles", lambda *_: False)


def prompts(length=40):
    """Two prompts."""
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))


def checked(model, settings=(HALF,), kernels=()):
    """What the gate finds, after a prompt and over a filled cache."""
    tasks = [Task(model, prompts(), gate.FORCED, is_filled) for is_filled in (False, True)]
    options = {"kernels": kernels, "parts": nullcontext, "compile": False}
    return gate.check_generate(tasks, random_llama.random_projections(model), settings, **options)


def test_the_gate_lets_what_is_right_through(model):
    # In float32, the order of a sum makes no more than the least that is allowed.
    assert checked(model, (HALF, INT8)) == gate.Gate(gate.TOLERANCE, {})
    assert model.config._attn_implementation == "sdpa"


FAULTS = {
    "a token missing": lambda keys, values: (keys[:, :, 1:], values[:, :, 1:]),
    "keys of other heads": lambda keys, values: (keys.flip(1), values),
    "values of other tokens": lambda keys, values: (keys, values.roll(1, 2)),
    "a second sequence damaged": lambda keys, values: (keys, torch.cat([values[:1], 0 * values[1:]])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_refuses_what_is_wrong(model, monkeypatch, fault):
    fill = clocked.fill_cache

    def wrong(cache, states):
        is_ours = isinstance(cache, AquaCache)
        fill(cache, (FAULTS[fault](*each) if is_ours else each for each in states))

    monkeypatch.setattr(clocked, "fill_cache", wrong)
    with pytest.raises(aqua.AquaError, match="generate is wrong: the logits of AQUA, k_ratio 1 are off by"):
        checked(model)


def test_the_gate_refuses_prompts_that_are_wrong(monkeypatch):
    model = make_llama()  # whose attention matters
    attend = Attachment._attend

    def wrong(attachment, module, call, *given):
        return attend(attachment, module, call._replace(value=call.value.roll(1, 2)), *given)

    monkeypatch.setattr(Attachment, "_attend", wrong)
    with pytest.raises(aqua.AquaError, match="generate is wrong: the logits of AQUA, k_ratio 1 are off by"):
        checked(model)


def test_logits_that_are_not_numbers_are_refused():
    right = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    gate.check_near(right * 1.01, right, "it", 0.02)
    for wrong in (right * 1.03, right * torch.nan, torch.cat([right[:1], -right[1:]])):
        with pytest.raises(aqua.AquaError, match="the logits of it are off by"):
            gate.check_near(wrong, right, "it", 0.02)
    with pytest.raises(aqua.AquaError, match="the logits of it are not all finite"):
        gate.check_near(right * torch.nan, None, "it", 0.02)


@torch.no_grad()
def test_tokens_are_forced_and_logits_are_the_models_own(model):
    ids, forced = prompts(), prompts(5)
    found = gate.forced_logits(Task(model, ids, 5), forced, {})
    every = model(torch.cat([ids, forced], 1)).logits[:, 39:44]
    assert torch.allclose(found, every, atol=1e-4)


@OFF_LINE
@torch.no_grad()
@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize("kernel", FLASH)
def test_dense_attention_in_recorded_steps_is_transformers(recorded, kernel, is_filled):
    model, forced, before = make_llama(), prompts(5), StandIn.recorded
    task = Task(model, prompts(), 5, is_filled)
    expected = gate.forced_logits(task, forced, default_options(task)())[:, 0 if is_filled else 1]
    assert torch.allclose(gate.dense_logits(task, kernel, forced, nullcontext), expected, atol=1e-4)
    assert StandIn.recorded == before + 1
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)


@OFF_LINE
def test_a_dense_kernel_that_is_wrong_is_refused(model, recorded, monkeypatch):
    def wrong(query, keys, values):
        keys = keys.roll(1, 2)
        return lambda: F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    monkeypatch.setitem(dense.BASELINES, "wrong", wrong)
    with pytest.raises(aqua.AquaError, match="the logits of wrong in a recorded step are off by"):
        checked(model, kernels=("wrong",))


@OFF_LINE
def test_what_a_dense_kernel_does_not_know_is_its_reason(recorded):
    found = checked(make_mistral(), kernels=FLASH[:1]).kernels
    assert found == {"SDPA flash": "failed: the model's attention has a sliding window, which these kernels lack"}


@OFF_LINE
@pytest.mark.parametrize("most", [1000, 40])
def test_all_but_the_times_of_a_gpu_is_measured(model, recorded, monkeypatch, most):
    monkeypatch.setattr(bench, "MOST_PROMPT", most)
    projections, seen = random_llama.random_projections(model), []
    benchmark = bench.GenerateBenchmark(model, projections, (HALF,), new_tokens=16, is_random=True)
    result = benchmark.measure(2, 24, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert result["is_filled"] == (most == 40)
    default, baseline, ours = result["rows"]
    assert result["baseline"] == baseline["name"] == "dense, recorded (SDPA flash)"
    assert (baseline["ratio"], default["default_ratio"]) == (1.0, 1.0)
    assert baseline["recorded"]
    assert {name for name, reason in baseline["kernels"].items() if reason is None} == set(FLASH)
    assert all((row["first_seconds"] is None) == result["is_filled"] for row in result["rows"])
    if ours["layout"] == "tiled":  # there is a C compiler
        assert (ours["backend"], ours["recorded"], ours["reason"]) == ("cpu", True, "")
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)
    assert model.generation_config.eos_token_id is not None


@OFF_LINE
def test_what_does_not_fit_is_absent_with_its_reason(model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 12 GiB")

    monkeypatch.setattr(Attachment, "new_cache", full)
    monkeypatch.setattr(bench, "MOST_PROMPT", 40)
    monkeypatch.setattr(bench, "check_generate", lambda *_, **__: gate.Gate(0.02, {}))
    benchmark = bench.GenerateBenchmark(
        model, random_llama.random_projections(model), (HALF,), new_tokens=16, is_random=True
    )
    default, ours = benchmark.measure(2, 24)["rows"]
    assert "absent" not in default
    assert ours["absent"] == "there is not enough memory on the GPU"
    with aqua.apply(model, random_llama.random_projections(model), HALF):
        assert model.config._attn_implementation.startswith("aqua-")
    assert model.config._attn_implementation == "sdpa"
