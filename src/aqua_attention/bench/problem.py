# SPDX-License-Identifier: Apache-2.0
"""One decoding step of random tensors for the kernels, and how far a result is from float64."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import REPORT, AquaError
from aqua_attention.machine import Shape
from aqua_attention.ops.reference import attention_reference

OURS = AquaConfig(selection="weighted", share="group", sink=4, recent=64)
"""What is measured at several k_ratio, with another exact window where one is given."""
K_RATIOS = (1.0, 0.75, 0.5, 0.25)
LOUD = 4.0
"""Keys of the first and the last token are so many times as large: among many, one that is missed would not be seen."""


class Problem(NamedTuple):
    """A token of each sequence, and what a cache holds.

    Attributes:
        query: [batch, num_attention_heads, head_dim].
        new: key and value of the token, each [batch, num_key_value_heads, head_dim].
        keys, values: [batch, num_key_value_heads, length, head_dim], those of the token last.
        rotation: float32 [num_key_value_heads, head_dim, head_dim].
        key_rms: float32 [num_key_value_heads, head_dim].
    """

    query: Tensor
    new: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor
    rotation: Tensor
    key_rms: Tensor

    @classmethod
    def random(cls, shape: Shape, *, batch: int, length: int) -> Problem:
        """The same one each time."""
        device, heads, kv_heads, head_dim, dtype = shape
        generator = torch.Generator(device).manual_seed(0)

        normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        keys, values = (normal(batch, kv_heads, length, head_dim) for _ in range(2))
        for token in (0, -1):
            keys[:, :, token] *= LOUD
        query, new = normal(batch, heads, head_dim), (keys[:, :, -1].clone(), values[:, :, -1].clone())
        rotation = torch.linalg.qr(normal(kv_heads, head_dim, head_dim, dtype=torch.float32)).Q.contiguous()
        key_rms = normal(kv_heads, head_dim, dtype=torch.float32).abs() + 0.1
        return cls(query, new, keys, values, rotation, key_rms)


class Attended(NamedTuple):
    """What a result should be attention of, see `attention_reference`; all in one basis.

    Attributes:
        query: [batch, num_attention_heads, dim], keys, values: [batch, num_key_value_heads, length, dim].
        selected: boolean [batch, num_attention_heads, 1, dim]; None: every dimension.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    selected: Tensor | None = None
    sink: int = 0
    recent: int = 0

    def part(self, rows: slice, kv_heads: slice = slice(None)) -> Attended:
        """Some sequences and key-value heads of it."""
        each = self.query.shape[1] // self.keys.shape[1]
        heads = slice(*(None if bound is None else bound * each for bound in (kv_heads.start, kv_heads.stop)))
        selected = None if self.selected is None else self.selected[rows, heads]
        keys, values = self.keys[rows, kv_heads], self.values[rows, kv_heads]
        return self._replace(query=self.query[rows, heads], keys=keys, values=values, selected=selected)

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Computed in `dtype`, then float64: [batch, num_attention_heads, dim]."""
        query, keys, values = (states.to(dtype) for states in (self.query[:, :, None], self.keys, self.values))
        found = attention_reference(query, keys, values, self.selected, sink=self.sink, recent=self.recent)
        return found[:, :, 0].double()

    def check(self, found: Tensor, name: str, tolerance: float, least: float = 0.0) -> None:
        """Raise AquaError when `found` is far from float64.

        It may be `tolerance` times as far as the reference in the query's dtype is, and `least` for its size.
        """
        exact = self.reference(torch.float64)
        yardstick, error = (float((each.double() - exact).norm()) for each in (self.reference(self.query.dtype), found))
        limit = tolerance * yardstick + least * float(exact.norm())
        if not error <= limit:
            raise AquaError(f"a kernel is wrong: {name} is {error:.2e} from float64, {limit:.2e} is allowed: {REPORT}")


def read_sizes(sizes: list[str]) -> list[tuple[int, int]]:
    """Sequences and tokens of "8x32768" and the like; an AquaError if it is written in another way."""
    found = []
    for size in sizes:
        batch, _, length = size.partition("x")
        if not (batch.isdecimal() and length.isdecimal() and int(batch) > 0 and int(length) > 1):
            raise AquaError(f"size is {size!r}: it must be sequences x tokens, such as 8x32768")
        found.append((int(batch), int(length)))
    return found
