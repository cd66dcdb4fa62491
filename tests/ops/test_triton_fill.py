# SPDX-License-Identifier: Apache-2.0
"""The kernel that fills a tiled cache, against the plain path: in triton's interpreter here."""

from __future__ import annotations

import pytest
import torch
from decoding import DEVICE, layout, random

import aqua_attention as aqua
from aqua_attention.ops.backend import Backend, load
from aqua_attention.ops.layout import TiledCache

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LENGTHS = [(1, 0), (128, 127), (130, 128), (257, 256), (600, 385)]


def filled(backend, lengths, kept, value_dim, dtype, name, order=None):
    """A cache of 2 heads with room for more, every number of which was something else before."""
    batch, length = len(lengths), max(lengths)
    keys, values = (random(batch, 2, length, width, seed=width, dtype=dtype) for width in (kept, value_dim + 1))
    cache = TiledCache(
        batch, 2, kept, value_dim, length + 200, dtype, DEVICE, **layout(name, batch, 2, kept, length + 200)
    )
    for held in (cache.tiles, cache.tail, cache.values):
        held.fill_(7)
    # Neither is contiguous, and what lies behind a sequence must not be read.
    keys, values = keys.transpose(1, 2).contiguous().transpose(1, 2), values[..., :value_dim]
    backend.fill(cache, keys, values, torch.tensor(lengths, device=DEVICE), order)
    return cache


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["plain", "int8", "32", "int8 64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_tail_and_values_are_those_of_the_plain_path(lengths, name, dtype):
    kept, value_dim = (48, 80) if dtype == torch.float32 else (64, 64)
    expected = filled(Backend(), lengths, kept, value_dim, dtype, name)
    found = filled(load("triton"), lengths, kept, value_dim, dtype, name)
    assert found.lengths.tolist() == list(lengths)
    assert torch.equal(found.tail, expected.tail)
    if "int8" not in name:
        assert torch.equal(found.tiles, expected.tiles)
        assert torch.equal(found.values, expected.values)
        return
    for mine, plain in ((found.key_scales, expected.key_scales), (found.value_scales, expected.value_scales)):
        # The interpreter rounds to bfloat16 otherwise.
        torch.testing.assert_close(mine, plain, rtol=2**-7, atol=0)
    steps = expected.key_scales.max() * expected.quantization.channel_scale[:, None], expected.value_scales.max()
    states = found.read(dtype=torch.float32), expected.read(dtype=torch.float32)
    for mine, plain, step in zip(*states, steps, strict=True):
        assert ((mine - plain).abs() <= 2 * step).all()


def test_padding_anywhere_is_left_out():
    real = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.3
    real[0, :150] = False
    order, lengths = (~real).to(torch.int8).sort(dim=-1, stable=True).indices, real.sum(-1)
    keys, values = (random(2, 3, 300, 32, seed=seed) for seed in (1, 2))
    cache = TiledCache(2, 3, 32, 32, 300, torch.float32, DEVICE)
    load("triton").fill(cache, keys, values, lengths, order)
    for row, held in enumerate(zip(*cache.read(), strict=True)):
        for states, given in zip(held, (keys, values), strict=True):
            assert torch.equal(states[:, : lengths[row]], given[row, :, real[row]])


def test_a_prompt_that_does_not_fit_is_refused():
    cache = TiledCache(1, 2, 32, 32, 200, torch.float32, DEVICE)
    states = random(1, 2, 201, 32, seed=0)
    with pytest.raises(aqua.AquaError, match="do not fit a cache of keys"):
        load("triton").fill(cache, states, states, torch.tensor([201], device=DEVICE))
    assert cache.lengths.tolist() == [0]
