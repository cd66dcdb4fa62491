# SPDX-License-Identifier: Apache-2.0
"""Programs that choose tokens together, where triton's interpreter runs one after the other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from decoding import DEVICE
from selecting import WAYS, check_choice, check_output, expected_of, listed, problem, run, work_for

from aqua_attention.ops.backends.triton import token_meeting
from aqua_attention.ops.backends.triton.token_step import attend_selected
from aqua_attention.ops.backends.triton.token_work import PARTS, TURNS

RUNS = TURNS + 1
"""In the first, nobody has been told anything."""


@triton.jit
def _heard(said_ptr, there, turn):
    """Nobody waits."""
    return (tl.load(said_ptr, there, 0) & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


def test_turns_leave_one_number():
    assert PARTS**TURNS == 1 << 15


@pytest.mark.skipif(DEVICE == "cuda", reason="there programs wait for each other")
@pytest.mark.parametrize(
    ("heads", "lengths", "choice"),
    [
        ((2, 1), [600], {"select_p": 0.7}),
        ((2, 1), [600], {"select_p": 0.4, "sink": 128, "recent": 128}),
        ((2, 1), [600], {"select_p": 0.01}),
        ((2, 1), [600], {"select_p": 1.0}),
        ((2, 1), [600], {"select_tokens": 50}),
        ((2, 1), [600], {"select_tokens": 1, "sink": 0, "recent": 0}),
        ((2, 1), [600], {"select_tokens": 599, "sink": 100, "recent": 100}),
        ((2, 1), [600], {"select_tokens": 5, "min_length": 1000}),
        ((3, 1), [900, 5, 0, 700], {"select_p": 0.7}),
        ((24, 2), [700, 129], {"select_tokens": 40}),
    ],
)
def test_several_programs_find_what_one_does(heads, lengths, choice, monkeypatch):
    """The first ones do not find yet what later ones say. But what all say first is right at once, what they say next
    is right when all are run again, and so on.
    """
    monkeypatch.setattr(token_meeting, "heard", _heard)
    given = problem(heads, lengths, 16, 16, **choice)
    work = work_for(given, chunks=4)
    for tensor in (work.scratch.said, work.scratch.part_lse):
        tensor.zero_()
    output = torch.empty(len(lengths), heads[0], 16)
    for _ in range(RUNS):
        attend_selected(given.cache, given.plan, work, output, scaling=given.plan.scaling, appended=False)
    assert torch.equal(listed(work, given.cache), run(given, **WAYS["one program"])[1])
    check_choice(listed(work, given.cache), given, expected_of(given))
    check_output(output, listed(work, given.cache), given)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", [{"select_p": 0.9}, {"select_tokens": 500}])
def test_many_sequences_with_room_for_more_take_as_many_programs_as_they_are_long(choice):
    lengths = [40000, 0, 100, 3072, 3073, 9000, 20001, 1] + [700] * 40
    given = problem((8, 8), lengths, 64, 64, torch.bfloat16, k_ratio=0.25, **choice)
    output, read = run(given, splits=None, programs=None)
    check_choice(read, given, expected_of(given))
    check_output(output, read, given)
