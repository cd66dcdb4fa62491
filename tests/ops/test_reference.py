# SPDX-License-Identifier: Apache-2.0
"""The specification: worked by hand, against PyTorch's dense attention, and against a plain double loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_attention.ops.mask import window_codes
from aqua_attention.ops.reference import attention_reference

SHAPES = pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (4, 1)], ids=["gqa", "mha", "mqa"])


def problem(seed, batch=2, heads=4, groups=2, queries=6, keys=6, width=5, value_dim=5, dtype=torch.float64):
    """Random query, key, value and selected (about half of the dimensions)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query = normal(batch, heads, queries, width)
    selected = torch.rand(query.shape, generator=generator) < 0.5
    return query, normal(batch, groups, keys, width), normal(batch, groups, keys, value_dim), selected


# Two tokens, two dimensions, scaling 1. Token 1 has query (2, 1) and selects dimension 0 only, so its scores
# are 2 * ln(2)/2 = ln 2 and 2 * 0 = 0: probabilities 2/3 and 1/3. Every dimension would give ln(2) + 5 and 7.
QUERY = torch.tensor([[[[1.0, 3.0], [2.0, 1.0]]]], dtype=torch.float64)
KEY = torch.tensor([[[[math.log(2) / 2, 5.0], [0.0, 7.0]]]], dtype=torch.float64)
VALUE = torch.tensor([[[[3.0, 0.0], [0.0, 3.0]]]], dtype=torch.float64)
SELECTED = torch.tensor([[[[True, False], [True, False]]]])


def second_token(**options):
    output = attention_reference(QUERY, KEY, VALUE, SELECTED, **{"scaling": 1.0, **options})
    assert output[0, 0, 0].tolist() == pytest.approx(options.pop("first", [3.0, 0.0]))  # sees only itself
    return output[0, 0, 1].tolist()


def mixture(first, second):
    """Values (3, 0) and (0, 3), mixed by these two weights."""
    return pytest.approx([3 * first / (first + second), 3 * second / (first + second)], rel=1e-12)


def test_by_hand_only_selected_dimensions_are_scored():
    assert second_token() == pytest.approx([2.0, 1.0], rel=1e-12)


def test_by_hand_without_selection_every_dimension_is_scored():
    output = attention_reference(QUERY, KEY, VALUE, None, scaling=1.0)
    assert output[0, 0, 1].tolist() == mixture(2 * math.exp(5), math.exp(7))


def test_by_hand_a_recent_or_sink_token_is_scored_exactly():
    assert second_token(recent=1) == mixture(2, math.exp(7))
    assert second_token(sink=1) == mixture(2 * math.exp(5), 1)


def test_by_hand_scaling_is_applied_and_defaults_to_the_root_of_the_width():
    assert second_token(scaling=2.0) == mixture(4, 1)
    assert second_token(scaling=None) == mixture(2 ** (1 / math.sqrt(2)), 1)


def test_by_hand_softcap_bends_the_scaled_scores():
    assert second_token(softcap=0.5) == mixture(math.exp(0.5 * math.tanh(math.log(2) / 0.5)), 1)


def test_by_hand_s_aux_takes_a_share_of_the_softmax_and_has_no_value():
    # Weights 2, 1 and e^0 = 1 for the extra logit; the first token shares its own weight with it.
    output = attention_reference(QUERY, KEY, VALUE, SELECTED, scaling=1.0, s_aux=torch.zeros(1))
    assert output[0, 0, 1].tolist() == pytest.approx([1.5, 0.75], rel=1e-12)
    weight = math.sqrt(2)  # score 1 * ln(2)/2
    assert output[0, 0, 0].tolist() == pytest.approx([3 * weight / (weight + 1), 0.0], rel=1e-12)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("everything", [None, True], ids=["none", "all-true"])
