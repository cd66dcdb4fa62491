# SPDX-License-Identifier: Apache-2.0
"""What a cache hands out: models that change it on its way to attention, and caches made of what others have read."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers as tf
from transformers import Cache, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

import aqua_attention as aqua
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.cache.layer import Uncached, layer_of
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.ops.plan import LayerPlan
from conftest import SHAPE, VOCABULARY, calibrated, make_gemma3, make_llama

DENSE = aqua.AquaConfig.paper(k_ratio=1, share="group")
STORES = {
    "bits=8": {"bits": 8},
    "bits=4": {"bits": 4},
    "h2o_ratio=0.5": {"h2o_ratio": 0.5},
    "s_ratio=0.25 with an exact window": {"s_ratio": 0.25, "sink": 2, "recent": 5},
}


@pytest.fixture(autouse=True)
def kernel_in_c(monkeypatch):
    """Tiles are read by the kernel for CPUs where there is a compiler: triton's interpreter takes a minute."""
    if not no_kernel_reason():
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tokens(length=40, batch=2):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def in_pieces(model, ids, cache, prompt=30):
    """Logits of a prompt and of the tokens after it, one by one."""
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    return torch.cat([logits(model, part, past_key_values=cache) for part in parts], 1)


def same(found, expected):
    return torch.allclose(found, expected, rtol=0, atol=2e-4)


class Between:
    """A cache whose keys and values are changed before the model has them."""

    def __init__(self, cache, change):
        self.cache, self.change = cache, change

    def update(self, key_states, value_states, *args, **kwargs):
        return self.change(*self.cache.update(key_states, value_states, *args, **kwargs), key_states.shape[2])


class ChangingAttention(LlamaAttention):
    """Llama's, but something happens between its cache and its attention."""

    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            past_key_values = Between(past_key_values, self.change)
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


class RepeatingAttention(LlamaAttention):
    """Llama's, but its attention is called twice for one update of the cache."""

    always = True

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is None or not (self.always or hidden_states.shape[1] == 1):
            return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        written = []

        class Once:
            def update(_, *states, **options):
                written[:] = written or past_key_values.update(*states, **options)
                return tuple(written)

        for _ in range(2):
            found = super().forward(hidden_states, *args, past_key_values=Once(), **kwargs)
        return found


def changing(change):
    model = make_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__, layer.self_attn.change = ChangingAttention, change
    return model


def repeating(always=True):
    model = make_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__, layer.self_attn.always = RepeatingAttention, always
    return model


def make_diffllama():
    torch.manual_seed(4)
    return tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SHAPE)).eval()


def doubled(key, value, new):
    return key, 2 * value


def doubled_in_decoding(key, value, new):
    return key, 2 * value if new == 1 else value


def turned(key, value, new):
    """The heads change places: the same shape, other values."""
    return key, value.flip(1)


def shown_once(key, value, new):
    """The first head stands for all, in the memory of the cache."""
    return key, value[:, :1].expand_as(value)


CHANGED = {
    "diffllama": make_diffllama,
    "doubled": lambda: changing(doubled),
    "turned": lambda: changing(turned),
    "shown once": lambda: changing(shown_once),
    "attends twice": repeating,
}


@pytest.fixture(scope="module", params=CHANGED)
def changed(request):
    model = CHANGED[request.param]()
    return model, calibrated(model)


def test_plain_stores_follow_values_that_the_model_changes(changed):
    model, projections = changed
    ids = tokens()
    expected = in_pieces(model, ids, DynamicCache(config=model.config))
    with aqua.apply(model, projections, DENSE) as attachment:
        for cache in (attachment.new_cache(), attachment.new_cache(64), DynamicCache(config=model.config)):
            assert same(in_pieces(model, ids, cache), expected)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25)):
        assert (in_pieces(model, ids, DynamicCache(config=model.config)) - expected).abs().max() > 0.1


def test_stores_that_cannot_follow_it_are_refused_by_name(changed):
    model, projections = changed
    for name, setting in STORES.items():
        with pytest.raises(aqua.AquaError, match=f"which a cache with {name} cannot follow: "):
            aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **setting))
    reason = "is impossible here, because the model (changes values|attends more than once)"
    with pytest.raises(aqua.AquaError, match=reason):
        aqua.apply(model, projections, DENSE, layout="tiled").attach()
    with aqua.apply(model, projections, DENSE) as attachment, pytest.raises(aqua.AquaError, match=reason):
        attachment.new_cache(64, layout="tiled")


