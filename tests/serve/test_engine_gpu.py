# SPDX-License-Identifier: Apache-2.0
"""The real vLLM engine on a GPU with the plugin, in float32, where rounding decides no token.

`make test-vllm` skips these without a GPU. They take a model of random weights, which is made here.
"""

import pytest
import torch

pytest.importorskip("vllm.entrypoints")

from engine import run

import aqua_attention as aqua
from aqua_attention.vllm.plugin import backend_name
from aqua_attention.vllm.versions import LAYOUTS
from conftest import VOCABULARY, calibrated, make_llama

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SHAPE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
}
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 4096, "max_num_batched_tokens": 1024}
ROTATED = {"k_ratio": 0.5, "min_length": 10_000}
"""Every dimension, of keys that are rotated."""
HALF = {"k_ratio": 0.5}
CHOOSING = {"k_ratio": 0.25, "score_bits": 8}
ALL = CHOOSING | {"select_p": 1.0}
SHARE, COUNT = CHOOSING | {"select_p": 0.9}, CHOOSING | {"select_tokens": 200}
chooses = pytest.mark.skipif(LAYOUTS is None, reason="pages of this vLLM have no room for what tokens are chosen by")
SETTINGS = [
    pytest.param(HALF, id="half"),
    pytest.param(SHARE, id="share", marks=chooses),
    pytest.param(COUNT, id="count", marks=chooses),
]
LENGTHS = (5, 64, 65, 300, 1000, 2500)
EAGER, GRAPHS = {"enforce_eager": True}, {"enforce_eager": False}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(folder, model, projections file) of a random Llama with answers far apart."""
    folder, model = tmp_path_factory.mktemp("tiny"), make_llama(**SHAPE)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.1)
            layer.self_attn.k_proj.weight.mul_(0.1)
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
    model.save_pretrained(folder / "model")
    calibrated(model, context=1024).save(folder / "tiny.safetensors")
    return folder / "model", model, folder / "tiny.safetensors"


@pytest.fixture(scope="session")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="session")
def stock(tiny, prompts):
    return answered(tiny, prompts, None, **EAGER)


def answered(tiny, prompts, config, **engine):
    """Tokens of each prompt; with `config` AQUA attends."""
    folder, _, file = tiny
    options = {"projections": file, "config": config, "attention_backend": backend_name()} if config else {}
    found, log = run(folder, prompts, max_tokens=48, gpu_memory_utilization=0.3, **ENGINE | options | engine)
    assert ("AQUA attention: " in log) == bool(config)
    return [each["tokens"] for each in found]


@pytest.mark.parametrize("config", [ROTATED, pytest.param(ALL, marks=chooses)], ids=["rotated", "all"])
@pytest.mark.parametrize("engine", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_with_every_dimension_it_is_stock(tiny, prompts, stock, engine, config):
    assert answered(tiny, prompts, config, **engine) == stock


@pytest.mark.parametrize("config", SETTINGS)
def test_recorded_steps_answer_as_others_do(tiny, prompts, stock, config):
    found = answered(tiny, prompts, config, **GRAPHS)
    assert found == answered(tiny, prompts, config, **EAGER)
    assert found != stock


@pytest.mark.parametrize("config", SETTINGS)
def test_what_is_in_the_prefix_cache_is_answered_alike(tiny, prompts, config):
    twice = answered(tiny, prompts * 2, config, max_num_seqs=len(prompts), **EAGER)
    assert twice[: len(prompts)] == twice[len(prompts) :]


def test_half_of_the_dimensions_are_our_own_path(tiny, prompts):
    folder, model, file = tiny
    options = {"projections": file, "config": HALF, "attention_backend": backend_name(), "gpu_memory_utilization": 0.3}
    found, _ = run(folder, prompts, logprobs=0, max_tokens=1, **ENGINE | options | EAGER)
    gpu, projections = model.cuda(), aqua.Projections.load(file)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad(), aqua.apply(gpu, projections, aqua.AquaConfig(**HALF)):
            expected = gpu(ids).logits[0].log_softmax(-1)
        own = [each[str(token)] for token, each in list(zip(prompt, answer["logprobs"], strict=True))[1:]]
        wanted = expected[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()
        assert own == pytest.approx(wanted, abs=0.02)
