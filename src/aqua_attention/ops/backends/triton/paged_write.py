# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Writing the keys and values of many tokens to their pages on a GPU, rotated on the way."""

import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import on_device_of, padded, shared_memory, sm_count
from aqua_attention.ops.backends.triton.paged import PageArguments, page_constants, store_tokens
from aqua_attention.ops.backends.triton.rotate import PRECISION, PROGRAMS, RESIDENT, TOKENS, WARPS, turned_tokens
from aqua_attention.ops.backends.triton.turn import load_rotation
from aqua_attention.ops.pages import PagedCache


def write_paged(key: Tensor, value: Tensor, cache: PagedCache, rotation: Tensor | None, slots: Tensor) -> None:
    """Write tokens to their slots.

    Args:
        key: [tokens, num_key_value_heads, head_dim], as the model computes them; value: [tokens, num_key_value_heads,
            value_dim]; the numbers of a head lie together.
        rotation: float32 [num_key_value_heads, head_dim, kept]; None: keys stay as they are.
        slots: int64 [tokens], see `PagedCache.write`.
    """
    (count, kv_heads, head_dim), constants = key.shape, page_constants(cache, 1)
    wide, size = padded(head_dim), key.element_size()
    needed = size * (2 * wide * constants["KEPT_PADDED"] + TOKENS * (wide + constants["VALUE_PADDED"]))
    resident = max(wide, constants["KEPT_PADDED"]) <= RESIDENT and needed <= shared_memory(key)
    programs = min(triton.cdiv(count, TOKENS), max(1, PROGRAMS * sm_count(key) // kv_heads))
    del constants["GROUP"]
    with on_device_of(key):
        _write_paged[(programs, kv_heads)](
            key,
            value,
            rotation,
            slots,
            PageArguments.of(cache),
            *key.stride()[:2],
            *value.stride()[:2],
            count,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=wide,
            CHUNK=wide if resident else RESIDENT // size,
            TOKENS=TOKENS,
            PRECISION=PRECISION,
            num_warps=WARPS if resident else 8,
            num_stages=1,
            **constants,
        )


@triton.jit(do_not_specialize=["count"])
def _write_paged(
    key_ptr,
    value_ptr,
    rotation_ptr,
    slots_ptr,
    pages,
    key_token,
    key_head,
    value_token,
    value_head,
    count,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, columns, dims = tl.program_id(1), tl.arange(0, VALUE_PADDED), tl.arange(0, KEPT_PADDED)
    key_ptr += group.to(tl.int64) * key_head
    value_ptr += group.to(tl.int64) * value_head
    high, low = 0, 0
    if rotation_ptr is not None:
        rotation_ptr += group * HEAD_DIM * KEPT
        if CHUNK == HEAD_DIM_PADDED:
            high, low = load_rotation(rotation_ptr, 0, key_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    for block in range(tl.program_id(0), tl.cdiv(count, TOKENS), tl.num_programs(0)):
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        slots = tl.load(slots_ptr + tokens, tokens < count, -1)
        there = slots >= 0
        if rotation_ptr is None:
            keys = tl.load(
                key_ptr + tokens.to(tl.int64)[:, None] * key_token + dims[None, :],
                there[:, None] & (dims < KEPT)[None, :],
                0.0,
            )
        else:
            keys = turned_tokens(
                (key_ptr, key_token, tokens, there),
                (rotation_ptr, high, low),
                HEAD_DIM,
                HEAD_DIM_PADDED,
                CHUNK,
                KEPT,
                KEPT_PADDED,
                TOKENS,
                PRECISION,
            )
        values = tl.load(
            value_ptr + tokens.to(tl.int64)[:, None] * value_token + columns[None, :],
            there[:, None] & (columns < VALUE_DIM)[None, :],
            0.0,
        )
        store_tokens(pages, group, slots, keys, values, KEPT, KEPT_PADDED, VALUE_DIM, VALUE_PADDED, BLOCK)
