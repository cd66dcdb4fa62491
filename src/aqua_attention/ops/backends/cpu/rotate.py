# SPDX-License-Identifier: Apache-2.0
"""Rotating the new token of a decoding step on a CPU: torch takes longer to be called than to compute."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from aqua_attention.ops.backends.cpu.build import kernels
from aqua_attention.ops.backends.cpu.step import DTYPES
from aqua_attention.ops.layout import WIDEST

MOST_PRODUCTS = 1 << 19
"""Of all states. This is one thread, and torch takes more of them for more."""


def why_not_rotate(states: Tensor, rotation: Tensor) -> str | None:
    """Why C does not rotate these states; torch does then, or says what does not fit."""
    if torch.compiler.is_compiling():  # first: it cannot look into what follows
        return "torch.compile does not look into it"
    if not kernels.cache_info().currsize:
        return "no kernel is loaded"
    if states.device.type != "cpu" or states.ndim != 4 or states.shape[2] != 1:
        return "it rotates the new token of a step on a CPU"
    if states.numel() * rotation.shape[2] > MOST_PRODUCTS or max(rotation.shape[1:]) > WIDEST:
        return "there is too much to rotate"
    if states.dtype not in DTYPES or rotation.dtype != torch.float32 or rotation.device != states.device:
        return "it takes float32 and bfloat16, and a rotation in float32 beside them"
    if states.shape[3] != rotation.shape[1] or states.shape[1] % rotation.shape[0]:
        return "the shapes do not fit"
    return None if _is_plain(states) and _is_plain(rotation) else "torch does more with these states than compute"


def _is_plain(states: Tensor) -> bool:
    """Whether nobody but the caller asks what becomes of them: no gradient, transform, trace or mode."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    watched = torch._C._is_tracing() or is_in_torch_dispatch_mode()
    known = type(states) in (Tensor, torch.nn.Parameter) and not states.is_neg()
    return known and not (transformed or watched or (states.requires_grad and torch.is_grad_enabled()))


def rotate_new(states: Tensor, rotation: Tensor) -> Tensor:
    """`ops.select.rotate` in C, for what `why_not_rotate` does not refuse."""
    batch, heads, _, wide = states.shape
    kv_heads, _, dims = rotation.shape
    rotated = states.new_empty((batch, heads, 1, dims))
    # Held by name until the call has ended.
    states, rotation = states.contiguous(), rotation.contiguous()
    sizes = batch * kv_heads, kv_heads, heads // kv_heads, wide, dims
    _function(states.dtype)(states.data_ptr(), rotation.data_ptr(), rotated.data_ptr(), *sizes)
    return rotated


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    found = getattr(kernels(), f"rotate_states_{DTYPES[dtype]}")
    found.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 5]
    found.restype = None
    return found
