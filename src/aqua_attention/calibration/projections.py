# SPDX-License-Identifier: Apache-2.0
"""Projections: the rotation of every layer and key-value head, from calibration statistics; one file for both."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.calibration.statistics import LayerStatistics, Statistics, merge, named_tensors, take_layer
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError, brief
from aqua_attention.io.tensors import Stored, begins_as_safetensors, write_tensors
from aqua_attention.model.capture import AttentionLayer
from aqua_attention.model.fingerprint import describe_shape, key_weight_digest, layer_rows, other_weights, shape_of
from aqua_attention.model.sides import TEXT
from aqua_attention.ops.plan import LayerPlan

KIND = "aqua_attention"
BASES = ("aqua", "svd", "none", "key-pca")
SVD, LEARNED, TUNED = "svd", "learned", "tuned"
ORTHOGONALITY_TOLERANCE = 1e-4
RECALIBRATE = "calibrate again with `aqua calibrate`"


@dataclass(frozen=True, repr=False)
class LayerProjection:
    """The basis of one layer, and how large queries and keys are along each of its dimensions.

    Attributes:
        rotation: orthogonal, [num_key_value_heads, head_dim, head_dim]; columns by falling energy, of a
            learned basis by what dropping them would cost; float32.
        key_rms, query_rms: root mean square of rotated keys and queries over the calibration text, not centred,
            [num_key_value_heads, head_dim]; float32.
        key_mean, key_std: mean and standard deviation of rotated keys, [num_key_value_heads, head_dim]; float32.
        key_spread: what "weighted" selection and `logit_error` read, [num_key_value_heads, head_dim]; float32. It is
            `key_rms`; in a learned basis how keys vary under attention, as long as `key_rms` for each head.
        energy: share of the squared length of queries and keys together along each dimension,
            [num_key_value_heads, head_dim]; sums to 1; float32.
    """

    rotation: Tensor
    key_rms: Tensor
    key_mean: Tensor
    key_std: Tensor
    query_rms: Tensor
    key_spread: Tensor
    energy: Tensor

    def __repr__(self) -> str:
        heads, head_dim = self.key_rms.shape
        return f"<LayerProjection: {heads} key-value heads of {head_dim}>"

    def plan(self, config: AquaConfig, device: torch.device | str = "cpu", **facts: Any) -> LayerPlan:
        """What AQUA does in this layer, its tensors on `device`; `facts` are further fields, as `index` or `causal`."""
        head_dim = self.rotation.shape[-1]
        kept = config.kept_dims(head_dim)
        # Tokens of an exact window keep every dimension.
        width = head_dim if config.sink + config.recent > 0 else kept
        rotation = self.rotation[..., :width].contiguous().to(device)
        spread, scale, mean = (
            each[..., :kept].contiguous().to(device) for each in (self.key_spread, self.key_std, self.key_mean)
        )
        return LayerPlan(rotation, spread, config, head_dim**-0.5, key_scale=scale, key_mean=mean, **facts)


@dataclass(frozen=True, repr=False)
class Projections:
    """Rotations for all attention layers of one model, with the statistics they come from.

    Attributes:
        layers: the rotation of each attention layer and what is known of it, by layer index, see `LayerProjection`.
        statistics: the calibration sums (float64), by layer index.
        model: what the projections fit: `shape` (see `fingerprint.shape_of`), `key_weights` (digest or None), `name`.
        calibration: provenance: `text_sha256`, `tokens`, `context`, `seed`, `library_version`.
        basis: "aqua", the singular vectors, or "learned"; for comparison "none", the model's own dimensions, or
            "key-pca", the principal components of the centred keys alone.
    """

    layers: dict[int, LayerProjection]
    statistics: Statistics
    model: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    basis: str = "aqua"

    def __repr__(self) -> str:
        name, tokens = self.model.get("name"), self.calibration.get("tokens")
        of_model = f"{name} ({self.fits})" if name else self.fits
        return f"<Projections of {of_model}; basis {self.basis}; calibrated on {tokens} tokens>"

    @classmethod
    def of(cls, given: Any) -> Projections:
        """Projections as `apply` takes them: these, or the path of their file. An AquaError for anything else."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str | os.PathLike):
            return cls.load(Path(given))
        raise AquaError(f"projections is {brief(given)}: give what `aqua.calibrate` returned, or the path of its file")

    @classmethod
    def from_statistics(
        cls, statistics: Statistics, model: dict[str, Any], calibration: dict[str, Any], basis: str = "aqua"
    ) -> Projections:
        """Decompose the statistics of every layer (paper, section 3: SVD of the stacked queries and keys)."""
        for index, layer in statistics.items():
            layer.check_finite(index)
        layers = {index: layer_projection(layer, _rotation(layer, basis)) for index, layer in statistics.items()}
        return cls(layers, statistics, model, calibration, basis)

    def with_basis(self, basis: str) -> Projections:
        """The same calibration in another basis.

        Args:
            basis: "aqua", as calibrated; "svd", the singular vectors, though others were learned; "none", not rotated,
                as SparQ; "key-pca", as Loki.

        Raises:
            AquaError: there is no such basis, or these projections were not learned.
        """
        name = "aqua" if basis == "svd" else basis
        own = self.basis in (basis, name) or (basis == "aqua" and self.basis == LEARNED)
        if not own and basis == LEARNED:
            raise AquaError("these projections were not learned: calibrate with --basis learned")
        calibration = {fact: value for fact, value in self.calibration.items() if fact != LEARNED}
        return self if own else Projections.from_statistics(self.statistics, self.model, calibration, name)

    @property
    def fits(self) -> str:
        """The model that these are for, in a readable line."""
        return describe_shape(self.model["shape"])

    def merged(self, other: Projections | Path | str) -> Projections:
        """As if one calibration had read both texts: the sums are added and decomposed again.

        Calibrations of different layers of one model, such as those of text and of images, become one of all layers.

        Raises:
            AquaError: the two are not of the same model, or not in the same basis.
        """
        other = Projections.of(other)
        shapes = [part.model["shape"] for part in (self, other)]
        are_parts = _are_parts(*shapes)
        # As far as both name their layers.
        known = {"model_type", "layers", *(shapes[0].keys() & shapes[1].keys())}
        if not are_parts and any(shapes[0].get(key) != shapes[1].get(key) for key in known):
            said = [describe_shape(shape) for shape in shapes]
            if said[0] == said[1]:
                names = [map(str, shape.get("names") or [row[0] for row in shape["layers"]]) for shape in shapes]
                said = [f"{text} (layers {', '.join(each)})" for text, each in zip(said, names, strict=True)]
            raise AquaError(
                f"projections of different models ({' and '.join(said)}) cannot be merged: give files of one"
            )
        bases = {self.basis, other.basis}
        if len(bases) > 1 and not (are_parts and bases == {"aqua", LEARNED}):
            verb = "joined" if are_parts else "merged"
            raise AquaError(
                f"projections in the bases {self.basis} and {other.basis} cannot be {verb}: calibrate both in one basis"
            )
        if LEARNED in bases and not are_parts:
            raise AquaError("learned projections cannot be merged: learn on both texts with `aqua calibrate`")
        parts = [self.calibration, other.calibration]
        sums = {name: sum(part.get(name, 0) for part in parts) for name in ("tokens", "inputs", "images")}
        read = {name: sums[name] for name in sums if name == "tokens" or any(name in part for part in parts)}
        read |= {"merged": parts}
        if are_parts:
            return self._joined(other, read)
        if difference := other_weights(*(part.model.get("key_weights") for part in (self, other))):
            raise AquaError(
                f"projections of different weights (key weights differ by {difference:.1%}) cannot be merged: "
                "calibrate both on the same checkpoint"
            )
        if _texts(parts[0]) & _texts(parts[1]):
            warnings.warn(
                "both were calibrated on the same text, which counts twice now: merge calibrations of different texts",
                stacklevel=2,
            )
        calibration = {key: value for key, value in parts[0].items() if parts[1].get(key) == value} | read
        # A file of all layers may name them or not.
        named = other.model if "names" in shapes[1] else self.model
        return Projections.from_statistics(merge(self.statistics, other.statistics), named, calibration, self.basis)

    def _joined(self, other: Projections, read: dict[str, Any]) -> Projections:
        """The layers of both, which are parts of one model."""
        names = [part.model.get("name") for part in (self, other)]
        if all(names) and names[0] != names[1]:
            # Nothing else tells: they have no layer in common. A model can go by two names, so that this is no error.
            warnings.warn(
                f"the projections joined were calibrated on {names[0]!r} and on {names[1]!r}: they are for one model "
                "only if these are the same",
                stacklevel=3,
            )
        layers: list[tuple[Any, ...]] = []
        for model in (self.model, other.model):
            shape = model["shape"]
            weights = model.get("key_weights") or [None] * len(shape["layers"])
            layers += zip(shape["layers"], shape["names"], weights, strict=True)
        rows, names, weights = map(list, zip(*sorted(layers, key=lambda layer: layer[0][0]), strict=True))
        shape = {"model_type": self.model["shape"]["model_type"], "layers": rows, "names": names}
        learned = [part.calibration[LEARNED] for part in (self, other) if LEARNED in part.calibration]
        if learned:
            held = {index: facts for each in learned for index, facts in each["held_out"].items()}
            read = read | {LEARNED: learned[0] | {"held_out": held}}
        return Projections(
            dict(sorted((self.layers | other.layers).items())),
            dict(sorted((self.statistics | other.statistics).items())),
            self.model | {"shape": shape, "key_weights": None if None in weights else weights},
            read,
            LEARNED if learned else self.basis,
        )

    def covered(self, layers: list[AttentionLayer]) -> list[AttentionLayer]:
        """Those of a model's layers that the projections are for: all, or those that the file names.

        A file without names can be of the text layers of a model that has image layers too: it was calibrated on that
        part alone, or before AQUA saw any other.
        """
        names = self.model["shape"].get("names")
        if names is not None:
            return [layer for layer in layers if layer.name in names]
        text = [layer for layer in layers if layer.side == TEXT]
        return text if layer_rows(text) == [list(row) for row in self.model["shape"]["layers"]] else layers

    def check_model(self, model: PreTrainedModel, layers: list[AttentionLayer]) -> list[list[float]] | None:
        """The digest of the key weights of the `covered` layers, see `fingerprint.key_weight_digest`.

        An AquaError when the projections do not fit; a warning when the model's key weights differ.
        """
        layers = self.covered(layers)
        shape = shape_of(model, layers, named="names" in self.model["shape"])
        if all(layer.side == TEXT for layer in layers):
            # The language part of a vision-language model also goes alone, under a type of its own.
            alone = shape | {"model_type": model.config.get_text_config().model_type}
            shape = alone if alone == self.model["shape"] else shape
        if shape != self.model["shape"]:
            raise AquaError(
                f"these projections are for {describe_shape(self.model['shape'])}, the model is "
                f"{describe_shape(shape)}: calibrate this model with `aqua calibrate`"
            )
        found = key_weight_digest(layers)
        if difference := other_weights(self.model.get("key_weights"), found):
            warnings.warn(
                f"the projections were calibrated on other weights of the same shape (key weights differ by "
                f"{difference:.1%}): results are valid but lose more; {RECALIBRATE} for this model",
                stacklevel=5,
            )
        return found

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, whole or not at all.

        Tensors of each layer: `rotation` (float32), `query_gram`, `key_gram` and `key_sum` (float64), `counts` (int64),
        and of a learned basis `key_spread` (float32).

        Raises:
            AquaError: the file cannot be written.
        """
        rotations = {f"layers.{index}.rotation": layer.rotation for index, layer in self.layers.items()}
        if self.basis == LEARNED:
            rotations |= {f"layers.{index}.key_spread": layer.key_spread for index, layer in self.layers.items()}
        header = {"basis": self.basis, "model": self.model, "calibration": self.calibration}
        write_tensors(path, KIND, header, rotations | named_tensors(self.statistics))

    @classmethod
    def load(cls, path: Path | str) -> Projections:
        """Read and check a file: format, shapes, dtypes, content digest, finiteness, orthogonality.

        Raises:
            AquaError: there is no such file, or a check fails; the message says which.
        """
        path = Path(path)
        if path.is_dir():
            raise AquaError(f"{path} is a folder: give the file that `aqua calibrate` wrote")
        if not path.is_file():
            raise AquaError(f"{path}: no such projections file: make one with `aqua calibrate MODEL -o {path}`")
        if not begins_as_safetensors(path):
            raise AquaError(f"{path} is no projections file: make one with `aqua calibrate MODEL -o NAME.safetensors`")
        stored = Stored(path, KIND, what="AQUA projections", remedy=RECALIBRATE)
        try:
            model, calibration, basis = (stored.header[key] for key in ("model", "calibration", "basis"))
            shapes = [(int(index), int(kv_heads), int(dim)) for index, _, kv_heads, dim in model["shape"]["layers"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise stored.error(f"its metadata is incomplete ({error!r})") from error
        layers, statistics = {}, {}
        for index, kv_heads, dim in shapes:
            rotation = stored.take(f"layers.{index}.rotation", torch.float32, kv_heads, dim, dim)
            deviation = float((rotation.transpose(-1, -2) @ rotation - torch.eye(dim)).abs().max())
            if deviation > ORTHOGONALITY_TOLERANCE:
                raise stored.error(f"the rotation of layer {index} is not orthogonal ({deviation:.1e})")
            statistics[index] = take_layer(stored, index, kv_heads, dim)
            named = f"layers.{index}.key_spread"
            spread = stored.take(named, torch.float32, kv_heads, dim) if basis == LEARNED else None
            layers[index] = layer_projection(statistics[index], rotation, spread)
        stored.finish()
        return cls(layers, statistics, model, calibration, str(basis))


def spectrum(projections: Projections) -> list[dict[str, Any]]:
    """How few dimensions could hold 90% and 99% of the energy of queries and keys, whatever the basis.

    A row a layer: `layer`, `head_dim`, and for each key-value head `dims_90` and `dims_99`. Of a learned basis also
    `held_out`, the loss of what was held out relative to the singular vectors', and `origin` of the rotation.
    """
    rows = []
    held = projections.calibration.get(LEARNED, {}).get("held_out", {})
    for index, layer in projections.layers.items():
        cumulated = layer.energy.double().sort(-1, descending=True).values.cumsum(-1)
        dims = {f"dims_{share}": ((cumulated < share / 100).sum(-1) + 1).tolist() for share in (90, 99)}
        learned = {"held_out": found["loss"], "origin": found["from"]} if (found := held.get(str(index))) else {}
        rows.append({"layer": index, "head_dim": layer.energy.shape[-1], **dims, **learned})
    return rows


def _texts(calibration: dict[str, Any]) -> set[str]:
    """Digests of all that was read, also by the parts of what was merged before."""
    own = {calibration[name] for name in ("text_sha256", "inputs_sha256") if name in calibration}
    return own.union(*map(_texts, calibration.get("merged", ())))


def _are_parts(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two shapes are of different layers of one model."""
    if first["model_type"] != second["model_type"] or "names" not in first or "names" not in second:
        return False
    indices = [{row[0] for row in shape["layers"]} for shape in (first, second)]
    return not indices[0] & indices[1] and not set(first["names"]) & set(second["names"])


