# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Rotating the query heads of a group, and its key, for one token of a sequence or of several."""

import functools

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import padded

LARGEST_CHUNK = 1 << 14
"""Numbers of a rotation that are multiplied at once: 64 KB of shared memory."""


@functools.cache
def turning(group: int, head_dim: int, kept: int) -> dict[str, int]:
    """Constants of kernels that rotate the query heads of a group and its key."""
    wide = padded(head_dim)
    chunk = min(wide, LARGEST_CHUNK // padded(kept))
    return {"ROWS": padded(group + 1), "HEAD_DIM": head_dim, "HEAD_DIM_PADDED": wide, "CHUNK": chunk}


@triton.jit
def load_rotation(rotation_ptr, start, like, HEAD_DIM, KEPT, CHUNK: tl.constexpr, KEPT_PADDED: tl.constexpr):
    """Rows of a rotation as a sum of two matrices in the dtype of the states: rounded to 16 bits it is not orthogonal,
    with what was rounded off beside it, it is.
    """
    wide, dims = start + tl.arange(0, CHUNK), tl.arange(0, KEPT_PADDED)
    there = (wide[:, None] < HEAD_DIM) & (dims[None, :] < KEPT)
    rotation = tl.load(rotation_ptr + wide[:, None] * KEPT + dims[None, :], there, 0.0)
    high = rotation.to(like)
    return high, (rotation - high.to(tl.float32)).to(like)


@triton.jit
def load_states(source, start, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK dimensions of the query heads of a group, and of the key as the row behind them, [ROWS, CHUNK].

    Args:
        source: pointers to queries, keys and the rotation of the key-value head, and the number of sequence and head.
    """
    query_ptr, key_ptr, _, place = source
    heads, wide = tl.arange(0, ROWS), start + tl.arange(0, CHUNK)
    states = tl.load(
        query_ptr + (place * GROUP + heads[:, None]) * HEAD_DIM + wide[None, :],
        (heads < GROUP)[:, None] & (wide[None, :] < HEAD_DIM),
        0.0,
    )
    key = tl.load(key_ptr + place * HEAD_DIM + wide, wide < HEAD_DIM, 0.0)
    return tl.where((heads == GROUP)[:, None], key[None, :], states)


@triton.jit
def _multiplied(states, high, low, turned):
    """What is turned so far, with states times a rotation, as a sum of two matrices, added to it."""
    if states.dtype == tl.float32:
        turned = tl.dot(states, high, turned, input_precision="ieee")
    else:
        turned = tl.dot(states, low, tl.dot(states, high, turned))
    return turned


@triton.jit
def turn(
    source,
    loaded,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
):
    """The rows of `load_states` rotated, [ROWS, KEPT_PADDED], in their dtype.

    Args:
        loaded: states, and the rotation as two matrices, of the first CHUNK dimensions; the rest is loaded here.
    """
    states, high, low = loaded
    query_ptr, _, rotation_ptr, _ = source
    dtype = query_ptr.dtype.element_ty
    turned = tl.zeros([ROWS, KEPT_PADDED], tl.float32)
    for start in tl.static_range(0, HEAD_DIM_PADDED, CHUNK):
        if start > 0:
            states = load_states(source, start, GROUP, ROWS, HEAD_DIM, CHUNK)
            high, low = load_rotation(rotation_ptr, start, dtype, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
        turned = _multiplied(states, high, low, turned)
    return turned.to(dtype)


@triton.jit
def turn_several(
    rows,
    rotation_ptr,
    loaded,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
):
    """Heads and keys of several sequences rotated, a row each, [rows, KEPT_PADDED], in their dtype.

    Args:
        rows: of each row pointers to a query and to a key, and which of these it is, if any.
        loaded: the rotation as two matrices, of the first CHUNK dimensions; the rest is loaded here.
    """
    query_at, key_at, is_query, is_key = rows
    high, low = loaded
    dtype = query_at.dtype.element_ty
    turned = tl.zeros([query_at.shape[0], KEPT_PADDED], tl.float32)
    for start in tl.static_range(0, HEAD_DIM_PADDED, CHUNK):
        wide = (start + tl.arange(0, CHUNK))[None, :]
        states = tl.load(query_at[:, None] + wide, is_query[:, None] & (wide < HEAD_DIM), 0.0)
        states = tl.where(
            is_key[:, None], tl.load(key_at[:, None] + wide, is_key[:, None] & (wide < HEAD_DIM), 0.0), states
        )
        if start > 0:
            high, low = load_rotation(rotation_ptr, start, dtype, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
        turned = _multiplied(states, high, low, turned)
    return turned.to(dtype)
