# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose attention matters: large random weights, so that a wrong score moves the logits."""

from __future__ import annotations

import os
import shutil
import sys
import warnings

import pytest
import torch

import interpreter

# No test may reach a model hub; the default model comes from the package index, once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Kernels are computed step by step in Python then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()


def make_mistral(**changes):
    """Every layer attends to the last 12 tokens only."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SHAPE | {"sliding_window": 12} | changes)).eval()


def make_qwen3(**changes):
    """Queries and keys are normalised before the rotary embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | changes)).eval()


def make_gemma3(**changes):
    """Layers with a sliding window of 12 tokens, and a full one."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(3)
    layers = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | {"query_pre_attn_scalar": 16} | layers | changes)).eval()


MAKERS = {"llama": make_llama, "mistral": make_mistral, "qwen3": make_qwen3}


def subject_of(model, projections, tokenizer=None, **options):
    """What an evaluation measures."""
    from aqua_attention.evaluate.setting import Subject

    return Subject("tiny", model, tokenizer, projections, **options)


def calibrated(model, *, windows=4, context=64):
    """Projections of a tiny model from random tokens."""
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.calibration.run import collect
    from aqua_attention.model.capture import attention_layers
    from aqua_attention.model.fingerprint import key_weight_digest, shape_of

    tokens = torch.randint(0, VOCABULARY, (windows, context), generator=torch.Generator().manual_seed(3))
    layers = attention_layers(model)
    identity = {"name": "tiny", "shape": shape_of(model, layers), "key_weights": key_weight_digest(layers)}
    return Projections.from_statistics(collect(model, tokens), identity, {"tokens": tokens.numel()})


@pytest.fixture(scope="session", params=sorted(MAKERS))
def tiny(request):
    """(model, projections) of each tiny architecture in turn."""
    model = MAKERS[request.param]()
    return model, calibrated(model)


@pytest.fixture(scope="session")
def llama():
    """(model, projections) of the tiny Llama."""
    model = make_llama()
    return model, calibrated(model)


@pytest.fixture(scope="session")
def projections_file(tmp_path_factory):
    """Of the tiny Llama."""
    path = tmp_path_factory.mktemp("projections") / "tiny.safetensors"
    calibrated(make_llama()).save(path)
    return path


@pytest.fixture(scope="session")
def word_tokenizer():
    """A real tokenizer of the tiny vocabulary: one token a word w0 ... w94, no special tokens added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i + 2 for i in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


@pytest.fixture(scope="session")
def words():
    """A text of 3000 random words of `word_tokenizer`."""
    numbers = torch.randint(0, VOCABULARY - 2, (3000,), generator=torch.Generator().manual_seed(4)).tolist()
    return " ".join(f"w{number}" for number in numbers)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, word_tokenizer):
    """A local folder with the tiny Llama and its tokenizer, as `aqua` commands take it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama().save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


LONG = ("architectures", "select", "long")


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu need a CUDA device; those of LONG marks run where that mark is asked for."""
    for mark in LONG:
        if mark in config.getoption("markexpr"):
            continue
        left_out = [item for item in items if item.get_closest_marker(mark)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if not torch.cuda.is_available():
        interpreter.make_faster()  # the modules of the tests are imported by now
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def mostly_long(values, *kept):
    """Parameters of a test: all but those kept are marked long."""
    assert set(kept) <= set(values)
    return [pytest.param(each, marks=() if each in kept else pytest.mark.long) for each in values]


@pytest.fixture
def no_kernel_loaded():
    """As in a new process: a C kernel that an earlier test has loaded needs no compiler."""
    from aqua_attention.ops.backends.cpu import build

    build.kernels.cache_clear()
    yield build
    build.kernels.cache_clear()


@pytest.fixture
def aqua(monkeypatch, capsys):
    """Run `aqua ARGS`; returns (exit code, standard output, standard error with its warnings)."""

    from aqua_attention.cli import main as cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["aqua", *map(str, args)])
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("always", category=UserWarning)
                cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        return code, *capsys.readouterr()

    return run
