# SPDX-License-Identifier: Apache-2.0
"""The cache in a model: int8, s_ratio, assisted decoding, and requests that cannot be met."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

import aqua_attention as aqua
from aqua_attention.cache import growing, layer
from aqua_attention.cache.growing import RotatedLayer
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama, make_mistral

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
INT8 = aqua.AquaConfig.paper(k_ratio=1, bits=8)


def tokens(length=200, batch=2):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def filled(model, ids):
    """A cache that holds `ids`; AQUA must be attached."""
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    return cache


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_int8_is_close_to_dense_and_not_equal(llama):
    model, projections = llama
    ids = tokens()
    dense = logits(model, ids)
    with aqua.apply(model, projections, INT8):
        found, stored = logits(model, ids, use_cache=False), logits(model, ids, use_cache=True)
        cache = filled(model, ids[:, :150])
        continued = logits(model, ids[:, 150:], past_key_values=cache)
    assert 1e-4 < distance(found, dense) < 0.05
    assert torch.allclose(found, stored, rtol=0, atol=1e-4), "scoring without a cache sees what a cache would hold"
    assert distance(continued, dense[:, 150:]) < 0.05


def test_int8_with_fewer_key_dimensions_holds_what_it_says(llama):
    model, projections = llama
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25, bits=8)):
        cache = DynamicCache(config=model.config)
        model.generate(tokens(), past_key_values=cache, **GREEDY)
    layer = cache.layers[0]
    assert isinstance(layer, RotatedLayer)
    assert layer._keys._bytes.read().dtype == layer._values._bytes.read().dtype == torch.uint8
    assert layer.held_states()[0].shape == (2, 2, 211, 12)
    assert layer.keys.shape == (2, 2, 211, 16)
    assert layer.values.shape == (2, 2, 211, 16)


def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(llama):
    """Padding moves the boundary of the rounded tokens for nobody here: 200 tokens are rounded but for the last 64."""
    model, projections = llama
    ids = tokens(batch=1)
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids], 1)
    both = torch.cat([padded, tokens(220, 1)])
    mask = torch.ones_like(both)
    mask[0, :20] = 0
    with aqua.apply(model, projections, INT8):
        alone = model.generate(ids, **GREEDY)[0, 200:]
        batched = model.generate(both, attention_mask=mask, **GREEDY)[0, 220:]
    assert torch.equal(alone, batched)


@pytest.mark.parametrize("bits", [None, 8])
def test_beams_and_selected_sequences_follow_their_cache(llama, bits):
    model, projections = llama
    ids = tokens(batch=3)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, bits=bits)):
        cache = filled(model, ids[:, :180])
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.crop(-10)
        assert cache.get_seq_length() == 170
        rows = ids[[0, 2, 2, 0]]
        found = logits(model, rows[:, 170:], past_key_values=cache)
        cache = filled(model, ids[:, :180])
        cache.crop(-10)
        expected = logits(model, ids[:, 170:], past_key_values=cache)[[0, 2, 2, 0]]
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_beam_search_with_int8_equals_that_without_a_cache_once_all_is_whole(llama):
    """Fewer tokens than are kept whole: int8 changes nothing."""
    model, projections = llama
    ids = tokens(40)
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(ids, **options)
    with aqua.apply(model, projections, INT8):
        assert torch.equal(model.generate(ids, **options), dense)


@pytest.mark.parametrize("make", [make_llama, make_mistral])
@pytest.mark.parametrize("batch", [1, 4])
def test_nothing_dropped_equals_dense_token_for_token(make, batch):
    model = make()
    projections = calibrated(model)
    ids, mask = tokens(60, batch), torch.ones(batch, 60, dtype=torch.long)
    mask[1:2, :17] = 0
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 16}):
        options = GREEDY | {"attention_mask": mask} | options
        dense = model.generate(ids, **options)
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1)):
            assert torch.equal(model.generate(ids, **options), dense)


def test_assisted_decoding_gives_the_greedy_tokens(llama):
    """The assistant guesses wrongly most of the time, so the cache is cropped again and again."""
    model, projections = llama
    assistant, ids = make_llama(num_hidden_layers=1), tokens(60, 1)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5)):
        greedy = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), greedy)


def test_offloading_resetting_and_going_on(llama):
    model, projections = llama
    ids = tokens()
    with aqua.apply(model, projections, INT8):
        cache = filled(model, ids[:, :150])
        expected = logits(model, ids[:, 150:], past_key_values=cache)
        cache = filled(model, ids[:, :150])
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        assert torch.equal(logits(model, ids[:, 150:], past_key_values=cache), expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.layers[0].keys is None
        logits(model, ids[:, :150], past_key_values=cache)
        assert torch.equal(logits(model, ids[:, 150:], past_key_values=cache), expected)


@pytest.mark.parametrize("options", [{}, {"max_length": 64}])
def test_a_layer_that_is_fetched_waits_for_what_was_offloaded(llama, options, monkeypatch):
    model, projections = llama
    waited = []
    for module in (layer, growing):
        monkeypatch.setattr(module, "wait_for_offloading", waited.append)
    with aqua.apply(model, projections) as attachment:
        cache = attachment.new_cache(**options)
        cache.layers[0].prefetch()
        assert not waited, "nothing was offloaded yet"
        logits(model, tokens(40), past_key_values=cache)
        # As if what is held were not where the model is.
        getattr(cache.layers[0], "held", cache.layers[0]).device = torch.device("meta")
        cache.layers[0].prefetch()
    assert waited == [torch.device("meta")]


def test_waiting_for_offloading_is_between_streams(monkeypatch):
    waited = []
    stream = SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    for name in ("cpu", "cuda:1"):
        growing.wait_for_offloading(torch.device(name))
    assert waited == ["default of cuda:1"]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_copied_cache_goes_on_by_itself(llama, bits):
    """One prompt, several continuations: the usual way to reuse a prefix."""
    model, projections = llama
    ids = tokens()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, bits=bits)):
        cache = filled(model, ids[:, :150])
        other = copy.deepcopy(cache)
        expected = logits(model, ids[:, 150:], past_key_values=cache)
        assert other.get_seq_length() == 150
        assert torch.equal(logits(model, ids[:, 150:], past_key_values=other), expected)


def test_sliding_layers_are_never_rounded():
    model = make_mistral()
    projections, ids = calibrated(model), tokens()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1)):
        expected = logits(model, ids, use_cache=False)
    with aqua.apply(model, projections, INT8):
        assert torch.equal(logits(model, ids, use_cache=False), expected)


def test_requests_that_cannot_be_met_are_one_clear_error(llama):
    model, projections = llama
    ids = tokens()
    before = DynamicCache(config=model.config)
    logits(model, ids[:, :10], past_key_values=before)
    with aqua.apply(model, projections, INT8):
        with pytest.raises(aqua.AquaError, match=r"bits=8 needs a DynamicCache, .* not a StaticCache"):
            logits(model, ids, past_key_values=StaticCache(config=model.config, max_cache_len=256))
        with pytest.raises(aqua.AquaError, match="needs a cache that AQUA has filled from its first token"):
            logits(model, ids[:, 10:12], past_key_values=before)
        with pytest.raises(aqua.AquaError, match="bits=8 has no gradient"):
            model(input_ids=ids)
        with pytest.raises(aqua.AquaError, match="int8 storage has no gradient"):
            model(input_ids=ids, use_cache=False)
        cache = filled(model, ids)
        with pytest.raises(aqua.AquaError, match="the cache holds 2 sequences, the batch has 1"):
            logits(model, ids[:1, :1], past_key_values=cache)
        assert cache.get_seq_length() == 200
    for bits in (2, 16, "8", True, 8.0):
        with pytest.raises(aqua.AquaError, match=r"bits is .*: it must be one of None, 8, 4"):
            aqua.AquaConfig.paper(bits=bits)
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1)),
        pytest.raises(aqua.AquaError, match="this cache holds AQUA-rotated keys, but the AQUA that filled it has left"),
    ):
        logits(model, ids[:, :1], past_key_values=cache)


EMPTIED = {
    "fixed": (make_llama, {"max_length": 64, "layout": "plain"}),
    "fixed, sliding": (make_mistral, {"max_length": 64, "layout": "plain"}),
    "fixed, both": (make_gemma3, {"max_length": 64, "layout": "plain"}),
    "tiled": (make_llama, {"max_length": 64, "layout": "tiled"}),
    "growing, both": (make_gemma3, {}),
}


@pytest.mark.parametrize(("kind", "empty"), [*((kind, "reset") for kind in EMPTIED), ("growing, both", "crop")])
def test_an_emptied_cache_takes_a_batch_of_another_size(kind, empty):
    make, sizes = EMPTIED[kind]
    model = make()
    with (
        torch.no_grad(),
        aqua.apply(model, calibrated(model), aqua.AquaConfig(k_ratio=0.5, sink=1, recent=2)) as attachment,
    ):
        cache = attachment.new_cache(**sizes)
        for batch in (1, 3, 2):
            ids = torch.randint(2, VOCABULARY, (batch, 8), generator=torch.Generator().manual_seed(batch))
            expected = model(ids).logits
            found = [model(part, past_key_values=cache).logits for part in (ids[:, :7], ids[:, 7:])]
            assert torch.allclose(torch.cat(found, 1), expected, rtol=0, atol=1e-4)
            with pytest.raises(aqua.AquaError, match=f"the cache holds {batch} sequences, the batch has 5"):
                model(ids[:1].expand(5, -1), past_key_values=cache)
            cache.reset() if empty == "reset" else cache.crop(-8)
            assert int(cache.get_seq_length()) == 0
