# SPDX-License-Identifier: Apache-2.0
"""`min_length` inside a model: every cache and way to generate switches at the same token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from conftest import MAKERS, VOCABULARY, calibrated, make_gemma3

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
LENGTH, THRESHOLD = 34, 26
SETTINGS = {
    "paper": aqua.AquaConfig.paper(k_ratio=0.25, min_length=THRESHOLD),
    "group, window": aqua.AquaConfig.paper(k_ratio=0.25, share="group", sink=2, recent=5, min_length=THRESHOLD),
    "s_ratio, window": aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25, sink=2, recent=5, min_length=THRESHOLD),
    "adaptive": aqua.AquaConfig.paper(logit_error=0.5, selection="weighted", min_length=THRESHOLD),
    "int8": aqua.AquaConfig.paper(k_ratio=0.25, bits=8, min_length=THRESHOLD),
}


@pytest.fixture(scope="module", params=[*MAKERS, "gemma3"])
def family(request):
    """(model, projections) of each architecture in turn; two of them have sliding windows of 12 tokens."""
    model = (MAKERS | {"gemma3": make_gemma3})[request.param]()
    return model, calibrated(model)


def tokens(batch=1, length=LENGTH, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def dense(config):
    """The same cache, every dimension."""
    return dataclasses.replace(config, k_ratio=1.0, logit_error=None, min_length=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_before_the_length_are_dense_and_those_after_it_are_not(family, name):
    """Before it all layers are, because a token sees only what earlier ones, which are short too, have left."""
    model, projections = family
    config, ids = SETTINGS[name], tokens()
    with aqua.apply(model, projections, dense(config)):
        expected = logits(model, ids)
    with aqua.apply(model, projections, config):
        found = logits(model, ids)
    assert torch.allclose(found[:, : THRESHOLD - 1], expected[:, : THRESHOLD - 1], rtol=0, atol=1e-4)
    assert (found[:, THRESHOLD - 1] - expected[:, THRESHOLD - 1]).abs().max() > 0.05
    with aqua.apply(model, projections, dataclasses.replace(config, min_length=LENGTH + 1)):
        assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-4)
    with aqua.apply(model, projections, dataclasses.replace(config, min_length=0)):
        plain = logits(model, ids)
    with aqua.apply(model, projections, dataclasses.replace(config, min_length=1)):
        assert torch.allclose(logits(model, ids), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_decoded_tokens_switch_where_those_of_a_prompt_do(family, name):
    model, projections = family
    config, ids = SETTINGS[name], tokens()
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        whole = logits(model, ids)
        caches = [attachment.new_cache()]
        if config.bits is None and not (config.s_ratio and config.sink):
            caches.append(attachment.new_cache(max_length=LENGTH, layout="plain"))
        for cache in caches:
            start, parts = 0, []
            for size in (20, *[1] * 3, 5, *[1] * 6):
                parts.append(logits(model, ids[:, start : start + size], past_key_values=cache))
                start += size
            assert start == LENGTH
            # In 8 bits a prompt is attended to before it is rounded.
            atol = 1e-4 if config.bits is None else 0.5
            assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["paper", "group, window", "adaptive"])
def test_padding_beams_and_static_caches_change_nothing(family, name):
    model, projections = family
    ids, mask = tokens(2, 30, seed=1), torch.ones(2, 30, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    with aqua.apply(model, projections, SETTINGS[name]):
        for way in ({}, {"num_beams": 3}):
            both = model.generate(ids, attention_mask=mask, **GREEDY, **way)
            alone = model.generate(ids[1:, 9:], attention_mask=mask[1:, 9:], **GREEDY, **way)
            assert torch.equal(both[1, 30:], alone[0, 21:])
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        for way in ({"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **way), expected)


@pytest.mark.parametrize("kernel", ["triton", "cpu"])
@pytest.mark.parametrize("name", ["group, window", "adaptive", "plain group"])
def test_a_tiled_cache_switches_by_each_sequence_s_own_length(llama, name, kernel, monkeypatch):
    pytest.importorskip("triton")
    if kernel == "cpu":
        if no_kernel_reason():
            pytest.skip(str(no_kernel_reason()))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, projections = llama
    config = SETTINGS.get(name, SETTINGS["paper"])
    config = dataclasses.replace(config, share="group")
    ids, mask = tokens(2, 30, seed=1), torch.ones(2, 30, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    results = []
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        for options in ({}, {"max_length": 40, "layout": "tiled"}):
            cache, chosen, parts = attachment.new_cache(**options), [], []
            attachment.on_selection = lambda index, selected, shape, _, chosen=chosen: chosen.append(
                (torch.ones(shape) if selected is None else selected).sum(-1).tolist()
            )
            for start, stop in ((0, 20), *((place, place + 1) for place in range(20, 30))):
                given = {"attention_mask": mask[:, :stop], "past_key_values": cache}
                parts.append(logits(model, ids[:, start:stop], **given)[mask[:, start:stop].bool()])
            attachment.on_selection = None
            results.append((torch.cat(parts), chosen[3:]))
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=2e-4)
    assert results[0][1] == results[1][1]
    # One row is longer than the other by 9 tokens, and crosses the threshold first.
    counts = results[1][1][::3]
    assert all(heads == [[16]] * 4 for heads in (step[1] for step in counts))
    assert counts[0][0] == [[16]] * 4
    assert counts[-1][0] != [[16]] * 4


@pytest.mark.parametrize("pieces", [(9, 1, 1, 8, 1, 10, 4), (2, 1, 30, 1), (25, 1, 1, 7)])
def test_a_prompt_in_pieces_crosses_the_length_in_a_tiled_cache_on_a_cpu(llama, pieces, monkeypatch):
    """There short sequences are not rotated; one that is given behind others, or decoded, must become so."""
    if no_kernel_reason():
        pytest.skip(str(no_kernel_reason()))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, projections = llama
    ids, mask = tokens(3, LENGTH, seed=2), torch.ones(3, LENGTH, dtype=torch.long)
    ids[0, :2], mask[0, :2], ids[2, :20], mask[2, :20] = 0, 0, 0, 0
    # A hidden token, which no kernel knows: everything is attended to in plain torch then.
    hidden = mask.clone()
    hidden[1, 5] = 0
    for seen in (mask, hidden):
        results = []
        with aqua.apply(model, projections, SETTINGS["group, window"]) as attachment, torch.no_grad():
            for options in ({}, {"max_length": 40, "layout": "tiled"}):
                cache, start, parts = attachment.new_cache(**options), 0, []
                for size in pieces:
                    given = {"attention_mask": seen[:, : start + size], "past_key_values": cache}
                    parts.append(logits(model, ids[:, start : start + size], **given))
                    start += size
                results.append(torch.cat(parts, 1)[seen[:, :start].bool()])
            held = cache.layers[0].cache
            assert held.rotated_from == THRESHOLD
            if seen is mask:
                plans = []
                for more in (1, 2):
                    longer = torch.nn.functional.pad(seen, (0, more), value=1)
                    model(ids[:, :1], attention_mask=longer, past_key_values=cache)
                    plans.append(held.fixed)
                assert plans[0] is plans[1] is not None, "found out once"
        assert torch.allclose(results[1], results[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("config", [SETTINGS["paper"], SETTINGS["group, window"]])
def test_evicted_tokens_count(llama, config):
    """After an eviction there are fewer keys than the sequence has tokens."""
    model, projections = llama
    config = dataclasses.replace(config, h2o_ratio=0.4)
    ids, mask = tokens(2, 60, seed=2), torch.ones(2, 60, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    seen = []
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        cache = attachment.new_cache()
        attachment.on_selection = lambda index, selected, *_: seen.append((selected.sum(-1) == 16)[:, 0, -1].tolist())
        for place in range(60):
            given = {"attention_mask": mask[:, : place + 1], "past_key_values": cache}
            model(input_ids=ids[:, place : place + 1], **given)
        assert cache.layers[0].has_evicted
        assert cache.layers[0].stored < THRESHOLD + 10
    short = [[place + 1 < THRESHOLD, place + 1 - 7 < THRESHOLD] for place in range(60)]
    # Padding, and what lies within the exact window, has nothing to choose.
    assert [row[0] for row in seen[::3]][8:] == [row[0] for row in short][8:]
    assert [row[1] for row in seen[::3]][15:] == [row[1] for row in short][15:]


def test_a_4_d_mask_in_a_sliding_layer_is_refused():
    model = make_gemma3()
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with (
        aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(min_length=10)),
        pytest.raises(aqua.AquaError, match="min_length in a sliding-window layer need a 2-D mask"),
    ):
        logits(model, tokens(length=20), attention_mask={"full_attention": mask, "sliding_attention": mask})
