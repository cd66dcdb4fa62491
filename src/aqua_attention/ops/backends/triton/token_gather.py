# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Attention to listed tokens, whose keys and values lie here and there.

Lists differ in length by a factor of thirty, so all stand in one row, of which every program has an equal part; which
is found from the counts alone. The last program to end a piece of a list merges them.

Another kernel does the same where `Sizes` says so: `token_gather_by_hand`. Then a kernel of its own merges.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import (
    LOG2_E,
    TILE,
    on_device_of,
    online_softmax,
    store_part,
)
from aqua_attention.ops.backends.triton.decode_int8 import VALUE_UNIT, decoded
from aqua_attention.ops.backends.triton.token_arguments import (
    ScoredArguments,
    Sequences,
    first_block,
    start_early,
    token_places,
)
from aqua_attention.ops.backends.triton.token_weights import query_for_codes
from aqua_attention.ops.backends.triton.token_work import GATHER_STEP, TokenWork

WARPS, STAGES, WIDE_STAGES = 4, 5, 3
"""Two stages are one block on its way: the list is read a stage before what it says."""
GATHERED, GATHERED_CODES = 64, 128
"""Tokens that are gathered at once, and those of 8 bits."""
MERGED_ROWS = 64
"""Partial results of so many pieces and heads are merged at once."""
REGISTERS = 255
"""Of a lane of the kernel that is placed by hand: eight of its programs share a multiprocessor."""
LEAST_STEPS, MOST_LISTS = 4, 1024
"""Of a program of that kernel: how often it does a step at least, and lists whose lengths it looks at together."""


