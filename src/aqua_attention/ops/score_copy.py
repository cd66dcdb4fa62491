# SPDX-License-Identifier: Apache-2.0
"""A copy in 8 bits, by dimension, of the keys of a growing cache: what a decoding step on a CPU scores (AQUA-Select).

A query scores few dimensions of all tokens. Keys by token would be read whole for that, in four times as many bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aqua_attention.ops.layout import TILE
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import score_quantization

SLACK = 40
"""Room is made for one part in so many more tokens, so that it is seldom made."""


class ScoreCopy:
    """Codes of keys, `code * scale * channel_scale + channel_mean`, as `ops.tokens.scored_keys` makes them.

    It follows the keys: the step that scores makes the codes of those that have none yet. So nothing is allocated where
    no step does, and what is written to a file needs no codes.

    Attributes:
        plan: whose keys they are; quantization: scale and mean of each channel, as its calibration has them.
        length: tokens that have codes.
        codes: int8 [batch, num_key_value_heads, tiles, kept, TILE]; None before the first.
        scales: bfloat16 [batch, num_key_value_heads, tiles * TILE], of the codes of a token.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan, self.quantization = plan, score_quantization(plan)
        self.length = 0
        self.codes: Tensor | None = None
        self.scales: Tensor | None = None

    def make_room(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Codes and scales with room for so many tokens; those that are held stay."""
        heads, kept = self.quantization.channel_scale.shape
        old, old_scales = self.codes, self.scales
        if old is not None and old_scales is not None:
            if old.shape[0] == batch and tokens <= old_scales.shape[2]:
                return old, old_scales
            self.length = self.length if old.shape[0] == batch else 0
        tiles = -(-(tokens + tokens // SLACK) // TILE)
        device = self.quantization.channel_scale.device
        codes = torch.zeros(batch, heads, tiles, kept, TILE, dtype=torch.int8, device=device)
        scales = torch.zeros(batch, heads, tiles * TILE, dtype=torch.bfloat16, device=device)
        if self.length and old is not None and old_scales is not None:
            codes[:, :, : old.shape[2]], scales[:, :, : old_scales.shape[2]] = old, old_scales
        self.codes, self.scales = codes, scales
        return codes, scales

    def keep(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.length = min(self.length, max(0, length))

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Reorder, select or repeat sequences (dimension 0), as the keys."""
        if self.codes is not None and self.scales is not None:
            self.codes, self.scales = function(self.codes).contiguous(), function(self.scales).contiguous()
