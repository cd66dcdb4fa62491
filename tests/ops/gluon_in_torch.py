# SPDX-License-Identifier: Apache-2.0
"""A kernel in Gluon run by torch on a CPU, one program after the other: triton's interpreter knows no Gluon.

Which value is which is tested so, down to the bytes that assembly moves; not in which register of which lane it lies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch


@dataclass
class Pointers:
    """To elements of a tensor."""

    states: torch.Tensor
    at: torch.Tensor | int = 0

    def __add__(self, offset):
        return Pointers(self.states, self.at + offset)

    def flat(self, mask):
        """The tensor in one dimension and what is pointed at; outside of it only where the mask is false."""
        at = torch.as_tensor(self.at)
        at = at if mask is None else torch.where(mask, at, 0)
        assert at.numel() == 0 or (at.min() >= 0 and at.max() < self.states.numel())
        return self.states.view(-1), at


def load(pointers, mask=None, other=None, cache_modifier=""):
    flat, at = pointers.flat(mask)
    return flat[at] if mask is None else torch.where(mask, flat[at], torch.as_tensor(other, dtype=flat.dtype))


def store(pointers, found, mask=None):
    flat, at = pointers.flat(mask)
    at, found = torch.broadcast_tensors(at, torch.as_tensor(found))
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.broadcast_to(at.shape)
    flat[at[mask]] = found[mask].to(flat.dtype)


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    """Runs the few instructions that kernels have on words of 32 bits."""
    if asm.startswith("movmatrix"):
        # Squares of 8 x 8, each lane with two numbers of a row of each.
        assert pack == 2 and args[0].dtype == dtype and dtype.itemsize == 2 and args[0].shape[1] == 8
        return args[0].unflatten(0, (-1, 8)).transpose(1, 2).flatten(0, 1)
    assert pack == 1 and constraints.count("=") == len(dtype)
    known = {f"${len(dtype) + i}": each.numpy().view(np.uint32) for i, each in enumerate(args)}

    def value(name):
        return known[name] if name in known else np.uint32(int(name, 0))

    def moved(first, second, selector):
        bits, found = first.astype(np.uint64) | second.astype(np.uint64) << np.uint64(32), np.uint64(0)
        for place in range(4):
            byte = bits >> np.uint64(8 * (selector >> 4 * place & 15)) & np.uint64(255)
            found = found | byte << np.uint64(8 * place)
        return found.astype(np.uint32)

    def halves(word, kind=np.float16):
        return np.ascontiguousarray(np.broadcast_to(word, args[0].shape))[..., None].view(kind)

    for line in filter(None, (line.strip() for line in re.sub(r"[;]", "\n", asm).splitlines())):
        if line in "{}" or line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        if group := re.match(r"\{(.*), (.*)\}, (\$?\w+)$", rest):
            word = halves(known[group[3]], np.int16)
            known |= {group[1]: word[..., 0], group[2]: word[..., 1]}
            continue
        target, *given = rest.split(", ")
        given = [value(each) for each in given]
        known[target] = {
            "mov.b32": lambda word: word,
            "and.b32": lambda word, mask: word & mask,
            "shr.u32": lambda word, count: word >> count,
            "prmt.b32": lambda first, second, selector: moved(first, second, int(selector)),
            "sub.f16x2": lambda *words: (halves(words[0]) - halves(words[1])).view(np.uint32)[..., 0],
        }[name](*given)
    # A tuple that a module holds has triton's.
    kinds = [
        kind if isinstance(kind, torch.dtype) else getattr(torch, kind.name.replace("fp", "float")) for kind in dtype
    ]
    return tuple(torch.from_numpy(known[f"${i}"].copy()).view(kind) for i, kind in enumerate(kinds))


def _maximum(first, second):
    return torch.fmax(*torch.broadcast_tensors(torch.as_tensor(first), torch.as_tensor(second)))


def language(program, programs):
    """Stands for `triton.experimental.gluon.language` in one program."""
    return SimpleNamespace(
        float16=torch.float16,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        program_id=lambda axis: torch.tensor(program[axis]),
        num_programs=lambda axis: programs[axis],
        static_range=range,
        SliceLayout=lambda *_: None,
        DistributedLinearLayout=lambda *_: None,
        BlockedLayout=lambda *_: None,
        arange=lambda start, end, layout: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        load=load,
        store=store,
        where=lambda condition, *each: torch.where(torch.as_tensor(condition), *map(torch.as_tensor, each)),
        minimum=lambda *each: torch.minimum(*map(torch.as_tensor, each)),
        maximum=_maximum,
        max=lambda states, axis: states.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(axis),
        sum=lambda states, axis: states.sum(axis),
        associative_scan=lambda states, axis, _: states.cumsum(axis),
        abs=torch.abs,
        exp2=torch.exp2,
        log2=torch.log2,
        cdiv=lambda number, divisor: -(-number // divisor),
        reshape=lambda states, shape: states.reshape(shape),
        permute=lambda states, dims: states.permute(dims),
        split=lambda states: states.contiguous().unbind(-1),
        join=lambda *each: torch.stack(each, -1),
        expand_dims=lambda states, axis: states.unsqueeze(axis),
        broadcast=torch.broadcast_tensors,
        convert_layout=lambda states, layout: states,
        max_constancy=lambda states, count: states,
        inline_asm_elementwise=inline_asm_elementwise,
    )


class InTorch:
    """Stands for a kernel. Modules: those that it has its functions and numbers of, which are changed."""

    def __init__(self, kernel, modules, monkeypatch):
        self.kernel, self.modules, self.patch = kernel.fn, modules, monkeypatch
        for module in modules:
            for name, each in list(vars(module).items()):
                if type(each).__name__ == "constexpr":
                    monkeypatch.setattr(module, name, each.value)
                elif hasattr(each, "fn"):
                    monkeypatch.setattr(module, name, each.fn)
            if hasattr(module, "mma_v2"):
                monkeypatch.setattr(module, "mma_v2", lambda left, right, start: start + left.float() @ right.float())

    def __getitem__(self, grid):
        def run(*arguments, num_warps, maxnreg, **constants):
            given = [pointers_to(each) for each in arguments]
            for program in product(*map(range, grid)):
                for module in self.modules:
                    self.patch.setattr(module, "gl", language(program, grid))
                self.kernel(*given, **constants)

        return run


def pointers_to(argument):
    """Of a tensor, or of those in a named tuple."""
    if isinstance(argument, torch.Tensor):
        return Pointers(argument)
    return argument._make(map(pointers_to, argument)) if hasattr(argument, "_make") else argument
