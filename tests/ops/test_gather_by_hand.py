# SPDX-License-Identifier: Apache-2.0
"""The kernel that attends to listed tokens, whose registers are placed by hand, run by torch where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from gluon_in_torch import InTorch
from selecting import DEVICE, check_choice, check_output, expected_of, listed, problem, work_for

from aqua_attention.ops.backends.triton import (
    decode_int8_mma,
    early_by_hand,
    token_codes_by_hand,
    token_gather,
    token_numbers_by_hand,
    token_words_by_hand,
)
from aqua_attention.ops.backends.triton import token_gather_by_hand as by_hand
from aqua_attention.ops.backends.triton.token_gather import attend_to_tokens
from aqua_attention.ops.backends.triton.token_step import attend_selected
from aqua_attention.ops.layout import TILE

MODULES = by_hand, token_codes_by_hand, token_numbers_by_hand, token_words_by_hand, decode_int8_mma, early_by_hand
CASES = {
    "whole": ((8, 2), [300, 1, 0, 129], (128, 128), [[300, 1], [1, 1], [0, 0], [40, 64]]),
    "some": ((3, 1), [700, 257], (64, 64), [[33], [257]]),
    "three pieces of a key": ((4, 2), [260], (112, 64), [[31, 97]]),
    "one piece, of two words": ((8, 1), [500], (32, 128), [[470]]),
    "one piece, of a word": ((1, 1), [129], (16, 64), [[128]]),
    "two of them": ((5, 1), [200, 0, 200], (80, 128), [[100], [0], [199]]),
}
HELD = {
    "codes": {"dtype": torch.float16, "held": 8},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture
def in_torch(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(by_hand, "gather_kernel", InTorch(by_hand.gather_kernel, MODULES, monkeypatch))


def attended(given, counts, *, programs=3, first=0):
    """Output, and which tokens were listed, [batch, num_key_value_heads, room]: so many of each list, at random, from
    the `first` of a sequence on.
    """
    batch, kv_heads, _, value_dim, tiles = given.cache.shape
    work = work_for(given, programs=programs, chunks=1, by_hand=True)
    assert work.gather_by_hand
    read = torch.zeros(batch, kv_heads, tiles * TILE, dtype=torch.bool, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    for place, (row, head) in enumerate(product(range(batch), range(kv_heads))):
        count = work.scratch.counts[place] = counts[row][head]
        tokens = torch.randperm(int(given.cache.lengths[row]) - first, generator=generator)[:count]
        tokens = (first + tokens.sort().values).to(DEVICE)
        work.scratch.tokens[place, :count] = tokens.int()
        read[row, head, tokens] = True
    output = torch.full((*given.rotated.shape[:2], value_dim), torch.nan, dtype=given.rotated.dtype, device=DEVICE)
    attend_to_tokens(given.cache, work, output, scaling=given.plan.scaling, appended=False)
    assert not work.scratch.arrived.any()
    return output, read


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("programs", [1, 3, 20])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_plain_torch(in_torch, case, programs, held):
    heads, lengths, widths, counts = CASES[case]
    given = problem(heads, lengths, *widths, **HELD[held], select_tokens=1)
    output, read = attended(given, counts, programs=programs)
    check_output(output, read, given)


def test_keys_have_scales_of_their_own_beside_a_copy_of_4_bits(in_torch):
    given = problem((4, 2), [300, 140], 128, 64, torch.float16, held=8, score_bits=4, select_tokens=1)
    check_output(*attended(given, [[200, 30], [140, 1]]), given)


@pytest.mark.parametrize("held", ["codes", "float16"])
@pytest.mark.parametrize("score_bits", [8, 4])
def test_what_is_chosen_is_attended_to(in_torch, score_bits, held):
    knobs = HELD[held] | {"score_bits": score_bits, "select_p": 0.6, "k_ratio": 0.4}
    given = problem((4, 2), [300, 1, 0, 129], 32, 64, **knobs)
    work = replace(work_for(given, chunks=1, by_hand=True), by_hand=False)
    output = torch.full((4, 4, 64), torch.nan, dtype=given.rotated.dtype, device=DEVICE)
    attend_selected(given.cache, given.plan, work, output, scaling=given.plan.scaling, appended=False)
    read = listed(work, given.cache)
    check_choice(read, given, expected_of(given))
    check_output(output, read, given)


def test_more_lists_than_are_looked_at_together(in_torch, monkeypatch):
    monkeypatch.setattr(token_gather, "MOST_LISTS", 32)
    given = problem((2, 2), [140] * 40, 16, 64, torch.float16, held=8, select_tokens=1)
    counts = torch.randint(1, 141, (40, 2), generator=torch.Generator().manual_seed(2)).tolist()
    check_output(*attended(given, counts, programs=13), given)


def test_sequences_are_longer_then_but_for_full_ones_and_rows_of_padding(in_torch):
    given = problem((4, 2), [40, 45, 1], 16, 64, torch.float16, held=8, select_tokens=1)
    given.cache.lengths.copy_(torch.tensor([40, 50, -1]))
    counts = [[40, 7], [45, 1], [0, 0]]
    work = work_for(given, programs=2, chunks=1, by_hand=True)
    work.scratch.counts.copy_(torch.tensor(counts).flatten())
    work.scratch.tokens.zero_()
    output = torch.empty(3, 4, 64, dtype=torch.float16, device=DEVICE)
    attend_to_tokens(given.cache, work, output, scaling=1.0, appended=True)
    assert given.cache.lengths.tolist() == [41, 50, -1] and not output[2].any()


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_a_nan_leaves_other_lists_right(in_torch, where, held):
    """That of the first token, too, which is not listed."""
    given = problem((4, 2), [200, 150], 64, 64, **HELD[held], select_tokens=1)
    states = {"key": given.cache.keys, "value": given.cache.values}.get(where)
    if held == "codes":
        states = {"key": given.cache.scales, "value": given.cache.value_scales}.get(where)
    if where == "query":
        given.rotated[1, 0] = torch.nan
    else:
        # By token: [batch, num_key_value_heads, tiles, TILE, ...].
        states = states.view(2, 2, -1, TILE, *states.shape[4:] if held == "codes" else (64,))
        states[0, 0, 0, 0] = states[1, 0, 0, :10] = torch.nan
    output, read = attended(given, [[170, 33], [149, 65]], first=1)
    wrong = output.isnan().all(-1)
    assert wrong.tolist() == [[False] * 4, [True, where != "query", False, False]]
    if where != "query":
        states[0, 0, 0, 0] = 0.0
    check_output(output, read, given)


@pytest.mark.parametrize("words", range(4, 65, 4))
def test_each_word_of_a_key_is_read_once(words):
    """And the pieces lie one behind the other."""
    count = token_words_by_hand.piece_count.fn(words)
    sizes = [token_words_by_hand.piece_words.fn(words, each) for each in range(count)]
    begins = [token_words_by_hand.piece_begin.fn(words, each) for each in range(count)]
    read = [word for begin, size in zip(begins, sizes, strict=True) for word in range(begin, begin + size)]
    assert read == list(range(words))


@pytest.mark.parametrize("words", [16, 8, 4])
def test_a_lane_reads_what_its_operands_are_made_of(words):
    """Of row m of a product's left operand, lane `4 * (m % 8)` and the next three have a quarter each."""
    read = spread(token_words_by_hand.key_layout.fn(words))
    assert len(read) == 32 * words
    for lane, (row, word) in read:
        assert lane == 4 * (row % 8) + word // (words // 4)


