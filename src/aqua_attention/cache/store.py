# SPDX-License-Identifier: Apache-2.0
"""Where a cache layer keeps its keys or its values: a tensor that grows at its end."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

SLACK = 40
"""A store allocates one part in so many more than it needs: appending a token then seldom copies what is there."""


class Store(Protocol):
    """States of shape [batch, heads, length, width], growing along length."""

    @property
    def length(self) -> int:
        """Tokens stored."""

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""

    @property
    def whole(self) -> int:
        """Last tokens that `gather` must take, in order: they lie where a choice for each head has no place."""

    def append(self, states: Tensor) -> None:
        """Add tokens at the end."""

    def read(self) -> Tensor:
        """All states, [batch, heads, length, width]; do not write to it."""

    def products(self, tall: Tensor) -> Tensor:
        """Dot products of `tall`, [batch, heads, any, width], with every state: [batch, heads, any, length]."""

    def mixture(self, weights: Tensor) -> Tensor:
        """Sums of all states by `weights`, [batch, heads, any, length]: [batch, heads, any, width]."""

    def keep(self, length: int) -> None:
        """Forget all tokens but the first `length`."""

    def gather(self, places: Tensor) -> None:
        """Keep the tokens at these places, [batch, heads, kept], in this order; the rest is forgotten."""

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held: reorder, select or repeat sequences (dimension 0), or move to another device."""

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name, to be written to a file."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `tensors` once returned."""


class Growing:
    """A store that holds states as they are, with 1/40 of room for more."""

    whole = 0

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None

    @property
    def batch(self) -> int:  # noqa: D102 (see Store, here and below)
        return 0 if self._buffer is None else self._buffer.shape[0]

    def append(self, states: Tensor) -> None:  # noqa: D102
        needed = self.length + states.shape[2]
        buffer = self._buffer
        if states.requires_grad or (buffer is not None and buffer.requires_grad):
            # Writing in place would spoil what autograd has kept of earlier steps.
            self._buffer = states if buffer is None else torch.cat([self.read(), states], 2)
        else:
            if buffer is None or self.length == 0 or needed > buffer.shape[2] or _is_frozen(buffer):
                buffer = _with_room(states, needed)
                if self.length:
                    buffer[:, :, : self.length] = self.read()
            buffer[:, :, self.length : needed] = states
            self._buffer = buffer
        self.length = needed

    def read(self) -> Tensor:  # noqa: D102
        assert self._buffer is not None
        return self._buffer[:, :, : self.length]

    def products(self, tall: Tensor) -> Tensor:  # noqa: D102
        return tall @ self.read().to(tall.dtype).transpose(-1, -2)

    def mixture(self, weights: Tensor) -> Tensor:  # noqa: D102
        return weights @ self.read().to(weights.dtype)

    def keep(self, length: int) -> None:  # noqa: D102
        self.length = min(self.length, max(0, length))

    def gather(self, places: Tensor) -> None:  # noqa: D102
        states, kept = self.read(), places.shape[2]
        buffer = _with_room(states, kept)
        torch.gather(states, 2, places[..., None].expand(*places.shape, states.shape[3]), out=buffer[:, :, :kept])
        self._buffer, self.length = buffer, kept

    def change(self, function: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        if self._buffer is not None:
            self._buffer = function(self._buffer)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {} if self.length == 0 else {"states": self.read()}

    def restore(self, tensors: dict[str, Tensor]) -> None:  # noqa: D102
        self.hold(tensors["states"] if tensors else None)

    def hold(self, states: Tensor | None) -> None:
        """Forget everything but these states; None: also them."""
        self._buffer, self.length = None, 0
        if states is not None:
            self.append(states)


def nested(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors by name, those whose name begins with `part` and a dot, without it."""
    return {name.removeprefix(f"{part}."): held for name, held in tensors.items() if name.startswith(f"{part}.")}


def tokens_at(places: Tensor, states: Tensor) -> Tensor:
    """The tokens of states [batch, heads, any, width] at places [batch, tokens]."""
    return states.gather(2, places[:, None, :, None].expand(*states.shape[:2], -1, states.shape[3]))


def _with_room(like: Tensor, length: int) -> Tensor:
    """An empty buffer [batch, heads, length and some room, width]."""
    return like.new_empty((*like.shape[:2], length + length // SLACK, like.shape[3]))


def _is_frozen(buffer: Tensor) -> bool:
    """Whether it was made in inference mode, which forbids writing to it outside."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
