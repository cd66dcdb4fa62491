# SPDX-License-Identifier: Apache-2.0
"""The kernels that choose tokens compile for a GPU where there is none."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from test_triton_compiles import LAUNCH, compiled

pytestmark = pytest.mark.select

CODE = (
    LAUNCH
    + """
from dataclasses import replace
import torch
import aqua_attention as aqua
from aqua_attention.ops.backends.triton import token_choice, token_gather, token_prepare, token_scores
from aqua_attention.ops.backends.triton import paged_prepare, paged_write, token_pages
from aqua_attention.ops.backends.triton import token_gather_by_hand, token_prompt, token_scores_by_hand, token_step
from aqua_attention.ops.backends.triton import token_work
from aqua_attention.ops.backends.triton.token_pages import TokenMemory
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import Step
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization
from aqua_attention.ops.scored_pages import PagedSequences, ScoredPages, scored_content

KERNELS = "_prepare_tokens", "_score_tokens", "score_kernel", "_choose_tokens", "_attend_to_tokens"
KERNELS += "_prepare_paged", "_write_paged", "sum_scores", "weigh", "find_least", "attend_rows"
MODULES = token_choice, token_gather, token_prepare, token_scores, token_scores_by_hand, paged_prepare, paged_write
MODULES += token_gather_by_hand, token_prompt, token_work
KERNELS += "gather_kernel", "_merge_lists"
for module in MODULES:
    module.starts_early = lambda *_: {"EARLY": 2, "launch_pdl": True}
    for name in KERNELS:
        if hasattr(module, name):
            setattr(module, name, Launch(getattr(module, name)))


def build(dtype, heads, groups, dim, value_dim, length=5000, bits=None, batch=3, **choice):
    config = aqua.AquaConfig(**{"share": "group", "score_bits": 8} | choice)
    units = torch.ones(groups, dim), torch.zeros(groups, dim)
    plan = LayerPlan(torch.zeros(groups, dim, dim), units[0], config, 0.1, key_scale=units[0], key_mean=units[1])
    given = dict(dtype=dtype, device="cpu", bits=bits, score_bits=config.score_bits)
    cache = ScoredCache.empty(batch, value_dim, length, score_quantization(plan), **given)
    states = (torch.zeros(batch, n, w, dtype=dtype) for n, w in ((heads, dim), (groups, dim), (groups, value_dim)))
    states, output = list(states), torch.zeros(batch, heads, value_dim, dtype=dtype)
    splits = 16 if length > 1 else 1
    by_hand = dtype != torch.float32 and heads // groups <= 8
    for chunks, placed in ((1, False), (8, by_hand)):
        work = TokenWork.of(cache, heads, plan.k, splits=splits, chunks=chunks, by_hand=placed)
        token_step.selected_step(*states, cache, plan, work, output, scaling=0.1)


def build_pages(dtype, heads, groups, dim, value_dim, block_size=64, batch=3, **choice):
    config = aqua.AquaConfig(share="group", score_bits=8, **choice)
    units = torch.ones(groups, dim), torch.zeros(groups, dim)
    plan = LayerPlan(torch.zeros(groups, dim, dim), units[0], config, 0.1, key_scale=units[0], key_mean=units[1])
    width = scored_content(dim, value_dim, dtype.itemsize) // dtype.itemsize
    pages = ScoredPages(torch.zeros(9, groups, block_size, width, dtype=dtype), dim, value_dim, scoring=units)
    states = [torch.zeros(batch, n, w, dtype=dtype) for n, w in ((heads, dim), (groups, dim), (groups, value_dim))]
    counts = torch.zeros(batch, dtype=torch.int32)
    step = Step(torch.zeros(batch, 500, dtype=torch.int32), counts, counts.long(), counts)
    memory = TokenMemory(batch, 250, token_pages.shape_of(heads, value_dim, plan), dtype, torch.device("cpu"))
    by_hand = dtype != torch.float32 and heads // groups <= 8
    sequences, output = PagedSequences(pages, step.block_table, counts, memory.tiles), torch.zeros_like(states[0])
    for placed in {False, by_hand}:
        work = replace(memory.work(batch), by_hand=placed)
        paged_prepare.prepare_paged(*states, pages, plan, step, work)
        token_step.attend_selected(sequences, plan, work, output, scaling=0.1, appended=False)
    paged_write.write_paged(*states[1:], pages, plan.rotation, step.slots)


def build_prompt(dtype, heads, groups, dim, value_dim, queries=200, tokens=300, **choice):
    plan = LayerPlan.of(torch.zeros(groups, dim, dim), torch.ones(groups, dim), aqua.AquaConfig(**choice), 0.1)
    query, key = torch.zeros(1, heads, queries, dim, dtype=dtype), torch.zeros(1, groups, tokens, dim, dtype=dtype)
    token_prompt.rotate_and_narrow = lambda *_, **options: (query, query, None)
    token_prompt.attend_prompt(plan.call(query, key, key[..., :value_dim]), plan)


