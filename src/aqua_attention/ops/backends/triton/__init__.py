# SPDX-License-Identifier: Apache-2.0
"""AQUA attention by Triton kernels on a GPU, which load when they run: whole prompts, and steps over tiled caches."""

import importlib.util
import os

import torch
from torch import Tensor

from aqua_attention.errors import Reason
from aqua_attention.ops import tokens
from aqua_attention.ops.backend import Backend, Channels
from aqua_attention.ops.layout import BLOCKS, LARGEST_QUANTIZED, TILE, WIDEST, Chosen, TiledCache
from aqua_attention.ops.pages import PagedCache, PagedLayer, Step
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.scored import SCORED_BITS, ScoredCache
from aqua_attention.ops.scored_pages import ScoredPages

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_FLOAT32 = 128
"""Dimensions of a head in float32: two tiles on their way need more shared memory than wider ones leave."""
LEAST_QUERIES = 64
"""Of a part of a prompt: with few queries what comes before the attention takes longer than it."""
PAGED_SCORE_BITS = 8
"""Of the keys that tokens are chosen by, in pages."""
LARGEST_SCORED = 128
"""Dimensions of a head where tokens are chosen: two blocks of wider ones on their way do not fit into common GPUs."""
LEAST_ALIGNED = 16
"""Elements of pages that kernels read at once."""
LOAD_BFLOAT16 = "load the model with dtype='bfloat16'"
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Triton(Backend):
    """Kernels for NVIDIA GPUs; in tests triton's interpreter stands for one."""

    name = "triton"

    def why_not(self, call: Call, plan: LayerPlan | None) -> str | None:
        """See `Backend`."""
        if plan is None:
            return "its kernels rotate and choose by themselves"
        if reason := no_kernels_reason(call.query.device):
            return reason
        if plan.config.chooses_tokens and (reason := _why_not_scored_prompt(plan, call.value.shape[3])):
            return reason
        if call.mask is not None:
            return "it knows no mask"
        if plan.rotation.shape[2] != plan.kept:
            text = "it knows no tokens that keep more dimensions than others (s_ratio with an exact window)"
            return Reason(text, "leave s_ratio out, or sink and recent")
        if call.softcap is not None or call.s_aux is not None:
            return "it knows neither softcap nor extra softmax logits (s_aux)"
        queries, keys = call.query.shape[2], call.key.shape[2]
        if queries != keys and queries < LEAST_QUERIES:
            return f"it is for prompts and parts of {LEAST_QUERIES} tokens or more: {queries} queries and {keys} keys"
        widest = max(call.query.shape[3], call.key.shape[3], call.value.shape[3])
        if call.query.dtype not in DTYPES or widest > WIDEST:
            text = f"it takes bfloat16, float16 and float32 and heads of at most {WIDEST} dimensions"
            return Reason(text, "" if widest > WIDEST else LOAD_BFLOAT16)
        if plan.rotation.dtype != torch.float32:
            return f"the rotation is {plan.rotation.dtype}, and it takes torch.float32"
        return "it has no gradient" if call.has_gradient else None

    def is_automatic(self, call: Call) -> bool:
        """See `Backend`: the interpreter is for tests."""
        return call.query.is_cuda

    def attend(self, call: Call, plan: LayerPlan) -> Attended:
        """See `Backend`."""
        if plan.config.chooses_tokens:
            from aqua_attention.ops.backends.triton.token_prompt import attend_prompt

            return attend_prompt(call, plan)
        from aqua_attention.ops.backends.triton.prefill import attention_prefill

        return attention_prefill(call, plan)

    def why_not_rotate(self, states: Tensor, rotation: Tensor) -> str | None:
        """See `Backend`."""
        if rotation.dtype != torch.float32 or max(rotation.shape) > WIDEST:
            return "it takes a rotation in float32, and no wider heads"
        return _why_not_states(states)

    def rotate(self, states: Tensor, rotation: Tensor) -> Tensor:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.rotate import rotate_on_gpu

        return rotate_on_gpu(states, rotation)

    def why_not_encode(self, states: Tensor) -> str | None:
        """See `Backend`."""
        return _why_not_states(states)

    def encode(self, states: Tensor, channels: Channels) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.codes import encode

        return encode(states, channels)

    def widen(self, codes: Tensor, scales: Tensor, zero_points: Tensor, channels: Channels, out: Tensor) -> None:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.codes import widen

        widen(codes, scales, zero_points, channels, out)

    def serves_tiles(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type != "cpu" or is_interpreted(device)

    def decodes_automatically(self, device: torch.device) -> bool:
        """See `Backend`: the interpreter is for tests."""
        return device.type == "cuda"

    def why_not_tiled(self, plan: LayerPlan, num_attention_heads: int, dtype: torch.dtype) -> str | None:
        """See `Backend`."""
        head_dim, bits = plan.head_dim, plan.config.bits
        if reason := no_kernels_reason(plan.rotation.device):
            return reason
        if plan.config.chooses_tokens and (reason := _why_not_scored(plan)):
            return reason
        if bits is not None and head_dim > LARGEST_QUANTIZED:
            text = f"heads have {head_dim} dimensions, and with bits=8 it takes {LARGEST_QUANTIZED} at most"
            return Reason(text, "leave bits out")
        if dtype not in DTYPES:
            return Reason(f"the model is {dtype}, and it takes bfloat16, float16 and float32", LOAD_BFLOAT16)
        if dtype == torch.float32 and head_dim > LARGEST_FLOAT32 and plan.rotation.is_cuda:
            text = f"heads have {head_dim} dimensions, and in float32 it takes {LARGEST_FLOAT32} at most"
            return Reason(text, LOAD_BFLOAT16)
        return f"heads have {head_dim} dimensions, and it takes {WIDEST} at most" if head_dim > WIDEST else None

    def fill(
        self,
        cache: TiledCache | ScoredCache,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        order: Tensor | None = None,
    ) -> None:
        """See `Backend`. It does not wait for the GPU."""
        if isinstance(cache, ScoredCache):
            super().fill(cache, keys, values, lengths, order)
            return
        from aqua_attention.ops.backends.triton.fill import fill

        fill(cache, keys, values, lengths, order)

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float
    ) -> tuple[Tensor, Tensor, Chosen | None]:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.step import decode_step

        return decode_step(query, key, value, cache, plan, scaling)

    def decode_scored(
        self, query: Tensor, key: Tensor, value: Tensor, cache: ScoredCache, plan: LayerPlan, scaling: float
    ) -> tuple[Tensor, Chosen, Tensor]:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.token_step import decode_scored

        return decode_scored(query, key, value, cache, plan, scaling)

    def why_not_paged(self, query: Tensor, cache: PagedCache, layer: PagedLayer) -> str | None:
        """See `Backend`."""
        if reason := no_kernels_reason(query.device):
            return reason
        widest, plan = max(query.shape[-1], cache.value_dim), layer.plan
        if query.dtype not in DTYPES or widest > WIDEST:
            text = f"it takes bfloat16, float16 and float32 and heads of at most {WIDEST} dimensions"
            return Reason(text, "" if widest > WIDEST else LOAD_BFLOAT16)
        if query.dtype == torch.float32 and widest > LARGEST_FLOAT32 and query.is_cuda:
            text = f"heads have {widest} dimensions, and in float32 it takes {LARGEST_FLOAT32} at most"
            return Reason(text, LOAD_BFLOAT16)
        if cache.quantization is not None and widest > LARGEST_QUANTIZED:
            text = f"heads have {widest} dimensions, and with bits=8 it takes {LARGEST_QUANTIZED} at most"
            return Reason(text, "leave bits out")
        if cache.block_size not in BLOCKS:
            return f"pages have {cache.block_size} tokens, and it takes {', '.join(map(str, BLOCKS))}"
        if any(stride % LEAST_ALIGNED for stride in cache.storage.stride()[:2]):
            return f"pages are {cache.storage.stride()[:2]} elements apart, and it takes multiples of {LEAST_ALIGNED}"
        if plan is None:
            return None
        if plan.config.chooses_tokens and (reason := _why_not_scored_pages(cache, layer, plan)):
            return reason
        if plan.config.share != "group" and query.shape[1] != cache.num_key_value_heads:
            text = f"share is {plan.config.share!r}, and the kernel reads the same dimensions for a group"
            return Reason(text, "set share='group'")
        if plan.has_window_store or plan.is_adaptive:
            return "it knows neither logit_error nor tokens that keep more dimensions than others"
        return None

    def write_paged(self, key: Tensor, value: Tensor, cache: PagedCache, layer: PagedLayer, slots: Tensor) -> None:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.paged_write import write_paged

        write_paged(key, value, cache, None if layer.plan is None else layer.plan.rotation, slots)

    def decode_paged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: PagedCache,
        layer: PagedLayer,
        step: Step,
        output: Tensor,
    ) -> None:
        """See `Backend`."""
        from aqua_attention.ops.backends.triton.paged_decode import decode_paged
        from aqua_attention.ops.backends.triton.paged_prepare import prepare_paged
        from aqua_attention.ops.backends.triton.token_pages import decode_scored_pages

        chosen = None
        if isinstance(cache, ScoredPages) and layer.plan is not None:
            decode_scored_pages(query, key, value, cache, layer, layer.plan, step, output)
            return
        if layer.plan is None:
            self.write_paged(key, value, cache, layer, step.slots)
        else:
            query, chosen = prepare_paged(query, key, value, cache, layer.plan, step)
        decode_paged(query, chosen, cache, layer, step, output)

    def reserve_paged(
        self,
        layer: PagedLayer,
        num_attention_heads: int,
        value_dim: int,
        dtype: torch.dtype,
        *,
        sequences: int,
        length: int,
    ) -> None:
        """See `Backend`."""
        plan = layer.plan
        if plan is None or not plan.config.chooses_tokens or _why_not_scored_layer(layer, plan):
            return
        from aqua_attention.ops.backends.triton.token_pages import TokenMemory, shape_of

        shape, device = shape_of(num_attention_heads, value_dim, plan), plan.rotation.device
        TokenMemory.shared(layer.memory, sequences, length, shape, dtype, device)


