# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: both parts under AQUA, or one of them; projections of each, in one file or two."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers as tf
from encoders import TEXT, VISION, VISION_LANGUAGE, llava, llava_next, make, paligemma, pixels, qwen3_5

import aqua_attention as aqua
from aqua_attention.calibration.run import collect
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest, shape_of
from aqua_attention.report.projections import provenance_table

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FIRST = {"selection": "weighted", "sink": 1}
WINDOW = FIRST | {"recent": 3}
INDICES = {"Qwen3_5ForConditionalGeneration": [1, 3, 4, 5]}
"""Those of text are places in a cache, where linear attention has places too."""


@pytest.fixture(scope="module", params=VISION_LANGUAGE)
def family(request):
    """(model, a prompt with an image, projections of both parts) of each family in turn."""
    model, prompt = (made() for made in VISION_LANGUAGE[request.param])
    return model, prompt, aqua.calibrate_inputs(model, [prompt, prompt])


def parts(layers):
    """Names of the layers of text, and of those of images."""
    return [[layer.name for layer in layers if layer.side == side] for side in ("text", "images")]


@torch.no_grad()
def logits(model, prompt):
    return model(**prompt).logits


@pytest.mark.parametrize("window", [{}, WINDOW], ids=["no window", "window"])
def test_k_ratio_1_is_dense_and_a_quarter_is_not(family, window):
    model, prompt, projections = family
    expected, answer = logits(model, prompt), model.generate(**prompt, **GREEDY)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **window)) as attachment:
        assert attachment.dense == []
        assert torch.allclose(logits(model, prompt), expected, rtol=0, atol=1e-4)
        assert torch.equal(model.generate(**prompt, **GREEDY), answer)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25, **window)):
        assert (logits(model, prompt) - expected).abs().max() > 0.1
    assert torch.equal(logits(model, prompt), expected)
    assert torch.equal(model.generate(**prompt, **GREEDY), answer)


@pytest.mark.parametrize("config", [{}, WINDOW, WINDOW | {"s_ratio": 0.25}], ids=["paper", "window", "s_ratio"])
def test_every_cache_gives_the_same_answer(family, config):
    model, prompt, projections = family
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, **config)) as attachment:
        expected = model.generate(**prompt, **GREEDY)
        assert torch.equal(model.generate(**prompt, **GREEDY, use_cache=False), expected)
        assert torch.equal(model.generate(**prompt, **GREEDY, cache_implementation="static"), expected)
        assert torch.equal(model.generate(**prompt, **GREEDY, past_key_values=attachment.new_cache()), expected)
        if "s_ratio" not in config:  # with a window refused, and tested elsewhere
            static = attachment.new_cache(max_length=64)
            assert torch.equal(model.generate(**prompt, **GREEDY, past_key_values=static), expected)


def test_layers_of_text_and_of_images_have_indices_and_names_of_their_own(family):
    layers = attention_layers(family[0])
    assert [layer.index for layer in layers] == INDICES.get(type(family[0]).__name__, [0, 1, 2, 3])
    assert len({layer.name for layer in layers}) == 4
    assert [layer.causal for layer in layers] == [True, True, False, False]
    assert [layer.reads_own_cache for layer in layers] == [True, True, False, False]


