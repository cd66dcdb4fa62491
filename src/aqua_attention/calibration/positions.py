# SPDX-License-Identifier: Apache-2.0
"""Short windows read at other positions, so that one basis serves short and long contexts.

Rotary positions are relative: a window that begins at position p gives the same hidden states as one that begins at 0,
and queries and keys turned to where they would lie in a long text. So the model itself moves them. Where its positions
change with the length of the text (longrope), it is refused.
"""

import inspect
import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.model import capture
from aqua_attention.model.limits import position_limit
from aqua_attention.model.sides import TEXT

PROBE = 32
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Relative change of hidden states that is rounding; other dtypes 0.1."""


def begins(
    model: PreTrainedModel, count: int, *, context: int, last: int | None, seed: int = 0
) -> list[int] | list[None]:
    """Where each of `count` windows begins: every other one at 0, the others spread evenly up to `last` - `context`.

    Short texts are what most users read, so that they weigh as much as all longer ones together.

    Args:
        last: positions go from 0 to this. None: the model counts them itself, and all are None.

    Raises:
        AquaError: more positions than the model knows, fewer than the window has, or positions that are not relative.
    """
    if last is None:
        return [None] * count
    limit = position_limit(model)
    if limit is not None and last > limit:
        raise AquaError(f"positions go to {last}: the model knows {limit}, choose at most that")
    if last < context:
        raise AquaError(f"positions go to {last}, and a window has {context}: choose at least that")
    room, spread = last - context, count // 2
    check_relative(model, room)
    places = [round(room * (place + 1) / spread) for place in range(spread)]
    random.Random(seed).shuffle(places)
    return [places[index // 2] if index % 2 else 0 for index in range(count)]


def placed(window: Tensor, begin: int | None) -> dict[str, Tensor]:
    """The inputs of one window that begins at a position."""
    if begin is None:
        return {"input_ids": window[None]}
    return {"input_ids": window[None], "position_ids": begin + torch.arange(len(window))[None]}


def check_relative(model: PreTrainedModel, moved: int) -> None:
    """Raise AquaError when a window reads otherwise where it begins at position `moved`."""
    layers = capture.attention_layers(model)
    decoder = capture.innermost_decoder(model, [layer for layer in layers if layer.side == TEXT])
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise AquaError(f"{type(model).__name__} takes no position_ids: leave positions out")
    text = torch.arange(PROBE) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), capture.evaluation_mode(model):
        states = [capture.run_encoder_or_decoder(model, layers, placed(text, at))[0].float() for at in (0, moved)]
    change = float((states[1] - states[0]).norm() / states[0].norm().clamp_min(1e-30))
    if not change <= TOLERANCE.get(model.dtype, 0.1):
        raise AquaError(
            f"positions of {type(model).__name__} are not relative (a window read at {moved} differs by {change:.0%}): "
            "leave positions out"
        )
