# SPDX-License-Identifier: Apache-2.0
"""AQUA-Select in models: prompts, steps, caches, padding, sliding windows, and what an evaluation says of it."""

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from conftest import VOCABULARY, calibrated, make_gemma3, subject_of

OTHER_BITS = "leave bits out"
SELECT = {"k_ratio": 0.5, "select_p": 0.8, "sink": 2, "recent": 4, "score_bits": 8}


def tokens_of(length=60, batch=1, seed=5):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, **inputs).logits


def test_everything_read_is_dense(tiny):
    model, projections = tiny
    tokens = tokens_of()
    dense = logits_of(model, tokens)
    for more in ({"select_p": 1.0}, {"select_p": None, "select_tokens": 1000}):
        with aqua.apply(model, projections, SELECT | more):
            torch.testing.assert_close(logits_of(model, tokens), dense, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"bits": 8}, {"s_ratio": 0.25}, {"min_length": 40}, {"share": "head"}])
def test_steps_are_the_prompt(llama, more):
    """A cache that goes on token by token, or in parts, gives what the whole prompt gives, but for rounded keys."""
    model, projections = llama
    tokens = tokens_of()
    with aqua.apply(model, projections, SELECT | more) as attachment:
        whole = logits_of(model, tokens, past_key_values=attachment.new_cache())
        cache, parts = attachment.new_cache(), []
        for part in tokens.split([30, 1, 1, 20, 1, 1, 6], 1):
            parts.append(logits_of(model, part, past_key_values=cache))
    found = torch.cat(parts, 1)
    if "bits" in more:
        assert (found - whole).norm() < 0.05 * whole.norm()
    else:
        torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"min_length": 40}, {"share": "head"}, {"sink": 0, "recent": 0}])
def test_prompts_are_dense_where_only_decoding_chooses(llama, more):
    """A step chooses as it does after a prompt that chose, from the keys that the dense prompt left."""
    model, projections = llama
    tokens = tokens_of()
    dense, last = logits_of(model, tokens), tokens[:, -1:]
    with aqua.apply(model, projections, SELECT | {"select_in": "decoding"} | more) as attachment:
        assert attachment.explain(60).prompt.backends == {"fused": 3}
        assert "prompt of 60 tokens: fused, dense (select_in)\n" in str(attachment.explain(60))
        cache = attachment.new_cache()
        prompt = logits_of(model, tokens[:, :-1], past_key_values=cache)
        step = logits_of(model, last, past_key_values=cache)
    torch.testing.assert_close(prompt, dense[:, :-1], atol=2e-4, rtol=1e-4)
    assert (step - dense[:, -1:]).norm() > 1e-3 * dense[:, -1:].norm()
    with aqua.apply(model, projections, SELECT | more) as attachment:
        whole = logits_of(model, tokens)
    assert (whole[:, :-1] - dense[:, :-1]).norm() > 1e-3 * dense[:, :-1].norm()


@pytest.mark.parametrize("more", [{}, {"s_ratio": 0.25}])
def test_dense_prompts_know_padding(llama, more):
    model, projections = llama
    tokens = tokens_of(40)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens], 1)
    mask = (torch.arange(49) >= 9).long()[None]
    with aqua.apply(model, projections, SELECT | {"select_in": "decoding"} | more):
        alone = logits_of(model, tokens)
        found = logits_of(model, padded, attention_mask=mask)
    torch.testing.assert_close(found[:, 9:], alone, atol=2e-4, rtol=1e-4)


def test_dense_prompts_are_said_to_read_all(llama):
    model, projections = llama
    subject = subject_of(model, projections)
    setting = Setting(aqua.AquaConfig(**SELECT | {"select_in": "decoding"}))
    with pytest.warns(UserWarning, match="select_in is 'decoding', so prompts are dense"):
        row = evaluate_perplexity(subject, [setting], tokens_of(40))["rows"][0]
    assert (row["tokens_read"], row["bytes_read"], row["mean_k"]) == (1, 1, 1)
    assert row["kl"] < 1e-6


def test_padding_on_the_left_changes_nothing(llama):
    model, projections = llama
    tokens = tokens_of(40)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens], 1)
    mask = (torch.arange(49) >= 9).long()[None]
    with aqua.apply(model, projections, SELECT):
        alone = logits_of(model, tokens)
        found = logits_of(model, padded, attention_mask=mask)
    torch.testing.assert_close(found[:, 9:], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("sliding", ["exact", "approximate"])
def test_sliding_layers_read_all(sliding):
    model = make_gemma3()
    projections, read = calibrated(model), {}
    with aqua.apply(model, projections, SELECT | {"sliding": sliding}) as attachment:
        attachment.on_reading = lambda layer, reading: read.setdefault(layer, []).append(reading)
        logits_of(model, tokens_of())
        generated = model.generate(tokens_of(30), max_new_tokens=4, do_sample=False)
    assert set(read) == {1}
    assert generated.shape == (1, 34)


def test_generate_is_prompts_one_after_the_other(llama):
    """Also with a mask, and with several sequences."""
    model, projections = llama
    tokens = tokens_of(40, batch=2)
    with aqua.apply(model, projections, SELECT):
        found = model.generate(tokens, max_new_tokens=5, do_sample=False)
        expected = tokens
        for _ in range(5):
            following = logits_of(model, expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], 1)
    assert torch.equal(found, expected)


