# SPDX-License-Identifier: Apache-2.0
"""One entry to AQUA attention on tensors: check the request, choose an implementation, never fall back in silence."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.fused import attention_fused, unsupported_reason
from aqua_attention.ops.reference import attention_chunked, attention_reference

IMPLEMENTATIONS = ("auto", "fused", "chunked", "reference")


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
        impl: "reference" (whole score matrix), "chunked" (the reference in bounded memory), "fused" (dense fused
            kernels on masked queries), or "auto": fused where it can take the call, else chunked. All compute the
            same function.

    Raises:
        AquaError: shapes that do not fit, an unknown `impl`, or one that cannot take this call.
    """
    _check(query, key, value, selected, mask, s_aux)
    chosen = choose(query, key, mask, window=sink + recent > 0, softcap=softcap, s_aux=s_aux, impl=impl)
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
    mask: Tensor | None,
    *,
    window: bool,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    impl: str = "auto",
) -> str:
    """The implementation that `attention` runs for this call: "fused", "chunked" or "reference"."""
    if impl not in IMPLEMENTATIONS:
        raise AquaError(f"impl is {impl!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl in ("chunked", "reference"):
        return impl
    reason = unsupported_reason(query, key, mask, window=window, softcap=softcap, s_aux=s_aux)
    if reason is None:
        return "fused"
    if impl == "fused":
        raise AquaError(f"impl='fused' cannot take this call ({reason}): use auto, chunked or reference")
    return "chunked"


def no_kernels_reason(device: torch.device) -> str | None:
    """Why our kernels cannot run on this device; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
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
