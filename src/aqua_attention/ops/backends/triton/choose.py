# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Choosing the dimensions that the query heads of a group share, for one token: `ops.select.select_dimensions`."""

import triton
import triton.language as tl


@triton.jit
def choose_dims(
    turned,
    inside,
    rms,
    chosen,
    place,
    logit_error,
    scaling,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    LISTED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SELECTION: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """Write which dimensions are multiplied, as a list and as a mask.

    Args:
        turned: rotated queries in float32, [rows, KEPT_PADDED]; inside: the rows of the group; rms: of the keys.
        chosen: pointers to list, mask and counts (None: always COUNT); place: number of sequence and head in them.
    """
    dims_ptr, mask_ptr, counts_ptr = chosen
    narrow = tl.arange(0, KEPT_PADDED)
    column = narrow < KEPT
    # The dimensions of largest summed square; among equals the lower one, and a NaN is largest.
    if SELECTION == "static":
        size = (KEPT_PADDED - narrow).to(tl.float32)
    else:
        size = tl.where(inside[:, None], turned, 0.0)
        if SELECTION == "weighted":
            size *= rms[None, :]
        size = tl.sum(size * size if SQUARED else tl.abs(size), 0)
        size = tl.where(size == size, size, float("inf"))
    size = tl.where(column, size, -1.0)
    ahead = (size[:, None] > size[None, :]) | ((size[:, None] == size[None, :]) & (narrow[:, None] < narrow[None, :]))
    rank = tl.sum(ahead.to(tl.int32), 0)
    if not ADAPTIVE:
        taken = (rank < COUNT).to(tl.int32)
        if counts_ptr is not None:
            tl.store(counts_ptr + place, COUNT)
    else:
        # Dropping a dimension costs its variance and that of all behind it.
        error = tl.where(inside[:, None], turned, 0.0) * rms[None, :] * scaling
        variance = tl.sum(error * error, 0)
        behind = tl.sum(tl.where(ahead, 0.0, variance[:, None]), 0)
        few = behind <= logit_error
        taken = (((few == 0) | (rank == 0)) & column).to(tl.int32)
        tl.store(counts_ptr + place, tl.sum(taken, 0))
    tl.store(mask_ptr + place * KEPT + narrow, taken.to(tl.int8), column)
    tl.store(dims_ptr + place * LISTED + rank, narrow, taken > 0)
