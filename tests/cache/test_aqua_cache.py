# SPDX-License-Identifier: Apache-2.0
"""Caches made for an attachment: of a fixed size under torch.compile, and in files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import DynamicCache, StaticCache

import aqua_attention as aqua
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama, make_mistral

WINDOW = {"selection": "weighted", "share": "group", "sink": 2, "recent": 8}
CONFIGS = {
    "paper": aqua.AquaConfig.paper(k_ratio=0.5),
    "window": aqua.AquaConfig.paper(k_ratio=0.5, **WINDOW),
    "narrow": aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25),
}
STORED = CONFIGS | {
    "narrow, window": aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25, **WINDOW),
    "narrow, default": aqua.AquaConfig(s_ratio=0.25),
    "int8": aqua.AquaConfig.paper(k_ratio=0.5, bits=8),
    "int4, evicted, narrow, window": aqua.AquaConfig.paper(k_ratio=0.5, bits=4, h2o_ratio=0.5, s_ratio=0.25, **WINDOW),
    "evicted": aqua.AquaConfig.paper(k_ratio=0.5, h2o_ratio=0.5, h2o_queries=16),
}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def tokens(length=200, batch=2):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("make", [make_llama, make_mistral, make_gemma3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_gives_the_tokens_of_a_growing_one(make, name):
    model = make()
    projections, ids, mask = calibrated(model), tokens(40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    with aqua.apply(model, projections, CONFIGS[name]) as attachment:
        growing = model.generate(ids, attention_mask=mask, past_key_values=attachment.new_cache(), **GREEDY)
        cache = attachment.new_cache(max_length=64)
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), growing)
        shapes = [tuple(layer.held.keys.shape) for layer in cache.layers]
        assert {shape[2] for shape in shapes} <= {64, 12}
        assert shapes[1][3] == (12 if name == "narrow" else 16)
        cache.reset()
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), growing)
        assert [tuple(layer.held.keys.shape) for layer in cache.layers] == shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_compiles_without_a_break(llama, name):
    """One graph for the whole decoding step, the same for every token: the eager backend would recompile, not err."""
    model, projections = llama
    ids = tokens(40)
    with aqua.apply(model, projections, CONFIGS[name]) as attachment:
        growing, static = attachment.new_cache(), attachment.new_cache(max_length=64)
        for cache in (growing, static):
            logits(model, ids, past_key_values=cache)
        torch._dynamo.reset()
        graphs = []
        step = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(1) or graph.forward)
        for place in range(4):
            token = ids[:, place : place + 1]
            with torch.no_grad():
                found = step(input_ids=token, past_key_values=static).logits
            assert torch.allclose(found, logits(model, token, past_key_values=growing), rtol=0, atol=1e-4)
    assert len(graphs) == 1


def test_a_static_cache_grows_where_more_tokens_come(llama):
    model, projections = llama
    ids = tokens(64)
    with aqua.apply(model, projections, CONFIGS["paper"]) as attachment:
        cache = attachment.new_cache(max_length=40)
        logits(model, ids[:, :40], past_key_values=cache)
        found = logits(model, ids[:, 40:], past_key_values=cache)
        assert (cache.max_length, int(cache.get_seq_length())) == (64, 64)
        assert torch.allclose(found, logits(model, ids)[:, 40:], rtol=0, atol=1e-4)
        expected = model.generate(ids[:, :10], **GREEDY)
        small = attachment.new_cache(max_length=12)
        assert torch.equal(model.generate(ids[:, :10], past_key_values=small, **GREEDY), expected)
        assert small.max_length > 12


def test_what_a_static_cache_cannot_store_is_said_when_it_is_made(llama):
    model, projections = llama
    for name, words in (
        ("int8", "cannot store bits=8"),
        ("evicted", "cannot store h2o_ratio=0.5"),
        ("narrow, window", "cannot store s_ratio with an exact window: leave out max_length, or give sink=0, recent=0"),
        ("narrow, default", "cannot store s_ratio with an exact window: leave out max_length, or give sink=0"),
    ):
        with aqua.apply(model, projections, STORED[name]) as attachment:
            with pytest.raises(aqua.AquaError, match=words):
                attachment.new_cache(max_length=64)
            assert attachment.new_cache().get_seq_length() == 0
    with aqua.apply(model, projections) as attachment, pytest.raises(aqua.AquaError, match="max_length is 0"):
        attachment.new_cache(max_length=0)
    with pytest.raises(aqua.AquaError, match="AQUA is not attached"):
        attachment.new_cache()


@pytest.mark.parametrize("make", [make_llama, make_gemma3])
@pytest.mark.parametrize("name", STORED)
def test_a_saved_cache_goes_on_as_if_it_had_stayed(make, name, tmp_path):
    model, ids = make(), tokens()
    projections = calibrated(model)
    with aqua.apply(model, projections, STORED[name]) as attachment:
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :150], past_key_values=cache)
        attachment.save_cache(cache, tmp_path / "talk.safetensors")
        expected = [logits(model, ids[:, part], past_key_values=cache) for part in (slice(150, 190), slice(190, 191))]
    # Another day: the model is loaded again.
    model = make()
    with aqua.apply(model, projections, STORED[name]) as attachment:
        cache = attachment.load_cache(tmp_path / "talk.safetensors")
        assert cache.get_seq_length() == 150
        found = [logits(model, ids[:, part], past_key_values=cache) for part in (slice(150, 190), slice(190, 191))]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_settings_that_a_file_of_an_earlier_version_lacks_are_the_papers(llama, tmp_path, monkeypatch):
    model, projections = llama
    path, paper = tmp_path / "talk.safetensors", aqua.AquaConfig.paper(k_ratio=0.5)
    with aqua.apply(model, projections, paper) as attachment:
        cache = attachment.new_cache()
        logits(model, tokens(), past_key_values=cache)
        with monkeypatch.context() as earlier:
            earlier.setattr("aqua_attention.cache.file.STORED_SETTINGS", ("s_ratio", "bits"))
            attachment.save_cache(cache, path)
        assert attachment.load_cache(path).get_seq_length() == 200
    with (
        aqua.apply(model, projections) as attachment,
        pytest.raises(aqua.AquaError, match="filled with sink 0, not 4, recent 0, not 64: apply the same settings"),
    ):
        attachment.load_cache(path)


def test_another_selection_may_go_on_with_a_cache_and_another_storage_may_not(llama, tmp_path):
    model, projections = llama
    path = tmp_path / "talk.safetensors"
    with aqua.apply(model, projections, STORED["int8"]) as attachment:
        cache = attachment.new_cache()
        logits(model, tokens(), past_key_values=cache)
        attachment.save_cache(cache, path)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.9, selection="weighted", bits=8)) as attachment:
        assert attachment.load_cache(path).get_seq_length() == 200
    config = aqua.AquaConfig.paper(bits=4, s_ratio=0.25)
    with (
        aqua.apply(model, projections, config) as attachment,
        pytest.raises(
            aqua.AquaError, match=r"filled with s_ratio 0.0, not 0.25, bits 8, not 4: apply the same settings"
        ),
    ):
        attachment.load_cache(path)


def test_files_and_caches_that_do_not_fit_are_one_clear_error(llama, tmp_path):
    model, projections = llama
    path, other = tmp_path / "talk.safetensors", make_llama(num_hidden_layers=2)
    with aqua.apply(model, projections, STORED["int8"]) as attachment:
        with pytest.raises(aqua.AquaError, match="this cache is empty"):
            attachment.save_cache(attachment.new_cache(), path)
        with pytest.raises(aqua.AquaError, match="not this StaticCache"):
            attachment.save_cache(StaticCache(config=model.config, max_cache_len=9), path)
        with pytest.raises(aqua.AquaError, match="no such cache file"):
            attachment.load_cache(path)
        cache = attachment.new_cache()
        logits(model, tokens(), past_key_values=cache)
        attachment.save_cache(cache, path)
        whole = path.read_bytes()
        for damage, words in (
            (whole[:-100], "not a complete safetensors file"),
            (whole[:-8] + bytes(8), "its content was changed"),
        ):
            path.write_bytes(damage)
            with pytest.raises(aqua.AquaError, match=words):
                attachment.load_cache(path)
        path.write_bytes(whole)
    with (
        aqua.apply(other, calibrated(other), STORED["int8"]) as attachment,
        pytest.raises(aqua.AquaError, match="it was made for another model"),
    ):
        attachment.load_cache(path)
    with aqua.apply(model, projections, STORED["paper"]) as attachment:
        with pytest.raises(aqua.AquaError, match="this cache was not filled under this AQUA"):
            attachment.save_cache(cache, path)
        projections.save(path)
        with pytest.raises(aqua.AquaError, match="a safetensors file, but not of an AQUA cache"):
            attachment.load_cache(path)


def test_a_file_whose_parts_do_not_fit_is_refused(llama, tmp_path):
    """Whole by its digest, yet made of other parts than a cache has."""
    from aqua_attention.io.tensors import write_tensors

    model, projections = llama
    path = tmp_path / "talk.safetensors"
    with aqua.apply(model, projections, STORED["paper"]) as attachment:
        cache = attachment.new_cache()
        logits(model, tokens(), past_key_values=cache)
        attachment.save_cache(cache, path)
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["aqua_attention_cache"])
        tensors = safetensors.torch.load_file(path)
        header.pop("sha256")
        for change in (
            lambda: tensors.update({"layers.1.keys.states": tensors["layers.1.keys.states"][:, :, :50]}),
            lambda: header["layers"][0]["tensors"].pop("values.states"),
            lambda: header["layers"].pop(),
        ):
            change()
            for name, layer in ((n, header["layers"][n]) for n in range(len(header["layers"]))):
                for part in layer["tensors"]:
                    layer["tensors"][part][1] = list(tensors[f"layers.{name}.{part}"].shape)
            write_tensors(path, "aqua_attention_cache", header, tensors)
            with pytest.raises(aqua.AquaError, match="fill a new cache and save it again"):
                attachment.load_cache(path)


def lengths(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("make", [make_llama, make_gemma3])
def test_an_error_leaves_every_layer_as_it_was(make, static):
    """Another batch, another attachment's cache, a mask that adds a bias: refused before any layer has written."""
    model, ids = make(), tokens(50)
    projections, other = calibrated(model), make()
    with (
        aqua.apply(model, projections, CONFIGS["paper"]) as attachment,
        aqua.apply(other, projections, CONFIGS["window"]),
    ):
        cache = attachment.new_cache(max_length=64 if static else None)
        logits(model, ids, past_key_values=cache)
        before = lengths(cache)
        with pytest.raises(aqua.AquaError, match="the cache holds 2 sequences, the batch has 1"):
            logits(model, ids[:1, :1], past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="filled under other AQUA projections or settings"):
            logits(other, ids[:, :1], past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="the attention mask adds a bias"):
            logits(model, ids[:, :1], past_key_values=cache, attention_mask=torch.full((2, 1, 1, 51), 0.5))
        assert lengths(cache) == before
        logits(model, ids[:, :1], past_key_values=cache)


