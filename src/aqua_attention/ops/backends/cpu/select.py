# SPDX-License-Identifier: Apache-2.0
"""A decoding step that chooses tokens (AQUA-Select) on a CPU in one call: score all, choose, attend to the chosen.

Keys and values lie by token, so a chosen one is one run of each. What is scored is their copy by dimension, or with
`score_bits` 16 the keys themselves.
"""

from __future__ import annotations

import ctypes
from threading import local
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aqua_attention.config import SELECTIONS
from aqua_attention.ops.backends.cpu.build import kernels
from aqua_attention.ops.backends.cpu.step import DTYPES, JOBS_A_THREAD, LEAST_TILES, Step, everything
from aqua_attention.ops.layout import TILE, Chosen
from aqua_attention.ops.mask import WHOLE, visible_and_exact
from aqua_attention.ops.plan import Attended, Call, LayerPlan, Reading
from aqua_attention.ops.tokens import SCALE_BYTES

SIZES = ("key_batch", "key_head", "value_batch", "value_head", "marks_each", "length", "room", "coded", "token_count")


class Selecting(ctypes.Structure):
    """`Selecting` of choose.inc."""

    _fields_ = [
        ("step", Step),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "codes", "code_scales")),
        *((name, ctypes.c_void_p) for name in ("channel_scale", "channel_mean", "marks", "shorts")),
        *((name, ctypes.c_void_p) for name in ("scores", "tops", "masses", "weights", "tokens")),
        *((name, ctypes.c_void_p) for name in ("read", "seen", "shares", "prepared", "scored", "chosen")),
        *((name, ctypes.c_int64) for name in SIZES),
        ("share", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("token_bytes", "dim_bytes", "code_bytes", "whole_bytes")),
    ]


