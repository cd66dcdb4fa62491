# SPDX-License-Identifier: Apache-2.0
"""The chunked and fused paths compute the function of the reference, over shapes, windows, masks and dtypes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import attention_mass
from torch._subclasses.fake_tensor import FakeTensorMode

from aqua_attention.ops import dense, reference
from aqua_attention.ops.api import attention
from aqua_attention.ops.backends import torch as torch_backends
from aqua_attention.ops.mask import window_codes

LENGTHS = (1, 2, 63, 64, 65, 129, 300)
WINDOWS = [(0, 0), (4, 0), (0, 1), (0, 64), (4, 16), (3, 65), (100, 300)]
HEADS = [(4, 2), (3, 3), (4, 1)]
WIDTHS = [(16, 16), (12, 16), (16, 12)]  # stored key dimensions (fewer with s_ratio), value dimensions
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks small enough that every length above 64 takes several; the library's own sizes take one.
BLOCKS = st.sampled_from([3000, 1 << 24])
seeds = st.integers(0, 2**31)


def problem(seed, heads=(4, 2), queries=65, keys=None, widths=(16, 16), dtype=torch.float32, device="cpu"):
    """Random query, key, value, and half of the dimensions selected; batch of 2."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys

    def normal(heads, length, width):
        return torch.randn(2, heads, length, width, generator=generator).to(dtype).to(device)

    states = (
        normal(heads[0], queries, widths[0]) * 2,
        normal(heads[1], keys, widths[0]),
        normal(heads[1], keys, widths[1]),
    )
    size = torch.rand(states[0].shape, generator=generator)
    return *states, (size >= size.median(-1, keepdim=True).values).to(device)


def boolean_mask(queries, keys, padding=0, sliding=None, device="cpu"):
    """[2, 1, queries, keys]: causal; the second row left-padded; with a sliding window where given."""
    positions = torch.arange(keys, device=device)
    rows = positions[keys - queries :, None]
    starts = torch.tensor([0, padding], device=device)[:, None, None, None]
    visible = (positions <= rows) & (positions >= starts)
    return visible if sliding is None else visible & (positions > rows - sliding)


def relative_error(output, exact):
    """Root mean square over output rows of the error relative to the row; a row of zeros must be zeros."""
    error, size = (output.double() - exact).norm(dim=-1), exact.norm(dim=-1)
    assert (error[size == 0] == 0).all()
    return float((error / size)[size > 0].square().mean().sqrt())


def assert_as_accurate_as_reference(states, selected, impl, **options):
    """Against float64, no more than twice the reference's own error in this dtype.

    The reference rounds once, to its output. The fused path rounds up to three times (probabilities, the part
    outside the window, the output); independent roundings add in squares, so that is less than twice.
    """
    exact = reference.attention_reference(*(each.double() for each in states), selected, **options)
    limit = relative_error(reference.attention_reference(*states, selected, **options), exact)
    output = attention(*states, selected, impl=impl, **options)
    assert output.dtype == states[2].dtype
    # A few units in the last place of float32, for a reference that happens to be exact.
    limit = 2 * limit + 16 * torch.finfo(torch.float32).eps
    assert relative_error(output, exact) <= limit, f"query {tuple(states[0].shape)}, {options}"


@pytest.fixture
def chunks(monkeypatch):
    """Small blocks of queries; counts the blocks."""
    calls, whole = [], reference.attention_probabilities
    monkeypatch.setattr(reference, "CHUNK_SCORES", 3000)
    monkeypatch.setattr(reference, "attention_probabilities", lambda *a, **k: calls.append(1) or whole(*a, **k))
    return calls


