# SPDX-License-Identifier: Apache-2.0
"""AQUA on a prompt or its last part on a GPU: rotate and choose dimensions in one pass, merge the window in another.

Zeroing the dropped entries of a query and running dense attention is AQUA, so between these two passes stands any fused
kernel for dense attention. Both move little more than what they read and write.
"""

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.rotate import by_token, check_rotation, rotate_and_narrow, rotate_on_gpu
from aqua_attention.ops.backends.triton.window import window_merge
from aqua_attention.ops.dense import attention_with_lse, dense_attention, widened
from aqua_attention.ops.layout import WIDEST
from aqua_attention.ops.mask import short_queries
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.select import select_dimensions


def attention_prefill(call: Call, plan: LayerPlan) -> Attended:
    """AQUA attention of a prompt or its last part: causal, no mask; bfloat16, float16 or float32.

    Raises:
        AquaError: shapes, dtypes or gradients that the kernels do not take; the message lists what they take.
    """
    query, key, value, rotation = call.query, call.key, call.value, plan.rotation
    check_rotation(query, rotation, plan.key_rms)
    length, kept, window = key.shape[2], rotation.shape[2], call.sink + call.recent
    shape, before = (query.shape[0], rotation.shape[0], length), length - query.shape[2]
    if (
        key.shape != (*shape, kept)
        or value.ndim != 4
        or value.shape[:3] != shape
        or value.shape[3] > WIDEST
        or before < 0
    ):
        raise AquaError(
            f"key is {tuple(key.shape)} and value {tuple(value.shape)}: in prefill they must be {(*shape, kept)} and "
            f"{(*shape, f'1 to {WIDEST}')}, one for each query or more, and causal without a mask"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise AquaError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: they must be of one dtype"
        )
    if call.has_gradient:
        raise AquaError("prefill kernels have no gradient: call them under torch.no_grad()")
    in_window, selected = window > 0 and length <= window, None
    if in_window or length < plan.min_length:
        rotated = narrow = rotate_on_gpu(query, rotation)
        if call.is_observed and length >= plan.min_length:
            short = short_queries(None, plan.min_length, queries=query.shape[2], keys=length, device=query.device)
            selected = select_dimensions(rotated, plan, short, scaling=call.scaling)
    else:
        rotated, narrow, selected = rotate_and_narrow(
            query, plan, call.scaling, both=window > 0, is_observed=call.is_observed, before=before
        )
    key, value = by_token(key), by_token(value)
    width = max(kept, value.shape[3])
    wide_key = widened(key, width)
    if window == 0 or in_window or narrow is rotated:
        output = dense_attention(widened(narrow, width), wide_key, value, None, call.scaling)
        return Attended(output, selected, rotated.shape)
    outside = slice(call.sink, length - call.recent)
    first_far = max(window - before, 0)
    far = attention_with_lse(
        widened(narrow[:, :, first_far:], width), wide_key[:, :, outside], value[:, :, outside], call.scaling
    )
    output = window_merge(call._replace(query=rotated, key=key, value=value), *far)
    return Attended(output, selected, rotated.shape)
