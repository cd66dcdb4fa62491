# SPDX-License-Identifier: Apache-2.0
"""Do these projections belong to this model? Its shape must be equal; its key weights should be."""

import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aqua_attention.errors import AquaError
from aqua_attention.io.state import SKETCHES, Digest, weight_difference
from aqua_attention.model.capture import AttentionLayer, evaluation_mode, is_plain
from aqua_attention.ops.select import without_autocast

KEY_WEIGHT_NAMES = ("k_proj", "key", "k_lin", "qkv_proj", "qkv", "Wqkv", "query_key_value", "c_attn")
VALUE_WEIGHT_NAMES = ("v_proj", "value", "v_lin")
KEY_NORM_NAMES = ("k_norm", "key_layernorm", "k_layernorm")
SAMPLES = 1 << 16
WEIGHT_TOLERANCE = 0.005
"""Relative difference of key weights that rounding to bfloat16 (about 0.001) never reaches."""
PROJECTED_TOLERANCE = 0.01
"""The same of what they make of an input, which is rounded once more."""
Projected = tuple[Tensor, ...]
"""See `projected`."""


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


def key_weight_digest(layers: list[AttentionLayer]) -> Digest | None:
    """A few numbers a layer that identify its key weights, whatever dtype they are loaded in.

    The first ones are products of (a sample of) the weights, scaled to length one, with fixed patterns of signs. The
    difference between two models' numbers therefore estimates the relative difference of their weights, which a
    hash of rounded bytes could not give. Then come logarithms of lengths: of the weights, of weights and bias together,
    and of the norm that keys go through, if there is one. Adapters count as if they were merged. None when the key
    weights of a layer cannot be read: offloaded, quantised.
    """
    digest = []
    for layer in layers:
        projection = _projection(layer, KEY_WEIGHT_NAMES)
        if projection is None:
            return None
        weight, bias = _effective(projection)
        flat = weight.flatten()
        sample = flat[:: max(1, math.ceil(flat.numel() / SAMPLES))].float().cpu()
        signs = torch.randint(0, 2, (SKETCHES, sample.numel()), generator=torch.Generator().manual_seed(0))
        norm = sample.norm().clamp_min(1e-30)
        whole = norm if bias is None else torch.hypot(norm, bias.detach().float().cpu().norm())
        if not bool(torch.isfinite(whole)):
            raise AquaError(f"the key weights of layer {layer.index} hold NaN or infinity: fetch the checkpoint again")
        lengths = [norm, whole]
        if (scale := _key_norm(layer)) is not None:
            lengths.append(scale.detach().float().cpu().norm().clamp_min(1e-3))
        row = torch.cat([(signs.float() * 2 - 1) @ (sample / norm), torch.stack(lengths).log()])
        digest.append([round(number, 6) for number in row.tolist()])
    return digest


@torch.no_grad()
def projected(layer: AttentionLayer) -> Projected | None:
    """What a layer's key and value projections, with their adapters, make of a fixed input: a quick look at them.

    It stays on the layer's device, which is not waited for; nothing is computed from it here, since a prompt waits for
    this look. None where the key weights cannot be read.

    Returns:
        Keys and values of `_probe`, [1, 2, width] each, and the weight of the norm of keys; as far as there are these.
    """
    found = [_projection(layer, names) for names in (KEY_WEIGHT_NAMES, VALUE_WEIGHT_NAMES)]
    if found[0] is None:
        return None
    parts = []
    for projection in filter(None, found):
        module, weight, width = projection
        is_plain_module = not module.training and not any(True for _ in module.children())
        mode = nullcontext() if is_plain_module else evaluation_mode(module)
        with mode, without_autocast(weight.device.type):
            # Not called: hooks of the user's see the model's own calls only.
            parts.append(module.forward(_probe(width, weight.dtype, weight.device)))
    scale = _key_norm(layer)
    return tuple(parts) if scale is None else (*parts, scale.clone())


