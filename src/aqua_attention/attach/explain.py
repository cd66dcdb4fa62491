# SPDX-License-Identifier: Apache-2.0
"""What an attachment runs on, what that reads, and the one setting that prevents something faster.

Nothing is decided here. Reasons come from the places that decide, and bring their remedies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from aqua_attention.attach.compiled import CompiledParts
from aqua_attention.attach.explanation import Bytes, Decoding, Explanation, LastCall, Prompt
from aqua_attention.attach.generate import NEVER_CALLED, GenerateCaches
from aqua_attention.attach.possible import sinks_of, softcap_of, why_not_host_free
from aqua_attention.attach.recording import NATURAL, Recorder, why_not_recorded
from aqua_attention.cache.cache import AquaCache, sliding_windows
from aqua_attention.cache.growing import FEW_QUERIES, RotatedLayer
from aqua_attention.cache.layer import RotatedSlidingLayer
from aqua_attention.cache.ring import RingLayer
from aqua_attention.cache.scored import ScoredLayer
from aqua_attention.cache.stored import choice_bytes, held_bytes, states_bytes, token_bytes
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.errors import Reason, remedy_of
from aqua_attention.model.capture import AttentionLayer
from aqua_attention.model.interface import directed
from aqua_attention.ops.backend import choose, tiled_backend, why_not_chosen, why_not_preferred
from aqua_attention.ops.plan import Call, LayerPlan

KINDS = {
    TiledLayer: "tiled",
    ScoredLayer: "scored",
    RingLayer: "ring",
    RotatedLayer: "growing",
    RotatedSlidingLayer: "sliding",
}
STORES = "torch over what is stored"
"""In place of a backend, where few queries are multiplied with codes."""


class Known(NamedTuple):
    """What an attachment knows.

    Attributes:
        decoder: the part of the model whose cache it is; layers: those under AQUA; plans: theirs, by `id` of module.
        dense: how many layers are not.
        cache: an empty one as `generate` gets; None where keys do not come straight from a cache.
        untiled: why it is not tiled; unrecorded: why no step is recorded, whatever the cache.
    """

    decoder: PreTrainedModel
    layers: list[AttentionLayer]
    plans: Mapping[int, LayerPlan]
    dense: int
    cache: AquaCache | None
    untiled: str | None
    unrecorded: str | None


class _Layer(NamedTuple):
    """One attention layer, and the layer of the cache that is its own, if there is one."""

    found: AttentionLayer
    plan: LayerPlan
    window: int | None
    cached: Any


def explained(
    known: Known, caches: GenerateCaches, recorder: Recorder, parts: CompiledParts | None, length: int, batch: int
) -> Explanation:
    """See `Attachment.explain`; `parts` is None where nothing shall be compiled."""
    windows = sliding_windows(known.decoder.config) if any(each.causal for each in known.layers) else {}
    layers = [_layer(known, each, windows) for each in known.layers]
    causal = [each for each in layers if each.plan.causal]
    prompt = _prompt(known.decoder, layers, length, batch)
    decoding = _decoding(known, causal, recorder, parts, length, batch) if causal else None
    return Explanation(length, batch, known.dense, prompt, decoding, _last(known, caches, recorder))


def _layer(known: Known, found: AttentionLayer, windows: dict[int, int]) -> _Layer:
    plan = known.plans[id(found.module)]
    if not plan.causal:
        return _Layer(found, plan, None, None)
    cached = None if known.cache is None else known.cache.layers[found.index]
    return _Layer(found, plan, windows.get(found.index), cached)


def _prompt(decoder: PreTrainedModel, layers: list[_Layer], length: int, batch: int) -> Prompt:
    own = [each._replace(plan=each.plan.for_queries(length)) for each in layers]
    is_dense = any(prompt.plan is not each.plan for prompt, each in zip(own, layers, strict=True))
    calls = [(each, _call(decoder, each, batch, length, length)) for each in own]
    backends = Counter(_backend(each, call) for each, call in calls)
    reasons = (why_not_preferred(call, each.plan) for each, call in calls if each.window is None)
    return Prompt(dict(backends), next(filter(None, reasons), None), is_dense)


def _decoding(
    known: Known, layers: list[_Layer], recorder: Recorder, parts: CompiledParts | None, length: int, batch: int
) -> Decoding:
    cache, unrecorded = known.cache, known.unrecorded or why_not_recorded(recorder.model)
    layout = "model's own" if cache is None else "tiled" if cache.layout == "tiled" else "growing"
    if layout == "tiled" and cache is not None:
        unrecorded = unrecorded or why_not_host_free(cache)
    elif known.unrecorded is None:
        unrecorded = Reason("the cache is not tiled", remedy_of(known.untiled))
    calls = [(each, _call(known.decoder, each, batch, 1, length + 1)) for each in layers]
    compiled, left_out, uncompiled = _compiled(parts) if unrecorded is None else ({}, {}, None)
    unchosen = next(filter(None, (_why_not_chosen(known, each, call) for each, call in calls)), None)
    return Decoding(
        backends=dict(Counter(_backend(each, call) for each, call in calls)),
        layout=layout,
        layers=dict(Counter(map(_kind, filter(None, (each.cached for each in layers))))),
        sliding=sum(each.window is not None for each in layers),
        untiled=known.untiled,
        recorded=unrecorded is None,
        unrecorded=unrecorded,
        compiled=compiled,
        left_out=left_out,
        uncompiled=uncompiled,
        unskipped=_why_not_skipping(layers, length),
        choice=next(filter(None, (each.plan.config.choice for each in layers)), ""),
        unchosen=unchosen,
        bytes=_bytes(layers, known.decoder.dtype.itemsize, length, batch, by_kernel=unchosen is None),
    )


def _why_not_skipping(layers: list[_Layer], length: int) -> str | None:
    """Why layers that see the whole context multiply every dimension; those with a window are exact on purpose."""
    reasons = (each.plan.why_not_skipping(length) for each in layers if each.window is None)
    return next(filter(None, reasons), None)


def _why_not_chosen(known: Known, layer: _Layer, call: Call) -> str | None:
    """Why no kernel chooses the tokens of a layer; None when one does, or all are read."""
    if not layer.plan.config.chooses_tokens or isinstance(layer.cached, ScoredLayer):
        return None
    reason = why_not_chosen(_asked(layer, call)[0], layer.plan)
    # That of a GPU's kernels, where there is one.
    return known.untiled or reason if reason and call.query.is_cuda else reason


def _kind(cached: Any) -> str:
    """The name of a kind of cache layer: ours as in `KINDS`, others by their class."""
    return KINDS.get(type(cached), type(cached).__name__)


def _compiled(parts: CompiledParts | None) -> tuple[dict[str, int], dict[str, int], str | None]:
    """Parts compiled, by kind; those that are not, by their reason; and why none is."""
    if parts is None:
        return {}, {}, Reason("compile is False", "set compile=True")
    why = (parts.left_out.get(part.name) or parts.left_out.get(part.kind) for part in parts.parts)
    return dict(parts.kinds), dict(Counter(filter(None, why))), None


def _last(known: Known, caches: GenerateCaches, recorder: Recorder) -> LastCall | None:
    if caches.reason is NEVER_CALLED:
        return None
    tiled, call = caches.layout == "tiled", recorder.last
    # What prevents recording for good is said of decoding; what no tiled cache prevents, of the cache.
    told = not tiled or known.unrecorded is not None or recorder.reason in ("", *NATURAL)
    untiled, unreplayed = None if tiled else caches.reason, None if told else recorder.reason
    return LastCall(caches.layout, untiled, call.steps, call.replays, call.seconds, unreplayed)


def _call(decoder: PreTrainedModel, layer: _Layer, batch: int, queries: int, keys: int) -> Call:
    """An attention call of these sizes, whose tensors take no memory."""
    found, plan, window = layer.found, layer.plan, layer.window
    one, mask = torch.empty(1, dtype=decoder.dtype, device=found.device), None
    if window is not None:
        is_masked = keys > window if queries == keys else isinstance(layer.cached, RingLayer) or plan.min_length > 0
        keys = keys if queries == keys else min(keys, window)
        if is_masked:
            kind = torch.uint8 if plan.needs_codes else torch.bool
            mask = torch.empty(1, dtype=kind, device=found.device).expand(batch, 1, queries, keys)
    query = one.expand(batch, found.num_attention_heads, queries, plan.head_dim)
    key, value = (one.expand(batch, found.num_key_value_heads, keys, -1) for _ in range(2))
    call = plan.call(
        query, key.expand(-1, -1, -1, plan.rotation.shape[2]), value.expand(-1, -1, -1, plan.head_dim), mask
    )
    softcap = softcap_of(decoder) if plan.causal else None
    return directed(call._replace(softcap=softcap, s_aux=sinks_of(found)), plan.causal, plan.sink)


def _asked(layer: _Layer, call: Call) -> tuple[Call, LayerPlan | None]:
    """What a backend is asked: a store that is not plain rotates and chooses by itself."""
    if not isinstance(layer.cached, RotatedLayer):
        return call, layer.plan
    by_token = layer.plan.is_plain or layer.plan.config.chooses_tokens
    return call._replace(score_copy=layer.cached.score_copy), layer.plan if by_token else None


def _backend(layer: _Layer, call: Call) -> str:
    """Who takes a call."""
    queries, (call, plan) = call.query.shape[2], _asked(layer, call)
    if isinstance(layer.cached, TiledLayer) and queries < call.key.shape[2]:
        return tiled_backend(call.query.device).name
    if plan is None and queries <= FEW_QUERIES:
        return STORES
    return choose(call, plan).name


def _bytes(layers: list[_Layer], itemsize: int, length: int, batch: int, *, by_kernel: bool) -> Bytes:
    """See `Bytes`; `by_kernel`: chosen tokens are all that is read beside scores."""
    full, slides = ([each for each in layers if (each.window is None) == whole] for whole in (True, False))
    token = chosen = step = 0.0
    for each in full:
        plan, is_tiled = each.plan, isinstance(each.cached, TiledLayer)
        # What a growing cache stores in few bits is read and widened as a whole, whoever chooses afterwards.
        if not (by_kernel and plan.config.chooses_tokens and (is_tiled or plan.is_plain)):
            read = token_bytes(plan, itemsize, length, is_tiled)
            token += read
            if is_tiled:  # of the exact window every stored dimension
                step += (held_bytes(plan, itemsize, "tiled") - read) * min(length, plan.sink + plan.recent)
            continue
        bits = plan.config.bits if is_tiled else None
        sizes = choice_bytes(plan.config, plan.head_dim, itemsize, bits)
        scored, whole = (plan.num_key_value_heads * size for size in sizes)
        token, chosen, step = token + scored, chosen + whole, step + whole * _most_chosen(plan, length)
    dense = sum(_state_bytes(each, each.plan.head_dim, itemsize) for each in full)
    held = sum(held_bytes(each.plan, itemsize, _kind(each.cached)) for each in full)
    # Windows keep every stored dimension, and are multiplied in plain torch.
    widths = [(each, min(each.window or 0, length)) for each in slides]
    step += sum(count * _state_bytes(each, each.plan.rotation.shape[2], itemsize) for each, count in widths)
    dense_step = sum(count * _state_bytes(each, each.plan.head_dim, itemsize) for each, count in widths)
    is_bound = any(each.plan.is_adaptive and isinstance(each.cached, TiledLayer) for each in full)
    is_bound = is_bound or (chosen > 0 and any(each.plan.config.select_p is not None for each in full))
    step, dense_step = round(batch * (length * token + step)), batch * (length * dense + dense_step)
    return Bytes(round(token), dense, step, dense_step, is_bound, round(chosen), round(held))


def _most_chosen(plan: LayerPlan, length: int) -> int:
    """Tokens that a step attends to at most, but for those that weigh as much as the last one."""
    count = plan.config.select_tokens
    if count is None or length < plan.min_length:
        return length
    return min(length, count + plan.sink + plan.recent)


def _state_bytes(layer: _Layer, width: int, itemsize: int) -> int:
    return layer.plan.num_key_value_heads * states_bytes(width, layer.plan.head_dim, itemsize, None)
