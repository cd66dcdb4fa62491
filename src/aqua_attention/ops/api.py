# SPDX-License-Identifier: Apache-2.0
"""AQUA attention on tensors: check the request, choose an implementation, never fall back in silence.

`attend` is all of it: rotate the queries, choose dimensions, attend. `attention` begins with rotated queries and a
choice, and `rotate` is what keys go through.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops import select
from aqua_attention.ops.backends.fused import attention_fused, unsupported_reason
from aqua_attention.ops.layout import WIDEST
from aqua_attention.ops.mask import short_queries
from aqua_attention.ops.reference import attention_chunked, attention_reference

IMPLEMENTATIONS = ("auto", "triton", "fused", "chunked", "reference")
"""Of `attend`."""
TORCH_IMPLEMENTATIONS = ("auto", "fused", "chunked", "reference")
"""Of `attention`."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What our kernels for GPUs take."""
HAS_TRITON = importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """AQUA attention of queries as the model computes them, after rotary embedding.

    Args:
        query: [batch, num_attention_heads, queries, head_dim].
        key: rotated, [batch, num_key_value_heads, keys, kept]; value: [batch, num_key_value_heads, keys, value_dim].
        rotation: float32 [num_key_value_heads, head_dim, kept].
        key_rms: float32 [num_key_value_heads, kept], see `ops.select.select_dimensions`.
        config: the selection, the exact window, and from which length on there is a selection (`min_length`); uint8
            masks carry window and lengths already.
        mask: see `ops.mask`; None is causal with the queries at the end of the keys.
        scaling: factor of the scores; default 1/sqrt(head_dim).
        softcap, s_aux: see `ops.reference.attention_reference`.
        impl: "triton" (our kernels for a whole prompt on a GPU), "fused" (dense fused kernels on masked queries),
            "chunked" (the reference in bounded memory), "reference" (whole score matrix), or "auto": the first of
            these that can take the call. All compute the same function; `choose` says which one "auto" is.

    Returns:
        [batch, num_attention_heads, queries, value_dim] in the dtype of `value`.

    Raises:
        AquaError: shapes that do not fit, an unknown `impl`, or one that cannot take this call.
    """
    head_dim = query.shape[-1]
    scaling = head_dim**-0.5 if scaling is None else scaling
    window = config.sink + config.recent > 0
    if rotation.dtype != torch.float32 and impl == "triton":
        raise AquaError(f"rotation is {rotation.dtype}: impl='triton' takes torch.float32")
    chosen = choose(query, key, value, mask, window=window, softcap=softcap, s_aux=s_aux, impl=impl)
    if chosen == "triton" and rotation.dtype == torch.float32:
        from aqua_attention.ops.backends.triton.prefill import attention_prefill

        return attention_prefill(query, key, value, rotation, key_rms, config, head_dim=head_dim, scaling=scaling)
    query, selected = rotate(query, rotation), None
    queries, keys = query.shape[2], key.shape[2]
    # Choosing is what short sequences should not pay for.
    if mask is not None or keys >= config.threshold:
        short = short_queries(mask, config.threshold, queries=queries, keys=keys, device=query.device)
        selected = select.select_dimensions(query, config, head_dim, key_rms, scaling, short)
    return attention(
        query,
        key,
        value,
        selected,
        mask=mask,
        sink=config.sink,
        recent=config.recent,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
        impl=impl,
    )