@pytest.mark.parametrize("name", [*STORES, "tiled"])
@pytest.mark.parametrize("make", [lambda: changing(doubled_in_decoding), lambda: repeating(always=False)])
def test_what_the_model_does_in_decoding_only_is_refused_there(make, name):
    """Four tokens at once do not show it when AQUA is attached."""
    model, ids = make(), tokens()
    config = aqua.AquaConfig.paper(k_ratio=1, share="group", **STORES.get(name, {}))
    with aqua.apply(model, calibrated(model), config) as attachment:
        cache = attachment.new_cache(64, layout="tiled") if name == "tiled" else attachment.new_cache()
        logits(model, ids[:, :30], past_key_values=cache)
        with pytest.raises(aqua.AquaError, match=r"attends to them twice|for attention twice after one update"):
            logits(model, ids[:, 30:31], past_key_values=cache)


def test_keys_that_are_changed_where_they_lie_are_rotated_as_they_are_read():
    model, ids = changing(lambda key, value, new: (key.mul_(torch.linspace(0.9, 1.1, 16)), value)), tokens()
    expected = in_pieces(model, ids, DynamicCache(config=model.config))
    with aqua.apply(model, calibrated(model), DENSE):
        assert same(in_pieces(model, ids, DynamicCache(config=model.config)), expected)


CACHES = {
    "made by the model": lambda attachment, config: DynamicCache(config=config),
    "growing": lambda attachment, config: attachment.new_cache(),
    "static": lambda attachment, config: attachment.new_cache(96),
    "tiled": lambda attachment, config: attachment.new_cache(96, layout="tiled"),
}


def by_list(states, config):
    return DynamicCache(states, config=config)


def by_update(states, config, cache=None):
    cache = DynamicCache(config=config) if cache is None else cache
    for index, pair in enumerate(states):
        cache.update(*pair, index)
    return cache


def by_update_of_a_static_one(states, config):
    return by_update(states, config, StaticCache(config=config, max_cache_len=64))


@pytest.fixture(scope="module", params=[make_llama, make_gemma3])
def model(request):
    model = request.param()
    return model, calibrated(model)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_made_of_what_was_read_goes_on_as_a_dense_one(model, name):
    model, projections = model
    ids, prompt = tokens(14), 10
    expected = logits(model, ids)[:, prompt:]

    def rest(cache):
        return torch.cat([logits(model, each, past_key_values=cache) for each in ids[:, prompt:].split(1, 1)], 1)

    with aqua.apply(model, projections, DENSE) as attachment:
        cache = CACHES[name](attachment, model.config)
        logits(model, ids[:, :prompt], past_key_values=cache)
        states = [(layer.keys[:, :, :prompt], layer.values[:, :, :prompt]) for layer in cache.layers]
        for rebuild in (by_list, by_update, by_update_of_a_static_one):
            assert same(rest(rebuild(states, model.config)), expected), rebuild.__name__
        assert same(rest(by_update(states, model.config, attachment.new_cache())), expected)
        assert same(rest(cache), expected), "reading changes nothing"
    assert same(rest(by_list(states, model.config)), expected), "without AQUA"


def test_an_iterated_cache_is_rebuilt_under_other_settings(llama):
    """What was not stored is missing, and nothing else: the rebuilt cache gives what the first gives."""
    model, projections = llama
    ids = tokens()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25)):
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :30], past_key_values=cache)
        rebuilt = DynamicCache(cache)
        for each in (cache, rebuilt):
            assert each.layers[0].keys.shape == (2, 2, 30, 16)
        found = [logits(model, ids[:, 30:], past_key_values=each) for each in (rebuilt, cache)]
        assert same(*found)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, bits=8)):
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :30], past_key_values=cache)
    found, dense = logits(model, ids[:, 30:], past_key_values=DynamicCache(cache)), logits(model, ids)[:, 30:]
    assert (found - dense).norm() / dense.norm() < 0.05


