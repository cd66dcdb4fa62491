# SPDX-License-Identifier: Apache-2.0
"""Do these projections belong to this model? Its shape must be equal; its key weights should be."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.io.state import Digest, weight_difference
from aqua_attention.model.capture import AttentionLayer, is_plain

KEY_WEIGHT_NAMES = ("k_proj", "key", "k_lin", "qkv_proj", "qkv", "Wqkv", "query_key_value", "c_attn")
SKETCHES, SAMPLES = 4, 1 << 16
WEIGHT_TOLERANCE = 0.005
"""Relative difference of key weights that rounding to bfloat16 (about 0.001) never reaches."""


def shape_of(model: PreTrainedModel, layers: list[AttentionLayer], *, named: bool = False) -> dict[str, Any]:
    """What must be equal for projections to fit: the architecture and the shape of every attention layer.

    With `named`, their names are part of it: then `layers` need not be all of the model's.
    """
    shape = {"model_type": model.config.model_type, "layers": layer_rows(layers)}
    return shape | {"names": [layer.name for layer in layers]} if named else shape


def layer_rows(layers: list[AttentionLayer]) -> list[list[int]]:
    """Index, num_attention_heads, num_key_value_heads and head_dim of each layer."""
    return [[layer.index, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim] for layer in layers]


def describe_shape(shape: dict[str, Any]) -> str:
    """One readable line, such as "llama, 30 layers, 9 query and 3 key-value heads of 64"."""
    heads = sorted({tuple(layer[1:]) for layer in shape["layers"]})
    each = "; ".join(f"{query} query and {key} key-value heads of {dim}" for query, key, dim in heads)
    return f"{shape['model_type']}, {len(shape['layers'])} layers, {each}"


def key_weight_digest(layers: list[AttentionLayer]) -> list[list[float]] | None:
    """A few numbers a layer that identify its key weights, whatever dtype they are loaded in.

    Each number is the product of (a sample of) the weights, scaled to length one, with a fixed pattern of signs. The
    difference between two models' numbers therefore estimates the relative difference of their weights, which a
    hash of rounded bytes could not give. None when the key weights of a layer cannot be read: offloaded, quantised.
    """
    digest = []
    for layer in layers:
        weight = _key_weight(layer)
        if weight is None:
            return None
        flat = weight.detach().flatten()
        sample = flat[:: max(1, math.ceil(flat.numel() / SAMPLES))].float().cpu()
        signs = torch.randint(0, 2, (SKETCHES, sample.numel()), generator=torch.Generator().manual_seed(0))
        norm = sample.norm().clamp_min(1e-30)
        if not bool(torch.isfinite(norm)):
            raise AquaError(f"the key weights of layer {layer.index} hold NaN or infinity: the checkpoint is damaged")
        digest.append([round(number, 6) for number in ((signs.float() * 2 - 1) @ (sample / norm)).tolist()])
    return digest


def other_weights(first: Digest | None, second: Digest | None) -> float:
    """By how much two digests differ, at most 1; 0 where that is no more than rounding, or one of them is not known."""
    difference = weight_difference(first, second) if first and second else 0.0
    return min(difference, 1.0) if difference > WEIGHT_TOLERANCE else 0.0


def _key_weight(layer: AttentionLayer) -> Tensor | None:
    for name, child in layer.module.named_modules():
        weight = getattr(child, "weight", None)
        if name.rpartition(".")[2] in KEY_WEIGHT_NAMES and isinstance(weight, Tensor):
            return weight if is_plain(weight) and weight.device.type != "meta" else None
    return None
