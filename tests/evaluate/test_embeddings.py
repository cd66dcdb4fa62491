# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images, dense and AQUA."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import aqua_attention as aqua
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.images import evaluate_images
from conftest import subject_of

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"image_size": 32, "patch_size": 8}


def clip():
    torch.manual_seed(0)
    model = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**SHAPE, projection_dim=16)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model


def pictures(count=10):
    made = torch.randn(count, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": each} for each in made]


@pytest.fixture(scope="module")
def measured():
    """(model, projections) of a tiny CLIP."""
    model = clip()
    return model, aqua.calibrate_inputs(model, pictures())


def settings(*ratios, **options):
    return [Setting(aqua.AquaConfig.paper(k_ratio=ratio, **options)) for ratio in ratios]


def test_nothing_left_out_changes_nothing_and_more_left_out_changes_more(measured):
    seen = []
    result = evaluate_images(
        subject_of(*measured), settings(1, 0.5, 0.25), pictures(), progress=lambda *at: seen.append(at)
    )
    whole, half, quarter = result["rows"]
    assert whole["mean_cosine"] == pytest.approx(1, abs=1e-5) and whole["same_neighbour"] == 1
    assert 0.999 > half["mean_cosine"] > quarter["mean_cosine"]
    assert quarter["lowest_cosine"] < quarter["mean_cosine"]
    assert [row["mean_k"] for row in result["rows"]] == pytest.approx([1, 0.5, 0.25])
    assert half["mean_k_per_layer"] == pytest.approx([0.5, 0.5])
    assert seen[0] == (0, 40) and seen[-1] == (40, 40)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_figures_follow_their_definition(measured):
    model, projections = measured
    images = pictures()
    result = evaluate_images(subject_of(model, projections), settings(0.25), images)

    def embedded():
        with torch.no_grad():
            found = torch.cat([model(**each).image_embeds for each in images])
        return found / found.norm(dim=-1, keepdim=True)

    dense = embedded()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25)):
        found = embedded()
    row, cosines = result["rows"][0], [float(a @ b) for a, b in zip(dense, found, strict=True)]
    assert row["mean_cosine"] == pytest.approx(sum(cosines) / 10, abs=1e-5)
    assert row["lowest_cosine"] == pytest.approx(min(cosines), abs=1e-5)

    def nearest(states):
        return [max((j for j in range(10) if j != i), key=lambda j: float(states[i] @ states[j])) for i in range(10)]

    same = sum(a == b for a, b in zip(nearest(dense), nearest(found), strict=True))
    assert 0 < same < 10, "the case should tell the neighbours apart"
    assert row["same_neighbour"] == pytest.approx(same / 10)
    others = [float(dense[i] @ dense[j]) for i in range(10) for j in range(10) if i != j]
    assert result["dense"]["others"] == pytest.approx(sum(others) / 90, abs=1e-5)
    best = [float(dense[i] @ dense[j]) for i, j in enumerate(nearest(dense))]
    assert result["dense"]["nearest"] == pytest.approx(sum(best) / 10, abs=1e-5)


def test_each_layer_has_its_loss_in_every_basis(measured):
    both = [Setting(aqua.AquaConfig.paper(k_ratio=0.5), basis) for basis in ("aqua", "none")]
    rows = evaluate_images(subject_of(*measured), both, pictures())["retention"]
    assert [(row["selection"], row["basis"], row["k_ratio"]) for row in rows] == [
        ("magnitude", "aqua", 0.5),
        ("magnitude", "none", 0.5),
    ]
    for row in rows:
        assert [layer["layer"] for layer in row["per_layer"]] == [0, 1]
        assert all(0 < loss < 1 for layer in row["per_layer"] for loss in layer["softmax_loss"])
    assert rows[0]["score_loss"] < rows[1]["score_loss"]


def test_the_loss_of_a_bidirectional_layer_counts_every_key(measured):
    """A one-layer check by hand: scores of all pairs, half of the dimensions."""
    from aqua_attention.evaluate.suites.retention import evaluate_retention
    from aqua_attention.model.capture import observed

    model, projections = measured
    image, seen = pictures(1), []
    with torch.no_grad(), observed(model, lambda _, query, key, scaling: seen.append((query, key, scaling))):
        model(**image[0])
    query, key, scaling = seen[0]
    query, key = (states @ projections.layers[0].rotation for states in (query, key))
    threshold = query.abs().sort(-1, descending=True).values[..., 7:8]
    dense = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
    found = ((query * (query.abs() >= threshold)) @ key.transpose(-1, -2) * scaling).softmax(-1)
    expected = (found - dense).abs().sum(-1).mean(-1)[0] / 2
    options = {"k_ratios": (0.5,), "selections": ("magnitude",)}
    row = evaluate_retention(subject_of(model, projections), image, **options)["rows"][0]
    assert row["per_layer"][0]["softmax_loss"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_images_of_many_sizes_are_embedded_one_by_one():
    """A model whose patches are a list, with the grid of each image beside it."""
    torch.manual_seed(0)
    config = tf.Qwen2VLConfig(
        text_config={"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "num_key_value_heads": 1}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
        | {"spatial_merge_size": 2, "temporal_patch_size": 2},
    )
    model = tf.Qwen2VLForConditionalGeneration(config).eval()
    images = [
        {"pixel_values": torch.randn(rows * 4, 384), "image_grid_thw": torch.tensor([[1, rows, 4]])}
        for rows in (4, 6, 4)
    ]
    projections = aqua.calibrate_inputs(model, images)
    assert projections.model["shape"]["names"] == ["visual.blocks.0.attn", "visual.blocks.1.attn"]
    row = evaluate_images(subject_of(model, projections), settings(1), images)["rows"][0]
    assert row["mean_cosine"] == pytest.approx(1, abs=1e-5) and row["same_neighbour"] == 1


def test_bad_requests_are_refused(measured, llama):
    with pytest.raises(aqua.AquaError, match="LlamaForCausalLM reads text, not images"):
        evaluate_images(subject_of(*llama), settings(0.5), pictures())
    with pytest.raises(aqua.AquaError, match="there is 1 image: nearest neighbours need two"):
        evaluate_images(subject_of(*measured), settings(0.5), pictures(1))
    broken = clip()
    with torch.no_grad():
        broken.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(aqua.AquaError, match="gives NaN"):
        evaluate_images(subject_of(broken, measured[1]), settings(0.5), pictures())


def test_an_encoder_has_no_perplexity(measured):
    from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity

    with pytest.raises(aqua.AquaError, match="CLIPVisionModelWithProjection predicts no next token"):
        evaluate_perplexity(subject_of(*measured), settings(0.5), torch.ones(1, 8, dtype=torch.long))
