# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The exact window of a prompt on a GPU, merged with the attention to everything else in one pass."""

import triton
import triton.language as tl
from torch import Tensor, float32

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.blocks import LOG2_E, on_device_of, online_softmax, padded
from aqua_attention.ops.backends.triton.rotate import PRECISION, by_token, empty_by_token
from aqua_attention.ops.plan import Call

WINDOW_ROWS, WINDOW_KEYS, WINDOW_STAGES = 64, 32, 2
"""Queries of the exact window at once (tokens times heads of a group), 16 a warp; keys at once; loads in flight."""


def window_merge(call: Call, far: Tensor, far_lse: Tensor) -> Tensor:
    """Attention to the exact window, merged with the attention to everything else.

    Args:
        call: of a prompt or its last part, with rotated queries; its window has fewer tokens than there are keys.
        far: attention of the queries from the token sink + recent on to the keys outside their windows,
            [batch, num_attention_heads, so many, value_dim]; far_lse: its log-sum-exp, float32.

    Returns:
        [batch, num_attention_heads, length, value_dim] as of `empty_by_token`, in the dtype of the values.

    Raises:
        AquaError: shapes or sizes that the kernel does not take; the message lists what it takes.
    """
    (batch, heads, length, kept), sink, recent = call.query.shape, call.sink, call.recent
    (_, kv_heads, keys, _), value_dim = call.key.shape, call.value.shape[3]
    if min(sink, recent) < 0 or not 0 < sink + recent < keys:
        raise AquaError(
            f"sink is {sink} and recent {recent}: the kernel takes a window of 1 to {keys - 1} for {keys} tokens"
        )
    before = keys - length
    first_far = max(sink + recent - before, 0)
    rest = (batch, heads, length - first_far)
    if far.shape != (*rest, value_dim) or far_lse.shape != rest or far_lse.dtype != float32:
        raise AquaError(
            f"far is {tuple(far.shape)} and its log-sum-exp {far_lse.dtype} {tuple(far_lse.shape)}: they must be "
            f"{(*rest, value_dim)} and torch.float32 {rest}"
        )
    query, key, value, far = (by_token(states) for states in (call.query, call.key, call.value, far))
    output = empty_by_token(query, value_dim)
    widths = [padded(width) for width in (kept, value_dim)]
    together = triton.next_power_of_2(heads // kv_heads)
    rows = max(WINDOW_ROWS, together)
    # Programs of neighbouring tokens run at the same time, so that their keys are read from the cache.
    with on_device_of(query):
        _window[(triton.cdiv(length, rows // together), kv_heads, batch)](
            query,
            key,
            value,
            far,
            far_lse.contiguous(),
            output,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *far.stride()[:3],
            length,
            before,
            first_far,
            sink,
            recent,
            call.scaling * LOG2_E,
            GROUP=heads // kv_heads,
            TOGETHER=together,
            ROWS=rows,
            KEYS=WINDOW_KEYS,
            KEPT=kept,
            KEPT_PADDED=widths[0],
            VALUE_DIM=value_dim,
            VALUE_PADDED=widths[1],
            PRECISION=PRECISION,
            num_warps=rows // 16,
            num_stages=WINDOW_STAGES if query.element_size() == 2 and max(widths) <= 128 else 1,
        )
    return output


@triton.jit
def _window(
    query_ptr,
    key_ptr,
    value_ptr,
    far_ptr,
    far_lse_ptr,
    output_ptr,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    far_batch,
    far_head,
    far_token,
    length,
    before,
    first_far,
    sink,
    recent,
    scaling,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, groups, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * (ROWS // TOGETHER)
    # The heads of a group are rows of one matrix, which all multiply the same keys.
    tokens = start + tl.arange(0, ROWS) % (ROWS // TOGETHER)
    member = tl.arange(0, ROWS) // (ROWS // TOGETHER)
    heads = (group * GROUP + member).to(tl.int64)
    there = (member < GROUP) & (tokens < length)
    dims, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    query = tl.load(
        query_ptr
        + row * query_batch
        + heads[:, None] * query_head
        + tokens.to(tl.int64)[:, None] * query_token
        + dims[None, :],
        there[:, None] & (dims[None, :] < KEPT),
        0.0,
    )
    key_ptr += row * key_batch + group.to(tl.int64) * key_head
    value_ptr += row * value_batch + group.to(tl.int64) * value_head

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    # Blocks of first tokens, then of those from the first query's window on, which are not counted twice.
    places = before + tokens
    begin = tl.maximum(before + start - recent + 1, sink)
    end = tl.where(recent > 0, before + tl.minimum(start + ROWS // TOGETHER, length), 0)
    firsts = tl.cdiv(tl.minimum(sink, before + start + ROWS // TOGETHER), KEYS)
    for block in range(firsts + tl.cdiv(tl.maximum(end - begin, 0), KEYS)):
        is_first = block < firsts
        positions = tl.where(is_first, block, block - firsts) * KEYS + tl.where(is_first, 0, begin) + tl.arange(0, KEYS)
        given = positions < tl.where(is_first, sink, end)
        keys = tl.load(
            key_ptr + positions.to(tl.int64)[None, :] * key_token + dims[:, None],
            given[None, :] & (dims[:, None] < KEPT),
            0.0,
        )
        values = tl.load(
            value_ptr + positions.to(tl.int64)[:, None] * value_token + columns[None, :],
            given[:, None] & (columns[None, :] < VALUE_DIM),
            0.0,
        )
        scores = tl.dot(query, keys, input_precision=PRECISION) * scaling
        after = tl.where(is_first, -1, places - recent)
        seen = given[None, :] & (positions[None, :] <= places[:, None]) & (positions[None, :] > after[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        largest, total, output = online_softmax(scores, values, None, largest, total, output, PRECISION)

    has_far = there & (tokens >= first_far)
    far_row = (row * groups * GROUP + heads) * (length - first_far) + tokens - first_far
    far_lse = tl.load(far_lse_ptr + far_row, has_far, float("-inf")) * 1.4426950408889634
    far = tl.load(
        far_ptr
        + row * far_batch
        + heads[:, None] * far_head
        + (tokens - first_far).to(tl.int64)[:, None] * far_token
        + columns[None, :],
        has_far[:, None] & (columns[None, :] < VALUE_DIM),
        0.0,
    ).to(tl.float32)
    now = tl.maximum(largest, far_lse)
    # Rows behind the last query see nothing, and are not written.
    now = tl.where(now == float("-inf"), 0.0, now)
    near_share, far_share = tl.exp2(largest - now), tl.exp2(far_lse - now)
    merged = output * near_share[:, None] + far * far_share[:, None]
    merged = merged / tl.where(there, total * near_share + far_share, 1.0)[:, None]
    tl.store(
        output_ptr + ((row * length + tokens) * (groups * GROUP) + heads)[:, None] * VALUE_DIM + columns[None, :],
        merged.to(output_ptr.dtype.element_ty),
        there[:, None] & (columns[None, :] < VALUE_DIM),
    )
