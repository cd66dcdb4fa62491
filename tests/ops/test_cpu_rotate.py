# SPDX-License-Identifier: Apache-2.0
"""New states that C rotates are those of plain torch."""

from __future__ import annotations

import pytest
import torch

from aqua_attention.ops.backend import load, rotate
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.ops.backends.cpu.rotate import MOST_TOKENS
from aqua_attention.ops.select import rotate as rotate_plainly

REASON = no_kernel_reason()
compiled = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def states_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "dim", "kept"),
    [(3, 3, 1, 64, 64), (8, 2, 1, 64, 48), (14, 2, MOST_TOKENS, 33, 7), (1, 1, 2, 128, 128), (2, 2, 1, 256, 256)],
)
def test_states_are_rotated_as_plainly(dtype, batch, heads, kv_heads, length, dim, kept):
    states = states_of(batch, heads, length, 2 * dim, dtype=dtype)[..., :dim]  # not contiguous
    rotation = torch.linalg.qr(states_of(kv_heads, dim, dim, seed=1)).Q[..., :kept]
    assert load("cpu").why_not_rotate(states, rotation) is None
    found, expected = rotate(states, rotation), rotate_plainly(states, rotation)
    assert found.shape == expected.shape and found.dtype == dtype
    exact = rotate_plainly(states.double(), rotation.double())
    # A sum in another order may round the other way.
    assert (found.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max() + 1e-6


@compiled
def test_nan_stays_in_its_head():
    states, rotation = states_of(1, 2, 1, 16), states_of(2, 16, 16, seed=1)
    states[0, 0, 0, 3] = torch.nan
    found = rotate(states, rotation)
    assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()


def test_what_it_does_not_take_is_rotated_by_torch():
    backend, rotation = load("cpu"), states_of(2, 16, 16)
    states = states_of(1, 2, MOST_TOKENS + 1, 16)
    assert "few new states" in backend.why_not_rotate(states, rotation)
    assert "takes float32" in backend.why_not_rotate(states[:, :, :1].half(), rotation)
    assert "no gradient" in backend.why_not_rotate(states[:, :, :1].requires_grad_(), rotation)
    wide = states_of(1, 1, 1, 512), states_of(1, 512, 512)
    assert "takes float32" in backend.why_not_rotate(*wide)
    for each, turn in ((states, rotation), (states[:, :, :1].half(), rotation), wide):
        assert torch.allclose(rotate(each, turn).float(), rotate_plainly(each, turn).float())
