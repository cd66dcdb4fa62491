# SPDX-License-Identifier: Apache-2.0
"""A decoding step that chooses tokens (AQUA-Select) on a CPU in one call: score all, choose, attend to the chosen.

Keys and values lie by token, so a chosen one is one run of each. What is scored is their copy by dimension, or with
`score_bits` 16 the keys themselves.
"""

import ctypes
from threading import local

import torch
from torch import Tensor

from aqua_attention.config import SELECTIONS
from aqua_attention.ops.backends.cpu.build import kernels
from aqua_attention.ops.backends.cpu.step import DTYPES, JOBS_A_THREAD, LEAST_TILES, Step, everything
from aqua_attention.ops.layout import TILE, Chosen
from aqua_attention.ops.mask import WHOLE, visible_and_exact
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.tokens import SCALE_BYTES, reading_of

SIZES = ("key_batch", "key_head", "value_batch", "value_head", "marks_each", "length", "room", "coded", "token_count")


class Selecting(ctypes.Structure):
    """`Selecting` of choose.inc."""

    _fields_ = [
        ("step", Step),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "codes", "code_scales")),
        *((name, ctypes.c_void_p) for name in ("channel_scale", "channel_mean", "marks", "shorts")),
        *((name, ctypes.c_void_p) for name in ("scores", "tops", "masses", "weights", "tokens", "read", "seen")),
        *((name, ctypes.c_int64) for name in SIZES),
        ("share", ctypes.c_double),
    ]


