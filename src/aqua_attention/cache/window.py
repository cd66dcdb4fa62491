# SPDX-License-Identifier: Apache-2.0
"""Keys of which all tokens keep the leading dimensions, and those of the exact window every one."""

from collections.abc import Callable

import torch
from torch import Tensor

from aqua_attention.cache.store import Growing, Store, nested, tokens_at

LEAST_RECENT = 16
"""Tokens at the end that keep every dimension, at least; at most twice as many do. Cropping needs some more than the
window has."""


class WindowStore:
    """A store (see `store.Store`) of narrow keys; the first `sink` and the last `recent` tokens are wide.

    Without it `s_ratio` 0.25 costs SmolLM2 ten times as much (docs/results/memory.md), and it is a few kilobytes a
    layer. All new tokens are wide until `settle`, because each is in the window of the queries around it.
    """

    def __init__(self, leading: Store, kept: int, sink: int, recent: int) -> None:
        """An empty store; `leading` keeps the first `kept` dimensions of all tokens."""
        self.leading, self.kept = leading, kept
        self.sink, self.recent = sink, max(recent, LEAST_RECENT)
        self._rest = Growing()
        """The other dimensions of the last tokens."""
        self._first: Tensor | None = None
        """Those of the first real tokens, [batch, heads, sink, width - kept]; zero where there is none yet."""
        self._real: Tensor | None = None
        """Boolean [batch, length] as of the last `settle`: which tokens are no padding."""
        self._found: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.leading.length

    @property
    def batch(self) -> int:  # noqa: D102 (see Store, here and below)
        return self.leading.batch

    @property
    def whole(self) -> int:  # noqa: D102
        return max(self.leading.whole, self._rest.length)

    def append(self, states: Tensor) -> None:  # noqa: D102
        self.leading.append(states[..., : self.kept])
        self._rest.append(states[..., self.kept :])

    def settle(self, real: Tensor) -> None:
        """Only the tokens of the window stay wide; `real`, boolean [batch, length], is False for padding."""
        self._real = real
        if self._rest.length <= 2 * self.recent:
            return
        rest, old = self._rest.read(), self._rest.length - self.recent
        start = self.length - self._rest.length
        none_yet = (*rest.shape[:2], self.sink, rest.shape[3])
        known = rest.new_zeros(none_yet) if self._first is None else self._first
        rank = (real.long().cumsum(-1) * real)[:, start : start + old]
        places, there = _places_of_first(rank, self.sink)
        # Not in place: autograd, or inference mode, may hold the old one.
        self._first = torch.where(there[:, None, :, None], tokens_at(places, rest), known)
        self._rest.hold(rest[:, :, old:])
        self._found = None

    def read(self) -> Tensor:  # noqa: D102
        leading, rest = self.leading.read(), self._rest.read()
        states = leading.new_zeros((*leading.shape[:3], self.kept + rest.shape[3]))
        states[..., : self.kept] = leading
        states[:, :, self.length - rest.shape[2] :, self.kept :] = rest
        if self._first is not None:
            places, there = self._first_places()
            rows, which = there.nonzero(as_tuple=True)
            states[rows, :, places[rows, which], self.kept :] = self._first[rows, :, which]
        return states

    def products(self, tall: Tensor) -> Tensor:  # noqa: D102
        result = self.leading.products(tall[..., : self.kept])
        rest = tall[..., self.kept :]
        result[..., self.length - self._rest.length :] += self._rest.products(rest)
        if self._first is not None:
            places, there = self._first_places()
            more = (rest @ self._first.to(rest.dtype).transpose(-1, -2)).masked_fill(~there[:, None, None], 0)
            result.scatter_add_(-1, places[:, None, None].expand(more.shape), more)
        return result

    def mixture(self, weights: Tensor) -> Tensor:  # noqa: D102
        raise NotImplementedError("only values are mixed")

    def keep(self, length: int) -> None:  # noqa: D102
        self._rest.keep(self._rest.length - (self.length - min(self.length, max(0, length))))
        self.leading.keep(length)
        self._found = None
        if self._real is not None:
            self._real = self._real[:, : self.length]
        if self.length == 0:
            self._first = self._real = None

    def gather(self, places: Tensor) -> None:
        """See `Store`; `settle` must follow, which tells which of them are real."""
        self.leading.gather(places)
        self._found = None

    def change(self, function: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        self._found = None
        self.leading.change(function)
        self._rest.change(function)
        self._first = None if self._first is None else function(self._first)
        self._real = None if self._real is None else function(self._real)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        named = {f"leading.{name}": tensor for name, tensor in self.leading.tensors().items()}
        others = {"rest": self._rest.tensors().get("states"), "first": self._first}
        return named | {name: tensor for name, tensor in others.items() if tensor is not None}

    def restore(self, tensors: dict[str, Tensor]) -> None:  # noqa: D102
        self.leading.restore(nested("leading", tensors))
        self._rest.hold(tensors.get("rest"))
        self._first = tensors.get("first")

    def _first_places(self) -> tuple[Tensor, Tensor]:
        """Where the first real tokens are, [batch, sink], and whether they are, and are not among the last ones."""
        if self._found is None:
            assert self._real is not None
            settled = self._real[:, : self.length - self._rest.length]
            self._found = _places_of_first(settled.long().cumsum(-1) * settled, self.sink)
        return self._found


def _places_of_first(rank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of rank 1 to `count` are, [batch, count], and whether they are; 0 where not. Padding ranks 0."""
    rank = torch.nn.functional.pad(rank, (0, 1))  # so that there is one
    here = rank[:, None] == torch.arange(1, count + 1, device=rank.device)[:, None]
    return here.long().argmax(-1), here.any(-1)
