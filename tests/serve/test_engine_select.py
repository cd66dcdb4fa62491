# SPDX-License-Identifier: Apache-2.0
"""The real vLLM engine on a CPU where tokens are chosen: our own answers in prompts and behind them, alone and many.

As `test_engine`, these run by `make test-vllm`.
"""

import pytest
import torch

pytest.importorskip("vllm.entrypoints")

from concurrent.futures import ThreadPoolExecutor

from engine import run, served
from test_engine import prompts as prompts
from test_engine import room, tokens
from test_engine import smollm2 as smollm2
from test_engine import stock as stock

import aqua_attention as aqua

CHOOSING = {"k_ratio": 0.25, "min_length": 0, "score_bits": 8}
SHARE = CHOOSING | {"select_p": 0.9}
COUNT = CHOOSING | {"select_tokens": 60, "sink": 4, "recent": 16}
ALL = CHOOSING | {"select_p": 1.0}


@pytest.mark.timeout(900)
def test_all_of_the_softmax_is_stock_in_pages_with_a_copy(smollm2, prompts, stock):
    found = run(smollm2[0], prompts, projections=smollm2[3], config=ALL)
    assert tokens(found) == tokens(stock)
    # Keys and values of 64 dimensions in float32; a byte a dimension and a scale, in whole elements. Up to a page.
    assert room(found[1]) == pytest.approx(room(stock[1]) * (128 * 4) / (128 * 4 + 64 + 4), abs=128)


@pytest.mark.parametrize("config", [SHARE, COUNT], ids=["share", "count"])
@pytest.mark.timeout(900)
def test_tokens_are_chosen_as_by_our_own_path(smollm2, prompts, config):
    """All prompts at once, in chunks; then decoding."""
    folder, model, _, file = smollm2
    options = {"logprobs": 0, "generated": 0, "max_num_batched_tokens": 256, "max_tokens": 24}
    found, log = run(folder, prompts, projections=file, config=config, **options)
    assert "AQUA attention: k_ratio 0.25" in log
    assert f"select_p {config['select_p']}" in log if "select_p" in config else "select_tokens 60" in log
    projections = aqua.Projections.load(file)
    for prompt, answer in zip(prompts, found, strict=True):
        whole = prompt + answer["tokens"]
        ids = torch.tensor([whole])
        with torch.no_grad():
            dense = model(ids).logits[0].log_softmax(-1)
            with aqua.apply(model, projections, aqua.AquaConfig(**config)):
                expected = model(ids).logits[0].log_softmax(-1)
        of_prompt = [each[str(token)] for token, each in list(zip(prompt, answer["logprobs"], strict=True))[1:]]
        wanted = expected[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        error = (torch.tensor([*of_prompt, *answer["generated"]]) - wanted).abs()
        # Where tokens weigh nearly the same, rounding decides which is read, and what comes later differs. Our own path
        # does as much where weights are changed by some last bits.
        assert error[:150].median() < 1e-4
        left_out = (dense[:-1].gather(-1, ids[0, 1:, None])[:, 0] - wanted).abs()
        assert error.mean() < max(1e-3, 0.1 * left_out.mean())
        if len(prompt) > 200:
            assert left_out.max() > 0.05


@pytest.mark.parametrize("config", [SHARE, COUNT], ids=["share", "count"])
@pytest.mark.timeout(900)
def test_a_cache_too_small_for_all_gives_the_same_answers(smollm2, prompts, config):
    """Sequences are put off and begin again, and what begins alike is found in the prefix cache, with its copy."""
    options = {"projections": smollm2[3], "config": config}
    expected = tokens(run(smollm2[0], prompts, **options, enable_prefix_caching=False))
    small = run(smollm2[0], prompts * 2, **options, num_gpu_blocks_override=80, block_size=32, max_num_seqs=16)
    assert tokens(small) == expected * 2
    assert any(each["cached"] for each in small[0])


@pytest.mark.timeout(900)
def test_a_server_answers_eight_at_once_and_mixes_none_up(smollm2, prompts):
    options = {"projections": smollm2[3], "config": SHARE}
    expected = tokens(run(smollm2[0], prompts, **options, max_tokens=8))
    with served(smollm2[0], **options) as complete, ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda prompt: complete(prompt, 8), prompts * 2))
            assert [each["token_ids"] for each in answers] == expected * 2
