# SPDX-License-Identifier: Apache-2.0
"""A store in int8 or int4: codes of a byte or half a byte, a scale and a zero point for each group of channels."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.cache.store import Growing
from aqua_attention.errors import AquaError
from aqua_attention.ops.backend import Backend, Channels, encoder

GROUP = 32
"""Channels that share a scale, in 4 bits. In 8 bits, all do."""
LEADING_SHARE = 4
"""With 4 bits, one part in so many of the key dimensions, those of largest variance, has 8 bits: they decide most of a
score."""
TOKENS_AT_ONCE = 2048
"""Quantized tokens that are in float32 at once while a store is read."""
UNQUANTIZED_RECENT = 64
"""Last tokens that a quantizing store keeps as they are, at least; at most twice as many are."""
NAMES = ("bytes", "nibbles", "steps", "middles", "tail")
"""The stores of a `Quantized`, in a file: codes of 8 bits, pairs of 4 bits, scales, zero points, the last tokens."""


class Quantized:
    """A store (see `store.Store`) in int8 or int4, except for the last tokens.

    A state is `(code * scale + zero_point) * channel_scale + channel_mean`. There is one bfloat16 scale and zero point
    for each token, head and group of channels. For keys each channel has a scale and a mean, fixed by calibration: some
    channels are a hundred times as large as others, and far from zero, and would round all others to nothing. Codes
    lie half a scale off the zero point, so that as many are below it as above.
    """

    def __init__(
        self, bits: int, recent: int, channel_scale: Tensor | None = None, channel_mean: Tensor | None = None
    ) -> None:
        """An empty store of 8 or 4 bits. The last `recent` tokens, up to twice as many, are not rounded.

        channel_scale, channel_mean: of rotated keys by falling variance, [heads, width], float32; None: values.
        """
        self.length = 0
        self.bits, self.recent = bits, max(recent, UNQUANTIZED_RECENT)
        fixed = [] if channel_scale is None or channel_mean is None else [channel_scale, channel_mean]
        self._channels = [each[:, None] for each in fixed]
        self._clear()

    def _clear(self) -> None:
        self._stores = tuple(Growing() for _ in NAMES)
        self._bytes, self._nibbles, self._scales, self._zero_points, self._tail = self._stores
        """Of a pair in `_nibbles`, the low bits are of the first half of the channels."""

    @property
    def batch(self) -> int:  # noqa: D102 (see Store, here and below)
        return self._scales.batch or self._tail.batch

    @property
    def whole(self) -> int:  # noqa: D102
        return self._tail.length

    def token_bytes(self, width: int) -> int:
        """Bytes of a quantized state of so many channels."""
        leading, half, groups = self._split(width)
        return leading + half + 2 * len(groups) * torch.bfloat16.itemsize

    def append(self, states: Tensor) -> None:  # noqa: D102
        if states.requires_grad:
            raise AquaError(f"int{self.bits} storage has no gradient: leave bits out, or use torch.no_grad()")
        self.length += states.shape[2]
        if self._tail.length + states.shape[2] <= 2 * self.recent:
            self._tail.append(states)
            return
        tail = states if self._tail.length == 0 else torch.cat([self._tail.read(), states], 2)
        old = tail.shape[2] - self.recent
        at_once = TOKENS_AT_ONCE if self._encoder(states) is None else old
        for start in range(0, old, at_once):
            quantized = self._quantized(tail[:, :, start : min(start + at_once, old)])
            for store, part in zip(self._stores[:-1], quantized, strict=True):
                store.append(part)
        self._tail.hold(tail[:, :, old:])

    def read(self) -> Tensor:  # noqa: D102
        tail = self._tail.read()
        if self._scales.length == 0:
            return tail
        states = tail.new_empty((*tail.shape[:2], self.length, tail.shape[3]))
        states[:, :, self._scales.length :] = tail
        if (backend := self._encoder(states)) is not None:
            fixed, out = self._fixed(states.device), states[:, :, : self._scales.length]
            backend.widen(self._bytes.read(), self._scales.read(), self._zero_points.read(), fixed, out)
            return states
        groups = self._affine(tail.shape[3])
        for part, codes in self._parts(tail.shape[3]):
            pairs = zip(groups, codes, strict=True)
            wide = torch.cat([torch.addcmul(b[:, :, part], some, a[:, :, part]) for (_, a, b), some in pairs], -1)
            if self._channels:
                scale, mean = (each.to(wide) for each in self._channels)
                wide = wide * scale + mean
            states[:, :, part] = wide
        return states

    def products(self, tall: Tensor) -> Tensor:  # noqa: D102
        last = self._tail.products(tall)
        if self._scales.length == 0:
            return last
        tall = tall.float()
        total = tall.new_zeros((*tall.shape[:3], self._scales.length))
        if self._channels:
            # Scale and mean go into the few queries, not into the many keys.
            scale, mean = (each.to(tall) for each in self._channels)
            total += tall @ mean.transpose(-1, -2)
            tall = tall * scale
        groups = self._affine(tall.shape[3])
        products: list[list[Tensor]] = [[] for _ in groups]
        for _, codes in self._parts(tall.shape[3]):
            for (channels, _, _), some, product in zip(groups, codes, products, strict=True):
                product.append(tall[..., channels] @ some.transpose(-1, -2))
        for (channels, scale, shift), product in zip(groups, products, strict=True):
            total.addcmul_(torch.cat(product, -1), scale.transpose(-1, -2))
            total.addcmul_(tall[..., channels].sum(-1, keepdim=True), shift.transpose(-1, -2))
        return torch.cat([total.to(last.dtype), last], -1)

    def mixture(self, weights: Tensor) -> Tensor:
        """See `Store`; of values only, which have no scale and mean."""
        assert not self._channels
        result = self._tail.mixture(weights[..., self._scales.length :])
        weights = weights[..., : self._scales.length].float()
        groups = self._affine(result.shape[3])
        scaled = [weights * scale.transpose(-1, -2) for _, scale, _ in groups]
        for channels, _, shift in groups:
            result[..., channels] += weights @ shift
        for part, codes in self._parts(result.shape[3]):
            for (channels, _, _), some, share in zip(groups, codes, scaled, strict=True):
                result[..., channels] += share[..., part] @ some
        return result

    def keep(self, length: int) -> None:  # noqa: D102
        self.length = min(self.length, max(0, length))
        if self.length == 0:
            self._clear()
        self._tail.keep(self.length - self._scales.length)
        for store in self._stores[:-1]:
            store.keep(self.length)

    def gather(self, places: Tensor) -> None:  # noqa: D102
        old = places[..., : places.shape[2] - self._tail.length]
        if self._scales.length:
            for store in self._stores[:-1]:
                store.gather(old)
        self.length = places.shape[2]

    def change(self, function: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        for store in self._stores:
            store.change(function)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {name: store.read() for name, store in zip(NAMES, self._stores, strict=True) if store.length}

    def restore(self, tensors: dict[str, Tensor]) -> None:  # noqa: D102
        for name, store in zip(NAMES, self._stores, strict=True):
            store.hold(tensors.get(name))
        self.length = self._scales.length + self._tail.length

    def _encoder(self, states: Tensor) -> Backend | None:
        """The backend with kernels for such states; None: they are rounded and widened here."""
        return encoder(states) if self.bits == 8 else None

    def _fixed(self, device: torch.device) -> Channels:
        """Scale and mean of the channels; None: they have none."""
        return (self._channels[0].to(device), self._channels[1].to(device)) if self._channels else None

    def _affine(self, width: int) -> list[tuple[slice, Tensor, Tensor]]:
        """Groups of channels, and scale and shift of their codes, each float32 [batch, heads, quantized tokens, 1]."""
        if self._scales.length == 0:
            return []
        scales, zero_points = (store.read().float().split(1, -1) for store in (self._scales, self._zero_points))
        return [
            (channels, scale, torch.add(zero_point, scale, alpha=0.5 - 2 ** (bits - 1)))
            for (channels, bits), scale, zero_point in zip(self._split(width)[2], scales, zero_points, strict=True)
        ]

    def _parts(self, width: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """The quantized tokens, some at a time, and the codes of each group, float32 [batch, heads, some, channels]."""
        leading, half, split = self._split(width)
        for start in range(0, self._scales.length, TOKENS_AT_ONCE):
            part = slice(start, min(start + TOKENS_AT_ONCE, self._scales.length))
            # Whole contiguous rows are converted, and the groups taken from the result: narrow slices are slow.
            codes = {}  # by the channel with which they begin
            if leading:
                codes[0] = self._bytes.read()[:, :, part].float()
            if half:
                pairs = self._nibbles.read()[:, :, part]
                codes |= {leading: (pairs & 15).float(), leading + half: (pairs >> 4).float()}
            groups = []
            for channels, _ in split:
                first = max(start for start in codes if start <= channels.start)
                groups.append(codes[first][..., channels.start - first : channels.stop - first])
            yield part, groups

    def _split(self, width: int) -> tuple[int, int, list[tuple[slice, int]]]:
        """How many leading channels have 8 bits, half of the others, and groups that share a scale, with their bits.

        Codes of the first half are the low bits of a byte, those of the other the high ones; no group is in both.
        """
        leading = width if self.bits == 8 else -(-width // LEADING_SHARE) if self._channels else 0
        half = -(-(width - leading) // 2)
        found = [(slice(0, leading), 8)] if leading else []
        for start, stop in ((leading, leading + half), (leading + half, width)):
            size = -(-half // max(1, -(-half // GROUP)))
            found += [(slice(at, min(at + size, stop)), 4) for at in range(start, stop, max(1, size))]
        return leading, half, found

    def _quantized(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes of 8 bits, pairs of 4 bits, scales and zero points: [batch, heads, tokens, any], as they are stored."""
        fixed = self._fixed(states.device)
        if (backend := self._encoder(states)) is not None:
            codes, scales, zero_points = backend.encode(states, fixed)
            return codes, codes[..., :0], scales, zero_points
        states = states.float()
        if fixed is not None:
            states = (states - fixed[1]) / fixed[0]
        codes_of, scales_of, zero_points_of = [], [], []
        leading, half, groups = self._split(states.shape[-1])
        for channels, bits in groups:
            some, most = states[..., channels], 2 ** (bits - 1)
            # Everything follows scale and zero point as they are stored, so that rounding these shifts nothing.
            zero_point = ((some.amax(-1, keepdim=True) + some.amin(-1, keepdim=True)) / 2).to(torch.bfloat16)
            some = some - zero_point.float()
            scale = (some.abs().amax(-1, keepdim=True) / (most - 0.5)).clamp_min(1e-30).to(torch.bfloat16)
            codes_of.append((some / scale.float()).floor().add_(most).clamp_(0, 2 * most - 1).to(torch.uint8))
            scales_of.append(scale)
            zero_points_of.append(zero_point)
        each = torch.cat(codes_of, -1)
        low, high = each[..., leading : leading + half], each[..., leading + half :]
        nibbles = low | (F.pad(high, (0, low.shape[-1] - high.shape[-1])) << 4)
        return each[..., :leading], nibbles, torch.cat(scales_of, -1), torch.cat(zero_points_of, -1)
