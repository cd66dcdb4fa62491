# SPDX-License-Identifier: Apache-2.0
"""Where a cache layer keeps its keys or its values: a tensor that grows at its end, as it is or in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.errors import AquaError

SLACK = 40
"""A store allocates one part in so many more than it needs: appending a token then seldom copies what is there."""
WIDENED_AT_ONCE = 1024
"""Rounded tokens that are in float32 at once while a store is read."""
UNQUANTISED_RECENT = 64
"""Last tokens that a rounding store keeps as they are, at least; at most twice as many are."""


class Store(Protocol):
    """States of shape [batch, heads, length, width], growing along length."""

    length: int

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""

    def append(self, states: Tensor) -> None:
        """Add tokens at the end."""

    def read(self) -> Tensor:
        """All states, [batch, heads, length, width]; do not write to it."""

    def keep(self, length: int) -> None:
        """Forget all tokens but the first `length`."""

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held: reorder, select or repeat sequences (dimension 0), or move to another device."""


class Growing:
    """A store that holds states as they are, with 1/40 of room for more."""

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None

    @property
    def batch(self) -> int:  # noqa: D102
        return 0 if self._buffer is None else self._buffer.shape[0]

    def append(self, states: Tensor) -> None:  # noqa: D102 (see Store)
        needed = self.length + states.shape[2]
        buffer = self._buffer
        if states.requires_grad or (buffer is not None and buffer.requires_grad):
            # Writing in place would spoil what autograd has kept of earlier steps.
            self._buffer = states if buffer is None else torch.cat([self.read(), states], 2)
        else:
            if buffer is None or self.length == 0 or needed > buffer.shape[2] or _is_frozen(buffer):
                buffer = states.new_empty((*states.shape[:2], needed + needed // SLACK, states.shape[3]))
                if self.length:
                    buffer[:, :, : self.length] = self.read()
            buffer[:, :, self.length : needed] = states
            self._buffer = buffer
        self.length = needed

    def read(self) -> Tensor:  # noqa: D102
        assert self._buffer is not None
        return self._buffer[:, :, : self.length]

    def keep(self, length: int) -> None:  # noqa: D102
        self.length = min(self.length, max(0, length))

    def change(self, function: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        if self._buffer is not None:
            self._buffer = function(self._buffer)


class Rounded:
    """A store in int8 or int4, except for the last tokens.

    A token's states are `code * step * scale + mean`: one bfloat16 step for each token and head, and for keys a scale
    and a mean for each channel, fixed by calibration (some channels are a hundred times as large as others, and far
    from zero; a step for the token alone would round all others to nothing).
    """

    def __init__(self, bits: int, recent: int, scale: Tensor | None = None, mean: Tensor | None = None) -> None:
        """An empty store.

        Args:
            bits: 8 or 4; two codes of 4 bits share a byte.
            recent: so many last tokens stay as they are; up to twice as many do, between two roundings.
            scale, mean: [heads, width], float32; None: 1 and 0.
        """
        self.length = 0
        self.bits, self.recent = bits, max(recent, UNQUANTISED_RECENT)
        self._scale, self._mean = scale, mean
        self._codes, self._steps, self._tail = Growing(), Growing(), Growing()

    @property
    def batch(self) -> int:  # noqa: D102
        return self._codes.batch or self._tail.batch

    def append(self, states: Tensor) -> None:  # noqa: D102
        if states.requires_grad:
            raise AquaError(f"int{self.bits} storage has no gradient: leave bits out, or use torch.no_grad()")
        self.length += states.shape[2]
        if self._tail.length + states.shape[2] <= 2 * self.recent:
            self._tail.append(states)
            return
        tail = states if self._tail.length == 0 else torch.cat([self._tail.read(), states], 2)
        old = tail.shape[2] - self.recent
        codes, steps = self._rounded(tail[:, :, :old])
        self._codes.append(codes)
        self._steps.append(steps)
        self._tail = Growing()
        self._tail.append(tail[:, :, old:])

    def read(self) -> Tensor:  # noqa: D102
        tail, old = self._tail.read(), self._codes.length
        if old == 0:
            return tail
        states = tail.new_empty((*tail.shape[:2], self.length, tail.shape[3]))
        states[:, :, old:] = tail
        for start in range(0, old, WIDENED_AT_ONCE):
            part = slice(start, min(start + WIDENED_AT_ONCE, old))
            states[:, :, part] = self._widened(part, tail.shape[3])
        return states

    def keep(self, length: int) -> None:  # noqa: D102
        self.length = min(self.length, max(0, length))
        if self.length == 0:
            self._codes, self._steps, self._tail = Growing(), Growing(), Growing()
            return
        self._tail.keep(self.length - self._codes.length)
        self._codes.keep(self.length)
        self._steps.keep(self.length)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        for part in (self._codes, self._steps, self._tail):
            part.change(function)

    def _widened(self, part: slice, width: int) -> Tensor:
        """The states of some rounded tokens, in float32."""
        codes = self._codes.read()[:, :, part]
        if self.bits == 4:
            codes = _unpacked(codes, width)
        states = codes.float() * self._steps.read()[:, :, part].float()
        if self._scale is not None and self._mean is not None:
            states = states * self._scale[:, None, :].to(states.device) + self._mean[:, None, :].to(states.device)
        return states

    def _rounded(self, states: Tensor) -> tuple[Tensor, Tensor]:
        states = states.float()
        if self._scale is not None and self._mean is not None:
            states = (states - self._mean[:, None, :].to(states.device)) / self._scale[:, None, :].to(states.device)
        # Codes follow the step as it is stored, so that rounding the step shifts nothing.
        most = 2 ** (self.bits - 1) - 1
        steps = (states.abs().amax(-1, keepdim=True) / most).clamp_min(1e-30).to(torch.bfloat16)
        codes = (states / steps.float()).round().clamp(-most, most).to(torch.int8)
        return _packed(codes) if self.bits == 4 else codes, steps


def _packed(codes: Tensor) -> Tensor:
    """Codes of -7 to 7, two in a byte: the first half of the channels in the low bits, the second in the high ones."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2)).add(8).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _unpacked(packed: Tensor, width: int) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], -1)[..., :width].to(torch.int8) - 8


def _is_frozen(buffer: Tensor) -> bool:
    """Whether it was made in inference mode, which forbids writing to it outside."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
