# SPDX-License-Identifier: Apache-2.0
"""What a cache stores of one layer, as its plan says: rotated, sliced, quantized, evicted."""

import torch
from torch import Tensor

from aqua_attention.cache.eviction import Eviction
from aqua_attention.cache.quantized import Quantized
from aqua_attention.cache.store import Growing, Store
from aqua_attention.cache.window import WindowStore
from aqua_attention.config import AquaConfig
from aqua_attention.model.fingerprint import other_weights, same_projected
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.tokens import SCALE_BYTES, scored_bytes


def needs_own_cache(config: AquaConfig) -> str:
    """The setting that only a cache of ours can meet, in words; empty when any will do."""
    if config.h2o_ratio < 1:
        return f"h2o_ratio={config.h2o_ratio:g}"
    return "" if config.bits is None else f"bits={config.bits}"


def stored_specially(plan: LayerPlan) -> str:
    """Why a growing layer of this plan stores no plain keys and values, in words; empty when it does."""
    return needs_own_cache(plan.config) or ("s_ratio with an exact window" if plan.has_window_store else "")


def stores(plan: LayerPlan) -> tuple[Store, Store]:
    """An empty store for rotated keys, and one for values."""
    keys, values = _unwindowed_stores(plan)
    return WindowStore(keys, plan.kept, plan.sink, plan.recent) if plan.has_window_store else keys, values


def eviction_of(plan: LayerPlan) -> Eviction | None:
    """Which tokens stay; None: all."""
    ratio, queries = plan.config.h2o_ratio, plan.config.h2o_queries
    return None if ratio == 1 else Eviction(ratio, queries, plan.sink, plan.recent)


def as_stored(plan: LayerPlan, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated keys and values as `bits` would give them back; those of an exact window are quantized too."""
    if plan.config.bits is None:
        return keys, values
    leading, value_store = _unwindowed_stores(plan)
    leading.append(keys[..., : plan.kept])
    value_store.append(values)
    return torch.cat([leading.read(), keys[..., plan.kept :]], -1), value_store.read()


def tensors_of(plan: LayerPlan) -> list[Tensor]:
    """What stored states are made with."""
    found = [plan.rotation, plan.key_scale, plan.key_mean] if plan.config.bits is not None else [plan.rotation]
    return [tensor for tensor in found if tensor is not None]


def stores_the_same(plan: LayerPlan, other: LayerPlan) -> bool:
    """Whether a cache filled under the other plan can go on under this one."""
    if plan is other:
        return True
    ours, theirs = (
        (each.kept, each.config.bits, each.sink, each.recent, eviction_of(each), each.rotation.shape)
        for each in (plan, other)
    )
    if ours != theirs or not same_weights(plan.key_weights, other.key_weights):
        return False
    if not same_projected(plan.projected, other.projected):
        return False
    pairs = zip(tensors_of(plan), tensors_of(other), strict=True)
    return all(torch.equal(mine, its.to(mine.device)) for mine, its in pairs)


def same_weights(first: list[float] | None, second: list[float] | None) -> bool:
    """Whether two layers have the same key weights; True where one is unknown."""
    return first is None or second is None or not other_weights([first], [second])


def token_bytes(plan: LayerPlan, itemsize: int, length: int, is_tiled: bool) -> float:
    """Bytes of keys and values that a decoding step reads for a token that is in no exact window and not whole.

    Args:
        itemsize: bytes of a number of the model's dtype; length: tokens of the sequence.
        is_tiled: whether the layer is in tiles; else it is a growing one, of which every stored dimension is read.
    """
    heads, bits = plan.num_key_value_heads, plan.config.bits
    if is_tiled:
        read = plan.kept if plan.why_not_skipping(length) else plan.k
        return heads * states_bytes(read, plan.head_dim, itemsize, bits)
    if bits is None:
        return plan.config.h2o_ratio * heads * states_bytes(plan.kept, plan.head_dim, itemsize, None)
    keys, values = _unwindowed_stores(plan)
    assert isinstance(keys, Quantized) and isinstance(values, Quantized)
    return plan.config.h2o_ratio * heads * (keys.token_bytes(plan.kept) + values.token_bytes(plan.head_dim))


def choice_bytes(config: AquaConfig, head_dim: int, itemsize: int, bits: int | None) -> tuple[float, int]:
    """Bytes that a kernel that chooses tokens reads in a head: of each token to score it, and of each one chosen.

    Args:
        itemsize: bytes of a number of the model's dtype; bits: of keys and values that are read.
    """
    kept, chosen = config.kept_dims(head_dim), states_bytes(config.kept_dims(head_dim), head_dim, itemsize, bits)
    # In 16 bits the keys themselves are scored, which lie by token.
    if config.score_bits == 16:
        return kept * itemsize, chosen
    return scored_bytes(config.selected_dims(head_dim), config.score_bits), chosen


def held_bytes(plan: LayerPlan, itemsize: int, kind: str) -> float:
    """Bytes that a cache holds for a token that is in no exact window, in a layer of this kind ("tiled", "scored",
    "growing"), with what is scored; but for room that is not used yet, and what kernels work in.
    """
    heads, bits = plan.num_key_value_heads, plan.config.bits
    if kind == "growing":
        copied = plan.is_plain and plan.config.chooses_tokens and plan.config.score_bits == 8
        return token_bytes(plan, itemsize, 0, False) + copied * heads * (plan.kept + SCALE_BYTES)
    held: float = states_bytes(plan.kept, plan.head_dim, itemsize, bits)
    if kind == "scored":
        held += scored_bytes(plan.kept, plan.config.score_bits)
        # Keys and their copy have the same scales where both are in 8 bits.
        held -= SCALE_BYTES if bits == plan.config.score_bits else 0
    return heads * held


def states_bytes(read: int, value_dim: int, itemsize: int, bits: int | None) -> int:
    """Bytes of so many dimensions of a key, and of a value; those of 8 bits, as tiles have them, with their scales."""
    return read + value_dim + 2 * torch.bfloat16.itemsize if bits == 8 else (read + value_dim) * itemsize


def _unwindowed_stores(plan: LayerPlan) -> tuple[Store, Store]:
    """Those of the leading dimensions of all keys, and of values."""
    bits = plan.config.bits
    if bits is None:
        return Growing(), Growing()
    return Quantized(bits, plan.recent, plan.key_scale, plan.key_mean), Quantized(bits, plan.recent)