@pytest.mark.parametrize("side", [0, 1], ids=["text", "images"])
def test_a_pattern_leaves_the_other_part_dense(family, side):
    """The part left dense sees the very states of the dense model, and gives the very same."""
    model, prompt, projections = family
    names = parts(attention_layers(model))
    pattern = names[side][0].split(".")[0] + ".*"
    outputs, modules = {}, dict(model.named_modules())

    def watch(name):
        found = next(module for path, module in modules.items() if path.endswith(name))
        keep = lambda _, args, output: outputs.setdefault(name, []).append(output[0].clone())  # noqa: E731
        return found.register_forward_hook(keep)

    hooks = [watch(name) for name in (names[0][0], names[1][0])]
    try:
        logits(model, prompt)
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25), layers=pattern) as attachment:
            assert attachment.dense == names[1 - side]
            moved = logits(model, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    vision, language = outputs[names[1][0]], outputs[names[0][0]]
    assert torch.equal(vision[0], vision[-1]) == (side == 0)  # between them are the runs of `apply`
    assert not torch.equal(language[0], language[-1])  # its own, or what images have become
    assert (moved - logits(model, prompt)).abs().max() > 0.1


def test_one_layer_alone_is_chosen_by_its_name(family):
    model, prompt, projections = family
    expected, names = logits(model, prompt), parts(attention_layers(model))
    for chosen in (names[0][1], names[1][0]):
        for config in (aqua.AquaConfig.paper(k_ratio=1), aqua.AquaConfig.paper(k_ratio=1, **FIRST)):
            with aqua.apply(model, projections, config, layers=chosen) as attachment:
                assert chosen not in attachment.dense and len(attachment.dense) == 3
                assert torch.allclose(logits(model, prompt), expected, rtol=0, atol=1e-4)
    for way in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        answer = model.generate(**prompt, **GREEDY, **way)
        with aqua.apply(
            model, projections, aqua.AquaConfig.paper(k_ratio=1, **WINDOW), layers=names[0][1]
        ) as attachment:
            assert torch.equal(model.generate(**prompt, **GREEDY, **way), answer), way
            if not way:
                made = attachment.new_cache(), attachment.new_cache(max_length=64)
                assert all(torch.equal(model.generate(**prompt, **GREEDY, past_key_values=c), answer) for c in made)
    with pytest.raises(aqua.AquaError, match="bits=8 is for all layers of a language model"):
        aqua.apply(model, projections, aqua.AquaConfig.paper(bits=8), layers=names[0][1])
    with pytest.raises(aqua.AquaError, match=r"no attention layer has a name like 'decoder\.\*': the names go from"):
        aqua.apply(model, projections, layers="decoder.*")


def test_each_part_has_projections_of_its_own_and_they_join_into_one_file(family, tmp_path):
    model, prompt, _ = family
    text = [{"input_ids": torch.randint(6, 97, (1, 24), generator=torch.Generator().manual_seed(1))}]
    images = [{name: value for name, value in prompt.items() if name in ("pixel_values", "image_grid_thw")}]
    names = parts(attention_layers(model))
    language, vision = aqua.calibrate_inputs(model, text), aqua.calibrate_inputs(model, images)
    assert [language.model["shape"]["names"], vision.model["shape"]["names"]] == names
    config, expected = aqua.AquaConfig.paper(k_ratio=0.25, **WINDOW), logits(model, prompt)
    for side, alone in enumerate((language, vision)):
        alone.save(tmp_path / "part.safetensors")
        loaded = aqua.Projections.load(tmp_path / "part.safetensors")
        alone_config = aqua.AquaConfig.paper(k_ratio=0.25, **(FIRST if side else WINDOW))
        with aqua.apply(model, loaded, alone_config) as attachment:
            assert attachment.dense == names[1 - side]
            assert (logits(model, prompt) - expected).abs().max() > 0.1
    both = vision.merged(language)
    both.save(tmp_path / "both.safetensors")
    loaded = aqua.Projections.load(tmp_path / "both.safetensors")
    indices = [layer.index for layer in attention_layers(model)]
    assert list(loaded.layers) == indices
    assert loaded.model["shape"]["names"] == names[0] + names[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with aqua.apply(model, loaded, config) as attachment:
            assert attachment.dense == []
            moved = logits(model, prompt)
    for index, part in ((indices[0], language), (indices[-1], vision)):
        assert torch.equal(loaded.layers[index].rotation, part.layers[index].rotation)
    with aqua.apply(model, vision.merged(language), config):
        assert torch.equal(logits(model, prompt), moved)


def test_a_file_of_all_layers_merges_with_a_joined_one(family):
    model, prompt, whole = family
    text = aqua.calibrate_inputs(model, [{"input_ids": torch.arange(6, 30)[None]}])
    images = {name: value for name, value in prompt.items() if name in ("pixel_values", "image_grid_thw")}
    vision = aqua.calibrate_inputs(model, [images])
    joined = text.merged(vision)
    for merged in (joined.merged(whole), whole.merged(joined)):
        assert merged.model["shape"] == joined.model["shape"]
        for index, layer in merged.statistics.items():
            assert torch.equal(layer.key_gram, joined.statistics[index].key_gram + whole.statistics[index].key_gram)
        with aqua.apply(model, merged) as attachment:
            assert attachment.dense == []
    with pytest.raises(aqua.AquaError, match=r"different models \(\w+, 4 layers.* and \w+, 2 layers"):
        whole.merged(text)
    rows = dict(provenance_table(joined.merged(whole))[1])
    assert "?" not in "".join(rows.values())
    assert rows["calibrated on"].endswith("tokens")  # a line each; the last is that of `whole`


def test_joined_parts_of_models_with_two_names_warn():
    model, prompt = llava(), VISION_LANGUAGE["llava"][1]()
    text = aqua.calibrate_inputs(model, [{"input_ids": prompt["input_ids"][:, :3]}], name="one")
    images = [{"pixel_values": prompt["pixel_values"]}]
    with pytest.warns(UserWarning, match="calibrated on 'one' and on 'other': they are for one model only if"):
        text.merged(aqua.calibrate_inputs(model, images, name="other"))
    of_one = aqua.calibrate_inputs(model, images, name="one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.merged(of_one)


def unnamed(model, layers):
    """Projections in a file as it was before AQUA saw the layers for images: of these alone, without names."""
    windows = torch.randint(6, 97, (4, 24), generator=torch.Generator().manual_seed(1))
    identity = {"name": "x", "shape": shape_of(model, layers), "key_weights": key_weight_digest(layers)}
    return aqua.Projections.from_statistics(collect(model, windows, layers=layers), identity, {"tokens": 96})


def test_a_file_of_the_text_layers_that_names_none_covers_these(family):
    model, prompt, _ = family
    layers, expected = attention_layers(model), logits(model, prompt)
    old = unnamed(model, [layer for layer in layers if layer.side == "text"])
    assert "names" not in old.model["shape"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with aqua.apply(model, old, aqua.AquaConfig.paper(k_ratio=0.25, **WINDOW)) as attachment:
            assert attachment.dense == parts(layers)[1]
            assert (logits(model, prompt) - expected).abs().max() > 0.1


def test_a_file_of_the_language_part_alone_fits_the_whole_model(tmp_path):
    """AutoModelForCausalLM takes some checkpoints of vision-language models apart, and gives them another type."""
    whole = qwen3_5()
    whole.save_pretrained(tmp_path)
    alone = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    assert alone.config.model_type == "qwen3_5_text" != whole.config.model_type
    projections, prompt = unnamed(alone, attention_layers(alone)), {"input_ids": torch.arange(6, 30)[None]}
    results = []
    for model in (alone, whole):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25, **WINDOW)) as attachment:
                results.append(logits(model, prompt))
    assert attachment.dense == parts(attention_layers(whole))[1]
    assert torch.allclose(*results, rtol=0, atol=1e-4)
    assert (results[0] - logits(alone, prompt)).abs().max() > 0.1
    projections.model["shape"]["model_type"] = "llama"
    with pytest.raises(aqua.AquaError, match="these projections are for llama, 2 layers"):
        aqua.apply(whole, projections)


def test_a_second_attachment_is_refused_whichever_part_the_first_has(family):
    model, _, projections = family
    for side in (0, 1):
        pattern = parts(attention_layers(model))[side][0].split(".")[0] + ".*"
        refused = pytest.raises(aqua.AquaError, match="attached to this model already")
        with aqua.apply(model, projections, layers=pattern), refused:
            aqua.apply(model, projections)


def test_settings_of_a_cache_are_for_the_language_part(family):
    model, prompt, projections = family
    config = aqua.AquaConfig.paper(k_ratio=0.5, bits=8, h2o_ratio=0.5, sink=1, recent=2)
    with torch.no_grad(), aqua.apply(model, projections, config):
        assert model.generate(**prompt, **GREEDY).shape[1] == prompt["input_ids"].shape[1] + 8
    vision = parts(attention_layers(model))[1][0].split(".")[0] + ".*"
    with pytest.raises(aqua.AquaError, match=r"recent is 2.*is bidirectional"):
        aqua.apply(model, projections, config, layers=vision)


def test_padded_prompts_are_no_calibration(family):
    model, prompt, _ = family
    mask = torch.ones_like(prompt["input_ids"])
    mask[0, -1] = 0
    with pytest.raises(aqua.AquaError, match="input 0 is padded"):
        aqua.calibrate_inputs(model, [prompt | {"attention_mask": mask}])


def test_a_model_of_pairs_has_both_its_towers_under_aqua():
    """CLIP: a causal tower for text, and a bidirectional one for images."""
    model = make(tf.CLIPModel, tf.CLIPConfig(text_config=TEXT, vision_config=VISION))
    pair = {"input_ids": torch.arange(6, 18)[None], "pixel_values": pixels(1)}
    projections = aqua.calibrate_inputs(model, [pair])
    assert [layer.causal for layer in attention_layers(model)] == [True, True, False, False]
    with torch.no_grad():
        expected = model(**pair)
        for ratio in (1, 0.25):
            with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=ratio, **FIRST)):
                found = model(**pair)
            for name in ("text_embeds", "image_embeds"):
                assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-4) == (ratio == 1), name


