# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernels of a prompt whose queries choose tokens, in the order in which `token_prompt` launches them."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import online_softmax, softmax_block

INFINITY = tl.constexpr(0x7F800000)
"""Its bits in float32."""
WORD = tl.constexpr(32)
"""Tokens of a word of bits."""


class Prompt(NamedTuple):
    """What kernels are given, as one argument; strides are of a row, head and token.

    Attributes:
        rotated, narrow: queries, and those with what scores only; in memory [batch, queries, heads, kept].
        key, value_states, copy: of all tokens; the copy scores.
        output: as the queries.
        weights: float32 [batch, num_key_value_heads, queries, tokens] of a block of queries; negative in the exact
            window.
        lse: log-sum-exp of scores, to the base 2, [batch, num_attention_heads, queries] of a block.
        chosen: int32 [batch, num_key_value_heads, queries, words] of a block: a bit for each token that is read.
        counts: tokens read, int32, of all queries.
    """

    rotated: Tensor
    narrow: Tensor
    key: Tensor
    value_states: Tensor
    copy: Tensor
    output: Tensor
    weights: Tensor
    lse: Tensor
    chosen: Tensor
    counts: Tensor
    key_row: int
    key_head: int
    key_token: int
    value_row: int
    value_head: int
    value_token: int


class Block(NamedTuple):
    """Some queries of a prompt.

    Attributes:
        first: the first of them; rows: how many there are, of all `queries`; before: tokens before the first of all.
        most: queries of a block at most; words: of a query's bits; kv_heads: key-value heads.
        sink, recent: the exact window; min_length: queries that see fewer tokens read all of them.
        scaling: factor of the scores, to the base 2.
    """

    first: int
    rows: int
    queries: int
    before: int
    most: int
    words: int
    kv_heads: int
    sink: int
    recent: int
    min_length: int
    scaling: float


@triton.jit
def _queries(pointer, block, row, head, heads, offsets, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr):
    """Queries of one head, [ROWS, KEPT_PADDED]; zeros behind the last one."""
    dims = tl.arange(0, KEPT_PADDED)
    at = (row.to(tl.int64) * block.queries + block.first + offsets) * heads + head
    inside = (offsets < block.rows)[:, None] & (dims < KEPT)[None, :]
    return tl.load(pointer + at[:, None] * KEPT + dims[None, :], inside, 0.0)