def attend_to_tokens(cache: Sequences, work: TokenWork, output: Tensor, *, scaling: float, appended: bool) -> None:
    """Write the attention to the listed tokens, [batch, num_attention_heads, value_dim]; sequences are longer then."""
    if work.gather_by_hand:
        _attend_by_hand(cache, work, output, scaling=scaling, appended=appended)
        return
    heads = triton.next_power_of_2(work.group)
    with on_device_of(work.rotated):
        _attend_to_tokens[(work.programs,)](
            work.rotated,
            ScoredArguments.of(cache),
            work.scratch,
            output,
            scaling * LOG2_E,
            work.places,
            cache.shape[1],
            APPENDED=appended,
            PLACES_PADDED=triton.next_power_of_2(work.places),
            GROUP_PADDED=heads,
            MERGED=max(1, MERGED_ROWS // heads),
            GATHERED=GATHERED if cache.value_scales is None else GATHERED_CODES,
            ASSEMBLY=work.rotated.is_cuda,
            num_warps=WARPS,
            num_stages=STAGES if work.rotated.element_size() == 2 else WIDE_STAGES,
            **work.constants(cache),
            **work.starts_early(),
        )


def _attend_by_hand(cache: Sequences, work: TokenWork, output: Tensor, *, scaling: float, appended: bool) -> None:
    """In two launches: a long list has more pieces than one program of one warp could merge."""
    # Imported here: it needs triton's lower language, which the interpreter does not know.
    from aqua_attention.ops.backends.triton import token_gather_by_hand

    (_, kv_heads, kept, value_dim, _), given = cache.shape, ScoredArguments.of(cache)
    lists = triton.next_power_of_2(work.places)
    words = given._replace(keys=given.keys.view(torch.int32), value_tokens=given.value_tokens.view(torch.int32))
    numbers = 2 if cache.value_scales is None else 4
    with on_device_of(work.rotated):
        token_gather_by_hand.gather_kernel[(work.programs,)](
            work.rotated,
            words,
            work.scratch,
            scaling * LOG2_E,
            work.places,
            kv_heads,
            GROUP=work.group,
            KEPT=kept,
            VALUE_DIM=value_dim,
            KEY_SIZE=given.key_block // numbers,
            VALUE_SIZE=given.value_block // numbers,
            SCALE_SIZE=0 if cache.value_scales is None else given.scale_block,
            LISTS=min(MOST_LISTS, max(32, lists)),
            LEAST=LEAST_STEPS,
            num_warps=1,
            maxnreg=REGISTERS,
            **work.starts_early(),
        )
        _merge_lists[(work.places, work.group)](
            given,
            work.scratch,
            output,
            work.programs,
            kv_heads,
            APPENDED=appended,
            GROUP=work.group,
            VALUE_DIM=value_dim,
            PLACES_PADDED=lists,
            STEP=GATHER_STEP,
            LEAST=LEAST_STEPS,
            MERGED=MERGED_ROWS,
            num_warps=WARPS,
            **work.starts_early(),
        )


@triton.jit
def _attend_to_tokens(
    query_ptr,
    cache,
    scratch,
    output_ptr,
    scaling,
    places,
    groups,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    GATHERED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_early(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    # All lists stand in one row, of which each program has an equal part. Of a list it has one piece.
    taken = _taken(scratch, places, PLACES_PADDED, GATHERED)
    ends = tl.cumsum(taken, 0)
    size = tl.maximum(tl.cdiv(tl.sum(taken, 0), programs), GATHERED)
    is_place = tl.arange(0, PLACES_PADDED) < places
    ended = tl.sum((is_place & (_program_of(ends - 1, size, programs) < program)).to(tl.int32), 0)
    begun = tl.sum((is_place & (_program_of(ends - taken, size, programs) <= program)).to(tl.int32), 0)
    for number in range(0, begun - ended):
        place = ended + number
        # Looked up anew: kept, the rooms of all lists would take registers that attending needs.
        rooms = _taken(scratch, places, PLACES_PADDED, GATHERED)
        start = tl.sum(tl.where(tl.arange(0, PLACES_PADDED) < place, rooms, 0), 0)
        count = tl.load(scratch.counts + place, cache_modifier=".cg")
        first = _program_of(start, size, programs)
        last = _program_of(start + tl.maximum(count, GATHERED) - 1, size, programs)
        begin = tl.maximum(program * size - start, 0)
        end = tl.minimum((program + 1) * size - start, count)
        # From a piece to the next, either the list or the program is another.
        piece, first_piece, last_piece = place + program, place + first, place + last
        _piece(
            query_ptr + place.to(tl.int64) * GROUP * KEPT,
            cache,
            scratch,
            (place // groups, place % groups, place.to(tl.int64), piece, begin, end),
            scaling,
            GROUP,
            ROWS,
            KEPT,
            KEPT_PADDED,
            VALUE_DIM,
            VALUE_PADDED,
            BLOCK,
            GATHERED,
            ASSEMBLY,
        )
        tl.debug_barrier()  # the whole program has written before it says so
        if tl.atomic_add(scratch.arrived + place, 1) == last - first:
            tl.store(scratch.arrived + place, 0)
            output_at = output_ptr + place.to(tl.int64) * GROUP * VALUE_DIM
            pieces = (first_piece, last_piece + 1, 0)
            _merge(scratch, output_at, pieces, GROUP, GROUP_PADDED, VALUE_DIM, VALUE_PADDED, MERGED)
            if APPENDED:
                _lengthen(cache, place, groups)


@triton.jit
def _taken(scratch, places, PLACES_PADDED: tl.constexpr, GATHERED: tl.constexpr):
    """The room of every list in the row of all: a short one takes a program as long as so many tokens."""
    every = tl.arange(0, PLACES_PADDED)
    counts = tl.load(scratch.counts + every, every < places, 0, cache_modifier=".cg")
    return tl.where(every < places, tl.maximum(counts, GATHERED), 0)


@triton.jit
def _program_of(place, size, programs):
    """Whose part of the row a place in it is."""
    return tl.minimum(place // size, programs - 1)


@triton.jit
def _piece(
    query_ptr,
    cache,
    scratch,
    part,
    scaling,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHERED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Attention to some tokens of a list."""
    row, group, place, piece, begin, end = part
    heads, narrow, columns = tl.arange(0, ROWS), tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_PADDED)
    inside, column = heads < GROUP, columns < VALUE_DIM
    query = tl.load(
        query_ptr + heads[:, None] * KEPT + narrow[None, :],
        inside[:, None] & (narrow < KEPT)[None, :],
        0.0,
        cache_modifier=".cg",
    )
    if cache.value_scales is not None:
        query, unit, _mean = query_for_codes(query, cache, group, scaling, KEPT, KEPT_PADDED)
    first_of_place = first_block(cache, row, group)
    tokens_ptr = scratch.tokens + place * cache.tile_count * TILE
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    for start in range(begin, end, GATHERED):
        at = start + tl.arange(0, GATHERED)
        listed = at < end
        tokens = tl.load(tokens_ptr + at, listed, 0, cache_modifier=".cg")
        blocks, places = token_places(cache, row, first_of_place, tokens, listed, BLOCK)
        keys = tl.load(
            cache.keys + (blocks * cache.key_block + places * KEPT)[None, :] + narrow[:, None],
            listed[None, :] & (narrow < KEPT)[:, None],
            0,
        )
        values = tl.load(
            cache.value_tokens + (blocks * cache.value_block + places * VALUE_DIM)[:, None] + columns[None, :],
            listed[:, None] & column[None, :],
            0,
        )
        if cache.value_scales is not None:
            # What the means of channels add is the same for all tokens.
            scales_at = blocks * cache.scale_block + places
            scales = tl.load(cache.key_scales + scales_at, listed, 0.0).to(tl.float32)
            value_scales = tl.load(cache.value_scales + scales_at, listed, 0.0).to(tl.float32) * VALUE_UNIT
            scores = tl.dot(query, decoded(keys, ASSEMBLY)) * (unit[:, None] * scales[None, :])
            scores = tl.where(listed[None, :], scores, float("-inf"))
            largest, total, output = online_softmax(
                scores, decoded(values, ASSEMBLY), value_scales, largest, total, output, "ieee"
            )
        else:
            scores = tl.dot(query, keys, input_precision="ieee") * scaling
            scores = tl.where(listed[None, :], scores, float("-inf"))
            largest, total, output = online_softmax(scores, values, None, largest, total, output, "ieee")
    if cache.value_scales is not None:
        output /= VALUE_UNIT
    store_part(scratch.partial, scratch.lse, piece * GROUP + heads, largest, total, output, inside, columns, VALUE_DIM)


@triton.jit
def _lengthen(cache, place, groups):
    """With the first list of a sequence: nothing in its launch reads the length."""
    if place % groups == 0:
        row = place // groups
        held = tl.load(cache.lengths + row, cache_modifier=".cg")
        tl.store(cache.lengths + row, tl.minimum(held + 1, cache.max_length), held >= 0)


@triton.jit
def _merge_lists(
    cache,
    scratch,
    output_ptr,
    programs,
    groups,
    APPENDED: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PLACES_PADDED: tl.constexpr,
    STEP: tl.constexpr,
    LEAST: tl.constexpr,
    MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`_merge` of a list and head, where `gather_kernel` has attended to its pieces."""
    start_early(EARLY)
    place, head = tl.program_id(0), tl.program_id(1)
    rooms = tl.cdiv(_taken(scratch, tl.num_programs(0), PLACES_PADDED, LEAST * STEP), STEP)
    size = tl.maximum(tl.cdiv(tl.sum(rooms, 0), programs), LEAST)
    start = tl.sum(tl.where(tl.arange(0, PLACES_PADDED) < place, rooms, 0), 0)
    room = tl.sum(tl.where(tl.arange(0, PLACES_PADDED) == place, rooms, 0), 0)
    pieces = (place + start // size, place + (start + room - 1) // size + 1, head)
    output_at = output_ptr + place.to(tl.int64) * GROUP * VALUE_DIM
    _merge(scratch, output_at, pieces, GROUP, 1, VALUE_DIM, VALUE_DIM, MERGED)
    if APPENDED:  # noqa: SIM102 (this is known when compiling, the other is not)
        if head == 0:
            _lengthen(cache, place, groups)


@triton.jit
def _merge(
    scratch,
    output_ptr,
    share,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The attention to a whole list from that to its pieces, in their order.

    Args:
        share: the first piece, that behind the last, and the head from which on there are GROUP_PADDED.
    """
    first, last, head = share
    members, columns = head + tl.arange(0, GROUP_PADDED), tl.arange(0, VALUE_PADDED)
    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    output = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for start in range(first, last, MERGED):
        pieces = start + tl.arange(0, MERGED)
        there = (pieces < last)[:, None] & (members < GROUP)[None, :]
        at = pieces[:, None] * GROUP + members[None, :]
        # Past the cache of this processor, which may hold what was there before.
        lse = tl.load(scratch.lse + at, there, float("-inf"), cache_modifier=".cg")
        some = tl.load(
            scratch.partial + at[:, :, None] * VALUE_DIM + columns[None, None, :],
            there[:, :, None] & (columns < VALUE_DIM)[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        now = tl.maximum(largest, tl.max(lse, 0))
        base = tl.where(now > float("-inf"), now, 0.0)
        weights = tl.exp2(lse - base[None, :])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 0)
        output = output * shrink[:, None] + tl.sum(some * weights[:, :, None], 0)
        largest = now
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        output_ptr + members[:, None] * VALUE_DIM + columns[None, :],
        output.to(output_ptr.dtype.element_ty),
        (members < GROUP)[:, None] & (columns < VALUE_DIM)[None, :],
    )
