# SPDX-License-Identifier: Apache-2.0
"""The integration on a CUDA GPU, where other fused kernels serve the same calls."""

from __future__ import annotations

import copy

import pytest
import torch

import aqua_attention as aqua
from conftest import MAKERS, VOCABULARY, calibrated

pytestmark = pytest.mark.gpu

CONFIGS = [
    aqua.AquaConfig.paper(k_ratio=0.5),
    aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", sink=2, recent=5),
    aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.25, share="group", sink=2),
]


def inputs():
    """A left-padded batch of rows of 40 and 27 tokens."""
    ids = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


@torch.no_grad()
def logits(model, **given):
    device = model.get_input_embeddings().weight.device
    given = {name: tensor.to(device) for name, tensor in given.items()}
    found = model(**given).logits.float().cpu()
    mask = given.get("attention_mask")
    return found if mask is None else found[mask.bool().cpu()]


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("config", CONFIGS)
def test_float32_equals_the_cpu_with_and_without_padding(name, config):
    model = MAKERS[name]()
    projections, twin = calibrated(model), copy.deepcopy(model).cuda()
    for given in (inputs(), {"input_ids": inputs()["input_ids"]}):
        with aqua.apply(model, projections, config), aqua.apply(twin, projections, config):
            assert torch.allclose(logits(twin, **given), logits(model, **given), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 5])
def test_half_precision_k_ratio_1_is_as_close_to_float32_as_dense_is(dtype, window):
    model = MAKERS["llama"]()
    projections, exact = calibrated(model), logits(model, **inputs())
    model = model.to(dtype).cuda()
    dense_error = (logits(model, **inputs()) - exact).abs().mean()
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, recent=window)):
        assert (logits(model, **inputs()) - exact).abs().mean() < 2 * dense_error


@pytest.mark.parametrize("config", CONFIGS)
def test_generation_with_every_cache(config):
    model = MAKERS["llama"]().cuda()
    projections = calibrated(MAKERS["llama"]())
    given = {name: tensor.cuda() for name, tensor in inputs().items() if name != "position_ids"}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with aqua.apply(model, projections, config):
        expected = model.generate(**given, **options)
        assert torch.equal(model.generate(**given, use_cache=False, **options), expected)
        static = model.generate(**given, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, expected)


def test_calibration_on_the_gpu_gives_the_same_statistics():
    model = MAKERS["qwen3"]()
    expected, found = calibrated(model), calibrated(model.cuda())
    for index, layer in expected.statistics.items():
        other = found.statistics[index]
        assert torch.allclose(other.key_gram, layer.key_gram, rtol=1e-3, atol=1e-3 * float(layer.key_gram.abs().max()))
        assert other.key_gram.device.type == "cpu"
