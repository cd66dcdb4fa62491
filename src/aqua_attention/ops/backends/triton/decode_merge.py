# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What follows when the parts of a sequence are done: their merge, and the attention that each token was given."""

import functools

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.blocks import softmax_block

MERGED_ROWS = 64
"""Partial results of so many splits and heads are merged at once."""


@functools.cache
def merging(group: int, splits: int) -> dict[str, int]:
    """Constants of kernels that merge so many parts."""
    heads, parts = triton.next_power_of_2(group), triton.next_power_of_2(splits)
    return {"GROUP_PADDED": heads, "MERGED": min(parts, max(1, MERGED_ROWS // heads))}


@triton.jit
def merge(
    results,
    splits,
    first_head,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The attention over all splits of the sequence, from that over each and its log-sum-exp.

    Args:
        results: pointers to both, to the output, and to the log-sum-exp of the whole or None.
    """
    partial_ptr, lse_ptr, output_ptr, whole_lse_ptr = results
    columns = tl.arange(0, VALUE_PADDED)
    column = columns < VALUE_DIM
    member = tl.arange(0, GROUP_PADDED)
    first = (first_head + member) * splits
    top, total = tl.full([GROUP_PADDED], float("-inf"), tl.float32), tl.zeros([GROUP_PADDED], tl.float32)
    result = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for start in range(0, splits, MERGED):
        part = start + tl.arange(0, MERGED)
        is_part = (member[:, None] < GROUP) & (part[None, :] < splits)
        at = first[:, None] + part[None, :]
        # Past the cache of this processor, which may hold what was there before.
        part_lse = tl.load(lse_ptr + at, is_part, float("-inf"), cache_modifier=".cg")
        some = tl.load(
            partial_ptr + at[:, :, None] * VALUE_DIM + columns[None, None, :],
            is_part[:, :, None] & column[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        top, weight, shrink = softmax_block(part_lse, top)
        total = total * shrink + tl.sum(weight, 1)
        result = result * shrink[:, None] + tl.sum(some * weight[:, :, None], 1)
    is_empty = total == 0
    result /= tl.where(is_empty, 1.0, total)[:, None]
    tl.store(
        output_ptr + (first_head + member)[:, None] * VALUE_DIM + columns[None, :],
        result.to(output_ptr.dtype.element_ty),
        (member[:, None] < GROUP) & column[None, :],
    )
    if whole_lse_ptr is not None:
        whole_lse = tl.where(is_empty, 0.0, top + tl.log2(tl.where(is_empty, 1.0, total)))
        tl.store(whole_lse_ptr + first_head + member, whole_lse, member < GROUP)


@triton.jit
def merge_kernel(
    partial_ptr,
    lse_ptr,
    output_ptr,
    whole_lse_ptr,
    lengths_ptr,
    splits,
    longest,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What the last program of `decode_kernel` does, where parts come from two kernels."""
    group, row = tl.program_id(0), tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    results = (partial_ptr, lse_ptr, output_ptr, whole_lse_ptr)
    first_head = (row * tl.num_programs(0) + group).to(tl.int64) * GROUP
    merge(results, splits, first_head, GROUP, GROUP_PADDED, VALUE_DIM, VALUE_PADDED, MERGED)
    if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
        if group == 0:
            tl.store(lengths_ptr + row, tl.minimum(tl.load(lengths_ptr + row, cache_modifier=".cg") + 1, longest))


@triton.jit
def mass_kernel(scores_ptr, lse_ptr, lengths_ptr, mass_ptr, tokens, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Attention that each token was given by the heads of a group, from their scores and log-sum-exp."""
    row = tl.program_id(2)
    place = (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = position < tl.load(lengths_ptr + row)
    mass = tl.zeros([BLOCK], tl.float32)
    for member in range(GROUP):
        head = place * GROUP + member
        scores = tl.load(scores_ptr + head * tokens + position, seen, float("-inf"))
        mass += tl.exp2(scores - tl.load(lse_ptr + head))
    tl.store(mass_ptr + place * tokens + position, tl.where(seen, mass, 0.0), position < tokens)
