# SPDX-License-Identifier: Apache-2.0
"""AQUA inside transformers models: dense at k_ratio 1, different below, gone after `apply`."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.cache.layer import RotatedSlidingLayer
from conftest import MAKERS, VOCABULARY, calibrated, make_llama

PLAIN = aqua.AquaConfig.paper(k_ratio=0.5)
WINDOW = aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", sink=2, recent=5)
DENSE = aqua.AquaConfig.paper(k_ratio=1)
DENSE_WINDOW = aqua.AquaConfig.paper(k_ratio=1, sink=2, recent=5)
GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


def tokens(batch=2, length=40, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded():
    """A batch of rows of 40 and 27 tokens, its attention mask, and positions as `generate` numbers them."""
    ids, mask = tokens(), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    ids[1, :13] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("config", [DENSE, DENSE_WINDOW], ids=["no window", "window"])
def test_k_ratio_1_is_dense(tiny, config):
    model, projections = tiny
    expected = logits(model, tokens())
    with aqua.apply(model, projections, config):
        assert torch.allclose(logits(model, tokens()), expected, rtol=0, atol=1e-4)


def test_a_quarter_of_the_dimensions_moves_the_logits(tiny):
    """Without this, every test of equality here could pass on a model that ignores its attention."""
    model, projections = tiny
    expected = logits(model, tokens())
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25)):
        assert (logits(model, tokens()) - expected).abs().max() > 0.1


@pytest.mark.parametrize("config", [DENSE, DENSE_WINDOW], ids=["no window", "window"])
def test_k_ratio_1_generates_the_dense_tokens(tiny, config):
    model, projections = tiny
    ids, mask, _ = left_padded()
    for options in (GREEDY, GREEDY | {"do_sample": True, "temperature": 3.0}, GREEDY | {"num_beams": 3}):
        torch.manual_seed(7)
        expected = model.generate(ids, attention_mask=mask, **options)
        torch.manual_seed(7)
        with aqua.apply(model, projections, config):
            assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("config", [PLAIN, WINDOW, DENSE, DENSE_WINDOW])
def test_left_padding_changes_nothing(tiny, config):
    model, projections = tiny
    ids, mask, positions = left_padded()
    with aqua.apply(model, projections, config):
        batch = logits(model, ids, attention_mask=mask, position_ids=positions)
        assert torch.allclose(batch[:1], logits(model, ids[:1]), rtol=0, atol=1e-4)
        assert torch.allclose(batch[1:, 13:], logits(model, ids[1:, 13:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [PLAIN, WINDOW])
def test_left_padded_generation_equals_each_row_alone(tiny, config):
    model, projections = tiny
    ids, mask, _ = left_padded()
    with aqua.apply(model, projections, config):
        batch = model.generate(ids, attention_mask=mask, **GREEDY)[:, 40:]
        assert torch.equal(batch[:1], model.generate(ids[:1], attention_mask=mask[:1], **GREEDY)[:, 40:])
        alone = model.generate(ids[1:, 13:], attention_mask=mask[1:, 13:], **GREEDY)[:, 27:]
        assert torch.equal(batch[1:], alone)


@pytest.mark.parametrize("config", [PLAIN, WINDOW, aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25, share="group")])
def test_every_cache_gives_the_same_tokens(tiny, config):
    """Rotated on write, made inside the model, static, filled token by token, or none at all."""
    model, projections = tiny
    ids = tokens(batch=1)
    with aqua.apply(model, projections, config):
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
        assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)
        assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **GREEDY), expected)
        assert torch.equal(greedy_by_hand(model, ids, expected.shape[1]), expected)


@torch.no_grad()
def greedy_by_hand(model, ids, length):
    """The model makes its own cache in the first call, which is handed back to it."""
    cache, step = None, ids
    while ids.shape[1] < length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], 1)
    return ids


def test_generate_stores_rotated_keys_once(tiny):
    model, projections = tiny
    cache = DynamicCache(config=model.config)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25)):
        model.generate(tokens(), past_key_values=cache, **GREEDY)
        assert all(isinstance(layer, (RotatedLayer, RotatedSlidingLayer)) for layer in cache.layers)
        assert cache.layers[0].held_states()[0].shape[-1] == 12
        assert cache.layers[0].values.shape[-1] == 16


def test_a_cache_that_was_filled_before_apply_is_rotated_as_it_is_read(llama):
    model, projections = llama
    ids = tokens(batch=1)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :30], use_cache=True).past_key_values
        # The first layer's keys do not depend on attention, so one layer is enough to compare.
        with aqua.apply(model, projections, DENSE):
            continued = model(input_ids=ids[:, 30:], past_key_values=cache).logits
    assert torch.allclose(continued, logits(model, ids)[:, 30:], rtol=0, atol=1e-4)


def test_a_chat_continues_from_its_cache(tiny):
    model, projections = tiny
    ids = tokens(batch=1)
    for config in (PLAIN, WINDOW):
        with aqua.apply(model, projections, config), torch.no_grad():
            expected = logits(model, ids)
            cache = model(input_ids=ids[:, :22], use_cache=True).past_key_values
            continued = model(input_ids=ids[:, 22:], past_key_values=cache).logits
        assert torch.allclose(continued, expected[:, 22:], rtol=0, atol=1e-4)


def test_a_cache_outlives_one_apply_only_under_the_same_settings(llama):
    model, projections = llama
    ids = tokens(batch=1)
    with aqua.apply(model, projections, PLAIN), torch.no_grad():
        expected = logits(model, ids)
        cache = model(input_ids=ids[:, :22], use_cache=True).past_key_values
    with pytest.raises(aqua.AquaError, match="has left the model"):
        model(input_ids=ids[:, 22:], past_key_values=copy.deepcopy(cache))
    other = aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.5)
    with aqua.apply(model, projections, other), pytest.raises(aqua.AquaError, match="has left the model"):
        model(input_ids=ids[:, 22:], past_key_values=copy.deepcopy(cache))
    with aqua.apply(model, projections, PLAIN), torch.no_grad():
        continued = model(input_ids=ids[:, 22:], past_key_values=cache).logits
    assert torch.allclose(continued, expected[:, 22:], rtol=0, atol=1e-4)


def test_a_four_dimensional_mask_of_the_user(llama):
    model, projections = llama
    ids, mask, positions = left_padded()
    visible = torch.ones(40, 40).tril().bool()[None, None] & mask.bool()[:, None, None, :]
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    with aqua.apply(model, projections, WINDOW):
        expected = logits(model, ids, attention_mask=mask, position_ids=positions)[mask.bool()]
        for four in (visible, additive):
            found = logits(model, ids, attention_mask=four, position_ids=positions)[mask.bool()]
            assert torch.allclose(found, expected, rtol=0, atol=1e-4)
        with pytest.raises(aqua.AquaError, match="adds a bias"):
            logits(model, ids, attention_mask=additive + 0.5)


def test_apply_restores_the_model_also_after_an_error(tiny):
    from transformers import AttentionInterface, AttentionMaskInterface

    model, projections = tiny
    expected = logits(model, tokens())
    tables = [set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), aqua.apply(model, projections, PLAIN):
        assert model.config._attn_implementation.startswith("aqua-")
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"
    assert tables == [set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)]
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert torch.equal(logits(model, tokens()), expected)


def test_attach_stays_until_detach(llama):
    model, projections = llama
    expected = logits(model, tokens())
    attachment = aqua.apply(model, projections, PLAIN).attach()
    try:
        assert not torch.equal(logits(model, tokens()), expected)
        with pytest.raises(aqua.AquaError, match="attached to this model already"):
            aqua.apply(model, projections, PLAIN).attach()
    finally:
        attachment.detach()
    attachment.detach()
    assert torch.equal(logits(model, tokens()), expected)


def test_two_models_at_once_keep_their_own_settings(llama):
    model, projections = llama
    other = make_llama(num_hidden_layers=2)
    with aqua.apply(model, projections, PLAIN):
        alone = logits(model, tokens())
        with aqua.apply(other, calibrated(other), WINDOW):
            assert torch.equal(logits(model, tokens()), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_k_ratio_1_is_as_close_to_float32_as_dense_is(dtype):
    model = make_llama()
    projections, exact = calibrated(model), logits(model, tokens())
    model = model.to(dtype)
    dense_error = (logits(model, tokens()).float() - exact).abs().mean()
    for config in (DENSE, DENSE_WINDOW):
        with aqua.apply(model, projections, config):
            error = (logits(model, tokens()).float() - exact).abs().mean()
        assert error < 2 * dense_error


def test_multi_head_and_multi_query_attention():
    for heads in (1, 4):
        model = make_llama(num_key_value_heads=heads)
        projections, expected = calibrated(model), logits(model, tokens())
        with aqua.apply(model, projections, DENSE_WINDOW):
            assert torch.allclose(logits(model, tokens()), expected, rtol=0, atol=1e-4)
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25, share="group")):
            assert (logits(model, tokens()) - expected).abs().max() > 0.1


def test_gradients_flow_and_equal_the_dense_ones_at_k_ratio_1(llama):
    model, projections = llama
    weight = model.model.layers[0].self_attn.k_proj.weight

    def gradient():
        model.zero_grad()
        model(input_ids=tokens()).logits.square().mean().backward()
        return weight.grad.clone()

    expected = gradient()
    for config in (DENSE, DENSE_WINDOW):
        with aqua.apply(model, projections, config):
            assert torch.allclose(gradient(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    model.zero_grad(set_to_none=True)


def test_gradient_checkpointing_gives_the_same_gradients(llama):
    """In this mode the model drops its cache, so keys arrive as they are."""
    projections = llama[1]
    model = copy.deepcopy(llama[0]).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with aqua.apply(model, projections, PLAIN):
            model(input_ids=tokens()).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))
    assert gradients[0].abs().max() > 0


def test_attention_dropout_is_refused():
    model = make_llama(attention_dropout=0.5)
    projections = calibrated(model)
    model.train()
    with aqua.apply(model, projections, PLAIN), pytest.raises(aqua.AquaError, match="no dropout"):
        model(input_ids=tokens())


@pytest.mark.parametrize("kind", ["gptj", "t5", "linear"])
def test_models_without_attention_through_the_interface_are_refused_by_name(kind, llama):
    import transformers as tf

    model = {
        "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(n_embd=32, n_head=2, n_layer=1, vocab_size=99)),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=99)
        ),
        "linear": lambda: torch.nn.Linear(2, 2),
    }[kind]()
    with pytest.raises(aqua.AquaError, match=type(model).__name__):
        aqua.apply(model, llama[1], PLAIN)
    if kind != "linear":
        assert not str(model.config._attn_implementation).startswith("aqua-")


def test_projections_of_another_shape_are_refused(llama):
    other = make_llama(num_hidden_layers=2)
    with pytest.raises(aqua.AquaError, match=r"3 layers.*2 layers.*aqua calibrate"):
        aqua.apply(other, llama[1], PLAIN)


def test_projections_of_other_weights_of_the_same_shape_only_warn(llama):
    model, projections = llama
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.k_proj.weight.add_(torch.randn_like(layer.self_attn.k_proj.weight) * 0.02)
    with pytest.warns(UserWarning, match="other weights of the same shape"):
        aqua.apply(other, projections, PLAIN)


def test_threads_that_share_a_model_do_not_meet(llama):
    """Keys carry their own mark: what another thread does with its cache is of no concern."""
    from concurrent.futures import ThreadPoolExecutor

    model, projections = llama
    prompts = [tokens(batch=1, length=10 + 3 * number, seed=number) for number in range(6)]
    with aqua.apply(model, projections, PLAIN):
        expected = [model.generate(prompt, **GREEDY) for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                found = list(pool.map(lambda prompt: model.generate(prompt, **GREEDY), prompts))
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_right_padding_takes_no_place_in_the_window(llama):
    """A row padded on the right, then continued: the window is counted in real tokens."""
    model, projections = llama
    ids = tokens(batch=1, length=30)
    padded = torch.cat([ids[:, :20], torch.zeros(1, 6, dtype=torch.long), ids[:, 20:]], 1)
    mask = torch.ones_like(padded)
    mask[:, 20:26] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with aqua.apply(model, projections, WINDOW):
        expected = logits(model, ids)
        found = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert torch.allclose(found[:, mask[0].bool()], expected, rtol=0, atol=1e-4)


def test_autocast(llama):
    model, projections = llama
    exact = logits(model, tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense_error = (logits(model, tokens()).float() - exact).abs().mean()
        with aqua.apply(model, projections, DENSE_WINDOW):
            assert (logits(model, tokens()).float() - exact).abs().mean() < 2 * dense_error
            assert model.generate(tokens(), **GREEDY).shape == (2, 56)


def test_another_attention_implementation_inside_apply_is_refused(llama):
    model, projections = llama
    with aqua.apply(model, projections, PLAIN):
        model.set_attn_implementation("eager")
        with pytest.raises(aqua.AquaError, match="was set to 'eager' while AQUA is attached"):
            logits(model, tokens())
    assert model.config._attn_implementation == "sdpa"


def test_a_lasting_attachment_does_not_end_with_a_with_block(llama):
    model, projections = llama
    attachment = aqua.apply(model, projections, PLAIN).attach()
    try:
        with pytest.raises(aqua.AquaError, match="attached to this model already"), attachment:
            pass
        assert model.config._attn_implementation.startswith("aqua-")
    finally:
        attachment.detach()


def test_calls_that_change_scores_in_unknown_ways_are_refused(llama):
    model, projections = llama
    with aqua.apply(model, projections, PLAIN):
        for change, message in (({"is_causal": False}, "is not causal"), ({"position_bias": 1.0}, "position_bias")):
            with pytest.raises(aqua.AquaError, match=message):
                logits(model, tokens(), **change)


def test_a_four_dimensional_mask_with_a_window_on_sliding_layers_is_refused():
    model = MAKERS["mistral"]()
    visible = torch.ones(40, 40).tril().triu(-11).bool()[None, None].expand(2, 1, 40, 40)
    with aqua.apply(model, calibrated(model), WINDOW), pytest.raises(aqua.AquaError, match="need a 2-D mask"):
        logits(model, tokens(), attention_mask=visible)


def test_prompt_lookup_crops_rotated_caches(tiny):
    model, projections = tiny
    ids = tokens(batch=1, length=12).repeat(1, 3)
    for config in (PLAIN, WINDOW):
        with aqua.apply(model, projections, config):
            expected = model.generate(ids, **GREEDY)
            assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_a_model_that_adds_to_its_scores_is_refused_even_if_the_call_hides_it():
    """The probe compares the model's own attention with plain attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    model = make_llama()
    original = AttentionInterface._global_mapping["sdpa"]

    def biased(module, query, key, value, attention_mask, **options):
        return original(module, query + 1.0, key, value, attention_mask, **options)

    AttentionInterface.register("biased-for-this-test", biased)
    AttentionMaskInterface.register("biased-for-this-test", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        model.set_attn_implementation("biased-for-this-test")
        with pytest.raises(aqua.AquaError, match="computes more than softmax attention"):
            calibrated(model)
    finally:
        AttentionInterface._global_mapping.pop("biased-for-this-test")
        AttentionMaskInterface._global_mapping.pop("biased-for-this-test")
