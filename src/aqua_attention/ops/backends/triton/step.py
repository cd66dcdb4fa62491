# SPDX-License-Identifier: Apache-2.0
"""One decoding step on a GPU, by the kernels that suit it: two launches, or one where the cache is small."""

from __future__ import annotations

from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.ops.backends.triton.decode import check_window, decode, sm_count
from aqua_attention.ops.backends.triton.decode_short import decode_short, is_taken
from aqua_attention.ops.backends.triton.prepare import prepare
from aqua_attention.ops.layout import TILE, Chosen, TiledCache

SHORT_TILES, ALL_SHORT_TILES = 136, 2304
"""Of a sequence's cache, and of all sequences and heads, up to which one launch was faster on an H100."""


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TiledCache,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    scaling: float | None = None,
) -> tuple[Tensor, Tensor, Chosen | None]:
    """Rotate one query and key token a sequence, append key and value, attend; the sequences are one longer afterwards.

    Args: see `prepare`; `config.sink` and `config.recent` are the exact window.
        scaling: factor of the scores; default 1/sqrt(head_dim).

    Returns:
        The output [batch, num_attention_heads, value_dim], rotated queries [batch, num_attention_heads, kept], and what
        was multiplied (None: every dimension).

    Raises:
        AquaError: as `prepare` and `decode` do.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    splits = splits_of_short(query, cache, config)
    if splits is not None:
        cache.check_step(query, key, value, rotation, key_rms, config)
        check_window(config.sink, config.recent)
        return *decode_short(query, key, value, cache, rotation, splits=splits, scaling=scaling), None
    rotated, chosen = prepare(query, key, value, cache, rotation, key_rms, config, scaling=scaling)
    output = decode(rotated, chosen, cache, sink=config.sink, recent=config.recent, scaling=scaling, appended=True)
    return output, rotated, chosen


def splits_of_short(query: Tensor, cache: TiledCache, config: AquaConfig) -> int | None:
    """`splits` of `decode_short`, or None where that is not the kernel to take.

    It multiplies every dimension, so all of them must count in every sequence that the cache can hold: what only the
    GPU knows is not asked for.
    """
    batch, groups, kept, *_ = cache.shape
    whole = config.logit_error is None and config.selected_dims(query.shape[-1]) >= kept
    if not (whole or config.threshold > cache.count * TILE) or not is_taken(query, cache):
        return None
    rows = batch * groups
    if cache.count > SHORT_TILES or rows * cache.count > ALL_SHORT_TILES:
        return None
    # As many programs as run at once; one for each sequence and head where that is less than three.
    return max(0, sm_count(query) // rows - 2)