@given(
    seed=seeds,
    impl=st.sampled_from(["chunked", "fused"]),
    heads=st.sampled_from(HEADS),
    length=st.sampled_from(LENGTHS),
    window=st.sampled_from(WINDOWS),
    widths=st.sampled_from(WIDTHS),
    block=BLOCKS,
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_prefill_with_and_without_a_window(seed, impl, heads, length, window, widths, block):
    *states, selected = problem(seed, heads, length, widths=widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_SCORES", block)
        patch.setattr(dense, "SCORES_AT_ONCE", block)
        assert_as_accurate_as_reference(states, selected, impl, sink=window[0], recent=window[1])


@given(
    seed=seeds,
    heads=st.sampled_from(HEADS),
    queries=st.sampled_from((1, 2, 63, 64)),
    before=st.sampled_from((1, 65, 129)),
    window=st.sampled_from(WINDOWS),
    widths=st.sampled_from(WIDTHS),
    block=BLOCKS,
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_queries_after_a_cache(seed, heads, queries, before, window, widths, block):
    *states, selected = problem(seed, heads, queries, queries + before, widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_SCORES", block)
        assert_as_accurate_as_reference(states, selected, "chunked", sink=window[0], recent=window[1])
        assert_as_accurate_as_reference(states, selected, "fused")


@given(
    seed=seeds,
    heads=st.sampled_from(HEADS),
    queries=st.sampled_from((1, 2, 64, 65)),
    before=st.sampled_from((0, 40)),
    padding=st.sampled_from((0, 1, 30)),
    sliding=st.sampled_from((None, 1, 20)),
    window=st.sampled_from(WINDOWS),
    codes=st.booleans(),
    block=BLOCKS,
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_masks(seed, heads, queries, before, padding, sliding, window, codes, block):
    keys = queries + before
    *states, selected = problem(seed, heads, queries, keys)
    mask, (sink, recent) = boolean_mask(queries, keys, padding, sliding), window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_SCORES", block)
        assert_as_accurate_as_reference(states, selected, "fused", mask=mask)
        if codes:
            positions = torch.arange(keys) - torch.tensor([[0], [padding]])
            mask, sink, recent = window_codes(mask, positions[:, before:], positions, *window), 0, 0
        assert_as_accurate_as_reference(states, selected, "chunked", mask=mask, sink=sink, recent=recent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (4, 16), (0, 64), (2, 0)])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_low_precision_loses_no_more_than_the_reference(dtype, impl, sink, recent, widths):
    *states, selected = problem(1, queries=300, widths=widths, dtype=dtype)
    assert_as_accurate_as_reference(states, selected, impl, sink=sink, recent=recent)


def test_small_blocks_are_several_and_change_nothing(chunks, monkeypatch):
    *states, selected = problem(2, queries=129)
    options = {"sink": 4, "recent": 16, "softcap": 3.0, "s_aux": torch.ones(4)}
    small = attention(*states, selected, impl="chunked", **options)
    assert len(chunks) > 10
    monkeypatch.setattr(reference, "CHUNK_SCORES", 1 << 24)
    torch.testing.assert_close(small, attention(*states, selected, impl="chunked", **options))
    assert_as_accurate_as_reference(states, selected, "chunked", **options)


def test_a_small_window_budget_takes_several_blocks(monkeypatch):
    *states, selected = problem(2, queries=129)
    calls, whole = [], torch_backends._hidden_in_window
    monkeypatch.setattr(dense, "SCORES_AT_ONCE", 3000)
    monkeypatch.setattr(torch_backends, "_hidden_in_window", lambda *args: calls.append(1) or whole(*args))
    assert_as_accurate_as_reference(states, selected, "fused", sink=4, recent=16)
    assert len(calls) == 3  # of 64 queries each


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("length", [1, 64, 129])
@pytest.mark.parametrize("block", [3000, 1 << 24])
def test_attention_with_lse_is_the_plain_softmax(widths, length, block, monkeypatch):
    monkeypatch.setattr(dense, "SCORES_AT_ONCE", block)
    query, key, value, _ = problem(3, queries=length, widths=widths)
    output, lse = dense.attention_with_lse(query, key, value, 0.3)
    wide_key, wide_value = (states.double().repeat_interleave(2, dim=1) for states in (key, value))
    scores = 0.3 * query.double() @ wide_key.transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ wide_value, rtol=1e-5, atol=1e-5)


def test_a_fused_kernel_for_fewer_queries_is_asked_only_where_it_can_answer(monkeypatch):
    """Without a GPU: tensors have no content, and torch's flash attention says yes to everything."""
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda given: True)

    def takes(width, **options):
        with FakeTensorMode():
            options = {"dtype": torch.bfloat16, "device": "cuda"} | options
            query, key = (torch.empty(1, heads, length, width, **options) for heads, length in ((4, 64), (2, 99)))
            return dense.takes_fewer_queries(query, key, key)

    assert takes(96)
    assert not takes(100)  # a head of OpenLLaMA 3B
    assert not takes(96, dtype=torch.float32)
    assert not takes(96, requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes(96)


@pytest.mark.parametrize("impl", ["chunked", "fused", "reference", "auto"])
def test_a_row_that_a_boolean_mask_hides_entirely_gives_zeros(impl):
    *states, selected = problem(4, queries=65)
    output = attention(*states, selected, mask=boolean_mask(65, 65, padding=30), impl=impl)
    assert (output[1, :, :30] == 0).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("impl", ["chunked", "fused", "reference"])
@pytest.mark.parametrize("window", [(0, 0), (2, 4)])
def test_nan_in_a_query_or_key_spoils_what_sees_it_and_no_more(impl, window):
    query, key, value, selected = problem(5, queries=65)
    query[0, 1, 40, 0], selected[0, 1, 40, 0] = torch.nan, True
    key[1, 0, 50, 0] = torch.nan
    output = attention(query, key, value, selected, sink=window[0], recent=window[1], impl=impl)
    spoilt = torch.zeros(2, 4, 65, dtype=torch.bool)
    spoilt[0, 1, 40] = spoilt[1, :2, 50:] = True
    assert torch.equal(output.isnan().any(-1), spoilt)


@pytest.mark.parametrize("impl", ["chunked", "fused", "reference"])
@pytest.mark.parametrize("dropped", [torch.inf, torch.nan])
def test_a_dropped_infinity_or_nan_in_a_query_does_not_leak(impl, dropped):
    query, key, value, selected = problem(6, queries=65)
    selected[..., 3] = False
    clean = attention(query, key, value, selected, impl=impl)
    query[..., 3] = dropped
    assert torch.equal(attention(query, key, value, selected, impl=impl), clean)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
class TestOnCuda:
    def test_prefill(self, dtype, impl, heads):
        for length, widths in itertools.product(LENGTHS, [(64, 64), (48, 64), (64, 48)]):
            *states, selected = problem(length, heads, length, None, widths, dtype, "cuda")
            for sink, recent in WINDOWS:
                assert_as_accurate_as_reference(states, selected, impl, sink=sink, recent=recent)

    def test_queries_after_a_cache(self, dtype, impl, heads):
        for queries in (1, 2, 64):
            *states, selected = problem(queries, heads, queries, 300, (48, 64), dtype, "cuda")
            assert_as_accurate_as_reference(states, selected, impl)

    @pytest.mark.parametrize("sliding", [None, 20])
    def test_boolean_masks_and_rows_that_they_hide_entirely(self, dtype, impl, heads, sliding):
        *states, selected = problem(7, heads, 129, None, (64, 64), dtype, "cuda")
        mask = boolean_mask(129, 129, 30, sliding, "cuda")
        assert_as_accurate_as_reference(states, selected, impl, mask=mask)
        assert (attention(*states, selected, impl=impl, mask=mask)[1, :, :30] == 0).all()

    def test_nan_stays_where_it_is_seen(self, dtype, impl, heads):
        query, key, value, selected = problem(5, heads, 129, None, (64, 64), dtype, "cuda")
        key[1, 0, 100, 0] = torch.nan
        output = attention(query, key, value, selected, sink=2, recent=4, impl=impl).isnan().any(-1)
        spoilt = torch.zeros_like(output)
        spoilt[1, : heads[0] // heads[1], 100:] = True
        assert torch.equal(output, spoilt)


@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_equal_the_reference_where_a_mask_shows_later_tokens(chunks, window):
    """An image in a prompt; as codes and as a boolean mask."""
    sink, recent = window
    *states, selected = problem(21, queries=129)
    mask = boolean_mask(129, 129).clone()
    mask[..., 20:100, 20:100] = True
    positions = torch.arange(129)[None]
    codes = window_codes(mask, positions, positions, sink, recent)
    expected = reference.attention_reference(*states, selected, mask=codes)
    for given_mask in (codes, mask):
        options = {"mask": given_mask, "sink": sink, "recent": recent}
        whole = reference.attention_reference(*states, selected, **options)
        assert torch.allclose(whole, expected, rtol=0, atol=1e-5)
        chunks.clear()
        assert torch.allclose(attention(*states, selected, impl="chunked", **options), expected, rtol=0, atol=1e-5)
        assert len(chunks) > 1
        counted = torch.ones(2, 129, dtype=torch.bool)
        mass = attention_mass(states[0], states[1], selected, counted, **options)
        assert torch.allclose(mass, attention_mass(states[0], states[1], selected, counted, mask=codes), atol=1e-4)
