# SPDX-License-Identifier: Apache-2.0
"""A store in int8 or int4: codes of a byte or half a byte, a step and a middle for each group of channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.store import Growing

GROUP = 32
"""Channels that share a step, in 4 bits. In 8 bits, all do."""
LEADING_SHARE = 4
"""With 4 bits, one part in so many of the key dimensions, those of largest variance, has 8 bits: they decide most of a
score. Without it int4 keys cost SmolLM2 ten times as much (RESULTS.md)."""
TOKENS_AT_ONCE = 2048
"""Rounded tokens that are in float32 at once while a store is read."""
UNQUANTISED_RECENT = 64
"""Last tokens that a rounding store keeps as they are, at least; at most twice as many are."""


class Rounded:
    """A store (see `store.Store`) in int8 or int4, except for the last tokens.

    A state is `(code * step + middle) * scale + mean`: one bfloat16 step and middle for each token, head and group of
    channels, and for keys a scale and a mean for each channel, fixed by calibration (some channels are a hundred times
    as large as others, and far from zero; a step for the token alone would round all others to nothing). Codes lie
    half a step off the middle, so that as many are below it as above.
    """

    def __init__(self, bits: int, recent: int, scale: Tensor | None = None, mean: Tensor | None = None) -> None:
        """An empty store.

        Args:
            bits: 8 or 4; two codes of 4 bits share a byte.
            recent: so many last tokens stay as they are; up to twice as many do, between two roundings.
            scale, mean: of rotated keys by falling variance, [heads, width], float32; None: values.
        """
        self.length = 0
        self.bits, self.recent = bits, max(recent, UNQUANTISED_RECENT)
        self._scale, self._mean = scale, mean
        self._codes, self._steps, self._middles, self._tail = Growing(), Growing(), Growing(), Growing()

    @property
    def batch(self) -> int:  # noqa: D102 (see Store, here and below)
        return self._codes.batch or self._tail.batch

    @property
    def whole(self) -> int:  # noqa: D102
        return self._tail.length

    def append(self, states: Tensor) -> None:  # noqa: D102
        if states.requires_grad:
            raise AquaError(f"int{self.bits} storage has no gradient: leave bits out, or use torch.no_grad()")
        self.length += states.shape[2]
        if self._tail.length + states.shape[2] <= 2 * self.recent:
            self._tail.append(states)
            return
        tail = states if self._tail.length == 0 else torch.cat([self._tail.read(), states], 2)
        old = tail.shape[2] - self.recent
        for start in range(0, old, TOKENS_AT_ONCE):
            rounded = self._rounded(tail[:, :, start : min(start + TOKENS_AT_ONCE, old)])
            for store, part in zip((self._codes, self._steps, self._middles), rounded, strict=True):
                store.append(part)
        self._tail = Growing()
        self._tail.append(tail[:, :, old:])

    def read(self) -> Tensor:  # noqa: D102
        tail = self._tail.read()
        if self._codes.length == 0:
            return tail
        states = tail.new_empty((*tail.shape[:2], self.length, tail.shape[3]))
        states[:, :, self._codes.length :] = tail
        for part, groups in self._parts(tail.shape[3]):
            wide = torch.cat([codes * step + middle for _, codes, step, middle in groups], -1)
            if self._scale is not None and self._mean is not None:
                wide = wide * self._scale[:, None].to(wide.device) + self._mean[:, None].to(wide.device)
            states[:, :, part] = wide
        return states

    def products(self, tall: Tensor) -> Tensor:  # noqa: D102
        result = tall.new_empty((*tall.shape[:3], self.length))
        result[..., self._codes.length :] = self._tail.products(tall)
        constant: Tensor | float = 0.0
        if self._scale is not None and self._mean is not None:
            # Scale and mean go into the few queries, not into the many keys.
            constant = tall @ self._mean[..., None].to(tall)
            tall = tall * self._scale[:, None].to(tall)
        for part, groups in self._parts(tall.shape[3]):
            total = constant
            for channels, codes, step, middle in groups:
                some = tall[..., channels]
                product = (some @ codes.transpose(-1, -2)).mul_(step.transpose(-1, -2))
                total = product.addcmul_(some.sum(-1, keepdim=True), middle.transpose(-1, -2)).add_(total)
            result[..., part] = total
        return result

    def mixture(self, weights: Tensor) -> Tensor:
        """See `Store`; of values only, which have no scale and mean."""
        assert self._scale is None
        result = self._tail.mixture(weights[..., self._codes.length :])
        for part, groups in self._parts(result.shape[-1]):
            share = weights[..., part]
            for channels, codes, step, middle in groups:
                result[..., channels] += (share * step.transpose(-1, -2)) @ codes + share @ middle
        return result

    def keep(self, length: int) -> None:  # noqa: D102
        self.length = min(self.length, max(0, length))
        if self.length == 0:
            self._codes, self._steps, self._middles, self._tail = Growing(), Growing(), Growing(), Growing()
        self._tail.keep(self.length - self._codes.length)
        for store in (self._codes, self._steps, self._middles):
            store.keep(self.length)

    def gather(self, places: Tensor) -> None:  # noqa: D102
        old = places[..., : places.shape[2] - self._tail.length]
        if self._codes.length:
            for store in (self._codes, self._steps, self._middles):
                store.gather(old)
        self.length = places.shape[2]

    def change(self, function: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        for store in (self._codes, self._steps, self._middles, self._tail):
            store.change(function)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        stores = {"codes": self._codes, "steps": self._steps, "middles": self._middles, "tail": self._tail}
        return {name: store.read() for name, store in stores.items() if store.length}

    def restore(self, tensors: dict[str, Tensor]) -> None:  # noqa: D102
        stores = {"codes": self._codes, "steps": self._steps, "middles": self._middles, "tail": self._tail}
        for name, store in stores.items():
            store.restore({"states": tensors[name]} if name in tensors else {})
        self.length = self._codes.length + self._tail.length

    def _parts(self, width: int) -> Iterator[tuple[slice, list[tuple[slice, Tensor, Tensor, Tensor]]]]:
        """The rounded tokens, some at a time, and for each group of channels: which, codes, step and middle, float32.

        Codes are [batch, heads, some, channels], steps and middles [batch, heads, some, 1].
        """
        for start in range(0, self._codes.length, TOKENS_AT_ONCE):
            part = slice(start, min(start + TOKENS_AT_ONCE, self._codes.length))
            codes = _unpacked(self._codes.read()[:, :, part], self._leading(width))
            steps = self._steps.read()[:, :, part].float().split(1, -1)
            middles = self._middles.read()[:, :, part].float().split(1, -1)
            groups = [
                (channels, codes[..., channels].float().sub_(2 ** (bits - 1) - 0.5), step, middle)
                for (channels, bits), step, middle in zip(self._groups(width), steps, middles, strict=True)
            ]
            yield part, groups

    def _leading(self, width: int) -> int:
        """How many of the channels have 8 bits."""
        if self.bits == 8:
            return width
        return 0 if self._scale is None else -(-width // LEADING_SHARE)

    def _groups(self, width: int) -> list[tuple[slice, int]]:
        """Channels that share a step and a middle, and their bits."""
        leading = self._leading(width)
        starts = range(leading, width, GROUP)
        fours = [(slice(start, min(start + GROUP, width)), 4) for start in starts]
        return [(slice(0, leading), 8), *fours] if leading else fours

    def _rounded(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [batch, heads, tokens, bytes], and steps and middles [batch, heads, tokens, groups]."""
        states = states.float()
        if self._scale is not None and self._mean is not None:
            states = (states - self._mean[:, None].to(states.device)) / self._scale[:, None].to(states.device)
        codes, steps, middles = [], [], []
        for channels, bits in self._groups(states.shape[-1]):
            some, most = states[..., channels], 2 ** (bits - 1)
            # Everything follows step and middle as they are stored, so that rounding these shifts nothing.
            middle = ((some.amax(-1, keepdim=True) + some.amin(-1, keepdim=True)) / 2).to(torch.bfloat16)
            some = some - middle.float()
            step = (some.abs().amax(-1, keepdim=True) / (most - 0.5)).clamp_min(1e-30).to(torch.bfloat16)
            codes.append((some / step.float()).floor().add_(most).clamp_(0, 2 * most - 1).to(torch.uint8))
            steps.append(step)
            middles.append(middle)
        packed = _packed(torch.cat(codes, -1), self._leading(states.shape[-1]))
        return packed, torch.cat(steps, -1), torch.cat(middles, -1)


def _packed(codes: Tensor, leading: int) -> Tensor:
    """One byte for each of the leading codes, then two codes in a byte: those of the first half in its low bits."""
    rest = F.pad(codes[..., leading:], (0, (codes.shape[-1] - leading) % 2))
    low, high = rest.chunk(2, -1) if rest.shape[-1] else (rest, rest)
    return torch.cat([codes[..., :leading], low | (high << 4)], -1)


def _unpacked(packed: Tensor, leading: int) -> Tensor:
    rest = packed[..., leading:]
    return torch.cat([packed[..., :leading], rest & 15, rest >> 4], -1)
