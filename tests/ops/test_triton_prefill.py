# SPDX-License-Identifier: Apache-2.0
"""Prefill kernels against the reference: in triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plain import attention_prefill, rotate_and_narrow, select_dimensions, window_merge

import aqua_attention as aqua
from aqua_attention.ops.api import attend
from aqua_attention.ops.mask import short_queries
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate
from aqua_attention.ops.select import select_dimensions as select_of_plan
from conftest import mostly_long

pytest.importorskip("triton")
from aqua_attention.ops.backends.triton import rotate as rotate_kernels
from aqua_attention.ops.backends.triton import window
from aqua_attention.ops.backends.triton.rotate import rotate_on_gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter computes bfloat16 wrongly, without a word.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
# Shrinking takes minutes in the interpreter.
PHASES = [Phase.explicit, Phase.generate]
HEADS = [(4, 2), (2, 2), (3, 1), (7, 1)]
WIDTHS = [(64, 64), (80, 80), (128, 96), (128, 128)]
LENGTHS = [1, 63, 65, 130] + ([1000] if ON_GPU else [])
WINDOWS = [(0, 0), (4, 64), (0, 1), (3, 0), (5, 200), (70, 3)]
CHOICES = st.sampled_from(
    [{"k_ratio": ratio} for ratio in (0.01, 0.3, 0.5, 0.9)] + [{"logit_error": limit} for limit in (0.0, 0.1, 1e4)]
)


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    """What a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def projection(groups, head_dim, kept, seed):
    """An orthogonal rotation, and key sizes that fall from one dimension to the next."""
    rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=seed))[0][..., :kept].contiguous()
    return rotation, (random(groups, kept, seed=seed + 1).abs() + 0.1).sort(dim=-1, descending=True).values


def config_of(widths, **changes):
    return aqua.AquaConfig.paper(s_ratio=1 - widths[1] / widths[0], **changes)


def check_choice(rotated, narrow, config, head_dim, key_rms):
    """The same as the reference chooses, or, of sums, what differs from it by rounding only."""
    expected = torch.where(select_dimensions(rotated, config, head_dim, key_rms), rotated, 0)
    if config.logit_error is None and config.share == "head":
        torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)
        return
    (batch, _, length, kept), groups = rotated.shape, key_rms.shape[0]

    def by_choice(states):
        """[batch, groups, choices, length, kept, heads that share a choice]."""
        states = states.double().view(batch, groups, -1, length, kept)
        return states.movedim(2, -1)[:, :, None] if config.share == "group" else states[..., None]

    found, rotated, expected = by_choice(narrow), by_choice(rotated), by_choice(expected)
    other = ((found != expected) & ~(found.isnan() & expected.isnan())).any(-1).any(-1)
    assert other.double().mean() <= 0.05
    error = (rotated * key_rms.double()[:, None, None, :, None]).square().sum(-1)
    size = error if config.selection == "weighted" else rotated.square().sum(-1)
    chosen = (found != 0).any(-1)
    for errors, sizes, taken in zip(error[other], size[other], chosen[other], strict=True):
        if config.selection != "static":
            dropped = sizes[~taken].max() if not taken.all() else 0
            assert sizes[taken].min() >= dropped * (1 - 1e-5)
        if config.logit_error is None:
            assert taken.sum() == config.selected_dims(head_dim)
        else:
            lost = errors[~taken].sum() / head_dim
            order = torch.arange(kept, 0, -1, device=sizes.device) if config.selection == "static" else sizes
            last = torch.where(taken, order, torch.inf).argmin()
            assert lost <= config.logit_error * (1 + 1e-5)
            assert taken.sum() == 1 or lost + errors[last] / head_dim >= config.logit_error * (1 - 1e-5)


