# SPDX-License-Identifier: Apache-2.0
"""Where two curves cross, what theory says, and a small measurement from end to end."""

from __future__ import annotations

import json
import os

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.bench import decode_cpu
from aqua_attention.bench.breakeven import (
    crossing,
    grouped_breakeven,
    measure_breakeven,
    read_lengths,
    select_crossings,
)
from aqua_attention.bench.choosing import Choosing
from aqua_attention.machine import Shape
from aqua_attention.ops.backends.cpu.build import no_kernel_reason

compiled = pytest.mark.skipif(no_kernel_reason() is not None, reason=str(no_kernel_reason()))
CPU = torch.device("cpu")
SMALL = Shape(CPU, 4, 2, 32, torch.float32)


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        ([4, 4, 4, 4], [1, 2, 6, 12], 300.0),  # 2 behind at 200, 2 ahead at 400: in the middle
        ([4, 4, 4, 4], [1, 3, 7, 12], 250.0),
        ([4, 4, 4, 4], [1, 4, 7, 12], 200.0),  # equal at 200 and faster behind
        ([1, 2, 3, 4], [2, 3, 4, 5], 100.0),
        ([1, 9, 3, 4], [2, 3, 9, 5], 300.0),  # faster, slower, and then faster for good
        ([1, 2, 3, 4], [2, 3, 4, 4], None),  # not faster at the longest
        ([9, 9, 9, 9], [1, 1, 1, 1], None),
    ],
)
def test_the_crossing_lies_between_the_last_length_that_is_not_faster_and_the_next(ours, other, expected):
    assert crossing([100, 200, 400, 800], ours, other) == expected


def test_theory_by_hand():
    assert grouped_breakeven(128, 96) == 1024
    assert grouped_breakeven(128, 96, 1) == 1024
    assert grouped_breakeven(128, 96, 4) == 640
    assert grouped_breakeven(64, 32, 3) == pytest.approx(170.67, abs=0.01)


def test_theory_is_where_multiply_adds_are_equal():
    """Counted, not derived: one token, G query heads, one key-value head."""
    d, k, group = 64, 40, 3

    def dense(length):
        return group * d * length

    def sparse(length):
        return group * d * d + d * d + group * k * length

    length = grouped_breakeven(d, k, group)
    assert dense(length) == pytest.approx(sparse(length))
    assert dense(0.9 * length) < sparse(0.9 * length)


def test_lengths_are_doubled():
    assert read_lengths("64..1024") == [64, 128, 256, 512, 1024]
    assert read_lengths("100..399") == [100, 200]
    for text in ("64", "64..", "8..64", "64..64", "a..b", "64...128"):
        with pytest.raises(aqua.AquaError, match=r"lengths is .* it must be FIRST\.\.LAST, such as 64\.\.65536"):
            read_lengths(text)