def are_equal(first: Sequence[Projected | None], second: Sequence[Projected | None]) -> bool:
    """Whether many results of `projected` are equal to the last bit; they are compared at once, which is quick."""
    if any(each is None for each in (*first, *second)):
        return False
    one, other = ([part.flatten() for each in many if each is not None for part in each] for many in (first, second))
    shapes = [list(map(Tensor.size, many)) for many in (one, other)]
    places = {(each.device, each.dtype) for each in (*one, *other)}
    return shapes[0] == shapes[1] and len(places) == 1 and torch.equal(torch.cat(one), torch.cat(other))


def same_projected(first: Projected | None, second: Projected | None) -> bool:
    """Whether two results of `projected` are of the same weights, up to rounding, as far as is known."""
    if first is None or second is None:
        return True
    if [each.shape for each in first] != [each.shape for each in second]:
        return False
    return all(_are_near(one, other) for one, other in zip(first, second, strict=True))


def _are_near(first: Tensor, second: Tensor) -> bool:
    first, second = first.float(), second.to(first.device).float()
    if torch.equal(first, second):
        return True
    if first.ndim == 3:  # what weights make of the probe, and their bias
        first, second = (torch.cat([each[:, :1] - each[:, 1:], each[:, 1:]]) for each in (first, second))
    difference = (first - second).norm(dim=-1)
    return bool((difference <= PROJECTED_TOLERANCE * first.norm(dim=-1)).all())


def other_weights(first: Digest | None, second: Digest | None) -> float:
    """By how much two digests differ, at most 1; 0 where that is no more than rounding, or one of them is not known."""
    difference = weight_difference(first, second) if first and second else 0.0
    return min(difference, 1.0) if difference > WEIGHT_TOLERANCE else 0.0


class Projection(NamedTuple):
    """The module that makes keys or values, what it wraps included, with a plain weight of it and its inputs' width."""

    module: nn.Module
    weight: Tensor
    width: int


def _projection(layer: AttentionLayer, names: Collection[str]) -> Projection | None:
    """The first one with one of these names; None when there is none, or its weight cannot be read."""
    for name, child in layer.module.named_modules():
        # An adapter wraps the module that it adapts.
        weights = (getattr(part, "weight", None) for part in child.modules())
        weight = next((each for each in weights if isinstance(each, Tensor)), None)
        if name.rpartition(".")[2] in names and weight is not None:
            is_readable = is_plain(weight) and weight.device.type != "meta"
            return Projection(child, weight, weight.shape[0 if _is_transposed(child) else 1]) if is_readable else None
    return None


def _is_transposed(module: nn.Module) -> bool:
    """Whether it holds [inputs, outputs], as GPT-2 does."""
    return any(isinstance(part, Conv1D) for part in module.modules())


def _effective(projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, as if adapters were merged."""
    module, weight, width = projection
    if not any(True for _ in module.children()):
        return weight.detach(), getattr(module, "bias", None)
    with torch.no_grad(), evaluation_mode(module), without_autocast(weight.device.type):
        named = dict(chain(module.named_parameters(), module.named_buffers()))
        wide = {name: each.float() for name, each in named.items() if each.is_floating_point()}
        inputs = torch.cat([torch.eye(width, device=weight.device), torch.zeros(1, width, device=weight.device)])
        outputs = functional_call(module, wide, (inputs[None],))[0]
    found = outputs[:-1] - outputs[-1]
    return found if _is_transposed(module) else found.T, outputs[-1]


def _key_norm(layer: AttentionLayer) -> Tensor | None:
    """The weight of the norm that a layer's keys go through; None when there is none."""
    norms = (getattr(layer.module, name, None) for name in KEY_NORM_NAMES)
    weight = next((each for norm in norms if isinstance(each := getattr(norm, "weight", None), Tensor)), None)
    return weight.detach().flatten() if weight is not None and weight.device.type != "meta" else None


@cache
def _probe(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 2, width]: a fixed pattern of signs, and zeros, which show the bias."""
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.stack([signs, torch.zeros_like(signs)])[None].to(device, dtype)