def _why_not_states(states: Tensor) -> str | None:
    """Why no kernel takes these states, whose heads are rotated or rounded; None when one does."""
    if not states.is_cuda:
        return "the states are not on a GPU"
    if reason := no_kernels_reason(states.device):
        return reason
    if states.dtype not in DTYPES or states.shape[-1] > WIDEST:
        return "it takes 16 bits and float32, and no wider heads"
    if states.numel() == 0 or (torch.is_grad_enabled() and states.requires_grad):
        return "it has no gradient, and does nothing with nothing"
    return None


def _why_not_scored_prompt(plan: LayerPlan, value_dim: int) -> str | None:
    """Why no kernel takes a prompt whose queries choose tokens; None when one does."""
    if tokens.Way() != tokens.WAY:
        return "another way of choosing tokens is measured"
    if max(plan.head_dim, value_dim) > LARGEST_SCORED:
        return _too_wide(max(plan.head_dim, value_dim))
    return None


def _too_wide(dims: int) -> Reason:
    """Why no kernel chooses tokens of such heads."""
    text = f"heads have {dims} dimensions, and where tokens are chosen it takes {LARGEST_SCORED} at most"
    return Reason(text, "leave select_p and select_tokens out")


def _why_not_scored(plan: LayerPlan) -> str | None:
    """What of the settings that choose tokens no kernel takes; None when one does."""
    config = plan.config
    if config.score_bits not in SCORED_BITS:
        text = f"score_bits is {config.score_bits}, and the kernels score keys in {' and '.join(map(str, SCORED_BITS))}"
        return Reason(text, "set score_bits=8")
    if plan.head_dim > LARGEST_SCORED:
        return _too_wide(plan.head_dim)
    if plan.is_adaptive:
        return Reason("the kernels score tokens by a fixed number of dimensions", "set k_ratio in place of logit_error")
    return None


