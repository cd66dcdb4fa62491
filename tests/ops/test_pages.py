# SPDX-License-Identifier: Apache-2.0
"""Pages of a serving engine in plain torch: what is where in them, and attention to them against the reference."""

from __future__ import annotations

import pytest
import torch
from decoding import DEVICE, random
from paged import pages, problem

import aqua_attention as aqua
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attend_pages
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import PagedCache, PagedLayer, content
from aqua_attention.ops.reference import attention_reference

SHAPE = (4, 2), [0, 1, 16, 37], (16, 16, 16)


def test_a_page_has_keys_by_dimension_and_then_values_by_token():
    storage = torch.zeros(2, 1, 4, 5)
    cache = PagedCache(storage, 2, 3)
    cache.write(torch.tensor([[[1.0, 2]], [[3, 4]]]), torch.tensor([[[5.0, 6, 7]], [[8, 9, 10]]]), torch.tensor([5, 6]))
    assert storage[0].eq(0).all()
    assert storage[1].flatten().tolist() == [0, 1, 3, 0, 0, 2, 4, 0, 0, 0, 0, 5, 6, 7, 8, 9, 10, 0, 0, 0]


def test_what_is_written_is_read_and_negative_slots_are_not_written():
    cache = pages(5, 2, 16, 8, 12, torch.float32, spare=3)
    before = cache.storage.clone()
    key, value = random(20, 2, 8, seed=0), random(20, 2, 12, seed=1)
    cache.write(key, value, torch.full((20,), -1, device=DEVICE))
    assert torch.equal(cache.storage.isnan(), before.isnan())
    blocks = torch.tensor([3, 1, 99], device=DEVICE)
    places = torch.arange(20, device=DEVICE)
    cache.write(key, value, blocks[places // 16] * 16 + places % 16)
    found = cache.read(blocks, 20, torch.float32)
    assert torch.equal(found[0][0].transpose(0, 1), key)
    assert torch.equal(found[1][0].transpose(0, 1), value)
    assert cache.storage[[0, 2, 4]].isnan().all()


def test_in_8_bits_scales_lie_behind_the_values():
    cache = pages(3, 2, 16, 8, 12, torch.float32, bits=8)
    assert cache.storage.shape[3] == content(8, 12, 4, is_quantized=True) == 24
    key, value = 5 * random(16, 2, 8, seed=0), random(16, 2, 12, seed=1)
    cache.write(key, value, 32 + torch.arange(16, device=DEVICE))
    whole = cache.storage[2, 1].flatten()[20 * 16 :].view(torch.bfloat16)
    assert torch.equal(whole[:16], cache.key_scales[2, 1])
    assert torch.equal(whole[16:], cache.value_scales[2, 1])
    scale, mean = cache.quantization
    for found, exact, unit in zip(
        cache.read(torch.tensor([2], device=DEVICE), 16, torch.float32), (key, value), (scale, 1), strict=True
    ):
        exact = exact.transpose(0, 1)[None]
        wide = (exact - mean[:, None]) / scale[:, None] if unit is scale else exact
        step = wide.abs().amax(-1, keepdim=True) / 127 * (unit[:, None] if unit is scale else 1)
        assert ((found - exact).abs() <= 0.52 * step + 1e-6).all()
        assert not torch.equal(found, exact)


def test_pages_of_another_layout_are_refused():
    with pytest.raises(AquaError, match="one run"):
        PagedCache(torch.zeros(2, 16, 3, 32).transpose(1, 2), 16, 16)
    with pytest.raises(AquaError, match="20 or more"):
        PagedCache(torch.zeros(2, 3, 16, 19), 8, 12)
    one = torch.ones(3, 8)
    with pytest.raises(AquaError, match="one byte"):
        PagedCache(torch.zeros(2, 3, 16, 24), 8, 12, Quantization(one, one))
    PagedCache(torch.zeros(4, 3, 16, 32)[::2], 16, 16)
    with pytest.raises(AquaError, match="sliding window"):
        PagedLayer(problem(*SHAPE, k_ratio=0.5, impl="torch").layer.plan, 1.0, window=4)


@pytest.mark.parametrize("config", [{}, {"k_ratio": 0.5, "sink": 2, "recent": 5, "min_length": 20}], ids=str)
@pytest.mark.parametrize("bits", [None, 8])
def test_a_step_in_plain_torch_is_attention_to_what_is_held(config, bits):
    given = problem(*SHAPE, bits=bits, block_size=16, impl="torch", **config)
    found, plan = given.decode("torch"), given.layer.plan
    keys, values = given.held()
    for row, length in enumerate(given.lengths):
        if length == 0:
            assert (found[row] == 0).all()
            continue
        part = keys[row, None, :, :length], values[row, None, :, :length]
        if plan is None:
            expected = attention_reference(given.query[row, None, :, None], *part, None, **given.options)
        else:
            call = plan.call(given.query[row, None, :, None], *part, scaling=given.layer.scaling)
            expected = aqua.ops.api.attend(call, plan, "reference").output
        assert torch.allclose(found[row], expected[0, :, 0], atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"k_ratio": 0.5}, {"k_ratio": 0.5, "sink": 2, "recent": 5}], ids=str)
@pytest.mark.parametrize("queries", [25, 60])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_prompt_or_a_part_sees_what_came_before(config, queries, block_size):
    given = problem((4, 2), [60], (16, 16, 16), block_size=block_size, impl="torch", **config)
    given.decode("torch")
    query = random(queries, 4, 16, seed=9)
    found = attend_pages(query, given.cache, given.layer, given.step.block_table[0], 60)
    if given.layer.plan is None:
        expected = attention_reference(query.transpose(0, 1)[None], given.keys, given.values, None)
    else:
        call = given.layer.plan.call(query.transpose(0, 1)[None], given.keys, given.values)
        expected = aqua.ops.api.attend(call, given.layer.plan, "reference").output
    assert torch.allclose(found, expected[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("queries", [1, 30, 60])
def test_a_layer_with_a_sliding_window_sees_the_last_tokens_only(queries, monkeypatch):
    monkeypatch.setattr("aqua_attention.ops.api.WINDOW_QUERIES", 8)
    given = problem((4, 2), [60], (16, 16, 16), block_size=16, impl="torch", window=7)
    given.decode("torch")
    query = random(queries, 4, 16, seed=9)
    found = attend_pages(query, given.cache, given.layer, given.step.block_table[0], 60)
    behind = torch.arange(60 - queries, 60, device=DEVICE)[:, None] - torch.arange(60, device=DEVICE)
    mask = ((behind >= 0) & (behind < 7))[None, None]
    expected = attention_reference(query.transpose(0, 1)[None], given.keys, given.values, None, mask=mask)
    assert torch.allclose(found, expected[0].transpose(0, 1), atol=1e-5)


def test_implementations_that_cannot_say_why():
    given = problem(*SHAPE, block_size=16, impl="torch", k_ratio=0.5)
    with pytest.raises(AquaError, match=r"impl='triton' cannot take these pages \(.*16.*\): use auto or torch"):
        given.decode("triton")
    with pytest.raises(AquaError, match="it knows no pages"):
        given.decode("cpu")
    with pytest.raises(AquaError, match="it must be auto, torch or triton"):
        given.decode("other")
