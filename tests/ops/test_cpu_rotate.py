# SPDX-License-Identifier: Apache-2.0
"""New states that C rotates are those of plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from aqua_attention.ops.backend import load, rotate
from aqua_attention.ops.backends.cpu import rotate as in_c
from aqua_attention.ops.backends.cpu.build import kernels, no_kernel_reason
from aqua_attention.ops.select import rotate as rotate_plainly

REASON = no_kernel_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True, scope="module")
def loaded():
    kernels()


def states_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "kept"),
    [(3, 3, 64, 64), (8, 2, 64, 48), (14, 2, 33, 7), (1, 1, 128, 128), (2, 2, 256, 256)],
)
def test_states_are_rotated_as_plainly(dtype, batch, heads, kv_heads, dim, kept):
    states = states_of(batch, heads, 1, 2 * dim, dtype=dtype)[..., :dim]  # not contiguous
    rotation = torch.linalg.qr(states_of(kv_heads, dim, dim, seed=1)).Q[..., :kept]
    assert load("cpu").why_not_rotate(states, rotation) is None
    found, expected = rotate(states, rotation), rotate_plainly(states, rotation)
    assert found.shape == expected.shape and found.dtype == dtype
    exact = rotate_plainly(states.double(), rotation.double())
    # A sum in another order may round the other way.
    assert (found.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max() + 1e-6


def test_nan_stays_in_its_head():
    states, rotation = states_of(1, 2, 1, 16), states_of(2, 16, 16, seed=1)
    states[0, 0, 0, 3] = torch.nan
    found = rotate(states, rotation)
    assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()


@pytest.mark.parametrize(
    ("states", "rotation", "reason"),
    [
        (states_of(1, 2, 2, 16), states_of(2, 16, 16), "new token"),
        (states_of(1, 2, 1, 16).half(), states_of(2, 16, 16), "float32 and bfloat16"),
        (states_of(1, 2, 1, 16), states_of(2, 16, 16).double(), "float32 beside"),
        (states_of(1, 2, 1, 16), states_of(2, 16, 16).to("meta"), "beside them"),
        (states_of(1, 1, 1, 512), states_of(1, 512, 512), "too much"),
        (states_of(64, 8, 1, 64), states_of(8, 64, 64), "too much"),
        (states_of(1, 4, 1, 12), states_of(2, 16, 16), "shapes"),
        (states_of(1, 3, 1, 16), states_of(2, 16, 16), "shapes"),
        (torch._neg_view(states_of(1, 2, 1, 16)), states_of(2, 16, 16), "more with these"),
    ],
)
def test_what_it_does_not_take(states, rotation, reason):
    assert reason in load("cpu").why_not_rotate(states, rotation)


def test_shapes_that_do_not_fit_raise_as_in_torch():
    for states in (states_of(1, 4, 1, 12), states_of(1, 3, 1, 16)):
        with pytest.raises(RuntimeError):
            rotate(states, states_of(2, 16, 16))


def test_gradients_and_transforms_see_it():
    states, rotation = states_of(1, 2, 1, 16), states_of(2, 16, 16, seed=1)
    watched = states.clone().requires_grad_()
    rotate(watched, rotation).sum().backward()
    assert torch.allclose(watched.grad, rotation.sum(-1)[None, :, None], atol=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(rotate(forward_ad.make_dual(states, states), rotation)).tangent
    assert torch.allclose(tangent, rotate_plainly(states, rotation))
    mapped = torch.vmap(lambda each: rotate(each, rotation))(torch.stack([states, 2 * states]))
    assert torch.allclose(mapped[1], rotate_plainly(2 * states, rotation))


def test_no_kernel_is_compiled_for_it(monkeypatch):
    class Nothing:
        @staticmethod
        def cache_info():
            return type("Info", (), {"currsize": 0})

    monkeypatch.setattr(in_c, "kernels", Nothing)
    assert load("cpu").why_not_rotate(states_of(1, 2, 1, 16), states_of(2, 16, 16)) == "no kernel is loaded"
