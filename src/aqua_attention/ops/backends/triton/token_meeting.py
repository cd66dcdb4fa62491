# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""Programs of one sequence and head that add up what each of them has.

They wait for each other, so all of them must be on the GPU at once. GPUs take blocks in their order, so those that
follow each other are. All add up in the same order.
"""

import triton
import triton.language as tl

from aqua_attention.ops.backends.triton.token_work import MOST_NUMBERS, MOST_TURNS

TURNS = tl.constexpr(MOST_TURNS)
MOST_SAID = tl.constexpr(MOST_NUMBERS)


@triton.jit
def meet(met_ptr, count):
    """Say that this program has written what others wait for, and wait until so many have."""
    tl.debug_barrier()  # all of it is written before
    met = tl.atomic_add(met_ptr, 1) + 1
    while met < count:
        met = tl.atomic_add(met_ptr, 0)
    tl.debug_barrier()


@triton.jit
def before_this(number, shared, turn, CHUNKS: tl.constexpr):
    """The sum of a number of each program before this one, of a sequence and head that has several."""
    met_ptr, said_ptr, chunk, taking_part = shared
    said_ptr += turn * MOST_SAID * CHUNKS
    tl.store(said_ptr + chunk, number)
    meet(met_ptr, (turn + 1) * taking_part)
    others = tl.arange(0, CHUNKS)
    numbers = tl.load(said_ptr + others, others < taking_part, 0.0, cache_modifier=".cg")
    return tl.sum(tl.where(others < chunk, numbers, 0.0), 0)


@triton.jit
def all_together(numbers, shared, turn, CHUNKS: tl.constexpr, COUNT: tl.constexpr):
    """The sums of COUNT numbers of each program."""
    found = ()
    if CHUNKS > 1:
        met_ptr, said_ptr, chunk, taking_part = shared
        said_ptr += turn * MOST_SAID * CHUNKS
        for i in tl.static_range(COUNT):
            tl.store(said_ptr + i * CHUNKS + chunk, numbers[i])
        meet(met_ptr, (turn + 1) * taking_part)
        others = tl.arange(0, CHUNKS)
        for i in tl.static_range(COUNT):
            said = tl.load(said_ptr + i * CHUNKS + others, others < taking_part, 0.0, cache_modifier=".cg")
            found = found + (tl.sum(said, 0),)  # noqa: RUF005
    else:
        found = numbers
    return found
