# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""What weights of tokens are relative to: the log-sum-exp of a sequence and each of its heads."""

import triton
import triton.language as tl


@triton.jit
def merged_lse(part_lse_ptr, place, splits, GROUP: tl.constexpr, SPLITS_PADDED: tl.constexpr, UNIT: tl.constexpr):
    """Log-sum-exp of each head, as a tuple of numbers, and the mass of the exact window."""
    parts = tl.arange(0, SPLITS_PADDED)
    found, window = (), 0.0
    for head in tl.static_range(GROUP):
        lse = tl.load(
            part_lse_ptr + (place * GROUP + head) * (splits + 1) + parts,
            parts <= splits,
            float("-inf"),
            cache_modifier=".cg",
        )
        top = tl.max(lse, 0)
        top = tl.where(top > float("-inf"), top, 0.0)
        whole = top + tl.log2(tl.sum(tl.exp2(lse - top), 0))
        # NaN in any part is in the sum.
        window += tl.sum(tl.where(parts == splits, tl.exp2(lse - whole), 0.0), 0) * UNIT
        found = found + (whole,)  # noqa: RUF005 (tuples of kernels cannot be unpacked)
    return found, window
