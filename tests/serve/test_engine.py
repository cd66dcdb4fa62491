# SPDX-License-Identifier: Apache-2.0
"""The real vLLM engine on a CPU with the plugin: the tokens of stock at k_ratio 1, ours at 0.5, and more room.

`make test-vllm` runs these in an environment of their own; without vLLM they are skipped.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

pytest.importorskip("vllm.entrypoints")

from engine import export_smollm2, run, served

import aqua_attention as aqua
from conftest import SHAPE, calibrated, make_llama

DENSE = {"k_ratio": 1.0}
ROTATED = {"k_ratio": 0.5, "min_length": 10_000}
"""Every dimension too, of keys that are rotated."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
HALF = {"k_ratio": 0.5, "min_length": 0}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """(folder of safetensors, model, tokenizer, projections file) of SmolLM2."""
    return export_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def prompts(smollm2):
    """Of many lengths, some of which begin alike."""
    ids = smollm2[2](aqua.load_text("builtin:evaluation"))["input_ids"]
    return [ids[:length] for length in (1, 17, 64, 300, 700, 701)] + [ids[500 : 500 + length] for length in (33, 450)]


@pytest.fixture(scope="session")
def stock(smollm2, prompts):
    return run(smollm2[0], prompts)


def tokens(found):
    return [each["tokens"] for each in found[0]]


def room(log):
    return int(re.search(r"KV cache size: ([\d,]+) tokens", log)[1].replace(",", ""))


@pytest.mark.parametrize("config", [DENSE, ROTATED], ids=str)
@pytest.mark.timeout(900)
def test_with_every_dimension_it_is_stock(smollm2, prompts, stock, config):
    found = run(smollm2[0], prompts, projections=smollm2[3], config=config)
    assert tokens(found) == tokens(stock)
    assert room(found[1]) == room(stock[1])


@pytest.mark.timeout(900)
def test_with_half_of_them_it_is_our_own_path(smollm2, prompts):
    folder, model, _, file = smollm2
    options = {"logprobs": 0, "max_num_batched_tokens": 256, "attention_backend": "AQUA"}
    found, log = run(folder, prompts, projections=file, config=HALF, **options)
    assert f"AQUA attention: k_ratio 0.5; projections {file} for llama" in log
    projections = aqua.Projections.load(file)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            dense = model(ids).logits[0].log_softmax(-1)
            with aqua.apply(model, projections, aqua.AquaConfig(**HALF)):
                expected = model(ids).logits[0].log_softmax(-1)
        for place, own in list(enumerate(answer["logprobs"]))[1:]:
            assert own[str(prompt[place])] == pytest.approx(float(expected[place - 1, prompt[place]]), abs=2e-3)
        if len(prompt) > 200:
            assert float((expected - dense).abs().max()) > 0.05


@pytest.mark.timeout(900)
def test_fewer_stored_dimensions_are_more_room(smollm2, prompts, stock):
    config = {"k_ratio": 1.0, "s_ratio": 0.25, "sink": 0, "recent": 0}
    found = run(smollm2[0], prompts[:2], projections=smollm2[3], config=config)
    assert room(found[1]) == pytest.approx(room(stock[1]) * 128 / 112, rel=0.002)


@pytest.mark.timeout(900)
def test_8_bits_are_more_room_and_nearly_the_same_answers(smollm2, prompts, stock):
    options = {"projections": smollm2[3], "logprobs": 0}
    exact, _ = run(smollm2[0], prompts[:4], config=HALF, **options)
    found, log = run(
        smollm2[0], prompts[:4], config=HALF | {"bits": 8}, kv_cache_dtype="int8_per_token_head", **options
    )
    assert room(log) == pytest.approx(room(stock[1]) * (128 * 4) / (128 + 4), rel=0.002)
    for prompt, one, other in zip(prompts, exact, found, strict=False):
        both = [
            [each[str(token)] for token, each in list(zip(prompt, answer["logprobs"], strict=True))[1:]]
            for answer in (one, other)
        ]
        if len(prompt) > 1:
            assert (torch.tensor(both[0]) - torch.tensor(both[1])).abs().mean() < 0.05


@pytest.mark.timeout(900)
def test_a_cache_too_small_for_all_gives_the_same_answers(smollm2, prompts):
    options = {"projections": smollm2[3], "config": HALF}
    expected = tokens(run(smollm2[0], prompts, **options, enable_prefix_caching=False))
    many = prompts * 4
    small = run(smollm2[0], many, **options, num_gpu_blocks_override=80, block_size=32, max_num_seqs=32)
    assert tokens(small) == expected * 4
    # What begins alike is found in the prefix cache meanwhile.
    assert any(each["cached"] for each in small[0])


@pytest.mark.timeout(900)
def test_a_server_answers_many_at_once_and_mixes_none_up(smollm2, prompts):
    """Twice, so that the second time prompts are found in the prefix cache."""
    options = {"projections": smollm2[3], "config": HALF}
    expected = tokens(run(smollm2[0], prompts, **options, max_tokens=8))
    with served(smollm2[0], **options) as complete, ThreadPoolExecutor(32) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda prompt: complete(prompt, 8), prompts * 4))
            assert [each["token_ids"] for each in answers] == expected * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projections": "missing.safetensors"}, r"AQUA_PROJECTIONS: .*missing\.safetensors"),
        ({"config": {"k_ratio": 2}}, r"AQUA_CONFIG: k_ratio is 2"),
        ({"config": {"ratio": 2}}, r"AQUA_CONFIG: .*ratio"),
        ({"config": {"bits": 8}}, r"kv_cache_dtype is auto, and AQUA_CONFIG asks for bits 8: set it to int8_per_"),
        ({"config": {"bits": 4}}, r"AQUA_CONFIG: bits is 4, which is not served in vLLM: set it to 8"),
        ({"config": {"s_ratio": 0.25}}, r"AQUA_CONFIG: s_ratio is 0\.25 with an exact window of 4 \+ 64"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8, and AQUA stores keys and values in the model's dtype"),
        ({"speculative_config": NGRAM}, r"speculative decoding \(ngram\) is not served by AQUA yet"),
    ],
)
@pytest.mark.timeout(300)
def test_what_cannot_be_served_ends_at_the_start(smollm2, changes, said):
    with pytest.raises(RuntimeError, match=said):
        run(smollm2[0], [[1, 2]], **({"projections": smollm2[3]} | changes))


@pytest.mark.timeout(300)
def test_projections_of_another_model_are_refused(smollm2, tmp_path):
    calibrated(make_llama()).save(tmp_path / "tiny.safetensors")
    said = r"AQUA_PROJECTIONS: made for llama, .* but layer 0 has 3 key-value heads of 64"
    with pytest.raises(RuntimeError, match=said):
        run(smollm2[0], [[1, 2]], projections=tmp_path / "tiny.safetensors")


@pytest.mark.timeout(300)
def test_a_model_with_latent_attention_is_refused(smollm2, tmp_path):
    heads = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 3}
    config = DeepseekV2Config(
        **SHAPE | heads | experts | {"num_key_value_heads": 4}, architectures=[DeepseekV2ForCausalLM.__name__]
    )
    config.save_pretrained(tmp_path)
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 128}
    with pytest.raises(RuntimeError, match=r"this model has latent attention \(MLA\), which AQUA does not serve"):
        run(tmp_path, [[1, 2]], projections=smollm2[3], **options)
