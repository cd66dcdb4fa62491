# SPDX-License-Identifier: Apache-2.0
"""A filled cache in a file: a long prompt read once, a conversation that goes on tomorrow."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from aqua_attention.cache.cache import AquaCache, Plans
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.cache.layer import RotatedSlidingLayer
from aqua_attention.cache.stored import same_weights, stores_the_same, tensors_of
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.tensors import Stored, write_tensors
from aqua_attention.model.sides import inputs_digest

KIND = "aqua_attention_cache"
STORED_SETTINGS = ("s_ratio", "bits", "h2o_ratio", "h2o_queries", "sink", "recent")
"""Settings that say what a cache holds; the others may change while it goes on."""
DTYPES = {f"torch.{name}": getattr(torch, name) for name in "float32 bfloat16 float16 float64 uint8 bool int64".split()}


def save_cache(path: Path | str, cache: Any, plans: Plans, model: dict[str, Any]) -> None:
    """Write a growing cache; see `Attachment.save_cache`. `model`: `shape` (see `fingerprint.shape_of`) and `dtype`."""
    if type(cache) not in (DynamicCache, AquaCache) or getattr(cache, "max_length", None) is not None:
        raise AquaError(
            f"only a growing cache that AQUA has filled can be saved, not this {type(cache).__name__}: use one made "
            "without max_length"
        )
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        plan = plans.get(index)
        ours = isinstance(layer, (RotatedLayer, RotatedSlidingLayer))
        if not ours or plan is None or not stores_the_same(plan, layer.plan):
            raise AquaError("this cache was not filled under this AQUA: save it before AQUA leaves the model")
        if layer.batch == 0:
            raise AquaError("this cache is empty, so there is nothing to save: generate with it first")
        numbers, held = layer.state()
        described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in held.items()}
        layers.append({"numbers": numbers, "tensors": described})
        tensors |= {f"layers.{index}.{name}": tensor.cpu() for name, tensor in held.items()}
    header = {
        "model": model,
        "key_weights": [plans[index].key_weights for index in sorted(plans)],
        "settings": _settings([plans[index].config for index in sorted(plans)]),
        "rotations": _rotation_digest(plans),
        "layers": layers,
    }
    write_tensors(path, KIND, header, tensors)


def load_cache(path: Path | str, cache: AquaCache, plans: Plans, model: dict[str, Any]) -> None:
    """Fill an empty growing cache from a file; see `Attachment.load_cache` for errors, and `save_cache`."""
    path = Path(path)
    if not path.is_file():
        raise AquaError(f"{path}: no such cache file: make one with save_cache")
    stored = Stored(path, KIND, what="an AQUA cache", remedy="fill a new cache and save it again")
    try:
        header = stored.header
        weights = zip(header["key_weights"], (plans[index].key_weights for index in sorted(plans)), strict=True)
        if header["model"]["shape"] != model["shape"] or not all(same_weights(*pair) for pair in weights):
            raise stored.error("it was made for another model")
        if header["model"]["dtype"] != model["dtype"]:
            raise stored.error(f"it was filled by a model in {header['model']['dtype']}, this one is {model['dtype']}")
        settings, there = _settings([plans[index].config for index in sorted(plans)]), _settings([AquaConfig.paper()])
        there |= header["settings"]
        if there != settings:
            changed = [f"{name} {there[name]}, not {our}" for name, our in settings.items() if there[name] != our]
            raise stored.error(f"it was filled with {', '.join(changed)}", "apply the same settings, or ")
        if header["rotations"] != _rotation_digest(plans):
            raise stored.error("it was made with other projections")
        if len(header["layers"]) != len(cache.layers):
            raise stored.error(f"it has {len(header['layers'])} layers, the model {len(cache.layers)}")
        filled = [
            {
                name: stored.take(f"layers.{index}.{name}", DTYPES[dtype], *shape).to(layer.plan.rotation.device)
                for name, (dtype, shape) in described["tensors"].items()
            }
            for index, (layer, described) in enumerate(zip(cache.layers, header["layers"], strict=True))
        ]
        stored.finish()
        for layer, described, held in zip(cache.layers, header["layers"], filled, strict=True):
            layer.restore(described["numbers"], held, DTYPES[model["dtype"]])
    except AquaError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise stored.error(f"its content is damaged ({error!r})") from error
    if len({(layer.get_seq_length(), layer.batch) for layer in cache.layers}) > 1:
        raise stored.error("its layers hold different numbers of tokens or sequences")


def _settings(configs: list[AquaConfig]) -> dict[str, Any]:
    """What the layers of these settings store alike, by name; a list where sliding ones store something else."""
    every = [config.to_dict() for config in configs]
    values = {name: list(dict.fromkeys(each[name] for each in every)) for name in STORED_SETTINGS}
    return {name: each[0] if len(each) == 1 else each for name, each in values.items()}


def _rotation_digest(plans: Plans) -> str:
    return inputs_digest([{str(index): tensor} for index in sorted(plans) for tensor in tensors_of(plans[index])])
