# SPDX-License-Identifier: Apache-2.0
"""The heaviest tokens: the weight of the lightest of the fewest that together weigh enough.

Sorting says it. On a GPU that takes longer than all the rest of attention, so there weights are counted into bins.
"""

import torch
from torch import Tensor

UNIT = 1 << 40
"""Weights are summed in bins as whole numbers of this part of one, so that their order does not matter."""
FIELDS = ((21, 10), (10, 11), (0, 10))
"""Bits of a float32 without its sign, from the highest on: where a field begins, and how many it has."""


def least_of(weight: Tensor, wanted: Tensor) -> Tensor:
    """The largest number such that the weights of at least that sum to what is wanted.

    Args:
        weight: [..., tokens], 0 or more; wanted: [...].

    Returns:
        [..., 1]: infinity where nothing is wanted; 0 where all are not enough; NaN where a weight is NaN.
    """
    by_bins = weight.device.type == "cuda" and weight.dtype == torch.float32
    return least_by_bins(weight, wanted) if by_bins else least_by_sorting(weight, wanted)


def least_by_sorting(weight: Tensor, wanted: Tensor) -> Tensor:
    """`least_of`, as it is defined."""
    ordered = weight.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    count = (before < wanted[..., None]).sum(-1, keepdim=True)
    found = ordered.gather(-1, (count - 1).clamp_min(0))
    enough = ordered.sum(-1, keepdim=True) >= wanted[..., None]
    found = torch.where(enough, found, 0).masked_fill(count == 0, torch.inf)
    return found.masked_fill(weight.isnan().any(-1, keepdim=True), torch.nan)


def least_by_bins(weight: Tensor, wanted: Tensor) -> Tensor:
    """`least_of` in float32: three times the bin in which the sum is reached, by the next bits of the weights."""
    # Numbers of 0 or more are in the order of their bits.
    bits, mass = weight.contiguous().view(torch.int32), (weight.nan_to_num(0.0) * UNIT).long()
    missing = (wanted.nan_to_num(0.0).double() * UNIT).ceil().long()[..., None]
    found = torch.zeros_like(missing)
    for first, width in FIELDS:
        here = torch.where((bits >> (first + width)) == found, mass, 0)
        bins = ((bits >> first) & ((1 << width) - 1)).long()
        sums = here.new_zeros((*here.shape[:-1], 1 << width)).scatter_add_(-1, bins, here)
        # Of a bin and those above it: it falls from the first bin to the last.
        above = sums.flip(-1).cumsum(-1).flip(-1)
        place = ((above >= missing).sum(-1, keepdim=True) - 1).clamp_min(0)
        missing = missing - (above - sums).gather(-1, place)
        found = (found << width) | place
    least = found.int().view(torch.float32).masked_fill(wanted[..., None] <= 0, torch.inf)
    return least.masked_fill(weight.isnan().any(-1, keepdim=True), torch.nan)