@pytest.mark.parametrize("words", [32, 64])
def test_a_lane_reads_values_of_16_bits_that_its_operands_are_made_of(words):
    """Rows of the operand are columns: lane 4g + t has those of g, of the tokens 2t, 2t + 1, 2t + 8 and 2t + 9."""
    read = spread(token_numbers_by_hand.value_layout.fn(words))
    assert len(read) == 16 * words
    for lane, (token, word) in read:
        assert lane == 4 * (word % 32 // 4) + token % 8 // 2


def test_a_lane_knows_the_tokens_of_its_rows():
    number = {row: 4 * (row % 8) + row // 8 for row in range(32)}
    for row in range(32):
        keys = {lane for lane, (at,) in spread(by_hand.OF_KEYS.value) if at == number[row]}
        assert keys == {4 * (row % 8) + each for each in range(4)}
        # Rows of the left operand of values are columns of a product: those of a lane are 2t, 2t + 1, 2t + 8, 2t + 9.
        values = {lane for lane, (at,) in spread(by_hand.OF_VALUES.value) if at == number[row]}
        assert values == {row % 8 // 2 + 4 * each for each in range(8)}


@pytest.mark.parametrize(("width", "run"), [(64, 8), (128, 16), (128, 8)])
def test_a_lane_writes_what_its_sums_are_of(width, run):
    """Lane 4g + t has rows g + 8i of a result, heads 2t and 2t + 1; row g + 8i is the i-th of the columns of g."""
    read = spread(by_hand.output_layout.fn(width, run))
    assert len(read) == 8 * width
    for lane, (head, column) in read:
        assert lane == 4 * (column // run % 8) + head // 2


def spread(layout):
    """Which lane has what, of all its registers."""
    found = set()
    for lane, register in product(range(32), range(2 ** len(layout.reg_bases))):
        at = (0,) * len(layout.shape)
        for number, bases in ((lane, layout.lane_bases), (register, layout.reg_bases)):
            for bit, base in enumerate(bases):
                if number >> bit & 1:
                    at = tuple(a ^ b for a, b in zip(at, base, strict=True))
        found.add((lane, at))
    return found
