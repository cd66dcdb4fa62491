# SPDX-License-Identifier: Apache-2.0
"""One row of an evaluation: a configuration in a basis, attached to the model under test."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach.apply import Attachment, apply, layer_shape
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


@dataclass
class Multiplied:
    """Counts the dimensions that an attachment multiplies, outside the exact window; see `Attachment.on_selection`.

    Attributes:
        selected: by layer, dimensions multiplied, summed over queries; on the model's device, so that counting never
            waits for a GPU.
        selectable: by layer, head_dim summed over queries.
    """

    selected: dict[int, Tensor | int] = field(default_factory=dict)
    selectable: dict[int, int] = field(default_factory=dict)

    def count(self, layer: int, selected: Tensor | None, queries: torch.Size, head_dim: int) -> None:
        """Add one attention call."""
        rows = queries.numel() // queries[-1]
        chosen = rows * queries[-1] if selected is None else selected.sum()
        self.selected[layer] = self.selected.get(layer, 0) + chosen
        self.selectable[layer] = self.selectable.get(layer, 0) + rows * head_dim

    def share(self) -> float:
        """Dimensions multiplied over head_dim, mean over all queries of all layers."""
        return sum(int(count) for count in self.selected.values()) / sum(self.selectable.values())

    def share_per_layer(self) -> list[float]:
        """The same for each layer, by layer index."""
        return [int(self.selected[layer]) / self.selectable[layer] for layer in sorted(self.selected)]


def attachments(
    model: PreTrainedModel, projections: Projections, settings: Sequence[Setting], side: str = TEXT
) -> list[tuple[Attachment, Multiplied]]:
    """An attachment for each setting, not attached yet, and the counter that it reports to.

    Args:
        side: what is read under them, see `sides`.

    Raises:
        AquaError: as `apply`; projections of a vision-language model without the layers of that side.
    """
    others = {setting.basis for setting in settings} - {projections.basis}
    by_basis = {projections.basis: projections} | {basis: projections.with_basis(basis) for basis in others}
    made = []
    for setting in settings:
        attachment, multiplied = apply(model, by_basis[setting.basis], setting.config), Multiplied()
        attachment.on_selection = multiplied.count
        made.append((attachment, multiplied))
        check_covered(model, attachment.sides, (side,))
    return made


def check_covered(model: PreTrainedModel, covered: Collection[str], read: Collection[str]) -> None:
    """Raise AquaError when the projections cover no layer of any side that is read, see `sides`."""
    if not set(covered) & set(read):
        side = " and ".join(sorted(read))
        raise AquaError(
            f"the projections have no layers that read {side}: calibrate {type(model).__name__} on {side}, and "
            "join the two files by `aqua merge`"
        )


def as_attached(settings: Sequence[Setting], runs: Sequence[tuple[Attachment, Multiplied]]) -> list[Setting]:
    """The settings with what `apply` has made of them: a `min_length` of "auto" is a number."""
    return [replace(setting, config=run.config) for setting, (run, _) in zip(settings, runs, strict=True)]


def resolved_settings(model: PreTrainedModel, settings: Sequence[Setting]) -> list[Setting]:
    """The settings with a number for a `min_length` of "auto", as `apply` reads it, each once.

    Raises:
        AquaError: nothing is known of this machine, see `machine.resolved`.
    """
    if all(setting.config.min_length != AUTO for setting in settings):
        return list(settings)
    shapes = [layer_shape(layer, model.dtype) for layer in attention_layers(model)]
    return list(dict.fromkeys(replace(setting, config=resolved(setting.config, shapes)) for setting in settings))
