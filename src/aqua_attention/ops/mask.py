# SPDX-License-Identifier: Apache-2.0
"""The attention mask of AQUA: for every query and key, is it hidden, approximate or exact?

A mask is None (causal: the queries are the last tokens of the keys), boolean (True: visible) or uint8 with the
three codes below. The codes carry the exact window through a model in one tensor, built once for all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, APPROXIMATE, EXACT = 0, 1, 2


def window_codes(
    visible: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    sink: int,
    recent: int,
) -> Tensor:
    """Codes of a mask from the positions of queries and keys.

    Args:
        visible: boolean [batch, heads or 1, queries, keys].
        query_positions: [batch, queries], key_positions: [batch, keys]; places among the row's real tokens, from 0.
        sink, recent: sizes of the exact window in tokens.

    Returns:
        uint8, shape of `visible`.
    """
    is_recent = key_positions[:, None, :] > query_positions[:, :, None] - recent
    is_sink = key_positions < sink
    exact = (is_recent | is_sink[:, None, :])[:, None]
    return visible.to(torch.uint8) + (visible & exact).to(torch.uint8)


def visible_and_exact(
    mask: Tensor | None, *, queries: int, keys: int, start: int, sink: int, recent: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split a mask into what a query sees and what of it is exact.

    A boolean mask carries no positions, so the window is counted among the visible keys of each query: its first
    `sink` and its last `recent`. For causal masks with or without padding that is the same window; for sliding
    windows it is not, and the integration refuses them.

    Args:
        mask: None, boolean or codes, [batch or 1, heads or 1, queries, keys].
        start: index in the keys of the first query (None only).

    Returns:
        Two boolean tensors that broadcast to [batch, heads, queries, keys].
    """
    if mask is None:
        query_positions = torch.arange(start, start + queries, device=device)[None]
        key_positions = torch.arange(keys, device=device)[None]
        visible = (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]
        codes = window_codes(visible, query_positions, key_positions, sink, recent)
        return visible, codes == EXACT
    if mask.dtype == torch.uint8:
        return mask != HIDDEN, mask == EXACT
    if sink + recent == 0:
        return mask, torch.zeros_like(mask)
    rank = mask.cumsum(-1, dtype=torch.int32)
    exact = (rank <= sink) | (rank > rank[..., -1:] - recent)
    return mask, mask & exact
