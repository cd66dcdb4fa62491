# SPDX-License-Identifier: Apache-2.0
"""AQUA to vLLM: what it can take, how wide its pages are, and what a batch looks like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from aqua_attention.vllm.attention import AquaAttention, AquaMetadata
from aqua_attention.vllm.checks import why_not
from aqua_attention.vllm.plugin import backend_name
from aqua_attention.vllm.settings import serving


class AquaBackend(AttentionBackend):
    """See `AttentionBackend`."""

    forward_includes_kv_cache_update = False
    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's registry."""
        return backend_name()

    @staticmethod
    def get_impl_cls() -> type[AquaAttention]:
        """What attends."""
        return AquaAttention

    @staticmethod
    def get_builder_cls() -> type[AquaMetadataBuilder]:
        """What describes a batch."""
        return AquaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens of a page."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages in which a head's tokens lie together."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages without the dimensions that `s_ratio` leaves out: vLLM has room for more tokens."""
        kept = serving().config.kept_dims(spec.head_size)
        if spec.state_content_bytes is not None or kept == spec.head_size:
            return spec
        return replace(spec, state_content_bytes=(kept + spec.head_size_v) * get_dtype_size(spec.dtype))

    @classmethod
    def validate_configuration(cls, *args: Any, **given: Any) -> list[str]:
        """What speaks against AQUA here, in our words where we have some. Not asked on a CPU."""
        reason = why_not(get_current_vllm_config())
        return [reason] if reason else super().validate_configuration(*args, **given)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Such layers attend densely."""
        return True


class AquaMetadataBuilder(AttentionMetadataBuilder[AquaMetadata]):
    """See `AttentionMetadataBuilder`."""

    # Abstract there.
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AquaMetadata:
        """Of one batch."""
        given = common_attn_metadata
        return AquaMetadata(
            given.query_start_loc_cpu[: given.num_reqs + 1].tolist(),
            given.seq_lens[: given.num_reqs].tolist(),
            given.block_table_tensor,
        )
