# SPDX-License-Identifier: Apache-2.0
"""`min_length`: queries that see fewer tokens multiply every dimension, in every path, and the others as ever.

Rows of attention do not depend on each other, so what is expected is put together from two runs without `min_length`:
one with every dimension, and one with the choice.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plain import attend, attention_prefill, cpu_decode_step, decode, gpu_decode_step, prepare, select_dimensions

import aqua_attention as aqua
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.ops.layout import TILE, Pages, Quantization, TiledCache
from aqua_attention.ops.mask import APPROXIMATE, EXACT, HIDDEN, WHOLE, short_queries, window_codes
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = [Phase.explicit, Phase.generate]
CHOICES = [{"k_ratio": 0.25}, {"k_ratio": 0.5, "selection": "weighted"}, {"logit_error": 0.2}]
CHOICES += [{"k_ratio": 0.5, "selection": "static"}]
WINDOWS = [(0, 0), (3, 9)]


def random(*shape, seed, dtype=torch.float32, device=DEVICE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def layer(groups, head_dim, kept, seed=0, device=DEVICE):
    """A rotation and root mean squares of keys."""
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=seed, device=device))[0][..., :kept].contiguous()
    return rotation, random(groups, kept, seed=seed + 1, device=device).abs() + 0.1


def test_codes_say_which_queries_are_short():
    places = torch.arange(4)[None]
    visible = (places[:, None, :] <= places[:, :, None])[:, None]
    codes = window_codes(visible, places, places, sink=1, recent=1, min_length=4)
    h, a, e, w = HIDDEN, APPROXIMATE, EXACT, WHOLE
    assert codes.tolist() == [[[[e, h, h, h], [e, e, h, h], [e, w, e, h], [e, a, a, e]]]]
    without = window_codes(visible, places, places, sink=1, recent=1)
    assert without.tolist() == [[[[e, h, h, h], [e, e, h, h], [e, a, e, h], [e, a, a, e]]]]


def test_short_queries_are_counted_by_position_by_sight_or_by_code():
    where = {"queries": 3, "keys": 5, "device": torch.device("cpu")}
    assert short_queries(None, 0, **where) is None
    assert short_queries(None, 5, **where).tolist() == [[[True, True, False]]]
    assert short_queries(None, 4, **where).tolist() == [[[True, False, False]]]
    # Five keys, of which the first two are padding.
    seen = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)[None, None]
    assert short_queries(seen, 3, **where).tolist() == [[[True, True, False]]]
    codes = torch.tensor([[1, 1, 2, 0, 0], [3, 3, 2, 2, 0], [1, 1, 1, 2, 2]], dtype=torch.uint8)[None, None]
    assert short_queries(codes, 3, **where).tolist() == [[[False, True, False]]], "codes carry it already"


def test_a_short_query_selects_every_dimension_and_who_is_short_must_be_said():
    query, rms = random(1, 2, 3, 16, seed=0), torch.ones(1, 16, device=DEVICE)
    config = aqua.AquaConfig.paper(k_ratio=0.25, min_length=3)
    short = torch.tensor([[[True, True, False]]], device=DEVICE)
    selected = select_dimensions(query, config, 16, rms, short=short)
    assert selected.sum(-1).tolist() == [[[16, 16, 4], [16, 16, 4]]]
    plain = select_dimensions(query, aqua.AquaConfig.paper(k_ratio=0.25), 16, rms)
    assert torch.equal(selected[:, :, 2], plain[:, :, 2])
    with pytest.raises(aqua.AquaError, match="it is not said which queries are short"):
        select_dimensions(query, config, 16, rms)
    with pytest.raises(aqua.AquaError, match="only `apply` looks it up"):
        select_dimensions(query, aqua.AquaConfig.paper(min_length="auto"), 16, rms)


def expected_of(given, config, length, mask=None):
    """Every dimension for the queries that see fewer than `length` tokens, the choice of `config` for the others."""
    config = dataclasses.replace(config, min_length=0)
    every = dataclasses.replace(config, k_ratio=1.0, logit_error=None)
    dense, chosen = (attend(*given, one, mask=mask, impl="reference") for one in (every, config))
    queries, keys = given[0].shape[2], given[1].shape[2]
    seen = torch.arange(keys - queries, keys, device=dense.device) + 1
    if mask is not None:
        seen = (mask != HIDDEN).sum(-1)
    return torch.where((seen < length)[..., None], dense, chosen), (dense - chosen).abs().max()


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused", "auto"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("choice", CHOICES)
def test_torch_paths_switch_at_the_length(impl, window, choice):
    rotation, rms = layer(2, 24, 20)
    for min_length in (1, 2, 30, 66, 67, 500):
        config = aqua.AquaConfig.paper(sink=window[0], recent=window[1], min_length=min_length, s_ratio=1 / 6, **choice)
        for queries in (66, 1, 5):
            if impl == "fused" and sum(window) and queries < 66:
                continue  # refused, whatever the length
            given = random(2, 4, queries, 24, seed=2) * 2, random(2, 2, 66, 20, seed=3), random(2, 2, 66, 24, seed=4)
            expected, moved = expected_of((*given, rotation, rms), config, min_length)
            assert moved > 0.05
            found = attend(*given, rotation, rms, config, impl=impl)
            assert torch.allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_padding_is_not_counted(impl):
    rotation, rms = layer(2, 16, 16)
    given = random(2, 4, 40, 16, seed=2) * 2, random(2, 2, 40, 16, seed=3), random(2, 2, 40, 16, seed=4), rotation, rms
    places = torch.arange(40, device=DEVICE)
    real = places >= torch.tensor([0, 13], device=DEVICE)[:, None]
    mask = (places <= places[:, None]) & real[:, None, None, :]
    config = aqua.AquaConfig.paper(k_ratio=0.25, min_length=20)
    expected, _ = expected_of(given, config, 20, mask)
    found = attend(*given, config, mask=mask, impl=impl)
    assert torch.allclose(found, expected, rtol=0, atol=2e-5)
    # The 13 padding tokens of the second row would have made these queries long.
    other, _ = expected_of(given, config, 20 - 13, mask)
    assert (other - expected)[1, :, 19:32].abs().max() > 0.05
    if impl != "fused":
        positions = real.long().cumsum(-1) - 1
        codes = window_codes(mask, positions, positions, sink=0, recent=0, min_length=20)
        assert torch.equal(attend(*given, config, mask=codes, impl=impl), attend(*given, config, mask=mask, impl=impl))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("window", WINDOWS)
def test_prompt_kernels_switch_at_the_length(choice, share, window):
    pytest.importorskip("triton")
    rotation, rms = layer(2, 32, 32)
    given = random(2, 6, 70, 32, seed=2) * 2, random(2, 2, 70, 32, seed=3), random(2, 2, 70, 32, seed=4)
    for min_length in (1, 40, 71):
        config = aqua.AquaConfig.paper(share=share, sink=window[0], recent=window[1], min_length=min_length, **choice)
        expected, _ = expected_of((*given, rotation, rms), config, min_length)
        found = attention_prefill(*given, rotation, rms, config)
        close = torch.isclose(found, expected, rtol=0, atol=1e-4).all(-1)
        # Sums over a group in another order may choose another dimension, but never for a short query.
        assert close[:, :, : min_length - 1].all()
        assert close.float().mean() > 0.98


LAYOUTS = ["plain", "int8", "pages of 32", "int8 in pages of 64"]


def options_of(name, groups, kept, room, batch, seed):
    """Quantization and pages of a cache."""
    quantization = pages = None
    if "int8" in name:
        quantization = Quantization(random(groups, kept, seed=seed).abs() + 0.1, random(groups, kept, seed=seed + 1))
    if (page := name.split()[-1]).isdecimal():
        blocks = -(-room // TILE) * TILE // int(page)
        order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(seed))
        pages = Pages(order.view(batch, blocks).to(DEVICE, torch.int32), int(page), batch * blocks)
    return {"quantization": quantization, "pages": pages}


def check_step(found, wide, taken, cache, rms, config, lengths, eps):
    """A decoded token of each row: every dimension or the choice, by its own length."""
    groups, kept, heads = cache.shape[1], cache.shape[2], wide.shape[1]
    plain = dataclasses.replace(config, min_length=0)
    selected = select_dimensions(wide[:, :, None], plain, kept, rms, scaling=kept**-0.5)
    short = torch.tensor([length < config.threshold for length in lengths], device=wide.device)
    selected = selected | short[:, None, None, None]
    assert taken is None or torch.equal(taken.selected(heads), selected)
    assert taken is not None or short.all()
    if taken is not None and taken.counts is not None:
        counted = selected.view(len(lengths), groups, -1, kept)[:, :, 0].sum(-1)
        assert torch.equal(taken.counts, counted.to(torch.int32))
        for row in range(len(lengths)):
            for group in range(groups):
                dims = taken.dims[row, group, : taken.counts[row, group]].tolist()
                assert sorted(dims) == taken.mask[row, group].nonzero()[:, 0].tolist()
    keys, values = cache.read(dtype=torch.float32)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        given = wide[one, :, None].double(), keys[one, :, :length].double(), values[one, :, :length].double()
        exact = attention_reference(*given, selected[one], sink=config.sink, recent=config.recent)[0, :, 0]
        assert (found[row].double() - exact).abs().max() <= eps * exact.abs().max()


@settings(max_examples=30 if DEVICE == "cuda" else 8, deadline=None, phases=PHASES)
@given(
    name=st.sampled_from(LAYOUTS),
    lengths=st.sampled_from([[1, 130], [300, 511], [380, 380], [640, 255]]),
    above=st.sampled_from([-1, 0, 1, 2, 300]),
    choice=st.sampled_from(CHOICES),
    window=st.sampled_from(WINDOWS),
    heads=st.sampled_from([(4, 2), (3, 1)]),
    seed=st.integers(0, 100),
)
def test_decoding_kernels_switch_at_the_length(name, lengths, above, choice, window, heads, seed):
    """Rows of different lengths, decoded over the threshold of one of them."""
    pytest.importorskip("triton")
    (count, groups), kept, dtype, steps = heads, 48, torch.float16 if "int8" in name else torch.float32, 4
    min_length = max(0, lengths[seed % 2] + 2 + above)
    config = aqua.AquaConfig.paper(share="group", sink=window[0], recent=window[1], min_length=min_length, **choice)
    (rotation, _), room = layer(groups, kept, kept, seed), max(lengths) + steps
    keys, values = (random(2, groups, room, kept, seed=seed + n, dtype=dtype) for n in (2, 3))
    cache = TiledCache(2, groups, kept, kept, room, dtype, DEVICE, **options_of(name, groups, kept, room, 2, seed))
    cache.fill(rotate(keys, rotation), values, torch.tensor(lengths))
    rows, rms = torch.arange(2, device=DEVICE), layer(groups, kept, kept, 7)[1]
    for step in range(steps):
        place = torch.tensor(lengths, device=DEVICE) + step
        query = random(2, count, kept, seed=seed + 10 + step, dtype=dtype) * 2
        wide, taken = prepare(query, keys[rows, :, place], values[rows, :, place], cache, rotation, rms, config)
        window_options = {"sink": window[0], "recent": window[1]}
        found = decode(wide, taken, cache, appended=True, **window_options)
        eps = 2e-2 if dtype == torch.float16 else 2e-5
        check_step(found, wide, taken, cache, rms, config, [length + step + 1 for length in lengths], eps)


@pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_kernel_in_c_switches_at_the_length(choice, window):
    rotation, rms = layer(2, 48, 48, device="cpu")
    for min_length in (1, 299, 302, 512, 9000):
        config = aqua.AquaConfig.paper(share="group", sink=window[0], recent=window[1], min_length=min_length, **choice)
        keys, values = (random(2, 2, 510, 48, seed=seed, device="cpu") for seed in (2, 3))
        cache = TiledCache(2, 2, 48, 48, 512, torch.float32, "cpu")
        cache.fill(rotate(keys, rotation), values, torch.tensor([299, 505]))
        lengths = [299, 505]
        for step in range(10):
            query, new = (random(2, n, 48, seed=9 + step, device="cpu") * 2 for n in (6, 2))
            found, wide, taken = cpu_decode_step(query, new, new, cache, rotation, rms, config)
            lengths = [min(length + 1, 512) for length in lengths]
            check_step(found, wide, taken, cache, rms, config, lengths, 2e-5)


@pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("min_length", [3, 130, 258, 384, 385, 900])
def test_on_a_cpu_short_sequences_are_not_rotated_and_become_so(min_length, choice, dtype):
    """Beside the same steps over a cache that is rotated throughout; rows reach the length at different times."""
    rotation, rms = layer(2, 48, 48, device="cpu")
    config = aqua.AquaConfig.paper(share="group", sink=3, recent=9, min_length=min_length, **choice)
    lengths = [0, 128, 255, 382]
    keys, values = (random(4, 2, 390, 48, seed=seed, device="cpu", dtype=dtype) for seed in (2, 3))
    turned = rotate(keys, rotation)
    caches = [
        TiledCache(4, 2, 48, 48, 384, dtype, "cpu", rotated_from=rotated_from) for rotated_from in (min_length, 0)
    ]
    short = torch.tensor(lengths)[:, None, None, None] < min_length
    for cache, states in zip(caches, (torch.where(short, keys, turned), turned), strict=True):
        cache.fill(states[:, :, :384], values[:, :, :384], torch.tensor(lengths))
    rows, atol = torch.arange(4), 16 * torch.finfo(dtype).eps
    for step in range(6):
        query = random(4, 6, 48, seed=9 + step, device="cpu", dtype=dtype)
        place = torch.tensor(lengths)
        new = keys[rows, :, place], values[rows, :, place]
        found, _, mine = cpu_decode_step(query, *new, caches[0], rotation, rms, config)
        expected, _, its = cpu_decode_step(query, *new, caches[1], rotation, rms, config)
        assert torch.allclose(found.float(), expected.float(), rtol=0, atol=atol)
        assert (mine is None) == (its is None) == (min(max(lengths) + 1, 384) < min_length)
        assert mine is None or torch.equal(mine.mask, its.mask)
        lengths = [min(length + 1, 384) for length in lengths]
        assert caches[0].lengths.tolist() == lengths
        held = caches[0].read()[0]
        for row, length in enumerate(lengths):
            want = (keys if length < min_length else turned)[row, :, :length]
            assert torch.allclose(held[row, :, :length].float(), want.float(), rtol=0, atol=atol)
            assert length >= min_length or torch.equal(held[row, :, :length], want)


@pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
def test_on_a_cpu_settings_may_change_between_steps():
    """A shorter `min_length` rotates what is so long already; a longer one, and other tensors, change no keys."""
    rotation, rms = layer(1, 32, 32, device="cpu")
    keys, values = (random(2, 1, 60, 32, seed=seed, device="cpu") for seed in (2, 3))
    cache = TiledCache(2, 1, 32, 32, 60, torch.float32, "cpu", rotated_from=50)
    cache.fill(keys, values, torch.tensor([40, 10]))
    turned = rotate(keys, rotation)
    for step, (min_length, rotated) in enumerate([(50, 0), (20, 1), (90, 1), (0, 2)]):
        config = aqua.AquaConfig.paper(k_ratio=0.25, share="group", min_length=min_length)
        given = random(2, 2, 32, seed=step, device="cpu"), keys[:, :, step], values[:, :, step]
        found, wide, taken = cpu_decode_step(*given, cache, rotation.clone(), rms, config)
        held, all_values = cache.read()
        for row, length in enumerate(cache.lengths.tolist()):
            before = (turned if row < rotated else keys)[row, :, : length - step - 1]
            assert torch.allclose(held[row, :, : length - step - 1], before, rtol=0, atol=1e-5)
            one = slice(row, row + 1)
            selected = None if taken is None else taken.selected(2)[one]
            seen = held[one, :, :length], all_values[one, :, :length]
            expected = attention_reference(wide[one, :, None], *seen, selected)[:, :, 0]
            assert torch.allclose(found[one], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
@pytest.mark.parametrize("lengths", [[0, 0], [0, 30]])
@pytest.mark.parametrize("thresholds", [(50, 1), (1, 1), (50, 0)])
def test_an_empty_sequence_becomes_long_enough_too(lengths, thresholds):
    rotation, rms = layer(1, 32, 32, device="cpu")
    keys, values = (random(2, 1, 40, 32, seed=seed, device="cpu") for seed in (2, 3))
    config = aqua.AquaConfig.paper(k_ratio=0.5, share="group", min_length=thresholds[1])
    results = []
    for rotated_from, held in ((thresholds[0], keys), (0, rotate(keys, rotation))):
        short = torch.tensor(lengths)[:, None, None, None] < rotated_from
        cache = TiledCache(2, 1, 32, 32, 60, torch.float32, "cpu", rotated_from=rotated_from)
        cache.fill(torch.where(short, held, rotate(keys, rotation)), values, torch.tensor(lengths))
        new = random(2, 2, 32, seed=4, device="cpu"), keys[:, :, 30], values[:, :, 30]
        results.append(cpu_decode_step(*new, cache, rotation, rms, config)[0])
        assert cache.lengths.tolist() == [length + 1 for length in lengths]
    assert torch.allclose(*results, rtol=0, atol=1e-5)


@pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
def test_only_the_kernel_in_c_takes_keys_that_are_not_rotated():
    pytest.importorskip("triton")
    rotation, rms = layer(1, 32, 32)
    cache = TiledCache(1, 1, 32, 32, 60, torch.float16, DEVICE, rotated_from=50)
    new = torch.ones(1, 1, 32, dtype=torch.float16, device=DEVICE)
    for ratio in (0.5, 1.0):
        with pytest.raises(aqua.AquaError, match="rotated_from is 50: only the CPU kernel takes keys that are not"):
            gpu_decode_step(new, new, new, cache, rotation, rms, aqua.AquaConfig.paper(k_ratio=ratio, share="group"))
    with pytest.raises(aqua.AquaError, match="rotated_from is 50"):
        decode(new, None, cache)


@pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
def test_keys_that_do_not_keep_all_dimensions_are_always_rotated():
    rotation, rms = layer(1, 32, 24, device="cpu")
    cache, new = TiledCache(1, 1, 24, 32, 60, torch.float32, "cpu", rotated_from=50), torch.ones(1, 1, 32)
    config = aqua.AquaConfig.paper(k_ratio=0.25, s_ratio=0.25, share="group", min_length=50)
    with pytest.raises(aqua.AquaError, match="rotated_from is 50: it must be 0 where keys do not keep all dimensions"):
        cpu_decode_step(new, new, new, cache, rotation, rms, config)


def test_codes_of_8_bits_need_counts():
    pytest.importorskip("triton")
    from aqua_attention.ops.layout import Chosen

    cache = TiledCache(1, 1, 32, 32, 300, torch.float16, DEVICE, **options_of("int8", 1, 32, 300, 1, 0))
    chosen = Chosen.of(torch.arange(16, device=DEVICE)[None, None], 32)._replace(min_length=9)
    with pytest.raises(aqua.AquaError, match="min_length is 9: over codes of 8 bits there must be counts"):
        decode(torch.zeros(1, 2, 32, dtype=torch.float16, device=DEVICE), chosen, cache)


@pytest.mark.gpu
def test_a_recorded_step_goes_over_the_length():
    """Nothing on the CPU knows the length: the same CUDA graph is dense first and chooses afterwards."""
    config = aqua.AquaConfig.paper(k_ratio=0.25, share="group", sink=3, recent=9, min_length=643)
    (rotation, rms), dtype = layer(2, 64, 64), torch.float16
    states = [random(1, 2, 640, 64, seed=seed, dtype=dtype) for seed in (2, 3)]
    query, new = random(1, 4, 64, seed=4, dtype=dtype) * 2, random(1, 2, 64, seed=5, dtype=dtype)
    cache = TiledCache(1, 2, 64, 64, 700, dtype, DEVICE)

    def step():
        wide, taken = prepare(query, new, new, cache, rotation, rms, config)
        return decode(wide, taken, cache, sink=3, recent=9, appended=True), wide, taken

    cache.fill(*states, torch.tensor([640]))
    step()
    cache.fill(*states, torch.tensor([640]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, wide, taken = step()
    for length in range(641, 647):
        graph.replay()
        torch.cuda.synchronize()
        assert cache.lengths.tolist() == [length]
        check_step(found, wide, taken, cache, rms, config, [length], 2e-2)
