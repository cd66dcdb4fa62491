# SPDX-License-Identifier: Apache-2.0
"""A cache made for a model under AQUA before it is used: growing, of fixed size, offloaded, tiled."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from aqua_attention.cache.cache import AquaCache
from aqua_attention.cache.spec import CacheSpec
from aqua_attention.cache.tiled import TiledLayer, untiled_reason
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.model.capture import AttentionLayer

LAYOUTS = ("auto", "tiled", "plain")


def needs_own_cache(config: AquaConfig) -> str:
    """The setting that only a cache of ours can meet, in words; empty when any will do."""
    if config.h2o_ratio < 1:
        return f"h2o_ratio={config.h2o_ratio:g}"
    return "" if config.bits is None else f"bits={config.bits}"


def make_cache(
    decoder: PreTrainedModel,
    layers: list[AttentionLayer],
    specs: Mapping[int, CacheSpec],
    config: AquaConfig,
    max_length: int | None,
    offloading: bool,
    layout: str,
) -> AquaCache:
    """An empty cache, see `Attachment.new_cache`.

    Args:
        decoder: the smallest model that holds `layers`, the causal ones under AQUA.
        specs: by layer index.
    """
    needs = needs_own_cache(config)
    if max_length is not None and max_length < 1:
        raise AquaError(f"max_length is {max_length}: it must be 1 or more")
    reason = why_untiled(decoder, layers, specs, config, max_length, offloading=offloading)
    on_gpu = all(layer.device.type == "cuda" for layer in layers)
    tiled = not reason and (layout == "tiled" or (layout == "auto" and on_gpu))
    if not tiled and max_length is not None and (needs or specs[layers[0].index].has_window_store):
        raise AquaError(
            f"a static cache cannot store {needs or 's_ratio with an exact window (sink, recent)'}: leave out "
            "max_length, or that" + ("; in the tiled layout bits=8 is possible" if not reason else "")
        )
    if layout == "tiled" and reason:
        raise AquaError(f"a cache in the tiled layout is impossible here, because {reason}: use auto or plain")
    cache = AquaCache(decoder.config, dict(specs), max_length, offloading, "tiled" if tiled else "plain")
    if not any(isinstance(layer, TiledLayer) for layer in cache.layers):
        if needs and max_length is not None:
            raise AquaError(f"a static cache cannot store {needs}: leave out max_length, or that")
        if layout == "tiled":
            raise AquaError("a cache in the tiled layout is impossible here, because all layers have sliding windows")
        cache.layout = "plain"
    return cache


def why_untiled(
    decoder: PreTrainedModel,
    layers: list[AttentionLayer],
    specs: Mapping[int, CacheSpec],
    config: AquaConfig,
    max_length: int | None,
    *,
    offloading: bool = False,
) -> str | None:
    """Why there can be no cache for the decoding kernel; None when there can. Arguments as for `make_cache`."""
    if max_length is None or offloading:
        return "it has a fixed size and stays where it is (give max_length, no offloading)"
    if getattr(decoder.config, "attn_logit_softcapping", None) or any(
        getattr(layer.module, "sinks", None) is not None for layer in layers
    ):
        return "the kernel knows neither softcap nor extra softmax logits"
    reasons = (untiled_reason(config, specs[f.index], f.num_attention_heads, decoder.dtype) for f in layers)
    return next(filter(None, reasons), None)
