# SPDX-License-Identifier: Apache-2.0
"""A cache by token with a copy to score, and a step over it, in plain torch."""

from __future__ import annotations

import pytest
import torch
from test_tokens import plan_of

from aqua_attention.errors import AquaError
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.scored import ScoredCache, coded, packed, score_quantization, unpacked, zero_of
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


def test_codes_of_4_bits_by_hand():
    """Two tokens share a byte, and what is beside a new one stays."""
    unit = Quantization(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 3.0]]))
    cache = ScoredCache.empty(1, 2, 200, unit, dtype=torch.float32, device="cpu", score_bits=4)
    assert cache.codes.shape == (1, 1, 2, 2, 64)
    cache.fill(torch.tensor([0.0, 3.0]).expand(1, 1, 130, 2), torch.zeros(1, 1, 130, 2), torch.tensor([130]))
    assert (cache.codes[..., 0, :, :] == 0x88).all() and (cache.codes[..., 1, :, 0] == 0x88).all()
    cache.codes[..., 1, :, 1] = 0xAB  # of a sequence that was here before
    # Two units of the first channel and minus one of the second: 7 of the scale, and half of that, rounded to even.
    cache.append(torch.tensor([[[4.0, 2.0]]]), torch.ones(1, 1, 2))
    assert cache.codes[0, 0, 1, :, 1].tolist() == [0xA0 | 8 + 7, 0xA0 | 8 - 4]
    cache.append(torch.tensor([[[-0.8, 3.0]]]), torch.ones(1, 1, 2))
    assert cache.codes[0, 0, 1, :, 1].tolist() == [(8 - 7) << 4 | 8 + 7, 8 << 4 | 8 - 4]
    assert not cache.codes[0, 0, 1, :, 2:].any()
    scale = torch.tensor(2 / 7).bfloat16()
    assert cache.scales[0, 0, 130] == scale
    assert torch.allclose(cache.read(0, 132)[2][0, 130], torch.tensor([2.0 * 7, -4.0]) * scale + torch.tensor([0, 3.0]))


def test_codes_come_back_from_their_bytes():
    codes = torch.randint(16, (3, 5, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert packed(codes).shape == (3, 5, 64) and torch.equal(unpacked(packed(codes)), codes)


@pytest.mark.parametrize("score_bits", [8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_what_is_no_number_makes_all_of_its_token_none(value, score_bits):
    states = torch.tensor([[1.0, value, 0.5], [value] * 3, [3.0, -2.0, 0.0]])
    codes, scales = coded(states, score_bits)
    found = (codes.float() - zero_of(score_bits)) * scales.float()[:, None]
    if value == 0:
        assert torch.equal(found[1], torch.zeros(3)) and found.isfinite().all()
    else:
        assert found[:2].isnan().all()
    assert torch.allclose(found[2], states[2], atol=0.25)


@pytest.mark.parametrize("score_bits", [8, 4])
@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_scored_is_what_the_reference_scores(bits, score_bits):
    plan = plan_of(kv_heads=2, **KNOBS | {"score_bits": score_bits})
    cache = cache_of(plan, 2, 300, bits=bits, score_bits=score_bits)
    keys, values = random(2, 2, 200, 8), random(2, 2, 200, 16, seed=1)
    cache.fill(keys, values, torch.tensor([200, 7]))
    for row, length in enumerate((200, 7)):
        held, given, scored = cache.read(row, length)
        expected = scored_keys(keys[row : row + 1, :, :length], plan)[0]
        assert torch.allclose(scored, expected, atol=1e-6)
        limit = 1e-6 if bits is None else 0.03
        exact = keys[row, :, :length]
        assert torch.allclose(held, expected if bits == score_bits else exact, atol=1e-6 if bits != 8 else 0.03)
        assert torch.allclose(given, values[row, :, :length], atol=limit)


@pytest.mark.parametrize("score_bits", [8, 4])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_cache_grows_changes_places_and_is_read(bits, score_bits):
    plan = plan_of(kv_heads=2, **KNOBS | {"score_bits": score_bits})
    cache = cache_of(plan, 2, 130, bits=bits, score_bits=score_bits)
    keys, values = random(2, 2, 120, 8), random(2, 2, 120, 16, seed=1)
    cache.fill(keys, values, torch.tensor([120, -1]))
    larger = cache.enlarged(300)
    assert (larger.max_length, larger.codes.shape[2], larger.memory is cache.memory) == (300, 3, True)
    assert (larger.bits, larger.score_bits) == (bits, score_bits)
    assert (larger.own_scales is None) == (bits is None or score_bits == 8)
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


@pytest.mark.parametrize(("bits", "score_bits"), [(None, 8), (None, 4), (8, 4)])
def test_steps_from_nothing_are_a_prompt_and_a_full_cache_takes_no_more(bits, score_bits):
    plan = plan_of(kv_heads=2, **KNOBS | {"score_bits": score_bits})
    cache, whole = (cache_of(plan, 1, 130, bits=bits, score_bits=score_bits) for _ in range(2))
    keys, values, query = random(1, 2, 132, 8), random(1, 2, 132, 16, seed=1), random(1, 4, 8, seed=2)
    for token in range(132):
        step = selected_step(query, keys[:, :, token], values[:, :, token], cache, plan, plan.scaling)
        assert step.read.sum(-1).min() >= 1 and not step.read[..., min(token + 1, 130) :].any()
    whole.fill(rotate(keys, plan.rotation)[:, :, :130], values[:, :, :130], torch.tensor([130]))
    for name in ("keys", "values", "codes", "scales", "lengths", "value_scales", "own_scales"):
        if getattr(cache, name) is not None:
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
    with pytest.raises(AquaError, match="score_bits is 16"):
        cache_of(plan, 1, 9, score_bits=16)
    with pytest.raises(AquaError, match="score_bits=4"):
        few = cache_of(plan, 1, 9, score_bits=4)
        selected_step(random(1, 4, 8), random(1, 2, 8), random(1, 2, 16), few, plan, plan.scaling)
    with pytest.raises(AquaError, match="channel_scale"):
        wrong = Quantization(torch.ones(2, 8).double(), torch.zeros(2, 8))
        ScoredCache.empty(1, 16, 9, wrong, dtype=torch.float32, device="cpu")
    with pytest.raises(AquaError, match="key is"):
        selected_step(random(1, 4, 8), random(1, 2, 7), random(1, 2, 16), cache_of(plan, 1, 9), plan, plan.scaling)
