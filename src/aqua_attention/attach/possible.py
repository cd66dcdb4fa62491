# SPDX-License-Identifier: Apache-2.0
"""Whether the layers of a model can be decoded by the kernels, and the steps on a cache be recorded; else why not."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from aqua_attention.cache.cache import AquaCache, sliding_windows
from aqua_attention.cache.layer import Recordable
from aqua_attention.cache.stored import needs_own_cache
from aqua_attention.errors import Reason
from aqua_attention.model.capture import AttentionLayer
from aqua_attention.ops.backend import tiled_backend, why_not_tiled
from aqua_attention.ops.plan import LayerPlan


def why_no_tiles(
    decoder: PreTrainedModel, layers: Sequence[AttentionLayer], plans: Mapping[int, LayerPlan]
) -> str | None:
    """Why the decoding kernels cannot serve these layers; None when they can, or when all slide."""
    if only_plain := next(filter(None, (layer.only_plain for layer in layers)), None):
        return Reason(f"the model {only_plain}")
    slides = sliding_windows(decoder.config)
    full = [layer for layer in layers if layer.index not in slides]
    if not full and (needs := needs_own_cache(plans[id(layers[0].module)].config)):
        return Reason(f"all layers slide, and none of a fixed size stores {needs}", f"leave {needs.split('=')[0]} out")
    if (full and softcap_of(decoder)) or any(sinks_of(layer) is not None for layer in full):
        return Reason("the kernel knows neither softcap nor extra softmax logits")
    reasons = (why_not_tiled(plans[id(each.module)], each.num_attention_heads, decoder.dtype) for each in full)
    return next(filter(None, reasons), None)


def why_not_by_itself(devices: set[torch.device]) -> str | None:
    """Why kernels on these devices run only when they are asked for by name; None when they run by themselves."""
    if all(tiled_backend(each).decodes_automatically(each) for each in devices):
        return None
    return Reason("triton's interpreter stands for a GPU, which is for tests", "set layout='tiled'")


def why_not_host_free(cache: Cache) -> str | None:
    """Why a step on this cache asks the host for numbers, so that it cannot be recorded; None when it does not."""
    if other := next((each for each in cache.layers if not isinstance(each, Recordable)), None):
        return Reason(f"a {type(other).__name__} of the cache counts its tokens on the host")
    return None


def why_not_replayed(cache: Any, mask: Tensor | None) -> str | None:
    """Why the next decoding step on this cache cannot be recorded; None when it can."""
    if not isinstance(cache, AquaCache) or cache.layout != "tiled":
        text = f"the cache is a {getattr(cache, 'layout', '')} {type(cache).__name__}, which is not tiled"
        return Reason(text, "leave past_key_values out, or give new_cache(max_length, layout='tiled')")
    look_at_mask(cache, mask)
    if reason := why_not_host_free(cache):
        return reason
    if unready := next((each for each in cache.layers if not each.decodes(1)), None):
        return Reason("the mask hides more than the padding of the prompt" if unready.batch else "there was no prompt")
    return None


def look_at_mask(cache: Cache, mask: Any) -> None:
    """Tell recordable layers whether the coming forward pass hides nothing but the padding of a prompt."""
    recordable = [layer for layer in cache.layers if isinstance(layer, Recordable)]
    if recordable:
        # All hold the same tokens, sliding ones not all of them; asking one waits for the GPU once a step.
        judge = min(recordable, key=lambda layer: layer.is_sliding)
        is_known = mask is None or (isinstance(mask, Tensor) and judge.knows(mask))
        for layer in recordable:
            layer.mask_is_known = is_known


def softcap_of(decoder: PreTrainedModel) -> float | None:
    """The soft limit of a decoder's scores; None where it has none."""
    return getattr(decoder.config, "attn_logit_softcapping", None)


def sinks_of(layer: AttentionLayer) -> Tensor | None:
    """The extra softmax logits of a layer; None where it has none."""
    return getattr(layer.module, "sinks", None)
