# SPDX-License-Identifier: Apache-2.0
"""Keys and values by token, and a copy of the keys by dimension that a decoding step scores (AQUA-Select).

A query scores all tokens and reads few. Scoring multiplies few dimensions of many keys, so the copy lies in tiles in
which each dimension is one run, in 8 bits: `codes[batch, head, tile, dimension, token]`. Reading takes whole keys and
values here and there, so these lie by token: a chosen token is one run of each. In 8 bits keys have the same codes as
the copy, in the other order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.layout import TILE, Device, Quantization, expect, quantized
from aqua_attention.ops.plan import LayerPlan

LEAST_SCALE = 1e-12
"""Of a channel, because a key that never varies is divided by it, too."""


@dataclass(frozen=True, eq=False)
class ScoredCache:
    """Rotated keys and values of a fixed largest length, and what is scored of the keys.

    Tensors are written to and never replaced: recorded steps know their addresses. What lies behind the end of a
    sequence is not looked at.

    Attributes:
        keys: [batch, num_key_value_heads, tiles * TILE, kept], rotated; values: likewise of value_dim. In 8 bits uint8.
        codes: uint8 [batch, num_key_value_heads, tiles, kept, TILE], in which 128 is zero.
        scales: bfloat16 [batch, num_key_value_heads, tiles * TILE], of the codes of a token.
        quantization: how codes are made of keys, `(code - 128) * scale * channel_scale + channel_mean`.
        lengths: int32 [batch], tokens of each sequence; negative: a row of padding, which takes none and gives zeros.
        max_length: tokens of a sequence at most.
        dtype: of queries, and of keys and values that are not in 8 bits.
        value_scales: as `scales`, of values in 8 bits, `(code - 128) * scale`; None: keys and values are as they came.
    """

    keys: Tensor
    values: Tensor
    codes: Tensor
    scales: Tensor
    quantization: Quantization
    lengths: Tensor
    max_length: int
    dtype: torch.dtype
    value_scales: Tensor | None = None

    @staticmethod
    def empty(
        batch: int,
        value_dim: int,
        max_length: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: Device,
        bits: int | None = None,
    ) -> ScoredCache:
        """Empty sequences; heads and the width of keys are those of the quantization. `bits`: 8 or None.

        Raises:
            AquaError: sizes that do not fit each other.
        """
        if min(batch, max_length) < 1:
            raise AquaError(f"batch is {batch} and max_length {max_length}: they must be 1 or more")
        kv_heads, kept = quantization.channel_scale.shape
        for name, tensor in zip(quantization._fields, quantization, strict=True):
            expect(f"quantization.{name}", tensor, torch.float32, (kv_heads, kept))
        tiles = -(-max_length // TILE)
        tokens, kind = (batch, kv_heads, tiles * TILE), dtype if bits is None else torch.uint8
        return ScoredCache(
            torch.zeros(*tokens, kept, dtype=kind, device=device),
            torch.zeros(*tokens, value_dim, dtype=kind, device=device),
            torch.zeros(batch, kv_heads, tiles, kept, TILE, dtype=torch.uint8, device=device),
            torch.zeros(tokens, dtype=torch.bfloat16, device=device),
            quantization,
            torch.zeros(batch, dtype=torch.int32, device=device),
            max_length,
            dtype,
            None if bits is None else torch.zeros(tokens, dtype=torch.bfloat16, device=device),
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Batch, num_key_value_heads, kept, value_dim, tiles of a sequence."""
        return (*self.keys.shape[:2], self.keys.shape[3], self.values.shape[3], self.codes.shape[2])

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Hold a prompt: rotated keys [batch, num_key_value_heads, length, kept], values likewise, of which the first
        lengths[b] of a sequence count.
        """
        count = keys.shape[2]
        for row in range(keys.shape[0]):
            self._write(row, slice(0, count), keys[row], values[row])
        self.lengths.copy_(lengths)

    def append(self, key: Tensor, value: Tensor) -> None:
        """One more token of each sequence, [batch, num_key_value_heads, width]. Where there is no room it is lost."""
        for row, length in enumerate(self.lengths.tolist()):
            if 0 <= length < self.max_length:
                self._write(row, slice(length, length + 1), key[row, :, None], value[row, :, None])
        self.lengths.add_((self.lengths >= 0).int()).clamp_(max=self.max_length)

    def _write(self, row: int, tokens: slice, keys: Tensor, values: Tensor) -> None:
        # Of keys in the dtype of the cache, so that what is scored follows from what is read.
        states = keys.to(self.dtype).float()
        states = (states - self.quantization.channel_mean[:, None]) / self.quantization.channel_scale[:, None]
        codes, self.scales[row, :, tokens] = quantized(states)
        at = torch.arange(tokens.start, tokens.stop, device=codes.device)
        self.codes[row][:, at // TILE, :, at % TILE] = codes.transpose(0, 1)
        if self.value_scales is not None:
            keys = codes
            values, self.value_scales[row, :, tokens] = quantized(values)
        self.keys[row, :, tokens], self.values[row, :, tokens] = keys, values

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and the keys as they are scored, of the first tokens of a sequence, float32
        [num_key_value_heads, length, width].
        """
        channel_scale, channel_mean = (each[:, None] for each in self.quantization)
        codes = self.codes[row].transpose(-1, -2).flatten(1, 2)[:, :length]
        scored = (codes.float() - 128) * self.scales[row, :, :length, None].float() * channel_scale + channel_mean
        keys, values = (each[row, :, :length].float() for each in (self.keys, self.values))
        if self.value_scales is None:
            return keys, values, scored
        keys = (keys - 128) * self.scales[row, :, :length, None].float() * channel_scale + channel_mean
        return keys, (values - 128) * self.value_scales[row, :, :length, None].float(), scored

    def check_step(self, query: Tensor, key: Tensor, value: Tensor, plan: LayerPlan) -> None:
        """Raise AquaError for a token of each sequence, or a plan, that no step over this cache takes."""
        batch, kv_heads, kept, value_dim, _ = self.shape
        heads, head_dim, dtype = query.shape[1], query.shape[-1], self.dtype
        for name, states, shape, kind in (
            ("query", query, (batch, heads // kv_heads * kv_heads, head_dim), dtype),
            ("key", key, (batch, kv_heads, head_dim), dtype),
            ("value", value, (batch, kv_heads, value_dim), dtype),
            ("rotation", plan.rotation, (kv_heads, head_dim, kept), torch.float32),
        ):
            if states.shape != shape or states.dtype != kind:
                raise AquaError(f"{name} is {states.dtype} {tuple(states.shape)}: it must be {kind} {shape}")
        config = plan.config
        if not config.chooses_tokens or config.score_bits != 8 or plan.is_adaptive:
            raise AquaError("a step that chooses tokens needs select_p or select_tokens, score_bits=8 and k_ratio")
        if config.share != "group" and heads != kv_heads:
            raise AquaError(f"share is {config.share!r}: dimensions are read for a group, set share='group'")


def score_quantization(plan: LayerPlan) -> Quantization:
    """What the codes of a layer's keys are made with, as `ops.tokens.scored_keys` has it."""
    assert plan.key_scale is not None and plan.key_mean is not None
    kept = plan.kept
    scale = plan.key_scale[:, :kept].float().clamp_min(LEAST_SCALE)
    return Quantization(scale.contiguous(), plan.key_mean[:, :kept].float().contiguous())
