# SPDX-License-Identifier: Apache-2.0
"""Models that accelerate has spread over memory and disk, and models of quantised weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import aqua_attention as aqua
from aqua_attention.evaluate.generation import continue_prompt
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest
from conftest import VOCABULARY, calibrated, make_llama, subject_of

DENSE, QUARTER = aqua.AquaConfig.paper(k_ratio=1), aqua.AquaConfig.paper(k_ratio=0.25)
WINDOW = aqua.AquaConfig.paper(k_ratio=0.25, selection="weighted", sink=2, recent=5)
IDS = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
INSIDE = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def under(model, projections, config):
    """Logits and greedy tokens of AQUA, which must be attached without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attachment = aqua.apply(model, projections, config)
    with attachment:
        return logits(model), model.generate(IDS, **GREEDY)


def distance(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture(scope="module")
def plain():
    """(model, projections) in float32, in memory; wide enough for the blocks of 64 of a quantiser."""
    model = make_llama(intermediate_size=128)
    return model, calibrated(model)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    plain[0].save_pretrained(folder)
    return folder


def mapped(folder, offload, *on_disk):
    """Loaded by `device_map`: these parts on disk, everything else on the CPU."""
    device_map = {f"model.{part}": "disk" if part in on_disk else "cpu" for part in INSIDE} | {"lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload).eval()


def in_memory(model):
    """Weights wait in memory, and are on the model only while they are used."""
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(folder, offload):
    from accelerate import dispatch_model

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model.model, "_hf_hook")
    return model


PLACEMENTS = {
    "one device": lambda folder, _: AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval(),
    "two layers on disk": lambda folder, offload: mapped(folder, offload, "layers.1", "layers.2"),
    "all but the head on disk": lambda folder, offload: mapped(folder, offload, *INSIDE),
    "offloaded to memory": lambda folder, _: in_memory(AutoModelForCausalLM.from_pretrained(folder).eval()),
    "hooks on the decoder": dispatched,
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_model_gives_the_same_wherever_its_weights_are(placement, plain, folder, tmp_path, word_tokenizer, words):
    model, projections = plain
    placed = PLACEMENTS[placement](folder, tmp_path)
    offloaded = any(weight.device.type == "meta" for weight in placed.parameters())
    assert offloaded == ("disk" in placement or "offloaded" in placement)
    assert torch.allclose(logits(placed), logits(model), rtol=0, atol=1e-4)
    assert torch.allclose(under(placed, projections, DENSE)[0], logits(model), rtol=0, atol=1e-4)
    for config in (QUARTER, WINDOW):
        found, expected = under(placed, projections, config), under(model, projections, config)
        assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-4)
        assert torch.equal(found[1], expected[1])
        assert (found[0] - logits(model)).abs().max() > 0.1
    rows = [
        evaluate_perplexity(subject_of(each, projections), [Setting(QUARTER)], IDS)["rows"][0]
        for each in (placed, model)
    ]
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=1e-3)
    assert rows[1]["kl"] > 0.01
    own, expected = (
        aqua.calibrate(each, word_tokenizer, words, tokens=256, context=64).statistics[2].key_gram
        for each in (placed, model)
    )
    assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_key_weights_out_of_reach_have_no_digest_and_others_their_own(placement, plain, folder, tmp_path):
    placed = PLACEMENTS[placement](folder, tmp_path)
    layers = attention_layers(placed)
    offloaded = any(layer.module.k_proj.weight.device.type == "meta" for layer in layers)
    expected = None if offloaded else plain[1].model["key_weights"]
    assert key_weight_digest(layers) == expected


def torchao_model(name):
    def load(folder):
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        config = TorchAoConfig(getattr(quantization, name)())
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()

    return load


def bitsandbytes_model(**options):
    def load(folder):
        pytest.importorskip("bitsandbytes", minversion="0.48")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**options)
        load = AutoModelForCausalLM.from_pretrained
        return load(folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32).eval()

    return load


WEIGHTS_ONLY = {
    "torchao int8": torchao_model("Int8WeightOnlyConfig"),
    "torchao intx": torchao_model("IntxWeightOnlyConfig"),
    "torchao float8": torchao_model("Float8WeightOnlyConfig"),
    "torchao int8, offloaded": lambda folder: in_memory(torchao_model("Int8WeightOnlyConfig")(folder)),
}
ACTIVATIONS_TOO = {
    "torchao dynamic int8": torchao_model("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": bitsandbytes_model(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes_model(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes fp4 in float32": bitsandbytes_model(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32),
}
QUANTISED = WEIGHTS_ONLY | ACTIVATIONS_TOO


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights(kind, plain, folder, word_tokenizer, words):
    """Projections of the full-precision model serve the quantised one, and the other way round."""
    model = QUANTISED[kind](folder)
    layers = attention_layers(model)
    assert type(layers[0].module.k_proj.weight) is not nn.Parameter
    assert key_weight_digest(layers) is None
    dense, tokens = logits(model), model.generate(IDS, **GREEDY)
    own = aqua.calibrate(model, word_tokenizer, words, tokens=256, context=64)
    for projections in (plain[1], own):
        found, same = under(model, projections, DENSE)
        moved, other = under(model, projections, QUARTER)
        assert (moved - dense).abs().max() > 0.1
        assert not torch.equal(other, tokens)
        if kind in WEIGHTS_ONLY:
            assert torch.allclose(found, dense, rtol=0, atol=1e-4)
            assert torch.equal(same, tokens)
        else:
            # Rounded activations turn a difference in the last bit into one of a rounding step.
            assert distance(found, dense) < 0.05
            assert distance(moved, dense) > 0.25
    options = {"max_new_tokens": 4, "attachment": aqua.apply(model, own, QUARTER)}
    assert len(continue_prompt(model, word_tokenizer, "w1 w2 w3", **options).token_ids) == 4
    assert evaluate_perplexity(subject_of(model, own), [Setting(QUARTER)], IDS)["rows"][0]["kl"] > 0.01
    assert torch.equal(logits(model), dense)
    assert torch.allclose(under(plain[0], own, DENSE)[0], logits(plain[0]), rtol=0, atol=1e-4)


class Packed(nn.Parameter):
    """Stands for the parameter class of a quantiser."""


def test_only_a_quantised_model_may_be_a_few_per_cent_off_when_probed():
    """Rounded activations do that (dynamic int8 on a real model: 6%), and it is no sign of other scores."""
    original = AttentionInterface._global_mapping["sdpa"]

    def coarse(module, query, key, value, attention_mask, **options):
        output, weights = original(module, query, key, value, attention_mask, **options)
        return output * 1.1, weights

    model = make_llama()
    AttentionInterface.register("coarse-for-this-test", coarse)
    AttentionMaskInterface.register("coarse-for-this-test", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        model.set_attn_implementation("coarse-for-this-test")
        with pytest.raises(aqua.AquaError, match="computes more than softmax attention"):
            attention_layers(model)
        projection = model.model.layers[0].mlp.down_proj
        projection.weight = Packed(projection.weight.data)
        assert len(attention_layers(model)) == 3
    finally:
        AttentionInterface._global_mapping.pop("coarse-for-this-test")
        AttentionMaskInterface._global_mapping.pop("coarse-for-this-test")