def test_gradients_are_refused_before_any_layer_has_written():
    model = make_gemma3()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.model.layers[2].self_attn.v_proj.weight.requires_grad = True
    for name in ("int8", "evicted"):
        with aqua.apply(model, calibrated(model), STORED[name]) as attachment:
            cache = attachment.new_cache()
            with pytest.raises(aqua.AquaError, match="has no gradient: leave it out"):
                model(input_ids=tokens(50), past_key_values=cache)
            assert lengths(cache) == [0, 0, 0]


def test_a_crop_that_one_layer_cannot_do_is_done_by_none():
    model = make_gemma3(sliding_window=64)
    with aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.3)) as attachment:
        cache = attachment.new_cache()
        logits(model, tokens(50), past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="the last 3 tokens cannot be taken back"):
            cache.crop(-3)
        assert lengths(cache) == [50, 50, 50]
    with (
        aqua.apply(model, calibrated(model)) as attachment,
        pytest.raises(aqua.AquaError, match="a static cache cannot be cropped"),
    ):
        attachment.new_cache(max_length=64).crop(-3)


@pytest.mark.parametrize("name", ["paper", "int8"])
def test_copies_end_with_the_attachment_and_other_weights_are_refused(name, tmp_path):
    model, tuned, ids = make_llama(), make_llama(), tokens(100)
    projections = calibrated(model)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.self_attn.k_proj.weight.add_(0.1 * torch.randn_like(layer.self_attn.k_proj.weight))
    with aqua.apply(model, projections, STORED[name]) as attachment:
        cache = attachment.new_cache()
        logits(model, ids, past_key_values=cache)
        copied, for_other = copy.deepcopy(cache), copy.deepcopy(cache)
        attachment.save_cache(copied, tmp_path / "talk.safetensors")
        with pytest.raises(aqua.AquaError, match="cannot be pickled"):
            pickle.dumps(cache)
    with pytest.raises(aqua.AquaError, match="the AQUA that filled it has left"):
        logits(model, ids[:, :1], past_key_values=copied)
    with pytest.warns(UserWarning, match="other weights"), aqua.apply(tuned, projections, STORED[name]) as attachment:
        with pytest.raises(aqua.AquaError, match="it was made for another model"):
            attachment.load_cache(tmp_path / "talk.safetensors")
        with pytest.raises(aqua.AquaError, match="the AQUA that filled it has left"):
            logits(tuned, ids[:, :1], past_key_values=for_other)


