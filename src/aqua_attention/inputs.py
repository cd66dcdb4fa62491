# SPDX-License-Identifier: Apache-2.0
"""What a list of inputs is for: the sides of a model that read it."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.sides import IMAGES, TEXT, Inputs

_KEYS = {TEXT: "input_ids", IMAGES: "pixel_values"}


def given_sides(inputs: Sequence[Inputs]) -> set[str]:
    """The sides that have something to read in `inputs`, see `sides`."""
    return {side for side, key in _KEYS.items() if any(key in each for each in inputs)}
