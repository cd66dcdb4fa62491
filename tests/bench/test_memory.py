# SPDX-License-Identifier: Apache-2.0
"""Bytes of caches: counted where they are allocated."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.bench.memory import measure_memory, storage_bytes


def test_storages_are_counted_once_and_whole():
    cache = DynamicCache()
    whole = torch.zeros(1, 2, 100, 4)
    cache.update(whole, torch.zeros(1, 2, 100, 3), 0)
    held = storage_bytes(cache)
    assert held == 800 * 4 + 600 * 4
    assert storage_bytes([cache, cache]) == held
    assert storage_bytes({"view": whole[:, :, :1], "same": whole[:, :, 5:]}) == 800 * 4


def test_the_rows_say_what_is_held(llama):
    model, projections = llama
    configs = [aqua.AquaConfig.paper(), aqua.AquaConfig.paper(s_ratio=0.5), aqua.AquaConfig.paper(bits=8)]
    result = measure_memory(model, projections, configs, length=240, batch=8)
    dense, *others = [row for row in result["rows"] if "absent" not in row]
    length = 240
    assert dense["bytes"] == 3 * 2 * 8 * 2 * length * 16 * 4
    aqua_rows = [row for row in others if isinstance(row["setting"], dict)]
    whole, narrow, int8 = (row["ratio"] for row in aqua_rows)
    assert 1 <= whole <= 1.03
    assert 0.75 <= narrow <= 0.75 * 1.03
    assert 0.25 < int8 < 0.75, "float32 here: a quarter, but for the last 64 to 128 of 240 tokens"
    assert [row["setting"]["bits"] for row in aqua_rows] == [None, None, 8]


def test_too_short_and_too_long_are_refused(llama):
    for length, message in ((3, "length is 3"), (257, "the model knows 256 positions")):
        with pytest.raises(aqua.AquaError, match=message):
            measure_memory(*llama, [], length=length)
