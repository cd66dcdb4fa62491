# SPDX-License-Identifier: Apache-2.0
"""Encoders of text and of images: dense at k_ratio 1, different at 0.25, padding without effect; others refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from encoders import IMAGE_ENCODERS, TEXT, TEXT_ENCODERS, VISION, make, pixels, token_batch

import aqua_attention as aqua
from aqua_attention.model.capture import attention_layers, observed
from aqua_attention.model.limits import check_tokens, position_limit
from aqua_attention.model.sides import first_tensor
from aqua_attention.ops.reference import attention_reference

ENCODERS = TEXT_ENCODERS | IMAGE_ENCODERS
WEIGHTED = {"selection": "weighted", "sink": 1}


def learnt(model):
    """Projections from random pixels or tokens, whichever the model reads."""
    if model.main_input_name == "pixel_values":
        inputs = [{"pixel_values": image[None]} for image in pixels(6)]
    else:
        inputs = [{"input_ids": row[None]} for row in torch.randint(6, 97, (6, 24))]
    return aqua.calibrate_inputs(model, inputs)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    """(model, projections, a batch for it) of each family in turn."""
    model = ENCODERS[request.param]()
    if request.param in IMAGE_ENCODERS:
        return model, learnt(model), {"pixel_values": pixels()}
    ids, mask = token_batch()
    return model, learnt(model), {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def states(model, batch):
    """What the model returns first, for real tokens only."""
    found = first_tensor(model(**batch))
    return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found


@pytest.mark.parametrize("settings", [{}, WEIGHTED, {"share": "group"}], ids=["paper", "cls", "group"])
def test_k_ratio_1_is_dense(encoder, settings):
    model, projections, batch = encoder
    expected = states(model, batch)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **settings)) as attachment:
        assert attachment.dense == (["head.attention"] if isinstance(model, tf.SiglipVisionModel) else [])
        assert torch.allclose(states(model, batch), expected, rtol=0, atol=1e-4)
    assert torch.equal(states(model, batch), expected)


@pytest.mark.parametrize("settings", [{}, WEIGHTED], ids=["paper", "cls"])
def test_a_quarter_of_the_dimensions_moves_the_result(encoder, settings):
    model, projections, batch = encoder
    expected = states(model, batch)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25, **settings)):
        assert (states(model, batch) - expected).abs().max() > 0.1


@pytest.mark.parametrize("settings", [{}, WEIGHTED, WEIGHTED | {"s_ratio": 0.25}], ids=["paper", "cls", "s_ratio"])
def test_each_row_of_a_batch_is_what_it_is_alone(encoder, settings):
    model, projections, batch = encoder
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, **settings)), torch.no_grad():
        together = first_tensor(model(**batch))
        for row in range(2):
            length = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else None
            alone = {name: value[row : row + 1, :length] for name, value in batch.items() if length}
            alone = alone or {"pixel_values": batch["pixel_values"][row : row + 1]}
            found = first_tensor(model(**alone))[0]
            assert torch.allclose(together[row][:length] if length else together[row], found, rtol=0, atol=1e-4)


def test_every_layer_is_bidirectional_and_has_an_index_of_its_own(encoder):
    layers = attention_layers(encoder[0])
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert not any(layer.causal or layer.reads_own_cache for layer in layers)
    assert all(layer.name for layer in layers)


def test_the_result_is_that_of_the_reference_on_the_models_own_states():
    """The last layer's output, from queries and keys that the dense model gives, in the first layer."""
    model = make(tf.ViTModel, tf.ViTConfig(**VISION | {"num_hidden_layers": 1}))
    projections, seen, outputs = learnt(model), [], []
    hook = model.layers[0].attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    values = model.layers[0].attention.v_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    try:
        with torch.no_grad(), observed(model, lambda _, query, key, scaling: seen.append((query, key))):
            model(pixel_values=pixels())
        config = aqua.AquaConfig.paper(k_ratio=0.5, sink=1)
        with aqua.apply(model, projections, config):
            states(model, {"pixel_values": pixels()})
    finally:
        hook.remove()
        values.remove()
    value, (query, key) = seen[0], seen[1]
    value = value.unflatten(-1, (2, 16)).transpose(1, 2)
    rotation = projections.layers[0].rotation
    query, key = (states @ rotation for states in (query, key))
    threshold = query.abs().sort(-1, descending=True).values[..., 7:8]
    visible = torch.full((1, 1, 17, 17), 1, dtype=torch.uint8)
    visible[..., :1] = 2
    expected = attention_reference(query, key, value, query.abs() >= threshold, mask=visible)
    assert torch.allclose(outputs[-1], expected.transpose(1, 2).flatten(2), atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[-1], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "value"), [("recent", 4), ("min_length", 8), ("min_length", "auto"), ("bits", 8), ("h2o_ratio", 0.5)]
)
def test_what_needs_causality_or_a_cache_is_refused(name, value):
    model = IMAGE_ENCODERS["clip"]()
    with pytest.raises(aqua.AquaError, match=f"{name} is .* CLIPVisionModelWithProjection is bidirectional"):
        aqua.apply(model, learnt(model), aqua.AquaConfig.paper(**{name: value}))