def test_codes_are_not_read_with_other_scales(tmp_path):
    """Not rotated, so that the matrix is the same for every calibration; the scales are not."""
    model = make_llama()
    first, second = calibrated(model).with_basis("none"), calibrated(model, windows=2, context=16).with_basis("none")
    with aqua.apply(model, first, STORED["int8"]) as attachment:
        cache = attachment.new_cache()
        logits(model, tokens(), past_key_values=cache)
        attachment.save_cache(cache, tmp_path / "talk.safetensors")
    with (
        aqua.apply(model, second, STORED["int8"]) as attachment,
        pytest.raises(aqua.AquaError, match="made with other projections"),
    ):
        attachment.load_cache(tmp_path / "talk.safetensors")


def test_a_cropped_cache_is_saved_and_another_dtype_is_refused(tmp_path):
    model, path = make_llama(), tmp_path / "talk.safetensors"
    projections, ids = calibrated(model), tokens()
    with aqua.apply(model, projections, STORED["int8"]) as attachment:
        cache = attachment.new_cache()
        logits(model, ids, past_key_values=cache)
        cache.crop(-120)
        attachment.save_cache(cache, path)
        again = attachment.load_cache(path)
        expected = logits(model, ids[:, 80:90], past_key_values=cache)
        assert torch.equal(logits(model, ids[:, 80:90], past_key_values=again), expected)
    model = model.bfloat16()
    with (
        aqua.apply(model, projections, STORED["int8"]) as attachment,
        pytest.raises(aqua.AquaError, match=r"a model in torch.float32, this one is torch.bfloat16"),
    ):
        attachment.load_cache(path)


