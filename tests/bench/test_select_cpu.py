# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a step that chooses tokens on a CPU: nothing is timed that plain torch does not find too."""

from dataclasses import replace

import pytest
import torch

from aqua_attention.bench.problem import OURS, Problem
from aqua_attention.bench.select_cpu import select_way
from aqua_attention.errors import AquaError
from aqua_attention.machine import Shape
from aqua_attention.ops.backends.cpu import Cpu, build

pytestmark = pytest.mark.skipif(build.no_kernel_reason() is not None, reason=str(build.no_kernel_reason()))


def problem(dtype):
    return Problem.random(Shape(torch.device("cpu"), 6, 2, 32, dtype), batch=1, length=400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", [{"select_tokens": 32, "score_bits": 8}, {"select_p": 1.0}])
def test_a_way_is_checked_and_says_what_it_reads(choice, dtype):
    way = select_way(problem(dtype), replace(OURS, k_ratio=0.5, **choice))
    assert way.facts["read"] == (0.25 if "select_tokens" in choice else 1.0)
    for part in ("step", "attention", "step"):
        assert way.run(part, 400) > 0
        assert way.layer.stored == 400


def test_what_is_wrong_is_not_timed(monkeypatch):
    attend = Cpu.attend

    def wrong(self, call, plan):
        attended = attend(self, call, plan)
        return attended._replace(output=1.01 * attended.output)

    monkeypatch.setattr(Cpu, "attend", wrong)
    with pytest.raises(AquaError, match="choosing tokens is wrong: 0 others are read"):
        select_way(problem(torch.float32), replace(OURS, select_p=0.9))