for given in CASES:
    {None: build, "pages": build_pages, "prompt": build_prompt}[given.pop("of", None)](**given)
print("done")
"""
)
CASES = {
    "share": "dict(dtype=torch.bfloat16, heads=32, groups=8, dim=128, value_dim=128, k_ratio=0.25, select_p=0.95, "
    "length=32768)",
    "count": "dict(dtype=torch.bfloat16, heads=32, groups=8, dim=128, value_dim=128, k_ratio=0.25, select_tokens=500)",
    "odd": "dict(dtype=torch.float16, heads=6, groups=2, dim=80, value_dim=96, k_ratio=0.3, select_p=0.9)",
    "wide group": "dict(dtype=torch.bfloat16, heads=16, groups=1, dim=256, value_dim=256, k_ratio=0.25, select_p=0.9)",
    "int8": "dict(dtype=torch.bfloat16, heads=32, groups=8, dim=128, value_dim=128, k_ratio=0.25, "
    "select_tokens=9, bits=8)",
    "int8, odd": "dict(dtype=torch.float16, heads=6, groups=2, dim=80, value_dim=96, k_ratio=0.3, "
    "select_p=0.9, bits=8)",
    "int8, pieces of keys": "dict(dtype=torch.float16, heads=6, groups=2, dim=112, value_dim=64, k_ratio=0.3, "
    "select_p=0.9, bits=8, score_bits=4, batch=2000)",
    "4 bits": "dict(dtype=torch.bfloat16, heads=32, groups=8, dim=128, value_dim=128, k_ratio=0.25, select_p=0.95, "
    "length=32768, score_bits=4)",
    "4 bits, int8, odd": "dict(dtype=torch.float16, heads=6, groups=2, dim=80, value_dim=96, k_ratio=0.3, "
    "select_p=0.9, bits=8, score_bits=4)",
    "4 bits, all, float32": "dict(dtype=torch.float32, heads=2, groups=2, dim=64, value_dim=64, k_ratio=1.0, "
    "select_p=0.9, score_bits=4)",
    "ones": "dict(dtype=torch.bfloat16, heads=4, groups=1, dim=64, value_dim=64, k_ratio=0.5, select_tokens=1, "
    "length=1, batch=1, sink=1, recent=1, min_length=1)",
    "window": "dict(dtype=torch.bfloat16, heads=8, groups=2, dim=128, value_dim=128, k_ratio=0.25, select_p=0.9, "
    "sink=40, recent=96)",
    "float32": "dict(dtype=torch.float32, heads=2, groups=2, dim=64, value_dim=64, k_ratio=0.5, select_p=0.9)",
    "pages": "dict(of='pages', dtype=torch.bfloat16, heads=32, groups=8, dim=128, value_dim=128, k_ratio=0.25, "
    "select_p=0.95)",
    "pages, odd": "dict(of='pages', dtype=torch.float16, heads=6, groups=2, dim=80, value_dim=96, k_ratio=0.3, "
    "select_tokens=500, block_size=32, batch=1)",
    "pages, float32": "dict(of='pages', dtype=torch.float32, heads=4, groups=2, dim=64, value_dim=64, k_ratio=1.0, "
    "select_p=0.9)",
    "prompt": "dict(of='prompt', dtype=torch.bfloat16, heads=32, groups=8, dim=128, value_dim=128, select_p=0.9)",
    "prompt, long": "dict(of='prompt', dtype=torch.bfloat16, heads=2, groups=1, dim=128, value_dim=128, "
    "select_p=0.9, tokens=20000)",
    "prompt, odd": "dict(of='prompt', dtype=torch.float16, heads=6, groups=2, dim=80, value_dim=64, select_tokens=9)",
    "prompt, float32": "dict(of='prompt', dtype=torch.float32, heads=12, groups=2, dim=128, value_dim=128, "
    "select_p=0.9, sink=0, recent=0)",
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_that_choose_tokens_compile_for_hopper(case, tmp_path):
    kernels = compiled(CODE, CASES[case], tmp_path)
    names = [line.split()[0] for line in kernels]
    if case.startswith("prompt"):
        assert set(names) == {"sum_scores", "weigh", "find_least", "attend_rows"}
        return
    expected = {"_score_tokens", "_choose_tokens", "_attend_to_tokens"}
    expected |= {"_prepare_paged", "_write_paged"} if case.startswith("pages") else {"_prepare_tokens"}
    if case != "wide group" and "float32" not in case:
        expected |= {"score_kernel"}
        # Those called odd have values of 96 dimensions.
        expected |= set() if "pages" in case or "odd" in case else {"gather_kernel", "_merge_lists"}
    assert set(names) == expected