def tiles():
    """A prompt with an image of one tile, for `llava_next`."""
    ids = torch.tensor([[1, 7, *[5] * 36, 8, 9]])
    return {"input_ids": ids, "pixel_values": pixels()[None], "image_sizes": torch.tensor([[32, 32]])}


def test_image_layers_that_were_not_found_are_refused_or_dense_by_name():
    model, prompt = llava_next(), tiles()
    projections = aqua.calibrate_inputs(model, [{"input_ids": torch.arange(6, 30)[None]}])
    assert [layer.side for layer in attention_layers(model)] == ["text", "text"]
    expected, reason = logits(model, prompt), r"image layers could not be found \(TypeError: .*image_sizes.*\)"
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1)) as attachment,
        pytest.raises(aqua.AquaError, match=f"CLIPAttention called AQUA .*: its {reason}; to leave them dense"),
    ):
        assert attachment.dense == []
        logits(model, prompt)
    for pattern, left in (("language_model.*", []), ("*layers.0*", ["language_model.layers.1.self_attn"])):
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1), layers=pattern) as attachment:
            assert attachment.dense[:-1] == left
            assert re.fullmatch(reason, attachment.dense[-1])
            assert torch.allclose(logits(model, prompt), expected, rtol=0, atol=1e-4)
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25), layers=pattern):
            assert (logits(model, prompt) - expected).abs().max() > 0.1
    assert torch.equal(logits(model, prompt), expected)
    with pytest.raises(aqua.AquaError, match=rf"no attention layer has a name like 'vision\*'.*; its {reason}"):
        aqua.apply(model, projections, layers="vision*")
    with pytest.raises(
        aqua.AquaError, match=f"LlavaNextForConditionalGeneration cannot be calibrated .*: its {reason}"
    ):
        aqua.calibrate_inputs(model, [{"pixel_values": prompt["pixel_values"]}])


def test_a_language_part_that_is_not_causal_is_refused_by_name():
    with pytest.raises(aqua.AquaError, match="PaliGemmaForConditionalGeneration is not causal"):
        attention_layers(paligemma())


def test_parts_of_two_kinds_that_share_a_config_are_refused():
    model, prompt = llava(), VISION_LANGUAGE["llava"][1]()
    projections = aqua.calibrate_inputs(model, [prompt])
    for layer in attention_layers(model):
        layer.module.config = model.config.text_config
    attachment = aqua.apply(model, projections)
    with pytest.raises(aqua.AquaError, match="LlavaForConditionalGeneration share a config: give AQUA one kind"):
        attachment.attach()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1), layers="language_model.*"):
        found = logits(model, prompt)
    assert torch.allclose(found, logits(model, prompt), rtol=0, atol=1e-4)
