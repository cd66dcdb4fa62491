# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism in the real vLLM engine: two processes, each with its heads' projections, answer as one does.

On a CPU each has a core; on a GPU machine each has a GPU. vLLM starts the processes, or torchrun does, which needs no
process for the engine.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("vllm.entrypoints")

import engine
from engine import run

from aqua_attention.vllm.plugin import backend_name
from aqua_attention.vllm.versions import LAYOUTS
from conftest import VOCABULARY, calibrated, make_llama

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(GPUS == 1 or (os.cpu_count() or 1) < 2, reason="needs two GPUs, or two cores without any"),
]
if GPUS:
    pytestmark.append(pytest.mark.gpu)
SHAPE = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
}
ENGINE = {"skip_tokenizer_init": True, "attention_backend": backend_name()}
if GPUS:
    # Tests that run beside each other would mistake the others' memory for what the model takes.
    ENGINE |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30, "disable_custom_all_reduce": True}
HALF, SMALL = {"k_ratio": 0.5}, {"k_ratio": 1.0, "s_ratio": 0.25, "sink": 0, "recent": 0}
SHARE = {"k_ratio": 0.25, "score_bits": 8, "select_p": 0.9}
chooses = pytest.mark.skipif(LAYOUTS is None, reason="pages of this vLLM have no room for what tokens are chosen by")


VLLM, TORCHRUN = "tensor_parallel_size", "together"
"""What says how many processes there are, and so who starts them."""
CASES = [
    pytest.param(2, HALF, VLLM, id="half"),
    pytest.param(2, HALF, TORCHRUN, id="half, torchrun"),
    pytest.param(2, SMALL, TORCHRUN, id="small, torchrun"),
    pytest.param(2, SHARE, TORCHRUN, id="share, torchrun", marks=chooses),
    # Both processes have the one head, and half of its query heads, which would choose dimensions without the others.
    pytest.param(1, SMALL, TORCHRUN, id="one head for both, torchrun"),
]


@pytest.mark.parametrize(("kv_heads", "config", "starter"), CASES)
def test_two_processes_answer_as_one(kv_heads, config, starter, tmp_path, monkeypatch):
    if not GPUS:
        monkeypatch.setitem(engine.ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model, file = make_llama(**SHAPE, num_key_value_heads=kv_heads), tmp_path / "tiny.safetensors"
    model.save_pretrained(tmp_path / "model")
    calibrated(model, context=512).save(file)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 64, 65, 300, 700)]
    answers = []
    for count in (1, 2):
        options = {"config": config, "max_tokens": 24, starter: count}
        found, log = run(tmp_path / "model", prompts, projections=file, **options, **ENGINE)
        assert "AQUA attention: " in log
        of_two = "Worker_TP1" in log if starter == VLLM else log.count(engine.MARK) == 2
        assert of_two == (count == 2)
        answers.append([each["tokens"] for each in found])
    stock, _ = run(tmp_path / "model", prompts, max_tokens=24, **ENGINE | {"attention_backend": None})
    assert answers[1] == answers[0]
    assert answers[0] != [each["tokens"] for each in stock]