def test_an_empty_static_cache_serves_a_later_attachment(llama):
    model, projections = llama
    with aqua.apply(model, projections, CONFIGS["paper"]) as attachment:
        cache = attachment.new_cache(max_length=64)
    with aqua.apply(model, projections, CONFIGS["window"]):
        found = logits(model, tokens(40), past_key_values=cache)
        assert torch.allclose(found, logits(model, tokens(40)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", STORED)
def test_what_was_filled_in_inference_mode_goes_on_outside(llama, name):
    model, projections = llama
    with aqua.apply(model, projections, STORED[name]) as attachment:
        cache = attachment.new_cache()
        with torch.inference_mode():
            model(input_ids=tokens(), past_key_values=cache)
        for _ in range(60):
            assert torch.isfinite(logits(model, tokens(1), past_key_values=cache)).all()


def test_int8_serves_a_model_in_float64(llama):
    model, projections = llama
    model, ids = copy.deepcopy(model).double(), tokens()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, bits=8)) as attachment:
        cache = attachment.new_cache()
        logits(model, ids[:, :150], past_key_values=cache)
        found = logits(model, ids[:, 150:152], past_key_values=cache)
    expected = logits(model, ids[:, :152])[:, 150:]
    assert found.dtype == torch.float64
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("make", [make_llama, make_mistral, make_gemma3])
@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16}, {}])
def test_a_growing_cache_of_ours_serves_every_way_to_generate(make, way):
    model, ids = make(), tokens(40, 1)
    assistant = {} if way else {"assistant_model": make_llama(num_hidden_layers=1)}
    with aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=0.5)) as attachment:
        expected = model.generate(ids, **GREEDY | way | assistant)
        found = model.generate(ids, past_key_values=attachment.new_cache(), **GREEDY | way | assistant)
    assert torch.equal(found, expected)
