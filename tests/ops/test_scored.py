# SPDX-License-Identifier: Apache-2.0
"""A cache by token with a copy to score, and a step over it, in plain torch."""

from __future__ import annotations

import pytest
import torch
from test_tokens import plan_of

from aqua_attention.errors import AquaError
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.scored import ScoredCache, score_quantization
from aqua_attention.ops.scored_step import selected_step
from aqua_attention.ops.select import rotate
from aqua_attention.ops.tokens import scored_keys

KNOBS = {"select_p": 0.7, "score_bits": 8, "share": "group", "k_ratio": 0.5}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache_of(plan, batch, room, **options):
    options = {"dtype": torch.float32, "device": "cpu"} | options
    return ScoredCache.empty(batch, 16, room, score_quantization(plan), **options)


def test_a_code_by_hand():
    unit = Quantization(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 3.0]]))
    cache = ScoredCache.empty(1, 2, 200, unit, dtype=torch.float32, device="cpu")
    key = torch.tensor([[[4.0, 2.0]]])
    cache.fill(torch.zeros(1, 1, 130, 2), torch.zeros(1, 1, 130, 2), torch.tensor([130]))
    cache.append(key, torch.ones(1, 1, 2))
    # Two units of the first channel and minus one of the second: 126 of the scale, and half of that.
    assert cache.lengths.tolist() == [131]
    assert cache.codes[0, 0, 1, :, 2].tolist() == [128 + 126, 128 - 63]
    keys, values, scored = cache.read(0, 131)
    assert torch.equal(keys[:, -1], key[0]) and torch.equal(values[:, -1], torch.ones(1, 2))
    assert torch.allclose(scored[:, -1], key[0], rtol=0.01)


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_scored_is_what_the_reference_scores(bits):
    plan = plan_of(kv_heads=2, **KNOBS)
    cache = cache_of(plan, 2, 300, bits=bits)
    keys, values = random(2, 2, 200, 8), random(2, 2, 200, 16, seed=1)
    cache.fill(keys, values, torch.tensor([200, 7]))
    for row, length in enumerate((200, 7)):
        held, given, scored = cache.read(row, length)
        expected = scored_keys(keys[row : row + 1, :, :length], plan)[0]
        assert torch.allclose(scored, expected, atol=1e-6)
        limit = 1e-6 if bits is None else 0.03
        assert torch.allclose(held, expected if bits else keys[row, :, :length], atol=1e-6)
        assert torch.allclose(given, values[row, :, :length], atol=limit)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_cache_grows_changes_places_and_is_read(bits):
    plan = plan_of(kv_heads=2, **KNOBS)
    cache = cache_of(plan, 2, 130, bits=bits)
    keys, values = random(2, 2, 120, 8), random(2, 2, 120, 16, seed=1)
    cache.fill(keys, values, torch.tensor([120, -1]))
    larger = cache.enlarged(300)
    assert (larger.max_length, larger.codes.shape[2], larger.memory is cache.memory) == (300, 3, True)
    larger.take(torch.tensor([0, 0]))
    assert larger.lengths.tolist() == [120, 120]
    for row in range(2):
        assert all(torch.equal(*pair) for pair in zip(larger.read(row, 120), cache.read(0, 120), strict=True))
    for found, given in zip(larger.held(), (keys, values), strict=True):
        assert torch.allclose(found, given[:1].expand(2, -1, -1, -1), atol=0.05 if bits else 0)
    with pytest.raises(AquaError, match="1 sequences cannot take the places of 2"):
        cache.take(torch.tensor([0]))
    cache.clear()
    assert cache.held()[0].shape == (2, 2, 0, 8)
    with pytest.raises(AquaError, match="do not fit a cache of keys"):
        cache.fill(random(2, 2, 131, 8), random(2, 2, 131, 16), torch.tensor([1, 1]))


def test_steps_from_nothing_are_a_prompt_and_a_full_cache_takes_no_more():
    plan = plan_of(kv_heads=2, **KNOBS)
    cache, whole = cache_of(plan, 1, 130), cache_of(plan, 1, 130)
    keys, values, query = random(1, 2, 132, 8), random(1, 2, 132, 16, seed=1), random(1, 4, 8, seed=2)
    for token in range(132):
        step = selected_step(query, keys[:, :, token], values[:, :, token], cache, plan, plan.scaling)
        assert step.read.sum(-1).min() >= 1 and not step.read[..., min(token + 1, 130) :].any()
    whole.fill(rotate(keys, plan.rotation)[:, :, :130], values[:, :, :130], torch.tensor([130]))
    for name in ("keys", "values", "codes", "scales", "lengths"):
        assert torch.allclose(getattr(cache, name).float(), getattr(whole, name).float(), atol=1e-5), name


def test_all_the_mass_is_dense_attention():
    plan = plan_of(kv_heads=2, **KNOBS | {"select_p": 1.0})
    cache = cache_of(plan, 1, 60)
    keys, values, query = random(1, 2, 50, 8), random(1, 2, 50, 16, seed=1), random(1, 4, 8, seed=2)
    cache.fill(rotate(keys, plan.rotation)[:, :, :49], values[:, :, :49], torch.tensor([49]))
    step = selected_step(query, keys[:, :, 49], values[:, :, 49], cache, plan, plan.scaling)
    dense = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
    assert step.read[..., :50].all()
    assert torch.allclose(step.output, dense[:, :, 0], atol=1e-5)


def test_bad_sizes_are_refused():
    plan = plan_of(kv_heads=2, **KNOBS)
    with pytest.raises(AquaError, match="max_length 0"):
        cache_of(plan, 1, 0)
    with pytest.raises(AquaError, match="channel_scale"):
        wrong = Quantization(torch.ones(2, 8).double(), torch.zeros(2, 8))
        ScoredCache.empty(1, 16, 9, wrong, dtype=torch.float32, device="cpu")
    with pytest.raises(AquaError, match="key is"):
        selected_step(random(1, 4, 8), random(1, 2, 7), random(1, 2, 16), cache_of(plan, 1, 9), plan, plan.scaling)
