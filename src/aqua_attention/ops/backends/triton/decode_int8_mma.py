# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Decoding over tiles of 8-bit codes where every register is placed by hand, in Gluon, Triton's lower language.

`decode_int8` leaves it to the compiler how a code gets to the tensor cores: through shared memory, twice. But codes can
be read from memory as one warp's operands want them: of a block of 16 rows (dimensions of keys, tokens of values) a
lane reads two pairs of rows and 16 codes of each, and a pair of words becomes operands by moving bytes. Which code is
which row of the product does not matter as long as it is known: row m is code `width / 8 * (m % 8) + m // 8`.

A program is one warp, so that nothing waits for anything but memory, and reads blocks of rows four ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aqua_attention.ops import layout

TILE = gl.constexpr(layout.TILE)
HEADS = gl.constexpr(8)
"""Heads of a group that one product holds."""
AHEAD = gl.constexpr(4)
"""Blocks of rows on their way."""
VALUE_UNIT = gl.constexpr(256.0)
"""As in `decode_int8`."""
MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [], [], [8, 16]
    )
)
"""Of the scales of a tile's tokens, [8, 16]: the 16 in a row that a lane's scores are of."""


@gluon.constexpr_function
def words_layout(words):
    """Of 16 rows of so many words (32 or 16) of four codes: lane 4g + t has rows 2t, 2t + 1, 2t + 8 and 2t + 9, and an
    eighth of each, words in a row.
    """
    each = words // 8
    in_row = [[0, 1 << bit] for bit in range(each.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, each], [0, 2 * each], [0, 4 * each]]
    return gl.DistributedLinearLayout([*in_row, [1, 0], [8, 0]], lanes, [], [], [16, words])


@gluon.jit
def left_operand(words, WORDS: gl.constexpr):
    """Words [16, WORDS] of four codes as numbers in float16, 128 as zero, [4 * WORDS, 16]; rows as said above."""
    even, odd = gl.split(gl.permute(gl.reshape(words, [8, 2, WORDS]), (0, 2, 1)))
    # Bytes of two rows beside each other, then each as the low bits of 1024.
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 zero, low, high, first, second, third, fourth;
        mov.b32 zero, 0x64806480;
        prmt.b32 low, $8, $9, 0x5140;
        prmt.b32 high, $8, $9, 0x7362;
        prmt.b32 first, low, 0x64646464, 0x4140;
        prmt.b32 second, low, 0x64646464, 0x4342;
        prmt.b32 third, high, 0x64646464, 0x4140;
        prmt.b32 fourth, high, 0x64646464, 0x4342;
        sub.f16x2 first, first, zero;
        sub.f16x2 second, second, zero;
        sub.f16x2 third, third, zero;
        sub.f16x2 fourth, fourth, zero;
        mov.b32 {$0, $1}, first;
        mov.b32 {$2, $3}, second;
        mov.b32 {$4, $5}, third;
        mov.b32 {$6, $7}, fourth;
        }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [even, odd],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
    return codes_in_rows(joined(a, b, c, d, e, f, g, h), WORDS)


@gluon.jit
def joined(a, b, c, d, e, f, g, h):
    """Eight as one, with three dimensions of two behind the others."""
    return gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))