def rotate(states: Tensor, rotation: Tensor) -> Tensor:
    """`ops.select.rotate`, by a kernel on a GPU where no gradient is asked for."""
    on_gpu = states.is_cuda and no_kernels_reason(states.device) is None and states.dtype in KERNEL_DTYPES
    if not on_gpu or states.numel() == 0 or rotation.dtype != torch.float32 or max(rotation.shape) > WIDEST:
        return select.rotate(states, rotation)
    if torch.is_grad_enabled() and states.requires_grad:
        return select.rotate(states, rotation)
    from aqua_attention.ops.backends.triton.rotate import rotate_on_gpu

    return rotate_on_gpu(states, rotation)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor | None,
    *,
    mask: Tensor | None = None,
    sink: int = 0,
    recent: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """AQUA attention on rotated queries and keys; shapes and meaning as in `ops.reference.attention_reference`.

    Args:
        impl: as for `attend`, but for "triton", whose kernels rotate and choose by themselves.

    Raises:
        AquaError: shapes that do not fit, an unknown `impl`, or one that cannot take this call.
    """
    _check(query, key, value, selected, mask, s_aux)
    chosen = _choose_torch(query, key, mask, sink + recent > 0, softcap, s_aux, impl)
    if chosen == "fused":
        return attention_fused(query, key, value, selected, mask=mask, sink=sink, recent=recent, scaling=scaling)
    plain = attention_chunked if chosen == "chunked" else attention_reference
    return plain(
        query,
        key,
        value,
        selected,
        mask=mask,
        sink=sink,
        recent=recent,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
    )


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    window: bool,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    impl: str = "auto",
) -> str:
    """The implementation that `attend` runs for this call: "triton", "fused", "chunked" or "reference".

    Args:
        query, key, value, mask: of `attend`.
        window: whether there is an exact one.

    Raises:
        AquaError: an unknown `impl`, or one that cannot take this call; the message says why and what to use.
    """
    if impl not in IMPLEMENTATIONS:
        raise AquaError(f"impl is {impl!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" or (impl == "auto" and query.is_cuda):
        reason = _untriton_reason(query, key, value, mask, softcap, s_aux)
        if reason is None:
            return "triton"
        if impl == "triton":
            raise AquaError(f"impl='triton' cannot take this call ({reason}): use auto, fused, chunked or reference")
    return _choose_torch(query, key, mask, window, softcap, s_aux, impl)


def _choose_torch(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    window: bool,
    softcap: float | None,
    s_aux: Tensor | None,
    impl: str,
) -> str:
    if impl not in TORCH_IMPLEMENTATIONS:
        raise AquaError(f"impl is {impl!r}: it must be one of {', '.join(TORCH_IMPLEMENTATIONS)}")
    if impl in ("chunked", "reference"):
        return impl
    reason = unsupported_reason(query, key, mask, window=window, softcap=softcap, s_aux=s_aux)
    if reason is None:
        return "fused"
    if impl == "fused":
        raise AquaError(f"impl='fused' cannot take this call ({reason}): use auto, chunked or reference")
    return "chunked"


def _untriton_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> str | None:
    """Why the kernels for a prompt cannot take this call; None when they can."""
    if reason := no_kernels_reason(query.device):
        return reason
    if mask is not None:
        return "it knows no mask"
    if softcap is not None or s_aux is not None:
        return "it knows neither softcap nor extra softmax logits (s_aux)"
    if query.shape[2] != key.shape[2]:
        return f"it is for a whole prompt, with as many queries as keys: {query.shape[2]} and {key.shape[2]}"
    if query.dtype not in KERNEL_DTYPES or max(query.shape[3], key.shape[3], value.shape[3]) > WIDEST:
        return f"it takes bfloat16, float16 and float32 and heads of at most {WIDEST} dimensions"
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        return "it has no gradient"
    return None


def is_interpreted(device: torch.device) -> bool:
    """Whether triton's interpreter stands for a GPU, in tests."""
    return HAS_TRITON and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def no_kernels_reason(device: torch.device) -> str | None:
    """Why our kernels cannot run on this device; None when they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if torch.compiler.is_compiling():
        return "the call is being compiled by torch.compile"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "the kernels are for NVIDIA GPUs of compute capability 8.0 and newer"
    if device.type != "cuda" and not is_interpreted(device):
        return f"the tensors are on {device.type}, and the kernels need a CUDA GPU"
    return None


def _check(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor | None, mask: Tensor | None, s_aux: Tensor | None
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[2] < 1:
            raise AquaError(f"{name} is {tuple(tensor.shape)}: it must be [batch, heads, tokens, width], not empty")
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if key.shape != (batch, groups, keys, width):
        raise AquaError(f"key is {tuple(key.shape)}: query {tuple(query.shape)} needs its batch and width")
    if value.shape[:3] != key.shape[:3]:
        raise AquaError(f"value is {tuple(value.shape)}: it must have the heads and tokens of key {tuple(key.shape)}")
    if heads % groups:
        raise AquaError(f"{heads} query heads do not divide into {groups} key-value heads")
    if selected is not None and (selected.shape != query.shape or selected.dtype != torch.bool):
        raise AquaError(
            f"selected is {selected.dtype} {tuple(selected.shape)}: it must be boolean, in the shape of query "
            f"{tuple(query.shape)}"
        )
    if mask is None and queries > keys:
        raise AquaError(f"{queries} causal queries need at least as many keys, there are {keys}")
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.uint8):
            raise AquaError(f"mask is {mask.dtype}: it must be boolean (True: visible) or uint8 codes (ops.mask)")
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if not fits or mask.shape[2:] != (queries, keys):
            raise AquaError(
                f"mask is {tuple(mask.shape)}: it must be [{batch} or 1, {heads} or 1, queries {queries}, keys {keys}]"
            )
    if s_aux is not None and s_aux.shape != (heads,):
        raise AquaError(f"s_aux is {tuple(s_aux.shape)}: it must be one logit for each of {heads} query heads")
    if not query.dtype == key.dtype == value.dtype:
        raise AquaError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: they must be of one dtype"
        )
