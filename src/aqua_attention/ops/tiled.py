# SPDX-License-Identifier: Apache-2.0
"""Keys laid out for the decoding kernels: old tokens by dimension, new ones by token.

A query multiplies few dimensions of many keys. Reading two bytes here and there moves 32 each time, so the keys of 128
tokens form a tile in which each dimension is one contiguous row: `tiles[batch, head, tile, dimension, token]`. The last
128 to 256 tokens stay as they came, in a ring `tail[batch, head, token % 256, dimension]`: a token is appended without
touching a tile, and the window that is scored with every dimension is read whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError

Device = torch.device | str
TILE = 128
"""Tokens in a tile; the tail holds up to two."""
WIDEST = 256
"""Dimensions of a head that the kernels take."""


class Chosen(NamedTuple):
    """Dimensions to multiply outside the exact window, for each sequence and key-value head, shared by its query heads.

    Attributes:
        dims: int32 [batch, num_key_value_heads, k], each once.
        mask: int8 [batch, num_key_value_heads, kept], 1 for these.
        counts: int32 [batch, num_key_value_heads], how many of `dims` count, the first ones; None: all.
    """

    dims: Tensor
    mask: Tensor
    counts: Tensor | None = None

    def check(self, batch: int, groups: int, kept: int) -> None:
        """Raise AquaError when a kernel that reads this would read something else."""
        if not 1 <= self.dims.shape[-1] <= kept:
            raise AquaError(f"dims is {tuple(self.dims.shape)}: it must name 1 to {kept} dimensions")
        expect("dims", self.dims, torch.int32, (batch, groups, self.dims.shape[-1]))
        expect("mask", self.mask, torch.int8, (batch, groups, kept))
        if self.counts is not None:
            expect("counts", self.counts, torch.int32, (batch, groups))

    def selected(self, heads: int) -> Tensor:
        """The same as `select_dimensions` says it, boolean [batch, heads, 1, kept]."""
        return self.mask.bool().repeat_interleave(heads // self.mask.shape[1], 1)[:, :, None]

    @staticmethod
    def of(dims: Tensor, kept: int) -> Chosen:
        """From the dimensions alone."""
        mask = torch.zeros((*dims.shape[:2], kept), dtype=torch.int8, device=dims.device)
        return Chosen(dims.to(torch.int32).contiguous(), mask.scatter_(-1, dims.long(), 1))


class TiledCache:
    """Rotated keys and values of a fixed largest length, for `ops.triton.decode`.

    Attributes:
        tiles: [batch, num_key_value_heads, max_length / TILE, kept, TILE].
        tail: [batch, num_key_value_heads, 2 * TILE, kept]; token t is at t % (2 * TILE).
        values: [batch, num_key_value_heads, max_length, value_dim].
        lengths: int32 [batch], tokens of each sequence.
        arrived: int32 [batch, num_key_value_heads + 1], zero; the decoding kernel counts its programs there.
    """

    def __init__(
        self, batch: int, groups: int, kept: int, value_dim: int, max_length: int, dtype: torch.dtype, device: Device
    ) -> None:
        if max_length < 1:
            raise AquaError(f"max_length is {max_length}: it must be 1 or more")
        count = -(-max_length // TILE)
        self.shape, self.max_length = (batch, groups, kept, value_dim, max_length), max_length
        self.tiles = torch.zeros(batch, groups, count, kept, TILE, dtype=dtype, device=device)
        self.tail = torch.zeros(batch, groups, 2 * TILE, kept, dtype=dtype, device=device)
        self.values = torch.zeros(batch, groups, count * TILE, value_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(batch, groups + 1, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Forget all tokens; nothing is allocated anew."""
        self.lengths.zero_()
        self.arrived.zero_()

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Hold a prompt.

        Args:
            keys: rotated, [batch, num_key_value_heads, length, kept]; of sequence b the first lengths[b] count.
            values: [batch, num_key_value_heads, length, value_dim].
            lengths: int [batch], each from 0 to `length`.

        Raises:
            AquaError: it does not fit; nothing is changed then.
        """
        length = keys.shape[2]
        shape = (*self.tail.shape[:2], length, self.tail.shape[3])
        if keys.shape != shape or values.shape != (*shape[:3], self.values.shape[3]) or length > self.max_length:
            raise AquaError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit a cache of keys "
                f"{(*shape[:2], self.max_length, shape[3])} and value_dim {self.values.shape[3]}"
            )
        if lengths.shape != shape[:1] or int(lengths.min()) < 0 or int(lengths.max()) > length:
            raise AquaError(f"lengths are {lengths.tolist()}: they must be {shape[0]} numbers from 0 to {length}")
        self.lengths.copy_(lengths)
        self.values[:, :, :length] = values
        whole = length // TILE
        tiled = keys[:, :, : whole * TILE].unflatten(2, (whole, TILE)).transpose(-1, -2)
        self.tiles[:, :, :whole] = tiled
        for row, count in enumerate(lengths.tolist()):
            tokens = torch.arange(tiles_done(count) * TILE, count, device=keys.device)
            self.tail[row, :, tokens % (2 * TILE)] = keys[row, :, tokens]

    def check_step(
        self, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor, key_rms: Tensor, config: AquaConfig
    ) -> None:
        """Raise AquaError for a token of each sequence that does not fit what is held, or that no kernel could take."""
        batch, groups, kept, value_dim, _ = self.shape
        heads, head_dim, dtype = query.shape[1], query.shape[-1], self.tiles.dtype
        for name, states, shape, kind in (
            ("query", query, (batch, heads // groups * groups, head_dim), dtype),
            ("key", key, (batch, groups, head_dim), dtype),
            ("value", value, (batch, groups, value_dim), dtype),
            ("rotation", rotation, (groups, head_dim, kept), torch.float32),
            ("key_rms", key_rms, (groups, kept), torch.float32),
        ):
            if states.shape != shape or states.dtype != kind:
                raise AquaError(f"{name} is {states.dtype} {tuple(states.shape)}: it must be {kind} {shape}")
        if head_dim > WIDEST:
            raise AquaError(f"heads have {head_dim} dimensions: the kernels take {WIDEST} at most")
        if config.share != "group" and heads != groups:
            raise AquaError(
                f"share is {config.share!r}: the kernels read the same dimensions for a group, share='group'"
            )

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values by token, [batch, num_key_value_heads, longest, ...]; behind the end of a row is rubbish."""
        lengths = self.lengths.tolist()
        longest = max(lengths)
        whole = -(-longest // TILE)
        keys = self.tiles[:, :, :whole].transpose(-1, -2).flatten(2, 3)[:, :, :longest].contiguous()
        for row, count in enumerate(lengths):
            tokens = torch.arange(tiles_done(count) * TILE, count, device=keys.device)
            keys[row, :, tokens] = self.tail[row, :, tokens % (2 * TILE)]
        return keys, self.values[:, :, :longest]

    def take(self, rows: Tensor) -> None:
        """Hold the sequences of these indices, one for each there was.

        Raises:
            AquaError: another number of them.
        """
        if len(rows) != len(self.lengths):
            raise AquaError(f"{len(rows)} sequences cannot take the places of {len(self.lengths)}")
        for states in (self.tiles, self.tail, self.values, self.lengths):
            states.copy_(states.index_select(0, rows))


def tiles_done(length: int) -> int:
    """How many tiles of a sequence of this length are read as tiles; the tokens behind them are in the tail."""
    return max((length - 1) // TILE - 1, 0)


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise AquaError when a tensor is not of this dtype and shape, and contiguous."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise AquaError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be {dtype} {shape}, contiguous")
