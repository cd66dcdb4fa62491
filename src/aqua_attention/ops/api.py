# SPDX-License-Identifier: Apache-2.0
"""The door: AQUA attention on tensors. It checks a request once and lets a backend take it, never another in silence.

`attend` is for a prompt, or any queries over keys by token: rotate the queries, choose dimensions, attend. `decode` is
one step over a `TiledCache`. `attention` begins with rotated queries and a choice, and keys go through `rotate`.
`write_pages`, `attend_pages` and `decode_pages` are for the pages of a serving engine.
"""

from typing import Any

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backend import choose, paged_backend, tiled_backend
from aqua_attention.ops.backend import rotate as rotate
from aqua_attention.ops.layout import Chosen, TiledCache
from aqua_attention.ops.mask import HIDDEN
from aqua_attention.ops.pages import PagedCache, PagedLayer, Step
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.scored_pages import PagedSequences, ScoredPages
from aqua_attention.ops.scored_step import attend_selected
from aqua_attention.ops.tokens import everything_read

WINDOW_QUERIES = 1024
"""Queries of a layer with a sliding window that one mask is made for."""


def attend(call: Call, plan: LayerPlan, impl: str = "auto") -> Attended:
    """AQUA attention of queries as the model computes them, after rotary embedding.

    Args:
        call: from `LayerPlan.call`.
        impl: "triton" (our kernels for a whole prompt on a GPU), "fused" (dense fused kernels on masked queries), "cpu"
            (one query that chooses tokens, in C), "chunked" (the reference in bounded memory), "reference" (whole score
            matrix), or "auto": the first of these that can take the call. All compute the same function;
            `ops.backend.choose` says which one "auto" is.

    Raises:
        AquaError: shapes that do not fit, an unknown `impl`, or one that cannot take this call.
    """
    _check(call, None, plan.rotation.shape[2], plan.head_dim)
    own = plan.for_queries(call.query.shape[2])
    if own is plan:
        return choose(call, plan, impl).attend(call, plan)
    if not own.has_window_store:
        # Nothing is approximate, so a mask only says what is visible.
        mask = call.mask
        visible = mask.ne(HIDDEN) if mask is not None and mask.dtype == torch.uint8 else mask
        call = call._replace(sink=0, recent=0, mask=visible)
    attended = choose(call, own, impl).attend(call, own)
    return attended._replace(reading=everything_read(call, own)) if call.is_observed else attended


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor | None,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    impl: str = "auto",
    **options: Any,
) -> Tensor:
    """AQUA attention on rotated queries and keys; shapes and meaning as in `ops.reference.attention_reference`.

    Args:
        impl: as for `attend`, but for "triton", whose kernels rotate and choose by themselves.
        options: `sink`, `recent`, `softcap`, `s_aux` of `attention_reference`.

    Raises:
        AquaError: shapes that do not fit, an unknown `impl`, or one that cannot take this call.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.pop("sink", 0), options.pop("recent", 0)
    call = Call(query, key, value, mask, *window, scaling, **options)
    _check(call, selected, query.shape[-1], query.shape[-1])
    return choose(call, None, impl).attend_rotated(call, selected)


def decode(
    query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, *, scaling: float | None = None
) -> tuple[Tensor, Tensor, Chosen | None]:
    """One decoding step: rotate one query and key token a sequence, choose, append key and value, attend.

    The sequences are one longer afterwards, where they have room.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        plan: dimensions are shared by a group.
        scaling: factor of the scores; default the plan's.

    Returns:
        The output [batch, num_attention_heads, value_dim], queries as keys were multiplied with them, [batch,
        num_attention_heads, kept], and what was multiplied; None: every dimension.

    Raises:
        AquaError: shapes or dtypes that do not fit the cache, or kernels that cannot run here.
    """
    backend = tiled_backend(cache.tail.device)
    return backend.decode(query, key, value, cache, plan, plan.scaling if scaling is None else scaling)


def write_pages(
    key: Tensor, value: Tensor, cache: PagedCache, layer: PagedLayer, slots: Tensor, *, impl: str = "auto"
) -> None:
    """Write tokens to their pages, keys rotated where the layer has a plan.

    Args:
        key: [tokens, num_key_value_heads, head_dim], as the model computes them, after rotary embedding; value:
            [tokens, num_key_value_heads, value_dim].
        slots: int64 [tokens], see `PagedCache.write`.
        impl: as for `decode_pages`.
    """
    backend = paged_backend(key, cache, layer, impl)
    if backend is not None:
        backend.write_paged(key, value, cache, layer, slots)
        return
    if layer.plan is not None:
        key = rotate(key.transpose(0, 1)[None], layer.plan.rotation)[0].transpose(0, 1)
    cache.write(key, value, slots)


def attend_pages(query: Tensor, cache: PagedCache, layer: PagedLayer, blocks: Tensor, length: int) -> Tensor:
    """Attention of the last tokens of one sequence to its pages, which hold them already: a prompt, or a part of one.

    Args:
        query: [tokens, num_attention_heads, head_dim], as the model computes them.
        blocks: pages of the sequence, in order; length: its tokens.

    Returns:
        [tokens, num_attention_heads, value_dim].
    """
    key, value = cache.read(blocks, length, query.dtype)
    tall, plan = query.transpose(0, 1)[None], layer.plan
    if plan is not None:
        call = plan.call(tall, key, value, scaling=layer.scaling, softcap=layer.softcap)
        return attend(call, plan).output[0].transpose(0, 1)
    options: dict[str, Any] = {"scaling": layer.scaling, "softcap": layer.softcap}
    if layer.window is None or length <= layer.window:
        return attention(tall, key, value, None, **options)[0].transpose(0, 1)
    outputs: list[Tensor] = []
    for part in tall.split(WINDOW_QUERIES, 2):
        stop = length - tall.shape[2] + sum(each.shape[2] for each in outputs) + part.shape[2]
        start = max(0, stop - part.shape[2] - layer.window + 1)
        behind = torch.arange(stop - part.shape[2], stop, device=query.device)[:, None]
        behind = behind - torch.arange(start, stop, device=query.device)
        mask = ((behind >= 0) & (behind < layer.window))[None, None]
        outputs.append(attention(part, key[:, :, start:stop], value[:, :, start:stop], None, mask=mask, **options))
    return torch.cat(outputs, 2)[0].transpose(0, 1)


def decode_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    layer: PagedLayer,
    step: Step,
    output: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """One decoding step over pages: write one key and value token a sequence, attend with one query.

    Kernels do it without waiting for the GPU and in fixed shapes, so that it can be recorded as a CUDA graph.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise.
        output: [batch, num_attention_heads, value_dim], contiguous; is written, with zeros for sequences of no token.
        impl: "triton", "torch" (a sequence after the other), or "auto": kernels on a GPU where they can.
    """
    backend = paged_backend(query, cache, layer, impl)
    if backend is not None:
        backend.decode_paged(query, key, value, cache, layer, step, output)
        return
    write_pages(key, value, cache, layer, step.slots, impl="torch")
    if isinstance(cache, ScoredPages) and layer.plan is not None:
        rotated = rotate(query[:, :, None], layer.plan.rotation)[:, :, 0]
        sequences = PagedSequences.of(cache, step.block_table, step.lengths)
        output.copy_(attend_selected(rotated, sequences, layer.plan, layer.scaling, layer.softcap).output)
        return
    for row, length in enumerate(step.lengths.tolist()):
        if length == 0:
            output[row] = 0
        else:
            output[row] = attend_pages(query[row, None], cache, layer, step.block_table[row], length)[0]


def reserve_pages(
    layer: PagedLayer, num_attention_heads: int, value_dim: int, dtype: torch.dtype, *, sequences: int, length: int
) -> None:
    """Allocate what steps over pages work in, in `layer.memory`, before any is recorded; else the first step does.

    Args:
        dtype: of queries.
        sequences: of a step at most; length: tokens of one, `Step.longest`.

    Raises:
        AquaError: there is no room for it.
    """
    if layer.plan is not None:
        backend = tiled_backend(layer.plan.rotation.device)
        backend.reserve_paged(layer, num_attention_heads, value_dim, dtype, sequences=sequences, length=length)


def _check(call: Call, selected: Tensor | None, width: int, head_dim: int) -> None:
    """Raise AquaError for tensors that do not fit each other.

    Args:
        width: of the keys; head_dim: of the queries.
    """
    query, key, value, mask, s_aux = call.query, call.key, call.value, call.mask, call.s_aux
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[2] < 1:
            raise AquaError(f"{name} is {tuple(tensor.shape)}: it must be [batch, heads, tokens, width], not empty")
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if query.shape[3] != head_dim:
        raise AquaError(f"query is {tuple(query.shape)}: its heads must have {head_dim} dimensions")
    if key.shape != (batch, kv_heads, keys, width):
        raise AquaError(f"key is {tuple(key.shape)}: query {tuple(query.shape)} needs its batch and width")
    if value.shape[:3] != key.shape[:3]:
        raise AquaError(f"value is {tuple(value.shape)}: it must have the heads and tokens of key {tuple(key.shape)}")
    if heads % kv_heads:
        raise AquaError(f"{heads} query heads do not divide into {kv_heads} key-value heads: give a multiple")
    if selected is not None and (selected.shape != query.shape or selected.dtype != torch.bool):
        raise AquaError(
            f"selected is {selected.dtype} {tuple(selected.shape)}: it must be boolean, in the shape of query "
            f"{tuple(query.shape)}"
        )
    if mask is None and queries > keys:
        raise AquaError(f"{queries} causal queries need at least as many keys, there are {keys}")
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.uint8):
            raise AquaError(f"mask is {mask.dtype}: it must be boolean (True: visible) or uint8 codes (ops.mask)")
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if not fits or mask.shape[2:] != (queries, keys):
            raise AquaError(
                f"mask is {tuple(mask.shape)}: it must be [{batch} or 1, {heads} or 1, queries {queries}, keys {keys}]"
            )
    if s_aux is not None and s_aux.shape != (heads,):
        raise AquaError(f"s_aux is {tuple(s_aux.shape)}: it must be one logit for each of {heads} query heads")
    if not query.dtype == key.dtype == value.dtype:
        raise AquaError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: they must be of one dtype"
        )
