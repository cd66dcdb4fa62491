# SPDX-License-Identifier: Apache-2.0
"""Inputs of a model: which sides of it they are for, and whether they hold padding."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.errors import AquaError
from aqua_attention.model.sides import IMAGES, TEXT, Inputs

_KEYS = {TEXT: "input_ids", IMAGES: "pixel_values"}
_MASKS = ("attention_mask", "pixel_attention_mask", "pixel_mask")


def given_sides(inputs: Sequence[Inputs]) -> set[str]:
    """The sides that have something to read in `inputs`, see `sides`."""
    return {side for side, key in _KEYS.items() if any(key in each for each in inputs)}


def padding(inputs: Inputs) -> str | None:
    """Which of the masks in `inputs` says that there is padding; None where there is none."""
    return next((name for name in _MASKS if name in inputs and not bool(inputs[name].all())), None)


def check_unpadded(inputs: Sequence[Inputs]) -> None:
    """Raise AquaError for padding, whose queries and keys would count like real ones."""
    for number, each in enumerate(inputs):
        if mask := padding(each):
            raise AquaError(
                f"input {number} is padded ({mask} is not all ones): "
                "give sequences and images without padding, one by one"
            )
