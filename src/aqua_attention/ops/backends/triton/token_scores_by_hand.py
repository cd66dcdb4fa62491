# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Scoring all tokens where every register is placed by hand, in Gluon: what `token_scores` leaves to the compiler.

As in `decode_int8_mma`, codes are read from memory as one warp's operands want them, and a program is one warp that
reads tiles ahead. It scores, and adds up nothing else: weights of a lane lie side by side, and are written at once.

A product has 8 columns. Where a group has 4 heads at most, they are those of two tiles: either tile is multiplied by
queries that are zero in the columns of the other one. So all that follows the products is done once for two tiles.

A lane reads 16 tokens in a row of two pairs of dimensions: in 8 bits four words of each dimension, in 4 bits two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops.backends.triton.decode_int8_mma import (
    HEADS,
    MMA,
    RIGHT,
    TILE,
    blocks_of,
    dims_of,
    of_words,
    query_operands,
    words_layout,
)
from aqua_attention.ops.backends.triton.early_by_hand import start_early
from aqua_attention.ops.backends.triton.token_few_bits import (
    SMALLEST,
    beginning_of,
    bytes_operand,
    few_bits_operand,
    is_sixteenfold,
)
from aqua_attention.ops.backends.triton.token_window_by_hand import score_window

AHEAD = gl.constexpr(4)
"""Blocks of 16 dimensions on their way. For eight of 4 bits there are not enough registers."""
MOST_TOGETHER = gl.constexpr(2)
"""Blocks of 16 dimensions up to which a product has two tiles: each of them has a query of its own."""
WEIGHT_BITS = gl.constexpr(15.0)
"""The weight 1 is two to this in float16, see `token_weights`."""
LEAST_UNIT = gl.constexpr(2.0**-100)
"""Of what products are worth, so that minus infinity stays what it is."""
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]], [[2, 0], [4, 0], [0, 16], [0, 32], [0, 64]], [], [], [8, 128]
    )
)
"""Of weights by column, [8, 128]: the 16 tokens in a row that a lane's scores are of."""
SUMS = gl.constexpr(gl.DistributedLinearLayout([[0, 1]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [8, 8]))
"""Of sums by eighth of a tile and column: those of a lane."""


@gluon.constexpr_function
def scales_layout(tiles):
    """Of scales of one or two tiles for all columns of a product, [tiles, columns of each, 8, 16]: of a lane's columns
    the 16 in a row that its scores are of.
    """
    columns = [[0, 2, 0, 0], [1, 0, 0, 0] if tiles == 2 else [0, 4, 0, 0]]
    in_row = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8], [0, 1, 0, 0]]
    lanes = [*columns, [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    return gl.DistributedLinearLayout(in_row, lanes, [], [], [tiles, 8 // tiles, 8, 16])


@gluon.constexpr_function
def blocks_ahead(wanted, step):
    """About so many blocks of 16 dimensions on their way, a part or a multiple of those of a step if there is one."""
    if wanted >= step:
        return wanted // step * step
    return next((count for count in (wanted, wanted + 1, wanted - 1) if step % count == 0), wanted)


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
    start_early(EARLY)
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
        TILES: gl.constexpr = 2 if GROUP <= 4 and CHOSEN <= 16 * MOST_TOGETHER else 1
        operands = query_operands(
            query_ptr + place * GROUP * KEPT,
            dims_ptr + place * CHOSEN,
            CHOSEN,
            *channels,
            scaling,
            GROUP,
            KEPT,
            CHOSEN,
            8 // TILES,
        )
        score_tiles(
            operands,
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
            TILES,
        )


@gluon.jit
def score_tiles(
    operands,
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
    TILES: gl.constexpr,
):
    """Weights of the tokens of some tiles, and their log-sum-exp.

    Args:
        TILES: 1, or 2 that share the columns of a product.
    """
    CODES: gl.constexpr = 32 // BITS
    KEYS: gl.constexpr = words_layout(TILE // CODES)
    CHUNKS: gl.constexpr = (CHOSEN + 15) // 16
    ON_THEIR_WAY: gl.constexpr = blocks_ahead(AHEAD, TILES * CHUNKS)
    # So many steps a turn that what is on its way need not move.
    STEPS: gl.constexpr = (ON_THEIR_WAY + TILES * CHUNKS - 1) // (TILES * CHUNKS)
    place, length, sink, recent, _scaling = part
    split, splits = share
    tiles = gl.cdiv(length, TILE)
    each = gl.cdiv(tiles, splits)
    begin = split * each
    end = gl.minimum(begin + each, tiles)
    behind = gl.minimum(length - recent, end * TILE)
    shared, unit, mean = operands
    rows = gl.arange(0, TILE, gl.SliceLayout(1, MMA))
    # What is no number is in the sums alone: tokens of the exact window weigh nothing.
    nothing = mean * 0.0
    beginning = beginning_of(shared, rows, CHUNKS, BITS) + nothing[None, :]
    mean = gl.where(nothing == 0.0, mean, 0.0)
    tile_of_query = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT)) // (HEADS // TILES)
    queries = ()
    for which in gl.static_range(TILES):
        for chunk in gl.static_range(CHUNKS):
            query = shared[chunk]
            if TILES > 1:
                query = gl.where((tile_of_query == which)[None, :], query, 0.0).to(gl.float16)
            queries = queries + (query,)  # noqa: RUF005
    unit = gl.maximum(unit, LEAST_UNIT) * (1 / SMALLEST)
    key_row = gl.arange(0, 16, gl.SliceLayout(1, KEYS))
    key_word = gl.arange(0, TILE // CODES, gl.SliceLayout(0, KEYS))
    key_at = ()
    for chunk in gl.static_range(CHUNKS):
        dims = dims_of(dims_ptr, chunk * 16 + key_row, CHOSEN)
        key_at = key_at + (dims[:, None] * (BLOCK // CODES) + (key_word % (BLOCK // CODES))[None, :],)  # noqa: RUF005
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([8, HEADS], 0.0, gl.float32, SUMS)
    if begin < end:
        waiting = ()
        for ahead in gl.static_range(ON_THEIR_WAY):
            if ahead % CHUNKS == 0:
                keys_ptr = codes_of(cache, lookup, begin + ahead // CHUNKS, end, key_word * CODES, BLOCK, CODE_SIZE)
            waiting = waiting + (load_codes(keys_ptr + key_at[ahead % CHUNKS]),)  # noqa: RUF005
        scales = load_scales(cache, lookup, begin, end, BLOCK, SCALE_SIZE, TILES)
        for first in range(begin, end, TILES * STEPS):
            for step in gl.static_range(STEPS):
                tile = first + step * TILES
                if step == 0 or tile < end:
                    waiting, scales, largest, total = score_step(
                        (tile, end, sink, behind),
                        waiting,
                        scales,
                        largest,
                        total,
                        (queries, beginning, unit, mean),
                        (key_at, key_word * CODES),
                        (cache, scratch, lookup, place),
                        GROUP,
                        CHUNKS,
                        BLOCK,
                        CODE_SIZE,
                        SCALE_SIZE,
                        BITS,
                        TILES,
                        ON_THEIR_WAY,
                    )
    # Columns of the same head.
    largest = gl.reshape(largest, [TILES, HEADS // TILES])
    total = gl.reshape(gl.convert_layout(gl.sum(total, 0), gl.SliceLayout(0, MMA)), [TILES, HEADS // TILES])
    base = gl.max(largest, 0)
    base = gl.where(base > float("-inf"), base, 0.0)
    total = gl.sum(total * gl.exp2(largest - base[None, :]), 0)
    lse = gl.convert_layout(base + gl.log2(total) - WEIGHT_BITS, gl.SliceLayout(0, MMA))
    heads = gl.arange(0, HEADS // TILES, gl.SliceLayout(0, MMA))
    gl.store(scratch.part_lse + (place * GROUP + heads) * (splits + 1) + split, lse, heads < GROUP)


@gluon.jit
def score_step(
    span,
    waiting,
    scales,
    largest,
    total,
    operands,
    keys,
    source,
    GROUP: gl.constexpr,
    CHUNKS: gl.constexpr,
    BLOCK: gl.constexpr,
    CODE_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
    BITS: gl.constexpr,
    TILES: gl.constexpr,
    ON_THEIR_WAY: gl.constexpr,
):
    """Weights of the tokens of TILES tiles, one product; gives what is carried from a step to the next.

    Args:
        span: the first tile, that behind the last of the program, and the tokens between which none is exact.
        waiting, scales, largest, total: carried.
        operands: queries, where their sums begin, what products are worth, and what is added to these.
        keys: where codes lie in a block, and of which tokens.
        source: the cache, where results go, its blocks, and the place.
    """
    tile, end, sink, behind = span
    queries, beginning, unit, mean = operands
    key_at, key_token = keys
    cache, scratch, lookup, place = source
    WIDTH: gl.constexpr = HEADS // TILES
    rows = gl.arange(0, TILE, gl.SliceLayout(1, MMA))
    columns = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    next_scales = load_scales(cache, lookup, tile + TILES, end, BLOCK, SCALE_SIZE, TILES)
    scores = beginning
    for ahead in gl.static_range(ON_THEIR_WAY, ON_THEIR_WAY + TILES * CHUNKS):
        if ahead == ON_THEIR_WAY or ahead % CHUNKS == 0:
            keys_ptr = codes_of(cache, lookup, tile + ahead // CHUNKS, end, key_token, BLOCK, CODE_SIZE)
        words = waiting[0]
        if BITS == 8:  # noqa: SIM108 (known when compiling)
            codes = bytes_operand(words)
        else:
            codes = few_bits_operand(words)
        waiting = waiting[1:] + (load_codes(keys_ptr + key_at[ahead % CHUNKS]),)  # noqa: RUF005
        scores = mma_v2(codes, queries[ahead - ON_THEIR_WAY], scores)
    factor = gl.where(is_sixteenfold(rows, BITS), 0.0625, 1.0)
    scores = scores * (by_column(scales, TILES) * factor[:, None])
    if (tile * TILE < sink) | ((tile + TILES) * TILE > behind):
        position = (tile + columns // WIDTH)[None, :] * TILE + (TILE // 8 * (rows % 8) + rows // 8)[:, None]
        scores = gl.where((position >= sink) & (position < behind), scores, float("-inf"))
    # The largest of numbers leaves NaN out; the sum does not.
    top = gl.max(scores, 0) * unit + mean
    level = gl.where(top > float("-inf"), top, 0.0)
    weights = gl.exp2(scores * unit[None, :] + (mean - level + WEIGHT_BITS)[None, :])
    at = (place * cache.tile_count + tile) * GROUP
    there = (columns % WIDTH < GROUP) & (tile + columns // WIDTH < end)
    gl.store(scratch.tops + at + columns // WIDTH * GROUP + columns % WIDTH, level, there)
    stored = gl.arange(0, HEADS, gl.SliceLayout(1, STORED))
    tokens = gl.arange(0, TILE, gl.SliceLayout(0, STORED))
    weights_at = (stored // WIDTH * GROUP + stored % WIDTH)[:, None] * TILE + tokens[None, :]
    there = (stored % WIDTH < GROUP) & (tile + stored // WIDTH < end)
    eighths = gl.reshape(weights, [16, 8, HEADS])
    by_head = gl.reshape(gl.permute(eighths.to(gl.float16), (2, 1, 0)), [HEADS, TILE])
    gl.store(
        scratch.weights + at * TILE + weights_at,
        gl.convert_layout(by_head, STORED),
        there[:, None] & (tokens >= 0)[None, :],
    )
    now = gl.maximum(largest, top)
    base = gl.where(now > float("-inf"), now, 0.0)
    shrink = gl.convert_layout(gl.exp2(largest - base), gl.SliceLayout(0, SUMS))
    worth = gl.convert_layout(gl.exp2(top - base), gl.SliceLayout(0, SUMS))
    sums = gl.convert_layout(gl.sum(eighths, 0), SUMS)
    total = total * shrink[None, :] + sums * worth[None, :]
    return waiting, next_scales, now, total


@gluon.jit
def codes_of(cache, lookup, tile, end, key_token, BLOCK: gl.constexpr, CODE_SIZE: gl.constexpr):
    """Where codes of a tile are; of the last tile instead of none: it is in the cache."""
    block_table_ptr, _width, _first, _stride = lookup
    blocks = blocks_of(lookup, gl.minimum(tile, end - 1), key_token, BLOCK)
    return of_words(cache.codes, blocks, block_table_ptr, CODE_SIZE)


@gluon.jit
def load_codes(pointers):
    """Codes of 16 dimensions of a tile, which no one reads again: what is written meanwhile stays in the cache."""
    return gl.load(pointers, cache_modifier=".cg")


@gluon.jit
def load_scales(cache, lookup, tile, end, BLOCK: gl.constexpr, SCALE_SIZE: gl.constexpr, TILES: gl.constexpr):
    """Scales of the tokens of TILES tiles, [TILES, 8, 16]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, scales_layout(TILES))
    which = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    sixteen = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))) * 16
    token = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    blocks = blocks_of(lookup, gl.minimum(tile + which, end - 1)[:, None], sixteen[None, :], BLOCK)
    at = (blocks * SCALE_SIZE)[:, :, None] + (sixteen % BLOCK)[None, :, None] + token[None, None, :]
    return gl.load(cache.scales + at, cache_modifier=".cg")


@gluon.jit
def by_column(scales, TILES: gl.constexpr):
    """Scales of the tokens of tiles, [TILES, 8, 16], for rows and columns of their product, [TILE, HEADS]."""
    wide = gl.expand_dims(scales.to(gl.float32), 1)
    wide, _ = gl.broadcast(wide, gl.full([TILES, HEADS // TILES, 8, 16], 0.0, gl.float32, scales_layout(TILES)))
    return gl.convert_layout(gl.reshape(gl.permute(wide, (3, 2, 0, 1)), [TILE, HEADS]), MMA)
