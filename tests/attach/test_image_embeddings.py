# SPDX-License-Identifier: Apache-2.0
"""What counts as the embedding of an image, in every family: the same in a batch as alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from encoders import IMAGE_ENCODERS, TEXT, VISION, VISION_LANGUAGE, make, pixels

import aqua_attention as aqua
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.images import evaluate_images
from aqua_attention.evaluate.suites.retention import evaluate_retention
from conftest import subject_of

COUNT = 10
"""More than one batch, and the last one is not full."""


def as_one_image(name, image):
    """[3, 32, 32] as the family called `name` reads it: in the form of the image in its prompt."""
    form = VISION_LANGUAGE[name][1]() if name in VISION_LANGUAGE else {"pixel_values": pixels(1)}
    if "image_grid_thw" in form:
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
        return {"pixel_values": patches.repeat(1, 2), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"pixel_values": image.reshape(form["pixel_values"].shape)}


def clip():
    return make(tf.CLIPModel, tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


FAMILIES = IMAGE_ENCODERS | {name: build for name, (build, _) in VISION_LANGUAGE.items()} | {"clip of pairs": clip}


@torch.no_grad()
def alone(model, inputs):
    """[images, width]: by the method that the family has for one image; the mean over its tokens."""
    run = getattr(model, "get_image_features", model)
    rows = []
    for each in inputs:
        output = run(**each)
        found = getattr(output, "image_embeds", None)
        found = output.pooler_output if found is None and "pooler_output" in output else found
        found = output.last_hidden_state if found is None else found
        found = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
        rows.append(found.reshape(-1, found.shape[-1]).mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_figures_are_those_of_images_embedded_one_by_one(name):
    model, inputs = FAMILIES[name](), [as_one_image(name, image) for image in pixels(COUNT)]
    projections, config = aqua.calibrate_inputs(model, inputs), aqua.AquaConfig.paper(k_ratio=0.25)
    result = evaluate_images(subject_of(model, projections), [Setting(config)], inputs)
    dense = alone(model, inputs)
    with aqua.apply(model, projections, config):
        found = alone(model, inputs)
    cosines, between = (found * dense).sum(-1), dense @ dense.T
    assert cosines.mean() < 0.999, "the case should turn the embeddings"
    assert result["rows"][0]["mean_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-4)
    assert result["rows"][0]["lowest_cosine"] == pytest.approx(float(cosines.min()), abs=1e-4)
    others = float((between.sum() - between.diagonal().sum()) / (COUNT * (COUNT - 1)))
    assert result["dense"]["others"] == pytest.approx(others, abs=1e-4)


def test_images_that_a_model_puts_together_are_embedded_one_by_one(monkeypatch):
    """All tokens of all images in one list, so that the output of a batch does not say which are whose."""
    model, inputs = FAMILIES["llava"](), [as_one_image("llava", image) for image in pixels(COUNT)]
    projections, settings = aqua.calibrate_inputs(model, inputs), [Setting(aqua.AquaConfig.paper(k_ratio=0.25))]
    expected = evaluate_images(subject_of(model, projections), settings, inputs)
    original = model.get_image_features

    def joined(pixel_values):
        output = original(pixel_values=pixel_values)
        output.pooler_output = torch.cat(list(output.pooler_output))
        return output

    monkeypatch.setattr(model, "get_image_features", joined)
    found = evaluate_images(subject_of(model, projections), settings, inputs)
    assert found["rows"][0]["mean_cosine"] == pytest.approx(expected["rows"][0]["mean_cosine"], abs=1e-4)
    assert found["dense"] == pytest.approx(expected["dense"], abs=1e-4)


def test_padded_images_are_neither_calibrated_on_nor_measured():
    """What fills an image up to its size would count like the image: in rotations, and as a visible key."""
    model = FAMILIES["smolvlm"]()
    whole = [as_one_image("smolvlm", image) for image in pixels(2)]
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    allowed = [each | {"pixel_attention_mask": mask} for each in whole]
    cut = mask.clone()
    cut[..., 16:] = False
    padded = [allowed[0], whole[1] | {"pixel_attention_mask": cut}]
    projections, settings = aqua.calibrate_inputs(model, allowed), [Setting(aqua.AquaConfig.paper(k_ratio=0.5))]
    evaluate_retention(subject_of(model, projections), allowed)
    refused = r"input 1 is padded \(pixel_attention_mask is not all ones\)"
    with pytest.raises(aqua.AquaError, match=refused):
        aqua.calibrate_inputs(model, padded)
    with pytest.raises(aqua.AquaError, match=refused):
        evaluate_retention(subject_of(model, projections), padded)
    with pytest.raises(aqua.AquaError, match=refused):
        evaluate_images(subject_of(model, projections), settings, padded)
