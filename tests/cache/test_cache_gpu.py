# SPDX-License-Identifier: Apache-2.0
"""Caches on a CUDA GPU: the same as on a CPU, offloaded, and in CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from test_aqua_cache import CONFIGS, STORED, logits, tokens
from transformers import DynamicCache

import aqua_attention as aqua
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama

pytestmark = pytest.mark.gpu


def steps(model, ids, cache, late=0):
    """Logits of a prompt of 150 tokens, of a chunk of 40, and of ten single tokens.

    `late`: clock ticks that the GPU is busy before each, so that what does not wait for it comes too early.
    """
    found = []
    for part in (slice(0, 150), slice(150, 190), *(slice(n, n + 1) for n in range(190, 200))):
        if late:
            torch.cuda._sleep(late)
        found.append(logits(model, ids[:, part], past_key_values=cache))
    return found


@pytest.mark.parametrize("make", [make_llama, make_gemma3])
@pytest.mark.parametrize("name", STORED)
def test_a_cache_on_a_gpu_gives_what_one_on_a_cpu_gives(make, name):
    model, ids = make(), tokens()
    projections, twin = calibrated(model), copy.deepcopy(model).cuda()
    with aqua.apply(model, projections, STORED[name]), aqua.apply(twin, projections, STORED[name]):
        expected = steps(model, ids, DynamicCache(config=model.config))
        found = steps(twin, ids.cuda(), DynamicCache(config=model.config))
    # A state halfway between two codes may be rounded to the other one.
    tolerance = 1e-3 if STORED[name].bits is None else 0.05
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("name", STORED)
def test_an_offloaded_cache_gives_the_same(llama, name):
    model, projections = llama
    model, ids = copy.deepcopy(model).cuda(), tokens().cuda()
    with aqua.apply(model, projections, STORED[name]) as attachment:
        expected = steps(model, ids, attachment.new_cache())
        cache = attachment.new_cache(offloading=True)
        found = steps(model, ids, cache, late=10_000_000)
    assert cache.layers[1].keys.device.type == "cpu"
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_runs_in_cuda_graphs(llama, name):
    model, projections = llama
    model, ids = copy.deepcopy(model).cuda(), tokens(60).cuda()
    with aqua.apply(model, projections, CONFIGS[name]) as attachment:
        growing, static = attachment.new_cache(), attachment.new_cache(max_length=64, layout="plain")
        for cache in (growing, static):
            logits(model, ids[:, :40], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for place in range(40, 60):
            token = ids[:, place : place + 1]
            expected = logits(model, token, past_key_values=growing)
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                found = step(input_ids=token, past_key_values=static).logits.clone()
            assert torch.allclose(found, expected, rtol=0, atol=1e-3)


def test_memory_of_a_gpu_follows_the_bytes(llama):
    """What the allocator gave out for the cache, and nothing of the prompt that was evicted."""
    model, projections = llama
    model = copy.deepcopy(model).cuda().bfloat16()
    ids = torch.randint(2, VOCABULARY, (1, 20000), device="cuda")
    held = {}
    for name, config in {"whole": {}, "int8": {"bits": 8}, "int8, half": {"bits": 8, "h2o_ratio": 0.5}}.items():
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **config)) as attachment:
            logits(model, ids[:, :64], past_key_values=attachment.new_cache())
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            cache = attachment.new_cache()
            with torch.no_grad():
                for start in range(0, 20000, 1000):
                    model.model(input_ids=ids[:, start : start + 1000], past_key_values=cache)
            held[name] = torch.cuda.memory_allocated() - before
    # Heads of 16 in bfloat16 are 32 bytes; in int8 16, and 4 for step and middle.
    assert held["int8"] < 0.66 * held["whole"]
    assert held["int8, half"] < 0.40 * held["whole"]