class _Memory(local):
    """What a thread keeps between steps: memory to work in, of all layers, and the arguments of each.

    New pages take as long as scoring does.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.fixed: WeakKeyDictionary[LayerPlan, FixedArguments] = WeakKeyDictionary()

    def of(self, count: int) -> Tensor:
        """So many float32 numbers, or more."""
        if self.held is None or self.held.numel() < count:
            self.held = torch.empty(count + count // 2, dtype=torch.float32, device="cpu")
        return self.held


_memory = _Memory()


class FixedArguments:
    """Arguments that stay the same between the steps of a layer, and memory for what it chooses."""

    def __init__(self, call: Call, plan: LayerPlan) -> None:
        (batch, heads, _, head_dim), (_, kv_heads, _, kept) = call.query.shape, call.key.shape
        width, config = call.value.shape[3], plan.config
        self.key = self.key_of(call)
        # C knows their addresses, so they are held.
        self.matrices = plan.rotation.contiguous(), plan.key_rms.contiguous()
        counted = plan.selects and (plan.is_adaptive or plan.min_length > 0)
        self.chosen = _room_for_choice(plan, batch, counted) if plan.selects else everything(batch, kv_heads, kept)
        self.arguments = given = Selecting()
        self.pointer = ctypes.byref(given)
        self.call = getattr(kernels(), f"select_{DTYPES[call.query.dtype]}")
        step = given.step
        step.rotation, step.rms = (each.data_ptr() for each in self.matrices)
        step.rows, step.rows_each, step.group = batch * kv_heads, kv_heads, heads // kv_heads
        step.wide, step.dims, step.value_dims = head_dim, kept, width
        step.selection = SELECTIONS.index(config.selection)
        step.squared, step.adaptive = config.share == "group", plan.is_adaptive
        step.count, step.sink, step.recent = plan.k if plan.selects else 0, call.sink, call.recent
        step.scaling, step.logit_error = call.scaling, config.logit_error or 0.0
        step.multiply(self.chosen)
        self._placed: tuple[int, int, int] | None = None
        given.share, given.token_count = config.select_p or 0.0, config.select_tokens or 0
        given.dim_bytes = config.score_bits / 8
        given.code_bytes = 0 if config.score_bits == 16 else SCALE_BYTES
        given.token_bytes, given.whole_bytes = 2 * (kept + width), 2 * (head_dim + width)

    def place(self) -> Tensor:
        """Give a step the memory that it works in, which must outlive the call."""
        given, step, held = self.arguments, self.arguments.step, _memory.held
        if held is not None and self._placed == (held.data_ptr(), given.room, step.parts):
            return held
        heads, tokens = step.rows * step.group, step.rows * given.room
        parts = heads * step.parts
        sizes = {"scores": step.group * tokens, "weights": tokens, "tokens": tokens, "tops": parts, "masses": parts}
        sizes |= dict.fromkeys(("prepared", "scored", "chosen"), step.rows)
        shared = {"sums": parts * step.value_dims, "largest": parts, "total": parts, "rotated": heads * step.dims}
        held = _memory.of(sum(sizes.values()) + sum(shared.values()))
        address = held.data_ptr()
        for owner, names in ((given, sizes), (step, shared)):
            for name, count in names.items():
                setattr(owner, name, address)
                address += count * held.element_size()
        self._placed = held.data_ptr(), given.room, step.parts
        return held

    @staticmethod
    def key_of(call: Call) -> tuple[object, ...]:
        """What must not change of a call."""
        return call.query.shape, call.query.dtype, call.value.shape[3], call.scaling, call.sink, call.recent

    @classmethod
    def of(cls, call: Call, plan: LayerPlan) -> FixedArguments:
        """Those of an earlier step where they fit."""
        fixed = _memory.fixed.get(plan)
        if fixed is None or fixed.key != cls.key_of(call):
            fixed = _memory.fixed[plan] = cls(call, plan)
        return fixed


def attend_to_chosen(call: Call, plan: LayerPlan) -> Attended:
    """See `ops.backend.Backend.attend`, for one query a sequence and what `Cpu.why_not` does not refuse."""
    fixed = FixedArguments.of(call, plan)
    given, copy = fixed.arguments, call.score_copy if plan.config.score_bits == 8 else None
    query, key, value = call.query.contiguous(), _by_token(call.key), _by_token(call.value)
    batch, kv_heads, length, kept = key.shape
    step, heads = given.step, query.shape[1]
    output = query.new_empty((batch, heads, 1, value.shape[3]))
    counts = torch.empty((2, batch, kv_heads, 1), dtype=torch.int64, device="cpu")
    shares = torch.empty((batch, kv_heads, 1), dtype=torch.float32, device="cpu")
    marks, shorts = _marks(call, plan) if call.mask is not None or plan.min_length else (None, None)
    given.length, given.room = length, -(-length // TILE) * TILE
    if copy is not None:
        codes, scales = copy.make_room(batch, length)
        given.codes, given.code_scales, given.coded = codes.data_ptr(), scales.data_ptr(), copy.length
        given.channel_scale, given.channel_mean = (each.data_ptr() for each in copy.quantization)
        step.tiles_each = codes.shape[2]
    step.query, step.output = query.data_ptr(), output.data_ptr()
    given.keys, given.values = key.data_ptr(), value.data_ptr()
    given.key_batch, given.key_head = key.stride()[:2]
    given.value_batch, given.value_head = value.stride()[:2]
    given.marks = None if marks is None else marks.data_ptr()
    given.marks_each = 0 if marks is None or marks.shape[0] == 1 else length
    given.shorts = None if shorts is None else shorts.data_ptr()
    given.read, given.shares = counts.data_ptr(), shares.data_ptr()
    given.seen = given.read + counts[0].nbytes
    step.parts = _parts(step.rows, length)
    held = fixed.place()
    fixed.call(fixed.pointer)
    del held  # by name until the call has ended, as all that C was given an address of
    if copy is not None:
        copy.length = length
    shape = torch.Size((batch, heads, 1, kept))
    if not call.is_observed:
        return Attended(output, None, shape)
    # The next step writes to the same memory.
    selected = fixed.chosen.selected(heads) if plan.selects else None
    return Attended(output, selected, shape, Reading(counts[0], counts[1], shares))


def _parts(rows: int, length: int) -> int:
    """Parts of a sequence, as `attending` of step.py has it."""
    wanted = -(-JOBS_A_THREAD * torch.get_num_threads() // rows)
    return max(1, min(wanted, -(-length // (LEAST_TILES * TILE))))


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
