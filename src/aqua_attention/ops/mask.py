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
    first_token: Tensor,
    sink: int,
    recent: int,
) -> Tensor:
    """Codes of a mask from the positions of queries and keys.

    Args:
        visible: boolean [batch, heads or 1, queries, keys].
        query_positions: [queries], key_positions: [keys]; indices in the padded sequence.
        first_token: [batch], index of each row's first non-padding token.
        sink, recent: sizes of the exact window in tokens.

    Returns:
        uint8, shape of `visible`.
    """
    is_recent = key_positions > query_positions[:, None] - recent
    is_sink = key_positions < first_token[:, None] + sink
    exact = is_recent[None, None] | is_sink[:, None, None, :]
    return visible.to(torch.uint8) + (visible & exact).to(torch.uint8)


def visible_and_exact(
    mask: Tensor | None, *, queries: int, keys: int, start: int, sink: int, recent: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split a mask into what a query sees and what of it is exact.

    A boolean mask carries no positions, so the window is counted among the visible keys of each query: its first
    `sink` and its last `recent`. For causal masks with or without padding that is the same window.

    Args:
        mask: None, boolean or codes, [batch or 1, heads or 1, queries, keys].
        start: index in the keys of the first query (None only).

    Returns:
        Two boolean tensors that broadcast to [batch, heads, queries, keys].
    """
    if mask is None:
        query_positions = torch.arange(start, start + queries, device=device)
        key_positions = torch.arange(keys, device=device)
        visible = (key_positions <= query_positions[:, None])[None, None]
        first_token = torch.zeros(1, dtype=torch.long, device=device)
        codes = window_codes(visible, query_positions, key_positions, first_token, sink, recent)
        return visible, codes == EXACT
    if mask.dtype == torch.uint8:
        return mask != HIDDEN, mask == EXACT
    if sink + recent == 0:
        return mask, torch.zeros_like(mask)
    rank = mask.cumsum(-1, dtype=torch.int32)
    exact = (rank <= sink) | (rank > rank[..., -1:] - recent)
    return mask, mask & exact
