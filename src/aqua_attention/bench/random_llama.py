# SPDX-License-Identifier: Apache-2.0
"""A Llama of random weights, with projections, keys and values that take the time that real ones do."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from aqua_attention.calibration.projections import LayerProjection, Projections
from aqua_attention.errors import AquaError
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest, shape_of

KEY_SCALE = 2.0
"""Standard deviation of the random keys: with less, attention averages over all tokens and no longer matters."""
LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_8B |= {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072}
LLAMA_SMALL = LLAMA_8B | {"num_hidden_layers": 8, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
LLAMA_SMALL |= {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 1024}
"""Heads as SmolLM2-135M's, for a CPU. Of its words only some: their weights would hide what attention takes."""
DTYPES = ("float32", "bfloat16", "float16")


def make_model(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **changes: int) -> PreTrainedModel:
    """A Llama of random weights in the shape of Llama-3.1-8B, the same one each time; an AquaError for bad sizes.

    `changes` to `LLAMA_8B` go by the names of `LlamaConfig`.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise AquaError(f"device is {device!r}, and there is no CUDA GPU here: choose cpu")
    shape = LLAMA_8B | changes
    layers, heads, kv_heads = (shape[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    if layers < 1 or heads % kv_heads:
        given = f"{layers} layers with {heads} query heads for {kv_heads} key-value heads"
        raise AquaError(f"{given}: give one layer or more, and query heads in equal groups")
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[torch.device(device)] if on_gpu else []):
        torch.manual_seed(0)
        # Made where it is used: 8B random numbers take minutes on a CPU.
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()  # type: ignore[no-any-return,unused-ignore]


def make_llama(device: str | None, dtype: str, layers: int | None) -> PreTrainedModel:
    """The random model for a device: Llama-3.1-8B's shape on a GPU, a small one on a CPU.

    Args:
        device: None takes cuda where there is one.
        dtype: "auto": bfloat16 on a GPU, float32 on a CPU.
        layers: None: those of the shape.

    An AquaError where a device is not there, or a dtype not known.
    """
    if dtype not in ("auto", *DTYPES):
        raise AquaError(f"dtype is {dtype!r}: it must be auto, {', '.join(DTYPES)}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.partition(":")[0] not in ("cuda", "cpu"):
        raise AquaError(f"device is {device!r}: it must be cpu, cuda or cuda:NUMBER")
    shape, usual = (LLAMA_SMALL, "float32") if where == "cpu" else (LLAMA_8B, "bfloat16")
    changes = shape | ({} if layers is None else {"num_hidden_layers": layers})
    return make_model(getattr(torch, usual if dtype == "auto" else dtype), where, **changes)


def random_projections(model: PreTrainedModel) -> Projections:
    """Random rotations for a model, with the statistics that the keys of `random_states` have under any of them."""
    layers = attention_layers(model)
    generator = torch.Generator().manual_seed(0)
    projections = {}
    for layer in layers:
        kv_heads, dim = layer.num_key_value_heads, layer.head_dim
        ones = torch.ones(kv_heads, dim)
        rotation = torch.linalg.qr(torch.randn(kv_heads, dim, dim, generator=generator)).Q.contiguous()
        of_keys = dict.fromkeys(("key_rms", "key_std", "key_spread"), KEY_SCALE * ones) | {"key_mean": 0 * ones}
        projections[layer.index] = LayerProjection(rotation, **of_keys, query_rms=ones, energy=ones / dim)
    identity = {"name": "random", "shape": shape_of(model, layers), "key_weights": key_weight_digest(layers)}
    return Projections(projections, {}, identity)


def random_states(model: PreTrainedModel, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, as the model computes them, and values of each layer, [batch, num_key_value_heads, length, head_dim]."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = batch, config.num_key_value_heads, length, head_dim
    for index in range(config.num_hidden_layers):
        given = {"generator": torch.Generator(model.device).manual_seed(index), "device": model.device}
        keys, values = (torch.randn(shape, **given, dtype=model.dtype) for _ in range(2))
        yield KEY_SCALE * keys, values
