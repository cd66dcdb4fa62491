# SPDX-License-Identifier: Apache-2.0
"""Projections: the rotation of every layer and key-value head, from calibration statistics; one file for both."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.capture import AttentionLayer
from aqua_attention.errors import AquaError
from aqua_attention.files import write_atomically
from aqua_attention.fingerprint import (
    WEIGHT_TOLERANCE,
    describe_shape,
    key_weight_digest,
    shape_of,
    weight_difference,
)
from aqua_attention.stats import LayerStatistics, Statistics, merge

FORMAT_VERSION = 1
METADATA_KEY = "aqua_attention"
BASES = ("aqua", "none", "key-pca")
ORTHOGONALITY_TOLERANCE = 1e-4
RECALIBRATE = "calibrate again with `aqua calibrate`"


@dataclass(frozen=True)
class LayerProjection:
    """The basis of one layer, and how large queries and keys are along each of its dimensions.

    Attributes:
        rotation: orthogonal, [num_key_value_heads, head_dim, head_dim]; columns by falling energy; float32.
        key_rms, query_rms: root mean square of rotated keys and queries over the calibration text, not centred,
            [num_key_value_heads, head_dim]; float32.
        energy: share of the squared length of queries and keys together along each dimension,
            [num_key_value_heads, head_dim]; sums to 1; float32.
    """

    rotation: Tensor
    key_rms: Tensor
    query_rms: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Projections:
    """Rotations for all attention layers of one model, with the statistics they come from.

    Attributes:
        layers: by layer index.
        statistics: the calibration sums, by layer index.
        model: what the projections fit: `shape` (see `fingerprint.shape_of`), `key_weights` (digest or None), `name`.
        calibration: provenance: `text_sha256`, `tokens`, `context`, `seed`, `library_version`.
        basis: "aqua"; for comparison "none", the model's own dimensions, or "key-pca", the principal components of the
            centred keys alone.
    """

    layers: dict[int, LayerProjection]
    statistics: Statistics
    model: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    basis: str = "aqua"

    @classmethod
    def from_statistics(
        cls, statistics: Statistics, model: dict[str, Any], calibration: dict[str, Any], basis: str = "aqua"
    ) -> Projections:
        """Decompose the statistics of every layer (paper, section 3: SVD of the stacked queries and keys)."""
        layers = {}
        for index, layer in statistics.items():
            layer.check_finite(index)
            layers[index] = _layer_projection(layer, _rotation(layer, basis))
        return cls(layers, statistics, model, calibration, basis)

    def with_basis(self, basis: str) -> Projections:
        """The same calibration in another basis: "aqua", "none" (not rotated, as SparQ) or "key-pca" (as Loki)."""
        return Projections.from_statistics(self.statistics, self.model, self.calibration, basis)

    def merged(self, other: Projections) -> Projections:
        """As if one calibration had read both texts: the sums are added and decomposed again.

        Raises:
            AquaError: the two are not of the same model, or not in the same basis.
        """
        if self.model["shape"] != other.model["shape"]:
            raise AquaError(
                f"projections of different models cannot be merged: {describe_shape(self.model['shape'])} and "
                f"{describe_shape(other.model['shape'])}"
            )
        if self.basis != other.basis:
            raise AquaError(f"projections in different bases cannot be merged: {self.basis} and {other.basis}")
        ours, theirs = self.model.get("key_weights"), other.model.get("key_weights")
        if ours and theirs and (difference := weight_difference(ours, theirs)) > WEIGHT_TOLERANCE:
            raise AquaError(
                f"projections of different weights cannot be merged: the key weights differ by {min(difference, 1):.1%}"
            )
        parts = [self.calibration, other.calibration]
        calibration = {key: value for key, value in parts[0].items() if parts[1].get(key) == value}
        calibration |= {"tokens": sum(part.get("tokens", 0) for part in parts), "merged": parts}
        return Projections.from_statistics(
            merge(self.statistics, other.statistics), self.model, calibration, self.basis
        )

    def check_model(self, model: PreTrainedModel, layers: list[AttentionLayer]) -> None:
        """Raise AquaError when the projections do not fit; warn when the model's key weights differ."""
        shape = shape_of(model, layers)
        if shape != self.model["shape"]:
            raise AquaError(
                f"these projections are for {describe_shape(self.model['shape'])}, the model is "
                f"{describe_shape(shape)}: calibrate this model with `aqua calibrate`"
            )
        expected, found = self.model.get("key_weights"), key_weight_digest(layers)
        if expected is None or found is None:
            return
        difference = weight_difference(expected, found)
        if difference > WEIGHT_TOLERANCE:
            warnings.warn(
                f"the projections were calibrated on other weights of the same shape (key weights differ by "
                f"{min(difference, 1.0):.1%}): results are valid but lose more; {RECALIBRATE} for this model",
                stacklevel=4,
            )

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, whole or not at all.

        Tensors a layer: `rotation` (float32), `query_gram`, `key_gram`, `key_sum` (float64), `counts` (int64).
        """
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            sums = self.statistics[index]
            tensors[f"layers.{index}.rotation"] = layer.rotation
            tensors[f"layers.{index}.query_gram"] = sums.query_gram
            tensors[f"layers.{index}.key_gram"] = sums.key_gram
            tensors[f"layers.{index}.key_sum"] = sums.key_sum
            tensors[f"layers.{index}.counts"] = torch.tensor([sums.query_count, sums.key_count])
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format_version": FORMAT_VERSION,
            "basis": self.basis,
            "model": self.model,
            "calibration": self.calibration,
        }
        metadata["sha256"] = _content_digest(metadata, tensors)
        write_atomically(path, safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata)}))

    @classmethod
    def load(cls, path: Path | str) -> Projections:
        """Read and check a file: format, shapes, dtypes, content digest, finiteness, orthogonality.

        Raises:
            AquaError: the file cannot be used; the message names what is wrong and the remedy.
        """
        path = Path(path)
        metadata, tensors = _read(path)
        try:
            model, calibration = metadata["model"], metadata["calibration"]
            shapes = [(int(i), int(groups), int(dim)) for i, _, groups, dim in model["shape"]["layers"]]
            basis, digest = str(metadata["basis"]), metadata.pop("sha256")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AquaError(f"{path}: its metadata is incomplete ({error!r}): {RECALIBRATE}") from error
        found_digest = _content_digest(metadata, tensors)
        layers, statistics = {}, {}
        for index, groups, dim in shapes:
            statistics[index], rotation = _take_layer(path, tensors, index, groups, dim)
            layers[index] = _layer_projection(statistics[index], rotation)
        if tensors:
            raise AquaError(f"{path}: holds tensors that do not belong in it ({min(tensors)}): {RECALIBRATE}")
        if found_digest != digest:
            raise AquaError(f"{path}: its content was changed after it was written: {RECALIBRATE}")
        return cls(layers, statistics, model, calibration, basis)


def _rotation(layer: LayerStatistics, basis: str) -> Tensor:
    """Orthogonal float32 matrix [num_key_value_heads, head_dim, head_dim]."""
    if basis not in BASES:
        raise AquaError(f"basis is {basis!r}: it must be one of {', '.join(BASES)}")
    if basis == "none":
        return torch.eye(layer.key_gram.shape[-1]).expand(layer.key_gram.shape).clone()
    if basis == "key-pca":
        mean = layer.key_sum / layer.key_count
        return _principal(layer.key_gram / layer.key_count - mean[:, :, None] * mean[:, None, :])
    # The right singular vectors of [Q; K] are the eigenvectors of Q^T Q + K^T K.
    return _principal(layer.query_gram + layer.key_gram)


def _principal(gram: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices as columns, largest eigenvalue first; float32."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)
    # An eigenvector's sign is free: fix it, so that the same statistics give the same file.
    largest = vectors.abs().argmax(-2, keepdim=True)
    return (vectors * vectors.gather(-2, largest).sign()).float()


def _layer_projection(layer: LayerStatistics, rotation: Tensor) -> LayerProjection:
    wide = rotation.double()

    def along(gram: Tensor) -> Tensor:
        return torch.einsum("gic,gij,gjc->gc", wide, gram, wide).clamp_min(0)

    energy = along(layer.query_gram + layer.key_gram).clamp_min(1e-300)
    return LayerProjection(
        rotation=rotation,
        key_rms=(along(layer.key_gram) / layer.key_count).sqrt().float(),
        query_rms=(along(layer.query_gram) / layer.query_count).sqrt().float(),
        energy=(energy / energy.sum(-1, keepdim=True)).float(),
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise AquaError(f"{path}: no such projections file: make one with `aqua calibrate MODEL -o {path}`")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AquaError(f"{path}: not a complete safetensors file ({error}): copy it again or {RECALIBRATE}") from error
    if raw is None:
        raise AquaError(f"{path}: a safetensors file, but not of AQUA projections: {RECALIBRATE}")
    try:
        metadata = json.loads(raw)
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise AquaError(f"{path}: its metadata is damaged ({error!r}): {RECALIBRATE}") from error
    if version != FORMAT_VERSION:
        raise AquaError(
            f"{path}: format version {version!r}, this library reads {FORMAT_VERSION}: upgrade aqua-attention or "
            f"{RECALIBRATE}"
        )
    return metadata, tensors


def _take_layer(
    path: Path, tensors: dict[str, Tensor], index: int, groups: int, dim: int
) -> tuple[LayerStatistics, Tensor]:
    """Take one layer's tensors out of `tensors`, checked; statistics and rotation."""

    def take(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        tensor = tensors.pop(f"layers.{index}.{name}", None)
        if tensor is None:
            raise AquaError(f"{path}: tensor layers.{index}.{name} is missing: {RECALIBRATE}")
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise AquaError(
                f"{path}: tensor layers.{index}.{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}: "
                f"{RECALIBRATE}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AquaError(f"{path}: tensor layers.{index}.{name} holds NaN or infinity: {RECALIBRATE}")
        return tensor

    rotation = take("rotation", torch.float32, groups, dim, dim)
    deviation = float((rotation.transpose(-1, -2) @ rotation - torch.eye(dim)).abs().max())
    if deviation > ORTHOGONALITY_TOLERANCE:
        raise AquaError(f"{path}: the rotation of layer {index} is not orthogonal ({deviation:.1e}): {RECALIBRATE}")
    queries, keys = take("counts", torch.int64, 2).tolist()
    if min(queries, keys) < 1:
        raise AquaError(f"{path}: layer {index} counts {queries} queries and {keys} keys: {RECALIBRATE}")
    statistics = LayerStatistics(
        query_gram=take("query_gram", torch.float64, groups, dim, dim),
        key_gram=take("key_gram", torch.float64, groups, dim, dim),
        key_sum=take("key_sum", torch.float64, groups, dim),
        query_count=queries,
        key_count=keys,
    )
    return statistics, rotation


def _content_digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
