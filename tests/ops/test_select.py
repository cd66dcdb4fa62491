# SPDX-License-Identifier: Apache-2.0
"""Rotation and the choice of dimensions: by hand first, then properties that hold for every query."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import select_dimensions

from aqua_attention.config import SELECTIONS, SHARES, AquaConfig
from aqua_attention.ops.select import rotate

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
head_shapes = st.sampled_from([(4, 2), (6, 2), (3, 3), (1, 1), (4, 1)])  # query heads, key-value heads


def chosen(rows, key_rms=None, groups=1, head_dim=None, **settings):
    """The chosen dimensions of one token, `rows` by head, as lists of indices."""
    query = torch.tensor(rows)[None, :, None]
    kept = query.shape[-1]
    key_rms = torch.ones(groups, kept) if key_rms is None else torch.tensor(key_rms)
    selected = select_dimensions(query, AquaConfig.paper(**settings), head_dim or kept, key_rms)
    assert selected.shape == query.shape
    assert selected.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in selected[0, :, 0]]


def random_rotation(groups, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(groups, dim, dim, generator=generator, dtype=torch.float64)).Q


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_magnitude_takes_the_largest_absolute_values():
    assert chosen([[3.0, -1.0, 2.0, -4.0]], k_ratio=0.5) == [[0, 3]]
    assert chosen([[3.0, -1.0, 2.0, -4.0]], k_ratio=0.75) == [[0, 2, 3]]


def test_weighted_takes_the_largest_products_with_the_key_rms():
    # 3 * 1, 1 * 10, 2 * 2, 4 * 0.1
    rows, key_rms = [[3.0, -1.0, 2.0, -4.0]], [[1.0, 10.0, 2.0, 0.1]]
    assert chosen(rows, key_rms, k_ratio=0.5, selection="weighted") == [[1, 2]]
    assert chosen(rows, key_rms, k_ratio=0.5, selection="magnitude") == [[0, 3]]


def test_weighted_uses_the_key_rms_of_each_heads_own_group():
    rows, key_rms = [[1.0, 1.0]] * 4, [[2.0, 1.0], [1.0, 2.0]]
    assert chosen(rows, key_rms, groups=2, k_ratio=0.5, selection="weighted") == [[0], [0], [1], [1]]


@pytest.mark.parametrize("share", SHARES)
def test_static_takes_the_first_dimensions_whatever_the_query(share):
    rows = [[0.0, 1.0, 2.0, 9.0], [5.0, 1.0, 2.0, torch.nan]]
    assert chosen(rows, k_ratio=0.5, selection="static", share=share) == [[0, 1], [0, 1]]


def test_head_sharing_chooses_for_each_head_and_group_sharing_for_all_by_sums_of_squares():
    rows = [[3.0, 0.0, 0.0, 1.6], [0.0, 1.0, 0.0, 1.6]]
    assert chosen(rows, k_ratio=0.25, share="head") == [[0], [3]]
    # Squares: 9, 1, 0, 5.12. (Absolute values would give dimension 3: 3, 1, 0, 3.2.)
    assert chosen(rows, k_ratio=0.25, share="group") == [[0], [0]]


def test_group_sharing_weighs_before_it_squares():
    # (1 * 3)^2 = 9 against 2 * (2 * 1)^2 = 8; weighing after squaring would give 3 against 8.
    rows, key_rms = [[1.0, 2.0], [0.0, 2.0]], [[3.0, 1.0]]
    assert chosen(rows, key_rms, k_ratio=0.5, selection="weighted", share="group") == [[0], [0]]


def test_group_sharing_keeps_groups_apart():
    rows = [[2.0, 1.0], [0.0, 1.0], [1.0, 2.0], [1.0, 0.0]]
    assert chosen(rows, groups=2, k_ratio=0.5, share="group") == [[0], [0], [1], [1]]


@pytest.mark.parametrize("selection", ["magnitude", "weighted"])
@pytest.mark.parametrize("share", SHARES)
def test_the_lower_dimension_wins_a_tie(selection, share):
    options = {"k_ratio": 0.5, "selection": selection, "share": share}
    assert chosen([[1.0, -1.0, 1.0, -1.0]], **options) == [[0, 1]]
    assert chosen([[0.0, 0.0, 0.0, 0.0]], **options) == [[0, 1]]
    assert chosen([[1.0, 2.0, 1.0, 1.0]], **options) == [[0, 1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("share", SHARES)
def test_a_gpu_chooses_as_the_cpu_does_also_among_ties_and_nan(share):
    config = AquaConfig.paper(k_ratio=0.5, selection="weighted", share=share)
    query, rms = normal(2, 8, 500, 128, dtype=torch.float32).round(), torch.ones(2, 128)
    query[0, 0, 0, 100] = torch.nan
    expected = select_dimensions(query, config, 128, rms)
    assert torch.equal(select_dimensions(query.cuda(), config, 128, rms.cuda()).cpu(), expected)


@pytest.mark.parametrize("selection", ["magnitude", "weighted"])
def test_nan_and_infinity_stay_selected(selection):
    options = {"k_ratio": 0.5, "selection": selection}
    assert chosen([[5.0, 4.0, torch.nan, 1.0]], **options) == [[0, 2]]
    assert chosen([[5.0, 4.0, 3.0, -torch.inf]], **options) == [[0, 3]]
    rows = [[5.0, 4.0, 1.0, torch.nan], [5.0, 4.0, 1.0, 0.0]]
    assert chosen(rows, share="group", **options) == [[0, 3], [0, 3]]


def test_none_means_that_every_dimension_is_kept():
    query, rms = torch.ones(1, 1, 1, 4), torch.ones(1, 4)
    assert select_dimensions(query, AquaConfig.paper(k_ratio=1.0), 4, rms) is None
    assert select_dimensions(query, AquaConfig.paper(k_ratio=0.76), 4, rms) is None  # ceil(3.04)
    assert select_dimensions(query, AquaConfig.paper(k_ratio=0.75), 4, rms) is not None
    # s_ratio 0.5 left 4 of 8 dimensions; k counts from those, and the whole of them is None again.
    assert select_dimensions(query, AquaConfig.paper(k_ratio=1.0, s_ratio=0.5), 8, rms) is None
    assert chosen([[1.0, 2.0, 3.0, 4.0]], head_dim=8, k_ratio=0.5, s_ratio=0.5) == [[2, 3]]


@given(seed=seeds, shape=head_shapes, percent=st.integers(1, 99))
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("share", SHARES)
@QUICK
def test_every_row_has_exactly_k_even_with_many_ties(selection, share, seed, shape, percent):
    (heads, groups), kept = shape, 7
    query = normal(2, heads, 5, kept, seed=seed).round()  # small whole numbers: mostly ties
    config = AquaConfig.paper(k_ratio=percent / 100, selection=selection, share=share)
    k = config.selected_dims(kept)
    selected = select_dimensions(query, config, kept, torch.ones(groups, kept))
    assert (k == kept) == (selected is None)
    if selected is not None:
        assert (selected.sum(-1) == k).all()
        if share == "head" and selection != "static":
            best = query.abs().topk(k).values.sum(-1)
            assert torch.equal((query.abs() * selected).sum(-1), best)


@given(seed=seeds, groups=st.integers(1, 4), percent=st.integers(1, 80))
@pytest.mark.parametrize("selection", SELECTIONS)
@QUICK
def test_group_sharing_is_head_sharing_when_a_group_has_one_head(selection, seed, groups, percent):
    query, rms = normal(2, groups, 3, 8, seed=seed), normal(groups, 8, seed=seed + 1).abs()
    head, group = (
        select_dimensions(query, AquaConfig.paper(k_ratio=percent / 100, selection=selection, share=share), 8, rms)
        for share in SHARES
    )
    assert torch.equal(head, group)


@given(seed=seeds, shape=head_shapes, dim=st.sampled_from([2, 5, 16]))
@QUICK
def test_rotating_queries_and_keys_leaves_their_products(seed, shape, dim):
    heads, groups = shape
    query, key = normal(2, heads, 3, dim, seed=seed), normal(2, groups, 4, dim, seed=seed + 1)
    rotation = random_rotation(groups, dim, seed)

    def products(query, key):
        return query @ key.repeat_interleave(heads // groups, dim=1).transpose(-1, -2)

    rotated = products(rotate(query, rotation), rotate(key, rotation))
    torch.testing.assert_close(rotated, products(query, key), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (4, 1)], ids=["gqa", "mha", "mqa"])
def test_each_head_is_rotated_by_the_matrix_of_its_key_value_head(heads, groups):
    query, rotation = normal(2, heads, 3, 8), random_rotation(groups, 8, seed=1)
    rotated = rotate(query, rotation)
    for head in range(heads):
        own = rotation[head // (heads // groups)]
        torch.testing.assert_close(rotated[:, head], query[:, head] @ own, rtol=1e-12, atol=1e-12)


def test_a_rotation_with_fewer_columns_gives_the_leading_dimensions():
    states, rotation = normal(2, 4, 3, 8), random_rotation(2, 8, seed=1)
    torch.testing.assert_close(rotate(states, rotation[..., :5]), rotate(states, rotation)[..., :5])


def test_bfloat16_states_are_rotated_to_rounding_and_no_worse():
    dim = 64
    states, rotation = normal(2, 4, 50, dim, dtype=torch.bfloat16), random_rotation(2, dim, seed=1).float()
    exact = rotate(states.double(), rotation.double())
    sizes = rotate(states.double().abs(), rotation.double().abs())
    # One rounding to bfloat16 (half an eps), after a float32 sum of `dim` products.
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + dim * torch.finfo(torch.float32).eps * sizes
    rotated = rotate(states, rotation)
    assert rotated.dtype == torch.bfloat16
    assert ((rotated.double() - exact).abs() <= bound).all()
    # The bound tells the difference: a rotation that was itself rounded to bfloat16 breaks it.
    assert not ((rotate(states, rotation.bfloat16()).double() - exact).abs() <= bound).all()


ONE = torch.ones(1, 4)


@pytest.mark.parametrize(("allowed", "kept"), [(0.0, 4), (0.99, 4), (1.0, 3), (4.99, 3), (5.0, 2), (14.0, 1), (1e9, 1)])
def test_adaptive_k_drops_as_many_of_the_smallest_as_the_error_allows(allowed, kept):
    """Squared entries 16, 9, 4, 1: dropping the last costs 1, the last two 5, the last three 14."""
    query = torch.tensor([[[[4.0, -3.0, 2.0, -1.0]]]])
    selected = select_dimensions(query, AquaConfig.paper(logit_error=allowed), 4, ONE, scaling=1.0)
    assert selected[0, 0, 0].tolist() == [place < kept for place in range(4)]


def test_adaptive_k_weighs_by_the_keys_and_the_scaling():
    query, rms = torch.tensor([[[[1.0, 1.0, 1.0]]]]), torch.tensor([[1.0, 2.0, 3.0]])
    # Variances at scaling 0.5: 0.25, 1, 2.25. In order of magnitude (all equal) the last go first.
    weighted = AquaConfig.paper(logit_error=1.3, selection="weighted")
    assert select_dimensions(query, weighted, 3, rms, scaling=0.5)[0, 0, 0].tolist() == [False, False, True]
    plain = AquaConfig.paper(logit_error=2.3)
    assert select_dimensions(query, plain, 3, rms, scaling=0.5)[0, 0, 0].tolist() == [True, True, False]


def test_adaptive_k_of_a_group_sums_the_errors_of_its_heads():
    query = torch.tensor([[[[3.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]]]])  # summed squares 9, 4, 2
    for allowed, expected in ((1.9, [True, True, True]), (2.0, [True, True, False]), (6.0, [True, False, False])):
        config = AquaConfig.paper(logit_error=allowed, share="group")
        selected = select_dimensions(query, config, 3, torch.ones(1, 3), scaling=1.0)
        assert selected[0, 0, 0].tolist() == selected[0, 1, 0].tolist() == expected


def test_adaptive_k_keeps_a_nan_visible():
    query = torch.tensor([[[[float("nan"), 1.0, 2.0, 3.0]]]])
    assert select_dimensions(query, AquaConfig.paper(logit_error=100.0), 4, ONE, scaling=1.0)[0, 0, 0, 0]


@pytest.mark.parametrize("share", ["head", "group"])
def test_adaptive_k_is_the_fewest_that_hold_the_bound(share):
    generator = torch.Generator().manual_seed(0)
    query, rms = torch.randn(2, 4, 5, 16, generator=generator), torch.rand(2, 16, generator=generator) + 0.1
    config = AquaConfig.paper(logit_error=0.3, selection="weighted", share=share)
    selected = select_dimensions(query, config, 16, rms)
    variance = (query.reshape(2, 2, 2, 5, 16) * rms[:, None, None] / 4).square()
    selected = selected.reshape(variance.shape)
    if share == "group":
        variance, selected = variance.sum(2, keepdim=True), selected[:, :, :1]
    dropped = torch.where(selected, 0, variance).sum(-1)
    smallest_kept = torch.where(selected, variance, torch.inf).amin(-1)
    assert (dropped <= 0.3).all()
    alone = selected.sum(-1) == 1  # one dimension is always kept
    assert ((dropped + smallest_kept > 0.3) | alone).all()
    assert not alone.all()
    assert selected.sum(-1).unique().numel() > 1
