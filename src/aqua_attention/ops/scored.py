# SPDX-License-Identifier: Apache-2.0
"""Keys and values by token, and a copy of the keys by dimension that a decoding step scores (AQUA-Select).

A query scores all tokens and reads few. Scoring multiplies few dimensions of many keys, so the copy lies in tiles in
which each dimension is one run, in 8 or 4 bits: `codes[batch, head, tile, dimension, token]`. Reading takes whole keys
and values here and there, so these lie by token: a chosen token is one run of each. In 8 bits keys have the same codes
as a copy in 8 bits, in the other order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.layout import TILE, Device, Quantization, expect, quantized
from aqua_attention.ops.plan import LayerPlan

SCORED_BITS = (8, 4)
"""That the copy of such a cache can have."""
FEW_BITS_LARGEST = 7
"""Codes of 4 bits go from minus this to this."""
LEAST_SCALE = 1e-12
"""Of a channel, because a key that never varies is divided by it, too."""
MOST_AT_ONCE = 1 << 25
"""Numbers of a prompt's keys that are rounded at once: they are in float32 meanwhile."""


@dataclass(frozen=True, eq=False)
class ScoredCache:
    """Rotated keys and values of a fixed largest length, and what is scored of the keys.

    Tensors are written to and never replaced: recorded steps know their addresses. What lies behind the end of a
    sequence is not looked at.

    Attributes:
        keys: [batch, num_key_value_heads, tiles * TILE, kept], rotated; values: likewise of value_dim. In 8 bits uint8.
        codes: uint8 [batch, num_key_value_heads, tiles, kept, TILE], in which 128 is zero. In 4 bits 8 is, and the last
            dimension is half as long: byte j has token 2j in its low bits and token 2j + 1 in its high ones.
        scales: bfloat16 [batch, num_key_value_heads, tiles * TILE], of the codes of a token.
        quantization: how codes are made of keys, `(code - zero) * scale * channel_scale + channel_mean`.
        lengths: int32 [batch], tokens of each sequence; negative: a row of padding, which takes none and gives zeros.
        max_length: tokens of a sequence at most.
        dtype: of queries, and of keys and values that are not in 8 bits.
        value_scales: as `scales`, of values in 8 bits, `(code - 128) * scale`; None: keys and values are as they came.
        rotated_from: as in `TiledCache`; all keys are rotated.
        memory: what kernels work in between the start and the end of a step. Caches whose steps follow one another, as
            those of a model's layers, may share it.
        score_bits: of `codes`, 8 or 4.
        own_scales: as `scales`, of keys in 8 bits beside a copy in 4; None: `scales` are theirs, or they have none.
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
    memory: dict[Any, Any] = field(default_factory=dict)
    score_bits: int = 8
    own_scales: Tensor | None = None
    rotated_from: ClassVar[int] = 0

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
        score_bits: int = 8,
        memory: dict[Any, Any] | None = None,
    ) -> ScoredCache:
        """Empty sequences; heads and the width of keys are those of the quantization. `bits`: 8 or None. `memory`:
        None for its own.

        Raises:
            AquaError: sizes that do not fit each other.
        """
        if min(batch, max_length) < 1:
            raise AquaError(f"batch is {batch} and max_length {max_length}: they must be 1 or more")
        if score_bits not in SCORED_BITS:
            raise AquaError(f"score_bits is {score_bits}: a copy that kernels score has 8 or 4")
        kv_heads, kept = quantization.channel_scale.shape
        for name, tensor in zip(quantization._fields, quantization, strict=True):
            expect(f"quantization.{name}", tensor, torch.float32, (kv_heads, kept))
        tiles = -(-max_length // TILE)
        tokens, kind = (batch, kv_heads, tiles * TILE), dtype if bits is None else torch.uint8

        def scales() -> Tensor:
            return torch.zeros(tokens, dtype=torch.bfloat16, device=device)

        return ScoredCache(
            torch.zeros(*tokens, kept, dtype=kind, device=device),
            torch.zeros(*tokens, value_dim, dtype=kind, device=device),
            torch.zeros(batch, kv_heads, tiles, kept, TILE * score_bits // 8, dtype=torch.uint8, device=device),
            scales(),
            quantization,
            torch.zeros(batch, dtype=torch.int32, device=device),
            max_length,
            dtype,
            None if bits is None else scales(),
            {} if memory is None else memory,
            score_bits,
            scales() if bits is not None and score_bits < bits else None,
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Batch, num_key_value_heads, kept, value_dim, tiles of a sequence."""
        return (*self.keys.shape[:2], self.keys.shape[3], self.values.shape[3], self.codes.shape[2])

    @property
    def block_size(self) -> int:
        """Tokens that lie together."""
        return TILE

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.lengths.device

    @property
    def bits(self) -> int | None:
        """Of keys and values that are read; None: as they came."""
        return None if self.value_scales is None else 8

    @property
    def key_scales(self) -> Tensor | None:
        """Of keys in 8 bits; None where they are as they came."""
        if self.value_scales is None:
            return None
        return self.scales if self.own_scales is None else self.own_scales

    def clear(self) -> None:
        """Forget all tokens; nothing is allocated anew."""
        self.lengths.zero_()

    def enlarged(self, max_length: int) -> ScoredCache:
        """A cache with room for more tokens that holds the same ones, at other addresses."""
        assert max_length >= self.max_length
        given: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "bits": self.bits, "memory": self.memory}
        given["score_bits"] = self.score_bits
        larger = ScoredCache.empty(self.shape[0], self.shape[3], max_length, self.quantization, **given)
        for new, old in zip(larger._by_token(), self._by_token(), strict=True):
            new[:, :, : old.shape[2]] = old
        larger.lengths.copy_(self.lengths)
        return larger

    def take(self, rows: Tensor) -> None:
        """Hold the sequences of these indices, one for each there was; an AquaError for another number of them."""
        if len(rows) != len(self.lengths):
            raise AquaError(f"{len(rows)} sequences cannot take the places of {len(self.lengths)}: give as many")
        for states in (*self._by_token(), self.lengths):
            states.copy_(states.index_select(0, rows))

    def _by_token(self) -> list[Tensor]:
        """All that has tokens, or tiles of them, in dimension 2."""
        states = (self.keys, self.values, self.codes, self.scales, self.value_scales, self.own_scales)
        return [each for each in states if each is not None]

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Hold a prompt: rotated keys [batch, num_key_value_heads, length, kept], values likewise, of which the first
        lengths[b] of a sequence count. Nothing waits for a GPU.

        Raises:
            AquaError: keys and values that do not fit.
        """
        batch, kv_heads, kept, value_dim, _ = self.shape
        count = keys.shape[2]
        shapes = (batch, kv_heads, count, kept), (batch, kv_heads, count, value_dim)
        if (keys.shape, values.shape) != shapes or count > self.max_length:
            raise AquaError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit a cache of keys "
                f"{(batch, kv_heads, self.max_length, kept)} and value_dim {value_dim}"
            )
        tiles = max(1, MOST_AT_ONCE // (batch * kv_heads * kept * TILE))
        for start in range(0, count, tiles * TILE):
            part = slice(start, min(count, start + tiles * TILE))
            codes = self._hold(slice(None), part, keys[:, :, part], values[:, :, part])
            whole = F.pad(codes, (0, 0, 0, -codes.shape[2] % TILE)).unflatten(2, (-1, TILE)).transpose(-1, -2)
            whole = whole if self.score_bits == 8 else packed(whole)
            self.codes[:, :, start // TILE : start // TILE + whole.shape[2]] = whole
        self.lengths.copy_(lengths)

    def append(self, key: Tensor, value: Tensor) -> None:
        """One more token of each sequence, [batch, num_key_value_heads, width]. Where there is no room it is lost."""
        for row, length in enumerate(self.lengths.tolist()):
            if 0 <= length < self.max_length:
                at, one = slice(length, length + 1), slice(row, row + 1)
                codes = self._hold(one, at, key[one, :, None], value[one, :, None])[0, :, 0]
                tile, place = self.codes[row, :, length // TILE], length % TILE
                if self.score_bits == 4:
                    # The other half of the byte is a neighbour's.
                    held, place, is_odd = tile[..., place // 2], place // 2, place % 2
                    codes = held & 15 | codes << 4 if is_odd else held & 240 | codes
                tile[..., place] = codes
        self.lengths.add_((self.lengths >= 0).int()).clamp_(max=self.max_length)

    def _hold(self, rows: slice, tokens: slice, keys: Tensor, values: Tensor) -> Tensor:
        """Write what lies by token of some tokens of some sequences, and return the codes of their copy, by token."""
        # Of keys in the dtype of the cache, so that what is scored follows from what is read.
        scale, mean = (each[:, None] for each in self.quantization)
        states = (keys.to(self.dtype).float() - mean) / scale
        codes, self.scales[rows, :, tokens] = coded(states, self.score_bits)
        if self.value_scales is not None:
            keys = codes
            values, self.value_scales[rows, :, tokens] = quantized(values)
        if self.own_scales is not None:
            keys, self.own_scales[rows, :, tokens] = quantized(states)
        self.keys[rows, :, tokens], self.values[rows, :, tokens] = keys, values
        return codes

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and the keys as they are scored, of the first tokens of a sequence, float32
        [num_key_value_heads, length, width].
        """
        codes = self.codes[row] if self.score_bits == 8 else unpacked(self.codes[row])
        codes = codes.transpose(-1, -2).flatten(1, 2)[:, :length]
        scales = self.scales[row, :, :length]
        return *self._widened(row, length), self._keys_of(codes, scales, zero_of(self.score_bits))

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all sequences in the dtype of the cache, [batch, num_key_value_heads, longest, width].

        What is behind the end of a shorter one means nothing.
        """
        longest = max(0, int(self.lengths.max()))
        if self.value_scales is None:
            return self.keys[:, :, :longest], self.values[:, :, :longest]
        keys, values = self._widened(slice(None), longest)
        return keys.to(self.dtype), values.to(self.dtype)

    def _widened(self, rows: int | slice, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens of some sequences, float32."""
        keys, values = (each[rows, ..., :length, :] for each in (self.keys, self.values))
        if self.value_scales is None or self.key_scales is None:
            return keys.float(), values.float()
        scales = self.value_scales[rows, ..., :length, None].float()
        return self._keys_of(keys, self.key_scales[rows, ..., :length]), (values.float() - 128) * scales

    def _keys_of(self, codes: Tensor, scales: Tensor, zero: int = 128) -> Tensor:
        """Rotated keys of codes, float32."""
        channel_scale, channel_mean = (each[:, None] for each in self.quantization)
        return (codes.float() - zero) * scales[..., None].float() * channel_scale + channel_mean

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
        if not config.chooses_tokens or config.score_bits != self.score_bits or plan.is_adaptive:
            raise AquaError(
                "a step that chooses tokens needs select_p or select_tokens, k_ratio and, over this cache, "
                f"score_bits={self.score_bits}"
            )
        if config.share != "group" and heads != kv_heads:
            raise AquaError(f"share is {config.share!r}: dimensions are read for a group, set share='group'")


