# SPDX-License-Identifier: Apache-2.0
"""A model whose weights or adapters are not those calibrated, or not those that filled a cache."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import aqua_attention as aqua
from conftest import calibrated, make_llama, make_mistral, make_qwen3

FILLED = "filled under other AQUA projections or settings, or by a model with other weights or adapters: start with a"
OTHER = r"other weights of the same shape \(key weights differ by"
PROMPT = torch.randint(2, 97, (1, 20), generator=torch.Generator().manual_seed(8))
NEXT = torch.randint(2, 97, (1, 28), generator=torch.Generator().manual_seed(9))


class Adapter(nn.Module):
    """A low-rank adapter around a projection, as libraries of adapters have it."""

    def __init__(self, base, size=1.0, seed=0):
        super().__init__()
        self.base_layer, self.enabled = base, True
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * size * 0.1)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, states):
        made = self.base_layer(states)
        return made + states @ self.lora_A.T @ self.lora_B.T if self.enabled else made

    def merged(self):
        base = nn.Linear(self.base_layer.in_features, self.base_layer.out_features, bias=False)
        base.weight.data = self.base_layer.weight.data + self.lora_B.data @ self.lora_A.data
        return base


def adapt(model, *names, **options):
    """Put adapters around projections of these names; returns them."""
    adapters = []
    for layer in model.model.layers:
        for name in names:
            adapters.append(Adapter(getattr(layer.self_attn, name), **options))
            setattr(layer.self_attn, name, adapters[-1])
    return adapters


@pytest.fixture(scope="module")
def projections():
    return calibrated(make_llama())


def scaled(model, name, factor, layers=slice(None)):
    for layer in model.model.layers[layers]:
        for weight in getattr(layer.self_attn, name).parameters():
            weight.data *= factor
    return model


@pytest.mark.parametrize("factor", [1.1, 1.5, 2, 0.5])
def test_projections_of_weights_of_another_scale_are_warned_about(projections, factor):
    with pytest.warns(UserWarning, match=OTHER):
        aqua.apply(scaled(make_llama(), "k_proj", factor), projections)


def test_one_scaled_layer_is_enough(projections):
    with pytest.warns(UserWarning, match=OTHER):
        aqua.apply(scaled(make_llama(), "k_proj", 1.1, slice(1, 2)), projections)


def test_a_scaled_norm_of_keys_is_warned_about():
    projections = calibrated(make_qwen3())
    with pytest.warns(UserWarning, match=OTHER):
        aqua.apply(scaled(make_qwen3(), "k_norm", 1.5), projections)


def test_another_bias_of_keys_is_warned_about():
    def with_bias(size):
        model = make_llama(attention_bias=True)
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data[:] = size * torch.arange(32)
        return model

    projections = calibrated(with_bias(1.0))
    with pytest.warns(UserWarning, match=OTHER):
        aqua.apply(with_bias(2.0), projections)


def test_an_adapter_of_keys_is_warned_about_as_it_is_when_merged(projections):
    model = make_llama()
    adapters = adapt(model, "k_proj")
    with pytest.warns(UserWarning, match=OTHER) as apart:
        aqua.apply(model, projections)
    for layer, adapter in zip(model.model.layers, adapters, strict=True):
        layer.self_attn.k_proj = adapter.merged()
    with pytest.warns(UserWarning, match=OTHER) as merged:
        aqua.apply(model, projections)
    assert str(apart[0].message) == str(merged[0].message)


def test_an_adapter_that_does_nothing_or_is_for_queries_is_no_other_model(projections):
    model = make_llama()
    adapt(model, "k_proj", size=0.0)
    adapt(model, "q_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aqua.apply(model, projections)


def test_a_file_of_an_earlier_version_knows_no_scale(projections, tmp_path):
    rows = [row[:4] for row in projections.model["key_weights"]]
    dataclasses.replace(projections, model=projections.model | {"key_weights": rows}).save(tmp_path / "old.safetensors")
    old = aqua.Projections.load(tmp_path / "old.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aqua.apply(scaled(make_llama(), "k_proj", 1.5), old)
    moved = make_llama()
    for layer in moved.model.layers:
        layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.data.flip(0)
    with pytest.warns(UserWarning, match=OTHER):
        aqua.apply(moved, old)


def go_on(model, cache):
    return model.generate(NEXT, past_key_values=cache, max_new_tokens=2, do_sample=False)


def fill(model, attachment, **options):
    cache = attachment.new_cache(**options)
    model(PROMPT, past_key_values=cache)
    return cache


@pytest.mark.filterwarnings("ignore:the projections were calibrated")
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@pytest.mark.parametrize("options", [{}, {"max_length": 64, "layout": "tiled"}, {"max_length": 64}])
def test_adapters_switched_under_a_filled_cache_are_refused_until_they_are_back(projections, name, options):
    model = make_llama()
    adapters = adapt(model, name)
    with torch.no_grad(), aqua.apply(model, projections) as attachment:
        cache = fill(model, attachment, **options)
        expected = model.generate(NEXT, max_new_tokens=2, do_sample=False)
        for adapter in adapters:
            adapter.enabled = False
        with pytest.raises(aqua.AquaError, match=FILLED):
            go_on(model, cache)
        with pytest.raises(aqua.AquaError, match=FILLED):
            model(PROMPT, past_key_values=cache)
        other = go_on(model, fill(model, attachment, **options))
        for adapter in adapters:
            adapter.enabled = True
        model(NEXT[:, 20:27], past_key_values=cache)
        assert cache.get_seq_length() == 27
        assert expected.shape == other.shape


@pytest.mark.filterwarnings("ignore:the projections were calibrated")
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_weights_changed_in_place_under_a_filled_cache_are_refused(make):
    model = make()
    with torch.no_grad(), aqua.apply(model, calibrated(model)) as attachment:
        cache = fill(model, attachment)
        scaled(model, "v_proj", 1.5, slice(2, 3))
        with pytest.raises(aqua.AquaError, match=FILLED):
            go_on(model, cache)
        go_on(model, fill(model, attachment))


def test_weights_changed_while_aqua_is_attached_are_warned_about(projections):
    model = make_llama()
    with torch.no_grad(), aqua.apply(model, projections):
        scaled(model, "k_proj", 2)
        with pytest.warns(UserWarning, match=OTHER):
            model.generate(PROMPT, max_new_tokens=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(PROMPT, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:the projections were calibrated")
def test_a_cache_filled_before_a_change_ends_with_the_attachment(projections):
    model = make_llama()
    with torch.no_grad():
        with aqua.apply(model, projections) as attachment:
            cache = fill(model, attachment)
            scaled(model, "k_proj", 2)
            model.generate(PROMPT, max_new_tokens=2)
        with pytest.raises(aqua.AquaError, match="has left the model"):
            model(NEXT[:, 20:], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:the projections were calibrated")
def test_a_saved_cache_of_weights_of_another_scale_is_refused(projections, tmp_path):
    model = make_llama()
    with torch.no_grad(), aqua.apply(model, projections) as attachment:
        attachment.save_cache(fill(model, attachment), tmp_path / "cache.safetensors")
    with (
        aqua.apply(scaled(model, "k_proj", 1.1), projections) as attachment,
        pytest.raises(aqua.AquaError, match="it was made for another model"),
    ):
        attachment.load_cache(tmp_path / "cache.safetensors")


def test_looking_at_weights_calls_no_hook_and_is_done_where_a_prompt_begins(projections, monkeypatch):
    model, calls = make_llama(), []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), aqua.apply(model, projections) as attachment:
        calls.clear()
        looks, look = [], attachment._weights.look
        monkeypatch.setattr(attachment._weights, "look", lambda: looks.append(look()))
        cache = fill(model, attachment)
        for token in NEXT[0, 20:25]:
            model(token[None, None], past_key_values=cache)
        assert (len(calls), len(looks)) == (6, 1)
