# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""AQUA on a whole prompt on a GPU: rotate and choose dimensions in one pass, merge the exact window in another.

Zeroing the dropped entries of a query and running dense attention is AQUA, so between these two passes stands any fused
kernel for dense attention. Both move little more than what they read and write.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.fused import attention_with_lse, dense_attention

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256
"""Largest head_dim, kept and value_dim."""
TOKENS = 64
"""Tokens of one head that a program rotates at once: 16 a warp, so that a row stays within four threads."""
WARPS = 4
EXTRA: dict[str, int] = {}
RESIDENT = 128
"""Rotations up to this padded width stay in shared memory; of wider ones a few rows at a time are loaded."""
PROGRAMS = 2
"""Programs on each multiprocessor that rotate: as many as have room for a rotation in shared memory."""
PRECISION = "tf32x3"
"""How float32 states are multiplied: three products of tensor cores lose two bits; "ieee" none, and is slow."""
OCTAVES = 8
"""The threshold of a row is sought first among the sizes from its largest down by this power of two."""
STEPS = 5
"""Halvings between two looks at whether all rows of a block are done."""
WINDOW_ROWS, WINDOW_KEYS, WINDOW_STAGES = 64, 32, 2
"""Queries of the exact window at once (tokens times heads of a group), 16 a warp; keys at once; loads in flight."""


def attention_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    head_dim: int | None = None,
    scaling: float | None = None,
) -> Tensor:
    """AQUA attention of a prompt: causal, as many queries as keys, no mask.

    Args:
        query: not rotated, [batch, num_attention_heads, length, head_dim], bfloat16, float16 or float32.
        key: rotated (`rotate_on_gpu`), [batch, num_key_value_heads, length, kept].
        value: [batch, num_key_value_heads, length, value_dim].
        rotation: float32 [num_key_value_heads, head_dim, kept].
        key_rms: float32 [num_key_value_heads, kept], see `ops.select.select_dimensions`.
        config: the selection, and the exact window.
        head_dim: see `ops.select.select_dimensions`; default the query's.
        scaling: factor of the scores; default 1/sqrt(head_dim).

    Returns:
        [batch, num_attention_heads, length, value_dim] in the dtype of `value`.

    Raises:
        AquaError: shapes, dtypes or gradients that the kernels do not take; the message lists what they take.
    """
    _check(query, rotation, key_rms)
    length, kept, window = query.shape[2], rotation.shape[2], config.sink + config.recent
    shape = (query.shape[0], rotation.shape[0], length)
    if key.shape != (*shape, kept) or value.ndim != 4 or value.shape[:3] != shape or value.shape[3] > WIDEST:
        raise AquaError(
            f"key is {tuple(key.shape)} and value {tuple(value.shape)}: in prefill they must be {(*shape, kept)} and "
            f"{(*shape, f'1 to {WIDEST}')}, one for each query, and causal without a mask"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise AquaError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: they must be of one dtype"
        )
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        raise AquaError("prefill kernels have no gradient: call them under torch.no_grad()")
    head_dim = query.shape[3] if head_dim is None else head_dim
    scaling = head_dim**-0.5 if scaling is None else scaling
    if window > 0 and length <= window:
        rotated = narrow = rotate_on_gpu(query, rotation)
    else:
        rotated, narrow = rotate_and_narrow(
            query, rotation, key_rms, config, head_dim=head_dim, scaling=scaling, both=window > 0
        )
    key, value = _rows(key), _rows(value)
    # Keys narrower than values push the fused kernels onto a slow path; zeros change no score.
    width = max(kept, value.shape[3])
    wide_key = F.pad(key, (0, width - kept))
    if window == 0 or length <= window or narrow is rotated:
        return dense_attention(F.pad(narrow, (0, width - kept)), wide_key, value, None, scaling)
    outside = slice(config.sink, length - config.recent)
    far, far_lse = attention_with_lse(
        F.pad(narrow[:, :, window:], (0, width - kept)), wide_key[:, :, outside], value[:, :, outside], scaling
    )
    return window_merge(rotated, key, value, far, far_lse, sink=config.sink, recent=config.recent, scaling=scaling)


