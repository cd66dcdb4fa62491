# SPDX-License-Identifier: Apache-2.0
"""Kernels that choose tokens in pages against plain torch: in triton's interpreter, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import given as cases
from hypothesis import strategies as st

pytest.importorskip("triton")
from decoding import (
    DEVICE,
    DTYPES,
    PHASES,
    uninitialised_memory_is_nan,  # noqa: F401
)
from paged import problem
from selecting import Problem, check_choice, check_output, listed

from aqua_attention.errors import AquaError
from aqua_attention.ops import api, scored_step
from aqua_attention.ops.backend import why_not_paged
from aqua_attention.ops.backends.triton.token_pages import TokenMemory
from aqua_attention.ops.scored_pages import PagedSequences
from aqua_attention.ops.select import rotate, select_dimensions

pytestmark = pytest.mark.select

CHOICES = [{"select_p": p} for p in (0.01, 0.5, 0.9, 0.99, 1.0)] + [{"select_tokens": n} for n in (1, 40)]
HEADS = [(4, 2), (3, 1), (8, 1), (2, 2)]


def config_of(choice, **others):
    return {"k_ratio": 0.25, "score_bits": 8, "selection": "weighted"} | choice | others


def memory_of(given):
    (memory,) = given.layer.memory.values()
    return memory


def check(given, output):
    """That pages hold the tokens, and that the kernels chose and attended rightly in what the pages hold."""
    plan, step = given.layer.plan, given.step
    memory = memory_of(given)
    work = memory.work(len(given.lengths))
    expected = rotate(given.query[:, :, None], plan.rotation)[:, :, 0]
    eps = torch.finfo(given.query.dtype).eps
    assert torch.allclose(work.rotated.float(), expected.float(), rtol=0, atol=32 * eps)
    held = PagedSequences(given.cache, step.block_table, step.lengths, memory.tiles)
    for row, length in enumerate(given.lengths):
        if length:
            keys, values, copy = held.read(row, length)
            # A rotation of the kernels differs by some last bits, and the interpreter rounds scales another way.
            assert torch.allclose(keys, given.keys[row, :, :length].float(), atol=32 * eps, equal_nan=True)
            assert torch.equal(values, given.values[row, :, :length].float())
            states = (keys - plan.key_mean[:, None]) / plan.key_scale[:, None]
            near = 0.6 * states.abs().amax(-1, keepdim=True) / 127 * plan.key_scale[:, None] + 1e-5
            assert (((copy - keys).abs() <= near) | keys.isnan()).all()
    short = torch.tensor(given.lengths, device=DEVICE)[:, None, None] < 0
    dims = select_dimensions(work.rotated[:, :, None], plan, short)
    if dims is not None:
        group = dims.shape[1] // work.mask.shape[1]
        assert torch.equal(work.mask.bool(), dims[:, ::group, 0])
    found = Problem(plan, held, work.rotated, work.dims)
    read = listed(work, held)
    check_choice(read, found, scored_step.attend_selected(work.rotated, held, plan, given.layer.scaling))
    check_output(output, read, found)
    assert not work.scratch.arrived.any()
    return read


@settings(max_examples=20 if DEVICE == "cuda" else 8, deadline=None, phases=PHASES)
@cases(
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.sampled_from([0, 1, 2, 24, 127, 128, 129, 200, 300, 515]), min_size=1, max_size=3),
    widths=st.sampled_from([(16, 16, 16), (32, 32, 48), (64, 64, 64), (40, 40, 24), (16, 12, 16), (128, 128, 128)]),
    choice=st.sampled_from(CHOICES),
    k_ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    window=st.sampled_from([(0, 0), (3, 20), (128, 128), (0, 1), (4, 0)]),
    min_length=st.sampled_from([0, 0, 130]),
    block_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_step_writes_chooses_and_attends(
    heads, lengths, widths, choice, k_ratio, window, min_length, block_size, dtype, seed
):
    assume(max(lengths) > 0)
    assume(widths[0] == widths[1] or window == (0, 0))
    window = dict(zip(("sink", "recent"), window, strict=True))
    config = config_of(choice, k_ratio=k_ratio, min_length=min_length, **window)
    given = problem(heads, lengths, widths, dtype, seed=seed, block_size=block_size, **config)
    assert why_not_paged(given.query, given.cache, given.layer) is None
    check(given, given.decode("triton"))


@pytest.mark.parametrize("choice", [{"select_p": 0.6}, {"select_tokens": 9, "sink": 2, "recent": 70, "min_length": 30}])
def test_kernels_hold_and_give_what_plain_torch_does(choice):
    """Through the door, with a rotation that rounds nothing."""
    options = {"rotation": torch.eye(64, device=DEVICE).expand(2, 64, 64), **config_of(choice)}
    ours = problem((4, 2), [200, 0, 29, 1], (64, 64, 64), **options)
    plain = problem((4, 2), [200, 0, 29, 1], (64, 64, 64), **options, impl="torch")
    found, expected = ours.decode("triton"), plain.decode("torch")
    caches = ours.cache, plain.cache
    for name in ("keys", "values"):
        states = [getattr(each, name) for each in caches]
        assert torch.allclose(*states, rtol=2**-22, atol=0, equal_nan=True)
    # The interpreter rounds scales to bfloat16 otherwise, and other scales have other codes.
    scales = [each.scales.float() for each in caches]
    assert torch.allclose(*scales, rtol=2**-7, atol=0, equal_nan=True)
    codes = [each.codes.int() for each in caches]
    assert (codes[0] - codes[1]).abs().max() <= 2
    ours.step = ours.step._replace(slots=torch.full_like(ours.step.slots, -1))
    assert torch.allclose(found, ours.decode("torch"), atol=1e-4)
    assert torch.allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("choice", [{"select_p": 0.5}, {"select_tokens": 5}])
@pytest.mark.parametrize("where", ["key", "query"])
def test_a_nan_leaves_other_rows_right(choice, where):
    def made():
        return problem((4, 2), [300, 200, 150], (16, 16, 16), **config_of(choice, sink=3, recent=20))

    clean, given = made(), made()
    expected = clean.decode("triton")
    if where == "query":
        given.query[1] = torch.nan
        heads = slice(0, 4)
    else:
        block, place = given.step.block_table[1, 100 // 64], 100 % 64
        given.cache.keys[block, 0, place] = torch.nan
        given.cache.scales[block, 0, place] = torch.nan
        heads = slice(0, 2)
    found = given.decode("triton")
    assert found[1, heads].isnan().all()
    # Lists are cut elsewhere where another one is longer.
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], atol=1e-5)
    assert torch.allclose(found[1, heads.stop :], expected[1, heads.stop :], atol=1e-5)
    assert not memory_of(given).work(3).scratch.arrived.any()


def test_batches_of_any_size_share_memory_made_before(monkeypatch):
    """As recorded steps of several sizes do, with rows that pad them; nothing is made once it is there."""
    config = config_of({"select_p": 0.7}, sink=2, recent=9)
    given = problem((4, 2), [300, 129, 64, 5], (32, 32, 32), **config)
    layer, step = given.layer, given.step._replace(longest=300)
    states = given.query, given.key, given.value
    api.decode_pages(*states, given.cache, layer, step, expected := given.output, impl="triton")
    layer.memory.clear()
    api.reserve_pages(layer, 4, 32, torch.float32, sequences=6, length=300)
    memory = memory_of(given)
    monkeypatch.setattr(TokenMemory, "__init__", None)
    for tensor in (memory.work(6).scratch.weights, memory.work(6).scratch.tops):
        tensor.fill_(torch.nan)
    for order in ([0, 1, 2, 3], [3], [2, 0], [1, 3, 0, 2], [0]):
        # Behind each batch two rows of nothing.
        rows = torch.tensor([*order, 0, 0], device=DEVICE)
        lengths, slots = step.lengths[rows], step.slots[rows]
        lengths[-2:], slots[-2:] = 0, -1
        table = step.block_table[rows]
        table[-2:] = 0
        part = step._replace(block_table=table, lengths=lengths, slots=slots)
        output = torch.full((len(rows), 4, 32), torch.nan, device=DEVICE)
        api.decode_pages(*(each[rows].contiguous() for each in states), given.cache, layer, part, output, impl="triton")
        assert torch.allclose(output[:-2], expected[order], atol=1e-5) and not output[-2:].any()
    assert memory_of(given) is memory and memory.work(1).scratch.step.tolist() == [5]


def test_a_longer_table_of_wider_rows_is_read_by_its_stride():
    given = problem((4, 2), [300, 129], (16, 16, 16), **config_of({"select_tokens": 12}))
    expected = given.decode("triton")
    wide = torch.full((2, 50), 1 << 30, dtype=torch.int32, device=DEVICE)
    wide[:, : given.step.block_table.shape[1]] = given.step.block_table
    given.step = given.step._replace(block_table=wide[:, :40], longest=300)
    assert torch.equal(given.decode("triton"), expected)


def test_what_kernels_do_not_take_is_said():
    for options, message in (
        ({"score_bits": 16}, "score_bits is 16"),
        ({"score_bits": 4}, "score_bits is 4, and pages hold what tokens are chosen by in 8"),
        ({"recent": 200}, "sink is 0 and recent 200, and where tokens are chosen it takes 128 at most"),
        ({"softcap": 2.0}, "it knows no softcap"),
        ({"share": "head"}, "share is 'head'"),
    ):
        given = problem((4, 2), [30], (16, 16, 16), impl="torch", **config_of({"select_p": 0.5}, **options))
        assert message in why_not_paged(given.query, given.cache, given.layer)
        with pytest.raises(AquaError, match=r"impl='triton' cannot take these pages"):
            given.decode("triton")


def test_memory_that_is_not_there_is_said(monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    given = problem((4, 2), [30], (16, 16, 16), impl="torch", **config_of({"select_p": 0.5}))
    monkeypatch.setattr("aqua_attention.ops.backends.triton.token_pages.torch.zeros", none)
    with pytest.raises(AquaError, match=r"choosing tokens works in 0\.1 GiB for 64 sequences of 131072 tokens"):
        api.reserve_pages(given.layer, 4, 16, torch.float32, sequences=64, length=131072)


@pytest.mark.gpu
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("lengths", "choice"),
    [([20000, 5, 9000, 0], {"select_p": 0.95}), ([300, 129], {"select_tokens": 60}), ([30000], {"select_p": 0.9})],
)
def test_large_sizes_in_bfloat16(lengths, choice, block_size, by_hand, monkeypatch):
    """With as many programs as are taken by themselves, which meet."""
    torch.use_deterministic_algorithms(False)
    if not by_hand:
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.BY_HAND_GROUP", 0)
    config = config_of(choice, sink=4, recent=64)
    given = problem((32, 8), lengths, (128, 128, 128), torch.bfloat16, block_size=block_size, **config)
    check(given, given.decode("triton"))
    assert memory_of(given).work(len(lengths)).by_hand == by_hand


@pytest.mark.gpu
@pytest.mark.parametrize("meet", [False, True])
@pytest.mark.parametrize("choice", [{"select_p": 0.9}, {"select_tokens": 100}])
def test_recorded_steps_of_several_sizes_share_memory(choice, meet, monkeypatch):
    """Also what programs that meet say: it lies elsewhere for another number of sequences."""
    torch.use_deterministic_algorithms(False)
    if meet:
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.ALONE_TILES", 0)
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.LEAST_CHOSEN", 2)
    config = config_of(choice, sink=4, recent=64)
    given = problem((32, 8), [3000, 0, 700, 129], (128, 128, 128), torch.bfloat16, **config)
    expected = given.decode("torch").float()
    api.reserve_pages(given.layer, 32, 128, torch.bfloat16, sequences=4, length=4096)
    recorded, step = {}, given.step._replace(longest=4096)
    for batch in (4, 2):
        part = step._replace(**{name: getattr(step, name)[:batch] for name in ("block_table", "lengths", "slots")})
        states, output = [each[:batch] for each in (given.query, given.key, given.value)], given.output[:batch]

        def run(states=states, part=part, output=output):
            api.decode_pages(*states, given.cache, given.layer, part, output, impl="triton")

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        recorded[batch] = graph, output
    assert (memory_of(given).work(2).chunks > memory_of(given).work(4).chunks) or not meet
    for batch in (4, 2, 2, 4, 2, 4):
        graph, output = recorded[batch]
        output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.allclose(output.float(), expected[:batch], atol=0.05, rtol=0.05) and not output[1].any()
    assert not memory_of(given).work(4).scratch.arrived.any()
