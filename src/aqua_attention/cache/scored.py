# SPDX-License-Identifier: Apache-2.0
"""A cache layer of fixed size whose decoding steps choose tokens (AQUA-Select), for the kernels of a GPU.

Keys and values lie by token, because chosen ones are read whole. Beside them is a copy of the keys by dimension in 8
or 4 bits, which is scored: see `ops.scored`. All else is as in `TiledLayer`: prompts, padding, room, what is refused.
"""

from typing import Any

import torch
from torch import Tensor

from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization
from aqua_attention.ops.tokens import reading_of, scored_bytes


class ScoredLayer(TiledLayer):
    """A cache layer of fixed size: keys and values by token, and what is scored of the keys, see `ScoredCache`."""

    cache: ScoredCache  # type: ignore[assignment]

    def __init__(self, plan: LayerPlan, *, max_cache_len: int, memory: dict[Any, Any]) -> None:
        """`memory`: what kernels work in; the layers of a model share one, because their steps follow one another."""
        self._memory = memory
        super().__init__(plan, max_cache_len=max_cache_len)

    def addresses(self) -> list[int]:
        """See `Recordable`."""
        units = (each.data_ptr() for each in self.cache.quantization)
        return [*super().addresses(), *units, *(each for work in self._memory.values() for each in work.addresses)]

    def _new_cache(self, value_dim: int) -> ScoredCache:  # type: ignore[override]
        self._memory.clear()  # of other sizes
        given: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "memory": self._memory}
        given |= {"bits": self.plan.config.bits, "score_bits": self.plan.config.score_bits}
        return ScoredCache.empty(self.batch_size, value_dim, self.max_cache_len, score_quantization(self.plan), **given)

    def _by_token(self) -> tuple[Tensor, Tensor]:
        return self.cache.held()

    def _step(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Attended:
        plan = self.plan
        output, chosen, counts = self._backend.decode_scored(query, key, value, self.cache, plan, call.scaling)
        shape = torch.Size((*query.shape[:2], 1, plan.kept))
        if not call.is_observed:
            return Attended(output, None, shape)
        lengths = self.cache.lengths.clamp(min=0)
        is_short = (lengths < plan.min_length)[:, None, None, None]
        # Short sequences read all, whatever scored them.
        selected = chosen.selected(query.shape[1]) | is_short if plan.selects else None
        read, seen = counts.long()[..., None], lengths.long()[:, None, None].repeat(1, key.shape[1], 1)
        scored = scored_bytes(plan.k, plan.config.score_bits)
        reading = reading_of(read, read, seen, scored, plan, value.shape[2])
        return Attended(output, selected, shape, reading)