@gluon.jit
def codes_in_rows(codes, WORDS: gl.constexpr):
    """The codes of pairs of words, `joined` by place in the word and row, as a left operand [4 * WORDS, 16]."""
    # [pair of rows, eighth, word of it, row of the pair, bit 0 of the code's place in its word, bit 1]
    codes = gl.permute(gl.reshape(codes, [8, 8, WORDS // 8, 2, 2, 2]), (2, 5, 4, 1, 0, 3))
    return gl.convert_layout(gl.reshape(codes, [4 * WORDS, 16]), LEFT)


@gluon.jit
def right_operands(weights):
    """Weights [128, 8], a result's layout, as eight right operands [16, 8]: squares of 8 x 8 are transposed."""
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [weights], dtype=gl.float16, is_pure=False, pack=2
    )
    squares = gl.permute(gl.reshape(turned, [16, 8, HEADS]), (0, 2, 1))
    parts = gl.permute(gl.reshape(squares, [2, 2, 2, 16, HEADS]), (3, 4, 2, 1, 0))
    low, high = gl.split(parts)
    low, middle = gl.split(low)
    third, high = gl.split(high)
    a, b = gl.split(low)
    c, d = gl.split(middle)
    e, f = gl.split(third)
    g, h = gl.split(high)
    return a, b, c, d, e, f, g, h


@gluon.jit
def blocks_of(lookup, tile, tokens, BLOCK: gl.constexpr):
    """The blocks of some tokens of a tile, see `ops.layout`; without pages that of the tile."""
    block_table_ptr, table_width, first_block, block_stride = lookup
    if block_table_ptr is None:
        block_ids = first_block + tile * block_stride
    else:
        at = tile * (TILE // BLOCK) + tokens // BLOCK
        block = gl.load(block_table_ptr + at, at < table_width, 0, cache_modifier=".cg").to(gl.int64)
        block_ids = first_block + block * block_stride
    return block_ids


@gluon.jit
def dims_of(dims_ptr, at, limit):
    """The dimensions at these indices, 0 behind the last."""
    dims = gl.where(at < limit, at, 0)
    if dims_ptr is not None:
        dims = gl.load(dims_ptr + at, at < limit, 0, cache_modifier=".cg")
    return dims


@gluon.jit
def query_operands(
    query_ptr,
    dims_ptr,
    limit,
    channel_scale_ptr,
    channel_mean_ptr,
    scaling,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    CHOSEN: gl.constexpr,
    WIDTH: gl.constexpr = 8,
):
    """The chosen dimensions of a group's queries as right operands, a tuple of [16, HEADS] in float16.

    Scales and means of channels are in them, and they are made small enough for float16.

    Args:
        limit: of CHOSEN dimensions so many count.
        WIDTH: columns from a head to where it is there again.

    Returns:
        Operands, what their products are worth, and what is added to these, [HEADS].
    """
    at16 = gl.arange(0, 16, gl.SliceLayout(1, RIGHT))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, RIGHT)) % WIDTH
    peak = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, RIGHT))
    mean = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, RIGHT))
    wide = ()
    for chunk in gl.static_range((CHOSEN + 15) // 16):
        at = chunk * 16 + at16
        dims = dims_of(dims_ptr, at, limit)
        there = (head < GROUP)[None, :] & (at < limit)[:, None]
        query = gl.load(query_ptr + head[None, :] * KEPT + dims[:, None], there, 0.0, cache_modifier=".cg").to(
            gl.float32
        )
        mean += gl.sum(query * gl.load(channel_mean_ptr + dims)[:, None], 0)
        query *= gl.load(channel_scale_ptr + dims)[:, None]
        peak = gl.maximum(peak, gl.max(gl.abs(query), 0))
        wide = wide + (query,)  # noqa: RUF005 (tuples of kernels cannot be unpacked)
    peak = gl.where(peak > 0, peak, 1.0)
    queries = ()
    for chunk in gl.static_range((CHOSEN + 15) // 16):
        queries = queries + ((wide[chunk] / peak[None, :]).to(gl.float16),)  # noqa: RUF005
    unit = gl.convert_layout(peak * scaling, gl.SliceLayout(0, MMA))
    return queries, unit, gl.convert_layout(mean * scaling, gl.SliceLayout(0, MMA))


@gluon.jit
def decode_quantized_kernel(
    query_ptr,
    dims_ptr,
    counts_ptr,
    cache,
    partial_ptr,
    lse_ptr,
    scores_ptr,
    scaling,
    before,
    window,
    APPENDED: gl.constexpr,
    GROUP: gl.constexpr,
    KEPT: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    CHOSEN: gl.constexpr,
    BLOCK: gl.constexpr,
    KEY_SIZE: gl.constexpr,
    VALUE_SIZE: gl.constexpr,
    SCALE_SIZE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Attention of a part of the tiles of a sequence and key-value head with the chosen dimensions: what
    `quantized_tiles` does. Tiles and values come as words of four codes.

    With EARLY the kernel after this one may start when all programs of this one have. Nothing is read through the cache
    of the processor, where what was before may lie.

    Args:
        before: parts of each head that are others' in `partial` and `lse`.
        window: None: all tiles but the first and those of the tail. Where all tokens are in pages, `sink`, `recent` and
            `min_length`: the tiles in which no token needs every dimension.
        KEY_SIZE, VALUE_SIZE, SCALE_SIZE: words, words and scales from a block to the next.
    """
    KEY_WORDS: gl.constexpr = TILE // 4
    VALUE_WORDS: gl.constexpr = VALUE_DIM // 4
    KEYS: gl.constexpr = words_layout(KEY_WORDS)
    VALUES: gl.constexpr = words_layout(VALUE_WORDS)
    CHUNKS: gl.constexpr = (CHOSEN + 15) // 16
    VALUE_CHUNKS: gl.constexpr = TILE // 16
    split, group, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    length = gl.minimum(gl.load(cache.lengths + row, cache_modifier=".cg") + APPENDED, cache.tile_count * TILE)
    if window is None:
        first, last = 1, gl.maximum((length - 1) // TILE - 1, 0)
    else:
        sink, recent, min_length = window
        first = gl.cdiv(sink, TILE)
        last = gl.maximum(length - recent, 0) // TILE * (length >= min_length).to(gl.int32)
    each = gl.cdiv(gl.maximum(last - first, 0), gl.num_programs(0))
    begin = first + split * each
    end = gl.minimum(begin + each, last)
    place = (row * gl.num_programs(1) + group).to(gl.int64)
    first_block = row.to(gl.int64) * cache.row_stride + group.to(gl.int64) * cache.head_stride
    query_ptr += place * GROUP * KEPT
    tiles_ptr, values_ptr, block_table_ptr = cache.tiles, cache.value_tiles, cache.block_table
    key_scales_ptr, value_scales_ptr = cache.key_scales, cache.value_scales
    channel_scale_ptr, channel_mean_ptr = cache.channel_scale + group * KEPT, cache.channel_mean + group * KEPT
    if block_table_ptr is not None:
        block_table_ptr += row * cache.table_width
    lookup = (block_table_ptr, cache.table_width, first_block, cache.block_stride)
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    limit = CHOSEN
    if dims_ptr is not None:
        dims_ptr += place * CHOSEN
    if counts_ptr is not None:
        limit = gl.load(counts_ptr + place, cache_modifier=".cg")

    queries, unit, mean = query_operands(
        query_ptr, dims_ptr, limit, channel_scale_ptr, channel_mean_ptr, scaling, GROUP, KEPT, CHOSEN
    )

    key_row = gl.arange(0, 16, gl.SliceLayout(1, KEYS))
    key_word = gl.arange(0, KEY_WORDS, gl.SliceLayout(0, KEYS))
    value_row = gl.arange(0, 16, gl.SliceLayout(1, VALUES))
    value_word = gl.arange(0, VALUE_WORDS, gl.SliceLayout(0, VALUES))
    # Tokens of the rows of a block of values, less what is the same in all of them: those of the rows of the weights.
    value_token = TILE // 8 * (value_row % 8) + value_row // 8
    sixteen = gl.arange(0, 8, gl.SliceLayout(1, SCALES)) * 16
    of_sixteen = gl.arange(0, 16, gl.SliceLayout(0, SCALES))
    largest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    output = gl.full([VALUE_DIM, HEADS], 0.0, gl.float32, MMA)
    key_at = ()
    wanted = ()
    for chunk in gl.static_range(CHUNKS):
        dims = dims_of(dims_ptr, chunk * 16 + key_row, limit)
        key_at = key_at + (dims[:, None] * (BLOCK // 4) + (key_word % (BLOCK // 4))[None, :],)  # noqa: RUF005
        wanted = wanted + ((chunk * 16 + key_row < limit)[:, None] & (key_word >= 0)[None, :],)  # noqa: RUF005
    value_at = (value_token % BLOCK)[:, None] * VALUE_WORDS + value_word[None, :]
    if begin < end:
        key_blocks = blocks_of(lookup, begin, key_word * 4, BLOCK)
        value_blocks = blocks_of(lookup, begin, value_token, BLOCK)
        scale_blocks = blocks_of(lookup, begin, sixteen, BLOCK)
        keys_ptr = of_words(tiles_ptr, key_blocks, block_table_ptr, KEY_SIZE)
        next_values_ptr = of_tokens(values_ptr, value_blocks, block_table_ptr, VALUE_SIZE)
        waiting = ()
        for chunk in gl.static_range(AHEAD):
            if chunk < CHUNKS:
                loaded = load_keys(keys_ptr, key_at[chunk], wanted[chunk], counts_ptr)
            else:
                loaded = load_values(next_values_ptr, value_at, chunk - CHUNKS, VALUE_WORDS)
            waiting = waiting + (loaded,)  # noqa: RUF005
        for tile in range(begin, end):
            now_values_ptr = next_values_ptr
            scales_at = (sixteen % BLOCK)[:, None] + of_sixteen[None, :]
            key_scales = gl.load(
                of_tokens(key_scales_ptr, scale_blocks, block_table_ptr, SCALE_SIZE) + scales_at, cache_modifier=".cg"
            )
            value_scales = gl.load(
                of_tokens(value_scales_ptr, scale_blocks, block_table_ptr, SCALE_SIZE) + scales_at, cache_modifier=".cg"
            )
            # Looked up early: the last blocks of a tile are waited for while the first of the next are asked for.
            after = gl.minimum(tile + 1, end - 1)
            key_blocks = blocks_of(lookup, after, key_word * 4, BLOCK)
            value_blocks = blocks_of(lookup, after, value_token, BLOCK)
            scale_blocks = blocks_of(lookup, after, sixteen, BLOCK)
            next_values_ptr = of_tokens(values_ptr, value_blocks, block_table_ptr, VALUE_SIZE)
            scores = gl.full([TILE, HEADS], 0.0, gl.float32, MMA)
            for chunk in gl.static_range(CHUNKS):
                words = waiting[0]
                if chunk + AHEAD < CHUNKS:
                    loaded = load_keys(keys_ptr, key_at[chunk + AHEAD], wanted[chunk + AHEAD], counts_ptr)
                else:
                    loaded = load_values(now_values_ptr, value_at, chunk + AHEAD - CHUNKS, VALUE_WORDS)
                waiting = waiting[1:] + (loaded,)  # noqa: RUF005
                scores = mma_v2(left_operand(words, KEY_WORDS), queries[chunk], scores)
            scores = scores * (of_rows(key_scales)[:, None] * unit[None, :]) + mean[None, :]
            if scores_ptr is not None:
                rows = gl.arange(0, TILE, gl.SliceLayout(1, MMA))
                heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
                scores_at = (place * GROUP + heads)[None, :] * (cache.tile_count * TILE) + (
                    tile * TILE + TILE // 8 * (rows % 8) + rows // 8
                )[:, None]
                gl.store(scores_ptr + scores_at, scores, (heads < GROUP)[None, :] & (rows >= 0)[:, None])
            now = gl.maximum(largest, gl.max(scores, 0))
            weights = gl.exp2(scores - now[None, :])
            shrink = gl.exp2(largest - now)
            total = total * shrink + gl.sum(weights, 0)
            largest = now
            output = output * shrink[None, :]
            parts = right_operands((weights * (of_rows(value_scales) * VALUE_UNIT)[:, None]).to(gl.float16))
            keys_ptr = of_words(tiles_ptr, key_blocks, block_table_ptr, KEY_SIZE)
            for chunk in gl.static_range(VALUE_CHUNKS):
                words = waiting[0]
                if chunk + AHEAD < VALUE_CHUNKS:
                    loaded = load_values(now_values_ptr, value_at, chunk + AHEAD, VALUE_WORDS)
                elif chunk + AHEAD < VALUE_CHUNKS + CHUNKS:
                    loaded = load_keys(
                        keys_ptr,
                        key_at[chunk + AHEAD - VALUE_CHUNKS],
                        wanted[chunk + AHEAD - VALUE_CHUNKS],
                        counts_ptr,
                    )
                else:
                    loaded = load_values(next_values_ptr, value_at, chunk + AHEAD - VALUE_CHUNKS - CHUNKS, VALUE_WORDS)
                waiting = waiting[1:] + (loaded,)  # noqa: RUF005
                output = mma_v2(left_operand(words, VALUE_WORDS), gl.convert_layout(parts[chunk], RIGHT), output)

    rows = gl.arange(0, VALUE_DIM, gl.SliceLayout(1, MMA))
    column = VALUE_DIM // 8 * (rows % 8) + rows // 8
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))
    at = (place * GROUP + heads) * (before + gl.num_programs(0)) + before + split
    output = output / gl.where(total > 0, total * VALUE_UNIT, 1.0)[None, :]
    there = (heads < GROUP)[None, :] & (column >= 0)[:, None]
    gl.store(partial_ptr + at[None, :] * VALUE_DIM + column[:, None], output, there)
    gl.store(lse_ptr + at, largest + gl.log2(total), heads < GROUP)


@gluon.jit
def load_keys(keys_ptr, at, wanted, counts_ptr):
    """Rows of 16 dimensions of a tile; of those that do not count, with `counts`, nothing is read."""
    if counts_ptr is None:
        words = gl.load(keys_ptr + at, cache_modifier=".cg")
    else:
        words = gl.load(keys_ptr + at, wanted, 0, cache_modifier=".cg")
    return words


@gluon.jit
def load_values(values_ptr, at, chunk: gl.constexpr, WORDS: gl.constexpr):
    """Rows of 16 tokens of a tile."""
    return gl.load(values_ptr + (at + chunk * (2 * WORDS)), cache_modifier=".cg")


@gluon.jit
def of_words(pointer, block_ids, block_table_ptr, SIZE: gl.constexpr):
    """Where the block of each word of a row begins, or the block of all."""
    if block_table_ptr is None:
        pointers = pointer + block_ids * SIZE
    else:
        # A hint: a lane's words lie together.
        pointers = pointer + gl.max_constancy(block_ids * SIZE, 4)[None, :]
    return pointers


@gluon.jit
def of_tokens(pointer, block_ids, block_table_ptr, SIZE: gl.constexpr):
    """Where the block of each row begins, or the block of all."""
    if block_table_ptr is None:  # noqa: SIM108 (known when compiling)
        pointers = pointer + block_ids * SIZE
    else:
        pointers = pointer + (block_ids * SIZE)[:, None]
    return pointers


@gluon.jit
def of_rows(scales):
    """Scales of the tokens of a tile, [8, 16], for the rows of its scores, [128]."""
    rows = gl.reshape(gl.permute(scales, (1, 0)), [128])
    return gl.convert_layout(rows, gl.SliceLayout(1, MMA)).to(gl.float32)
