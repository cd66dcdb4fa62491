# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention for the last part of a prompt, on a GPU."""

import pytest
import torch

pytest.importorskip("vllm")

from aqua_attention.ops import dense
from aqua_attention.ops.reference import attention_reference
from aqua_attention.vllm.prefill import flash_attention


@pytest.mark.gpu
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("queries", [64, 1000])
def test_queries_are_the_last_of_the_keys(flash, queries, monkeypatch):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
        for heads, length in ((8, queries), (2, 2048), (2, 2048))
    )
    monkeypatch.setattr(dense, "fewer_queries_kernel", flash_attention if flash else None)
    assert dense.takes_fewer_queries(query, key, value)
    output, lse = dense.attention_with_lse(query, key, value, 0.1)
    exact = [states.double() for states in (query, key, value)]
    expected = attention_reference(*exact, None, scaling=0.1)
    assert (output.double() - expected).norm() <= 0.02 * expected.norm()
    scores = exact[0] @ exact[1].repeat_interleave(4, 1).transpose(-1, -2) * 0.1
    hidden = torch.arange(2048, device="cuda") > torch.arange(2048 - queries, 2048, device="cuda")[:, None]
    assert torch.allclose(lse.double(), scores.masked_fill(hidden, -torch.inf).logsumexp(-1), atol=2e-2)
