# SPDX-License-Identifier: Apache-2.0
"""Every kernel once on awkward shapes, to be run under a memory checker.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/memcheck.py [OPTION] [PART/PARTS]

With --int8 only decoding over rounded caches, with --short only steps in one launch, with --select only steps that
choose tokens; without, all but these. With 0/4, a quarter. Most of the
time is spent on compiling: several parts at once take less, and a run without the checker before leaves the kernels in
Triton's cache.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

import aqua_attention as aqua
from aqua_attention.ops.api import attend, rotate
from aqua_attention.ops.backends.triton import LARGEST_SCORED
from aqua_attention.ops.backends.triton import decode as decode_module
from aqua_attention.ops.backends.triton.decode import decode
from aqua_attention.ops.backends.triton.decode_short import LARGEST_SHORT, decode_short
from aqua_attention.ops.backends.triton.prepare import prepare
from aqua_attention.ops.backends.triton.token_step import selected_step
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.layout import TILE, Pages, Quantization, TiledCache
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization

SHAPES = [(8, 2, 128, 128, 128), (6, 2, 80, 64, 96), (3, 1, 64, 48, 64), (2, 2, 256, 256, 256)]
"""Query heads, key-value heads, head_dim, kept and value_dim."""
LAYOUTS = [(False, None), (True, None), (False, 32), (True, 64)]
"""Of the cache: rounded, and tokens of a page."""
STATIC = {"k_ratio": 0.25, "selection": "static"}
SELECTIONS = [{"select_p": 0.9}, {"select_tokens": 40}, {"select_p": 0.5, "min_length": 400}]
WAYS: list[dict[str, Any]] = [{}, {"chunks": 1, "splits": 3, "programs": 5}, {"chunks": 4, "by_hand": False}]
"""Programs of the kernels that choose tokens: as many as fill the GPU, one that chooses, several that meet."""
CHOICES = [{"k_ratio": 1.0}, {"k_ratio": 0.5, "selection": "weighted"}, {"logit_error": 0.1}, STATIC]


def main(only_int8: bool, part: int, parts: int) -> None:
    """Decode over the end of a tile and of the cache, and prefill odd lengths; results must be finite."""
    torch.manual_seed(0)
    runs = places = 0
    for heads, groups, head_dim, kept, value_dim in SHAPES:
        rotation = torch.linalg.qr(torch.randn(groups, head_dim, head_dim)).Q[..., :kept].contiguous().cuda()
        rms = torch.rand(groups, kept, device="cuda") + 0.1
        for choice in CHOICES:
            s_ratio = 1 - kept / head_dim
            config = aqua.AquaConfig.paper(share="group", s_ratio=s_ratio, sink=3, recent=20, **choice)
            plan = LayerPlan.of(rotation, rms, config)

            def random(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

            lengths = torch.tensor([509, 380, 1])
            layouts = LAYOUTS if choice in CHOICES[1:3] and kept < 256 else LAYOUTS[:1]
            for rounding, page in [each for each in layouts if each[0] or not only_int8]:
                places += 1
                if places % parts != part:
                    continue
                given = Quantization(rms, rms) if rounding else None
                table = torch.randperm(3 * 512 // page, device="cuda").view(3, -1).int() if page else None
                if page:
                    table[2, 1:] = 1 << 30  # of tokens that never exist: not to be looked at
                pages = Pages(table, page, table.numel()) if page else None
                cache = TiledCache(
                    3, groups, kept, value_dim, 512, torch.bfloat16, "cuda", quantization=given, pages=pages
                )
                cache.fill(random(3, groups, 509, kept), random(3, groups, 509, value_dim), lengths)
                mass = torch.empty(3, groups, cache.count * TILE, device="cuda")
                for step in range(8):
                    decode_module.BY_HAND_TILES = 1 if step < 4 else 1 << 30
                    query, key, value = (
                        random(3, n, width) for n, width in ((heads, head_dim), (groups, head_dim), (groups, value_dim))
                    )
                    scaling = head_dim**-0.5
                    turned, chosen = prepare(query, key, value, cache, plan, scaling)
                    wanted = {"mass": mass if step % 2 else None}
                    output = decode(turned, chosen, cache, sink=3, recent=20, scaling=scaling, appended=True, **wanted)
                    assert output.isfinite().all()
                    runs += 1
                assert cache.lengths.tolist() == [512, 388, 9]
            for share in () if only_int8 or part > 0 else ("head", "group"):
                for window in ({"sink": 0, "recent": 0}, {"sink": 3, "recent": 20}):
                    plan = LayerPlan.of(
                        rotation, rms, aqua.AquaConfig.paper(share=share, s_ratio=s_ratio, **window, **choice)
                    )
                    query, key = random(2, heads, 131, head_dim), random(2, groups, 131, head_dim)
                    value = random(2, groups, 131, value_dim)
                    output = attend(plan.call(query, rotate(key, rotation), value), plan, "triton").output
                    assert output.isfinite().all()
                    runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs, all finite")


def main_short(part: int, parts: int) -> None:
    """Steps in one launch over the ends of tiles and of the cache; what they give must be finite."""
    torch.manual_seed(0)
    runs = places = 0
    for heads, groups, head_dim, kept, value_dim in [shape for shape in SHAPES if max(shape) <= LARGEST_SHORT]:
        rotation = torch.linalg.qr(torch.randn(groups, head_dim, head_dim)).Q[..., :kept].contiguous().cuda()
        for page in (None, 32, 64):
            for splits in (0, 1, 3):
                places += 1
                if places % parts != part:
                    continue
                table = torch.randperm(3 * 512 // page, device="cuda").view(3, -1).int() if page else None
                if table is not None:
                    table[2, 128 // page :] = 1 << 30  # of tokens that never exist: not to be looked at
                pages = Pages(table, page, table.numel()) if table is not None else None
                cache = TiledCache(3, groups, kept, value_dim, 512, torch.bfloat16, "cuda", pages=pages)
                states = [torch.randn(3, groups, 509, width, device="cuda").bfloat16() for width in (kept, value_dim)]
                cache.fill(*states, torch.tensor([509, 380, 0]))
                for _ in range(8):
                    new = [
                        torch.randn(3, n, width, device="cuda").bfloat16()
                        for n, width in ((heads, head_dim), (groups, head_dim), (groups, value_dim))
                    ]
                    output, rotated = decode_short(*new, cache, rotation, splits=splits, scaling=head_dim**-0.5)
                    assert output.isfinite().all() and rotated.isfinite().all()
                    runs += 1
                assert cache.lengths.tolist() == [512, 388, 8]
    torch.cuda.synchronize()
    print(f"{runs} runs, all finite")


def main_select(part: int, parts: int, device: str = "cuda", ways: list[dict[str, Any]] = WAYS) -> int:
    """Steps that choose tokens over the ends of tiles and of the cache; what they give must be finite.

    Returns:
        How many steps ran.
    """
    torch.manual_seed(0)
    runs = 0
    shapes = [shape for shape in SHAPES if max(shape) <= LARGEST_SCORED]
    places = itertools.product(shapes, SELECTIONS, (None, 8), (8, 4), (torch.bfloat16, torch.float32), ways)
    for place, ((heads, groups, head_dim, kept, value_dim), choice, bits, few, kind, way) in enumerate(places):
        if place % parts != part:
            continue
        # The interpreter computes bfloat16 wrongly.
        dtype = kind if device == "cuda" or kind == torch.float32 else torch.float16
        rotation = torch.linalg.qr(torch.randn(groups, head_dim, head_dim)).Q[..., :kept].contiguous().to(device)
        rms = torch.rand(groups, kept, device=device) + 0.1
        knobs: dict[str, Any] = {"k_ratio": 0.25, "s_ratio": 1 - kept / head_dim, "score_bits": few, "bits": bits}
        config = aqua.AquaConfig(**knobs | choice, sink=3, recent=20)
        plan = LayerPlan(rotation, rms, config, head_dim**-0.5, key_scale=rms, key_mean=rms)

        def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        sizes: dict[str, Any] = {"dtype": dtype, "device": device, "bits": bits, "score_bits": few}
        cache = ScoredCache.empty(4, value_dim, 512, score_quantization(plan), **sizes)
        # The last is a row of padding.
        lengths = torch.tensor([509, 380, 1, -1], dtype=torch.int32, device=device)
        cache.fill(random(4, groups, 509, kept), random(4, groups, 509, value_dim), lengths)
        work = TokenWork.of(cache, heads, plan.k, **way)
        output = random(4, heads, value_dim)
        for _ in range(8):
            token = ((heads, head_dim), (groups, head_dim), (groups, value_dim))
            states = [random(4, count, width) for count, width in token]
            selected_step(*states, cache, plan, work, output, scaling=plan.scaling)
            assert output.isfinite().all()
            runs += 1
        assert cache.lengths.tolist() == [512, 388, 9, -1]
        counts = work.scratch.counts.view(4, groups)
        assert (counts > 0).all(1).tolist() == [True, True, True, False]
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{runs} runs, all finite")
    return runs


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    part, parts = (int(number) for number in (words[0] if words else "0/1").split("/"))
    if "--short" in sys.argv[1:]:
        main_short(part, parts)
    elif "--select" in sys.argv[1:]:
        main_select(part, parts)
    else:
        main("--int8" in sys.argv[1:], part, parts)
