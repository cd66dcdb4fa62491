# SPDX-License-Identifier: Apache-2.0
"""The attention mask of AQUA: for every query and key, is it hidden, approximate or exact?

A mask is None (causal: the queries are the last tokens of the keys), boolean (True: visible) or uint8 with the
four codes below. The codes carry the exact window, and which queries are short (`min_length`), through a model in one
tensor, built once for all layers.
"""

import torch
from torch import Tensor

HIDDEN, APPROXIMATE, EXACT, WHOLE = 0, 1, 2, 3
"""WHOLE: outside the exact window, but the query is short and multiplies every stored dimension."""


def window_codes(
    visible: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    sink: int,
    recent: int,
    min_length: int = 0,
) -> Tensor:
    """Codes of a mask from the positions of queries and keys.

    Args:
        visible: boolean [batch, heads or 1, queries, keys].
        query_positions: [batch, queries], key_positions: [batch, keys]; places among the row's real tokens, from 0.
        sink, recent: sizes of the exact window in tokens.
        min_length: queries at an earlier place than the last of so many tokens are short.

    Returns:
        uint8, shape of `visible`.
    """
    behind = query_positions[:, :, None] - key_positions[:, None, :]
    is_recent = (behind >= 0) & (behind < recent)  # later tokens, where they are visible, are not recent ones
    is_sink = key_positions < sink
    exact = (is_recent | is_sink[:, None, :])[:, None]
    codes = visible.to(torch.uint8) + (visible & exact).to(torch.uint8)
    if min_length == 0:
        return codes
    is_short = (query_positions + 1 < min_length)[:, None, :, None]
    return torch.where(is_short & (codes == APPROXIMATE), WHOLE, codes)


def visible_and_exact(
    mask: Tensor | None, *, queries: int, keys: int, start: int, sink: int, recent: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split a mask into what a query sees and what of it is exact.

    A boolean mask carries no positions, so the window is counted among the visible keys of each query: its first
    `sink`, and the last `recent` up to the query. For masks with or without padding that is the same window; for
    sliding windows it is not, and the integration refuses them.

    Args:
        mask: None, boolean or codes, [batch or 1, heads or 1, queries, keys].
        start: index in the keys of the first query; with a boolean mask it may be too high, by the hidden
            keys at the end of a static cache.

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
    own = torch.arange(start, start + queries, device=device).clamp(0, keys - 1)[:, None]
    seen = rank.gather(-1, own.expand(*rank.shape[:-1], 1))
    is_recent = (torch.arange(keys, device=device) <= own) & (rank > seen - recent)
    return mask, mask & ((rank <= sink) | is_recent)


def mask_rows(mask: Tensor | None, rows: slice, *, sink: int, recent: int) -> Tensor | None:
    """The part of a mask for some of its queries; codes where the rows alone no longer say which tokens are recent."""
    if mask is None:
        return None
    part = mask[:, :, rows]
    if mask.dtype == torch.uint8 or sink + recent == 0:
        return part
    queries, keys = mask.shape[2:]
    visible, exact = visible_and_exact(
        part,
        queries=part.shape[2],
        keys=keys,
        start=keys - queries + rows.start,
        sink=sink,
        recent=recent,
        device=mask.device,
    )
    return visible.to(torch.uint8) + exact.to(torch.uint8)


def bidirectional(queries: int, keys: int, *, sink: int, device: torch.device) -> Tensor:
    """The mask of queries that see every key: boolean, or with `sink` codes, whose first keys are exact.

    Returns:
        [1, 1, queries, keys], of one row in memory.
    """
    if sink == 0:
        row = torch.ones(keys, dtype=torch.bool, device=device)
    else:
        row = torch.full((keys,), APPROXIMATE, dtype=torch.uint8, device=device)
        row[:sink] = EXACT
    return row.expand(1, 1, queries, keys)


def short_queries(
    mask: Tensor | None, min_length: int, *, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Which queries see fewer than `min_length` tokens, so that they multiply every dimension.

    Args:
        mask: None, boolean (what a query sees is counted) or codes (they say so), [batch or 1, heads or 1, queries,
            keys].

    Returns:
        Boolean [batch or 1, heads or 1, queries]; None when min_length is 0.
    """
    if min_length == 0:
        return None
    if mask is None:
        return (torch.arange(keys - queries, keys, device=device) + 1 < min_length)[None, None]
    if mask.dtype == torch.uint8:
        return (mask == WHOLE).any(-1)
    return mask.sum(-1) < min_length
