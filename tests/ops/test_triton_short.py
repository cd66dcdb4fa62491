# SPDX-License-Identifier: Apache-2.0
"""A whole step in one launch against the reference, and when it is taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain import decode, prepare, splits_of_short
from plain import gpu_decode_step as decode_step

import aqua_attention as aqua
from aqua_attention.ops.select import rotate

pytest.importorskip("triton")
from decoding import (
    DEVICE,
    HEADS,
    PHASES,
    check,
    layout,
    random,
    uninitialised_memory_is_nan,  # noqa: F401
)

from aqua_attention.bench.decode import at_one_length
from aqua_attention.ops.backends.triton import step as gpu_step
from aqua_attention.ops.backends.triton.decode_short import decode_short
from aqua_attention.ops.layout import TILE, TiledCache

# The interpreter computes bfloat16 wrongly, without a word.
DTYPES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@settings(max_examples=24 if DEVICE == "cuda" else 12, deadline=None, phases=PHASES)
@given(
    heads=st.sampled_from(HEADS),
    widths=st.sampled_from([(64, 64, 64), (64, 48, 64), (32, 32, 16), (80, 72, 80), (128, 128, 128)]),
    starts=st.lists(st.sampled_from([0, 1, 124, 250, 380, 508, 636, 763]), min_size=1, max_size=3),
    splits=st.integers(0, 6),
    name=st.sampled_from(["plain", "pages of 32", "pages of 64", "pages of 128"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@example((4, 2), (64, 64, 64), [124, 250, 0], 0, "plain", torch.float16, 0)
@example((4, 2), (64, 48, 64), [763, 0, 380], 0, "pages of 32", torch.float16, 0)
@example((6, 1), (32, 32, 16), [636, 380, 763], 3, "pages of 64", torch.float16, 0)
def test_one_launch_is_dense_attention(heads, widths, starts, splits, name, dtype, seed):
    """Rows of several lengths, over the moments at which a tile is filled; the longest rows become full."""
    (count, groups), (head_dim, kept, value_dim), steps, batch = heads, widths, 8, len(starts)
    lengths, total = list(starts), -(-(max(starts) + 1) // TILE) * TILE
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=seed))[0][..., :kept].contiguous()
    keys, values = (random(batch, groups, total + steps, head_dim, seed=seed + n, dtype=dtype) for n in (1, 2))
    values = values[..., :value_dim].contiguous()
    queries = random(batch, count, steps, head_dim, seed=seed + 3, dtype=dtype)
    rotated = rotate(keys, rotation)
    options = layout(name, batch, groups, kept, total, seed)
    cache = TiledCache(batch, groups, kept, value_dim, total, dtype, DEVICE, **options)
    for states in (cache.tiles, cache.tail, cache.values):
        states.fill_(torch.nan)  # what nobody has written must not be read
    longest = max(*starts, 1)
    cache.fill(rotated[:, :, :longest], values[:, :, :longest], torch.tensor(lengths, device=DEVICE))
    if (pages := options["pages"]) is not None:
        for row, start in enumerate(starts):
            pages.block_table[row, -(-min(start + steps, total) // pages.block_size) :] = 1 << 30
    rows = torch.arange(batch, device=DEVICE)
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


def problem_of_step(dtype=torch.float16, room=300, is_quantized=False, batch=1):
    name = "int8" if is_quantized else "plain"
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
        ({"k_ratio": 1.0}, {"is_quantized": True}, False),
        ({"k_ratio": 1.0}, {"room": (gpu_step.SHORT_TILES + 1) * TILE}, False),
        ({"k_ratio": 1.0}, {"batch": 40}, True),
        ({"k_ratio": 1.0}, {"batch": 40, "room": 30 * TILE}, False),
    ],
)
def test_one_launch_is_taken_where_every_dimension_counts(monkeypatch, choice, options, expected):
    monkeypatch.setattr(gpu_step, "sm_count", lambda _: 132)
    given = problem_of_step(**options)
    config = aqua.AquaConfig.paper(**choice, share="group")
    assert (splits_of_short(given[0], given[3], config) is not None) == expected


def test_both_ways_of_a_step_agree():
    config = aqua.AquaConfig.paper(k_ratio=0.5, min_length=1000, share="group", sink=3, recent=20)
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
    config = aqua.AquaConfig.paper(k_ratio=1.0, share="group")
    with pytest.raises(aqua.AquaError, match="key is"):
        decode_step(query, key[:, :1], value, cache, rotation, rms, config)
    with pytest.raises(aqua.AquaError, match="recent 129"):
        decode_step(query, key, value, cache, rotation, rms, dataclasses.replace(config, recent=129))
    for options in ({"dtype": torch.float32}, {"is_quantized": True}):
        query, key, value, cache, rotation, _ = problem_of_step(**options)
        with pytest.raises(aqua.AquaError, match="one launch takes 16 bits"):
            decode_short(query, key, value, cache, rotation, splits=1, scaling=1.0)


def test_timed_steps_stay_at_one_length():
    query, key, value, cache, rotation, rms = problem_of_step(batch=3)
    turns, start_again = at_one_length(cache)
    config = aqua.AquaConfig.paper(k_ratio=1.0, share="group")
    for _ in range(2):
        start_again()
        used = [next(turns) for _ in range(4)]
        for each in used:
            decode_step(query, key, value, each, rotation, rms, config)
        assert [each.lengths.tolist() for each in used] == [[141] * 3] * 4
    assert cache.lengths.tolist() == [140] * 3


@pytest.mark.gpu
def test_recorded_steps_are_steps():
    """Kernels that start early, one behind the other, in a graph: each sees what the one before has written."""
    query, key, value, cache, rotation, rms = problem_of_step(dtype=torch.bfloat16, room=700)
    config = aqua.AquaConfig.paper(k_ratio=1.0, share="group")
    held = cache.tiles, cache.tail, cache.values, cache.lengths
    start = [states.clone() for states in held]
    expected = [decode_step(query, key, value, cache, rotation, rms, config)[0] for _ in range(300)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [decode_step(query, key, value, cache, rotation, rms, config)[0] for _ in range(300)]
    # Tokens that came since have the places of older ones in the tail.
    for states, old in zip(held, start, strict=True):
        states.copy_(old)
    graph.replay()
    assert cache.lengths.tolist() == [440]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=0, atol=1e-2)
