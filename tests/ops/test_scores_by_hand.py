# SPDX-License-Identifier: Apache-2.0
"""The kernel that scores tokens, whose registers are placed by hand, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from gluon_in_torch import InTorch
from selecting import DEVICE, check_choice, check_output, expected_of, problem, run

from aqua_attention.ops.backends.triton import decode_int8_mma, early_by_hand, token_few_bits, token_window_by_hand
from aqua_attention.ops.backends.triton import token_scores_by_hand as by_hand
from aqua_attention.ops.layout import TILE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel itself runs there")
MODULES = by_hand, decode_int8_mma, early_by_hand, token_few_bits, token_window_by_hand


@pytest.fixture
def in_torch(monkeypatch):
    monkeypatch.setattr(by_hand, "score_kernel", InTorch(by_hand.score_kernel, MODULES, monkeypatch))


CASES = {
    "one block of dimensions": ((4, 2), [300, 1, 0, 129], (32, 16), {"select_p": 0.6, "k_ratio": 0.4}),
    "two blocks": ((4, 1), [260, 128], (64, 32), {"select_p": 0.9}),
    "odd numbers of tiles": ((4, 1), [640, 128, 127, 0, 1, 129], (32, 16), {"select_p": 0.8}),
    "a window in the middle": ((2, 1), [520], (32, 16), {"select_p": 0.8, "sink": 16, "recent": 128}),
    "a group of 1": ((2, 2), [900], (64, 16), {"select_tokens": 60, "recent": 0}),
    "a group of 3": ((6, 2), [391, 5], (64, 16), {"select_tokens": 60, "sink": 0}),
    "more than a query of each tile": ((2, 1), [530], (160, 16), {"select_p": 0.9, "k_ratio": 0.9}),
    "13 dimensions": ((3, 1), [255], (128, 32), {"select_tokens": 30, "k_ratio": 0.1}),
    "more than are read ahead": ((8, 1), [700], (160, 16), {"select_p": 0.5, "k_ratio": 0.9, "sink": 0, "recent": 0}),
}


@pytest.mark.parametrize("held", [None, 8])
@pytest.mark.parametrize("score_bits", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_plain_torch(in_torch, case, score_bits, held):
    heads, lengths, widths, choice = CASES[case]
    given = problem(heads, lengths, *widths, torch.float16, held=held, score_bits=score_bits, **choice)
    output, read = run(given, chunks=1, by_hand=True)
    check_choice(read, given, expected_of(given))
    check_output(output, read, given)


@pytest.mark.parametrize("score_bits", [8, 4])
def test_a_code_is_of_its_token_and_dimension(in_torch, score_bits):
    """Every token of a tile in its turn has one large code, in each of the dimensions that score."""
    dim = 16
    states = torch.zeros(TILE, dim)
    states[torch.arange(TILE), torch.arange(TILE) % dim] = 1.0
    knobs = {"select_tokens": 1, "sink": 0, "recent": 0, "k_ratio": 1.0, "score_bits": score_bits}
    given = problem((1, 1), [TILE], dim, 16, torch.float16, keys=torch.zeros(TILE), **knobs)
    given.cache.fill(states[None, None].half(), torch.zeros(1, 1, TILE, 16).half(), given.cache.lengths)
    for which in range(dim):
        given.rotated.zero_()[0, 0, which] = 40.0
        _, read = run(given, chunks=1, by_hand=True)
        assert read[0, 0].nonzero().flatten().tolist() == list(range(which, TILE, dim))


@pytest.mark.parametrize("score_bits", [8, 4])
def test_a_lane_reads_what_its_operands_are_made_of(score_bits):
    """Of a product's left operand, row m and column k, lane `4 * (m % 8) + k % 8 // 2` has what it is to have."""
    codes = 32 // score_bits
    layout = decode_int8_mma.words_layout.fn(TILE // codes)
    read = set()
    for lane, register in product(range(32), range(2 ** len(layout.reg_bases))):
        row, word = 0, 0
        for number, bases in ((lane, layout.lane_bases), (register, layout.reg_bases)):
            for bit, base in enumerate(bases):
                if number >> bit & 1:
                    row, word = row ^ base[0], word ^ base[1]
        read |= {(lane, row, word * codes + each) for each in range(codes)}
    assert len(read) == 16 * TILE
    for lane, dim, token in read:
        row = token // 16 + 8 * (token % 16)
        assert token == TILE // 8 * (row % 8) + row // 8
        assert lane == 4 * (row % 8) + dim % 8 // 2


@pytest.mark.parametrize("score_bits", [8, 4])
@pytest.mark.parametrize("where", ["key", "query", "window"])
def test_a_nan_leaves_other_rows_right(in_torch, where, score_bits):
    given = problem((4, 2), [300, 200, 150], 16, 16, torch.float16, score_bits=score_bits, select_p=0.5)
    if where == "query":
        given.rotated[1, 0] = torch.nan
    else:
        given.cache.keys[1, 0, 100 if where == "key" else 0] = torch.nan
        given.cache.fill(given.cache.keys[:, :, :300], given.cache.values[:, :, :300], given.cache.lengths)
    output, read = run(given, chunks=1, by_hand=True)
    assert read[1, 0, :200].all() and output[1, 0].isnan().all()
    expected = expected_of(given)
    for row, head in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
        assert torch.equal(read[row, head], expected.read[row, head])
        assert not output[row, 2 * head : 2 * head + 2].isnan().any()


def test_a_negative_scaling_is_left_to_the_compiler(in_torch):
    given = problem((4, 2), [700], 32, 16, torch.float16, select_p=0.6)
    given = given._replace(plan=replace(given.plan, scaling=-0.2))
    (output, read), (expected, least) = (run(given, chunks=1, by_hand=by_hand) for by_hand in (True, False))
    assert torch.equal(read, least)
    assert torch.equal(output, expected)
    assert not read[:, :, :700].all()
