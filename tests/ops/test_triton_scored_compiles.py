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
import torch
import aqua_attention as aqua
from aqua_attention.ops.backends.triton import token_choice, token_gather, token_prepare, token_scores
from aqua_attention.ops.backends.triton import token_scores_by_hand, token_step
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization

KERNELS = ("_prepare_tokens", "_score_tokens", "score_kernel", "_choose_tokens", "_attend_to_tokens")
for module in (token_choice, token_gather, token_prepare, token_scores, token_scores_by_hand):
    module.starts_early = lambda *_: {"EARLY": True, "launch_pdl": True}
    for name in KERNELS:
        if hasattr(module, name):
            setattr(module, name, Launch(getattr(module, name)))


def build(dtype, heads, groups, dim, value_dim, length=5000, bits=None, batch=3, **choice):
    config = aqua.AquaConfig(share="group", score_bits=8, **choice)
    units = torch.ones(groups, dim), torch.zeros(groups, dim)
    plan = LayerPlan(torch.zeros(groups, dim, dim), units[0], config, 0.1, key_scale=units[0], key_mean=units[1])
    cache = ScoredCache.empty(batch, value_dim, length, score_quantization(plan), dtype=dtype, device="cpu", bits=bits)
    states = (torch.zeros(batch, n, w, dtype=dtype) for n, w in ((heads, dim), (groups, dim), (groups, value_dim)))
    states, output = list(states), torch.zeros(batch, heads, value_dim, dtype=dtype)
    splits = 16 if length > 1 else 1
    by_hand = dtype != torch.float32 and heads // groups <= 8
    for chunks, placed in ((1, False), (8, by_hand)):
        work = TokenWork.of(cache, heads, plan.k, splits=splits, chunks=chunks, by_hand=placed)
        token_step.selected_step(*states, cache, plan, work, output, scaling=0.1)


for given in CASES:
    build(**given)
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
    "ones": "dict(dtype=torch.bfloat16, heads=4, groups=1, dim=64, value_dim=64, k_ratio=0.5, select_tokens=1, "
    "length=1, batch=1, sink=1, recent=1, min_length=1)",
    "float32": "dict(dtype=torch.float32, heads=2, groups=2, dim=64, value_dim=64, k_ratio=0.5, select_p=0.9)",
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_that_choose_tokens_compile_for_hopper(case, tmp_path):
    kernels = compiled(CODE, CASES[case], tmp_path)
    names = [line.split()[0] for line in kernels]
    expected = {"_prepare_tokens", "_score_tokens", "_choose_tokens", "_attend_to_tokens"}
    assert set(names) == expected | (set() if case in ("wide group", "float32") else {"score_kernel"})
