# SPDX-License-Identifier: Apache-2.0
"""Every decoder family people use: dense at k_ratio 1 in every way to generate, different at k_ratio 0.25."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, Architecture

import aqua_attention as aqua
from conftest import MAKERS, SHAPE, VOCABULARY, calibrated

SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]


def make(config, model, **changes):
    torch.manual_seed(0)
    return model(config(**SHAPE | changes)).eval()


FAMILIES = MAKERS | {
    "qwen2 (biases)": lambda: make(tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "gemma2 (softcap)": lambda: make(
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        sliding_window=12,
        query_pre_attn_scalar=16,
        attn_implementation="eager",  # some versions of sdpa leave the softcap out
    ),
    "gemma3 (sliding and full, two bases)": lambda: make(
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=SLIDING_AND_FULL,
    ),
    "opt (scaling 1, learned positions)": lambda: make(
        tf.OPTConfig, tf.OPTForCausalLM, ffn_dim=96, word_embed_proj_dim=64, init_std=0.3, dropout=0.0
    ),
    "olmoe (mixture of experts, MHA)": lambda: make(
        tf.OlmoeConfig, tf.OlmoeForCausalLM, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2
    ),
    "phi3": lambda: make(tf.Phi3Config, tf.Phi3ForCausalLM, original_max_position_embeddings=256),
    "gpt_neox (partial rotary)": lambda: make(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM),
    "granite (scaling of its own)": lambda: make(tf.GraniteConfig, tf.GraniteForCausalLM, attention_multiplier=0.5),
    "gpt_oss (s_aux)": lambda: make(
        tf.GptOssConfig,
        tf.GptOssForCausalLM,
        sliding_window=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=SLIDING_AND_FULL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 3.0},
    "beam search": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(model, projections) of each family in turn."""
    model = FAMILIES[request.param]()
    return model, calibrated(model)


def batch():
    """A left-padded batch of rows of 40 and 27 tokens."""
    ids = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 40, dtype=torch.long)
    ids[1, :13], mask[1, :13] = 0, 0
    return ids, mask


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("window", [{}, {"sink": 2, "recent": 5}], ids=["no window", "window"])
def test_k_ratio_1_is_dense_in_every_way_to_generate(family, window):
    model, projections = family
    ids, mask = batch()
    config = aqua.AquaConfig.paper(k_ratio=1, **window)
    expected = logits(model, ids)
    with aqua.apply(model, projections, config):
        assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-4)
    for name, way in WAYS.items():
        torch.manual_seed(7)
        expected = model.generate(ids, attention_mask=mask, **GREEDY | way)
        torch.manual_seed(7)
        with aqua.apply(model, projections, config):
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY | way), expected), name


def test_a_quarter_of_the_dimensions_moves_the_logits(family):
    model, projections = family
    ids, _ = batch()
    expected = logits(model, ids)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25)):
        assert (logits(model, ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", sink=2, recent=5),
        aqua.AquaConfig.paper(k_ratio=0.5, share="group", s_ratio=0.25),
        aqua.AquaConfig.paper(logit_error=0.5, sink=2, recent=5),
    ],
    ids=["weighted with window", "group with s_ratio", "logit_error with window"],
)
def test_caches_padding_and_a_continued_chat_do_not_change_the_result(family, config):
    model, projections = family
    ids, mask = batch()
    with aqua.apply(model, projections, config), torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        for way in ("static cache", "no cache"):
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY | WAYS[way]), expected), way
        alone = model.generate(ids[1:, 13:], attention_mask=mask[1:, 13:], **GREEDY)
        assert torch.equal(alone[:, 27:], expected[1:, 40:])
        whole = model(input_ids=ids[:1]).logits
        cache = model(input_ids=ids[:1, :22], use_cache=True).past_key_values
        continued = model(input_ids=ids[:1, 22:], past_key_values=cache).logits
        assert torch.allclose(continued, whole[:, 22:], rtol=0, atol=1e-4)


REFUSED = {
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(n_embd=32, n_head=2, n_layer=1, vocab_size=99, rotary_dim=8)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=2)),
    "codegen": lambda: tf.CodeGenForCausalLM(
        tf.CodeGenConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    ),
}


def test_a_model_without_attention_is_refused(llama):
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(aqua.AquaError, match="MambaForCausalLM"):
        aqua.apply(model, llama[1])


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_use_the_interface_are_refused_by_name(name, llama):
    model = REFUSED[name]()
    with pytest.raises(aqua.AquaError, match=f"{type(model).__name__} does not use transformers' attention interface"):
        aqua.apply(model, llama[1])


def test_the_documentation_has_the_table_of_architectures():
    """What `make test-architectures` holds, and what is refused as a whole."""
    lines = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    first = lines.index("| architectures | what is special | `generate`'s cache | refused |") + 2
    table = {}
    for line in lines[first : lines.index("", first)]:
        names, *facts = (cell.strip() for cell in line.strip("|").split("|"))
        table |= dict.fromkeys(names.split(", "), facts)
    expected = {name: [each.special, each.cache, ", ".join(each.refused)] for name, each in ARCHITECTURES.items()}
    refused = ["they do not use transformers' attention interface", "", "everything"]
    assert table == expected | dict.fromkeys(REFUSED, refused)


SHARED_SLIDING = {
    "gemma3n": ARCHITECTURES["gemma3n"],
    "gemma4": Architecture(
        "Gemma4TextConfig",
        changes=ARCHITECTURES["gemma3n"].changes | {"per_layer_config": {}},
    ),
    "gemma3n, three share": Architecture(
        "Gemma3nTextConfig",
        changes=ARCHITECTURES["gemma3n"].changes
        | {"num_hidden_layers": 5, "num_kv_shared_layers": 3, "activation_sparsity_pattern": [0.0] * 5}
        | {"layer_types": [*["sliding_attention", "full_attention"] * 2, "sliding_attention"]},
    ),
}


@pytest.mark.parametrize("name", SHARED_SLIDING)
def test_layers_that_share_keys_have_the_exact_windows_of_their_kind(name):
    """They have no place of their own in a cache."""
    model = SHARED_SLIDING[name].make()
    ids, mask = batch()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with aqua.apply(model, calibrated(model), aqua.AquaConfig(k_ratio=1, sink=2, recent=5)) as attachment:
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
        assert attachment.explain().decoding.sliding == model.config.layer_types.count("sliding_attention")


def test_chunks_of_tokens_are_rounded_neither_in_a_cache_nor_without():
    model = ARCHITECTURES["llama4"].make().double()
    ids = torch.randint(2, VOCABULARY, (1, 140), generator=torch.Generator().manual_seed(0))
    with aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=1, bits=8)), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(model(input_ids=ids, use_cache=True).logits, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [{"sink": 2}, {"recent": 5}, {"min_length": 10}])
def test_a_4_d_mask_in_a_layer_of_chunks_is_refused_as_in_a_sliding_one(window):
    """It does not say where the exact window is, and who is short."""
    model = ARCHITECTURES["llama4"].make()
    ids = batch()[0]
    causal = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    chunk = torch.arange(40) // 12
    masks = {"full_attention": causal, "chunked_attention": causal & (chunk[:, None] == chunk)}
    with aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=0.5)):
        expected = logits(model, ids)
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids, attention_mask=masks).logits, expected, rtol=0, atol=1e-4)
    with (
        aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=0.5, **window)),
        pytest.raises(aqua.AquaError, match="in a sliding-window layer need a 2-D mask"),
        torch.no_grad(),
    ):
        model(input_ids=ids, attention_mask=masks)