@pytest.fixture
def small(monkeypatch):
    """Nothing takes long, and the machine is idle."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(decode_cpu, "MOST_SECONDS", 0.01)
    monkeypatch.setattr(decode_cpu, "LEAST_FLUSHED", 1 << 20)
    monkeypatch.setattr(decode_cpu, "largest_cache", lambda: 0)


@compiled
def test_a_small_measurement_writes_what_auto_reads(small, tmp_path, monkeypatch):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    seen = []
    result = measure_breakeven(
        SMALL,
        k_ratios=(0.75, 0.25),
        lengths=[64, 128, 300],
        progress=lambda *given: seen.append(given),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [row["length"] for row in result["rows"]] == [64, 128, 300]
    for row in result["rows"]:
        assert row["dense_name"] in decode_cpu.DENSE
        assert 0 < row["dense"] < 1 and 0 < row["whole"] < 1 and len(row["aqua"]) == 2
    assert [(row["k"], row["paper"], row["theory"]) for row in result["breakeven"]] == [
        (24, 256, 192),
        (8, pytest.approx(85.33, abs=0.01), 64),
    ]
    low, high = result["breakeven"][0]["paper_experiment"]
    assert 0 < low <= high
    profile = json.loads((tmp_path / "profiles").iterdir().__next__().read_text())
    for row, kept in zip(
        sorted(result["breakeven"], key=lambda row: row["k_ratio"]), profile["thresholds"], strict=True
    ):
        assert kept["k_ratio"] == row["k_ratio"]
        assert (kept["min_length"] is None) == (row["whole"] is None)
        if row["whole"] is not None:
            assert 0 <= kept["min_length"] - row["whole"] < 1


@compiled
def test_choices_of_tokens_are_timed_beside_and_kept_for_auto(small, tmp_path, monkeypatch):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    choosing = [Choosing(0.25, select_p=0.9), Choosing(0.25, select_tokens=9), Choosing(0.25, select_share=0.25)]
    result = measure_breakeven(
        *(SMALL,), k_ratios=(0.25,), lengths=[400, 800], sink=2, recent=8, choosing=choosing, read_share=0.3
    )
    for row in result["rows"]:
        assert all(0 < each < 1 for each in row["select"] + row["select_short"])
        by_mass, by_count, by_share = row["read"]
        assert 0.2 < by_mass < 0.4, "three tenths hold it"
        assert by_count == (9 + 2 + 8) / row["length"]
        assert by_share == 0.25 + (2 + 8) / row["length"]
        assert len(row["aqua"]) == 1
    assert [row["select_p"] for row in result["selects"]] == [0.9, None, None]
    assert result["read_share"] == 0.3
    profile = json.loads(next((tmp_path / "profiles").iterdir()).read_text())
    kept = [(row["select_p"], row["select_tokens"], row["min_length"]) for row in profile["selects"]]
    lengths = [row["min_length"] for row in result["selects"]]
    assert kept == [(0.9, None, lengths[0]), (None, 9, lengths[1])], "no knob reads a share"


def test_where_a_choice_of_tokens_crosses_others_by_hand():
    lengths, times = [100, 200, 400], {"dense": [4, 8, 16], "whole": [3, 5, 9], "aqua": [4, 4, 7]}
    rows = [{"length": length} | {name: each[at] for name, each in times.items()} for at, length in enumerate(lengths)]
    rows = [row | {"aqua": [row["aqua"]]} for row in rows]
    for row, mine, short in zip(rows, (6, 6, 6), (2, 6, 18), strict=True):
        row |= {"select": [mine], "select_short": [short]}
    # To dense 2 behind and 2 ahead, to dimensions 2 behind and 1 ahead, to itself below min_length equal at 200.
    assert select_crossings(rows, 0) == {
        "dense": 150.0,
        "dimensions": pytest.approx(200 + 200 * 2 / 3),
        "short": 200.0,
        "min_length": 200,
        "slowest": 1.5,  # 6 for 4 at 200
    }
    for row in rows:
        row["select"] = [100]
    assert select_crossings(rows, 0) == {
        **dict.fromkeys(("dense", "dimensions", "short", "min_length")),
        "slowest": 18 / 7,
    }


@compiled
def test_every_way_is_timed_alone_and_with_its_step(small):
    given = {"length": 130, "k_ratios": (1.0, 0.5)}
    rows = decode_cpu.measure_decode_cpu(SMALL, **given, short=True)
    ours = [("aqua, short", 1.0), ("aqua", 1.0), ("aqua", 0.5)]
    assert [(row["name"], row["k_ratio"]) for row in rows] == [(name, None) for name in decode_cpu.DENSE] + ours
    assert all(0 < row["seconds"] < 1 and 0 < row["step_seconds"] < 1 for row in rows)
    assert set(decode_cpu.measure_decode_cpu(SMALL, **given, parts=("step",))[0]) == {"name", "k_ratio", "step_seconds"}


def test_the_largest_cache_is_read_where_it_is_said(tmp_path, monkeypatch):
    for place, size in enumerate(("48K", "2048K", "garbage", "3M")):
        (tmp_path / str(place)).write_text(size + "\n")
    monkeypatch.setattr(decode_cpu, "CACHES", (tmp_path, "*"))
    assert decode_cpu.largest_cache() == 3 << 20
    monkeypatch.setattr(decode_cpu, "CACHES", (tmp_path / "nowhere", "*"))
    assert decode_cpu.largest_cache() == 0


@compiled
def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setitem(decode_cpu.DENSE, "SDPA", lambda *given: 1.01 * decode_cpu.matmul(*given))
    with pytest.raises(aqua.AquaError, match="a kernel is wrong: SDPA is"):
        decode_cpu.measure_decode_cpu(SMALL, length=64)
    monkeypatch.undo()
    right = decode_cpu.decode_step

    def wrong(*given):
        _, turned, chosen = right(*given)
        return decode_cpu.decode(turned, None, given[3], scaling=given[5]), turned, chosen

    monkeypatch.setattr(decode_cpu, "decode_step", wrong)
    with pytest.raises(aqua.AquaError, match=r"a kernel is wrong: aqua, k_ratio 0.75 is"):
        decode_cpu.measure_decode_cpu(SMALL, length=200)


@pytest.mark.parametrize(
    ("shape", "ratios", "words"),
    [
        (Shape(CPU, 4, 2, 32, torch.float16), (0.5,), "dtype torch.float16: it must be cpu with float32 or bfloat16"),
        (Shape(torch.device("meta"), 4, 2, 32, torch.float32), (0.5,), "device is meta"),
        (Shape(CPU, 4, 3, 32, torch.float32), (0.5,), "4 query heads do not divide into 3 key-value heads"),
        (SMALL, (0.5, 1.0), "k_ratio is 0.5, 1: each must leave out some dimensions"),
        (SMALL, (1.5,), "k_ratio is 1.5"),
    ],
)
def test_what_cannot_be_measured_is_refused(shape, ratios, words):
    with pytest.raises(aqua.AquaError, match=words):
        measure_breakeven(shape, k_ratios=ratios, lengths=[64, 128])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is not")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(aqua.AquaError, match="there is no CUDA GPU here"):
        measure_breakeven(Shape(torch.device("cuda"), 4, 2, 32, torch.bfloat16), lengths=[64, 128])


def test_on_a_gpu_the_steps_of_bench_decode_are_compared(monkeypatch):
    pytest.importorskip("triton")
    from contextlib import nullcontext

    from aqua_attention.bench import breakeven, decode

    def measured(shape, **given):
        assert (given["batch"], given["k_ratios"], shape.dtype) == (1, (1.0, 0.5), torch.bfloat16)
        rows = [("flash", None, 5.0), ("cuDNN", None, 3.0), ("aqua", 1.0, 4.0), ("aqua", 0.5, 2.0)]
        rows = [{"name": name, "k_ratio": ratio, "step_seconds": seconds} for name, ratio, seconds in rows]
        return {"rows": [{"name": "FlashInfer", "k_ratio": None, "absent": "no module"}, *rows]}

    monkeypatch.setattr(decode, "measure_decode", measured)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    shape = Shape(torch.device("cuda"), 8, 2, 64, torch.bfloat16)
    row = breakeven._row(shape, 128, (0.5,), sink=4, recent=64)
    assert row == {"length": 128, "dense": 3.0, "dense_name": "cuDNN", "whole": 4.0, "aqua": [2.0]}

    def chosen(problem, configs, heavy):
        assert ([each.min_length for each in configs], heavy) == ([0, 129], 0.2)
        assert all((each.select_p, each.k_ratio, each.sink) == (0.95, 0.25, 4) for each in configs)
        return [{"k_ratio": 0.25, "read": read, "step_seconds": seconds} for read, seconds in ((0.2, 1.0), (1.0, 1.5))]

    monkeypatch.setattr("aqua_attention.bench.select_gpu.measure_select", chosen)
    monkeypatch.setattr(breakeven.Problem, "random", lambda *given, **sizes: None)
    of_tokens = breakeven._row(shape, 128, (0.5,), 4, 64, [Choosing(0.25, select_p=0.95)])
    assert of_tokens == row | {"select": [1.0], "select_short": [1.5], "read": [0.2]}
