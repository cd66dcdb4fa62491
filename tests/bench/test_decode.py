# SPDX-License-Identifier: Apache-2.0
"""The gate of the decoding benchmark: what it lets through, and what it must not."""

from __future__ import annotations

import pytest
import torch

from aqua_attention.errors import AquaError
from aqua_attention.ops.reference import attention_reference

pytest.importorskip("triton")
from aqua_attention.bench.decode import _check, _close
from aqua_attention.bench.problem import LOUD, Attended, read_sizes

LENGTH = 4096


@pytest.fixture(scope="module")
def problem():
    """A query, keys whose ends matter as in the benchmark, values, and chosen dimensions; two sequences."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, n, size, 64, generator=generator) for n, size in ((4, 1), (2, LENGTH), (2, LENGTH))
    )
    for place in (0, -1):
        keys[:, :, place] *= LOUD
    selected = torch.rand(2, 2, 1, 64, generator=generator).repeat_interleave(2, 1) < 0.5
    return query.half(), keys.half(), values.half(), selected


def result(query, keys, values, selected, **window):
    return attention_reference(query, keys, values, selected, **window)[:, :, 0]


def test_the_gate_lets_the_reference_through(problem):
    query, keys, values, selected = problem
    _check(result(*problem, sink=4, recent=64), Attended(query[:, :, 0], keys, values, selected, 4, 64))
    _check(result(query, keys, values, None), Attended(query[:, :, 0], keys, values))


FAULTS = {
    "the newest token": lambda q, k, v, s: result(q, k[:, :, :-1], v[:, :, :-1], s, sink=4, recent=63),
    "the first token": lambda q, k, v, s: result(q, k[:, :, 1:], v[:, :, 1:], s, sink=3, recent=64),
    "the sink": lambda q, k, v, s: result(q, k, v, s, sink=0, recent=64),
    "the recent window": lambda q, k, v, s: result(q, k, v, s, sink=4, recent=0),
    "the choice": lambda q, k, v, s: result(q, k, v, None),
    "a chosen dimension": lambda q, k, v, s: result(q, k, v, s & (torch.arange(64) != int(s[0, 0, 0].int().argmax()))),
    "a tile": lambda q, k, v, s: result(
        q, *(torch.cat([x[:, :, :1024], x[:, :, 1152:]], 2) for x in (k, v)), s, sink=4, recent=64
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_stops_a_kernel_that_misses_something(problem, fault):
    query, keys, values, selected = problem
    wrong = FAULTS[fault](*problem)
    with pytest.raises(AquaError, match="a kernel is wrong: row"):
        _check(wrong, Attended(query[:, :, 0], keys, values, selected, 4, 64))


def test_only_the_last_sequence_wrong_is_seen(problem):
    query, keys, values, selected = problem
    found = result(*problem, sink=4, recent=64)
    found[1] = 0
    with pytest.raises(AquaError, match="row 1"):
        _check(found, Attended(query[:, :, 0], keys, values, selected, 4, 64))
    found[1] = torch.nan
    with pytest.raises(AquaError, match="row 1"):
        _check(found, Attended(query[:, :, 0], keys, values, selected, 4, 64))


def test_a_wrong_rotation_is_seen():
    right = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).half()
    _close(right, right, "rotated query")
    for wrong in (right * 1.01, torch.zeros_like(right), right.roll(1, -1), right * torch.nan):
        with pytest.raises(AquaError, match="the rotated query is"):
            _close(wrong, right, "rotated query")


def test_sizes_are_sequences_times_tokens():
    assert read_sizes(["8x32768", "1x2"]) == [(8, 32768), (1, 2)]
    for size in ("8", "x", "0x5", "8x1", "axb", "-1x8"):
        with pytest.raises(AquaError, match="it must be sequences x tokens"):
            read_sizes([size])