COPIES = {
    "clone": lambda key, value: (key.clone(), value.clone()),
    "contiguous": lambda key, value: (key.contiguous(), value.contiguous()),
    "the last ones": lambda key, value: (key[:, :, -4:], value[:, :, -4:]),
    "another dtype and back": lambda key, value: (key.double().to(key.dtype), value),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("name", CACHES)
def test_keys_that_were_copied_on_their_way_are_refused(llama, name, copy, monkeypatch):
    model, projections = llama
    ids, update = tokens(90), Cache.update
    expected = logits(model, ids)
    with aqua.apply(model, projections, DENSE) as attachment:
        cache = CACHES[name](attachment, model.config)
        logits(model, ids[:, :80], past_key_values=cache)
        monkeypatch.setattr(Cache, "update", lambda *args, **kwargs: COPIES[copy](*update(*args, **kwargs)))
        if (name, copy) == ("static", "contiguous"):
            assert same(logits(model, ids[:, 80:81], past_key_values=cache), expected[:, 80:81]), "the same tensor"
            return
        with pytest.raises(aqua.AquaError, match="layer 0 attends to a copy, or a part, of the keys that its AQUA"):
            logits(model, ids[:, 80:81], past_key_values=cache)
        assert same(logits(model, ids, use_cache=False), expected), "the error leaves nothing behind"


def test_a_compiled_step_refuses_copied_keys_too(llama, monkeypatch):
    model, projections = llama
    ids, update = tokens(), Cache.update
    with aqua.apply(model, projections, DENSE) as attachment:
        cache = attachment.new_cache(64)
        logits(model, ids[:, :30], past_key_values=cache)
        monkeypatch.setattr(Cache, "update", lambda *args, **kwargs: COPIES["clone"](*update(*args, **kwargs)))
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="attends to a copy, or a part, of the keys"), torch.no_grad():
            step(input_ids=ids[:, 30:31], past_key_values=cache)
    torch._dynamo.reset()


def some_layer(kind, **sizes):
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator))[0]
    layer = kind(LayerPlan.of(rotation, torch.ones(2, 16), DENSE), **sizes)
    return layer, torch.randn(2, 1, 2, 5, 16, generator=generator)


def test_another_thread_is_not_asked_for_the_keys_of_this_one():
    layer, (keys, values) = some_layer(RotatedLayer)
    layer.update(keys, values)
    found = []
    thread = threading.Thread(target=lambda: found.append(layer_of(keys, layer.plan)))
    thread.start()
    thread.join()
    assert isinstance(found[0], Uncached)
    with pytest.raises(aqua.AquaError, match="attends to a copy"):
        layer_of(keys, layer.plan)


@pytest.mark.parametrize("kind", [RotatedLayer, TiledLayer])
def test_what_is_read_is_a_copy_that_cannot_be_written(kind):
    layer, (keys, values) = some_layer(kind, **({} if kind is RotatedLayer else {"max_cache_len": 20}))
    assert layer.keys is layer.values is None
    layer.attend(layer.plan.call(keys, *layer.update(keys, values)), False)
    assert torch.allclose(layer.keys, keys, atol=1e-5)
    assert torch.allclose(layer.values, values)
    for name in ("keys", "values"):
        with pytest.raises(aqua.AquaError, match=f"{name} of a cache layer of AQUA cannot be set: read keys and "):
            setattr(layer, name, keys)
    with pytest.raises(RuntimeError, match="make a clone"):
        layer.keys[:, :, 0] = 0
    layer.keys.clone()[:, :, 0] = 0


def test_a_gradient_goes_back_through_the_keys_that_are_read():
    layer, (keys, values) = some_layer(RotatedLayer)
    keys.requires_grad_()
    layer.update(keys, values)
    layer.keys[:, :, :2].sum().backward()
    assert torch.allclose(keys.grad[:, :, :2], torch.ones(1, 2, 2, 16), atol=1e-5)
    assert not keys.grad[:, :, 2:].any()


LONG = 32
"""More tokens than the probe at attach has."""


class CopyingAttention(LlamaAttention):
    """Llama's, but beyond some tokens its attention is called once more, with a copy of the keys."""

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        written = []

        class Once:
            def update(_, *states, **options):
                if written:
                    return written[0].clone(), written[1]
                written[:] = past_key_values.update(*states, **options)
                return tuple(written)

        given = None if past_key_values is None else Once()
        found = super().forward(hidden_states, *args, past_key_values=given, **kwargs)
        if written and written[0].shape[2] > LONG:
            found = super().forward(hidden_states, *args, past_key_values=given, **kwargs)
        return found


@pytest.mark.parametrize("kind", ["growing", "plain", "tiled"])
def test_keys_that_are_copied_after_they_were_attended_to_are_refused(kind):
    model = make_llama()
    projections = calibrated(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = CopyingAttention
    with aqua.apply(model, projections, DENSE) as attachment:
        options = {} if kind == "growing" else {"max_length": 64, "layout": kind}
        with pytest.raises(aqua.AquaError, match=r"attends to a copy, or a part, of the keys"):
            logits(model, tokens(LONG + 4), past_key_values=attachment.new_cache(**options))


def test_values_that_change_in_a_long_prompt_are_refused_by_tiles():
    model = changing(lambda key, value, new: (key, 2 * value if key.shape[2] > LONG else value))
    with aqua.apply(model, calibrated(model), DENSE) as attachment:
        cache = attachment.new_cache(64, layout="tiled")
        with pytest.raises(aqua.AquaError, match=r"the tiled layout"):
            logits(model, tokens(LONG + 4), past_key_values=cache)
