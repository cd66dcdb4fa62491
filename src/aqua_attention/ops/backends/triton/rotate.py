# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Rotating on a GPU, and setting to zero what queries do not multiply, in the same pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton import DTYPES
from aqua_attention.ops.backends.triton.blocks import on_device_of, padded, shared_memory, sm_count
from aqua_attention.ops.backends.triton.search import largest, needed
from aqua_attention.ops.backends.triton.turn import load_rotation
from aqua_attention.ops.layout import WIDEST
from aqua_attention.ops.plan import LayerPlan

TOKENS, WARPS = 64, 4
"""Tokens of one head that a program rotates at once: 16 a warp, so that a row stays within four threads."""
RESIDENT = 128
"""Rotations up to this padded width stay in shared memory; of wider ones a few rows at a time are loaded."""
PROGRAMS = 2
"""Programs on each multiprocessor that rotate: as many as have room for a rotation in shared memory."""
PRECISION = "tf32x3"
"""How float32 states are multiplied: three products of tensor cores lose two bits; "ieee" none, and is slow."""
OCTAVES = 8
"""The threshold of a row is sought first among the sizes from its largest down by this power of two."""
HALVINGS = 5
"""Halvings between two looks at whether all rows of a block are done."""


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
    check_rotation(states, rotation, None)
    rotated = states.new_empty((*states.shape[:3], rotation.shape[2]))
    _launch(states, rotation, rotated)
    return rotated


