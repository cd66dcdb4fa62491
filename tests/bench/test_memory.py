# SPDX-License-Identifier: Apache-2.0
"""Bytes of caches: counted where they are allocated."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache

import aqua_attention as aqua
from aqua_attention.bench.held import PARTS, held_by_part
from aqua_attention.bench.memory import measure_memory, storage_bytes
from aqua_attention.cache.scored import ScoredLayer
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.ops.plan import LayerPlan


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


def chosen_row(llama, length, **changes):
    """The row of a setting that chooses tokens, and the dense one."""
    model, projections = llama
    config = aqua.AquaConfig(**{"k_ratio": 0.25, "select_tokens": 20, "score_bits": 8} | changes)
    dense, *_, row = measure_memory(model, projections, [config], length=length)["rows"]
    assert row["setting"]["select_tokens"] == 20
    assert sum(row[f"{part}_bytes"] for part in (*PARTS, "other")) == row["bytes"]
    return row, dense


def test_a_choice_of_tokens_says_what_its_copy_takes(llama):
    if reason := no_kernel_reason():
        pytest.skip(reason)
    length, heads, dim, layers = 240, 2, 16, 3
    row, dense = chosen_row(llama, length)
    of_tokens = layers * heads * length
    assert dense["bytes"] == of_tokens * 2 * dim * 4
    assert row["expected_bytes"] == of_tokens * (2 * dim * 4 + dim + 2), "and 8 bits of each key, with a scale"
    # Growing stores have room for a few tokens more, the copy for whole tiles.
    assert of_tokens * dim * 4 <= row["keys_bytes"] <= 1.1 * of_tokens * dim * 4
    assert row["copy_bytes"] == layers * heads * 256 * (dim + 2)
    int8, _ = chosen_row(llama, length, bits=8)
    assert int8["copy_bytes"] == 0, "a growing cache in int8 is scored in plain torch"
    assert int8["bytes"] < row["bytes"]


@pytest.mark.parametrize(
    ("bits", "score_bits", "least", "most"),
    [(None, 8, 1.25, 1.26), (8, 8, 0.75, 0.76), (None, 4, 1.125, 1.13), (8, 4, 0.625, 0.64)],
)
def test_what_the_cache_of_a_gpu_holds_is_what_its_widths_say(bits, score_bits, least, most):
    """At heads of 128 in 16 bits: a quarter more than dense, and in int8 a quarter less; an eighth more by 4 bits."""
    config, ones = aqua.AquaConfig.preset("select", bits=bits, score_bits=score_bits), torch.ones(2, 128)
    rotation = torch.eye(128).repeat(2, 1, 1)
    plan = LayerPlan(rotation, ones, config, 128**-0.5, key_scale=ones, key_mean=0 * ones)
    layer = ScoredLayer(plan, max_cache_len=1024, memory={})
    layer.batch_size, layer.num_heads, layer.dtype, layer.device = 3, 2, torch.bfloat16, torch.device("cpu")
    layer.cache = layer._new_cache(128)
    cache = Cache(layers=[layer])
    row, dense = held_by_part(cache, 1024), 3 * 2 * 1024 * 2 * 128 * 2
    held = sum(row[f"{part}_bytes"] for part in PARTS)
    assert held == row["expected_bytes"]
    assert least <= held / dense <= most
    assert row["copy_bytes"] == 3 * 2 * 1024 * (16 * score_bits + 2)
    scale = 2 if (bits, score_bits) == (8, 4) else 0
    assert row["keys_bytes"] == 3 * 2 * 1024 * (128 * (2 if bits is None else 1) + scale)
    assert row["other_bytes"] == storage_bytes(cache) - held
