# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/memcheck.py --select` runs the kernels that choose tokens: a small part of it in triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from pages.files import ROOT


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.select) for part in (6, 24, 51))])
def test_steps_that_choose_tokens_run_over_the_end_of_a_cache(monkeypatch, part):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memcheck

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.sm_count", lambda _: 2)
    assert memcheck.main_select(part, 72, device, [{}]) == 8
