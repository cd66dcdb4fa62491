# SPDX-License-Identifier: Apache-2.0
"""The decoding kernel whose registers are placed by hand: when it is taken, and that it equals the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plain import attention_mass, decode, prepare, select_dimensions

import aqua_attention as aqua
from aqua_attention.ops.select import rotate

pytest.importorskip("triton")
from decoding import (
    CODES_EPS,
    DEVICE,
    as_mask,
    check,
    layout,
    random,
    uninitialised_memory_is_nan,  # noqa: F401
)

from aqua_attention.ops.backends.triton import blocks
from aqua_attention.ops.backends.triton import decode as gpu_decode
from aqua_attention.ops.layout import TILE, TiledCache

BY_HAND = {
    "int8": ((8, 2), (128, 128, 128), {"k_ratio": 0.5}, torch.bfloat16),
    "int8 in pages of 32": ((4, 4), (128, 96, 64), {"k_ratio": 0.3}, torch.float16),
    "int8 in pages of 64": ((6, 1), (80, 80, 128), {"logit_error": 0.2}, torch.float16),
    "int8 in pages of 128": ((8, 1), (64, 64, 64), {"k_ratio": 1.0}, torch.bfloat16),
    # Fewer blocks of dimensions than are read ahead.
    "int8, 13 dimensions": ((8, 2), (128, 128, 128), {"k_ratio": 0.1}, torch.bfloat16),
    "int8, 48 dimensions in pages of 64": ((8, 2), (96, 96, 64), {"k_ratio": 0.5}, torch.float16),
}


def test_programs_by_hand_fill_the_gpu_in_rounds(monkeypatch):
    monkeypatch.setattr(gpu_decode, "sm_count", lambda _: 132)
    query = torch.empty(0)
    # Of 1056 at once: one round where sequences are short, two where long, more where these do not fit.
    for rows, tiles, expected in (
        (64, 256, 16),
        (256, 256, 8),
        (64, 1024, 33),
        (300, 64, 7),
        (8, 256, 64),
        (32, 72, 18),
    ):
        assert gpu_decode.splits_by_hand(rows, tiles, query) == expected, (rows, tiles)
    for rows in (1, 7, 1056, 1057, 5000):
        for tiles in (1, 5, 4096):
            assert 1 <= gpu_decode.splits_by_hand(rows, tiles, query) <= gpu_decode.MOST_BY_HAND


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_HAND)
def test_the_kernel_placed_by_hand_equals_the_reference(name, monkeypatch):
    """Ragged rows, whole steps over the moment at which a tile is filled, the last of them replayed from a graph."""
    monkeypatch.setattr("aqua_attention.ops.backends.triton.decode.BY_HAND_TILES", 1)
    (count, groups), (head_dim, kept, value_dim), choice, dtype = BY_HAND[name]
    lengths, scaling = torch.tensor([1020, 1, 300, 2049]), head_dim**-0.5
    config = aqua.AquaConfig.paper(**choice, selection="weighted", share="group", s_ratio=1 - kept / head_dim)
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=1))[0][..., :kept].contiguous()
    rms = random(groups, kept, seed=2).abs() + 0.1
    keys, values = (random(4, groups, 2100, n, seed=n, dtype=dtype) for n in (kept, value_dim))
    cache = TiledCache(4, groups, kept, value_dim, 2100, dtype, DEVICE, **layout(name, 4, groups, kept, 2100))
    cache.fill(keys[:, :, :2049], values[:, :, :2049], lengths.to(DEVICE))
    query, key, value = (
        random(4, n, w, seed=7, dtype=dtype) for n, w in ((count, head_dim), (groups, head_dim), (groups, value_dim))
    )
    mass = torch.full((4, groups, cache.count * TILE), torch.nan, device=DEVICE)

    def step(mass=None, splits=None):
        wide, taken = prepare(query, key, value, cache, rotation, rms, config)
        given = {"sink": 3, "recent": 20, "appended": True, "scaling": scaling, "mass": mass, "splits": splits}
        return decode(wide, taken, cache, **given), wide, taken

    def expect(found, wide):
        selected = select_dimensions(wide[:, :, None], config, head_dim, rms)
        held = cache.read(dtype=torch.float32)
        check(found, wide, *held, selected, cache.lengths.tolist(), CODES_EPS, sink=3, recent=20, scaling=scaling)
        return selected

    for turn in range(6):
        found, wide, _ = step(mass if turn == 5 else None, splits=[None, 1, 5][turn % 3])
        selected = expect(found, wide)
    for row, length in enumerate(cache.lengths.tolist()):
        held = cache.read(rows=[row], dtype=torch.float32)[0]
        counted = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
        mask = None if selected is None else selected[row : row + 1]
        one = wide[row : row + 1, :, None].float()
        expected = attention_mass(one, held, mask, counted, sink=3, recent=20, scaling=scaling)[0]
        assert torch.allclose(mass[row, :, :length], expected, rtol=0, atol=8 * CODES_EPS * count / groups)
        assert (mass[row, :, length:] == 0).all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, wide, _ = step()
    for _ in range(3):
        graph.replay()
        expect(found, wide)
    assert cache.lengths.tolist() == [1029, 10, 309, 2058]
    assert not cache.arrived.any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "int8"])
def test_recorded_steps_of_several_layers_do_not_meet(name, monkeypatch):
    """Kernels that start early, one step after the other on other caches, with nothing between: what one reads too
    early, or from the cache of a processor, is another step's. The second step moves a tile.
    """
    monkeypatch.setattr("aqua_attention.ops.backends.triton.decode.BY_HAND_TILES", 1)
    torch.use_deterministic_algorithms(False)  # which fills new memory by a kernel, and so keeps the others apart
    heads, groups, dim, dtype, starts = 8, 2, 128, torch.bfloat16, [1500, 1536, 2047, 700]
    config = aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=3, recent=20)
    layers = []
    for seed, start in enumerate(starts):
        rotation = torch.linalg.qr(random(groups, dim, dim, seed=seed))[0].contiguous()
        rms = random(groups, dim, seed=seed + 10).abs() + 0.1
        cache = TiledCache(2, groups, dim, dim, 2200, dtype, DEVICE, **layout(name, 2, groups, dim, 2200, seed))
        keys, values = (random(2, groups, start, dim, seed=seed + n, dtype=dtype) for n in (20, 30))
        cache.fill(keys, values, torch.tensor([start, start - 300], device=DEVICE))
        new = [3 * random(2, count, dim, seed=seed + 40, dtype=dtype) for count in (heads, groups, groups)]
        layers.append((new, cache, rotation, rms))

    def steps():
        found = []
        for new, cache, rotation, rms in layers:
            wide, taken = prepare(*new, cache, rotation, rms, config)
            found.append((decode(wide, taken, cache, sink=3, recent=20, appended=True), wide, taken))
        return found

    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps()
    for _ in range(3):
        for new, *_ in layers:
            for states in new:
                states.mul_(-1.01)
        graph.replay()
        torch.cuda.synchronize()
        for (output, wide, taken), (new, cache, rotation, rms) in zip(found, layers, strict=True):
            expected = rotate(new[0][:, :, None], rotation)[:, :, 0]
            assert torch.allclose(wide.float(), expected.float(), rtol=0.01, atol=0.1)
            selected = select_dimensions(wide[:, :, None], config, dim, rms)
            assert torch.equal(as_mask(taken, wide), selected)
            held = cache.read(dtype=torch.float32)
            eps = CODES_EPS if name == "int8" else 0.0
            check(output, wide, *held, selected, cache.lengths.tolist(), eps, sink=3, recent=20)


def test_an_older_triton_starts_nothing_early_and_places_no_registers(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, shape=(32, 8, 128))
    cache = SimpleNamespace(quantization=True, lengths=[1024] * 32, shape=(32, 2, 128, 128, 65536), count=512)
    monkeypatch.setattr(gpu_decode, "sm_count", lambda _: 132)
    monkeypatch.setattr(blocks, "_gpu", lambda _: SimpleNamespace(major=9))
    monkeypatch.setattr(gpu_decode, "VERSION", (3, 6))
    monkeypatch.setattr(blocks, "VERSION", (3, 6))
    assert gpu_decode.is_by_hand(on_gpu, cache) and blocks.starts_early(on_gpu)["EARLY"]
    monkeypatch.setattr(gpu_decode, "VERSION", (3, 5))
    monkeypatch.setattr(blocks, "VERSION", (3, 4))
    assert not gpu_decode.is_by_hand(on_gpu, cache) and blocks.starts_early(on_gpu) == {"EARLY": False}
