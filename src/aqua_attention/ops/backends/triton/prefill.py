# SPDX-License-Identifier: Apache-2.0
"""AQUA on a whole prompt on a GPU: rotate and choose dimensions in one pass, merge the exact window in another.

Zeroing the dropped entries of a query and running dense attention is AQUA, so between these two passes stands any fused
kernel for dense attention. Both move little more than what they read and write.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.fused import attention_with_lse, dense_attention
from aqua_attention.ops.backends.triton.rotate import by_token, check_rotation, rotate_and_narrow, rotate_on_gpu
from aqua_attention.ops.backends.triton.window import window_merge
from aqua_attention.ops.layout import WIDEST


def attention_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    head_dim: int | None = None,
    scaling: float | None = None,
) -> Tensor:
    """AQUA attention of a prompt: causal, as many queries as keys, no mask.

    Args:
        query: not rotated, [batch, num_attention_heads, length, head_dim], bfloat16, float16 or float32.
        key: rotated (`rotate_on_gpu`), [batch, num_key_value_heads, length, kept].
        value: [batch, num_key_value_heads, length, value_dim].
        rotation: float32 [num_key_value_heads, head_dim, kept].
        key_rms: float32 [num_key_value_heads, kept], see `ops.select.select_dimensions`.
        config: the selection, from which length on there is one, and the exact window.
        head_dim: see `ops.select.select_dimensions`; default the query's.
        scaling: factor of the scores; default 1/sqrt(head_dim).

    Returns:
        [batch, num_attention_heads, length, value_dim] in the dtype of `value`.

    Raises:
        AquaError: shapes, dtypes or gradients that the kernels do not take; the message lists what they take.
    """
    check_rotation(query, rotation, key_rms)
    length, kept, window = query.shape[2], rotation.shape[2], config.sink + config.recent
    shape = (query.shape[0], rotation.shape[0], length)
    if key.shape != (*shape, kept) or value.ndim != 4 or value.shape[:3] != shape or value.shape[3] > WIDEST:
        raise AquaError(
            f"key is {tuple(key.shape)} and value {tuple(value.shape)}: in prefill they must be {(*shape, kept)} and "
            f"{(*shape, f'1 to {WIDEST}')}, one for each query, and causal without a mask"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise AquaError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: they must be of one dtype"
        )
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        raise AquaError("prefill kernels have no gradient: call them under torch.no_grad()")
    head_dim = query.shape[3] if head_dim is None else head_dim
    scaling = head_dim**-0.5 if scaling is None else scaling
    if (window > 0 and length <= window) or length < config.threshold:
        rotated = narrow = rotate_on_gpu(query, rotation)
    else:
        rotated, narrow = rotate_and_narrow(
            query, rotation, key_rms, config, head_dim=head_dim, scaling=scaling, both=window > 0
        )
    key, value = by_token(key), by_token(value)
    # Keys narrower than values push the fused kernels onto a slow path; zeros change no score.
    width = max(kept, value.shape[3])
    wide_key = F.pad(key, (0, width - kept))
    if window == 0 or length <= window or narrow is rotated:
        return dense_attention(F.pad(narrow, (0, width - kept)), wide_key, value, None, scaling)
    outside = slice(config.sink, length - config.recent)
    far, far_lse = attention_with_lse(
        F.pad(narrow[:, :, window:], (0, width - kept)), wide_key[:, :, outside], value[:, :, outside], scaling
    )
    return window_merge(rotated, key, value, far, far_lse, sink=config.sink, recent=config.recent, scaling=scaling)
