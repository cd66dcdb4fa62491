# SPDX-License-Identifier: Apache-2.0
"""One row of an evaluation: a configuration in a basis, attached to the model under test."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach.apply import apply, layer_shape
from aqua_attention.calibration.projections import Projections, check_basis
from aqua_attention.config import AUTO, AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.machine import resolved
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.sides import TEXT


@dataclass(frozen=True)
class Setting:
    """The knobs, and the basis they work in, see `Projections.with_basis`."""

    config: AquaConfig
    basis: str = "aqua"

    def __post_init__(self) -> None:
        check_basis(self.basis)


class Run:
    """A setting ready to be attached, and how many dimensions it multiplies, see `Attachment.on_selection`.

    Attributes:
        setting: as it is attached: a `min_length` of "auto" is a number.
        attachment: not attached yet.
    """

    def __init__(self, model: PreTrainedModel, projections: Projections, setting: Setting) -> None:
        """`projections` are in the setting's basis."""
        self.attachment = apply(model, projections, setting.config)
        self.attachment.on_selection = self._count
        self.setting = replace(setting, config=self.attachment.config)
        # By layer, summed over queries; the first on the model's device, so that counting never waits for a GPU.
        self._selected: dict[int, Tensor | int] = {}
        self._selectable: dict[int, int] = {}

    def _count(self, layer: int, selected: Tensor | None, queries: torch.Size, head_dim: int) -> None:
        rows = queries.numel() // queries[-1]
        chosen = rows * queries[-1] if selected is None else selected.sum()
        self._selected[layer] = self._selected.get(layer, 0) + chosen
        self._selectable[layer] = self._selectable.get(layer, 0) + rows * head_dim

    def head(self) -> dict[str, Any]:
        """How the row of every evaluation begins: `setting` (the AquaConfig's fields) and `basis`."""
        return {"setting": self.setting.config.to_dict(), "basis": self.setting.basis}

    def mean_k(self) -> float:
        """Share of head_dim that was multiplied outside the exact window, mean over all queries of all layers."""
        return sum(int(count) for count in self._selected.values()) / sum(self._selectable.values())

    def mean_ks(self) -> dict[str, Any]:
        """`mean_k`, and `mean_k_per_layer`, the same for each layer as a list."""
        layers = [int(self._selected[layer]) / self._selectable[layer] for layer in sorted(self._selected)]
        return {"mean_k": self.mean_k(), "mean_k_per_layer": layers}


def runs_of(
    model: PreTrainedModel, projections: Projections, settings: Sequence[Setting], side: str = TEXT
) -> list[Run]:
    """A run for each setting.

    Args:
        side: what is read under them, see `sides`.

    Raises:
        AquaError: as `apply`; projections of a vision-language model without the layers of that side.
    """
    by_basis = {basis: in_basis(projections, basis) for basis in {setting.basis for setting in settings}}
    runs = []
    for setting in settings:
        runs.append(Run(model, by_basis[setting.basis], setting))
        check_covered(model, runs[-1].attachment.sides, (side,))
    return runs


def in_basis(projections: Projections, basis: str) -> Projections:
    """Projections in a basis; themselves, if that is theirs."""
    return projections if basis == projections.basis else projections.with_basis(basis)


def check_covered(model: PreTrainedModel, covered: Collection[str], read: Collection[str]) -> None:
    """Raise AquaError when the projections cover no layer of any side that is read, see `sides`."""
    if not set(covered) & set(read):
        side = " and ".join(sorted(read))
        raise AquaError(
            f"the projections have no layers that read {side}: calibrate {type(model).__name__} on {side}, and "
            "join the two files by `aqua merge`"
        )


def resolved_settings(model: PreTrainedModel, settings: Sequence[Setting]) -> list[Setting]:
    """The settings with a number for a `min_length` of "auto", as `apply` reads it, each once.

    Raises:
        AquaError: nothing is known of this machine, see `machine.resolved`.
    """
    if all(setting.config.min_length != AUTO for setting in settings):
        return list(settings)
    shapes = [layer_shape(layer, model.dtype) for layer in attention_layers(model)]
    return list(dict.fromkeys(replace(setting, config=resolved(setting.config, shapes)) for setting in settings))
