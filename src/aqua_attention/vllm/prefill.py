# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention for the later parts of prompts, where it is newer than torch's own."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.platforms import current_platform

from aqua_attention.ops import dense

VERSION = 3
"""Of FlashAttention, for Hopper; torch has the second."""


def use_flash_attention() -> None:
    """Let `ops.dense` do causal attention of fewer queries than keys by it, where it is there."""
    if not current_platform.is_cuda():
        return
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if get_flash_attn_version() == VERSION:
        dense.fewer_queries_kernel = flash_attention


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`ops.dense.attention_with_lse` of one sequence; nothing is copied."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    queries, keys = query.shape[2], key.shape[2]
    by_token = [states[0].transpose(0, 1) for states in (query, key, value)]
    places = torch.arange(2, dtype=torch.int32, device=query.device)
    output, lse = flash_attn_varlen_func(
        *by_token,
        max_seqlen_q=queries,
        cu_seqlens_q=places * queries,
        max_seqlen_k=keys,
        cu_seqlens_k=places * keys,
        softmax_scale=scaling,
        causal=True,
        return_softmax_lse=True,
        fa_version=VERSION,
    )
    return output.transpose(0, 1)[None], lse[None]
