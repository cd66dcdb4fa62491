# SPDX-License-Identifier: Apache-2.0
"""A decoding step over pages that chooses tokens, and the memory that it works in, for batches of any size."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.paged_prepare import prepare_paged
from aqua_attention.ops.backends.triton.token_step import attend_selected
from aqua_attention.ops.backends.triton.token_work import Sizes, TokenWork
from aqua_attention.ops.layout import TILE
from aqua_attention.ops.pages import PagedLayer, Step
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored_pages import PagedSequences, ScoredPages

Shape = tuple[int, int, int, int, int]
"""Of query heads, key-value heads, kept, value_dim, and dimensions that score."""


class TokenMemory:
    """Room for steps of up to `rows` sequences, each of up to so many tiles; a step of fewer takes its first part.

    All is allocated here, so that steps can be recorded. What is zero between two steps is so for all of them.
    """

    def __init__(self, rows: int, tiles: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.tiles, self._shape, self._dtype = rows, tiles, shape, dtype
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._works: dict[int, TokenWork] = {}
        most: dict[str, tuple[torch.dtype, int]] = {}
        # Fewer sequences have more programs each, so it is not always the largest batch that needs most.
        for batch in range(1, rows + 1):
            for name, (kind, found) in self._sizes(batch).parts(dtype).items():
                most[name] = kind, max(prod(found), most.get(name, (kind, 0))[1])
        try:
            self._flat = {name: torch.zeros(count, dtype=kind, device=device) for name, (kind, count) in most.items()}
        except torch.OutOfMemoryError as error:
            size = sum(count * kind.itemsize for kind, count in most.values()) / 2**30
            raise AquaError(
                f"choosing tokens works in {size:.1f} GiB for {rows} sequences of {tiles * TILE} tokens, which the GPU "
                "does not have: allow fewer sequences, or shorter ones"
            ) from error

    def work(self, batch: int) -> TokenWork:
        """For a step of so many sequences."""
        if batch not in self._works:
            sizes = self._sizes(batch)
            parts = sizes.parts(self._dtype).items()
            made = {name: self._flat[name][: prod(shape)].view(shape) for name, (_, shape) in parts}
            self._works[batch] = TokenWork.within(sizes, made)
        return self._works[batch]

    def _sizes(self, batch: int) -> Sizes:
        heads, kv_heads, kept, value_dim, k = self._shape
        return Sizes.of((batch, kv_heads, kept, value_dim, self.tiles), heads, k, self._like, paged=True)

    @staticmethod
    def shared(
        memory: dict[Any, Any], rows: int, length: int, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> TokenMemory:
        """That of the layers which share `memory`; made where it has no room for so many sequences and tokens.

        An AquaError while a step is recorded: those that were recorded before know where the former memory lies.
        """
        key, tiles = (shape, dtype, device), -(-length // TILE)
        found = memory.get(key)
        if found is None or found.rows < rows or found.tiles < tiles:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise AquaError(f"no memory for {rows} sequences of {length} tokens: reserve_pages before recording")
            memory.pop(key, None)
            found = memory[key] = TokenMemory(rows, tiles, shape, dtype, device)
        return found


def shape_of(heads: int, value_dim: int, plan: LayerPlan) -> Shape:
    """Of a layer with so many query heads."""
    return heads, plan.num_key_value_heads, plan.kept, value_dim, plan.k


def decode_scored_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: ScoredPages,
    layer: PagedLayer,
    plan: LayerPlan,
    step: Step,
    output: Tensor,
) -> None:
    """`ops.api.decode_pages` over pages that have what tokens are chosen by: four launches, and nothing is
    allocated once `TokenMemory` is there.
    """
    batch, heads, _ = query.shape
    length = step.longest or step.block_table.shape[1] * cache.block_size
    shape = shape_of(heads, cache.value_dim, plan)
    memory = TokenMemory.shared(layer.memory, batch, length, shape, query.dtype, query.device)
    work = memory.work(batch)
    prepare_paged(query, key, value, cache, plan, step, work)
    sequences = PagedSequences(cache, step.block_table, step.lengths, memory.tiles)
    attend_selected(sequences, plan, work, output, scaling=layer.scaling, appended=False)
