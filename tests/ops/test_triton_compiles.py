# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for a GPU where there is none: the interpreter accepts what the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import mostly_long

pytest.importorskip("triton")
LARGEST_SHARED_MEMORY = 232_448
"""Bytes that a program can have on an H100."""

LAUNCH = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction


class Launch:
    '''Stands for a kernel: compiles for compute capability 9.0 what would be launched.'''

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, launch_pdl=False, **constants):
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        names = self.kernel.arg_names
        given = dict(zip(names, arguments)) | constants
        given |= {"ASSEMBLY": True} if "ASSEMBLY" in given else {}
        signature, values, aligned = {}, {}, {}

        def kind_of(value, place, is_constant):
            if isinstance(value, tuple):
                kinds = [kind_of(each, (*place, i), False) for i, each in enumerate(value)]
                return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
            # As triton has it: a number that is 1 is known when compiling.
            if is_constant or value is None or (type(value) is int and value == 1):
                values[place] = value
                return "constexpr"
            if hasattr(value, "dtype"):
                aligned[place] = [["tt.divisibility", 16]]
                return "*" + KINDS[str(value.dtype)]
            if isinstance(value, int) and value % 16 == 0:
                aligned[place] = [["tt.divisibility", 16]]
            return "fp32" if isinstance(value, float) else "i32"

        for name in names:
            signature[name] = kind_of(given[name], (names.index(name),), name.isupper())
        kind = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        source = kind(fn=self.kernel, signature=signature, constexprs=values, attrs=aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.shared = built.metadata.shared
        early = "griddepcontrol" in built.asm["ptx"]
        assert early == bool(given.get("EARLY")), f"{self.kernel.__name__} starts early: {early}"
        assert given.get("EARLY") != 1 or "launch_dependents" not in built.asm["ptx"], self.kernel.__name__
        print(self.kernel.__name__, self.shared)


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
KINDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int8": "i8", "uint8": "u8"}
KINDS |= {"int64": "i64", "int16": "i16"}
KINDS = {"torch." + name: kind for name, kind in KINDS.items()}
"""

COMPILE = (
    LAUNCH
    + """
from aqua_attention.ops.backends.triton import (
    codes,
    decode,
    decode_int8_mma,
    decode_kernel,
    decode_short,
    fill,
    prepare,
    rotate,
    window,
)
for name in ("decode_kernel", "mass_kernel", "merge_kernel"):
    setattr(decode, name, Launch(getattr(decode, name)))
prepare._prepare = Launch(prepare._prepare)
decode_int8_mma.decode_quantized_kernel = Launch(decode_int8_mma.decode_quantized_kernel)
decode.starts_early = prepare.starts_early = lambda *_: {"EARLY": 2, "launch_pdl": True}
decode_short.decode_short_kernel = Launch(decode_short.decode_short_kernel)
decode_short.starts_early = decode.starts_early
rotate._rotate_and_narrow = Launch(rotate._rotate_and_narrow)
window._window = Launch(window._window)
fill._fill = Launch(fill._fill)
codes._encode, codes._widen = Launch(codes._encode), Launch(codes._widen)

import torch
import aqua_attention as aqua
from aqua_attention.ops.layout import Pages, Quantization, TiledCache
from aqua_attention.ops.plan import Call, LayerPlan


def build(dtype, heads, groups, head_dim, kept, value_dim, quantization=False, page=None, by_hand=False, **choice):
    decode.is_by_hand = lambda *_: by_hand
    config = aqua.AquaConfig(share="group", s_ratio=1 - kept / head_dim, **choice)
    given = Quantization(torch.ones(groups, kept), torch.zeros(groups, kept)) if quantization else None
    pages = Pages(torch.zeros(1, 384 // page, dtype=torch.int32), page, 12) if page else None
    cache = TiledCache(1, groups, kept, value_dim, 300, dtype, "cpu", quantization=given, pages=pages)
    query, key = torch.zeros(1, heads, head_dim, dtype=dtype), torch.zeros(1, groups, head_dim, dtype=dtype)
    rotation, rms = torch.zeros(groups, head_dim, kept), torch.ones(groups, kept)
    value = torch.zeros(1, groups, value_dim, dtype=dtype)
    plan = LayerPlan.of(rotation, rms, config)
    turned, chosen = prepare.prepare(query, key, value, cache, plan, plan.scaling)
    mass = torch.zeros(1, groups, 384) if head_dim == 128 else None
    decode.decode(turned, chosen, cache, sink=4, recent=64, scaling=0.1, appended=True, mass=mass)
    if not quantization and dtype != torch.float32 and max(head_dim, kept, value_dim) <= decode_short.LARGEST_SHORT:
        # On an H100, and on a GPU for games.
        for room in (232448, 101376):
            decode_short.shared_memory = lambda _: room
            for splits in (0, 1):
                decode_short.decode_short(query, key, value, cache, rotation, splits=splits, scaling=0.1)
                assert decode_short.decode_short_kernel.shared <= room
    prompt = torch.zeros(1, heads, 300, head_dim, dtype=dtype)
    for is_observed in (False, True):
        rotate.rotate_and_narrow(prompt, plan, plan.scaling, is_observed=is_observed)
    far = torch.zeros(1, heads, 232, value_dim, dtype=dtype)
    keys, values = (torch.zeros(1, groups, 300, width, dtype=dtype) for width in (kept, value_dim))
    turned = torch.zeros(1, heads, 300, kept, dtype=dtype)
    call = Call(turned, keys, values, None, sink=4, recent=64, scaling=0.1)
    window.window_merge(call, far, far[..., 0].float())
    for channels in (None, (torch.ones(groups, 1, kept), torch.zeros(groups, 1, kept))):
        codes.widen(*codes.encode(keys, channels), channels, keys)
    for order in (None, torch.zeros(1, 300, dtype=torch.int64)):
        fill.fill(cache, keys, values, torch.tensor([300]), order)


for given in CASES:
    build(**given)
print("done")
"""
)
CASES = {
    "weighted": "dict(dtype=torch.bfloat16, heads=8, groups=2, head_dim=128, kept=128, value_dim=128, k_ratio=0.5, "
    "selection='weighted')",
    "adaptive": "dict(dtype=torch.float16, heads=6, groups=2, head_dim=80, kept=64, value_dim=96, logit_error=0.1)",
    "dense": "dict(dtype=torch.float32, heads=2, groups=2, head_dim=64, kept=64, value_dim=64, k_ratio=1.0)",
    "wide": "dict(dtype=torch.bfloat16, heads=8, groups=1, head_dim=256, kept=256, value_dim=256, k_ratio=0.5)",
    "int8": "dict(dtype=torch.bfloat16, heads=8, groups=2, head_dim=128, kept=128, value_dim=128, k_ratio=0.75, "
    "quantization=True, page=32)",
    "by hand": "dict(dtype=torch.bfloat16, heads=8, groups=2, head_dim=128, kept=128, value_dim=128, k_ratio=0.5, "
    "quantization=True, page=64, by_hand=True)",
    "few by hand": "dict(dtype=torch.bfloat16, heads=8, groups=2, head_dim=128, kept=128, value_dim=64, k_ratio=0.3, "
    "quantization=True, by_hand=True)",
    "adaptive by hand": "dict(dtype=torch.float16, heads=6, groups=2, head_dim=80, kept=64, value_dim=64, "
    "logit_error=0.1, quantization=True, by_hand=True)",
    "pages": "dict(dtype=torch.float16, heads=4, groups=2, head_dim=80, kept=80, value_dim=80, k_ratio=0.5, page=64)",
    "hybrid": "dict(dtype=torch.bfloat16, heads=8, groups=2, head_dim=128, kept=128, value_dim=128, k_ratio=0.5, "
    "selection='weighted', min_length=200)",
    "hybrid, float32": "dict(dtype=torch.float32, heads=2, groups=2, head_dim=128, kept=80, value_dim=128, "
    "k_ratio=0.3, min_length=16)",
    "hybrid, wide": "dict(dtype=torch.bfloat16, heads=8, groups=1, head_dim=256, kept=256, value_dim=256, k_ratio=0.5, "
    "min_length=1)",
    "hybrid, adaptive": "dict(dtype=torch.float16, heads=6, groups=2, head_dim=80, kept=64, value_dim=96, "
    "logit_error=0.1, min_length=1000)",
    "hybrid, int8": "dict(dtype=torch.bfloat16, heads=8, groups=2, head_dim=128, kept=128, value_dim=128, "
    "k_ratio=0.75, quantization=True, page=32, min_length=1000)",
}
SHORT = {"weighted", "adaptive", "pages", "hybrid", "hybrid, adaptive"}
"""With those that a step in one launch takes, too: of 16 bits, not rounded, not wide."""


@pytest.mark.parametrize("case", mostly_long(CASES, "dense", "adaptive", "int8", "by hand"))
def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(case, tmp_path):
    kernels = compiled(COMPILE, CASES[case], tmp_path)
    assert {line.split()[0] for line in kernels} >= {"_prepare", "decode_kernel", "_rotate_and_narrow", "_window"}
    assert any("decode_short_kernel" in line for line in kernels) == (case in SHORT)


def compiled(code, case, tmp_path):
    """Names of kernels, with the shared memory of each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", code.replace("CASES", f"[{case}]")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    *kernels, last = found.stdout.splitlines()
    assert last == "done"
    for line in kernels:
        assert int(line.split()[1]) <= LARGEST_SHARED_MEMORY, line
    return kernels


PAGES = (
    LAUNCH
    + """
import torch
import aqua_attention as aqua
from aqua_attention.ops.backends.triton import paged_by_hand, paged_decode, paged_prepare, paged_write
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import PagedCache, PagedLayer, Step
from aqua_attention.ops.plan import LayerPlan

paged_decode._decode_paged = Launch(paged_decode._decode_paged)
paged_prepare._prepare_paged = Launch(paged_prepare._prepare_paged)
paged_write._write_paged = Launch(paged_write._write_paged)
for name in ("decode_quantized_kernel", "_edges", "merge_kernel"):
    setattr(paged_by_hand, name, Launch(getattr(paged_by_hand, name)))
paged_decode.starts_early = paged_prepare.starts_early = lambda *_: {"EARLY": 2, "launch_pdl": True}
paged_by_hand.starts_early = paged_decode.starts_early


def build(
    dtype, heads, groups, head_dim, kept, value_dim, bits=None, window=None, softcap=None, by_hand=False, **choice
):
    plan, paged_decode.is_by_hand, block = None, lambda *_: by_hand, choice.pop("block", 64)
    if choice:
        config = aqua.AquaConfig(share="group", s_ratio=1 - kept / head_dim, **choice)
        plan = LayerPlan.of(torch.zeros(groups, head_dim, kept), torch.ones(groups, kept), config)
    one = Quantization(torch.ones(groups, kept), torch.zeros(groups, kept)) if bits else None
    width = kept + value_dim + (4 if bits else 0)
    cache = PagedCache(torch.zeros(4, groups, block, width, dtype=torch.uint8 if bits else dtype), kept, value_dim, one)
    table, lengths = torch.zeros(3, 40, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    step = Step(table, lengths, torch.zeros(3, dtype=torch.int64), torch.zeros(99, dtype=torch.int32))
    states = torch.zeros(3, heads + 2 * groups, head_dim, dtype=dtype)
    query, key, _ = states.split([heads, groups, groups], 1)
    value, chosen = torch.zeros(3, groups, value_dim, dtype=dtype), None
    paged_write.write_paged(key, value, cache, None if plan is None else plan.rotation, step.slots)
    if plan is not None:
        for count in (64, 1):
            paged_prepare.sm_count = lambda _: count
            turned, chosen = paged_prepare.prepare_paged(query, key, value, cache, plan, step)
        query = turned
    output, layer = torch.zeros(3, heads, value_dim, dtype=dtype), PagedLayer(plan, 0.1, softcap, window)
    paged_decode.decode_paged(query, chosen, cache, layer, step, output)


for given in CASES:
    build(**given)
print("done")
"""
)
IN_PAGES = {
    "half": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=128, value_dim=128, k_ratio=0.5)",
    "whole": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=96, value_dim=128, k_ratio=1.0, "
    "sink=0, recent=0)",
    "dense": "dict(dtype=torch.float16, heads=6, groups=2, head_dim=80, kept=80, value_dim=80, softcap=30.0, "
    "window=500)",
    "wide": "dict(dtype=torch.bfloat16, heads=8, groups=1, head_dim=256, kept=256, value_dim=256, k_ratio=0.3, "
    "block=32)",
    "int8": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=128, value_dim=128, k_ratio=0.5, "
    "bits=8)",
    "int8, odd": "dict(dtype=torch.float16, heads=6, groups=2, head_dim=80, kept=60, value_dim=80, k_ratio=0.7, "
    "bits=8, sink=0, recent=0)",
    "hybrid": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=128, value_dim=128, k_ratio=0.5, "
    "min_length=2000)",
    "hybrid, int8": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=128, value_dim=128, "
    "k_ratio=0.5, min_length=2000, bits=8)",
    "by hand": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=128, value_dim=128, k_ratio=0.5, "
    "bits=8, by_hand=True)",
    "hybrid, by hand": "dict(dtype=torch.bfloat16, heads=32, groups=8, head_dim=128, kept=128, value_dim=128, "
    "k_ratio=0.5, min_length=2000, bits=8, by_hand=True)",
    "by hand, odd": "dict(dtype=torch.float16, heads=6, groups=2, head_dim=80, kept=60, value_dim=64, k_ratio=0.3, "
    "bits=8, sink=0, recent=0, by_hand=True)",
    "float32": "dict(dtype=torch.float32, heads=2, groups=2, head_dim=128, kept=128, value_dim=128, k_ratio=0.5)",
}


@pytest.mark.parametrize("case", mostly_long(IN_PAGES, "half", "dense", "int8", "by hand"))
def test_kernels_over_pages_compile_too(case, tmp_path):
    kernels = compiled(PAGES, IN_PAGES[case], tmp_path)
    decoding = {"decode_quantized_kernel", "_edges", "merge_kernel"} if "by hand" in case else {"_decode_paged"}
    preparing = set() if case == "dense" else {"_prepare_paged"}
    assert {line.split()[0] for line in kernels} == {"_write_paged", *preparing, *decoding}