@triton.jit
def _columns(pointer, positions, inside, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Keys of some tokens, [PADDED, KEYS]."""
    dims = tl.arange(0, PADDED)
    at = positions.to(tl.int64)[None, :] * stride + dims[:, None]
    return tl.load(pointer + at, inside[None, :] & (dims < WIDTH)[:, None], 0.0)


@triton.jit
def _tile(block, start, offsets, KEYS: tl.constexpr):
    """Of a tile of tokens: these, which of them a query sees, and which of those are exact, [ROWS, KEYS]."""
    positions = start + tl.arange(0, KEYS)
    behind = (block.before + block.first + offsets)[:, None] - positions[None, :]
    visible = (behind >= 0) & (offsets < block.rows)[:, None]
    return positions, visible, visible & ((positions < block.sink)[None, :] | (behind < block.recent))


@triton.jit
def _end(block, offsets):
    """The tokens that the last of some queries sees."""
    return block.before + block.first + tl.minimum(tl.max(offsets, 0) + 1, block.rows)


@triton.jit
def _likely(
    prompt,
    block,
    place,
    start,
    offsets,
    narrow,
    SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Scores of a tile, exact in the exact window, minus infinity where nothing is seen.

    Args:
        place: row, key-value head, and query head.
    """
    row, group, head = place
    positions, visible, exact = _tile(block, start, offsets, KEYS)
    length = block.before + block.queries
    copy_ptr = prompt.copy + (row * block.kv_heads + group).to(tl.int64) * length * KEPT
    copy = _columns(copy_ptr, positions, positions < length, KEPT, KEPT, KEPT_PADDED)
    scores = tl.dot(narrow.to(copy.dtype), copy, input_precision=SCORE_PRECISION)
    if (start < block.sink) | (start + KEYS > block.before + block.first + tl.min(offsets, 0) - block.recent + 1):
        key_ptr = prompt.key + row.to(tl.int64) * prompt.key_row + group.to(tl.int64) * prompt.key_head
        keys = _columns(key_ptr, positions, positions < length, prompt.key_token, KEPT, KEPT_PADDED)
        query = _queries(prompt.rotated, block, row, head, block.kv_heads * GROUP, offsets, KEPT, KEPT_PADDED)
        scores = tl.where(exact, tl.dot(query, keys, input_precision=PRECISION), scores)
    return tl.where(visible, scores * block.scaling, float("-inf"))


@triton.jit
def sum_scores(
    prompt,
    block,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
):
    """Log-sum-exp of the scores of some queries of a head."""
    head, row = tl.program_id(1), tl.program_id(2)
    offsets = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    narrow = _queries(prompt.narrow, block, row, head, block.kv_heads * GROUP, offsets, KEPT, KEPT_PADDED)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, _end(block, offsets), KEYS):
        scores = _likely(
            prompt,
            block,
            (row, head // GROUP, head),
            start,
            offsets,
            narrow,
            SCORE_PRECISION,
            PRECISION,
            GROUP,
            KEPT,
            KEPT_PADDED,
            ROWS,
            KEYS,
        )
        largest, weights, shrink = softmax_block(scores, largest)
        total = total * shrink + tl.sum(weights, 1)
    at = (row * block.kv_heads * GROUP + head).to(tl.int64) * block.most + offsets
    tl.store(prompt.lse + at, largest + tl.log2(tl.where(total > 0, total, 1.0)), offsets < block.rows)


@triton.jit
def weigh(
    prompt,
    block,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
):
    """Weights of a tile of tokens for some queries, summed over the heads of a group."""
    row, group = tl.program_id(2) // block.kv_heads, tl.program_id(2) % block.kv_heads
    start, offsets = tl.program_id(0) * KEYS, tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    heads = block.kv_heads * GROUP
    if start < _end(block, offsets):
        weight = tl.zeros([ROWS, KEYS], tl.float32)
        for member in range(GROUP):
            head = group * GROUP + member
            narrow = _queries(prompt.narrow, block, row, head, heads, offsets, KEPT, KEPT_PADDED)
            scores = _likely(
                prompt,
                block,
                (row, group, head),
                start,
                offsets,
                narrow,
                SCORE_PRECISION,
                PRECISION,
                GROUP,
                KEPT,
                KEPT_PADDED,
                ROWS,
                KEYS,
            )
            at = (row * heads + head).to(tl.int64) * block.most + offsets
            lse = tl.load(prompt.lse + at, offsets < block.rows, 0.0)
            weight += tl.exp2(scores - lse[:, None])
        positions, visible, exact = _tile(block, start, offsets, KEYS)
        line = (row * block.kv_heads + group).to(tl.int64) * block.most + offsets
        at = line[:, None] * (block.before + block.queries) + positions[None, :]
        tl.store(prompt.weights + at, tl.where(exact, -weight, weight), visible)


@triton.jit
def _others(weights_ptr, start, length, block, AT_ONCE: tl.constexpr):
    """Weights of tokens that one query looks at together, and which of these it may leave out."""
    positions = start + tl.arange(0, AT_ONCE)
    weight = tl.load(weights_ptr + positions, positions < length, -1.0)
    return weight, (positions >= block.sink) & (positions < length - block.recent)


@triton.jit
def _above(
    weights_ptr, first, threshold, length, block, BY_COUNT: tl.constexpr, AT_ONCE: tl.constexpr, ONE: tl.constexpr
):
    """Mass, or number, of the tokens that weigh so much; `first`: the weights, which are all of them with ONE."""
    found = tl.full([], 0.0, tl.float32)
    # Those of the exact window are negative.
    if ONE:
        found = tl.sum(tl.where(first >= threshold, 1.0 if BY_COUNT else first, 0.0))
    else:
        for start in range(0, length, AT_ONCE):
            weight, _ = _others(weights_ptr, start, length, block, AT_ONCE)
            found += tl.sum(tl.where(weight >= threshold, 1.0 if BY_COUNT else weight, 0.0))
    return found


@triton.jit
def find_least(
    prompt,
    block,
    share,
    wanted,
    BY_COUNT: tl.constexpr,
    ALL: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ONE: tl.constexpr,
):
    """Which tokens a query reads, a bit each, and how many these are.

    Args:
        AT_ONCE: tokens that are looked at together; ONE: these are all that a query sees, and stay in registers.
    """
    offset, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = block.before + block.first + offset + 1
    place = (row * block.kv_heads + group).to(tl.int64)
    line = place * block.most + offset
    weights_ptr = prompt.weights + line * (block.before + block.queries)
    first, _ = _others(weights_ptr, 0, length, block, AT_ONCE)
    mass, held = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    number = tl.full([], 0, tl.int32)
    for start in range(0, length, AT_ONCE):
        weight, others = _others(weights_ptr, start, length, block, AT_ONCE)
        inside = start + tl.arange(0, AT_ONCE) < length
        mass += tl.sum(tl.where(inside, tl.abs(weight), 0.0))
        held += tl.sum(tl.where(inside & ~others, tl.abs(weight), 0.0))
        number += tl.sum(others.to(tl.int32))
    target = wanted * 1.0 if BY_COUNT else share * mass - held
    has = number * 1.0 if BY_COUNT else mass - held
    # NaN in a weight makes all of the query's NaN.
    every = ALL | (length < block.min_length) | (mass != mass) | (has < target)
    low, high = tl.full([], 0, tl.int32), tl.full([], INFINITY, tl.int32)
    low = tl.where((target > 0) & (every == 0), low, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        threshold = middle.to(tl.float32, bitcast=True)
        found = _above(weights_ptr, first, threshold, length, block, BY_COUNT, AT_ONCE, ONE)
        low, high = tl.where(found >= target, middle, low), tl.where(found >= target, high, middle)
        if BY_COUNT:
            # As many as are wanted: nothing between the two numbers changes them.
            high = tl.where(found == target, middle + 1, high)
    least, count = low.to(tl.float32, bitcast=True), tl.full([], 0, tl.int32)
    chosen_ptr = prompt.chosen + line * block.words
    for start in range(0, length, AT_ONCE):
        weight, others = _others(weights_ptr, start, length, block, AT_ONCE)
        inside = start + tl.arange(0, AT_ONCE) < length
        read = (inside & (every | ~others | (weight >= least))).to(tl.int32)
        count += tl.sum(read)
        words = start // WORD + tl.arange(0, AT_ONCE // WORD)
        bits = tl.reshape(read, [AT_ONCE // WORD, WORD]) << tl.arange(0, WORD)[None, :]
        tl.store(chosen_ptr + words, tl.sum(bits, 1), words < block.words)
    tl.store(prompt.counts + place * block.queries + block.first + offset, count)


@triton.jit
def attend_rows(
    prompt,
    block,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
):
    """Attention of some queries of a head to the tokens that they read."""
    head, row = tl.program_id(1), tl.program_id(2)
    group, heads = head // GROUP, block.kv_heads * GROUP
    offsets, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, VALUE_PADDED)
    query = _queries(prompt.rotated, block, row, head, heads, offsets, KEPT, KEPT_PADDED)
    line = (row * block.kv_heads + group).to(tl.int64) * block.most + offsets
    key_ptr = prompt.key + row.to(tl.int64) * prompt.key_row + group.to(tl.int64) * prompt.key_head
    value_ptr = prompt.value_states + row.to(tl.int64) * prompt.value_row + group.to(tl.int64) * prompt.value_head
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    length = block.before + block.queries
    for start in range(0, _end(block, offsets), KEYS):
        positions, visible, _ = _tile(block, start, offsets, KEYS)
        words = tl.load(prompt.chosen + line[:, None] * block.words + positions[None, :] // WORD, visible, 0)
        read = visible & (((words >> (positions % WORD)[None, :]) & 1) > 0)
        inside = positions < length
        keys = _columns(key_ptr, positions, inside, prompt.key_token, KEPT, KEPT_PADDED)
        at = positions.to(tl.int64)[:, None] * prompt.value_token + columns[None, :]
        values = tl.load(value_ptr + at, inside[:, None] & (columns < VALUE_DIM)[None, :], 0.0)
        scores = tl.dot(query, keys, input_precision=PRECISION) * block.scaling
        scores = tl.where(read, scores, float("-inf"))
        largest, total, output = online_softmax(scores, values, None, largest, total, output, PRECISION)
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    at = ((row.to(tl.int64) * block.queries + block.first + offsets) * heads + head)[:, None] * VALUE_DIM
    there = (offsets < block.rows)[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(prompt.output + at + columns[None, :], output.to(prompt.output.dtype.element_ty), there)
