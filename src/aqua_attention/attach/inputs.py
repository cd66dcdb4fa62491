# SPDX-License-Identifier: Apache-2.0
"""What a forward pass of a decoder is given, and what is put into it."""

from typing import Any

import torch
from torch import Tensor

from aqua_attention.attach.coverage import Inputs
from aqua_attention.attach.rehearsal import is_recorded


def put(parameters: list[str], name: str, value: Any, inputs: Inputs) -> Inputs:
    """The inputs of a function of these parameters, with another value of one of them."""
    args, kwargs = inputs
    place = parameters.index(name)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, kwargs | {name: value}


def tokens_of(given: dict[str, Any]) -> Tensor | None:
    """The new tokens, [batch, tokens] or [batch, tokens, width]; None where there are none."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    return tokens if isinstance(tokens, Tensor) else None


def positions_of(given: dict[str, Any]) -> Tensor | None:
    """Positions of the new tokens, counted from the first real one of their row; None where that is not known.

    A model that is given none counts padding on the left, too. Dense attention sees distances only, and these stay. But
    AQUA chooses dimensions of queries as they are at their position. Nobody is asked whether there is padding: a GPU
    would have to be waited for.
    """
    tokens, mask, cache = tokens_of(given), given.get("attention_mask"), given.get("past_key_values")
    if given.get("position_ids") is not None or tokens is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    before, new = 0 if cache is None else cache.get_seq_length(), tokens.shape[1]
    if not isinstance(before, Tensor) and before + new > mask.shape[1]:
        return None
    padding = mask.to(device=tokens.device, dtype=torch.bool).to(torch.uint8).argmax(-1, keepdim=True)
    own = torch.arange(new, device=tokens.device) + (before.to(tokens.device) if isinstance(before, Tensor) else before)
    return (own - padding).clamp(min=0)


def is_captured() -> bool:
    """Whether this call is being compiled or recorded, when lengths cannot be looked at."""
    if torch.compiler.is_compiling() or is_recorded():
        return True
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
