# SPDX-License-Identifier: Apache-2.0
"""One decoding step on a GPU, by the kernels that suit it: two launches, or one where the cache is small."""

from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import sm_count
from aqua_attention.ops.backends.triton.decode import check_window, decode
from aqua_attention.ops.backends.triton.decode_short import decode_short, is_taken
from aqua_attention.ops.backends.triton.prepare import prepare
from aqua_attention.ops.layout import TILE, Chosen, TiledCache
from aqua_attention.ops.plan import LayerPlan

SHORT_TILES, ALL_SHORT_TILES = 136, 2304
"""Of a sequence's cache, and of all sequences and heads, up to which one launch was faster on an H100."""


def decode_step(
    query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float
) -> tuple[Tensor, Tensor, Chosen | None]:
    """One decoding step, see `ops.api.decode`; what `prepare` says of GPUs is true of it, too."""
    splits = splits_of_short(query, cache, plan)
    if splits is not None:
        cache.check_step(query, key, value, plan)
        check_window(plan.sink, plan.recent)
        return *decode_short(query, key, value, cache, plan.rotation, splits=splits, scaling=scaling), None
    rotated, chosen = prepare(query, key, value, cache, plan, scaling)
    output = decode(rotated, chosen, cache, sink=plan.sink, recent=plan.recent, scaling=scaling, appended=True)
    return output, rotated, chosen


def splits_of_short(query: Tensor, cache: TiledCache, plan: LayerPlan) -> int | None:
    """`splits` of `decode_short`, or None where that is not the kernel to take.

    It multiplies every dimension, so all of them must count in every sequence that the cache can hold: what only the
    GPU knows is not asked for.
    """
    if (plan.selects and plan.min_length <= cache.count * TILE) or not is_taken(query, cache):
        return None
    rows = cache.shape[0] * cache.shape[1]
    if cache.count > SHORT_TILES or rows * cache.count > ALL_SHORT_TILES:
        return None
    # As many programs as run at once; one for each sequence and head where that is less than three.
    return max(0, sm_count(query) // rows - 2)
