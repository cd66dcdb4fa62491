# SPDX-License-Identifier: Apache-2.0
"""Keys laid out for the decoding kernels: old tokens by dimension, new ones by token.

A query multiplies few dimensions of many keys. Reading two bytes here and there moves 32 each time, so the keys of 128
tokens form a tile in which each dimension is one contiguous row: `tiles[batch, head, tile, dimension, token]`. The last
128 to 256 tokens stay as they came, in a ring `tail[batch, head, token % 256, dimension]`: a token is appended without
touching a tile, and the window that is scored with every dimension is read whole.

Keys in tiles, and values, may be quantized to 8 bits, and may lie in pages of a pool that sequences share. Whatever the
order, a block lies together: the keys or values of one key-value head, for a tile of tokens or a page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate

Device = torch.device | str
TILE = 128
"""Tokens in a tile; the tail holds up to two."""
WIDEST = 256
"""Dimensions of a head that the kernels take."""
LARGEST_QUANTIZED = 128
"""Those of a head in 8 bits: the numbers they become must fit into the shared memory of common GPUs."""
BLOCKS = (32, 64, TILE)
"""Tokens of a page: a row of 32 quantized ones is 32 bytes, the least that memory moves."""


class Chosen(NamedTuple):
    """Dimensions to multiply outside the exact window, for each sequence and key-value head, shared by its query heads.

    Attributes:
        dims: int32 [batch, num_key_value_heads, k], each once.
        mask: int8 [batch, num_key_value_heads, kept], 1 for these.
        counts: int32 [batch, num_key_value_heads], how many of `dims` count, the first ones; None: all.
        min_length: sequences of fewer tokens, the new one included, multiply every dimension, whatever `dims` say;
            `mask` says so too. 0 where there are `counts`, which say it themselves.
    """

    dims: Tensor
    mask: Tensor
    counts: Tensor | None = None
    min_length: int = 0

    def check(self, batch: int, num_key_value_heads: int, kept: int) -> None:
        """Raise AquaError when a kernel that reads this would read something else."""
        if not 1 <= self.dims.shape[-1] <= kept:
            raise AquaError(f"dims is {tuple(self.dims.shape)}: it must name 1 to {kept} dimensions")
        expect("dims", self.dims, torch.int32, (batch, num_key_value_heads, self.dims.shape[-1]))
        expect("mask", self.mask, torch.int8, (batch, num_key_value_heads, kept))
        if self.counts is not None:
            expect("counts", self.counts, torch.int32, (batch, num_key_value_heads))

    def selected(self, heads: int) -> Tensor:
        """The same as `select_dimensions` says it, boolean [batch, heads, 1, kept]."""
        return self.mask.bool().repeat_interleave(heads // self.mask.shape[1], 1)[:, :, None]

    @staticmethod
    def of(dims: Tensor, kept: int) -> Chosen:
        """From the dimensions alone."""
        mask = torch.zeros((*dims.shape[:2], kept), dtype=torch.int8, device=dims.device)
        return Chosen(dims.to(torch.int32).contiguous(), mask.scatter_(-1, dims.long(), 1))


class Pages(NamedTuple):
    """Where blocks of tokens lie in a pool.

    Attributes:
        block_table: int32 [batch, blocks of a whole number of tiles], the page of each block of a sequence; those of
            tokens that do not exist yet are not looked at.
        block_size: tokens of a page, one of BLOCKS.
        num_blocks: pages in the pool.
    """

    block_table: Tensor
    block_size: int
    num_blocks: int


class Quantization(NamedTuple):
    """How keys become 8 bits: `(code - 128) * key_scale * channel_scale + channel_mean`, a key scale for each token and
    head.

    Attributes:
        channel_scale, channel_mean: float32 [num_key_value_heads, kept], of rotated keys: some channels are a hundred
            times as large as others, and far from zero.

    Values are `(code - 128) * value_scale`. The kernels multiply these scales in float16: values above 3e4 become NaN,
    and those of less than about 1e-5 lose accuracy.
    """

    channel_scale: Tensor
    channel_mean: Tensor


class TiledCache:
    """Rotated keys and values of a fixed largest length, for the decoding kernels.

    Tensors are written to and never replaced: recorded steps, and `fixed`, know their addresses.

    Attributes:
        shape: (batch, num_key_value_heads, kept, value_dim, max_length).
        tiles: [batch, num_key_value_heads, max_length / TILE, kept, TILE]; with pages [num_blocks, num_key_value_heads,
            kept, block_size]. Quantized: uint8, in which 128 is zero.
        tail: [batch, num_key_value_heads, 2 * TILE, kept]; token t is at t % (2 * TILE).
        values: [batch, num_key_value_heads, count * TILE, value_dim]; with pages [num_blocks, num_key_value_heads,
            block_size, value_dim]. Quantized: uint8, those of the tail too.
        key_scales, value_scales: bfloat16, as `values` without its last dimension; None where nothing is quantized.
        lengths: int32 [batch], tokens of each sequence.
        arrived: int32 [batch, num_key_value_heads + 1], zero; the decoding kernel counts its programs there.
        count: tiles of a sequence at most.
        block_size: tokens that lie together.
        rotated_from: sequences of fewer tokens have keys as the model computes them, and are multiplied so; only the
            CPU kernel knows that. 0: all keys are rotated.
        fixed, arguments: what the kernels for CPUs and for GPUs keep between steps.
    """

    def __init__(
        self,
        batch: int,
        num_key_value_heads: int,
        kept: int,
        value_dim: int,
        max_length: int,
        dtype: torch.dtype,
        device: Device,
        *,
        quantization: Quantization | None = None,
        pages: Pages | None = None,
        rotated_from: int = 0,
    ) -> None:
        """Empty sequences.

        Args:
            max_length: tokens of a sequence at most.
            dtype: of queries and of what is not quantized.
            quantization: keys and values are kept in 8 bits; of at most LARGEST_QUANTIZED dimensions.
            pages: where they lie; None: each sequence has its own place.

        Raises:
            AquaError: sizes that do not fit each other.
        """
        if min(batch, max_length) < 1:
            raise AquaError(f"batch is {batch} and max_length {max_length}: they must be 1 or more")
        self.shape, self.max_length = (batch, num_key_value_heads, kept, value_dim, max_length), max_length
        self.count, self.dtype, self.quantization, self.pages = -(-max_length // TILE), dtype, quantization, pages
        self.rotated_from = rotated_from
        self.fixed: Any = None
        self.arguments: Any = None
        if quantization is not None:
            if max(kept, value_dim) > LARGEST_QUANTIZED:
                raise AquaError(
                    f"heads of {kept} and {value_dim} dimensions: in 8 bits they have {LARGEST_QUANTIZED} at most"
                )
            for name, tensor in zip(quantization._fields, quantization, strict=True):
                expect(f"quantization.{name}", tensor, torch.float32, (num_key_value_heads, kept))
        self.block_size = TILE if pages is None else pages.block_size
        blocks: tuple[int, ...] = (batch, num_key_value_heads, self.count)
        tokens = (*blocks[:2], self.count * TILE)
        if pages is not None:
            if self.block_size not in BLOCKS:
                raise AquaError(
                    f"pages.block_size is {self.block_size}: it must be one of {', '.join(map(str, BLOCKS))}"
                )
            expect("pages.block_table", pages.block_table, torch.int32, (batch, self.count * TILE // self.block_size))
            blocks = (pages.num_blocks, num_key_value_heads)
            tokens = (*blocks, self.block_size)
        kind = dtype if quantization is None else torch.uint8
        self.tiles = torch.zeros(*blocks, kept, self.block_size, dtype=kind, device=device)
        self.tail = torch.zeros(batch, num_key_value_heads, 2 * TILE, kept, dtype=dtype, device=device)
        self.values = torch.zeros(*tokens, value_dim, dtype=kind, device=device)
        self.key_scales, self.value_scales = (
            None if quantization is None else torch.zeros(tokens, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(batch, num_key_value_heads + 1, dtype=torch.int32, device=device)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tail.device

    @property
    def block_strides(self) -> tuple[int, int, int]:
        """Blocks from a sequence, a head and a tile (with pages: a page) to the next."""
        kv_heads = self.shape[1]
        return (kv_heads * self.count, self.count, 1) if self.pages is None else (0, 1, kv_heads)

    def clear(self) -> None:
        """Forget all tokens; nothing is allocated anew."""
        self.lengths.zero_()
        self.arrived.zero_()

    def enlarged(self, max_length: int) -> TiledCache:
        """A cache with room for more tokens that holds the same ones, at other addresses. Not for pages."""
        assert self.pages is None and max_length >= self.max_length
        place = max_length, self.dtype, self.tail.device
        larger = TiledCache(*self.shape[:4], *place, quantization=self.quantization, rotated_from=self.rotated_from)
        for name in ("tiles", "values", "key_scales", "value_scales"):
            if (held := getattr(self, name)) is not None:
                getattr(larger, name)[:, :, : held.shape[2]] = held
        larger.tail.copy_(self.tail)
        larger.lengths.copy_(self.lengths)
        return larger

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Hold a prompt.

        Args:
            keys: [batch, num_key_value_heads, length, kept]; of sequence b the first lengths[b] count. Rotated, but for
                sequences shorter than `rotated_from`.
            values: [batch, num_key_value_heads, length, value_dim].
            lengths: int [batch], each from 0 to `length`.

        Raises:
            AquaError: it does not fit; nothing is changed then.
        """
        self.check_prompt(keys, values)
        batch, length = len(self.lengths), keys.shape[2]
        if lengths.shape != (batch,) or int(lengths.min()) < 0 or int(lengths.max()) > length:
            raise AquaError(f"lengths are {lengths.tolist()}: they must be {batch} numbers from 0 to {length}")
        self.lengths.copy_(lengths)
        for row, count in enumerate(lengths.tolist()):
            self._fill_row(row, keys[row, :, :count], values[row, :, :count])

    def _fill_row(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Write a sequence: keys [num_key_value_heads, its length, kept], values likewise."""
        count = keys.shape[1]
        indices, room = self._block_indices(row, count), -(-count // self.block_size) * self.block_size
        wide, given = (F.pad(states, (0, 0, 0, room - count)) if room > count else states for states in (keys, values))
        if self.quantization is not None:
            wide = (wide.float() - self.quantization.channel_mean[:, None]) / self.quantization.channel_scale[:, None]
            wide, key_scales = quantized(wide)
            given, value_scales = quantized(given)
            for held, scales in ((self.key_scales, key_scales), (self.value_scales, value_scales)):
                assert held is not None
                held.view(-1, self.block_size)[indices] = scales.unflatten(1, (-1, self.block_size))
        blocks = wide.unflatten(1, (-1, self.block_size)).transpose(-1, -2)
        self.tiles.view(-1, *self.tiles.shape[-2:])[indices] = blocks
        self.values.view(-1, self.block_size, self.shape[3])[indices] = given.unflatten(1, (-1, self.block_size))
        tokens = torch.arange(tiles_done(count) * TILE, count, device=keys.device)
        self.tail[row, :, tokens % (2 * TILE)] = keys[:, tokens]

    @torch.inference_mode()
    def rotate_grown(self, rotation: Tensor, threshold: int) -> None:
        """Before a step: sequences that the coming token makes `threshold` long get rotated keys, if they have not yet.

        `rotated_from` only ever falls. In inference mode, because a prompt may have been given in it.

        Args:
            rotation: float32 [num_key_value_heads, kept, kept].
        """
        for row, held in enumerate(self.lengths.tolist()):
            if 0 < held < self.rotated_from and held + 1 >= min(self.rotated_from, threshold):
                keys, values = self.read([row])
                self._fill_row(row, rotate(keys, rotation)[0], values[0])
        self.rotated_from = min(self.rotated_from, threshold)

    def check_prompt(self, keys: Tensor, values: Tensor) -> None:
        """Raise AquaError for keys and values of a prompt, as `fill` takes them, that do not fit."""
        shape = (*self.tail.shape[:2], keys.shape[2], self.tail.shape[3])
        if keys.shape != shape or values.shape != (*shape[:3], self.values.shape[3]) or shape[2] > self.max_length:
            raise AquaError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit a cache of keys "
                f"{(*shape[:2], self.max_length, shape[3])} and value_dim {self.values.shape[3]}"
            )

    def check_rotated(self) -> None:
        """Raise AquaError where keys may be as they came, which only the CPU kernel knows how to treat."""
        if self.rotated_from:
            raise AquaError(f"rotated_from is {self.rotated_from}: only the CPU kernel takes keys that are not rotated")

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other addresses, so it finds out anew what the CPU kernel keeps between steps."""
        return self.__dict__ | {"fixed": None, "arguments": None}

    def check_step(self, query: Tensor, key: Tensor, value: Tensor, plan: LayerPlan) -> None:
        """Raise AquaError for a token of each sequence that does not fit what is held, or that no kernel could take."""
        batch, kv_heads, kept, value_dim, _ = self.shape
        heads, head_dim, dtype = query.shape[1], query.shape[-1], self.dtype
        for name, states, shape, kind in (
            ("query", query, (batch, heads // kv_heads * kv_heads, head_dim), dtype),
            ("key", key, (batch, kv_heads, head_dim), dtype),
            ("value", value, (batch, kv_heads, value_dim), dtype),
            ("rotation", plan.rotation, (kv_heads, head_dim, kept), torch.float32),
            ("key_rms", plan.key_rms, (kv_heads, kept), torch.float32),
        ):
            if states.shape != shape or states.dtype != kind:
                raise AquaError(f"{name} is {states.dtype} {tuple(states.shape)}: it must be {kind} {shape}")
        if head_dim > WIDEST:
            raise AquaError(f"heads have {head_dim} dimensions: the kernels take {WIDEST} at most")
        if plan.config.share != "group" and heads != kv_heads:
            raise AquaError(
                f"share is {plan.config.share!r}: the kernels read the same dimensions for a group, share='group'"
            )

    def check_query(self, query: Tensor, chosen: Chosen | None) -> None:
        """Raise AquaError for rotated queries, one token a sequence, or a choice, that do not fit what is held."""
        batch, kv_heads, kept, _, _ = self.shape
        if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != kept or query.shape[1] % kv_heads:
            raise AquaError(f"query is {tuple(query.shape)}: it must be [{batch}, a multiple of {kv_heads}, {kept}]")
        if chosen is not None:
            chosen.check(batch, kv_heads, kept)

    def read(self, rows: list[int] | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values by token, [batch, num_key_value_heads, longest, ...]; behind the end of a row is nothing.

        Args:
            rows: of these sequences only.
            dtype: default that of the tail; quantized states lose less in float32.
        """
        _, kv_heads, kept, value_dim, _ = self.shape
        lengths = self.lengths.tolist()
        rows = list(range(len(lengths))) if rows is None else rows
        longest = max(lengths[row] for row in rows)
        keys, values = (
            self.tail.new_zeros(len(rows), kv_heads, longest, width, dtype=dtype or self.dtype)
            for width in (kept, value_dim)
        )
        for index, row in enumerate(rows):
            count, blocks = lengths[row], self._block_indices(row, lengths[row])
            wide = self.tiles.view(-1, *self.tiles.shape[-2:])[blocks].transpose(-1, -2).flatten(1, 2)[:, :count]
            given = self.values.view(-1, self.block_size, value_dim)[blocks].flatten(1, 2)[:, :count]
            if self.quantization is not None:
                assert self.key_scales is not None and self.value_scales is not None
                key_scales, value_scales = (
                    scales.view(-1, self.block_size)[blocks].flatten(1, 2)[:, :count, None].float()
                    for scales in (self.key_scales, self.value_scales)
                )
                channel_scale, channel_mean = (each[:, None] for each in self.quantization)
                wide = (wide.float() - 128) * key_scales * channel_scale + channel_mean
                given = (given.float() - 128) * value_scales
            keys[index, :, :count], values[index, :, :count] = wide, given
            tokens = torch.arange(tiles_done(count) * TILE, count, device=keys.device)
            keys[index, :, tokens] = self.tail[row, :, tokens % (2 * TILE)].to(keys.dtype)
        return keys, values

    def _block_indices(self, row: int, count: int) -> Tensor:
        """Where the blocks of the first tokens of a sequence lie, [num_key_value_heads, blocks]."""
        row_stride, head_stride, block_stride = self.block_strides
        blocks = torch.arange(-(-count // self.block_size), device=self.tail.device)
        if self.pages is not None:
            blocks = self.pages.block_table[row].long()[blocks]
        kv_heads = torch.arange(self.shape[1], device=self.tail.device)[:, None]
        return row * row_stride + kv_heads * head_stride + blocks * block_stride

    def take(self, rows: Tensor) -> None:
        """Hold the sequences of these indices, one for each there was.

        Raises:
            AquaError: another number of them, or they lie in pages.
        """
        if len(rows) != len(self.lengths):
            raise AquaError(f"{len(rows)} sequences cannot take the places of {len(self.lengths)}: give as many")
        if self.pages is not None:
            raise AquaError("sequences in pages cannot be moved: change their rows in the table of pages")
        for states in (self.tiles, self.tail, self.values, self.lengths, self.key_scales, self.value_scales):
            if states is not None:
                states.copy_(states.index_select(0, rows))


def tiles_done(length: int) -> int:
    """How many tiles of a sequence of this length are read as tiles; the tokens behind them are in the tail."""
    return max((length - 1) // TILE - 1, 0)


def quantized(states: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits of [..., tokens, width], 128 for zero, and a bfloat16 scale for each token that all fit in."""
    states = states.float()
    scale = (states.abs().amax(-1) / 127 * (1 + 2**-7)).to(torch.bfloat16)
    # What is all zero has a scale of zero. NaN and infinity make it NaN or infinite, and so everything read back.
    codes = (states / torch.where(scale > 0, scale, 1).float()[..., None]).round().clamp(-127, 127)
    return (codes.nan_to_num() + 128).to(torch.uint8), scale


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise AquaError when a tensor is not of this dtype and shape, and contiguous."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise AquaError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be {dtype} {shape}, contiguous")