@pytest.mark.parametrize("config", [None, aqua.AquaConfig(), aqua.AquaConfig.paper(sink=4)])
def test_defaults_that_need_causality_do_not_apply_to_an_encoder(config):
    model = IMAGE_ENCODERS["clip"]()
    projections, dense = learnt(model), states(model, {"pixel_values": pixels()})
    with aqua.apply(model, projections, config) as attachment:
        found = states(model, {"pixel_values": pixels()})
    assert (attachment.config.sink, attachment.config.recent) == (4, 0)
    assert (found - dense).abs().max() > 1e-3, "not every token is exact"


def test_one_head_a_group_makes_the_choice_of_a_group_that_of_its_head():
    model = IMAGE_ENCODERS["siglip"]()
    projections, results = learnt(model), []
    dense = states(model, {"pixel_values": pixels()})
    for share in ("head", "group"):
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, share=share)):
            results.append(states(model, {"pixel_values": pixels()}))
    assert torch.equal(*results)
    assert (results[0] - dense).abs().max() > 0.1


@pytest.mark.parametrize("family", ["Roberta", "Camembert", "XLMRoberta"])
def test_positions_that_padding_takes_are_not_offered(family):
    """Of 64 position embeddings, those up to the padding's are never a token's."""
    config = getattr(tf, f"{family}Config")(**TEXT | {"pad_token_id": 1})
    model = make(getattr(tf, f"{family}Model"), config)
    windows = torch.randint(6, 97, (1, 62))
    assert position_limit(model) == 62
    check_tokens(model, windows, context=62)
    assert aqua.calibrate_inputs(model, [{"input_ids": windows}]).calibration["tokens"] == 62
    with pytest.raises(aqua.AquaError, match="context is 63: the model knows 62 positions"):
        check_tokens(model, windows, context=63)
    assert position_limit(TEXT_ENCODERS["bert"]()) == 64


def test_gradients_flow_through_an_encoder():
    model = IMAGE_ENCODERS["vit"]()
    with aqua.apply(model, learnt(model), aqua.AquaConfig.paper(k_ratio=0.5, sink=1)):
        model(pixel_values=pixels()).last_hidden_state.square().mean().backward()
    assert model.layers[0].attention.q_proj.weight.grad.abs().max() > 0


REFUSED = {
    "deberta": (lambda: tf.DebertaModel(tf.DebertaConfig(**TEXT)), "does not use transformers' attention interface"),
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**TEXT)), "does not use transformers' attention interface"),
    "swin": (
        lambda: make(
            tf.SwinModel,
            tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        ),
        "adds a bias to the scores",
    ),
    "vitmae": (lambda: make(tf.ViTMAEModel, tf.ViTMAEConfig(**VISION)), "gives something else each time it runs"),
    "layoutlm": (lambda: make(tf.LayoutLMModel, tf.LayoutLMConfig(**TEXT)), "makes one mask for all queries"),
    "resnet": (
        lambda: tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
        "made no attention call",
    ),
    "bart": (
        lambda: tf.BartModel(tf.BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1)),
        "is an encoder-decoder",
    ),
    "wav2vec2": (
        lambda: tf.HubertModel(tf.HubertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
        "reads input_values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_aqua_would_compute_wrongly_are_refused_by_name(name):
    make_model, reason = REFUSED[name]
    model = make_model().eval()
    with pytest.raises(aqua.AquaError, match=f"{type(model).__name__}.*({reason})"):
        attention_layers(model)
    assert not str(model.config._attn_implementation).startswith("aqua-")