def rotate_on_gpu(states: Tensor, rotation: Tensor) -> Tensor:
    """`ops.select.rotate` for bfloat16, float16 and float32.

    Args:
        states: [batch, heads, length, head_dim]; heads is a multiple of num_key_value_heads.
        rotation: float32 [num_key_value_heads, head_dim, kept].

    Returns:
        [batch, heads, length, kept], contiguous, in the dtype of `states`.

    Raises:
        AquaError: shapes or dtypes that the kernel does not take; the message lists what it takes.
    """
    _check(states, rotation, None)
    rotated = states.new_empty((*states.shape[:3], rotation.shape[2]))
    _launch(states, rotation, rotation, rotated, rotated, "none")
    return rotated


def rotate_and_narrow(
    query: Tensor,
    rotation: Tensor,
    key_rms: Tensor,
    config: AquaConfig,
    *,
    head_dim: int | None = None,
    scaling: float | None = None,
    both: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotate queries, and set to zero what `ops.select.select_dimensions` does not select of them.

    Args:
        query: [batch, num_attention_heads, length, head_dim], bfloat16, float16 or float32.
        rotation: float32 [num_key_value_heads, head_dim, kept].
        key_rms: float32 [num_key_value_heads, kept].
        config, head_dim, scaling: see `select_dimensions`; head_dim is the query's by default.
        both: False writes the narrow ones only, in the place of the rotated ones.

    Returns:
        The rotated queries and the narrow ones, both [batch, num_attention_heads, length, kept], contiguous, in the
        query's dtype; one and the same tensor where every dimension is selected. Sums over the heads of a group and
        expected errors are in float32 in another order than the reference's: where two sizes, or an error and
        `logit_error`, differ by rounding only, another dimension may be taken. An infinite query may turn into NaN.

    Raises:
        AquaError: shapes or dtypes that the kernel does not take; the message lists what it takes.
    """
    _check(query, rotation, key_rms)
    head_dim = query.shape[3] if head_dim is None else head_dim
    count = config.selected_dims(head_dim)
    if count >= rotation.shape[2] and config.logit_error is None:
        rotated = rotate_on_gpu(query, rotation)
        return rotated, rotated
    rotated = query.new_empty((*query.shape[:3], rotation.shape[2]))
    narrow = torch.empty_like(rotated) if both else rotated
    mode = "error" if config.logit_error is not None else "first" if config.selection == "static" else "largest"
    _launch(
        query,
        rotation,
        key_rms.contiguous(),
        rotated,
        narrow,
        mode,
        config,
        count,
        head_dim**-0.5 if scaling is None else scaling,
    )
    return rotated, narrow


def window_merge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor,
    far_lse: Tensor,
    *,
    sink: int,
    recent: int,
    scaling: float,
) -> Tensor:
    """Attention to the exact window, merged with the attention to everything else.

    Args:
        query: rotated, [batch, num_attention_heads, length, kept].
        key: rotated, [batch, num_key_value_heads, length, kept].
        value: [batch, num_key_value_heads, length, value_dim].
        far: attention of the queries from sink + recent on to the keys outside their windows,
            [batch, num_attention_heads, length - sink - recent, value_dim]; far_lse: its log-sum-exp, float32.
        sink, recent: size of the window, 1 to length - 1 together.
        scaling: factor of the scores.

    Returns:
        [batch, num_attention_heads, length, value_dim], contiguous, in the dtype of `value`.

    Raises:
        AquaError: shapes or sizes that the kernel does not take; the message lists what it takes.
    """
    batch, heads, length, kept = query.shape
    groups, value_dim = key.shape[1], value.shape[3]
    if min(sink, recent) < 0 or not 0 < sink + recent < length:
        raise AquaError(
            f"sink is {sink} and recent {recent}: the kernel takes a window of 1 to {length - 1} for {length} tokens"
        )
    rest = (batch, heads, length - sink - recent)
    if far.shape != (*rest, value_dim) or far_lse.shape != rest or far_lse.dtype != torch.float32:
        raise AquaError(
            f"far is {tuple(far.shape)} and its log-sum-exp {far_lse.dtype} {tuple(far_lse.shape)}: they must be "
            f"{(*rest, value_dim)} and torch.float32 {rest}"
        )
    query, key, value, far = (_rows(states) for states in (query, key, value, far))
    output = value.new_empty((batch, heads, length, value_dim))
    widths = [max(16, triton.next_power_of_2(width)) for width in (kept, value_dim)]
    together = triton.next_power_of_2(heads // groups)
    rows = max(WINDOW_ROWS, together)
    # Programs of neighbouring tokens run at the same time, so that their keys are read from the cache.
    _window[(triton.cdiv(length, rows // together), groups, batch)](
        query,
        key,
        value,
        far,
        far_lse.contiguous(),
        output,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *far.stride()[:3],
        length,
        sink,
        recent,
        scaling * 1.4426950408889634,
        GROUP=heads // groups,
        TOGETHER=together,
        ROWS=rows,
        KEYS=WINDOW_KEYS,
        KEPT=kept,
        KEPT_PADDED=widths[0],
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=widths[1],
        PRECISION=PRECISION,
        num_warps=rows // 16,
        num_stages=WINDOW_STAGES if query.element_size() == 2 and max(widths) <= 128 else 1,
    )
    return output


def _rows(states: Tensor) -> Tensor:
    """The same, with the numbers of a token next to each other."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _check(states: Tensor, rotation: Tensor, key_rms: Tensor | None) -> None:
    if rotation.ndim != 3 or rotation.dtype != torch.float32 or max(rotation.shape[1:]) > WIDEST:
        raise AquaError(
            f"rotation is {rotation.dtype} {tuple(rotation.shape)}: it must be torch.float32 [num_key_value_heads, "
            f"head_dim, kept], of at most {WIDEST} dimensions"
        )
    groups, head_dim, kept = rotation.shape
    fits = states.ndim == 4 and states.shape[3] == head_dim and states.shape[1] % groups == 0 and states.numel() > 0
    if not fits or states.dtype not in DTYPES:
        raise AquaError(
            f"query or key is {states.dtype} {tuple(states.shape)}: it must be bfloat16, float16 or float32, [batch, a "
            f"multiple of {groups}, length, {head_dim}], not empty"
        )
    if key_rms is not None and (key_rms.shape != (groups, kept) or key_rms.dtype != torch.float32):
        raise AquaError(f"key_rms is {key_rms.dtype} {tuple(key_rms.shape)}: it must be torch.float32 {(groups, kept)}")


def _launch(
    states: Tensor,
    rotation: Tensor,
    key_rms: Tensor,
    rotated: Tensor,
    narrow: Tensor,
    mode: str,
    config: AquaConfig | None = None,
    count: int = 0,
    scaling: float = 1.0,
) -> None:
    batch, heads, length, head_dim = states.shape
    groups, kept = rotation.shape[0], rotation.shape[2]
    selection = "magnitude" if config is None else config.selection
    shared = mode in ("largest", "error") and config is not None and config.share == "group" and heads > groups
    states = _rows(states)
    wide, narrow_width = (max(16, triton.next_power_of_2(width)) for width in (head_dim, kept))
    size, processors, room = states.element_size(), 1, 1 << 18
    if states.is_cuda:
        device = torch.cuda.get_device_properties(states.device)
        processors, room = device.multi_processor_count, getattr(device, "shared_memory_per_block_optin", 1 << 16)
    # Both halves of a rotation, the states, and the matrix by which ranks are found.
    needed = size * (2 * wide * narrow_width + TOKENS * wide) + 2 * narrow_width**2
    resident = max(wide, narrow_width) <= RESIDENT and needed <= room
    items = triton.cdiv(length, TOKENS) * (1 if shared else heads // groups)
    # Not one more than run at once: the last would wait for a whole round.
    programs = min(items, max(1, PROGRAMS * processors // (groups * batch)))
    # The low bits of a half number are zero in float32, and need no search where nothing was multiplied to it.
    plain = selection == "magnitude" and not (config is not None and config.share == "group")
    low_bits = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[states.dtype] if plain else 0
    _rotate_and_narrow[(programs, groups, batch)](
        states,
        rotation.contiguous(),
        key_rms,
        rotated,
        narrow,
        *states.stride()[:3],
        length,
        count,
        0.0 if config is None or config.logit_error is None else float(config.logit_error),
        scaling,
        MODE=mode,
        SELECTION=selection,
        SQUARED=config is not None and config.share == "group",
        BOTH=narrow is not rotated,
        TOGETHER=heads // groups if shared else 1,
        GROUP=heads // groups,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=wide,
        CHUNK=wide if resident else RESIDENT // size,
        KEPT=kept,
        KEPT_PADDED=narrow_width,
        TOKENS=TOKENS,
        LOW_BITS=low_bits,
        OCTAVES=OCTAVES,
        STEPS=STEPS,
        PRECISION=PRECISION,
        num_warps=WARPS if resident else 8,
        **EXTRA,
        # Two programs fit on a multiprocessor, and hide each other's loads. More in flight would leave room for one.
        num_stages=2 if mode == "none" and resident else 1,
        # Products and sums are rounded as the reference's, or equal sizes would differ.
        enable_fp_fusion=False,
    )


@triton.jit
def _load_rotation(rotation_ptr, start, like, HEAD_DIM, KEPT, CHUNK: tl.constexpr, KEPT_PADDED: tl.constexpr):
    """Rows of a rotation as a sum of two matrices in the dtype of the states, which keep 16 bits of it or more."""
    wide, dims = start + tl.arange(0, CHUNK), tl.arange(0, KEPT_PADDED)
    there = (wide[:, None] < HEAD_DIM) & (dims[None, :] < KEPT)
    rotation = tl.load(rotation_ptr + wide[:, None] * KEPT + dims[None, :], there, 0.0)
    high = rotation.to(like)
    return high, (rotation - high.to(tl.float32)).to(like)


@triton.jit
def _times(states, high, low, turned, PRECISION: tl.constexpr):
    if states.dtype == tl.float32:
        return tl.dot(states, high, turned, input_precision=PRECISION)
    return tl.dot(states, low, tl.dot(states, high, turned))


@triton.jit
def _turn(
    states_ptr,
    there,
    stride_token,
    tokens,
    rotation_ptr,
    high,
    low,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotated states of some tokens of one head, in their dtype."""
    turned = tl.zeros([TOKENS, KEPT_PADDED], tl.float32)
    for start in tl.static_range(0, HEAD_DIM_PADDED, CHUNK):
        wide = start + tl.arange(0, CHUNK)
        states = tl.load(
            states_ptr + tokens.to(tl.int64)[:, None] * stride_token + wide[None, :],
            there[:, None] & (wide[None, :] < HEAD_DIM),
            0.0,
        )
        if CHUNK == HEAD_DIM_PADDED:
            turned = _times(states, high, low, turned, PRECISION)
        else:
            one, two = _load_rotation(rotation_ptr, start, states.dtype, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
            turned = _times(states, one, two, turned, PRECISION)
    return turned.to(states_ptr.dtype.element_ty)


@triton.jit
def _as_float(places, LOW_BITS: tl.constexpr):
    """Non-negative floats have the order of their bits: the one at a place of that order."""
    return (places << LOW_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _behind_largest(size, LOW_BITS: tl.constexpr):
    """The place behind that of the largest number of each row, at most that behind infinity."""
    return (tl.minimum(tl.max(size.to(tl.int32, bitcast=True), 1), 0x7F800000) >> LOW_BITS) + 1


@triton.jit
def _look(size, count, middle, low, high, held, fewer, LOW_BITS: tl.constexpr):
    """One step of the search in `_largest`."""
    # Sums of floats are twice as fast as those of integers.
    there = tl.sum(tl.where(size >= _as_float(middle, LOW_BITS)[:, None], 1.0, 0.0), 1)
    enough = there >= count
    low, held = tl.where(enough, middle, low), tl.where(enough, there, held)
    return low, tl.where(enough, high, middle), held, tl.where(enough, fewer, there)


@triton.jit
def _largest(
    size,
    states,
    count,
    before,
    RANK_BY_DOT: tl.constexpr,
    KEPT: tl.constexpr,
    LOW_BITS: tl.constexpr,
    OCTAVES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`states`, with zeros but where the `count` largest numbers of each row of `size` are: NaN first, of equal ones
    the first. Negative numbers are none; `before[i, j]` is 1 where i < j, else 0.
    """
    bits = size.to(tl.int32, bitcast=True)
    if tl.max(tl.max(bits, 1), 0) > 0x7F800000:
        # Move the others down by one place to make room for NaN. The two smallest are equal then.
        moved = tl.where(bits > 0x7F800000, 0x7F800000, tl.maximum(bits - (1 << LOW_BITS), 0))
        size = tl.where(bits < 0, size, moved.to(tl.float32, bitcast=True))
    # `held` numbers are at the place `low` or behind it, at least as many as asked for; at `high` are `fewer`.
    high = _behind_largest(size, LOW_BITS)
    low, held, fewer = tl.zeros_like(high), tl.full(high.shape, KEPT, tl.float32), tl.zeros(high.shape, tl.float32)
    middle = tl.maximum(high - (OCTAVES << (23 - LOW_BITS)), 0)
    low, high, held, fewer = _look(size, count, middle, low, high, held, fewer, LOW_BITS)
    unsettled = tl.max(tl.where(held > count, high - low, 1), 0)
    while unsettled > 1:
        for step in tl.static_range(STEPS):
            middle = low + ((high - low) >> 1)
            if step % 2 == 0:
                # Where the wanted one would be if the numbers between the two were spread evenly.
                share = (held - count + 0.5) / (held - fewer + 0.5)
                guess = low + (share * (high - low).to(tl.float32)).to(tl.int32)
                middle = tl.minimum(tl.maximum(guess, low + 1), tl.maximum(high - 1, low))
            low, high, held, fewer = _look(size, count, middle, low, high, held, fewer, LOW_BITS)
        unsettled = tl.max(tl.where(held > count, high - low, 1), 0)
    # What is at the place `low` or behind it is chosen, and nothing below.
    bound = tl.where(low > 0, _as_float(tl.maximum(low - 1, 0), LOW_BITS), -1.0)[:, None]
    bound = tl.broadcast_to(bound, size.shape)
    if tl.max(held, 0) > count:
        # In some rows too many are at that place. The rank among them is the sum of those before.
        least = _as_float(low, LOW_BITS)[:, None]
        equal = tl.where(size == least, 1.0, 0.0)
        rank = tl.dot(equal.to(before.dtype), before) if RANK_BY_DOT else tl.cumsum(equal, 1) - equal
        bound = tl.where(rank >= tl.where(held > count, count - fewer, KEPT)[:, None], least, bound)
    return tl.where(size <= bound, 0.0, states)


@triton.jit
def _drop(size, variance, limit, middle, low, high, dropped, LOW_BITS: tl.constexpr):
    """One step of the search in `_needed`."""
    lost = tl.sum(tl.where(size < _as_float(middle, LOW_BITS)[:, None], variance, 0.0), 1)
    # A NaN is never little enough.
    little = lost <= limit
    return tl.where(little, middle, low), tl.where(little, high, middle), tl.where(little, lost, dropped)


@triton.jit
def _needed(size, variance, limit, LOW_BITS: tl.constexpr, OCTAVES: tl.constexpr, STEPS: tl.constexpr):
    """Boolean, the shape of `size`: the fewest of the largest numbers of each row, one at least, for which the
    variances of the others add up to `limit` at most. The order is that of `_largest`.
    """
    # What is before the place `low` may be dropped, all that is before `high` may not, unless it is everything.
    high = _behind_largest(size, LOW_BITS)
    low, dropped = tl.zeros_like(high), tl.zeros(high.shape, tl.float32)
    middle = tl.maximum(high - (OCTAVES << (23 - LOW_BITS)), 0)
    low, high, dropped = _drop(size, variance, limit, middle, low, high, dropped, LOW_BITS)
    unsettled = tl.max(high, 0)
    while unsettled > 1:
        for _ in tl.static_range(STEPS):
            low, high, dropped = _drop(size, variance, limit, low + ((high - low) >> 1), low, high, dropped, LOW_BITS)
        least, most = _as_float(low, LOW_BITS)[:, None], _as_float(high - 1, LOW_BITS)[:, None]
        between = tl.sum(tl.where((size >= least) & (size <= most), 1, 0), 1)
        unsettled = tl.max(tl.where(high - low > 1, between, 1), 0)
    # Between the two is one number, or several equal ones: the last of these are dropped.
    least, most = _as_float(low, LOW_BITS)[:, None], _as_float(high - 1, LOW_BITS)[:, None]
    equal = (size >= least) & (size <= most)
    left = tl.cumsum(tl.where(equal, variance, 0.0), 1, reverse=True) + dropped[:, None]
    chosen = ~(size <= most) | (equal & ~(left <= limit))
    dims = tl.arange(0, size.shape[1])[None, :]
    first = tl.min(tl.where(equal, dims, size.shape[1]), 1)
    return chosen | ((tl.sum(chosen.to(tl.int32), 1) == 0)[:, None] & (dims == first[:, None]))


@triton.jit
def _rotate_and_narrow(
    states_ptr,
    rotation_ptr,
    key_rms_ptr,
    rotated_ptr,
    narrow_ptr,
    stride_batch,
    stride_head,
    stride_token,
    length,
    count,
    limit,
    scaling,
    MODE: tl.constexpr,
    SELECTION: tl.constexpr,
    SQUARED: tl.constexpr,
    BOTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    OCTAVES: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, groups, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, KEPT_PADDED)
    rotation_ptr += group * HEAD_DIM * KEPT
    high, low = 0, 0
    if CHUNK == HEAD_DIM_PADDED:
        high, low = _load_rotation(rotation_ptr, 0, states_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    weight = tl.load(key_rms_ptr + group * KEPT + dims, dims < KEPT, 0.0)[None, :]
    before = (dims[:, None] < dims[None, :]).to(tl.float16)

    blocks = tl.cdiv(length, TOKENS)
    for item in range(tl.program_id(0), blocks * (GROUP // TOGETHER), tl.num_programs(0)):
        tokens = item % blocks * TOKENS + tl.arange(0, TOKENS)
        there = tokens < length
        first = group * GROUP + item // blocks * TOGETHER
        start = (row * groups * GROUP + first) * length
        places = tokens[:, None] * KEPT + dims[None, :]
        written = there[:, None] & (dims[None, :] < KEPT)
        turned = tl.zeros([TOKENS, KEPT_PADDED], states_ptr.dtype.element_ty)
        size = tl.zeros([TOKENS, KEPT_PADDED], tl.float32)
        variance = size
        for member in range(TOGETHER):
            turned = _turn(
                states_ptr + row * stride_batch + (first + member).to(tl.int64) * stride_head,
                there,
                stride_token,
                tokens,
                rotation_ptr,
                high,
                low,
                HEAD_DIM,
                HEAD_DIM_PADDED,
                CHUNK,
                KEPT,
                KEPT_PADDED,
                TOKENS,
                PRECISION,
            )
            if BOTH or TOGETHER > 1 or MODE == "none":
                tl.store(rotated_ptr + (start + member * length) * KEPT + places, turned, written)
            if MODE == "largest" or MODE == "error":
                error = tl.abs(turned.to(tl.float32) * weight)
                one = error if SELECTION == "weighted" else tl.abs(turned.to(tl.float32))
                size += one * one if SQUARED else one
                if MODE == "error":
                    error *= scaling
                    variance += error * error
        if MODE != "none":
            wanted = turned.to(tl.float32)
            if TOGETHER > 1:
                wanted = tl.full(size.shape, 1.0, tl.float32)
            if SELECTION == "static":
                size = tl.broadcast_to((KEPT - dims).to(tl.float32)[None, :], size.shape)
            if KEPT < KEPT_PADDED:
                size = tl.where(dims[None, :] < KEPT, size, -1.0)
            if MODE == "first":
                wanted = tl.where((dims < count)[None, :], wanted, 0.0)
            elif MODE == "largest":
                wanted = _largest(size, wanted, count, before, KEPT_PADDED <= 128, KEPT, LOW_BITS, OCTAVES, STEPS)
            else:
                wanted = tl.where(_needed(size, variance, limit, LOW_BITS, OCTAVES, STEPS), wanted, 0.0)
            if TOGETHER == 1:
                tl.store(narrow_ptr + start * KEPT + places, wanted.to(turned.dtype), written)
            else:
                # Other threads of this program may have written what one reads here.
                tl.debug_barrier()
                for member in range(TOGETHER):
                    offset = (start + member * length) * KEPT
                    turned = tl.load(rotated_ptr + offset + places, written, 0.0)
                    tl.store(narrow_ptr + offset + places, tl.where(wanted > 0, turned, 0.0).to(turned.dtype), written)


@triton.jit
def _update(scores, values, largest, total, output, PRECISION: tl.constexpr):
    """One more block of an online softmax; scores are to the base 2."""
    now = tl.maximum(largest, tl.max(scores, 1))
    # A block in which nothing is visible must not make NaN of minus infinity less itself.
    safe = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(largest - safe)
    total = total * shrink + tl.sum(weights, 1)
    output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return now, total, output


@triton.jit
def _window(
    query_ptr,
    key_ptr,
    value_ptr,
    far_ptr,
    far_lse_ptr,
    output_ptr,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    far_batch,
    far_head,
    far_token,
    length,
    sink,
    recent,
    scaling,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, groups, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * (ROWS // TOGETHER)
    # The heads of a group are rows of one matrix, which all multiply the same keys.
    tokens = start + tl.arange(0, ROWS) % (ROWS // TOGETHER)
    member = tl.arange(0, ROWS) // (ROWS // TOGETHER)
    heads = (group * GROUP + member).to(tl.int64)
    there = (member < GROUP) & (tokens < length)
    dims, columns = tl.arange(0, KEPT_PADDED), tl.arange(0, VALUE_DIM_PADDED)
    query = tl.load(
        query_ptr
        + row * query_batch
        + heads[:, None] * query_head
        + tokens.to(tl.int64)[:, None] * query_token
        + dims[None, :],
        there[:, None] & (dims[None, :] < KEPT),
        0.0,
    )
    key_ptr += row * key_batch + group.to(tl.int64) * key_head
    value_ptr += row * value_batch + group.to(tl.int64) * value_head

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    # Blocks of first tokens, then of those from the first query's window on, which are not counted twice.
    begin = tl.maximum(start - recent + 1, sink)
    end = tl.where(recent > 0, tl.minimum(start + ROWS // TOGETHER, length), 0)
    firsts = tl.cdiv(tl.minimum(sink, start + ROWS // TOGETHER), KEYS)
    for block in range(firsts + tl.cdiv(tl.maximum(end - begin, 0), KEYS)):
        is_first = block < firsts
        positions = tl.where(is_first, block, block - firsts) * KEYS + tl.where(is_first, 0, begin) + tl.arange(0, KEYS)
        given = positions < tl.where(is_first, sink, end)
        keys = tl.load(
            key_ptr + positions.to(tl.int64)[None, :] * key_token + dims[:, None],
            given[None, :] & (dims[:, None] < KEPT),
            0.0,
        )
        values = tl.load(
            value_ptr + positions.to(tl.int64)[:, None] * value_token + columns[None, :],
            given[:, None] & (columns[None, :] < VALUE_DIM),
            0.0,
        )
        scores = tl.dot(query, keys, input_precision=PRECISION) * scaling
        after = tl.where(is_first, -1, tokens - recent)
        seen = given[None, :] & (positions[None, :] <= tokens[:, None]) & (positions[None, :] > after[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        largest, total, output = _update(scores, values, largest, total, output, PRECISION)

    window = sink + recent
    has_far = there & (tokens >= window)
    far_row = (row * groups * GROUP + heads) * (length - window) + tokens - window
    far_lse = tl.load(far_lse_ptr + far_row, has_far, float("-inf")) * 1.4426950408889634
    far = tl.load(
        far_ptr
        + row * far_batch
        + heads[:, None] * far_head
        + (tokens - window).to(tl.int64)[:, None] * far_token
        + columns[None, :],
        has_far[:, None] & (columns[None, :] < VALUE_DIM),
        0.0,
    ).to(tl.float32)
    now = tl.maximum(largest, far_lse)
    # Rows behind the last query see nothing, and are not written.
    now = tl.where(now == float("-inf"), 0.0, now)
    near_share, far_share = tl.exp2(largest - now), tl.exp2(far_lse - now)
    merged = output * near_share[:, None] + far * far_share[:, None]
    merged = merged / tl.where(there, total * near_share + far_share, 1.0)[:, None]
    tl.store(
        output_ptr + ((row * groups * GROUP + heads) * length + tokens)[:, None] * VALUE_DIM + columns[None, :],
        merged.to(output_ptr.dtype.element_ty),
        there[:, None] & (columns[None, :] < VALUE_DIM),
    )
