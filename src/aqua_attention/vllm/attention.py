# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer in a vLLM server: keys are rotated when they are written, queries when they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attend, attention
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate
from aqua_attention.vllm.checks import check_engine
from aqua_attention.vllm.pages import read_pages, write_pages
from aqua_attention.vllm.settings import serving


@dataclass
class AquaMetadata:
    """One batch: sequences one after the other in the queries, prompts, parts of prompts and single tokens mixed.

    Attributes:
        starts: place of each sequence's first query, and the end, on the host.
        lengths: tokens of each sequence, the queries' own included, on the host.
        block_table: [sequences, blocks].
    """

    starts: list[int]
    lengths: list[int]
    block_table: Tensor


class AquaAttention(AttentionImpl[AquaMetadata]):
    """See `AttentionImpl`; a layer that the projections do not have, and one that slides, attends densely."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        unknown = {"alibi_slopes": alibi_slopes, "kv_sharing_target_layer_name": kv_sharing_target_layer_name, **others}
        for name, value in unknown.items():
            if value is not None:
                raise AquaError(
                    f"this model has attention with {name}, which AQUA does not serve: choose another backend"
                )
        if attn_type != AttentionType.DECODER:
            raise AquaError(f"attention of kind {attn_type} is not served by AQUA: only decoders are")
        check_engine(get_current_vllm_config())
        self.num_heads, self.head_size, self.num_kv_heads, self.scale = num_heads, head_size, num_kv_heads, float(scale)
        self.sliding_window, self.logits_soft_cap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self.kept = serving().config.kept_dims(head_size)
        self._layers: dict[str, LayerPlan | None] = {}

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Rotate keys, cut them, and write them with their values."""
        plan = self._plan(layer, key.device)
        if plan is not None:
            key = rotate(key.transpose(0, 1)[None], plan.rotation)[0].transpose(0, 1)
        write_pages(kv_cache, key[..., : self.kept], value, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: AquaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend to what is kept, [tokens, num_heads, head_size] into `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("AQUA's output is not quantised")
        if attn_metadata is None:  # profiling
            return output.zero_()
        plan, spans = self._plan(layer, query.device), zip(attn_metadata.starts, attn_metadata.starts[1:], strict=False)
        for row, ((start, end), length) in enumerate(zip(spans, attn_metadata.lengths, strict=True)):
            if end == start:
                continue
            own = query[start:end].transpose(0, 1)[None]
            states = read_pages(kv_cache, attn_metadata.block_table[row], length, self.kept)
            output[start:end] = self._attend(own, *states, plan)[0].transpose(0, 1)
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, plan: LayerPlan | None) -> Tensor:
        """Of one sequence, [1, heads, queries, head_dim] for its last tokens."""
        if plan is not None:
            return attend(plan.call(query, key, value, scaling=self.scale, softcap=self.logits_soft_cap), plan).output
        mask = None
        if self.sliding_window is not None and key.shape[2] > self.sliding_window:
            behind = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)[:, None]
            behind = behind - torch.arange(key.shape[2], device=query.device)
            mask = ((behind >= 0) & (behind < self.sliding_window))[None, None]
        return attention(query, key, value, None, mask=mask, scaling=self.scale, softcap=self.logits_soft_cap)

    def _plan(self, layer: torch.nn.Module, device: torch.device) -> LayerPlan | None:
        """What AQUA does in a layer; a layer says its name only when it runs."""
        name: str = layer.layer_name  # type: ignore[assignment]
        if name not in self._layers:
            self._layers[name] = self._made(extract_layer_index(name), device)
        return self._layers[name]

    def _made(self, index: int, device: torch.device) -> LayerPlan | None:
        known = serving().projections.layers.get(index)
        if known is None or self.sliding_window is not None:
            if self.kept < self.head_size:
                reason = "has no projections" if known is None else "has a sliding window"
                raise AquaError(
                    f"AQUA_CONFIG: s_ratio cuts the pages of all layers, and layer {index} {reason}: set it to 0"
                )
            return None
        if known.rotation.shape[-1] != self.head_size or len(known.rotation) < self.num_kv_heads:
            here = f"layer {index} has {self.num_kv_heads} key-value heads of {self.head_size}"
            raise AquaError(
                f"AQUA_PROJECTIONS: made for {serving().projections.fits}, but {here}: calibrate this model"
            )
        plan = known.plan(serving().config, device, index=index)
        heads = own_heads(plan.num_key_value_heads, self.num_kv_heads)
        return LayerPlan(plan.rotation[heads], plan.key_rms[heads], plan.config, self.scale, index=index)


def own_heads(count: int, here: int) -> slice:
    """Which of `count` key-value heads this process has, where tensor parallelism gives it `here` of them."""
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    # With more processes than heads, several have the same one.
    start = rank * here if here * size == count else rank * count // size
    return slice(start, start + here)
