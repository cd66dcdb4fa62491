# SPDX-License-Identifier: Apache-2.0
"""AQUA to vLLM: what it can take, what its pages hold, and what a batch looks like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from aqua_attention.ops.pages import Step
from aqua_attention.vllm.attention import AquaAttention, AquaMetadata
from aqua_attention.vllm.checks import why_not
from aqua_attention.vllm.page import BLOCK_SIZE, bytes_of, most_sequences, why_no_kernels
from aqua_attention.vllm.plugin import backend_name
from aqua_attention.vllm.settings import INT8, serving
from aqua_attention.vllm.versions import Pages


class AquaBackend(Pages, AttentionBackend):
    """See `AttentionBackend`."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", INT8]  # noqa: RUF012

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
        """Tokens of a page; vLLM may have larger ones, and hands them out in pages of these."""
        return [MultipleOf(16)] if current_platform.is_cpu() else [BLOCK_SIZE]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages without the dimensions that `s_ratio` leaves out: vLLM has room for more tokens.

        Where tokens are chosen, pages hold a copy of the keys, too: there is room for fewer.
        """
        is_usual = serving().config.kept_dims(spec.head_size) == spec.head_size
        is_usual = is_usual and not spec.kv_quant_mode.is_per_token_head and not serving().config.chooses_tokens
        if spec.state_content_bytes is not None or is_usual:
            return spec
        return replace(spec, state_content_bytes=bytes_of(spec))

    @classmethod
    def validate_configuration(cls, *args: Any, **given: Any) -> list[str]:
        """What speaks against AQUA here, in our words where we have some. Not asked on a CPU."""
        reason = why_not(get_current_vllm_config())
        return [reason] if reason else super().validate_configuration(*args, **given)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Such layers attend to every dimension of what they see."""
        return True


class AquaMetadataBuilder(AttentionMetadataBuilder[AquaMetadata]):
    """See `AttentionMetadataBuilder`; vLLM puts sequences that decode before others."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        most = most_sequences(vllm_config)
        self.arrived = torch.zeros(most * kv_cache_spec.num_kv_heads, dtype=torch.int32, device=device)
        self.longest: int = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None where plain torch decodes, which must know lengths."""
        model, device = vllm_config.model_config, torch.device(current_platform.device_type)
        heads = model.get_num_attention_heads(vllm_config.parallel_config)
        # Layers of different shapes come as one specification of many.
        specs = getattr(kv_cache_spec, "kv_cache_specs", {"": kv_cache_spec}).values()
        reasons = (why_no_kernels(each, heads // each.num_kv_heads, model.dtype, device) for each in specs)
        return AttentionCGSupport.NEVER if current_platform.is_cpu() or any(reasons) else cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AquaMetadata:
        """Of one batch: on the host only what is said of prompts."""
        given = common_attn_metadata
        decodes = split_decodes_and_prefills(given, decode_threshold=1)[0]
        starts = given.query_start_loc_cpu[decodes : given.num_reqs + 1].tolist()
        lengths: list[int] = []
        if decodes < given.num_reqs:
            # Exact for prompts.
            known = given.seq_lens_cpu_upper_bound
            known = given.seq_lens if known is None else known
            lengths = known[decodes : given.num_reqs].tolist()
        slots, table = given.slot_mapping, given.block_table_tensor
        step = Step(table[:decodes], given.seq_lens[:decodes], slots[:decodes], self.arrived, self.longest)
        return AquaMetadata(decodes, step, starts, lengths, slots, table)
