# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer in a vLLM server: keys are rotated when they are written, queries when they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attend_pages, decode_pages, reserve_pages, write_pages
from aqua_attention.ops.backend import why_not_paged
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import PagedCache, PagedLayer, Step
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import score_quantization
from aqua_attention.vllm.checks import check_engine
from aqua_attention.vllm.page import most_sequences, pages_of
from aqua_attention.vllm.prefill import use_flash_attention
from aqua_attention.vllm.settings import INT8, serving

logger = init_logger(__name__)


@dataclass
class AquaMetadata:
    """One batch: sequences that decode, one token each, then prompts and parts of prompts, one after the other.

    Attributes:
        decodes: how many sequences decode; those that pad a recorded batch are among them, with a length of 0.
        step: of these, on the device.
        starts: place of each prompt's first token in the batch, and the end, on the host.
        lengths: tokens of each prompt's sequence so far, these included, on the host.
        slots: of all tokens; block_table: of all sequences.
    """

    decodes: int
    step: Step
    starts: list[int]
    lengths: list[int]
    slots: Tensor
    block_table: Tensor


MEMORY: dict[Any, Any] = {}
"""What kernels that choose tokens work in: of all layers of this process, whose steps follow one another."""


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
            raise AquaError(
                f"attention of kind {attn_type} is not served by AQUA, only decoders are: choose another backend"
            )
        check_engine(get_current_vllm_config())
        self.num_heads, self.head_size, self.num_kv_heads, self.scale = num_heads, head_size, num_kv_heads, float(scale)
        self.sliding_window, self.logits_soft_cap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self.kept = serving().config.kept_dims(head_size)
        use_flash_attention()
        config = get_current_vllm_config()
        self._most = {"sequences": most_sequences(config), "length": config.model_config.max_model_len}
        self._layers: dict[str, tuple[PagedLayer, Quantization | None]] = {}

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
        """Write keys and values to their pages, then attend, [tokens, num_heads, head_size] into `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("AQUA's output is not quantised")
        if attn_metadata is None:
            # vLLM measures memory, before it records anything: what is on the GPU is brought or made there now.
            how, _ = self._how_of(layer, query.device)
            if query.is_cuda:
                reserve_pages(how, self.num_heads, self.head_size, query.dtype, **self._most)
            return output.zero_()
        given, (pages, how) = attn_metadata, self._of(layer, kv_cache, query)
        # All is written before anybody attends: pages may be shared with a prompt that is computed in the same batch.
        if given.lengths:
            own = slice(given.starts[0], given.starts[-1])
            write_pages(key[own], value[own], pages, how, given.slots[own])
        if count := given.decodes:
            decode_pages(query[:count], key[:count], value[:count], pages, how, given.step, output[:count])
        spans = zip(given.starts, given.starts[1:], strict=False)
        for row, ((start, end), length) in enumerate(zip(spans, given.lengths, strict=True), given.decodes):
            if end > start:
                output[start:end] = attend_pages(query[start:end], pages, how, given.block_table[row], length)
        return output

    def _of(self, layer: torch.nn.Module, kv_cache: Tensor, query: Tensor) -> tuple[PagedCache, PagedLayer]:
        """The pages of a layer, and how it attends.

        Pages are not kept: vLLM makes some for a trial first, whose memory it wants back.
        """
        how, quantization = self._how_of(layer, query.device)
        pages = pages_of(kv_cache, self.kept, self.head_size, quantization)
        if query.is_cuda and (reason := why_not_paged(query, pages, how)):
            logger.warning_once("AQUA decodes slowly, in plain torch: %s", reason)
        return pages, how

    def _how_of(self, layer: torch.nn.Module, device: torch.device) -> tuple[PagedLayer, Quantization | None]:
        """How a layer attends; it says its name only when it runs."""
        name: str = layer.layer_name  # type: ignore[assignment]
        if name not in self._layers:
            self._layers[name] = self._how(extract_layer_index(name), device)
        return self._layers[name]

    def _how(self, index: int, device: torch.device) -> tuple[PagedLayer, Quantization | None]:
        plan, quantization = self._made(index, device), None
        if plan is not None and plan.config.chooses_tokens:
            quantization = score_quantization(plan)
        elif plan is not None and self.kv_cache_dtype == INT8:
            assert plan.key_scale is not None and plan.key_mean is not None
            quantization = Quantization(plan.key_scale, plan.key_mean)
        elif plan is not None and not plan.selects and self.kept == self.head_size:
            plan = None  # every dimension of whole keys: a rotation would change nothing
        return PagedLayer(plan, self.scale, self.logits_soft_cap, self.sliding_window, MEMORY), quantization

    def _made(self, index: int, device: torch.device) -> LayerPlan | None:
        config, known = serving().config, serving().projections.layers.get(index)
        if known is None or self.sliding_window is not None:
            reason = "has no projections" if known is None else "has a sliding window"
            for name, value, nothing in (("s_ratio", config.s_ratio, 0), ("bits", config.bits, None)):
                if value != nothing:
                    raise AquaError(
                        f"AQUA_CONFIG: {name} is for the pages of all layers, and layer {index} {reason}: leave it out"
                    )
            return None
        heads = own_heads(len(known.rotation), self.num_kv_heads)
        if known.rotation.shape[-1] != self.head_size or heads is None:
            here = f"layer {index} has {self.num_kv_heads} key-value heads of {self.head_size} in this process"
            raise AquaError(
                f"AQUA_PROJECTIONS: made for {serving().projections.fits}, but {here}: calibrate this model"
            )
        plan = known.plan(config, device, index=index)
        parts = (plan.rotation, plan.key_rms, plan.key_scale, plan.key_mean)
        rotation, rms, scale, mean = (None if each is None else each[heads].contiguous() for each in parts)
        assert rotation is not None and rms is not None
        return LayerPlan(rotation, rms, plan.config, self.scale, scale, mean, index=index)


def own_heads(count: int, here: int) -> slice | None:
    """Which of `count` key-value heads this process has, where tensor parallelism gives it `here` of them.

    None: no model with so many heads would give it these.
    """
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if here * size == count:
        return slice(rank * here, (rank + 1) * here)
    if here == 1 and size % count == 0:
        # With more processes than heads, several have the same one.
        return slice(rank * count // size, rank * count // size + 1)
    return None