def _why_not_scored_pages(cache: PagedCache, layer: PagedLayer, plan: LayerPlan) -> str | None:
    """Why no kernel chooses tokens in these pages; None when one does."""
    if reason := _why_not_scored_layer(layer, plan):
        return reason
    block, head = cache.storage.stride()[:2]
    if not isinstance(cache, ScoredPages) or block % head:
        return "pages have no copy that tokens are chosen by, or those of a block do not follow each other"
    return None


def _why_not_scored_layer(layer: PagedLayer, plan: LayerPlan) -> str | None:
    """Why no kernel chooses the tokens of this layer, whatever its pages; None when one does."""
    if reason := _why_not_scored(plan):
        return reason
    if plan.config.score_bits != PAGED_SCORE_BITS:
        text = f"score_bits is {plan.config.score_bits}, and pages hold what tokens are chosen by in {PAGED_SCORE_BITS}"
        return Reason(text, "set score_bits=8")
    if max(plan.sink, plan.recent) > TILE:
        text = f"sink is {plan.sink} and recent {plan.recent}, and where tokens are chosen it takes {TILE} at most"
        return Reason(text, f"set sink and recent to {TILE} or less")
    if layer.softcap is not None:
        return "where tokens are chosen it knows no softcap"
    return None


def is_interpreted(device: torch.device) -> bool:
    """Whether triton's interpreter stands for a GPU, in tests."""
    return HAS_TRITON and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def no_kernels_reason(device: torch.device) -> str | None:
    """Why our kernels cannot run on this device; None when they can."""
    if torch.compiler.is_compiling():
        return "the call is being compiled by torch.compile"
    if not HAS_TRITON:
        return Reason("triton is not installed", "install triton")
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "the kernels are for NVIDIA GPUs of compute capability 8.0 and newer"
    if device.type != "cuda" and not is_interpreted(device):
        return f"the tensors are on {device.type}, and the kernels need a CUDA GPU"
    return None