def check_basis(basis: str) -> None:
    """Raise AquaError when there is no such basis."""
    if basis not in BASES:
        raise AquaError(f"basis is {basis!r}: it must be one of {', '.join(BASES)}")


def _rotation(layer: LayerStatistics, basis: str) -> Tensor:
    """Orthogonal float32 matrix [num_key_value_heads, head_dim, head_dim]."""
    check_basis(basis)
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


def layer_projection(layer: LayerStatistics, rotation: Tensor, key_spread: Tensor | None = None) -> LayerProjection:
    """All that a layer's statistics say of a rotation; a `key_spread` of None is `key_rms`."""
    wide = rotation.double()

    def along(gram: Tensor) -> Tensor:
        return torch.einsum("gic,gij,gjc->gc", wide, gram, wide).clamp_min(0)

    mean = torch.einsum("gi,gic->gc", layer.key_sum / layer.key_count, wide)
    square = along(layer.key_gram) / layer.key_count
    # A channel that hardly varied in calibration may vary in use: a scale of next to nothing would cost all others.
    std = (square - mean.square()).clamp_min(0).sqrt()
    std = std.maximum(1e-3 * std.amax(-1, keepdim=True)).clamp_min(1e-30)
    energy = along(layer.query_gram + layer.key_gram).clamp_min(1e-300)
    return LayerProjection(
        rotation=rotation,
        key_rms=square.sqrt().float(),
        key_spread=square.sqrt().float() if key_spread is None else key_spread,
        key_mean=mean.float(),
        key_std=std.float(),
        query_rms=(along(layer.query_gram) / layer.query_count).sqrt().float(),
        energy=(energy / energy.sum(-1, keepdim=True)).float(),
    )