def score_quantization(plan: LayerPlan) -> Quantization:
    """What the codes of a layer's keys are made with, as `ops.tokens.scored_keys` has it."""
    assert plan.key_scale is not None and plan.key_mean is not None
    kept = plan.kept
    scale = plan.key_scale[:, :kept].float().clamp_min(LEAST_SCALE)
    return Quantization(scale.contiguous(), plan.key_mean[:, :kept].float().contiguous())


def zero_of(bits: int) -> int:
    """The code that stands for zero."""
    return 1 << (bits - 1)


def coded(states: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of 8 or 4 bits of [..., tokens, width], each in a byte, and a bfloat16 scale for each token."""
    if bits == 8:
        return quantized(states)
    states = states.float()
    scale = states.abs().amax(-1) / FEW_BITS_LARGEST
    # Of NaN and infinity NaN, so that everything read back is. What is all zero has a scale of zero.
    scale = (scale + 0 * scale).to(torch.bfloat16)
    codes = (states / torch.where(scale > 0, scale, 1).float()[..., None]).round()
    codes = codes.clamp(-FEW_BITS_LARGEST, FEW_BITS_LARGEST).nan_to_num()
    return (codes + zero_of(bits)).to(torch.uint8), scale


def packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits in half as many bytes: of two neighbours in the last dimension the first has the low bits."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(codes: Tensor) -> Tensor:
    """What was packed."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
