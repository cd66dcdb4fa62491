# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Scoring all tokens where every register is placed by hand, in Gluon: what `token_scores` leaves to the compiler.

As in `decode_int8_mma`, codes are read from memory as one warp's operands want them, and a program is one warp that
reads tiles ahead. It scores, and adds up nothing else: weights of a lane lie side by side, and are written at once.

A lane reads 16 tokens in a row of two pairs of dimensions: in 8 bits four words of each dimension, in 4 bits two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton.decode_int8_mma import (
    HEADS,
    LEFT,
    MMA,
    RIGHT,
    SCALES,
    TILE,
    blocks_of,
    dims_of,
    left_operand,
    of_rows,
    of_tokens,
    of_words,
    query_operands,
    words_layout,
)
from aqua_attention.ops.backends.triton.token_few_bits import few_bits_operand, of_few_bits

AHEAD = gl.constexpr(4)
"""Blocks of 16 dimensions on their way, of whole tiles."""
FEW_AHEAD = gl.constexpr(8)
"""Those of 4 bits, as many bytes, where a tile has two at most: with more of them registers do not last."""
WEIGHT_BITS = gl.constexpr(15.0)
"""The weight 1 is two to this in float16, see `token_weights`."""
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]], [[2, 0], [4, 0], [0, 16], [0, 32], [0, 64]], [], [], [8, 128]
    )
)
"""Of a tile's weights by head, [8, 128]: the 16 tokens in a row that a lane's scores are of."""


