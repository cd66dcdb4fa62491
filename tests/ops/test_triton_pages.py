# SPDX-License-Identifier: Apache-2.0
"""Kernels over pages against the reference: in triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from aqua_attention.errors import AquaError
from aqua_attention.ops import api
from aqua_attention.ops.backend import why_not_paged
from aqua_attention.ops.pages import PagedCache
from aqua_attention.ops.select import rotate, select_dimensions

pytest.importorskip("triton")
import triton
import triton.language as tl
from decoding import CODES_EPS, DEVICE, DTYPES, HEADS, PHASES, check
from decoding import uninitialised_memory_is_nan as uninitialised_memory_is_nan
from paged import problem

from aqua_attention.ops.backends.triton import LARGEST_FLOAT32, paged_decode, paged_prepare
from aqua_attention.ops.backends.triton.paged_decode import decode_paged
from aqua_attention.ops.backends.triton.paged_prepare import prepare_paged
from aqua_attention.ops.layout import LARGEST_QUANTIZED, TILE

LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 257, 385, 700]
EXAMPLE = {
    "heads": (4, 2),
    "lengths": [700, 1, 0, 129],
    "widths": (64, 64, 64),
    "choice": ("weighted", 0.5, "group"),
    "window": (4, 64),
    "min_length": 0,
    "block_size": 64,
    "bits": None,
    "dtype": torch.float32,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """As many as make several parts of a sequence, and several sequences to a program."""
    if DEVICE == "cpu":
        monkeypatch.setattr(paged_decode, "sm_count", lambda _: 5)
        monkeypatch.setattr(paged_prepare, "sm_count", lambda _: 4)


@settings(max_examples=16 if DEVICE == "cuda" else 6, deadline=None, phases=PHASES)
@example(**EXAMPLE)
@example(**EXAMPLE | {"bits": 8, "min_length": 400})
@example(**EXAMPLE | {"widths": (64, 48, 64), "window": (0, 0), "choice": ("magnitude", 0.25, "group")})
@given(
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4),
    widths=st.sampled_from([(64, 64, 64), (64, 48, 64), (80, 80, 80), (128, 128, 128), (256, 256, 256), (16, 16, 32)]),
    choice=st.tuples(
        st.sampled_from(["weighted", "magnitude", "static"]),
        st.sampled_from([0.1, 0.25, 0.5, 1.0]),
        st.sampled_from(["group", "head"]),
    ),
    window=st.sampled_from([(0, 0), (4, 64), (130, 200), (0, 1), (3, 0)]),
    min_length=st.sampled_from([0, 65, 300]),
    block_size=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([None, 8]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_step_equals_the_reference(heads, lengths, widths, choice, window, min_length, block_size, bits, dtype, seed):
    (count, groups), (head_dim, kept, _), (selection, k_ratio, share) = heads, widths, choice
    assume(max(lengths) > 0)
    assume(share == "group" or count == groups)
    assume(bits is None or max(widths) <= LARGEST_QUANTIZED)
    assume(DEVICE == "cpu" or dtype != torch.float32 or max(widths) <= LARGEST_FLOAT32)
    assume(kept == head_dim or window == (0, 0))
    config = {"selection": selection, "k_ratio": k_ratio, "share": share, "min_length": min_length}
    config |= dict(zip(("sink", "recent"), window, strict=True))
    given = problem(heads, lengths, widths, dtype, seed=seed, block_size=block_size, bits=bits, **config)
    plan, output = given.layer.plan, given.output
    wide, taken = prepare_paged(given.query, given.key, given.value, given.cache, plan, given.step)
    expected = rotate(given.query[:, :, None], plan.rotation)
    assert torch.allclose(wide.float(), expected[:, :, 0].float(), rtol=0, atol=32 * torch.finfo(dtype).eps)
    short = torch.tensor(lengths, device=DEVICE)[:, None, None] < min_length
    selected = select_dimensions(wide[:, :, None], plan, short if min_length else None)
    # Twice, because counters must be zero again; on a GPU int8 goes by hand the second time.
    for by_hand_rows in (1 << 30, 1):
        with patch.object(paged_decode, "BY_HAND_ROWS", by_hand_rows):
            decode_paged(wide, taken, given.cache, given.layer, given.step, output)
        compare(given, wide, selected, output, CODES_EPS if bits else 0.0)
    assert (given.step.arrived == 0).all()


def compare(given, query, selected, output, eps=0.0):
    """With the reference over what is held; sequences of no token have zeros."""
    keys, values = given.held()
    there = [row for row, length in enumerate(given.lengths) if length > 0]
    assert (output[[row for row, length in enumerate(given.lengths) if length == 0]] == 0).all()
    lengths = [given.lengths[row] for row in there]
    chosen = None if selected is None else selected[there]
    check(output[there], query[there], keys[there], values[there], chosen, lengths, eps, **given.options)


@pytest.mark.parametrize("bits", [None, 8])
def test_kernels_hold_and_give_what_plain_torch_does(bits):
    """Through the door, with a rotation that rounds nothing: pages are equal, but for what lies between two codes."""
    rotation = torch.eye(64, device=DEVICE).expand(2, 64, 64)
    options = {"bits": bits, "rotation": rotation, "k_ratio": 0.5, "sink": 2, "recent": 70, "min_length": 30}
    ours = problem((4, 2), [200, 0, 29, 1], (64, 64, 64), **options)
    plain = problem((4, 2), [200, 0, 29, 1], (64, 64, 64), **options, impl="torch")
    found, expected = ours.decode("triton"), plain.decode("torch")
    if bits is None:
        # A GPU's float32 products may round even those with ones.
        stored = [each.cache.storage.view(torch.float32) for each in (ours, plain)]
        assert torch.allclose(*stored, rtol=2**-22, atol=0, equal_nan=True)
    else:
        # The interpreter rounds scales to bfloat16 otherwise.
        for name in ("key_scales", "value_scales"):
            scales = [getattr(each.cache, name).float() for each in (ours, plain)]
            assert torch.allclose(*scales, rtol=2**-7, atol=0, equal_nan=True)
        codes = [torch.cat([each.cache.keys.flatten(), each.cache.values.flatten()]).int() for each in (ours, plain)]
        assert (codes[0] - codes[1]).abs().max() <= 1
        ours.step = ours.step._replace(slots=torch.full_like(ours.step.slots, -1))
        expected = ours.decode("torch")
    assert torch.allclose(found, expected, atol=5e-3 if bits else 1e-5)


@triton.jit
def _rooms(counts_ptr, rooms_ptr, programs, HEADS: tl.constexpr, LEAST: tl.constexpr):
    at = tl.arange(0, 4)
    each, rooms = paged_decode.rooms_of(tl.load(counts_ptr + at), programs, HEADS, LEAST)
    tl.store(rooms_ptr + at, rooms)
    tl.store(rooms_ptr + 4 + at, tl.zeros_like(rooms) + each)


@pytest.mark.parametrize(
    ("counts", "programs", "each", "rooms"),
    [
        ([65, 0, 0, 0], 264, 2, [66, 0, 0, 0]),  # a head has 33 programs
        ([65, 0, 0, 0], 263, 2, [65, 0, 0, 0]),  # one too few
        ([3, 1, 0, 5], 48, 2, [4, 2, 0, 6]),
        ([3, 1, 0, 5], 47, 2, [3, 1, 0, 5]),
        ([1, 1, 1, 0], 100, 1, [1, 1, 1, 0]),  # no sequence has as many tiles as a program should
        ([100, 7, 0, 0], 8, 107, [100, 7, 0, 0]),
    ],
)
def test_heads_take_whole_programs_where_there_are_enough(counts, programs, each, rooms):
    found = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    _rooms[(1,)](torch.tensor(counts, dtype=torch.int32, device=DEVICE), found, programs, HEADS=8, LEAST=2)
    assert found.tolist() == [*rooms, *[each] * 4]


@pytest.mark.parametrize("count", [1, 4, 7, 12])
@pytest.mark.parametrize("lengths", [[700, 129, 0, 385], [900], [128] * 5])
def test_any_number_of_programs_gives_the_same(monkeypatch, lengths, count):
    options = {"k_ratio": 0.5, "sink": 2, "recent": 70}
    expected = problem((4, 2), lengths, (64, 64, 64), **options, impl="torch").decode("torch")
    monkeypatch.setattr(paged_decode, "sm_count", lambda _: count)
    given = problem((4, 2), lengths, (64, 64, 64), **options)
    assert torch.allclose(given.decode("triton"), expected, atol=1e-5)
    assert (given.step.arrived == 0).all()


@pytest.mark.parametrize("window", [None, 5, 130, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_layer_without_a_plan_multiplies_every_dimension_of_what_it_sees(window, softcap):
    lengths = [300, 0, 4, 131]
    ours, plain = (
        problem((6, 2), lengths, (64, 64, 64), window=window, softcap=softcap, impl=impl)
        for impl in ("triton", "torch")
    )
    assert torch.allclose(ours.decode("triton"), plain.decode("torch"), atol=1e-5)


def test_equal_sizes_are_chosen_as_in_the_reference_and_a_nan_is_seen():
    rotation = torch.eye(16, device=DEVICE)[None]
    options = {"rotation": rotation, "k_ratio": 0.25, "selection": "magnitude"}
    given = problem((2, 1), [130, 130], (16, 16, 16), **options)
    given.query[0], given.query[1] = 0, 0
    given.query[0, 0] = torch.tensor([1.0, 2, 2, 0, 3, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    given.query[1, 1, 9] = torch.nan
    wide, taken = prepare_paged(given.query, given.key, given.value, given.cache, given.layer.plan, given.step)
    assert sorted(taken.dims[0, 0].tolist()) == [0, 1, 2, 4]
    output = given.output
    decode_paged(wide, taken, given.cache, given.layer, given.step, output)
    assert not output[0].isnan().any()
    assert output[1, 1].isnan().all()


def test_a_nan_in_a_chosen_key_is_seen_and_in_another_page_is_not():
    given = problem((2, 1), [200], (16, 16, 16), k_ratio=0.5, recent=3)
    given.decode("triton")
    given.cache.keys[given.step.block_table[0, 2], 0, :, 5] = torch.nan
    assert given.decode("triton").isnan().all()


class InnerTiles:
    """Stands for the kernel with registers placed by hand, which the interpreter does not know."""

    def __init__(self, given):
        self.keys, self.values = given.held()

    def __getitem__(self, grid):
        self.splits = grid[0]
        return self.attend

    def attend(self, query, dims, counts, cache, partial, lse, scores, scaling, before, window, **constants):
        (sink, recent, min_length), group = window, constants["GROUP"]
        for row, length in enumerate(cache.lengths.tolist()):
            first, last = -(-sink // TILE), 0 if length < min_length else max(length - recent, 0) // TILE
            each = -(-max(last - first, 0) // self.splits)
            for head in range(query.shape[1]):
                some = slice(None) if dims is None else dims[row, head // group].long()
                for split in range(self.splits):
                    begin = first + split * each
                    tokens = slice(begin * TILE, max(begin, min(begin + each, last)) * TILE)
                    found = self.keys[row, head // group, tokens][:, some] @ query[row, head, some].float() * scaling
                    found = found * math.log(2)
                    partial[row, head, before + split] = found.softmax(0) @ self.values[row, head // group, tokens]
                    lse[row, head, before + split] = found.logsumexp(0) / math.log(2)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the kernel itself is tested")
@pytest.mark.parametrize("config", [{"k_ratio": 1.0}, {"k_ratio": 0.5, "sink": 3, "recent": 70, "min_length": 290}])
def test_edges_and_merge_around_inner_tiles_by_hand(config, monkeypatch):
    given = problem((6, 2), [700, 260, 0, 1, 515, 128], (64, 64, 64), bits=8, **config)
    expected, step = given.decode("torch"), given.step._replace(slots=torch.full((6,), -1))
    inner = InnerTiles(given)
    name = "aqua_attention.ops.backends.triton.decode_int8_mma"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(decode_quantized_kernel=inner))
    monkeypatch.delitem(sys.modules, name.replace("decode_int8_mma", "paged_by_hand"), raising=False)
    monkeypatch.setattr(paged_decode, "is_by_hand", lambda *_: True)
    output = given.output
    api.decode_pages(given.query, given.key, given.value, given.cache, given.layer, step, output, impl="triton")
    assert inner.splits > 1
    assert torch.allclose(output, expected, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "by_hand_rows"), [(None, 1 << 30), (8, 1 << 30), (8, 1)])
def test_a_recorded_step_serves_other_lengths(bits, by_hand_rows, monkeypatch):
    """Nothing but what is in the tensors decides."""
    monkeypatch.setattr(paged_decode, "BY_HAND_ROWS", by_hand_rows)
    rotation = torch.eye(128, device=DEVICE).expand(2, 128, 128)
    options = {"bits": bits, "rotation": rotation, "k_ratio": 0.5, "sink": 4, "recent": 64, "min_length": 100}
    given = problem((8, 2), [3000, 700, 90, 1], (128, 128, 128), torch.bfloat16, **options)
    output, arguments = given.output, (given.query, given.key, given.value, given.cache, given.layer, given.step)
    api.decode_pages(*arguments, output, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        api.decode_pages(*arguments, output, impl="triton")
    given.step.slots.fill_(-1)
    for lengths in ([3000, 700, 90, 1], [513, 0, 64, 1], [2999, 699, 89, 0]):
        given.step.lengths.copy_(torch.tensor(lengths))
        output.fill_(torch.nan)
        graph.replay()
        expected = given.decode("torch").float()
        for found, one in zip(output.float(), expected, strict=True):
            assert (found - one).norm() <= 0.03 * one.norm()


def test_more_sequences_than_programs():
    lengths = [(37 * row) % 150 for row in range(11)]
    ours, plain = (
        problem((2, 2), lengths, (16, 16, 16), k_ratio=1.0, impl=impl, seed=3) for impl in ("triton", "torch")
    )
    assert torch.allclose(ours.decode("triton"), plain.decode("torch"), atol=1e-4)


def test_too_few_counters_are_refused():
    given = problem((2, 2), [20, 3], (16, 16, 16), k_ratio=0.5)
    given.step = given.step._replace(arrived=given.step.arrived[:3])
    with pytest.raises(AquaError, match="arrived holds 3 counters: 2 sequences need 4"):
        given.decode("triton")


def test_pages_that_are_not_read_in_one_go_are_left_to_plain_torch():
    """Padding behind a page, as vLLM puts it where layers of several kinds share their memory."""
    given = problem((2, 2), [20], (16, 16, 16), k_ratio=0.5)
    for apart, expected in ((2 * 64 * 32 + 16, None), (2 * 64 * 32 + 8, r"pages are \(4104, 2048\) elements apart")):
        storage = torch.zeros(3 * apart, device=DEVICE).as_strided((3, 2, 64, 32), (apart, 64 * 32, 32, 1))
        reason = why_not_paged(given.query, PagedCache(storage, 16, 16), given.layer)
        assert re.match(expected, reason) if expected else reason is None
