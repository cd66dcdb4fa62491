# SPDX-License-Identifier: Apache-2.0
"""Rotating the few new states of a decoding step on a CPU: torch takes longer to be called than to compute."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from aqua_attention.ops.backends.cpu.build import kernels
from aqua_attention.ops.backends.cpu.step import DTYPES

MOST_TOKENS = 4
"""Of a sequence. Of more, torch multiplies faster than it is called late."""


def rotate_few(states: Tensor, rotation: Tensor) -> Tensor:
    """`ops.select.rotate` in C, for what `Cpu.why_not_rotate` does not refuse."""
    batch, heads, length, wide = states.shape
    kv_heads, _, dims = rotation.shape
    rotated = states.new_empty((batch, heads, length, dims))
    # Held by name until the call has ended.
    states, rotation = states.contiguous(), rotation.contiguous()
    sizes = batch * kv_heads, kv_heads, heads // kv_heads * length, wide, dims
    _function(states.dtype)(states.data_ptr(), rotation.data_ptr(), rotated.data_ptr(), *sizes)
    return rotated


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    found = getattr(kernels(), f"rotate_states_{DTYPES[dtype]}")
    found.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 5]
    found.restype = None
    return found
