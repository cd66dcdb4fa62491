# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics: the right sums, whatever the batching, and no NaN gets in."""

import numpy as np
import pytest
import torch

from aqua_attention.calibration.statistics import LayerStatistics, merge
from aqua_attention.errors import AquaError

BATCH, HEADS, GROUPS, LENGTH, DIM = 4, 6, 2, 33, 8
SUMS = ("query_gram", "key_gram", "key_sum")


def states(seed=0, dtype=torch.float32, heads=HEADS, groups=GROUPS):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, heads, LENGTH, DIM, generator=generator)
    key = torch.randn(BATCH, groups, LENGTH, DIM, generator=generator) + 0.5
    return query.to(dtype), key.to(dtype)


def in_float64(states):
    return states.double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)], ids=["gqa", "mha", "mqa"])
def test_the_sums_are_those_of_float64_within_float32_rounding(dtype, heads, groups):
    query, key = states(dtype=dtype, heads=heads, groups=groups)
    found = LayerStatistics.of(query, key)
    q, k, per_group = in_float64(query), in_float64(key), heads // groups
    rounding = np.finfo(np.float32).eps * per_group * LENGTH  # of a float32 sum of that many products
    for group in range(groups):
        rows = q[:, group * per_group : (group + 1) * per_group].reshape(-1, DIM)
        tokens = k[:, group].reshape(-1, DIM)
        for gram, matrix in ((found.query_gram, rows), (found.key_gram, tokens)):
            error = np.abs(gram[group].numpy() - matrix.T @ matrix)
            assert (error <= rounding * (np.abs(matrix).T @ np.abs(matrix))).all()
        np.testing.assert_allclose(found.key_sum[group].numpy(), tokens.sum(0), rtol=1e-12)
    assert found.query_count == BATCH * per_group * LENGTH
    assert found.key_count == BATCH * LENGTH


def test_the_sums_are_float64_on_the_cpu_with_one_matrix_a_key_value_head():
    found = LayerStatistics.of(*states(dtype=torch.bfloat16))
    assert found.query_gram.shape == found.key_gram.shape == (GROUPS, DIM, DIM)
    assert found.key_sum.shape == (GROUPS, DIM)
    for name in SUMS:
        assert getattr(found, name).dtype == torch.float64
        assert getattr(found, name).device.type == "cpu"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_sum_of_two_parts_is_the_whole(at):
    query, key = states()
    whole = LayerStatistics.of(query, key)
    parts = LayerStatistics.of(query[:at], key[:at]) + LayerStatistics.of(query[at:], key[at:])
    for name in SUMS:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    assert (parts.query_count, parts.key_count) == (whole.query_count, whole.key_count)


def test_a_cancelling_batch_keeps_the_small_one_that_came_before():
    query, key = states()
    small = LayerStatistics.of(query, key)
    large = LayerStatistics.of(query, key * 1e4)
    error = (small + large).key_gram - large.key_gram - small.key_gram
    # In float32 the small Gram would be lost in the rounding of the large one, which is 1e8 times larger.
    assert error.abs().max() < 1e-6 * small.key_gram.abs().max()


def test_adding_changes_neither_part():
    first, second = LayerStatistics.of(*states(1)), LayerStatistics.of(*states(2))
    before = first.key_gram.clone()
    total = first + second
    assert torch.equal(first.key_gram, before)
    assert torch.equal(total.key_gram, second.key_gram + before)


def test_merge_adds_layer_by_layer():
    first = {layer: LayerStatistics.of(*states(layer)) for layer in (0, 3)}
    second = {layer: LayerStatistics.of(*states(10 + layer)) for layer in (3, 0)}
    merged = merge(first, second)
    assert list(merged) == [0, 3]
    for layer in (0, 3):
        assert torch.equal(merged[layer].query_gram, first[layer].query_gram + second[layer].query_gram)
        assert merged[layer].key_count == 2 * BATCH * LENGTH


def test_merging_other_layers_is_refused_naming_both_sets():
    layer = LayerStatistics.of(*states())
    with pytest.raises(AquaError, match=r"statistics of layers \[0, 1\] and \[0, 2\] cannot be merged: "):
        merge({1: layer, 0: layer}, {0: layer, 2: layer})


def test_merging_other_shapes_is_refused_naming_both():
    first, second = LayerStatistics.of(*states(groups=2)), LayerStatistics.of(*states(groups=3))
    with pytest.raises(AquaError, match=r"different shapes, \(2, 8, 8\) and \(3, 8, 8\), cannot be merged"):
        first + second
    with pytest.raises(AquaError, match="different shapes"):
        merge({0: first}, {0: second})


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused_with_the_layer_named(which, value):
    query, key = states()
    (query if which == "query" else key)[1, 0, 5, 3] = value
    with pytest.raises(AquaError, match=r"layer 7 gave NaN or infinite .* --dtype float32"):
        LayerStatistics.of(query, key).check_finite(7)


def test_finite_statistics_pass():
    LayerStatistics.of(*states()).check_finite(0)