class _Memory(local):
    """What a step works in; kept for the next one, of any layer, because new pages take as long as scoring does."""

    held: Tensor | None = None

    def of(self, count: int) -> Tensor:
        """So many float32 numbers, or more."""
        if self.held is None or self.held.numel() < count:
            self.held = torch.empty(count + count // 2, dtype=torch.float32, device="cpu")
        return self.held


_memory = _Memory()


def attend_to_chosen(call: Call, plan: LayerPlan) -> Attended:
    """See `ops.backend.Backend.attend`, for one query a sequence and what `Cpu.why_not` does not refuse."""
    query, key, value = call.query.contiguous(), _by_token(call.key), _by_token(call.value)
    (batch, heads, _, head_dim), (_, kv_heads, length, kept) = query.shape, key.shape
    width, rows, group = value.shape[3], batch * kv_heads, heads // kv_heads
    marks, shorts = _marks(call, plan)
    counted = plan.selects and (plan.is_adaptive or shorts is not None)
    chosen = _room_for_choice(plan, batch, counted) if plan.selects else everything(batch, kv_heads, kept)
    rotated = query.new_empty((batch, heads, 1, kept))
    output = query.new_empty((batch, heads, 1, width))
    counts = torch.empty((2, batch, kv_heads, 1), dtype=torch.int64, device="cpu")
    rotation, rms = plan.rotation.contiguous(), plan.key_rms.contiguous()

    all_ = Selecting()
    step, copy = all_.step, call.score_copy if plan.config.score_bits == 8 else None
    all_.length, all_.room = length, -(-length // TILE) * TILE
    if copy is not None:
        codes, scales = copy.make_room(batch, length)
        all_.codes, all_.code_scales, all_.coded = codes.data_ptr(), scales.data_ptr(), copy.length
        all_.channel_scale, all_.channel_mean = (each.data_ptr() for each in copy.quantization)
        step.tiles_each = codes.shape[2]
    step.query, step.rotation, step.rms = query.data_ptr(), rotation.data_ptr(), rms.data_ptr()
    step.rotated, step.output = rotated.data_ptr(), output.data_ptr()
    step.rows, step.rows_each, step.group = rows, kv_heads, group
    step.wide, step.dims, step.value_dims = head_dim, kept, width
    step.selection = SELECTIONS.index(plan.config.selection)
    step.squared, step.adaptive = plan.config.share == "group", plan.is_adaptive
    step.count, step.sink, step.recent = plan.k if plan.selects else 0, call.sink, call.recent
    step.scaling, step.logit_error = call.scaling, plan.config.logit_error or 0.0
    step.parts = _parts(rows, length)
    step.multiply(chosen)
    all_.keys, all_.values = key.data_ptr(), value.data_ptr()
    all_.key_batch, all_.key_head, all_.value_batch, all_.value_head = (*key.stride()[:2], *value.stride()[:2])
    if marks is not None:
        all_.marks, all_.marks_each = marks.data_ptr(), length if marks.shape[0] > 1 else 0
    all_.shorts = None if shorts is None else shorts.data_ptr()
    all_.read, all_.seen = counts[0].data_ptr(), counts[1].data_ptr()
    all_.share, all_.token_count = plan.config.select_p or 0.0, plan.config.select_tokens or 0
    held = _place(all_)
    getattr(kernels(), f"select_{DTYPES[query.dtype]}")(ctypes.byref(all_))
    del held  # by name until the call has ended, as all that C was given an address of
    if copy is not None:
        copy.length = length
    selected = chosen.selected(heads) if call.is_observed and plan.selects else None
    scored: Tensor | float = float(kept if not plan.selects else plan.k)
    if chosen.counts is not None:
        scored = chosen.counts[..., None]
    bits = plan.config.score_bits
    scored = scored * (bits / 8) + (0 if bits == 16 else SCALE_BYTES)
    reading = reading_of(counts[0], counts[0], counts[1], scored, plan, width)
    return Attended(output, selected, rotated.shape, reading)


def _parts(rows: int, length: int) -> int:
    """Parts of a sequence: one where sequences and heads alone keep the threads busy for three quarters of the time."""
    threads = torch.get_num_threads()
    if 3 * threads * -(-rows // threads) <= 4 * rows:
        return 1
    return max(1, min(-(-JOBS_A_THREAD * threads // rows), -(-length // (LEAST_TILES * TILE))))


def _by_token(states: Tensor) -> Tensor:
    """States in which the tokens of a head lie one after the other."""
    return states if states.stride()[2:] == (states.shape[3], 1) else states.contiguous()


def _marks(call: Call, plan: LayerPlan) -> tuple[Tensor | None, Tensor | None]:
    """What C is told of each token, uint8 [batch or 1, length]; and which sequences are short, uint8 [batch]; None: all
    tokens are visible, and none is short.
    """
    batch, length, mask = call.query.shape[0], call.key.shape[2], call.mask
    if mask is None:
        is_short = length < plan.min_length
        return None, torch.ones(batch, dtype=torch.uint8, device="cpu") if is_short else None
    marks = mask
    if mask.dtype == torch.bool:
        place = {"queries": 1, "keys": length, "start": length - 1, "sink": call.sink, "recent": call.recent}
        visible, exact = visible_and_exact(mask, **place, device=mask.device)
        marks = visible.to(torch.uint8) + exact.to(torch.uint8)
    shorts = None
    if plan.min_length:
        short = (mask == WHOLE).any(-1) if mask.dtype == torch.uint8 else mask.sum(-1) < plan.min_length
        shorts = short[:, 0, 0].expand(batch).to(torch.uint8).contiguous()
    return marks[:, 0, 0].contiguous(), shorts


def _room_for_choice(plan: LayerPlan, batch: int, counted: bool) -> Chosen:
    """Where C writes the dimensions that it chooses; where their number differs, all have room."""
    heads = plan.num_key_value_heads
    return Chosen(
        torch.empty((batch, heads, plan.kept if counted else plan.k), dtype=torch.int32, device="cpu"),
        torch.empty((batch, heads, plan.kept), dtype=torch.int8, device="cpu"),
        torch.empty((batch, heads), dtype=torch.int32, device="cpu") if counted else None,
    )


def _place(all_: Selecting) -> Tensor:
    """Give a step the memory that it works in, which must outlive the call."""
    step, rows = all_.step, all_.step.rows
    heads, tokens = rows * step.group, rows * all_.room
    sizes = {
        "scores": step.group * tokens,
        "weights": tokens,
        "tokens": tokens,
        "tops": heads * step.parts,
        "masses": heads * step.parts,
    }
    shared = {"sums": heads * step.parts * step.value_dims, "largest": heads * step.parts, "total": heads * step.parts}
    held = _memory.of(sum(sizes.values()) + sum(shared.values()))
    place = held.data_ptr()
    for owner, names in ((all_, sizes), (step, shared)):
        for name, count in names.items():
            setattr(owner, name, place)
            place += count * held.element_size()
    return held
