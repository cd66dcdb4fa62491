# SPDX-License-Identifier: Apache-2.0
"""The decoding kernel in C against the reference, and what happens where it cannot be compiled."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import cpu_decode as decode
from plain import cpu_decode_step as decode_step
from plain import select_dimensions

import aqua_attention as aqua
from aqua_attention.ops.backends.cpu import build
from aqua_attention.ops.backends.cpu.step import everything
from aqua_attention.ops.layout import Chosen, Pages, Quantization, TiledCache
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate

REASON = build.no_kernel_reason()
compiled = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found, query, keys, values, selected, lengths, **options):
    """As close to float64 as a few times the reference in the same dtype, in every row."""
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        parts = [query[one, :, None], keys[one, :, :length], values[one, :, :length]]
        mask = None if selected is None else selected[one]
        exact = attention_reference(*(part.double() for part in parts), mask, **options)[0, :, 0]
        plain = attention_reference(*parts, mask, **options)[0, :, 0].double()
        error, scale = (found[row].double() - exact).abs().max(), exact.abs().max()
        assert error <= 4 * (plain - exact).abs().max() + 8 * torch.finfo(query.dtype).eps * scale


@compiled
@settings(max_examples=80, deadline=None)
@given(
    heads=st.sampled_from([(4, 2), (2, 2), (6, 1), (3, 1), (20, 1)]),
    lengths=st.lists(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257, 385, 700, 1025]), min_size=1, max_size=3),
    widths=st.sampled_from([(16, 16), (64, 64), (48, 64), (80, 96), (33, 7), (256, 256)]),
    share=st.sampled_from([0.1, 0.5, 0.7, 1.0]),
    window=st.sampled_from([(0, 0), (4, 64), (300, 128), (0, 1), (3, 0)]),
    parts=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_decoding_equals_the_reference(heads, lengths, widths, share, window, parts, dtype, seed):
    (count, groups), (kept, value_dim), batch, length = heads, widths, len(lengths), max(lengths)
    query = random(batch, count, kept, seed=seed, dtype=dtype)
    keys = random(batch, groups, length, kept, seed=seed + 1, dtype=dtype)
    values = random(batch, groups, length, value_dim, seed=seed + 2, dtype=dtype)
    hidden = (torch.arange(length) >= torch.tensor(lengths)[:, None])[:, None, :, None]
    cache = TiledCache(batch, groups, kept, value_dim, length + 3, dtype, "cpu")
    # Behind a row's end is what must not be read.
    cache.fill(keys.masked_fill(hidden, torch.nan), values.masked_fill(hidden, torch.nan), torch.tensor(lengths))
    chosen = selected = None
    if share < 1:
        order = random(batch, groups, kept, seed=seed + 3).argsort(-1)
        chosen = Chosen.of(order[..., : math.ceil(share * kept)], kept)
        selected = chosen.mask.bool().repeat_interleave(count // groups, 1)[:, :, None]
    found = decode(query, chosen, cache, sink=window[0], recent=window[1], parts=parts)
    assert found.dtype == dtype
    check(found, query, keys, values, selected, lengths, sink=window[0], recent=window[1])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", [{"k_ratio": 0.5}, {"k_ratio": 1.0}, {"logit_error": 0.2}, {"k_ratio": 0.3}])
def test_a_whole_step_over_the_end_of_a_tile_and_of_the_cache(dtype, choice):
    config = aqua.AquaConfig(share="group", selection="weighted", sink=3, recent=20, **choice)
    rotation = torch.linalg.qr(random(2, 32, 32, seed=0))[0].contiguous()
    rms, lengths = random(2, 32, seed=1).abs() + 0.1, [380, 250]
    keys, values = (random(2, 2, 390, 32, seed=seed, dtype=dtype) for seed in (2, 3))
    rotated = rotate(keys, rotation)
    cache = TiledCache(2, 2, 32, 32, 384, dtype, "cpu")
    cache.fill(rotated[:, :, :380], values[:, :, :380], torch.tensor(lengths))
    rows = torch.arange(2)
    for step in range(8):
        place, query = torch.tensor(lengths), random(2, 6, 32, seed=4 + step, dtype=dtype)
        new = keys[rows, :, place], values[rows, :, place]
        found, wide, chosen = decode_step(query, *new, cache, rotation, rms, config)
        lengths = [min(length + 1, 384) for length in lengths]
        assert cache.lengths.tolist() == lengths
        expected = rotate(query[:, :, None], rotation)[:, :, 0]
        assert torch.allclose(wide.float(), expected.float(), rtol=0, atol=32 * torch.finfo(dtype).eps)
        selected = select_dimensions(wide[:, :, None], config, 32, rms)
        assert (chosen is None) == (selected is None)
        if chosen is not None:
            assert torch.equal(chosen.selected(6), selected)
            for row in range(2):
                for group in range(2):
                    count = chosen.dims.shape[2] if chosen.counts is None else chosen.counts[row, group]
                    flags = chosen.mask[row, group].nonzero()[:, 0].tolist()
                    assert sorted(chosen.dims[row, group, :count].tolist()) == flags
        check(found, wide, rotated, values, selected, lengths, sink=3, recent=20)
        assert torch.equal(decode(wide, chosen, cache, sink=3, recent=20), found)


def example(seed, heads=6):
    """A cache that holds 200 tokens, and one more to come, with what its layer needs."""
    cache = TiledCache(2, 2, 32, 32, 300, torch.float32, "cpu")
    cache.fill(*(random(2, 2, 200, 32, seed=seed + n) for n in range(2)), torch.tensor([200, 140]))
    new = random(2, heads, 32, seed=seed + 2), random(2, 2, 32, seed=seed + 3), random(2, 2, 32, seed=seed + 4)
    rotation = torch.linalg.qr(random(2, 32, 32, seed=seed + 5))[0].contiguous()
    return cache, new, {"rotation": rotation, "key_rms": random(2, 32, seed=seed + 6).abs() + 0.1}


@compiled
def test_what_changes_between_steps_of_a_cache_counts():
    """What is kept between steps is for one setting; each change comes out as over a cache that saw nothing else."""
    cache, new, given = example(0)
    window = {"share": "group", "selection": "weighted", "sink": 3, "recent": 9}
    given |= {"config": aqua.AquaConfig.paper(k_ratio=0.25, **window), "scaling": 0.2}
    skewed = example(1)[2]["rotation"].transpose(1, 2).contiguous().transpose(1, 2)
    changes = [
        {},
        {"config": aqua.AquaConfig.paper(k_ratio=0.5, **window)},
        {"config": aqua.AquaConfig.paper(k_ratio=0.5, min_length=150, **window)},
        {"config": aqua.AquaConfig.paper(k_ratio=0.5, min_length=9000, **window)},
        {"config": aqua.AquaConfig.paper(k_ratio=1.0, **window)},
        {"config": aqua.AquaConfig.paper(logit_error=0.2, **window)},
        {"scaling": 0.5},
        {"rotation": skewed},
        {"key_rms": torch.rand(2, 64, generator=torch.Generator().manual_seed(7))[:, ::2]},
        {"threads": 3},
        {"new": tuple(states.transpose(1, 2).contiguous().transpose(1, 2) for states in new)},
        {"new": example(2, heads=2)[1]},
        {"clear": True},
    ]
    threads = torch.get_num_threads()
    for change in changes:
        given |= {name: value for name, value in change.items() if name in given}
        new = change.get("new", new)
        torch.set_num_threads(change.get("threads", threads))
        fresh, _, _ = example(0)
        if "clear" in change:
            cache.clear()
            fresh.clear()
        else:
            cache.lengths.copy_(fresh.lengths)
        try:
            found = decode_step(*new, cache, **given)
            assert cache.fixed.threads == torch.get_num_threads()
            dense = {name: value.contiguous() for name, value in given.items() if isinstance(value, torch.Tensor)}
            expected = decode_step(*(states.contiguous() for states in new), fresh, **given | dense)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), change
        assert (found[2] is None) == (expected[2] is None)
        assert found[2] is None or torch.equal(found[2].mask, expected[2].mask)


@compiled
def test_a_choice_that_was_given_back_is_not_written_to_again():
    cache, new, given = example(0)
    config = aqua.AquaConfig.paper(k_ratio=0.25, share="group", min_length=150)
    _, _, chosen = decode_step(*new, cache, **given, config=config)
    mask, dims = chosen.mask.clone(), chosen.dims.clone()
    cache.lengths.fill_(20)  # all are short now
    output, turned, none = decode_step(*new, cache, **given, config=config)
    assert none is None
    assert torch.equal(output, decode(turned, None, cache))
    cache.lengths.fill_(200)
    decode_step(-3 * new[0].flip(-1), *new[1:], cache, **given, config=config)
    assert torch.equal(chosen.mask, mask) and torch.equal(chosen.dims, dims)


@compiled
@pytest.mark.parametrize("wrong", ["query", "key", "value", "dtype"])
def test_a_later_step_that_does_not_fit_is_refused_too(wrong):
    cache, (query, key, value), given = example(0)
    given["config"] = aqua.AquaConfig.paper(k_ratio=0.5, share="group")
    decode_step(query, key, value, cache, **given)
    changed = {"query": query[:, :5], "key": key[..., :16], "value": value[..., :16], "dtype": value.double()}[wrong]
    new = {"query": query, "key": key, "value": value} | {"value" if wrong == "dtype" else wrong: changed}
    with pytest.raises(
        aqua.AquaError, match=f"{'value' if wrong == 'dtype' else wrong} is .* it must be torch.float32"
    ):
        decode_step(**new, cache=cache, **given)
    assert cache.lengths.tolist() == [201, 141]


@compiled
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_keeps_nothing_of_the_first(way):
    cache, new, given = example(0)
    given["config"] = aqua.AquaConfig.paper(k_ratio=0.5, share="group")
    decode_step(*new, cache, **given)
    copied = way(cache)
    assert copied.fixed is None
    assert cache.fixed is not None
    if way is copy.copy:
        copied.lengths = cache.lengths.clone()
    found = decode_step(*new, copied, **given)[0]
    assert (copied.lengths.tolist(), cache.lengths.tolist()) == ([202, 142], [201, 141])
    assert torch.equal(found, decode_step(*new, cache, **given)[0])


@compiled
@pytest.mark.parametrize("where", ["bfloat16", "meta"])
def test_torch_s_defaults_change_nothing(where):
    """Memory that C writes to is float32 and on the CPU, whatever torch makes by default."""
    cache, new, given = example(0)
    given["config"] = aqua.AquaConfig.paper(k_ratio=0.5, share="group", min_length=50)
    expected = decode_step(*new, example(0)[0], **given)[0]
    everything.cache_clear()
    try:
        if where == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta" if where == "meta" else "cpu"):
            found, turned, chosen = decode_step(*new, cache, **given)
            again = decode(turned, chosen, cache)
            assert decode(turned, None, cache).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(again, found)


@compiled
def test_a_prompt_in_inference_mode_goes_on_without():
    with torch.inference_mode():
        cache, new, given = example(0)
        cache.rotated_from = 202
    given["config"] = aqua.AquaConfig.paper(k_ratio=0.5, share="group", min_length=202)
    new = tuple(states.clone() for states in new)
    for length in (201, 202):
        decode_step(*new, cache, **given)
        assert int(cache.lengths[0]) == length
    assert cache.rotated_from == 202


@compiled
def test_selection_is_that_of_the_reference_with_ties_and_nan():
    query = torch.zeros(1, 2, 16)
    query[0, 0] = torch.tensor([1.0, 2, 2, 0, 3, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    state, rotation, rms = torch.zeros(1, 1, 16), torch.eye(16)[None], torch.ones(1, 16)

    def dims(**choice):
        cache = TiledCache(1, 1, 16, 16, 8, torch.float32, "cpu")
        config = aqua.AquaConfig.paper(**{"selection": "weighted", "share": "group"} | choice)
        chosen = decode_step(query, state, state, cache, rotation, rms, config, scaling=1.0)[2]
        dims, mask, counts, _ = chosen
        expected = select_dimensions(query[:, :, None], config, 16, rms, 1.0)[:, 0, 0]
        assert torch.equal(mask[0].bool(), expected)
        return sorted(dims[0, 0, : dims.shape[2] if counts is None else counts[0, 0]].tolist())

    assert dims(k_ratio=0.25) == [0, 1, 2, 4]
    assert dims(k_ratio=0.25, selection="static") == [0, 1, 2, 3]
    assert dims(logit_error=4.0) == [1, 2, 4], "the four ones may go"
    assert dims(logit_error=3.5) == [0, 1, 2, 4], "of equals the first stay"
    assert dims(logit_error=100.0) == [4], "the largest always stays"
    rms[0, 9], query[0, 1, 9] = 0, 10
    assert dims(k_ratio=0.25) == [0, 1, 2, 4]
    assert dims(k_ratio=0.25, selection="magnitude") == [1, 2, 4, 9]


@compiled
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": (1, 3, 64)}, "query is .* .1, 2, 64."),
        ({"key": (1, 2, 63)}, "key is .* .1, 2, 64."),
        ({"value": (1, 2, 65)}, "value is .* .1, 2, 64."),
        ({"rotation": (2, 64, 63)}, "rotation is .* .2, 64, 64."),
        ({"key_rms": (2, 63)}, "key_rms is .* .2, 64."),
        ({"config": aqua.AquaConfig.paper()}, "share is 'head'"),
    ],
)
def test_a_step_whose_shapes_do_not_fit_its_cache_is_refused(change, words):
    cache = TiledCache(1, 2, 64, 64, 300, torch.float32, "cpu")
    shapes = {"query": (1, 4, 64), "key": (1, 2, 64), "value": (1, 2, 64), "rotation": (2, 64, 64), "key_rms": (2, 64)}
    given = {name: torch.ones(shape) for name, shape in shapes.items()}
    given |= {"config": aqua.AquaConfig.paper(share="group"), "cache": cache}
    given |= {name: torch.ones(new) if isinstance(new, tuple) else new for name, new in change.items()}
    with pytest.raises(aqua.AquaError, match=words):
        decode_step(**given)
    assert cache.lengths.tolist() == [0]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_visible_and_huge_scores_do_not_overflow(dtype):
    cache = TiledCache(1, 1, 16, 16, 300, dtype, "cpu")
    keys, values = random(1, 1, 300, 16, seed=0, dtype=dtype), random(1, 1, 300, 16, seed=1, dtype=dtype)
    query = 1e4 * random(1, 2, 16, seed=2, dtype=dtype)
    cache.fill(keys, values, torch.tensor([300]))
    check(decode(query, None, cache), query, keys, values, None, [300])
    query[0, 1, 3] = torch.nan
    found = decode(query, None, cache)
    assert found[0, 1].isnan().all()
    assert found[0, 0].isfinite().all()
    for place in (5, 290):  # in a tile, in the tail
        damaged = keys.clone()
        damaged[0, 0, place, 0] = torch.nan
        cache.fill(damaged, values, torch.tensor([300]))
        assert decode(query, None, cache).isnan().all()


@compiled
def test_requests_that_the_kernel_does_not_take_list_what_it_takes():
    cache = TiledCache(1, 2, 16, 16, 100, torch.float32, "cpu")
    with pytest.raises(aqua.AquaError, match=r"query is \(1, 3, 16\): it must be \[1, a multiple of 2, 16\]"):
        decode(torch.zeros(1, 3, 16), None, cache)
    with pytest.raises(aqua.AquaError, match="recent 129: the CPU kernel takes float32 and bfloat16"):
        decode(torch.zeros(1, 2, 16), None, cache, recent=129)
    dims, mask = torch.zeros(1, 2, 4, dtype=torch.int32), torch.zeros(1, 2, 16, dtype=torch.int8)
    for chosen, words in (
        (Chosen(dims.long(), mask), "dims is torch.int64"),
        (Chosen(dims, mask[..., 1:]), "mask is .* it must be torch.int8 .1, 2, 16."),
        (Chosen(dims, mask, dims), "counts is .* it must be torch.int32 .1, 2."),
        (Chosen(dims[..., :0], mask), "it must name 1 to 16 dimensions"),
    ):
        with pytest.raises(aqua.AquaError, match=words):
            decode(torch.zeros(1, 2, 16), chosen, cache)
    with pytest.raises(aqua.AquaError, match="parts is 0"):
        decode(torch.zeros(1, 2, 16), None, cache, parts=0)
    with pytest.raises(aqua.AquaError, match="float16, heads of 16"):
        decode(torch.zeros(1, 2, 16), None, TiledCache(1, 2, 16, 16, 100, torch.float16, "cpu"))


@pytest.fixture
def fresh(monkeypatch, tmp_path, no_kernel_loaded):
    """Nothing compiled so far, and an empty cache folder."""
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_a_compiler_it_says_so(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(aqua.AquaError, match="impl='cpu' is impossible here, because there is no C compiler"):
        build.kernels()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(fresh, monkeypatch):
    broken = fresh / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(aqua.AquaError, match=r"cannot compile decode[.]c \(out of ideas\): set CC to another"):
        build.kernels()
    assert list((fresh / "kernels").iterdir()) == []


@compiled
def test_it_is_compiled_once_and_again_when_the_file_is_damaged(fresh):
    target = fresh / "kernels" / f"decode-{build._fingerprint(build._compiler())}.so"
    target.parent.mkdir()
    target.write_bytes(b"no library")
    build.kernels()
    before = target.stat()
    assert before.st_size > 1000
    build.kernels.cache_clear()
    build.kernels()
    assert target.stat().st_mtime_ns == before.st_mtime_ns
    assert list(target.parent.iterdir()) == [target]


@compiled
def test_a_folder_that_cannot_be_written_is_named(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("AQUA_CACHE_DIR", str(fresh / "file"))
    with pytest.raises(aqua.AquaError, match=r"cannot be kept in or loaded from .*file"):
        build.kernels()


@pytest.mark.parametrize("layout", ["codes", "pages"])
def test_caches_that_the_kernels_cannot_read_are_refused(layout):
    ones = torch.ones(1, 16)
    options = {"quantization": Quantization(ones, ones)}
    if layout == "pages":
        options = {"pages": Pages(torch.arange(4, dtype=torch.int32)[None], 32, 4)}
    cache = TiledCache(1, 1, 16, 16, 128, torch.float32, "cpu", **options)
    cache.fill(torch.ones(1, 1, 5, 16), torch.ones(1, 1, 5, 16), torch.tensor([5]))
    with pytest.raises(aqua.AquaError, match="neither 8-bit codes nor pages"):
        decode(torch.ones(1, 2, 16), None, cache)
    states, rotation = torch.ones(1, 1, 16), torch.eye(16)[None].contiguous()
    with pytest.raises(aqua.AquaError, match="neither 8-bit codes nor pages"):
        decode_step(states, states, states, cache, rotation, ones, aqua.AquaConfig.paper(k_ratio=0.5))