def test_explain_says_what_it_costs(llama):
    model, projections = llama
    with aqua.apply(model, projections, SELECT) as attachment:
        explained = attachment.explain(length=1024)
        assert set(explained.prompt.backends) == {"chunked"}
        assert explained.decoding.layout == "growing"
        assert "it reads every token" in str(explained)
        assert "select_p" in str(explained)


def test_explain_says_who_chooses_on_a_cpu(llama, monkeypatch):
    """The kernel in C is no obstacle; what it does not take has a remedy."""
    if no_kernel_reason():
        pytest.skip(no_kernel_reason())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {}
    for more in ({}, {"score_bits": 16}, {"score_bits": 4}, {"share": "head"}, {"bits": 8}):
        with aqua.apply(*llama, SELECT | more) as attachment:
            found[str(more)] = explained = attachment.explain(100)
            assert (explained.decoding.layout, explained.decoding.choice) == ("growing", "select_p=0.8")
    in_c, others = list(found.values())[:2], list(found.values())[2:]
    assert [(each.reason, each.decoding.unchosen, set(each.decoding.backends)) for each in in_c] == [
        (None, None, {"cpu"})
    ] * 2
    # 3 layers of 2 heads: 8 of 16 dimensions in a byte and a scale, or whole keys; keys and values of those chosen.
    sizes = [(each.decoding.bytes.token, each.decoding.bytes.chosen, each.decoding.bytes.held) for each in in_c]
    assert sizes == [(6 * 10, 6 * 128, 6 * (128 + 18)), (6 * 64, 6 * 128, 6 * 128)]
    assert [each.remedy for each in others] == ["set score_bits=8", "set share='group'", OTHER_BITS]
    assert all(set(each.decoding.backends) == {"chunked"} and each.decoding.bytes.chosen == 0 for each in others)
    assert "tokens are chosen by plain torch, because score_bits is 4" in str(others[0])


def test_explain_counts_all_that_a_store_widens(llama, monkeypatch):
    """Codes are read and widened as a whole before a kernel chooses among their tokens."""
    if no_kernel_reason():
        pytest.skip(no_kernel_reason())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with aqua.apply(*llama, SELECT | {"bits": 8, "score_bits": 16}) as attachment:
        found = attachment.explain(100).decoding
    assert (found.backends, found.unchosen) == ({"cpu": 3}, None)
    # 3 layers of 2 heads: a byte a number, and a scale and a zero point of two bytes each for key and value.
    every = 6 * (16 + 16 + 8)
    assert (found.bytes.token, found.bytes.chosen, found.bytes.held) == (every, 0, every)
    assert (found.bytes.step, found.bytes.is_bound) == (100 * every, False)


def test_what_is_read_is_counted(llama):
    """And observers change nothing."""
    model, projections = llama
    tokens, counts = tokens_of(50, batch=2), {}
    with aqua.apply(model, projections, SELECT) as attachment:
        unseen = logits_of(model, tokens)
        attachment.on_reading = lambda layer, reading: counts.update({layer: reading})
        assert torch.equal(logits_of(model, tokens), unseen)
    assert set(counts) == {0, 1, 2}
    for read, seen, share in counts.values():
        assert read.shape == seen.shape == (2, 2, 50)
        assert torch.equal(seen[0, 0], torch.arange(1, 51))
        assert bool((read <= seen).all()) and int(read.sum()) < int(seen.sum())
        # 8 of 16 dimensions in a byte and a scale to score, 32 of 16 bits to read.
        torch.testing.assert_close(share, (8 + 2 + 64 * read / seen) / 64)


def test_rows_say_what_was_read(llama, word_tokenizer):
    model, projections = llama
    settings = [Setting(aqua.AquaConfig(**SELECT | {"select_p": p})) for p in (0.5, 0.9, 1.0)]
    settings.append(Setting(aqua.AquaConfig(k_ratio=0.5)))
    found = evaluate_perplexity(subject_of(model, projections, word_tokenizer), settings, tokens_of(64, 2))["rows"]
    shares = [row["tokens_read"] for row in found[:3]]
    assert 0 < shares[0] < shares[1] < shares[2] == 1
    assert found[0]["kl"] > found[1]["kl"] > 1e-6 > abs(found[2]["kl"])
    assert len(found[0]["tokens_read_per_layer"]) == 3
    assert [row["bytes_read"] for row in found[:3]] == pytest.approx([share + 10 / 64 for share in shares])
    assert "tokens_read" not in found[3]