def rotate_and_narrow(
    query: Tensor,
    plan: LayerPlan,
    scaling: float,
    *,
    both: bool = True,
    is_observed: bool = False,
    before: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rotate queries, and set to zero what `ops.select.select_dimensions` does not select of them.

    Args:
        query: [batch, num_attention_heads, length, head_dim], bfloat16, float16 or float32.
        scaling: factor of the scores, read by `logit_error`.
        both: False writes the narrow ones only, in the place of the rotated ones.
        is_observed: what is selected is given back, too.
        before: tokens of the prompt before the first query. The first `min_length` - 1 of all are short, and stay as
            they are.

    Returns:
        The rotated queries and the narrow ones, both [batch, num_attention_heads, length, kept] as of `empty_by_token`,
        in the query's dtype; one and the same tensor where every dimension is selected. Then what is selected, boolean,
        in their shape; None: every dimension, or it is not observed. Sums over the heads of a group and expected errors
        are in float32 in another order than the reference's: where two sizes, or an error and `logit_error`, differ by
        rounding only, another dimension may be taken. An infinite query may turn into NaN.

    Raises:
        AquaError: shapes or dtypes that the kernel does not take; the message lists what it takes.
    """
    check_rotation(query, plan.rotation, plan.key_rms)
    rotated, selected = empty_by_token(query, plan.rotation.shape[2]), None
    if not plan.selects:
        _launch(query, plan.rotation, rotated)
        return rotated, rotated, None
    if is_observed:
        selected = torch.empty_like(rotated, dtype=torch.bool)
    narrow = torch.empty_like(rotated) if both else rotated
    _launch(query, plan.rotation, rotated, narrow, selected, plan, scaling, max(0, plan.min_length - before))
    return rotated, narrow, selected


def empty_by_token(query: Tensor, width: int) -> Tensor:
    """What will be of queries, [batch, heads, length, width]: the heads of a token lie next to each other.

    So do those of a model's queries, and fused kernels give their output the order of the queries: the model then has
    nothing to copy.
    """
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, width)).transpose(1, 2)


def by_token(states: Tensor) -> Tensor:
    """The same, with the numbers of a token next to each other."""
    return states if states.stride(-1) == 1 else states.contiguous()


def check_rotation(states: Tensor, rotation: Tensor, key_rms: Tensor | None) -> None:
    """Raise AquaError when states, rotation and key_rms do not fit each other or the kernels."""
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
    rotated: Tensor,
    narrow: Tensor | None = None,
    selected: Tensor | None = None,
    plan: LayerPlan | None = None,
    scaling: float = 1.0,
    min_length: int = 0,
) -> None:
    """Rotate; with a plan, choose dimensions too."""
    batch, heads, length, head_dim = states.shape
    kv_heads, kept = rotation.shape[0], rotation.shape[2]
    group, mode, selection, squared = heads // kv_heads, "none", "magnitude", False
    if plan is not None:
        selection, squared = plan.config.selection, plan.config.share == "group"
        mode = "error" if plan.is_adaptive else "first" if selection == "static" else "largest"
    together = group if squared and mode != "first" else 1
    states = by_token(states)
    wide, kept_padded = (padded(width) for width in (head_dim, kept))
    size = states.element_size()
    # Both halves of a rotation, the states, and the matrix by which ranks are found.
    needed = size * (2 * wide * kept_padded + TOKENS * wide) + 2 * kept_padded**2
    resident = max(wide, kept_padded) <= RESIDENT and needed <= shared_memory(states)
    items = triton.cdiv(length, TOKENS) * (group // together)
    # Not one more than run at once: the last would wait for a whole round.
    programs = min(items, max(1, PROGRAMS * sm_count(states) // (kv_heads * batch)))
    # The low bits of a half number are zero in float32, and need no search where nothing was multiplied to it.
    plain = selection == "magnitude" and not squared
    low_bits = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[states.dtype] if plain else 0
    with on_device_of(states):
        _rotate_and_narrow[(programs, kv_heads, batch)](
            states,
            rotation.contiguous(),
            rotation if plan is None else plan.key_rms.contiguous(),
            rotated,
            rotated if narrow is None else narrow,
            None if selected is None else selected.view(torch.int8),
            *states.stride()[:3],
            *rotated.stride()[:3],
            length,
            0 if plan is None else plan.k,
            0.0 if plan is None else float(plan.config.logit_error or 0.0),
            scaling,
            min_length or None,
            MODE=mode,
            SELECTION=selection,
            SQUARED=squared,
            BOTH=narrow is not None and narrow is not rotated,
            TOGETHER=together,
            GROUP=group,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=wide,
            CHUNK=wide if resident else RESIDENT // size,
            KEPT=kept,
            KEPT_PADDED=kept_padded,
            TOKENS=TOKENS,
            LOW_BITS=low_bits,
            OCTAVES=OCTAVES,
            HALVINGS=HALVINGS,
            PRECISION=PRECISION,
            num_warps=WARPS if resident else 8,
            # Two programs fit on a multiprocessor and hide each other's loads; more in flight would leave room for one.
            num_stages=2 if mode == "none" and resident else 1,
            # Products and sums are rounded as the reference's, or equal sizes would differ.
            enable_fp_fusion=False,
        )


@triton.jit
def _times(states, high, low, turned, PRECISION: tl.constexpr):
    if states.dtype == tl.float32:
        return tl.dot(states, high, turned, input_precision=PRECISION)
    return tl.dot(states, low, tl.dot(states, high, turned))


@triton.jit
def turned_tokens(
    source,
    rotation,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotated states of some tokens of one head, in their dtype."""
    states_ptr, stride_token, tokens, there = source
    rotation_ptr, high, low = rotation
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
            one, two = load_rotation(rotation_ptr, start, states.dtype, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
            turned = _times(states, one, two, turned, PRECISION)
    return turned.to(states_ptr.dtype.element_ty)


@triton.jit
def _rotate_and_narrow(
    states_ptr,
    rotation_ptr,
    key_rms_ptr,
    rotated_ptr,
    narrow_ptr,
    selected_ptr,
    stride_batch,
    stride_head,
    stride_token,
    written_batch,
    written_head,
    written_token,
    length,
    count,
    limit,
    scaling,
    min_length,
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
    HALVINGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, KEPT_PADDED)
    rotation_ptr += group * HEAD_DIM * KEPT
    high, low = 0, 0
    if CHUNK == HEAD_DIM_PADDED:
        high, low = load_rotation(rotation_ptr, 0, states_ptr.dtype.element_ty, HEAD_DIM, KEPT, CHUNK, KEPT_PADDED)
    rotation = (rotation_ptr, high, low)
    weight = tl.load(key_rms_ptr + group * KEPT + dims, dims < KEPT, 0.0)[None, :]
    before = (dims[:, None] < dims[None, :]).to(tl.float16)

    blocks = tl.cdiv(length, TOKENS)
    for item in range(tl.program_id(0), blocks * (GROUP // TOGETHER), tl.num_programs(0)):
        tokens = item % blocks * TOKENS + tl.arange(0, TOKENS)
        there = tokens < length
        first = group * GROUP + item // blocks * TOGETHER
        start = row * written_batch + first.to(tl.int64) * written_head
        offsets = tokens.to(tl.int64)[:, None] * written_token + dims[None, :]
        written = there[:, None] & (dims[None, :] < KEPT)
        turned = tl.zeros([TOKENS, KEPT_PADDED], states_ptr.dtype.element_ty)
        size = tl.zeros([TOKENS, KEPT_PADDED], tl.float32)
        variance = size
        for member in range(TOGETHER):
            head_ptr = states_ptr + row * stride_batch + (first + member).to(tl.int64) * stride_head
            source = (head_ptr, stride_token, tokens, there)
            turned = turned_tokens(
                source, rotation, HEAD_DIM, HEAD_DIM_PADDED, CHUNK, KEPT, KEPT_PADDED, TOKENS, PRECISION
            )
            if BOTH or TOGETHER > 1 or MODE == "none":
                tl.store(rotated_ptr + start + member * written_head + offsets, turned, written)
            if MODE == "largest" or MODE == "error":
                error = tl.abs(turned.to(tl.float32) * weight)
                one = error if SELECTION == "weighted" else tl.abs(turned.to(tl.float32))
                size += one * one if SQUARED else one
                if MODE == "error":
                    error *= scaling
                    variance += error * error
        if MODE != "none":
            # Ones, where several heads get what is chosen, or somebody asks for it.
            ONES: tl.constexpr = TOGETHER > 1 or selected_ptr is not None
            wanted = turned.to(tl.float32)
            if ONES:
                wanted = tl.full(size.shape, 1.0, tl.float32)
            if SELECTION == "static":
                size = tl.broadcast_to((KEPT - dims).to(tl.float32)[None, :], size.shape)
            if KEPT < KEPT_PADDED:
                size = tl.where(dims[None, :] < KEPT, size, -1.0)
            if MODE == "first":
                wanted = tl.where((dims < count)[None, :], wanted, 0.0)
            elif MODE == "largest":
                wanted = largest(size, wanted, count, before, KEPT_PADDED <= 128, KEPT, LOW_BITS, OCTAVES, HALVINGS)
            else:
                wanted = tl.where(needed(size, variance, limit, LOW_BITS, OCTAVES, HALVINGS), wanted, 0.0)
            if min_length is not None:
                every = tl.full(size.shape, 1.0, tl.float32) if ONES else turned.to(tl.float32)
                wanted = tl.where((tokens + 1 < min_length)[:, None], every, wanted)
            if TOGETHER == 1:
                if selected_ptr is not None:
                    tl.store(selected_ptr + start + offsets, (wanted > 0).to(tl.int8), written)
                    wanted = tl.where(wanted > 0, turned.to(tl.float32), 0.0)
                tl.store(narrow_ptr + start + offsets, wanted.to(turned.dtype), written)
            else:
                # Other threads of this program may have written what one reads here.
                tl.debug_barrier()
                for member in range(TOGETHER):
                    offset = start + member * written_head
                    turned = tl.load(rotated_ptr + offset + offsets, written, 0.0)
                    tl.store(narrow_ptr + offset + offsets, tl.where(wanted > 0, turned, 0.0).to(turned.dtype), written)
                    if selected_ptr is not None:
                        tl.store(selected_ptr + offset + offsets, (wanted > 0).to(tl.int8), written)
