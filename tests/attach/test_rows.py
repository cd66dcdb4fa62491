# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch that are padded on the left, or hold several sequences: each gives what it gives alone."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    OPTConfig,
    OPTForCausalLM,
)

import aqua_attention as aqua
from conftest import SHAPE, VOCABULARY, calibrated, make_gemma3, make_llama, make_mistral

PADDING, LENGTH = 13, 40
HALF = {"k_ratio": 0.5, "sliding": "approximate", "sink": 2, "recent": 3}


def tokens(batch=1, length=LENGTH, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded():
    ids, mask = tokens(2), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **inputs)[0]


def assert_close(found, expected, atol=1e-4):
    assert torch.allclose(found, expected, rtol=0, atol=atol), float((found - expected).abs().max())


def make_neox(**changes):
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape | changes)).eval()


def make_opt(**changes):
    torch.manual_seed(0)
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes = {"ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "init_std": 0.3}
    return OPTForCausalLM(OPTConfig(**shape | sizes | changes)).eval()


@pytest.mark.parametrize("make", [make_llama, make_mistral, make_gemma3, make_neox, make_opt])
@pytest.mark.parametrize("config", [aqua.AquaConfig(**HALF), aqua.AquaConfig.paper(0.5)], ids=["window", "paper"])
def test_left_padding_without_position_ids_changes_nothing(make, config):
    model = make()
    ids, mask = padded()
    with aqua.apply(model, calibrated(model), config):
        batch = logits(model, ids, attention_mask=mask)
        assert_close(batch[:1], logits(model, ids[:1]))
        assert_close(batch[1:, PADDING:], logits(model, ids[1:, PADDING:]))


@pytest.mark.parametrize("make_cache", [lambda a: DynamicCache(), lambda a: a.new_cache(64), lambda a: a.new_cache()])
@pytest.mark.parametrize("positional", [False, True])
def test_steps_after_a_left_padded_prompt_count_as_it_does(llama, make_cache, positional):
    model, projections = llama
    ids, mask = padded()
    with aqua.apply(model, projections, aqua.AquaConfig(**HALF)) as attachment:
        cache, found = make_cache(attachment), []
        for part in (slice(0, 30), slice(30, 31), slice(31, 36), slice(36, 40)):
            seen = mask[:, : part.stop]
            if positional:
                with torch.no_grad():
                    hidden = model.model(ids[:, part], seen, None, cache)
                    found.append(model.lm_head(hidden.last_hidden_state))
            else:
                found.append(logits(model, ids[:, part], attention_mask=seen, past_key_values=cache))
        assert_close(torch.cat(found, 1)[1:, PADDING:], logits(model, ids[1:, PADDING:]))


def test_left_padding_of_embeddings_and_of_an_encoder_changes_nothing(llama):
    model, projections = llama
    ids, mask = padded()
    config = aqua.AquaConfig(**HALF)
    with aqua.apply(model, projections, config), torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        batch = model(inputs_embeds=embedded, attention_mask=mask).logits
        assert_close(batch[1:, PADDING:], logits(model, ids[1:, PADDING:]))
    torch.manual_seed(0)
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    encoder = ModernBertModel(
        ModernBertConfig(**shape | special, intermediate_size=96, initializer_range=0.3, initializer_cutoff_factor=5.0)
    ).eval()
    with aqua.apply(encoder, calibrated(encoder), aqua.AquaConfig(k_ratio=0.25, sink=0)):
        batch = logits(encoder, ids, attention_mask=mask)
        assert_close(batch[1:, PADDING:], logits(encoder, ids[1:, PADDING:]))


@pytest.mark.parametrize("make", [make_llama, make_opt])
def test_a_mask_with_holes_is_dense_at_k_ratio_1(make):
    """Only padding on the left moves positions: distances are the model's own."""
    model = make()
    ids, mask = padded()
    mask[:, 20:25] = 0
    expected = logits(model, ids, attention_mask=mask)
    with aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=1)):
        found = logits(model, ids, attention_mask=mask)
    assert_close(found[mask.bool()], expected[mask.bool()])


SETTINGS = {
    "min_length": {"sink": 0, "recent": 0, "min_length": 8},
    "window": {},
    "both": {"min_length": 8},
    "all short": {"sink": 0, "recent": 0, "min_length": 30},
    "logit_error": {"logit_error": 0.5, "sink": 1, "recent": 2, "min_length": 8},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", [make_llama, make_mistral, make_gemma3])
@pytest.mark.parametrize("sliding", ["approximate", "exact"])
def test_packed_sequences_give_what_each_gives_alone(make, setting, sliding):
    model, parts = make(), [tokens(1, length, seed) for seed, length in enumerate((21, 1, 17, 9))]
    config = aqua.AquaConfig(**HALF | SETTINGS[setting] | {"sliding": sliding})
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with aqua.apply(model, calibrated(model), config):
        packed = logits(model, torch.cat(parts, 1), position_ids=positions, use_cache=False)
        assert_close(packed, torch.cat([logits(model, part, use_cache=False) for part in parts], 1))


def test_packed_rows_of_a_batch_have_sequences_of_their_own(llama):
    model, projections = llama
    ids, positions = tokens(2), torch.arange(LENGTH).repeat(2, 1)
    positions[0, 25:] -= 25
    positions[1, 7:] -= 7
    with aqua.apply(model, projections, aqua.AquaConfig(**HALF, min_length=10)):
        packed = logits(model, ids, position_ids=positions, use_cache=False)
        for row, cut in enumerate((25, 7)):
            for part in (slice(0, cut), slice(cut, LENGTH)):
                assert_close(packed[row : row + 1, part], logits(model, ids[row : row + 1, part]))
