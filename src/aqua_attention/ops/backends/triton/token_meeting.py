# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""The weight of the lightest of the tokens that are read, where several programs have those of a sequence and head.

Meeting takes longer than counting. So each turn divides the interval of bits into many parts, where one program alone
halves it (`token_threshold`). Each program says what it has from each part on, and all add that up in the same order.

They wait for each other, so all of them must be on the GPU at once. GPUs take blocks in their order, so those that
follow each other are.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.token_threshold import (
    INFINITY,
    counted,
    lightest_of_all,
    target_of,
    two,
    weighed,
    weight_of,
)
from aqua_attention.ops.backends.triton.token_weights import WEIGHT_UNIT
from aqua_attention.ops.backends.triton.token_work import TURNS

ALL_BITS, STEP_TURNS = tl.constexpr(1 << 15), tl.constexpr(TURNS)
"""Numbers that float16 has without a sign; and turns of a step."""


@triton.jit
def say(said_ptr, numbers, turn):
    """Tell other programs numbers in float32: a word of 64 bits has one, and the turn in which it is said.

    No word that was left there has that turn: turns are counted through all steps, of batches of any size. A word is
    written at once, so nobody waits until memory is in order.
    """
    numbers = numbers.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(said_ptr, (turn.to(tl.int64) << 32) | numbers, cache_modifier=".cg")


@triton.jit
def heard(said_ptr, there, turn):
    """What programs say in this turn, once all have; 0 where none is there."""
    words = tl.load(said_ptr, there, 0, volatile=True)
    while tl.sum((there & ((words >> 32).to(tl.int32) != turn)).to(tl.int32)) > 0:
        words = tl.load(said_ptr, there, 0, volatile=True)
    return tl.where(there, (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def least_weight_of_all(
    held,
    window,
    share,
    wanted,
    shared,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The weight from which on tokens are read, see `token_threshold.least_weight`; and how many of these the programs
    before this one have, outside of the exact window.

    Args:
        shared: number of the step, what programs say, which of them this one is, and how many there are.
    """
    number, said_ptr, chunk, taking_part = shared
    index, others = tl.arange(0, PARTS), tl.arange(0, CHUNKS)
    at = index[:, None] * CHUNKS + others[None, :]
    there = (index >= 0)[:, None] & (others < taking_part)[None, :]
    low, part, turn = lightest_of_all(BY_COUNT), tl.full([], 0, tl.int32), number * STEP_TURNS
    target, width = tl.full([], 0.0, tl.float32), tl.full([], ALL_BITS, tl.int32)
    while width > 1:
        width = width // PARTS
        counts, masses = _from_each(held, low + index * width, BY_COUNT, ASSEMBLY)
        say(said_ptr + index * CHUNKS + chunk, counts, turn)
        if not BY_COUNT:
            say(said_ptr + (PARTS + index) * CHUNKS + chunk, masses, turn)
        has = window + tl.sum(heard(said_ptr + (0 if BY_COUNT else PARTS * CHUNKS) + at, there, turn), 1)
        # The first turn begins with all that can be read.
        whole = tl.sum(tl.where(index == 0, has, 0.0), 0)
        target = tl.where(turn == number * STEP_TURNS, target_of(whole, share, wanted, BY_COUNT), target)
        part = tl.maximum(tl.sum((has >= target).to(tl.int32), 0) - 1, 0)
        low += part * width
        turn += 1
        said_ptr += 2 * PARTS * CHUNKS
    last_ptr = said_ptr + (part - 2 * PARTS) * CHUNKS
    before = tl.sum(heard(last_ptr + others, others < chunk, turn - 1), 0)
    enough = window >= target
    return weight_of(tl.where(enough, INFINITY, low)), tl.where(enough, 0.0, before).to(tl.int32)


@triton.jit
def _from_each(held, thresholds, BY_COUNT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Number of the tokens of this program that weigh as much as each threshold, and their mass, where that decides."""
    thresholds = thresholds[:, None]
    nothing = tl.zeros_like(thresholds)
    pairs = tl.reshape(held[0], [1, held[0].numel])
    counts = nothing + tl.zeros_like(pairs)
    masses = counts.to(tl.float32)
    for j in tl.static_range(len(held)):
        pairs = nothing + tl.reshape(held[j], [1, held[j].numel])
        counts = counted(counts, pairs, thresholds, ASSEMBLY)
        if not BY_COUNT:
            masses = weighed(masses, pairs, thresholds, ASSEMBLY)
    even, odd = two(counts)
    counts = tl.sum(even.to(tl.float32) + odd.to(tl.float32), 1)
    if not BY_COUNT:
        return counts, tl.sum(masses, 1) / WEIGHT_UNIT
    else:
        return counts, counts
