# SPDX-License-Identifier: Apache-2.0
"""AQUA attention in plain torch: by fused dense kernels, in blocks, or whole as the reference has it.

Zeroing the dropped entries of a query and running dense attention is AQUA. With an exact window, the tokens
outside it and inside it are two partial softmaxes, merged by their log-sum-exp; causal attention of
`query[sink + recent:]` on `key[sink : length - recent]` is exactly the outside part, so it needs no mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.ops import dense
from aqua_attention.ops.backend import READS_ALL, Backend, rotate
from aqua_attention.ops.mask import short_queries
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.reference import attention_chunked, attention_reference
from aqua_attention.ops.select import select_dimensions
from aqua_attention.ops.tokens import attend_to_chosen


class _Torch(Backend):
    """Rotate, choose, and attend with the choice as a mask."""

    for_rotated = True

    def attend(self, call: Call, plan: LayerPlan) -> Attended:
        """See `Backend`."""
        query, selected, short = rotate(call.query, plan.rotation), None, None
        queries, keys, chooses_tokens = query.shape[2], call.key.shape[2], plan.config.chooses_tokens
        # Choosing is what short sequences should not pay for; where tokens keep fewer dimensions, that must be said.
        if call.mask is not None or keys >= plan.min_length or plan.has_window_store or chooses_tokens:
            short = short_queries(call.mask, plan.min_length, queries=queries, keys=keys, device=query.device)
            selected = select_dimensions(query, plan, short, scaling=call.scaling)
        if chooses_tokens:
            output, reading = attend_to_chosen(call._replace(query=query), plan, selected, short)
            return Attended(output, selected, query.shape, reading)
        return Attended(self.attend_rotated(call._replace(query=query), selected), selected, query.shape)


class Reference(_Torch):
    """The specification: whole score matrices."""

    name = "reference"

    def attend_rotated(self, call: Call, selected: Tensor | None) -> Tensor:
        """See `Backend`."""
        return attention_reference(call.query, call.key, call.value, selected, **call.options)


class Chunked(_Torch):
    """The same in bounded memory."""

    name = "chunked"

    def attend_rotated(self, call: Call, selected: Tensor | None) -> Tensor:
        """See `Backend`."""
        return attention_chunked(call.query, call.key, call.value, selected, **call.options)


class Fused(_Torch):
    """Fused dense kernels on masked queries: no score matrix in memory."""

    name = "fused"

    def why_not(self, call: Call, plan: LayerPlan | None) -> str | None:
        """See `Backend`."""
        if plan is not None and plan.config.chooses_tokens:
            return READS_ALL
        if call.softcap is not None:
            return "fused attention has no softcap"
        if call.s_aux is not None:
            return "fused attention has no extra softmax logit (s_aux)"
        if call.mask is not None and (call.has_window or call.mask.dtype != torch.bool):
            return "an exact window with padding or a sliding window needs its own mask"
        if not call.has_window:
            return None
        if call.query.shape[2] != call.key.shape[2]:
            return "an exact window needs as many queries as keys (prefill)"
        if torch.is_grad_enabled() and (call.query.requires_grad or call.key.requires_grad):
            return "merging by log-sum-exp has no gradient"
        return None

    def attend_rotated(self, call: Call, selected: Tensor | None) -> Tensor:
        """See `Backend`."""
        return attention_fused(call, selected)


def attention_fused(call: Call, selected: Tensor | None) -> Tensor:
    """`attention_reference`, for what `Fused` does not refuse.

    One difference, which dense fused kernels share: under a boolean mask, a NaN in a key that the mask hides may spoil
    queries that do not see it, because these kernels add minus infinity to its score.
    """
    query, key, value, mask, sink, recent, scaling = call[:7]
    width = max(query.shape[-1], value.shape[-1])
    query, key = (dense.widened(states, width) for states in (query, key))
    if selected is not None:
        selected = dense.widened(selected, width)
    length, window = query.shape[2], sink + recent
    if selected is None or (window > 0 and length <= window):
        return dense.dense_attention(query, key, value, mask, scaling)
    masked_query = torch.where(selected, query, 0)
    if window == 0:
        return dense.dense_attention(masked_query, key, value, mask, scaling)

    outside = slice(sink, length - recent)
    far, far_lse = dense.attention_with_lse(
        masked_query[:, :, window:], key[:, :, outside], value[:, :, outside], scaling
    )
    near, near_lse = _window_attention(query, key, value, sink, recent, scaling)
    share = torch.sigmoid(near_lse[:, :, window:] - far_lse)[..., None]
    near[:, :, window:].mul_(share).add_(far * (1 - share))
    return near.to(value.dtype)


def _window_attention(
    query: Tensor, key: Tensor, value: Tensor, sink: int, recent: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to its first `sink` and last `recent` tokens only, in blocks of queries.

    Returns float32 (or wider) output [batch, heads, length, value_dim] and log-sum-exp [batch, heads, length].
    """
    batch, heads, length, width = query.shape
    kv_heads, dtype = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    block = max(64, recent)
    count = -(-length // block)
    band = block + max(recent, 1) - 1
    # Block b has the queries [b * block, (b + 1) * block) and the keys from recent - 1 before its first query on.
    before, after = band - block, count * block - length

    def blocks_of(states: Tensor) -> Tensor:
        return F.pad(states, (0, 0, before, after)).unfold(2, band, block)

    key_blocks, value_blocks = blocks_of(key), blocks_of(value)
    first_key, first_value = key[:, :, None, :sink], value[:, :, None, :sink]
    query_blocks = F.pad(query, (0, 0, 0, after)).reshape(batch, kv_heads, heads // kv_heads, count, block, width)
    outputs, lses = [], []
    blocks_at_once = max(1, dense.SCORES_AT_ONCE // (batch * heads * block * (band + sink)))
    for start in range(0, count, blocks_at_once):
        part = slice(start, min(start + blocks_at_once, count))
        size = part.stop - part.start
        tall = query_blocks[:, :, :, part].transpose(2, 3).reshape(batch, kv_heads, size, -1, width).to(dtype)
        near = tall @ key_blocks[:, :, part].to(dtype)
        first = tall @ first_key.transpose(-1, -2).to(dtype)
        scores = torch.cat([first, near], -1).reshape(batch, kv_heads, size, heads // kv_heads, block, -1) * scaling
        hidden = _hidden_in_window(part, block, band, before, sink, recent, query.device)
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        # A query beyond the sequence (padding of the last block) may see nothing: its rows are cut off below.
        probabilities = (scores - lse[..., None]).exp().reshape(batch, kv_heads, size, -1, sink + band)
        output = probabilities[..., :sink] @ first_value.to(dtype)
        output += probabilities[..., sink:] @ value_blocks[:, :, part].to(dtype).transpose(-1, -2)
        outputs.append(output.reshape(batch, kv_heads, size, heads // kv_heads, block, -1).transpose(2, 3))
        lses.append(lse.transpose(2, 3))
    output = torch.cat(outputs, 3).reshape(batch, heads, count * block, -1)[:, :, :length]
    lse = torch.cat(lses, 3).reshape(batch, heads, count * block)[:, :, :length]
    return output, lse


def _hidden_in_window(
    part: slice, block: int, band: int, before: int, sink: int, recent: int, device: torch.device
) -> Tensor:
    """Boolean [blocks, block, sink + band]: which of the keys laid beside a block a query must not see."""
    blocks = torch.arange(part.start, part.stop, device=device)[:, None, None]
    queries = blocks * block + torch.arange(block, device=device)[:, None]
    near = blocks * block - before + torch.arange(band, device=device)
    first = torch.arange(sink, device=device)
    # A first token inside the band is counted once, as a first token.
    near_hidden = (near > queries) | (near <= queries - recent) | (near < sink)
    return torch.cat([first > queries, near_hidden], -1)
