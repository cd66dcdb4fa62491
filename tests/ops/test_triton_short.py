# SPDX-License-Identifier: Apache-2.0
"""A whole step in one launch against the reference, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aqua_attention as aqua
from aqua_attention.ops.select import rotate

pytest.importorskip("triton")
from decoding import DEVICE, HEADS, PHASES, check, layout, random

from aqua_attention.ops.tiled import TILE, TiledCache
from aqua_attention.ops.triton import step as gpu_step
from aqua_attention.ops.triton.decode import decode
from aqua_attention.ops.triton.decode_short import decode_short
from aqua_attention.ops.triton.prepare import prepare
from aqua_attention.ops.triton.step import decode_step, splits_of_short

# The interpreter computes bfloat16 wrongly, without a word.
DTYPES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [torch.float32])


@settings(max_examples=24 if DEVICE == "cuda" else 10, deadline=None, phases=PHASES)
@given(
    heads=st.sampled_from(HEADS),
    widths=st.sampled_from([(64, 64, 64), (64, 48, 64), (32, 32, 16), (80, 72, 80), (128, 128, 128)]),
    start=st.sampled_from([0, 1, 120, 248, 380, 508, 636]),
    splits=st.integers(0, 6),
    name=st.sampled_from(["plain", "pages of 32", "pages of 64", "pages of 128"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_one_launch_is_dense_attention(heads, widths, start, splits, name, dtype, seed):
    """Rows of two lengths, over the moments at which a tile is filled; the last steps find the second row full."""
    (count, groups), (head_dim, kept, value_dim), steps = heads, widths, 10
    lengths = [start, start + 5]
    total = -(-(start + 13) // TILE) * TILE
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=seed))[0][..., :kept].contiguous()
    keys, values = (random(2, groups, start + 20, head_dim, seed=seed + n, dtype=dtype) for n in (1, 2))
    values = values[..., :value_dim].contiguous()
    queries = random(2, count, steps, head_dim, seed=seed + 3, dtype=dtype)
    rotated = rotate(keys, rotation)
    cache = TiledCache(2, groups, kept, value_dim, total, dtype, DEVICE, **layout(name, 2, groups, kept, total, seed))
    cache.fill(rotated[:, :, : start + 5], values[:, :, : start + 5], torch.tensor(lengths, device=DEVICE))
    rows = torch.arange(2, device=DEVICE)
    for step in range(steps):
        place = torch.tensor(lengths, device=DEVICE)
        given = queries[:, :, step], keys[rows, :, place], values[rows, :, place], cache, rotation
        found, wide = decode_short(*given, splits=splits, scaling=head_dim**-0.5)
        expected = rotate(queries[:, :, step, None], rotation)[:, :, 0]
        assert torch.allclose(wide.float(), expected.float(), rtol=0, atol=4 * torch.finfo(dtype).eps * 8)
        lengths = [min(length + 1, total) for length in lengths]
        assert cache.lengths.tolist() == lengths and not cache.arrived.any()
        check(found, wide, rotated, values, None, lengths, scaling=head_dim**-0.5)
    for row, length in enumerate(lengths):
        for held, whole in zip(cache.read(rows=[row]), (rotated, values), strict=True):
            limit = 8 * torch.finfo(dtype).eps * float(whole.abs().max())
            assert torch.allclose(held[0, :, :length].float(), whole[row, :, :length].float(), rtol=0, atol=limit)


def problem_of_step(dtype=torch.float16, room=300, rounded=False, batch=1):
    name = "int8" if rounded else "plain"
    cache = TiledCache(batch, 2, 32, 32, room, dtype, DEVICE, **layout(name, batch, 2, 32, room))
    keys, values = (random(batch, 2, 140, 32, seed=seed, dtype=dtype) for seed in (1, 2))
    cache.fill(keys, values, torch.full((batch,), 140))
    new = (random(batch, heads, 32, seed=seed, dtype=dtype) for seed, heads in ((3, 4), (4, 2), (5, 2)))
    rotation = torch.linalg.qr(random(2, 32, 32, seed=6))[0].contiguous()
    return *new, cache, rotation, torch.ones(2, 32, device=DEVICE)


@pytest.mark.parametrize(
    ("choice", "options", "expected"),
    [
        ({"k_ratio": 1.0}, {}, True),
        ({"k_ratio": 0.5}, {}, False),
        # 300 tokens are three tiles, of which every one can be filled.
        ({"k_ratio": 0.5, "min_length": 3 * TILE + 1}, {}, True),
        ({"k_ratio": 0.5, "min_length": 3 * TILE}, {}, False),
        ({"logit_error": 0.1}, {}, False),
        ({"logit_error": 0.1, "min_length": 4 * TILE}, {}, True),
        ({"k_ratio": 1.0}, {"dtype": torch.float32}, False),
        ({"k_ratio": 1.0}, {"rounded": True}, False),
        ({"k_ratio": 1.0}, {"room": (gpu_step.SHORT_TILES + 1) * TILE}, False),
        ({"k_ratio": 1.0}, {"batch": 40}, True),
        ({"k_ratio": 1.0}, {"batch": 40, "room": 30 * TILE}, False),
    ],
)
def test_one_launch_is_taken_where_every_dimension_counts(monkeypatch, choice, options, expected):
    monkeypatch.setattr(gpu_step, "processors", lambda _: 132)
    given = problem_of_step(**options)
    config = aqua.AquaConfig(**choice, share="group")
    assert (splits_of_short(given[0], given[3], config) is not None) == expected


def test_both_ways_of_a_step_agree():
    config = aqua.AquaConfig(k_ratio=0.5, min_length=1000, share="group", sink=3, recent=20)
    given, again = problem_of_step(), problem_of_step()
    assert splits_of_short(given[0], given[3], config) is not None
    found, wide, taken = decode_step(*given, config)
    assert taken is None
    expected, chosen = prepare(*again, config)
    assert torch.equal(wide, expected)
    expected = decode(expected, chosen, again[3], sink=3, recent=20, appended=True)
    assert torch.allclose(found, expected, rtol=0, atol=4e-3)
    for one, other in zip(given[3].read(), again[3].read(), strict=True):
        assert torch.equal(one, other)


def test_one_launch_refuses_what_does_not_fit():
    query, key, value, cache, rotation, rms = problem_of_step()
    config = aqua.AquaConfig(k_ratio=1.0, share="group")
    with pytest.raises(aqua.AquaError, match="key is"):
        decode_step(query, key[:, :1], value, cache, rotation, rms, config)


@pytest.mark.gpu
def test_recorded_steps_are_steps():
    """Kernels that start early, one behind the other, in a graph: each sees what the one before has written."""
    query, key, value, cache, rotation, rms = problem_of_step(dtype=torch.bfloat16, room=700)
    config = aqua.AquaConfig(k_ratio=1.0, share="group")
    start = cache.lengths.clone()
    expected = [decode_step(query, key, value, cache, rotation, rms, config)[0] for _ in range(300)]
    cache.lengths.copy_(start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [decode_step(query, key, value, cache, rotation, rms, config)[0] for _ in range(300)]
    graph.replay()
    assert cache.lengths.tolist() == [440]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=0, atol=1e-2)