def test_with_every_dimension_it_is_dense_attention(heads, groups, dtype, everything):
    query, key, value, selected = problem(0, 2, heads, groups, 17, 17, 8, 12, dtype)
    selected = None if everything is None else torch.ones_like(selected)
    wide = [states.repeat_interleave(heads // groups, dim=1) for states in (key, value)]
    dense = F.scaled_dot_product_attention(query, *wide, is_causal=True)
    torch.testing.assert_close(attention_reference(query, key, value, selected), dense)


@SHAPES
@pytest.mark.parametrize(("sink", "recent"), [(9, 0), (0, 9), (4, 5), (50, 50)])
def test_a_window_over_everything_is_dense_attention(heads, groups, sink, recent):
    query, key, value, selected = problem(1, 2, heads, groups, 4, 9)
    output = attention_reference(query, key, value, selected, sink=sink, recent=recent)
    dense = attention_reference(query, key, value, None)
    assert not torch.allclose(attention_reference(query, key, value, selected), dense, atol=0.01)
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)


def naive(query, key, value, selected, visible, exact, scaling, softcap, s_aux):
    """The definition of the score, one number at a time."""
    batch, heads, queries, width = query.shape
    groups, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    output = torch.zeros(batch, heads, queries, value_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(queries):
                weights = {}
                for j in range(keys):
                    if not visible(b, i, j):
                        continue
                    dims = [c for c in range(width) if exact(b, i, j) or bool(selected[b, h, i, c])]
                    score = scaling * sum(float(query[b, h, i, c]) * float(key[b, g, j, c]) for c in dims)
                    weights[j] = math.exp(softcap * math.tanh(score / softcap) if softcap else score)
                total = sum(weights.values()) + (math.exp(float(s_aux[h])) if s_aux is not None else 0.0)
                for j, weight in weights.items():
                    output[b, h, i] += weight / total * value[b, g, j]
    return output


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    queries=st.integers(1, 4),
    before=st.integers(0, 3),
    form=st.sampled_from(["none", "boolean", "codes"]),
    sink=st.integers(0, 3),
    recent=st.integers(0, 3),
    softcap=st.sampled_from([None, 0.7]),
    extra=st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_it_is_the_plain_double_loop(seed, shape, queries, before, form, sink, recent, softcap, extra):
    heads, groups = shape
    keys, scaling = queries + before, 0.6
    query, key, value, selected = problem(seed, 2, heads, groups, queries, keys, 3, 4)
    generator = torch.Generator().manual_seed(seed)
    padding = [0, 1]  # of the two rows of the batch, where the mask can say so
    hidden = torch.rand(2, 1, queries, keys, generator=generator) < 0.3
    s_aux = torch.randn(heads, generator=generator, dtype=torch.float64) if extra else None
    positions = torch.arange(keys)
    causal = (positions <= positions[before:, None])[None, None].expand(2, 1, -1, -1)
    mask = None
    if form == "boolean":
        mask = causal & ~hidden
    elif form == "codes":
        starts = torch.tensor(padding)
        mask = causal & (positions >= starts[:, None, None, None])
        places = positions - starts[:, None]
        mask = window_codes(mask, places[:, before:], places, sink, recent)
    window = {} if form == "codes" else {"sink": sink, "recent": recent}  # the codes carry it

    def visible(b, i, j):
        if form == "boolean":
            return j <= before + i and not hidden[b, 0, i, j]
        return j <= before + i and (form == "none" or j >= padding[b])

    def exact(b, i, j):
        seen = [other for other in range(keys) if visible(b, i, other)]
        rank = seen.index(j)
        return rank < sink or rank >= len(seen) - recent

    options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    found = attention_reference(query, key, value, selected, mask=mask, **window, **options)
    expected = naive(query, key, value, selected, visible, exact, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "s_aux"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_a_query_that_sees_nothing_gives_zeros(extra, dtype):
    query, key, value, selected = problem(2)
    mask = torch.ones(2, 1, 6, 6).tril().to(dtype)
    mask[1, :, 2] = 0
    s_aux = torch.zeros(4) if extra else None
    output = attention_reference(query, key, value, selected, mask=mask, sink=1, recent=1, s_aux=s_aux)
    assert (output[1, :, 2] == 0).all()
    output[1, :, 2] = 1
    assert output.isfinite().all()
    assert (output != 0).all()


@pytest.mark.parametrize("window", [0, 2])
def test_nan_in_a_query_spoils_its_own_row_only(window):
    query, key, value, selected = problem(3)
    query[1, 2, 3, 0], selected[1, 2, 3, 0] = torch.nan, True
    output = attention_reference(query, key, value, selected, recent=window)
    assert output[1, 2, 3].isnan().all()
    output[1, 2, 3] = 0
    assert output.isfinite().all()


@pytest.mark.parametrize("window", [0, 2])
def test_nan_in_a_key_spoils_every_query_that_sees_it_and_no_other(window):
    query, key, value, selected = problem(4)
    key[0, 1, 3, 0] = torch.nan
    output = attention_reference(query, key, value, selected, sink=window, recent=window)
    spoilt = torch.zeros(2, 4, 6, dtype=torch.bool)
    spoilt[0, 2:, 3:] = True  # the second group's two heads, from token 3 on
    assert torch.equal(output.isnan().any(-1), spoilt)
    assert torch.equal(output.isnan().all(-1), spoilt)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_dropped_infinity_or_nan_in_a_query_does_not_leak(value):
    query, key, values, selected = problem(5)
    selected[..., 4] = False
    clean = attention_reference(query, key, values, selected)
    query[..., 4] = value
    assert torch.equal(attention_reference(query, key, values, selected), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    query, key, value, selected = problem(6, queries=50, keys=50, dtype=dtype)
    output = attention_reference(query, key, value, selected)
    assert output.dtype == dtype
    exact = attention_reference(query.double(), key.double(), value.double(), selected)
    unit = torch.finfo(dtype).eps / 2
    assert ((output.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6).all()
