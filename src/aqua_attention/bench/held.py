# SPDX-License-Identifier: Apache-2.0
"""What a cache holds by part, as it is allocated: keys, values, the copy of the keys that is scored, and the rest."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.cache.scored import ScoredLayer
from aqua_attention.cache.stored import held_bytes
from aqua_attention.ops.plan import LayerPlan

PARTS = ("keys", "values", "copy")


def held_by_part(cache: Cache, length: int) -> dict[str, Any]:
    """Bytes of a cache whose layers grow or choose tokens (AQUA-Select).

    Args:
        length: tokens of each sequence.

    Returns:
        `keys_bytes`, `values_bytes` (with scales, room that is not used yet included), `copy_bytes` (codes and scales
        of the keys that are scored; 0 without one), `other_bytes` (the rest: what kernels work in, layers with a
        sliding window), and `expected_bytes` (what keys, values and the copy of so many tokens need by their widths;
        None where other layers hold tokens too).
    """
    found, expected, is_known = dict.fromkeys(PARTS, 0), 0.0, True
    for layer in cache.layers:
        if isinstance(layer, ScoredLayer):
            held, kind = _of_scored(layer), "scored"
        elif isinstance(layer, RotatedLayer):
            held, kind = _of_growing(layer), "growing"
        else:
            is_known = False
            continue
        for name, part in zip(PARTS, held, strict=True):
            found[name] += storage_bytes(part)
        expected += held_bytes(layer.plan, _itemsize(layer), kind) * length * _batch(layer)
    parts = {f"{name}_bytes": size for name, size in found.items()}
    other = storage_bytes(cache) - sum(found.values())
    return parts | {"other_bytes": other, "expected_bytes": round(expected) if is_known else None}


def storage_bytes(cache: Any) -> int:
    """Bytes of all tensor storages that a cache holds, each storage once.

    Rotations are left out: they belong to the attached model, and every cache shares them.
    """
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # the values too, so that no other gets the id of one of them
    pending: list[Any] = [cache]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, LayerPlan):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            # A quantised tensor of another library: a name for several others.
            pending += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
            continue
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (dict, list, tuple)):
            pending += value.values() if isinstance(value, dict) else value
        if hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
            pending.append(vars(value))
    return sum(storages.values())


def _of_scored(layer: ScoredLayer) -> tuple[list[Any], list[Any], list[Tensor]]:
    cache = layer.cache
    # Where both have 8 bits the scales of the copy are those of the keys, too.
    return [cache.keys, cache.own_scales], [cache.values, cache.value_scales], [cache.codes, cache.scales]


def _of_growing(layer: RotatedLayer) -> tuple[Any, Any, list[Any]]:
    copy = layer.score_copy
    return layer._keys, layer._values, [] if copy is None else [copy.codes, copy.scales]


def _itemsize(layer: Any) -> int:
    return int(layer.dtype.itemsize)


def _batch(layer: ScoredLayer | RotatedLayer) -> int:
    return layer.batch_size if isinstance(layer, ScoredLayer) else layer.batch
