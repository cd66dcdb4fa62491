# SPDX-License-Identifier: Apache-2.0
"""Decode kernels against the reference: in triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain import attention_mass, decode, prepare, select_dimensions

import aqua_attention as aqua
from aqua_attention.ops.select import rotate

pytest.importorskip("triton")
from decoding import (
    CODES_EPS,
    DEVICE,
    DTYPES,
    HEADS,
    LAYOUTS,
    PHASES,
    as_mask,
    check,
    chosen,
    layout,
    problem,
    random,
    uninitialised_memory_is_nan,  # noqa: F401
)

from aqua_attention.ops.backends.triton.decode import LARGEST_FLOAT32, Chosen
from aqua_attention.ops.layout import LARGEST_QUANTIZED, TILE, Pages, Quantization, TiledCache, quantized, tiles_done


@settings(max_examples=16 if DEVICE == "cuda" else 12, deadline=None, phases=PHASES)
@given(
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257, 385, 700, 1025]), min_size=1, max_size=3),
    widths=st.sampled_from([(16, 16), (64, 64), (48, 64), (96, 128), (80, 80), (40, 96), (128, 128), (256, 256)]),
    share=st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]),
    window=st.sampled_from([(0, 0), (4, 64), (128, 128), (0, 1), (3, 0)]),
    splits=st.sampled_from([None, 1, 3]),
    name=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_decoding_equals_the_reference(heads, lengths, widths, share, window, splits, name, dtype, seed):
    assume("int8" not in name or max(widths) <= LARGEST_QUANTIZED)
    assume(DEVICE == "cpu" or dtype != torch.float32 or max(widths) <= LARGEST_FLOAT32)
    query, keys, values, cache = problem(heads, lengths, *widths, dtype, seed, name)
    count = math.ceil(share * widths[0])
    dims, selected = (None, None) if share == 1 else chosen(query, heads[1], count)
    sink, recent = window
    eps = CODES_EPS if "int8" in name else 0.0
    mass = torch.full((len(lengths), heads[1], cache.count * TILE), torch.nan, device=DEVICE)
    for wanted in (None, mass):
        found = decode(query, dims, cache, sink=sink, recent=recent, splits=splits, mass=wanted)
        check(found, query, keys, values, selected, lengths, eps, sink=sink, recent=recent)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        counted = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
        mask = None if selected is None else selected[one]
        expected = attention_mass(query[one, :, None], keys[one, :, :length], mask, counted, sink=sink, recent=recent)[
            0
        ]
        assert torch.allclose(mass[row, :, :length], expected, rtol=0, atol=8 * max(eps, torch.finfo(dtype).eps))
        assert (mass[row, :, length:] == 0).all()


@settings(max_examples=12 if DEVICE == "cuda" else 3, deadline=None, phases=PHASES)
@given(
    heads=st.sampled_from(HEADS),
    widths=st.sampled_from([(64, 64, 64), (64, 48, 64), (32, 32, 16), (80, 72, 80), (128, 128, 128)]),
    start=st.sampled_from([1, 248, 380]),
    choice=st.sampled_from([{"k_ratio": 0.5}, {"k_ratio": 1.0}, {"logit_error": 0.2}]),
    selection=st.sampled_from(["weighted", "magnitude", "static"]),
    name=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_whole_step_rotates_selects_appends_and_attends(heads, widths, start, choice, selection, name, dtype, seed):
    """Rows of two lengths, over the moments at which a tile is filled: token by token, checked now and then."""
    (count, groups), (head_dim, kept, value_dim), steps = heads, widths, 16
    lengths = torch.tensor([start, start + 5])
    config = aqua.AquaConfig.paper(**choice, selection=selection, share="group", s_ratio=1 - kept / head_dim)
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=seed))[0][..., :kept].contiguous()
    rms = random(groups, kept, seed=seed + 1).abs() + 0.1
    total = start + 5 + steps
    keys = random(2, groups, total, head_dim, seed=seed + 2, dtype=dtype)
    values = random(2, groups, total, value_dim, seed=seed + 3, dtype=dtype)
    queries = random(2, count, steps, head_dim, seed=seed + 4, dtype=dtype)
    rotated = rotate(keys, rotation)
    options = layout(name, 2, groups, kept, total, seed)
    cache = TiledCache(2, groups, kept, value_dim, total, dtype, DEVICE, **options)
    cache.fill(rotated[:, :, : start + 5], values[:, :, : start + 5], lengths.to(DEVICE))
    rows = torch.arange(2, device=DEVICE)
    for step in range(steps):
        place = (lengths + step).to(DEVICE)
        query = queries[:, :, step]
        wide, taken = prepare(query, keys[rows, :, place], values[rows, :, place], cache, rotation, rms, config)
        found = decode(wide, taken, cache, sink=3, recent=20, appended=True, scaling=head_dim**-0.5)
        if step % 5:
            continue
        expected = rotate(query[:, :, None], rotation)
        assert torch.allclose(wide.float(), expected[:, :, 0].float(), rtol=0, atol=4 * torch.finfo(dtype).eps * 8)
        selected = select_dimensions(wide[:, :, None], config, head_dim, rms)
        if taken is not None:
            assert torch.equal(as_mask(taken, wide), selected)
        ends = (lengths + step + 1).tolist()
        held = (rotated, values) if options["quantization"] is None else cache.read(dtype=torch.float32)
        check(
            found,
            wide,
            *held,
            selected,
            ends,
            CODES_EPS if "int8" in name else 0.0,
            sink=3,
            recent=20,
            scaling=head_dim**-0.5,
        )
    assert cache.lengths.tolist() == [start + steps, start + 5 + steps]
    assert not cache.arrived.any()
    # Written token by token or at once: the same, but for what lies between two codes.
    whole = TiledCache(2, groups, kept, value_dim, total, dtype, DEVICE, **options)
    whole.fill(rotated, values, cache.lengths)
    limit = 4 * torch.finfo(dtype).eps * max(1, float(rotated.abs().max()))
    if options["quantization"] is not None:
        limit += float(
            (whole.key_scales.float().max() * options["quantization"].channel_scale.max()).maximum(
                whole.value_scales.max()
            )
        )
    for found, expected in zip(cache.read(), whole.read(), strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=0, atol=1.01 * limit)


def test_selection_in_the_kernel_is_that_of_the_reference_with_ties():
    query = torch.zeros(1, 2, 16, device=DEVICE)
    query[0, 0] = torch.tensor([1.0, 2, 2, 0, 3, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    cache = TiledCache(1, 1, 16, 16, 8, torch.float32, DEVICE)
    state, rotation = torch.zeros(1, 1, 16, device=DEVICE), torch.eye(16, device=DEVICE)[None]
    rms = torch.ones(1, 16, device=DEVICE)

    def dims(**choice):
        config = aqua.AquaConfig.paper(selection="weighted", share="group", **choice)
        _, (dims, _, counts, _) = prepare(query, state, state, cache, rotation, rms, config, scaling=1.0)
        return sorted(dims[0, 0, : dims.shape[2] if counts is None else counts[0, 0]].tolist())

    assert dims(k_ratio=0.25) == [0, 1, 2, 4]
    assert dims(logit_error=4.0) == [1, 2, 4], "the four ones may go"
    assert dims(logit_error=3.5) == [0, 1, 2, 4], "of equals the first stay"
    assert dims(logit_error=100.0) == [4], "the largest always stays"
    query[0, 1, 9] = 10
    assert dims(k_ratio=0.25) == [1, 2, 4, 9]
    rms[0, 9] = 0
    assert dims(k_ratio=0.25) == [0, 1, 2, 4]
    query[0, 1, 9] = torch.nan
    assert dims(k_ratio=0.25) == [0, 1, 2, 3], "a NaN is turned into every dimension; then all are equal"
    assert dims(logit_error=100.0) == list(range(16)), "and none may be dropped"


def test_tiny_queries_of_their_own_heads_are_told_apart():
    """Squares of these would both be zero."""
    query, state = torch.zeros(1, 1, 16, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE)
    query[0, 0, 3], query[0, 0, 7] = 1e-30, 1e-25
    config = aqua.AquaConfig.paper(k_ratio=1 / 16)
    cache = TiledCache(1, 1, 16, 16, 8, torch.float32, DEVICE)
    rotation, rms = torch.eye(16, device=DEVICE)[None], torch.ones(1, 16, device=DEVICE)
    assert prepare(query, state, state, cache, rotation, rms, config)[1].dims.tolist() == [[[7]]]


def test_a_full_cache_is_not_written_behind_its_end():
    _, _, _, cache = problem((2, 2), [125], 16, 16, torch.float32)
    held = cache.values.shape[2]
    config, one = aqua.AquaConfig.paper(k_ratio=0.5, share="group"), torch.ones(1, 2, 16, device=DEVICE)
    for _ in range(10):
        wide, taken = prepare(
            one, one, one, cache, torch.eye(16, device=DEVICE).expand(2, 16, 16).contiguous(), one[0], config
        )
        decode(wide, taken, cache, appended=True)
    assert cache.lengths.tolist() == [held]


def test_requests_that_the_kernels_do_not_take_list_what_they_take():
    query, _, _, cache = problem((4, 2), [300], 64, 64, torch.float32)
    dims = torch.zeros(1, 2, 16, dtype=torch.int32, device=DEVICE)
    mask = torch.zeros(1, 2, 64, dtype=torch.int8, device=DEVICE)
    for arguments, words in (
        ((query[:, :3].contiguous(), None), "a multiple of 2, 64"),
        ((query.double(), None), "in the cache's torch.float32"),
        ((query, Chosen(dims.long(), mask)), "dims is torch.int64 .* it must be torch.int32 .1, 2, 16., contiguous"),
        ((query, Chosen(dims, mask[..., 1:])), "mask is .* torch.int8 .1, 2, 64."),
        ((query, Chosen(dims, mask, dims)), "counts is .* torch.int32 .1, 2."),
    ):
        with pytest.raises(aqua.AquaError, match=words):
            decode(*arguments, cache)
    with pytest.raises(aqua.AquaError, match=f"takes 0 to {TILE} of each"):
        decode(query, None, cache, recent=TILE + 1)
    with pytest.raises(aqua.AquaError, match=r"lengths are .301.: they must be 1 numbers from 0 to 300"):
        cache.fill(random(1, 2, 300, 64, seed=0), random(1, 2, 300, 64, seed=0), torch.tensor([301]))
    with pytest.raises(aqua.AquaError, match="do not fit a cache"):
        cache.fill(random(1, 2, 400, 64, seed=0), random(1, 2, 400, 64, seed=0), torch.tensor([1]))
    for splits in (0, -1, 62):
        with pytest.raises(aqua.AquaError, match=f"splits is {splits}: it must be 1 to 61"):
            decode(query, None, cache, splits=splits)
    strided = torch.zeros(1, 2, 768, device=DEVICE)[..., ::2]
    with pytest.raises(aqua.AquaError, match=r"mass is .* contiguous"):
        decode(query, None, cache, mass=strided)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": (1, 3, 64)}, "query is .* .1, 2, 64."),
        ({"query": (2, 4, 64)}, "query is .* .1, 4, 64."),
        ({"key": (1, 2, 63)}, "key is .* .1, 2, 64."),
        ({"value": (1, 2, 65)}, "value is .* .1, 2, 64."),
        ({"rotation": (2, 64, 63)}, "rotation is .* .2, 64, 64."),
        ({"key_rms": (2, 63)}, "key_rms is .* .2, 64."),
        ({"config": aqua.AquaConfig.paper()}, "share is 'head'"),
    ],
)
def test_a_step_whose_shapes_do_not_fit_its_cache_is_refused(change, words):
    cache = TiledCache(1, 2, 64, 64, 300, torch.float32, DEVICE)
    shapes = {"query": (1, 4, 64), "key": (1, 2, 64), "value": (1, 2, 64), "rotation": (2, 64, 64), "key_rms": (2, 64)}
    given = {name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    given |= {"config": aqua.AquaConfig.paper(share="group"), "cache": cache}
    given |= {name: torch.ones(new, device=DEVICE) if isinstance(new, tuple) else new for name, new in change.items()}
    with pytest.raises(aqua.AquaError, match=words):
        prepare(**given)
    assert not cache.values.any()


def test_strided_rotations_are_read_right():
    config, wide = aqua.AquaConfig.paper(k_ratio=0.5, share="group", s_ratio=0.25), random(2, 64, 64, seed=0)
    results = []
    for rotation in (wide[..., :48], wide[..., :48].contiguous()):
        cache = TiledCache(1, 2, 48, 64, 300, torch.float32, DEVICE)
        given = random(1, 4, 64, seed=1), random(1, 2, 64, seed=2), random(1, 2, 64, seed=3)
        results.append(prepare(*given, cache, rotation, torch.ones(2, 96, device=DEVICE)[:, ::2], config)[0])
    assert torch.equal(*results)


def test_a_sequence_without_a_token_gets_zeros():
    query, _, _, cache = problem((4, 2), [300, 1], 64, 64, torch.float32)
    cache.lengths[1] = 0
    found = decode(query, None, cache)
    assert found[0].isfinite().all()
    assert (found[1] == 0).all()


def test_the_tail_holds_one_to_two_tiles():
    for length in range(1, 5 * TILE):
        rest = length - tiles_done(length) * TILE
        assert rest <= 2 * TILE
        assert rest > TILE or tiles_done(length) == 0


def test_codes_are_within_half_a_scale_and_use_the_whole_range():
    states = random(3, 50, 32, seed=1) * torch.tensor([1e-6, 1.0, 1e4], device=DEVICE)[:, None, None]
    states[1, 7] = 0
    codes, scales = quantized(states)
    found = (codes.float() - 128) * scales.float()[..., None]
    assert ((found - states).abs() <= 0.5001 * scales.float()[..., None]).all()
    largest = (codes.float() - 128).abs().amax(-1)
    assert largest.max() <= 127 and largest[states.abs().amax(-1) > 0].min() >= 125
    assert scales[1, 7] == 0 and (codes[1, 7] == 128).all()
    states[0, 0, 3] = torch.nan
    codes, scales = quantized(states)
    assert scales[0, 0].isnan() and scales[0, 1:].isfinite().all()


def test_a_nan_that_is_quantized_reaches_the_output():
    cache = TiledCache(1, 1, 16, 16, 300, torch.float32, DEVICE, **layout("int8", 1, 1, 16, 300))
    keys, values = random(1, 1, 290, 16, seed=1), random(1, 1, 290, 16, seed=2)
    cache.fill(keys, values, torch.tensor([290]))
    query = random(1, 2, 16, seed=3)
    assert decode(query, None, cache).isfinite().all()
    keys[0, 0, 40, 2] = torch.nan
    cache.fill(keys, values, torch.tensor([290]))
    assert decode(query, None, cache).isnan().all()


def test_pages_that_nobody_has_stay_untouched_and_sequences_do_not_meet():
    options = layout("pages of 32", 2, 1, 16, 300, seed=5)
    cache = TiledCache(2, 1, 16, 16, 300, torch.float32, DEVICE, **options)
    keys, values = random(2, 1, 290, 16, seed=1), random(2, 1, 290, 16, seed=2)
    cache.fill(keys, values, torch.tensor([290, 70]))
    rotation, rms = torch.eye(16, device=DEVICE)[None].contiguous(), torch.ones(1, 16, device=DEVICE)
    config = aqua.AquaConfig.paper(k_ratio=0.5, share="group")
    for step in range(6):
        new = random(3, 2, 1, 16, seed=step)
        query, taken = prepare(new[0], new[1], new[2], cache, rotation, rms, config)
        decode(query, taken, cache, appended=True)
    table = options["pages"].block_table
    used = {int(page) for row, count in ((0, 296), (1, 76)) for page in table[row, : -(-count // 32)]}
    for page in range(options["pages"].num_blocks):
        assert bool(cache.values[page].any()) == (page in used)


@pytest.mark.parametrize("name", ["int8", "pages of 32", "int8 in pages of 64"])
def test_a_full_sequence_writes_nothing_into_another(name):
    room = 3 * TILE
    options = layout(name, 2, 1, 16, room, seed=4)
    cache = TiledCache(2, 1, 16, 16, room, torch.float32, DEVICE, **options)
    keys, values = random(2, 1, room, 16, seed=1), random(2, 1, room, 16, seed=2)
    # The first has 3 places left; the second begins another tile.
    cache.fill(keys, values, torch.tensor([room - 3, TILE - 3]))
    rotation, rms = torch.eye(16, device=DEVICE)[None].contiguous(), torch.ones(1, 16, device=DEVICE)
    before = [states[1, :, :100].clone() for states in cache.read()]
    for step in range(6):
        new = random(3, 2, 1, 16, seed=step)
        query, taken = prepare(new[0], new[1], new[2], cache, rotation, rms, aqua.AquaConfig.paper(k_ratio=0.5))
        decode(query, taken, cache, appended=True)
    assert cache.lengths.tolist() == [room, TILE + 3]
    for old, new in zip(before, cache.read(), strict=True):
        limit = 0.0 if "int8" not in name else 0.2  # the first tiles are rounded meanwhile
        assert (old - new[1, :, :100]).abs().max() <= limit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pages": (torch.int32, (1, 24), 16)}, "pages.block_size is 16: it must be one of 32, 64, 128"),
        ({"pages": (torch.int64, (1, 12), 32)}, "pages.block_table is torch.int64"),
        ({"pages": (torch.int32, (1, 10), 32)}, "pages.block_table is torch.int32 \\(1, 10\\)"),
        (
            {"quantization": (1, 48)},
            "quantization.channel_scale is torch.float32 \\(1, 48\\): it must be torch.float32 \\(1, 16\\)",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(options, words):
    given = {}
    if "pages" in options:
        kind, shape, block = options["pages"]
        given["pages"] = Pages(torch.zeros(shape, dtype=kind, device=DEVICE), block, 10)
    if "quantization" in options:
        given["quantization"] = Quantization(*torch.ones(2, *options["quantization"], device=DEVICE))
    with pytest.raises(aqua.AquaError, match=words):
        TiledCache(1, 1, 16, 16, 300, torch.float32, DEVICE, **given)
