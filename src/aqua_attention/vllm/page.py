# SPDX-License-Identifier: Apache-2.0
"""What a page of a vLLM server holds, of how many tokens, and whether kernels take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import get_dtype_size

from aqua_attention.ops.backend import why_not_paged
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import PagedCache, PagedLayer, content
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored_pages import ScoredPages, scored_content
from aqua_attention.vllm.settings import serving

BLOCK_SIZE = 64
"""Tokens of a page on a GPU: a row of a dimension is 128 bytes, or 64 in 8 bits."""


def bytes_of(spec: Any) -> int:
    """Of a token and head in the pages of an `AttentionSpec`. They are the same in all layers, also in those that do
    not choose tokens.
    """
    config, size = serving().config, get_dtype_size(spec.dtype)
    kept, value_dim = config.kept_dims(spec.head_size), spec.head_size_v
    if config.chooses_tokens:
        return scored_content(kept, value_dim, size)
    return content(kept, value_dim, size, is_quantized=spec.kv_quant_mode.is_per_token_head)


def pages_of(storage: Tensor, kept: int, value_dim: int, quantization: Quantization | None) -> PagedCache:
    """The pages of a layer, see `PagedCache`. `quantization`: of keys that are held in 8 bits, or scored in 8."""
    if quantization is not None and serving().config.chooses_tokens:
        return ScoredPages(storage, kept, value_dim, scoring=quantization)
    return PagedCache(storage, kept, value_dim, quantization)


def most_sequences(vllm_config: Any) -> int:
    """Of a decoding step; recorded ones are padded."""
    recorded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, recorded)


def why_no_kernels(spec: Any, group: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels do not decode layers with so many query heads for each key-value head; None when they do."""
    config, head_size = serving().config, spec.head_size
    kept = config.kept_dims(head_size)
    of_head = torch.ones(1, kept, device=device)
    rotation = torch.empty(1, head_size, kept, device=device)
    plan = LayerPlan.of(rotation, of_head, config)
    width = bytes_of(spec) // get_dtype_size(spec.dtype)
    storage = torch.empty(1, 1, BLOCK_SIZE, width, dtype=spec.dtype, device=device)
    has_codes = config.chooses_tokens or spec.kv_quant_mode.is_per_token_head
    cache = pages_of(storage, kept, spec.head_size_v, Quantization(of_head, of_head) if has_codes else None)
    query = torch.empty(1, group, head_size, dtype=dtype, device=device)
    return why_not_paged(query, cache, PagedLayer(plan, 1.0))
