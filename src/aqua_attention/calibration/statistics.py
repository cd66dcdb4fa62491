# SPDX-License-Identifier: Apache-2.0
"""What calibration accumulates: sums over tokens that merge over batches, processes and machines.

The rotation is unknown during the pass, so the Gram sums of queries and keys are kept apart and in the model's own
basis; everything else (rotation, root mean squares, means) is derived from them. Memory does not grow with the text.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.io.tensors import Stored

LEAST_TOKENS = 16
"""For each dimension of a head; so many lose within a tenth of the least possible (docs/results/calibration.md)."""


@dataclass(repr=False)
class LayerStatistics:
    """Sums over the tokens seen by one attention layer; float64, on the CPU.

    Attributes:
        query_gram: sum of q^T q over tokens and over the query heads of each key-value head,
            [num_key_value_heads, head_dim, head_dim].
        key_gram: sum of k^T k over tokens, [num_key_value_heads, head_dim, head_dim].
        key_sum: sum of k over tokens, [num_key_value_heads, head_dim].
        query_count: number of query rows in `query_gram` (tokens times query heads per key-value head).
        key_count: number of tokens in `key_gram` and `key_sum`.
    """

    query_gram: Tensor
    key_gram: Tensor
    key_sum: Tensor
    query_count: int
    key_count: int

    def __repr__(self) -> str:
        heads, head_dim = self.key_sum.shape
        return f"<LayerStatistics: {self.key_count} tokens, {heads} key-value heads of {head_dim}>"

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> LayerStatistics:
        """Statistics of one batch, of any float dtype, as it enters the attention scores.

        query: [batch, num_attention_heads, length, head_dim], key: [batch, num_key_value_heads, length, head_dim].
        """
        batch, heads, length, head_dim = query.shape
        kv_heads = key.shape[1]
        # One Gram a sequence in float32, summed in float64: the result does not depend on how windows are batched.
        tall = query.float().reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
        key = key.float()
        return cls(
            query_gram=(tall.transpose(-1, -2) @ tall).double().sum(0).cpu(),
            key_gram=(key.transpose(-1, -2) @ key).double().sum(0).cpu(),
            key_sum=key.double().sum((0, 2)).cpu(),
            query_count=batch * heads // kv_heads * length,
            key_count=batch * length,
        )

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics of both texts together."""
        if self.key_gram.shape != other.key_gram.shape:
            shapes = f"{tuple(self.key_gram.shape)} and {tuple(other.key_gram.shape)}"
            raise AquaError(
                f"statistics of layers of different shapes, {shapes}, cannot be merged: give those of one model"
            )
        return LayerStatistics(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def check_finite(self, layer: int) -> None:
        """Raise AquaError when the model produced NaN or infinite queries or keys."""
        if not bool(torch.isfinite(self.query_gram).all() and torch.isfinite(self.key_gram).all()):
            raise AquaError(
                f"layer {layer} gave NaN or infinite queries or keys: the weights are damaged or the dtype is "
                "too narrow (try --dtype float32)"
            )


Statistics = dict[int, LayerStatistics]
"""One entry for each attention layer, by layer index."""


def merge(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of two runs over different text of the same model, as if it had been one run."""
    if first.keys() != second.keys():
        raise AquaError(
            f"statistics of layers {sorted(first)} and {sorted(second)} cannot be merged: give those of one model"
        )
    return {layer: first[layer] + second[layer] for layer in first}


def warn_of_few(statistics: Statistics) -> None:
    """Warn where a layer has seen so few tokens that its directions are chance."""
    for layer in statistics.values():
        needed = LEAST_TOKENS * layer.key_gram.shape[-1]
        if layer.key_count < needed:
            few = f"{layer.key_count} tokens are few for heads of {layer.key_gram.shape[-1]} dimensions"
            warnings.warn(f"{few}: calibrate on {needed} or more", stacklevel=4)
            return


def named_tensors(statistics: Statistics) -> dict[str, Tensor]:
    """As a file holds them: `layers.I.query_gram`, `.key_gram`, `.key_sum` (float64) and `.counts` (int64)."""
    tensors: dict[str, Tensor] = {}
    for index, layer in statistics.items():
        tensors |= {f"layers.{index}.{name}": getattr(layer, name) for name in ("query_gram", "key_gram", "key_sum")}
        tensors[f"layers.{index}.counts"] = torch.tensor([layer.query_count, layer.key_count])
    return tensors


def take_layer(stored: Stored, index: int, num_key_value_heads: int, head_dim: int) -> LayerStatistics:
    """Take one layer's sums out of a file, checked."""
    queries, keys = stored.take(f"layers.{index}.counts", torch.int64, 2).tolist()
    if min(queries, keys) < 1:
        raise stored.error(f"layer {index} counts {queries} queries and {keys} keys")

    def take(name: str, *shape: int) -> Tensor:
        return stored.take(f"layers.{index}.{name}", torch.float64, num_key_value_heads, *shape)

    grams = take("query_gram", head_dim, head_dim), take("key_gram", head_dim, head_dim)
    return LayerStatistics(*grams, take("key_sum", head_dim), queries, keys)
