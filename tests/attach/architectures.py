# SPDX-License-Identifier: Apache-2.0
"""Architectures beyond the families of `test_matrix.py`: one small model each, and what AQUA does with it.

docs/models.md has the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

from conftest import SHAPE


@dataclass(frozen=True)
class Architecture:
    """A small model, of random weights that are large enough for its attention to matter.

    Attributes:
        config: name of the class in transformers; the model is the one that `AutoModelForCausalLM` knows for it.
        special: what its attention or its layers have that Llama's have not.
        changes: what its config needs beside `SHAPE`.
        cache: of `generate` on a CPU with a C compiler, "tiled" or "growing".
        refused: settings that are an AquaError, which names the remedy.
    """

    config: str
    special: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    cache: str = "tiled"
    refused: tuple[str, ...] = ()

    def make(self):
        """The model; the test is skipped where this version of transformers has no such class."""
        config = getattr(transformers, self.config, None)
        if config is None:
            pytest.skip(f"transformers {transformers.__version__} has no {self.config}")
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config(**SHAPE | self.changes)).eval()


REFUSALS = {
    "`bits`": ({"bits": 8}, "bits=8.*: leave (it|bits) out"),
    "`h2o_ratio`": ({"h2o_ratio": 0.5}, "h2o_ratio=0.5.*: leave (it|h2o_ratio) out"),
    "`s_ratio` with a window": (
        {"s_ratio": 0.25, "sink": 2, "recent": 5},
        "s_ratio=0.25 with an exact window.*: give sink=0, recent=0",
    ),
    "padding with a cache": ({}, "hides no padding.*: give it rows of the same length, or use_cache=False"),
}
"""What can be refused, as docs/models.md says it: a setting, and what the error says of it with the remedy."""
UNSTORED = {"cache": "growing", "refused": ("`bits`", "`h2o_ratio`")}
"""Keys do not come straight from a plain layer of the cache: they are rotated at each step, and all is stored."""

BIASES, EXPERTS, SLIDING = "biases, norms or activations of their own", "mixture of experts", "sliding windows"
HYBRID, PARTIAL = "state-space or convolution layers between", "partial rotary embedding"
LATENT, LEARNED = "latent attention (MLA), mixture of experts", "learned positions"
SLIDING_AND_FULL = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
TWO_OF_FOUR = {"num_experts_per_tok": 2, "num_local_experts": 4}
SMALL_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32}
ROUTED |= {"first_k_dense_replace": 1}
SHARED = {"shared_expert_intermediate_size": 32}
MLA = {"num_key_value_heads": 4, "head_dim": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MLA |= {"kv_lora_rank": 32, "q_lora_rank": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR_HEADS |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
ONE_IN_THREE = ["mamba", "attention", "mamba"]
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SHAPE["vocab_size"]}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
SHARED_KEYS |= {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}

ARCHITECTURES = {
    "apertus": Architecture("ApertusConfig", BIASES),
    "arcee": Architecture("ArceeConfig", BIASES),
    "bamba": Architecture("BambaConfig", HYBRID, {"attn_layer_indices": [1]} | MAMBA),
    "biogpt": Architecture("BioGptConfig", LEARNED),
    "bitnet": Architecture("BitNetConfig", BIASES),
    "cohere": Architecture("CohereConfig", BIASES),
    "cohere2": Architecture("Cohere2Config", SLIDING, SLIDING_AND_FULL),
    "deepseek-v2": Architecture("DeepseekV2Config", LATENT, MLA | ROUTED, **UNSTORED),
    "deepseek-v3": Architecture("DeepseekV3Config", LATENT, MLA | ROUTED | {"n_group": 2, "topk_group": 1}, **UNSTORED),
    "diffllama": Architecture(
        "DiffLlamaConfig",
        "differential attention: other values than the cache's",
        cache="growing",
        refused=(*UNSTORED["refused"], "`s_ratio` with a window"),
    ),
    "ernie4.5": Architecture("Ernie4_5Config", BIASES),
    "exaone4": Architecture("Exaone4Config", SLIDING, SLIDING_AND_FULL),
    "falcon-h1": Architecture(
        "FalconH1Config", "a state-space layer beside each attention layer", {"mamba_d_ssm": 128} | MAMBA, **UNSTORED
    ),
    "gemma": Architecture("GemmaConfig", BIASES),
    "gemma3n": Architecture("Gemma3nTextConfig", "layers that share keys", SHARED_KEYS | PER_LAYER, **UNSTORED),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        "sliding windows, full layers with heads of 512",
        PER_LAYER | {"sliding_window": 12, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        cache="growing",
    ),
    "glm": Architecture("GlmConfig", PARTIAL),
    "glm4": Architecture("Glm4Config", PARTIAL),
    "glm4-moe": Architecture("Glm4MoeConfig", EXPERTS, ROUTED),
    "gpt-bigcode": Architecture("GPTBigCodeConfig", LEARNED),
    "gpt2": Architecture("GPT2Config", LEARNED),
    "granite-moe": Architecture("GraniteMoeConfig", EXPERTS, TWO_OF_FOUR | {"attention_multiplier": 0.5}),
    "granite-moe-hybrid": Architecture(
        "GraniteMoeHybridConfig",
        HYBRID,
        TWO_OF_FOUR
        | MAMBA
        | {"attention_multiplier": 0.5, "shared_intermediate_size": 32, "layer_types": ONE_IN_THREE},
    ),
    "helium": Architecture("HeliumConfig", BIASES),
    "hunyuan": Architecture("HunYuanDenseV1Config", BIASES),
    "hunyuan-moe": Architecture("HunYuanMoEV1Config", EXPERTS, {"num_experts": 4, "moe_topk": 2}),
    "jamba": Architecture(
        "JambaConfig",
        HYBRID,
        {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8}
        | {"use_mamba_kernels": False},
    ),
    "lfm2": Architecture("Lfm2Config", HYBRID, {"layer_types": ["conv", "full_attention", "conv"]}),
    "llama4": Architecture(
        "Llama4TextConfig",
        "chunks of tokens, layers without positions",
        {
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 12,
        }
        | {"no_rope_layers": [1, 0, 1]},
    ),
    "minimax": Architecture(
        "MiniMaxConfig",
        "linear attention between",
        TWO_OF_FOUR | LINEAR_AND_FULL | {"block_size": 8},
        cache="growing",
        refused=(*UNSTORED["refused"], "padding with a cache"),
    ),
    "ministral": Architecture("MinistralConfig", SLIDING, SLIDING_AND_FULL),
    "ministral3": Architecture("Ministral3Config", "queries scaled by position"),
    "mixtral": Architecture("MixtralConfig", EXPERTS, TWO_OF_FOUR),
    "nemotron": Architecture("NemotronConfig", PARTIAL),
    "olmo": Architecture("OlmoConfig", BIASES),
    "olmo2": Architecture("Olmo2Config", BIASES),
    "olmo3": Architecture("Olmo3Config", SLIDING, SLIDING_AND_FULL),
    "persimmon": Architecture("PersimmonConfig", PARTIAL),
    "phi": Architecture("PhiConfig", PARTIAL),
    "qwen2-moe": Architecture("Qwen2MoeConfig", EXPERTS, SMALL_EXPERTS | SHARED),
    "qwen3-moe": Architecture("Qwen3MoeConfig", EXPERTS, SMALL_EXPERTS),
    "qwen3-next": Architecture(
        "Qwen3NextConfig", "linear attention between", SMALL_EXPERTS | SHARED | LINEAR_HEADS | LINEAR_AND_FULL
    ),
    "seed-oss": Architecture("SeedOssConfig", BIASES),
    "smollm3": Architecture("SmolLM3Config", "layers without positions", {"no_rope_layers": [1, 1, 0]}),
    "stablelm": Architecture("StableLmConfig", PARTIAL),
    "starcoder2": Architecture("Starcoder2Config", SLIDING, {"sliding_window": 12}),
}