@settings(max_examples=25 if ON_GPU else 16, deadline=None, phases=PHASES)
@given(
    heads=st.sampled_from(HEADS),
    widths=st.sampled_from([*WIDTHS, (256, 256)] if ON_GPU else WIDTHS),
    length=st.sampled_from(LENGTHS),
    batch=st.integers(1, 2),
    choice=CHOICES,
    selection=st.sampled_from(["magnitude", "weighted", "static"]),
    share=st.sampled_from(["head", "group"]),
    levels=st.sampled_from([None, 3]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_the_kernel_rotates_and_chooses_as_the_reference(
    heads, widths, length, batch, choice, selection, share, levels, dtype, seed
):
    (count, groups), (head_dim, kept) = heads, widths
    config = config_of(widths, selection=selection, share=share, **choice)
    rotation, key_rms = projection(groups, head_dim, kept, seed)
    # As transformers passes them.
    query = random(batch, length, count, head_dim, seed=seed + 2, dtype=dtype)
    if levels is not None:
        # Few values, so that many are equal, and nothing is turned.
        query = (query * 2).round().clamp(-levels, levels)
        rotation = torch.eye(head_dim, kept, device=DEVICE).expand(groups, -1, -1).contiguous()
        key_rms = torch.ones_like(key_rms)
    query = query.transpose(1, 2)
    rotated, narrow = rotate_and_narrow(query, rotation, key_rms, config)
    check_rotation(rotated, query, rotation)
    check_choice(rotated, narrow, config, head_dim, key_rms)


def check_rotation(found, query, rotation):
    """Rounded once, from a product in which rotations have 16 bits or more, and float32 states 20."""
    rotation = rotation.double().repeat_interleave(query.shape[1] // rotation.shape[0], 0)
    exact, size = query.double() @ rotation, query.double().abs() @ rotation.abs()
    bits = 20 if query.dtype == torch.float32 else 16
    slack = size * 2.0**-bits + query.double().abs().sum(-1, keepdim=True) * 2.0**-24
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(found.dtype).eps + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_by_hand(dtype):
    """Each row with k = 4: ties, zeros, all equal, a NaN, an infinity."""
    query = torch.zeros(1, 1, 6, 16, device=DEVICE, dtype=dtype)
    query[0, 0, 0, :8] = torch.tensor([1.0, -2, 2, 0, 3, -1, 1, 1])
    query[0, 0, 1, 9:] = torch.tensor([1.0, 1, 2, 1, 1, 2, 1])
    query[0, 0, 3] = -5
    query[0, 0, 4, 7] = torch.nan
    query[0, 0, 5, :3] = torch.tensor([1.0, torch.inf, 2])
    rotation, key_rms = torch.eye(16, device=DEVICE)[None], torch.ones(1, 16, device=DEVICE)
    for share in ("head", "group"):
        config = aqua.AquaConfig.paper(k_ratio=0.25, share=share)
        rotated, narrow = rotate_and_narrow(query, rotation, key_rms, config)
        chosen = [row.nonzero().flatten().tolist() for row in narrow[0, 0]]
        assert chosen[:5] == [[0, 1, 2, 4], [9, 10, 11, 14], [], [0, 1, 2, 3], [0, 1, 2, 3]]
        assert len(chosen[5]) == 4
        assert narrow[0, 0, 4, :4].isnan().all(), "a NaN is turned into every dimension"
        check_choice(rotated, narrow, config, 16, key_rms)
    key_rms[0, 4], key_rms[0, 2] = 0, 3
    _, narrow = rotate_and_narrow(query, rotation, key_rms, aqua.AquaConfig.paper(k_ratio=0.25, selection="weighted"))
    assert narrow[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 5]
    _, narrow = rotate_and_narrow(query, rotation, key_rms, aqua.AquaConfig.paper(k_ratio=0.25, selection="static"))
    assert narrow[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_infinities_and_nan_than_places(dtype):
    """NaN comes before infinity, and both before numbers."""
    rotation, key_rms = torch.eye(16, device=DEVICE)[None], torch.ones(1, 16, device=DEVICE)
    key_rms[0, 3], key_rms[0, 6:9] = torch.nan, torch.inf
    query = random(1, 2, 5, 16, seed=0, dtype=dtype) + 9
    for _ in range(2):
        for count in (1, 3, 4, 5, 12):
            for share in ("head", "group"):
                config = aqua.AquaConfig.paper(k_ratio=count / 16, selection="weighted", share=share)
                rotated, narrow = rotate_and_narrow(query, rotation, key_rms, config)
                selected = select_dimensions(rotated, config, 16, key_rms)
                assert torch.equal(narrow, torch.where(selected, rotated, 0))
        key_rms[0, 9:12] = torch.nan


def test_as_many_dimensions_as_an_error_allows_by_hand():
    """Rotated queries of 4, 3, 2, 1 and zeros; with head_dim 16 the errors are a 16th of the squares."""
    query = torch.zeros(1, 1, 3, 16, device=DEVICE)
    query[0, 0, 0, :4] = torch.tensor([4.0, 3, 2, 1])
    query[0, 0, 1, 3:8] = 2
    rotation, key_rms = torch.eye(16, device=DEVICE)[None], torch.ones(1, 16, device=DEVICE)
    for limit, expected in (
        (0.0, [[0, 1, 2, 3], [3, 4, 5, 6, 7]]),
        (1 / 16, [[0, 1, 2], [3, 4, 5, 6, 7]]),
        (5 / 16, [[0, 1], [3, 4, 5, 6]]),
        (13 / 16, [[0, 1], [3, 4]]),
        (14 / 16, [[0], [3, 4]]),
        (100.0, [[0], [3]]),
    ):
        _, narrow = rotate_and_narrow(query, rotation, key_rms, aqua.AquaConfig.paper(logit_error=limit))
        assert [row.nonzero().flatten().tolist() for row in narrow[0, 0]] == [*expected, []], limit


@settings(max_examples=20 if ON_GPU else 10, deadline=None, phases=PHASES)
@given(
    heads=st.sampled_from(HEADS),
    widths=st.sampled_from([(64, 64, 64), (64, 48, 64), (80, 80, 80), (64, 64, 128)]),
    length=st.sampled_from(LENGTHS),
    window=st.sampled_from(WINDOWS),
    choice=st.sampled_from([{"k_ratio": 0.5}, {"k_ratio": 1.0}, {"logit_error": 0.2}]),
    selection=st.sampled_from(["magnitude", "weighted"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_prompt_equals_the_reference(heads, widths, length, window, choice, selection, dtype, seed):
    (count, groups), (head_dim, kept, value_dim), (sink, recent) = heads, widths, window
    config = config_of(widths, selection=selection, sink=sink, recent=recent, **choice)
    rotation, key_rms = projection(groups, head_dim, kept, seed)
    query = random(2, length, count, head_dim, seed=seed + 2, dtype=dtype).transpose(1, 2)
    key = rotate_on_gpu(random(2, length, groups, head_dim, seed=seed + 3, dtype=dtype).transpose(1, 2), rotation)
    value = random(2, length, groups, value_dim, seed=seed + 4, dtype=dtype).transpose(1, 2)
    found = attention_prefill(query, key, value, rotation, key_rms, config)
    rotated, _ = rotate_and_narrow(query, rotation, key_rms, config)
    selected = select_dimensions(rotated, config, head_dim, key_rms)
    check(found, rotated, key, value, selected, sink=sink, recent=recent, scaling=head_dim**-0.5)


def check(found, query, key, value, selected, **options):
    """As close to float64 as a few times the reference in the same dtype."""
    exact = attention_reference(query.double(), key.double(), value.double(), selected, **options)
    plain = attention_reference(query, key, value, selected, **options).double()
    error, scale = (found.double() - exact).abs().max(), exact.abs().max()
    assert error <= 4 * (plain - exact).abs().max() + 4 * torch.finfo(query.dtype).eps * scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_copies_give_the_same(dtype):
    rotation, key_rms = projection(2, 64, 64, 0)
    states = random(2, 40, 4, 64, seed=1, dtype=dtype).transpose(1, 2)
    key, value = (random(2, 40, 2, 64, seed=seed, dtype=dtype).transpose(1, 2) for seed in (2, 3))
    config = aqua.AquaConfig.paper(k_ratio=0.5, sink=2, recent=3)
    views = attention_prefill(states, key, value, rotation, key_rms, config)
    copies = [each.contiguous() for each in (states, key, value)]
    assert torch.equal(views, attention_prefill(*copies, rotation, key_rms, config))
    spread = [torch.stack([each, each], -1)[..., 0] for each in (states, key, value)]
    assert torch.equal(views, attention_prefill(*spread, rotation, key_rms, config))


def test_all_dimensions_are_the_rotated_query_itself():
    rotation, key_rms = projection(1, 64, 48, 0)
    query = random(1, 2, 5, 64, seed=1)
    config = config_of((64, 48), k_ratio=1.0)
    rotated, narrow = rotate_and_narrow(query, rotation, key_rms, config)
    assert narrow is rotated
    assert torch.allclose(rotated, rotate(query, rotation), atol=1e-4)


def test_a_nan_in_a_query_stays_in_its_output():
    rotation, key_rms = projection(1, 64, 64, 0)
    query, key = random(1, 2, 90, 64, seed=1), random(1, 1, 90, 64, seed=2)
    query[0, 1, [3, 70]] = torch.nan
    found = attention_prefill(query, key, key, rotation, key_rms, aqua.AquaConfig.paper(k_ratio=0.5, sink=2, recent=5))
    rows = found.isnan().all(-1)[0, 1].nonzero().flatten().tolist()
    assert rows == [3, 70]
    assert found.isnan().any(-1).sum() == 2


@pytest.mark.parametrize(("before", "min_length"), [(1, 0), (100, 115), (129, 0)])
@pytest.mark.parametrize("window", [(0, 0), (3, 9), (90, 20), (100, 60)])
def test_the_last_part_of_a_prompt_is_that_of_the_whole(before, min_length, window):
    rotation, key_rms = projection(2, 64, 64, 0)
    sizes = dict(zip(("sink", "recent"), window, strict=True))
    config = aqua.AquaConfig.paper(k_ratio=0.5, share="group", min_length=min_length, **sizes)
    query, key, value = (random(2, heads, 130, 64, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    whole = attention_prefill(query, key, value, rotation, key_rms, config)
    part = attention_prefill(query[:, :, before:], key, value, rotation, key_rms, config)
    torch.testing.assert_close(part, whole[:, :, before:], rtol=0, atol=2e-3 if ON_GPU else 1e-5)


def test_requests_that_the_kernels_do_not_take_list_what_they_take():
    rotation, key_rms = projection(2, 64, 48, 0)
    config = config_of((64, 48), sink=2, recent=3)
    query, key, value = (random(1, heads, 20, width, seed=0) for heads, width in ((4, 64), (2, 48), (2, 64)))
    for arguments, words in (
        ((query[:, :3], key, value, rotation, key_rms), "a multiple of 2, length, 64"),
        ((query.double(), key, value, rotation, key_rms), "bfloat16, float16 or float32"),
        ((query[:, :, :0], key, value, rotation, key_rms), "not empty"),
        ((query, key, value, rotation.double(), key_rms), "rotation is torch.float64"),
        ((query, key, value, rotation, key_rms[:, :3]), r"must be torch.float32 \(2, 48\)"),
        (
            (query, key[:, :, :10], value[:, :, :10], rotation, key_rms),
            "one for each query or more, and causal without",
        ),
        ((query, key.half(), value, rotation, key_rms), "must be of one dtype"),
        ((query.clone().requires_grad_(), key, value, rotation, key_rms), "no gradient"),
    ):
        with pytest.raises(aqua.AquaError, match=words):
            attention_prefill(*arguments, config)
    narrow = rotate_on_gpu(query, rotation)
    far, lse = random(1, 4, 15, 64, seed=0), random(1, 4, 15, seed=0)
    with pytest.raises(aqua.AquaError, match="a window of 1 to 19 for 20 tokens"):
        window_merge(narrow, key, value, far, lse, sink=10, recent=10, scaling=1.0)
    with pytest.raises(aqua.AquaError, match=r"must be .1, 4, 15, 64. and torch.float32 .1, 4, 15."):
        window_merge(narrow, key, value, far[:, :, 1:], lse, sink=2, recent=3, scaling=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2, 8, 32])
@pytest.mark.parametrize("selection", ["magnitude", "weighted"])
def test_a_long_prompt_on_a_gpu(groups, selection):
    """So many tokens that every program rotates several blocks."""
    config = aqua.AquaConfig.paper(k_ratio=0.5, selection=selection, share="group" if groups == 8 else "head")
    rotation, key_rms = projection(groups, 128, 128, 0)
    query = random(1, 3000, 32, 128, seed=1, dtype=torch.bfloat16).transpose(1, 2)
    rotated, narrow = rotate_and_narrow(query, rotation, key_rms, config)
    check_rotation(rotated, query, rotation)
    check_choice(rotated, narrow, config, 128, key_rms)


def test_constants_fit_the_layout():
    """A row is summed within one warp: 16 rows each."""
    assert rotate_kernels.TOKENS == 16 * rotate_kernels.WARPS
    assert window.WINDOW_ROWS % 16 == 0


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("min_length", [0, 30])
@pytest.mark.parametrize("window", [(0, 0), (3, 9)])
@pytest.mark.parametrize(
    "choice", [{"k_ratio": 0.3}, {"k_ratio": 0.5, "selection": "static"}, {"logit_error": 0.1, "selection": "weighted"}]
)
@pytest.mark.parametrize("dtype", mostly_long(DTYPES, torch.float16))
def test_watching_what_is_chosen_changes_no_bit(share, min_length, window, choice, dtype):
    rotation, key_rms = projection(2, 64, 48, 0)
    config = config_of((64, 48), share=share, min_length=min_length, sink=window[0], recent=window[1], **choice)
    plan = LayerPlan.of(rotation, key_rms, config)
    query, key, value = (random(2, n, 70, w, seed=n + w, dtype=dtype) for n, w in ((4, 64), (2, 48), (2, 64)))
    unseen, seen = (attend(plan.call(query, key, value, is_observed=flag), plan, "triton") for flag in (False, True))
    assert unseen.selected is None and unseen.rotated == seen.rotated == (2, 4, 70, 48)
    assert torch.equal(unseen.output, seen.output)
    short = short_queries(None, min_length, queries=70, keys=70, device=query.device)
    rotated, narrow, selected = rotate_kernels.rotate_and_narrow(query, plan, plan.scaling, is_observed=True)
    expected = select_of_plan(rotated, plan, short)
    # Of sums in another order another dimension may be taken where two are nearly equal; a head alone has none.
    assert (selected != expected).double().mean() <= (0.0 if share == "head" and "k_ratio" in choice else 0.002)
    assert torch.equal(seen.selected, selected)
    assert torch.equal(narrow, torch.where(selected, rotated, 0))


def test_what_was_not_chosen_is_not_reported():
    rotation, key_rms = projection(2, 64, 64, 0)
    query, key = random(1, 4, 20, 64, seed=1), random(1, 2, 20, 64, seed=2)

    def selected(**settings):
        plan = LayerPlan.of(rotation, key_rms, aqua.AquaConfig.paper(**settings))
        found = attend(plan.call(query, key, key, is_observed=True), plan, "triton")
        plain = attend(plan.call(query, key, key, is_observed=True), plan, "chunked")
        assert (found.selected is None) == (plain.selected is None)
        assert torch.allclose(found.output, plain.output, rtol=0, atol=1e-4)
        return found.selected

    assert selected(k_ratio=1.0) is None
    assert selected(k_ratio=0.5, min_length=21) is None, "too short to choose"
    # The exact window has the whole prompt: what is chosen takes no part, and is asked of the reference.
    inside = selected(k_ratio=0.5, sink=4, recent=16)
    plan = LayerPlan.of(rotation, key_rms, aqua.AquaConfig.paper(k_ratio=0.5))
    assert torch.equal(inside, select_of_plan(rotate_on_gpu(query, rotation), plan))
    assert selected(k_ratio=0.5, sink=4, recent=16, min_length=20)[:, :, :19].all()