@gluon.jit
def score_kernel(
    query_ptr,
    dims_ptr,
    cache,
    scratch,
    scaling,
    sink,
    recent,
    APPENDED: gl.constexpr,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    CHOSEN: gl.constexpr,
    SINK: gl.constexpr,
    RECENT: gl.constexpr,
    BLOCK: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    CODE_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
    BITS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Part of the tiles of a sequence and key-value head, or its exact window.

    Args:
        cache: its codes, of BITS bits, are words.
        sink, recent: tokens of the exact window; SINK, RECENT: rounded up to a power of 2 of at least 16, or 0.
        KEY_SIZE, CODE_SIZE, SCALE_SIZE: numbers, words and scales from a block to the next.
    """
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; // dummy $0",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    split, group, row = gl.program_id(0) - 1, gl.program_id(1), gl.program_id(2)
    splits = gl.num_programs(0) - 1
    place = (row * gl.num_programs(1) + group).to(gl.int64)
    lengths_ptr, block_table_ptr = cache.lengths, cache.block_table
    held = gl.load(lengths_ptr + row, cache_modifier=".cg")
    length = gl.where(held < 0, 0, gl.minimum(held + APPENDED, cache.max_length))
    first_block = row.to(gl.int64) * cache.row_stride + group.to(gl.int64) * cache.head_stride
    if block_table_ptr is not None:
        block_table_ptr += row * cache.table_width
    # Behind the last token of a sequence its row of the table says nothing.
    lookup = (block_table_ptr, gl.cdiv(length, BLOCK), first_block, cache.block_stride)
    channels = (cache.channel_scale + group * KEPT, cache.channel_mean + group * KEPT)
    part = (place, length, sink, recent, scaling)
    if split < 0:
        score_window(
            query_ptr + place * GROUP * KEPT,
            channels,
            cache,
            scratch,
            lookup,
            part,
            splits,
            GROUP,
            KEPT,
            SINK,
            RECENT,
            BLOCK,
            KEY_SIZE,
            SCALE_SIZE,
        )
    else:
        queries, unit, mean = query_operands(
            query_ptr + place * GROUP * KEPT, dims_ptr + place * CHOSEN, CHOSEN, *channels, scaling, GROUP, KEPT, CHOSEN
        )
        score_tiles(
            queries,
            unit,
            mean,
            dims_ptr + place * CHOSEN,
            cache,
            scratch,
            lookup,
            part,
            (split, splits),
            GROUP,
            CHOSEN,
            BLOCK,
            CODE_SIZE,
            SCALE_SIZE,
            BITS,
        )


@gluon.jit
def score_tiles(
    queries,
    unit,
    mean,
    dims_ptr,
    cache,
    scratch,
    lookup,
    part,
    share,
    GROUP: gl.constexpr,
    CHOSEN: gl.constexpr,
    BLOCK: gl.constexpr,
    CODE_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
    BITS: gl.constexpr,
):
    """Weights of the tokens of some tiles, and their log-sum-exp."""
    CODES: gl.constexpr = 32 // BITS
    KEY_WORDS: gl.constexpr = TILE // CODES
    KEYS: gl.constexpr = words_layout(KEY_WORDS)
    CHUNKS: gl.constexpr = (CHOSEN + 15) // 16
    TILES_AHEAD: gl.constexpr = ((FEW_AHEAD if BITS == 4 and CHUNKS <= 2 else AHEAD) + CHUNKS - 1) // CHUNKS
    place, length, sink, recent, _scaling = part
    split, splits = share
    block_table_ptr, _width, _first, _stride = lookup
    tiles = gl.cdiv(length, TILE)
    each = gl.cdiv(tiles, splits)
    begin = split * each
    end = gl.minimum(begin + each, tiles)
    behind = gl.minimum(length - recent, end * TILE)
    key_row = gl.arange(0, 16, gl.SliceLayout(1, KEYS))
    key_word = gl.arange(0, KEY_WORDS, gl.SliceLayout(0, KEYS))
    sixteen = gl.arange(0, 8, gl.SliceLayout(1, SCALES)) * 16
    scales_at = (sixteen % BLOCK)[:, None] + gl.arange(0, 16, gl.SliceLayout(0, SCALES))[None, :]
    rows = gl.arange(0, TILE, gl.SliceLayout(1, MMA))
    token_of_row = TILE // 8 * (rows % 8) + rows // 8
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    stored_heads = gl.arange(0, HEADS, gl.SliceLayout(1, STORED))
    stored_tokens = gl.arange(0, TILE, gl.SliceLayout(0, STORED))
    weights_at = stored_heads[:, None] * TILE + stored_tokens[None, :]
    is_stored = (stored_heads < GROUP)[:, None] & (stored_tokens >= 0)[None, :]
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    key_at = ()
    for chunk in gl.static_range(CHUNKS):
        dims = dims_of(dims_ptr, chunk * 16 + key_row, CHOSEN)
        key_at = key_at + (dims[:, None] * (BLOCK // CODES) + (key_word % (BLOCK // CODES))[None, :],)  # noqa: RUF005
    beginning = gl.full([TILE, HEADS], 0.0, gl.float32, MMA)
    worth = beginning + unit[None, :]
    if BITS == 4:
        beginning, worth = of_few_bits(queries, unit, rows, CHUNKS)
    if begin < end:
        waiting = ()
        for ahead in gl.static_range(TILES_AHEAD):
            blocks = blocks_of(lookup, gl.minimum(begin + ahead, end - 1), key_word * CODES, BLOCK)
            keys_ptr = of_words(cache.codes, blocks, block_table_ptr, CODE_SIZE)
            for chunk in gl.static_range(CHUNKS):
                waiting = waiting + (load_codes(keys_ptr + key_at[chunk]),)  # noqa: RUF005
        blocks = blocks_of(lookup, begin, sixteen, BLOCK)
        scales = gl.load(of_tokens(cache.scales, blocks, block_table_ptr, SCALE_SIZE) + scales_at, cache_modifier=".cg")
        for tile in range(begin, end):
            # The last tile again instead of nothing: it is in the cache.
            blocks = blocks_of(lookup, gl.minimum(tile + TILES_AHEAD, end - 1), key_word * CODES, BLOCK)
            keys_ptr = of_words(cache.codes, blocks, block_table_ptr, CODE_SIZE)
            blocks = blocks_of(lookup, gl.minimum(tile + 1, end - 1), sixteen, BLOCK)
            next_scales = gl.load(
                of_tokens(cache.scales, blocks, block_table_ptr, SCALE_SIZE) + scales_at, cache_modifier=".cg"
            )
            scores = beginning
            for chunk in gl.static_range(CHUNKS):
                words = waiting[0]
                waiting = waiting[1:] + (load_codes(keys_ptr + key_at[chunk]),)  # noqa: RUF005
                if BITS == 8:  # noqa: SIM108 (known when compiling)
                    keys = left_operand(words, KEY_WORDS)
                else:
                    keys = few_bits_operand(words)
                scores = mma_v2(keys, queries[chunk], scores)
            scores = scores * (of_rows(scales)[:, None] * worth) + mean[None, :]
            scales = next_scales
            position = tile * TILE + token_of_row
            scores = gl.where(((position >= sink) & (position < behind))[:, None], scores, float("-inf"))
            # The largest of numbers leaves NaN out; the sum does not.
            top = gl.max(scores, 0)
            level = gl.where(top > float("-inf"), top, 0.0)
            weights = gl.exp2(scores - (level - WEIGHT_BITS)[None, :])
            at = (place * cache.tile_count + tile) * GROUP
            gl.store(scratch.tops + at + heads, level, heads < GROUP)
            by_head = gl.reshape(
                gl.permute(gl.reshape(weights.to(gl.float16), [16, 8, HEADS]), (2, 1, 0)), [HEADS, TILE]
            )
            gl.store(scratch.weights + at * TILE + weights_at, gl.convert_layout(by_head, STORED), is_stored)
            now = gl.maximum(largest, top)
            base = gl.where(now > float("-inf"), now, 0.0)
            total = total * gl.exp2(largest - base) + gl.sum(weights, 0) * gl.exp2(top - base)
            largest = now
    base = gl.where(largest > float("-inf"), largest, 0.0)
    lse = base + gl.log2(total) - WEIGHT_BITS
    gl.store(scratch.part_lse + (place * GROUP + heads) * (splits + 1) + split, lse, heads < GROUP)


@gluon.jit
def load_codes(pointers):
    """Codes of 16 dimensions of a tile, which no one reads again: what is written meanwhile stays in the cache."""
    return gl.load(pointers, cache_modifier=".cg")


@gluon.jit
def score_window(
    query_ptr,
    channels,
    cache,
    scratch,
    lookup,
    part,
    splits,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    SINK: gl.constexpr,
    RECENT: gl.constexpr,
    BLOCK: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
):
    """Log-sum-exp of the exact window, with every dimension."""
    place, length, sink, recent, scaling = part
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    if cache.value_scales is not None:
        operands = query_operands(query_ptr, None, KEPT, *channels, scaling, GROUP, KEPT, KEPT)
    else:
        operands = plain_operands(query_ptr, scaling, GROUP, KEPT)
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    if SINK > 0:
        scores = scores_of_tokens(
            operands, cache, lookup, 0, gl.minimum(sink, length), KEPT, SINK, BLOCK, KEY_SIZE, SCALE_SIZE
        )
        largest, total = added(scores, largest, total)
    if RECENT > 0:
        start = gl.maximum(length - recent, sink)
        scores = scores_of_tokens(operands, cache, lookup, start, length, KEPT, RECENT, BLOCK, KEY_SIZE, SCALE_SIZE)
        largest, total = added(scores, largest, total)
    lse_ptr = scratch.part_lse + (place * GROUP + heads) * (splits + 1) + splits
    gl.store(lse_ptr, largest + gl.log2(total), heads < GROUP)


@gluon.jit
def added(scores, largest, total):
    """The largest, and the sum of powers relative to it, with those of more tokens."""
    now = gl.maximum(largest, gl.max(scores, 0))
    base = gl.where(now > float("-inf"), now, 0.0)
    return now, total * gl.exp2(largest - base) + gl.sum(gl.exp2(scores - base[None, :]), 0)


@gluon.jit
def scores_of_tokens(
    operands,
    cache,
    lookup,
    start,
    limit,
    KEPT: gl.constexpr,
    COUNT: gl.constexpr,
    BLOCK: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
):
    """Scores of COUNT tokens from `start` on by every dimension, [COUNT, HEADS]; behind `limit` minus infinity."""
    queries, unit, mean = operands
    position = start + gl.arange(0, COUNT, gl.SliceLayout(1, LEFT))
    blocks, places = places_of(lookup, position, position < limit, BLOCK)
    keys_at = blocks * KEY_SIZE + places * KEPT
    scores = gl.full([COUNT, HEADS], 0.0, gl.float32, MMA)
    for chunk in gl.static_range((KEPT + 15) // 16):
        dims = chunk * 16 + gl.arange(0, 16, gl.SliceLayout(0, LEFT))
        there = (position < limit)[:, None] & (dims < KEPT)[None, :]
        keys = gl.load(cache.keys + keys_at[:, None] + dims[None, :], there, 0, cache_modifier=".cg")
        if cache.value_scales is not None:
            keys = (keys.to(gl.float32) - 128).to(gl.float16)
        scores = mma_v2(keys, queries[chunk], scores)
    position = start + gl.arange(0, COUNT, gl.SliceLayout(1, MMA))
    if cache.value_scales is not None:
        blocks, places = places_of(lookup, position, position < limit, BLOCK)
        scales_at = blocks * SCALE_SIZE + places
        scales = gl.load(cache.key_scales + scales_at, position < limit, 0.0, cache_modifier=".cg").to(gl.float32)
        scores = scores * scales[:, None]
    scores = scores * unit[None, :] + mean[None, :]
    return gl.where((position < limit)[:, None], scores, float("-inf"))


@gluon.jit
def places_of(lookup, position, is_token, BLOCK: gl.constexpr):
    """The blocks of tokens of a sequence and head, and their places in these."""
    block_table_ptr, _width, first_block, block_stride = lookup
    blocks = position // BLOCK
    if block_table_ptr is not None:
        blocks = gl.load(block_table_ptr + blocks, is_token, 0, cache_modifier=".cg")
    return first_block + blocks.to(gl.int64) * block_stride, position % BLOCK


@gluon.jit
def plain_operands(query_ptr, scaling, GROUP: gl.constexpr, KEPT: gl.constexpr):
    """All dimensions of the queries of a group as right operands; what products are worth, and what is added: none."""
    at16 = gl.arange(0, 16, gl.SliceLayout(1, RIGHT))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT))
    queries = ()
    for chunk in gl.static_range((KEPT + 15) // 16):
        dims = chunk * 16 + at16
        there = (head < GROUP)[None, :] & (dims < KEPT)[:, None]
        query = gl.load(query_ptr + head[None, :] * KEPT + dims[:, None], there, 0.0, cache_modifier=".cg")
        queries = queries + (query,)  # noqa: RUF005
    unit = gl.full([HEADS], 1.0, gl.float32, gl.SliceLayout(0, MMA)) * scaling
    return queries, unit, gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
