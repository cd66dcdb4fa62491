# SPDX-License-Identifier: Apache-2.0
"""The kernels for codes of 8 bits, against the store in plain torch: in triton's interpreter here."""

from __future__ import annotations

import pytest
import torch
from decoding import DEVICE, random

from aqua_attention.cache import quantized
from aqua_attention.cache.quantized import Quantized

pytest.importorskip("triton")
from aqua_attention.ops.backends.triton import Triton, codes

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
STEPS = 1.6
"""The kernel may be so many codes from the plain one: the interpreter rounds scales to bfloat16 otherwise."""


def store(width, is_key):
    scale, mean = random(2, width, seed=3).abs() + 0.1, 3 * random(2, width, seed=4)
    return Quantized(8, 64, *((scale, mean) if is_key else ()))


def read(width, is_key, states):
    """What a store gives back of states in two pieces, and its scales."""
    held = store(width, is_key)
    held.append(states[:, :, :170])
    held.append(states[:, :, 170:])
    return held.read(), held._scales.read()


@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_store_with_kernels_holds_what_one_without_holds(width, is_key, dtype, monkeypatch):
    states = (5 * random(2, 2, 400, width + 3, seed=1, dtype=dtype))[..., :width]
    monkeypatch.setattr(quantized, "encoder", lambda _: None)
    plain, scales = read(width, is_key, states)
    monkeypatch.setattr(quantized, "encoder", lambda _: Triton())
    found, _ = read(width, is_key, states)
    step = scales.float() * (store(width, is_key)._channels[0] if is_key else 1)
    rounded = step.shape[2]
    assert (plain != states).any()
    difference = (found - plain)[:, :, :rounded].float().abs()
    assert (difference <= STEPS * step + 4 * torch.finfo(dtype).eps * plain[:, :, :rounded].abs()).all()
    assert torch.equal(found[:, :, rounded:], states[:, :, rounded:])


def test_a_nan_spoils_its_own_token_only():
    states = random(1, 2, 5, 32, seed=0)
    states[0, 1, 3, 7] = torch.nan
    back = torch.empty_like(states)
    codes.widen(*codes.encode(states, None), None, back)
    spoilt = torch.zeros(1, 2, 5, 1, dtype=torch.bool, device=DEVICE)
    spoilt[0, 1, 3] = True
    assert torch.equal(back.isnan(), spoilt.expand(back.shape))
