# SPDX-License-Identifier: Apache-2.0
"""Which projections belong to which model: by shape strictly, by key weights with a warning."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from aqua_attention.calibration.projections import Projections
from aqua_attention.errors import AquaError
from aqua_attention.io.state import weight_difference
from aqua_attention.model.capture import AttentionLayer, attention_layers
from aqua_attention.model.fingerprint import (
    KEY_WEIGHT_NAMES,
    WEIGHT_TOLERANCE,
    describe_shape,
    key_weight_digest,
    shape_of,
)


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def digest_of(model):
    return key_weight_digest(attention_layers(model))


def projections_of(model):
    """Projections that know their model and nothing else."""
    layers = attention_layers(model)
    return Projections({}, {}, {"shape": shape_of(model, layers), "key_weights": key_weight_digest(layers)})


def check(projections, model):
    projections.check_model(model, attention_layers(model))


def one_layer(**children):
    """An attention layer whose module has these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return [AttentionLayer(0, module, 4, 2, 16, torch.device("cpu"), reads_own_cache=True)]


def test_the_shape_names_the_architecture_and_every_layer(model):
    shape = shape_of(model, attention_layers(model))
    assert shape == {"model_type": "llama", "layers": [[0, 4, 2, 16], [1, 4, 2, 16]]}
    assert describe_shape(shape) == "llama, 2 layers, 4 query and 2 key-value heads of 16"


def test_a_shape_with_several_kinds_of_layers_is_described_by_each_kind_once():
    shape = {"model_type": "gemma", "layers": [[0, 8, 4, 64], [1, 8, 1, 128], [2, 8, 4, 64]]}
    expected = "gemma, 3 layers, 8 query and 1 key-value heads of 128; 8 query and 4 key-value heads of 64"
    assert describe_shape(shape) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_in_another_dtype_is_the_same_model(model, dtype):
    difference = weight_difference(digest_of(model), digest_of(copy.deepcopy(model).to(dtype)))
    assert difference < WEIGHT_TOLERANCE
    assert (difference == 0) == (dtype == torch.float32)


@pytest.mark.parametrize("relative", [0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_the_difference_estimates_how_far_key_weights_were_moved(model, relative, seed):
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer in attention_layers(moved):
        weight = layer.module.k_proj.weight
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += relative * noise * weight.norm() / noise.norm()
    assert relative / 2 < weight_difference(digest_of(model), digest_of(moved)) < relative * 2


def test_other_weights_differ_by_about_their_own_size(model):
    assert weight_difference(digest_of(model), digest_of(tiny_llama(seed=1))) > 0.5


def test_other_weights_than_those_of_keys_do_not_matter(model):
    other = copy.deepcopy(model)
    for layer in attention_layers(other):
        layer.module.q_proj.weight.data.zero_()
    assert digest_of(other) == digest_of(model)


def test_the_digest_does_not_depend_on_the_random_state(model):
    first = digest_of(model)
    torch.manual_seed(123)
    assert digest_of(model) == first


@pytest.mark.parametrize(("factor", "difference"), [(1.1, 1 - 1 / 1.1), (2, 0.5), (0.5, 0.5), (1000, 0.999)])
def test_the_difference_counts_scale_as_well_as_direction(model, factor, difference):
    scaled = copy.deepcopy(model)
    for layer in attention_layers(scaled):
        layer.module.k_proj.weight.data *= factor
    first, second = digest_of(model), digest_of(scaled)
    assert weight_difference(first, second) == pytest.approx(difference, abs=1e-5)
    assert weight_difference([row[:4] for row in first], second) < 1e-5  # of an earlier version, which knew no scale


@pytest.mark.parametrize("name", KEY_WEIGHT_NAMES)
def test_every_usual_name_of_key_weights_is_found(name):
    digest = key_weight_digest(one_layer(other=nn.Linear(4, 4), **{name: nn.Linear(8, 6)}))
    assert len(digest) == 1
    assert any(digest[0])


def test_large_key_weights_are_sampled_and_still_told_apart():
    first, second = (nn.Linear(600, 400) for _ in range(2))
    same = copy.deepcopy(first).bfloat16()
    digest = key_weight_digest(one_layer(k_proj=first))
    assert weight_difference(digest, key_weight_digest(one_layer(k_proj=same))) < WEIGHT_TOLERANCE
    assert weight_difference(digest, key_weight_digest(one_layer(k_proj=second))) > 0.5


class Packed(nn.Parameter):
    """Quantisers keep packed weights in classes of their own, which may claim a float dtype."""


def test_without_plain_floating_point_key_weights_there_is_no_digest():
    integers, float8 = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 4).to(torch.float8_e4m3fn)
    for weight in (integers, float8, Packed(torch.ones(8, 1))):
        packed = nn.Module()
        packed.weight = weight
        assert key_weight_digest(one_layer(k_proj=packed)) is None
    assert key_weight_digest(one_layer(k_proj=nn.Linear(4, 4, device="meta"))) is None
    assert key_weight_digest(one_layer(other=nn.Linear(4, 4))) is None


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"num_hidden_layers": 3}, "llama, 3 layers, 4 query and 2 key-value heads of 16"),
        ({"num_key_value_heads": 4}, "llama, 2 layers, 4 query and 4 key-value heads of 16"),
        ({"head_dim": 8}, "llama, 2 layers, 4 query and 2 key-value heads of 8"),
    ],
)
def test_projections_of_another_shape_are_refused_naming_both_shapes(model, changes, described):
    with pytest.raises(AquaError) as refusal:
        check(projections_of(model), tiny_llama(**changes))
    assert str(refusal.value) == (
        "these projections are for llama, 2 layers, 4 query and 2 key-value heads of 16, the model is "
        f"{described}: calibrate this model with `aqua calibrate`"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_in_any_dtype_passes_without_a_warning(model, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(projections_of(model), copy.deepcopy(model).to(dtype))


def test_other_weights_of_the_same_shape_are_warned_about(model):
    with pytest.warns(UserWarning, match=r"other weights .* differ by 100\.0%\).*results are valid but lose more"):
        check(projections_of(model), tiny_llama(seed=1))


def test_without_a_digest_the_weights_are_not_compared(model):
    known = projections_of(model)
    unknown = dataclasses.replace(known, model=known.model | {"key_weights": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(unknown, tiny_llama(seed=1))
