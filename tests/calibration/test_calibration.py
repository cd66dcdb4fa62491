# SPDX-License-Identifier: Apache-2.0
"""Calibration: what is captured is what enters the scores, and the result depends on text and seed alone."""

from __future__ import annotations

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.calibration.run import collect
from aqua_attention.calibration.statistics import merge
from aqua_attention.model.capture import attention_layers, innermost_decoder, observed
from conftest import VOCABULARY, make_llama, make_qwen3


def tokens(windows=4, context=32):
    return torch.randint(2, VOCABULARY, (windows, context), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("make", [make_llama, make_qwen3])
def test_observed_queries_and_keys_give_the_models_own_attention(make):
    """The eager attention weights that the model reports are the softmax of the captured products."""
    model = make(num_hidden_layers=2)
    model.set_attn_implementation("eager")
    seen = []
    with torch.no_grad():
        weights = model(input_ids=tokens(1), output_attentions=True).attentions
        with observed(model, lambda module, query, key, scaling: seen.append((query, key))):
            model(input_ids=tokens(1))
    assert len(seen) == len(weights) == 2
    for (query, key), expected in zip(seen, weights, strict=True):
        scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * query.shape[-1] ** -0.5
        hidden = torch.ones(32, 32).triu(1).bool()
        assert torch.allclose(scores.masked_fill(hidden, -torch.inf).softmax(-1), expected, atol=1e-5)


def test_observing_leaves_results_and_model_as_they_are(tiny):
    model, _ = tiny
    with torch.no_grad():
        expected = model(input_ids=tokens(1)).logits
        with observed(model, lambda *_: None):
            assert torch.allclose(model(input_ids=tokens(1)).logits, expected, rtol=0, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_attention_layers_and_decoder(tiny):
    model, _ = tiny
    layers = attention_layers(model)
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert {(la.num_attention_heads, la.num_key_value_heads, la.head_dim) for la in layers} == {(4, 2, 16)}
    assert innermost_decoder(model, layers) is model.model


def test_two_halves_merge_to_the_whole(llama):
    model, _ = llama
    whole = collect(model, tokens())
    halves = merge(collect(model, tokens()[:2]), collect(model, tokens()[2:]))
    for index, layer in whole.items():
        half = halves[index]
        assert (half.query_count, half.key_count) == (layer.query_count, layer.key_count) == (4 * 32 * 2, 4 * 32)
        for name in ("query_gram", "key_gram", "key_sum"):
            a, b = getattr(layer, name), getattr(half, name)
            assert float((a - b).abs().max() / a.abs().max()) < 1e-10


def test_statistics_are_those_of_the_captured_states(llama):
    model, _ = llama
    seen = []
    with torch.no_grad(), observed(model, lambda module, query, key, scaling: seen.append((query, key))):
        model(input_ids=tokens(1), use_cache=False)
    query, key = (states.double() for states in seen[1])
    layer = collect(model, tokens(1))[1]
    assert torch.allclose(layer.key_gram, key[0].transpose(-1, -2) @ key[0], rtol=1e-5, atol=1e-4)
    tall = query[0].reshape(2, -1, 16)
    assert torch.allclose(layer.query_gram, tall.transpose(-1, -2) @ tall, rtol=1e-5, atol=1e-4)
    assert torch.allclose(layer.key_sum, key[0].sum(1), rtol=1e-5, atol=1e-4)


def test_calibrate_records_where_it_comes_from(llama, word_tokenizer, words):
    model, _ = llama
    seen = []
    projections = aqua.calibrate(
        model,
        word_tokenizer,
        words,
        tokens=256,
        context=64,
        seed=3,
        name="tiny",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert projections.calibration["tokens"] == 256
    assert projections.calibration["context"] == 64
    assert projections.calibration["seed"] == 3
    assert len(projections.calibration["text_sha256"]) == 64
    assert projections.model["name"] == "tiny"
    assert projections.statistics[0].key_count == 256
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_seed_chooses_the_windows(llama, word_tokenizer, words):
    model, _ = llama

    def key_gram(seed):
        projections = aqua.calibrate(model, word_tokenizer, words, tokens=256, context=64, seed=seed)
        return projections.statistics[0].key_gram

    assert torch.equal(key_gram(1), key_gram(1))
    assert not torch.equal(key_gram(1), key_gram(2))


def test_a_model_in_training_mode_is_calibrated_without_dropout_and_stays_in_it(word_tokenizer, words):
    model = make_llama(attention_dropout=0.9)
    expected = aqua.calibrate(model, word_tokenizer, words, tokens=256, context=64).statistics[2].key_gram
    model.train()
    found = aqua.calibrate(model, word_tokenizer, words, tokens=256, context=64).statistics[2].key_gram
    assert torch.equal(found, expected)
    assert model.training


def test_bad_calibrations_are_one_clear_error(llama, word_tokenizer, words):
    model, _ = llama
    with pytest.raises(aqua.AquaError, match="fewer than one window of 64"):
        aqua.calibrate(model, word_tokenizer, "w1 w2 w3", tokens=64, context=64)
    with pytest.raises(aqua.AquaError, match="context is 512: the model knows 256 positions"):
        aqua.calibrate(model, word_tokenizer, words, tokens=512, context=512)
    message = "layer 1 of LlamaForCausalLM gives NaN"
    for place in ("q_proj", "k_proj"):
        broken = make_llama()
        with torch.no_grad():
            getattr(broken.model.layers[1].self_attn, place).weight[0, 0] = float("nan")
        with pytest.raises(aqua.AquaError, match=message):
            aqua.calibrate(broken, word_tokenizer, words, tokens=64, context=64)
    small = make_llama(vocab_size=50)
    with pytest.raises(aqua.AquaError, match="the model knows 50 tokens"):
        aqua.calibrate(small, word_tokenizer, words, tokens=64, context=64)
