# SPDX-License-Identifier: Apache-2.0
"""The step in C that chooses tokens against plain torch: the same tokens up to ties, the same output and reading."""

from __future__ import annotations

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aqua_attention as aqua
from aqua_attention.ops import tokens
from aqua_attention.ops.api import attend
from aqua_attention.ops.backend import choose
from aqua_attention.ops.backends.cpu import build
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.reference import softmax_seen, weighted_values
from aqua_attention.ops.score_copy import ScoreCopy
from aqua_attention.ops.scored import LEAST_SCALE
from aqua_attention.ops.select import rotate
from aqua_attention.ops.tokens import products, scored_keys

REASON = build.no_kernel_reason()
compiled = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def plan_of(kv_heads=2, dim=32, *, seed=0, **knobs):
    """A plan with a random rotation; channels of keys differ in scale and mean."""
    config = aqua.AquaConfig(**{"k_ratio": 0.5, "sink": 3, "recent": 20, "score_bits": 8} | knobs)
    kept, generator = config.kept_dims(dim), torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(kv_heads, dim, dim, generator=generator)).Q
    width = dim if config.sink + config.recent else kept
    rms, scale = (torch.rand(kv_heads, kept, generator=generator) + 0.2 for _ in range(2))
    mean = torch.randn(kv_heads, kept, generator=generator)
    return LayerPlan(rotation[..., :width].contiguous(), rms, config, dim**-0.5, key_scale=scale, key_mean=mean)


def call_of(plan, *, batch=1, group=3, length=300, value_dim=32, dtype=torch.float32, sharp=3.0, seed=1, **options):
    """One query of each sequence, watched, with the copy of keys that its cache would have."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim, width = plan.rotation.shape
    query = (sharp * torch.randn(batch, kv_heads * group, 1, dim, generator=generator)).to(dtype)
    key = torch.randn(batch, kv_heads, length, width, generator=generator).to(dtype)
    value = torch.randn(batch, kv_heads, length, value_dim, generator=generator).to(dtype)
    copy = ScoreCopy(plan) if plan.config.score_bits == 8 else None
    options = {"mask": None, "is_observed": True} | options
    return plan.call(query, key, value, options.pop("mask"), score_copy=copy, **options)


def chosen_plainly(call, plan, monkeypatch):
    """What plain torch finds, and what it says of its choice."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "WAY", tokens.Way(watch=seen.append))
        expected = attend(call, plan, "reference")
    return expected, seen[0]


def check(call, plan, monkeypatch, *, ties=0):
    """Output near float64 of the same tokens, and the very reading; `ties`: tokens that may differ in number."""
    found = attend(call, plan, "cpu")
    expected, choice = chosen_plainly(call, plan, monkeypatch)
    assert found.output.dtype == call.value.dtype and found.rotated == expected.rotated
    assert (found.reading.read - expected.reading.read).abs().max() <= ties
    assert torch.equal(found.reading.seen, expected.reading.seen)
    if not torch.equal(found.reading.read, expected.reading.read):
        return found
    assert torch.equal(found.reading.share, expected.reading.share)
    query = rotate(call.query, plan.rotation).double()
    every = choice.read.repeat_interleave(query.shape[1] // call.key.shape[1], 1)
    probabilities = softmax_seen(products(query, call.key.double()) * call.scaling, every, None)
    exact = weighted_values(probabilities, lambda tall: tall @ call.value.double(), call.key.shape[1])
    plain, error = ((each.output.double() - exact).abs().nan_to_num().amax((0, 2, 3)) for each in (expected, found))
    assert torch.equal(found.output.isnan(), expected.output.isnan())
    scale = call.value[call.value.isfinite()].abs().max()
    assert (error <= 4 * plain + 32 * torch.finfo(call.query.dtype).eps * scale).all()
    return found


SETTINGS = [
    {"select_p": 0.9},
    {"select_p": 0.5, "score_bits": 16},
    {"select_p": 1.0},
    {"select_tokens": 1},
    {"select_tokens": 40, "score_bits": 16},
    {"select_tokens": 5000},
    {"select_p": 0.9, "k_ratio": 1.0},
    {"select_p": 0.9, "logit_error": 0.2},
    {"select_p": 0.7, "sink": 0, "recent": 0},
    {"select_p": 0.8, "s_ratio": 0.25, "sink": 0, "recent": 0},
    {"select_p": 0.8, "selection": "magnitude", "sink": 0, "recent": 200},
    {"select_p": 0.8, "min_length": 200},
]


@compiled
@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(3, 3), (4, 1), (1, 1), (1, 20), (2, 4)]),
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 23, 127, 128, 129, 300, 1025]),
    dims=st.sampled_from([(32, 32), (64, 48), (33, 7), (128, 128)]),
    knobs=st.sampled_from(SETTINGS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_step_is_that_of_plain_torch(heads, batch, length, dims, knobs, dtype, seed):
    (kv_heads, group), (dim, value_dim) = heads, dims
    plan = plan_of(kv_heads, dim, seed=seed, **knobs)
    call = call_of(plan, batch=batch, group=group, length=length, value_dim=value_dim, dtype=dtype, seed=seed + 1)
    assert choose(call, plan).name == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        # Rounding makes weights that are as good as equal, and a sum as good as what is wanted, fall either way.
        check(call, plan, patch, ties=2)


@compiled
@pytest.mark.parametrize("knobs", [{"select_p": 0.8}, {"select_tokens": 30}, {"select_p": 0.8, "score_bits": 16}])
@pytest.mark.parametrize("kind", ["boolean", "codes", "short"])
def test_padding_is_neither_read_nor_seen(knobs, kind, monkeypatch):
    plan = plan_of(**knobs | {"min_length": 250 if kind == "short" else 0})
    call = call_of(plan, batch=2, length=300)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1, ..., :70] = False
    hidden = ~mask[:, 0, 0, :, None][:, None]
    # NaN where nothing must be read, but for the codes: padding has been given keys like any token.
    call = call._replace(mask=mask, value=call.value.masked_fill(hidden, 1e4))
    if kind == "codes":
        codes = mask.to(torch.uint8)
        codes[0, ..., :3], codes[1, ..., 70:73], codes[..., -20:] = 2, 2, 2
        call = call._replace(mask=codes)
    found = check(call, plan, monkeypatch)
    assert found.reading.seen[:, 0, 0].tolist() == [300, 230]
    assert found.output.abs().max() < 100
    if kind == "short":
        assert (found.reading.read[1] == 230).all()
    nothing = attend(call._replace(mask=torch.zeros_like(mask)), plan, "cpu")
    assert (nothing.output == 0).all() and (nothing.reading.read == 0).all()


@compiled
@pytest.mark.parametrize("count", [1, 31, 32, 33, 34, 400, 2900])
@pytest.mark.parametrize("different", [1, 5, 33, 3000])
def test_any_count_of_weights_of_which_many_are_equal(count, different, monkeypatch):
    """However many share the bits that are looked at first."""
    plan = plan_of(1, 16, select_tokens=count, sink=0, recent=0, score_bits=16, k_ratio=1.0)
    call = call_of(plan, group=2, length=3000, value_dim=16)
    generator = torch.Generator().manual_seed(count)
    call.key[:] = call.key[:, :, torch.randint(different, (3000,), generator=generator)]
    check(call, plan, monkeypatch, ties=2 if different == 3000 else 0)


@compiled
def test_ties_are_read_all(monkeypatch):
    plan = plan_of(1, 16, select_tokens=5, sink=0, recent=0, score_bits=16, k_ratio=1.0)
    call = call_of(plan, group=1, length=40, value_dim=16)
    call.key[:] = 0
    assert int(check(call, plan, monkeypatch).reading.read) == 40
    call.key[:, :, 7:10] = call.query[0] @ plan.rotation[0]
    assert int(check(call, plan, monkeypatch).reading.read) == 40, "the three are fewer than five"
    plan = plan_of(1, 16, select_tokens=2, sink=0, recent=0, score_bits=16, k_ratio=1.0)
    assert int(check(call, plan, monkeypatch).reading.read) == 3
    plan = plan_of(1, 16, select_p=0.01, sink=0, recent=0, score_bits=16, k_ratio=1.0)
    assert int(check(call, plan, monkeypatch).reading.read) == 3


@compiled
@pytest.mark.parametrize("score_bits", [8, 16])
def test_a_nan_in_one_sequence_leaves_the_others_right(score_bits, monkeypatch):
    plan = plan_of(select_p=0.8, score_bits=score_bits)
    call = call_of(plan, batch=3)
    clean = attend(call, plan, "cpu")
    call = call._replace(score_copy=ScoreCopy(plan), key=call.key.clone())
    call.key[1, 0, 50, 3] = torch.nan
    found = check(call, plan, monkeypatch)
    assert found.output[1, :3].isnan().all() and (found.reading.read[1, 0] == 300).all()
    for row, heads in ((0, slice(None)), (2, slice(None)), (1, slice(3, None))):
        assert torch.equal(found.output[row, heads], clean.output[row, heads])
    call.key[1, 0, 50, 3] = torch.inf
    assert attend(call._replace(score_copy=ScoreCopy(plan)), plan, "cpu").output[1, :3].isnan().any()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_specification_however_they_come(dtype):
    plan = plan_of(select_p=0.8)
    call, parts = call_of(plan, batch=2, length=700, dtype=dtype), ScoreCopy(plan)
    for length in (1, 2, 130, 131, 512, 700):
        some = call._replace(key=call.key[:, :, :length], value=call.value[:, :, :length], score_copy=parts)
        attend(some, plan, "cpu")
    attend(call, plan, "cpu")
    for copy in (parts, call.score_copy):
        assert copy.length == 700
        codes = copy.codes.transpose(-1, -2).flatten(2, 3)[:, :, :700].float() * copy.scales[:, :, :700, None].float()
        mean, scale = plan.key_mean[:, None], plan.key_scale.clamp_min(LEAST_SCALE)[:, None]
        wrong = (codes * scale + mean - scored_keys(call.key, plan)).abs()
        # Rounding may fall either way.
        assert (wrong > 1e-5).float().mean() < 1e-3


@compiled
def test_threads_parts_and_watching_change_nothing():
    plan = plan_of(select_p=0.8)
    call, threads = call_of(plan, length=4000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, unseen = (attend(call._replace(is_observed=watched), plan, "cpu") for watched in (True, False))
        torch.set_num_threads(3)
        for _ in range(20):
            found = attend(call, plan)
            torch.testing.assert_close(found.output, alone.output)
            assert torch.equal(found.reading.read, alone.reading.read)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(unseen.output, alone.output)
    assert unseen.selected is None and unseen.reading is None
    selected = attend(call, plan, "reference").selected
    attend(call._replace(query=-call.query.flip(-1)), plan)
    assert torch.equal(found.selected, selected), "the next step writes elsewhere"


@compiled
def test_what_it_does_not_take_goes_on_in_plain_torch():
    def reason(change=None, **knobs):
        plan = plan_of(**{"select_p": 0.8} | knobs)
        call = call_of(plan, length=50)
        call = call if change is None else change(call)
        assert choose(call, plan).name == "chunked"
        with pytest.raises(aqua.AquaError) as refusal:
            attend(call, plan, "cpu")
        return str(refusal.value)

    assert "scores keys in 8 and 16" in reason(score_bits=4)
    assert "there is no copy" in reason(lambda call: call._replace(score_copy=None))
    assert "share is 'head'" in reason(share="head")
    assert "s_ratio with an exact window" in reason(s_ratio=0.5)
    assert "softcap" in reason(lambda call: call._replace(softcap=3.0))
    assert "softcap" in reason(lambda call: call._replace(s_aux=torch.zeros(6)))
    assert "gradient" in reason(lambda call: call._replace(query=call.query.requires_grad_()))
    wide = lambda call: call._replace(**{name: getattr(call, name).double() for name in ("query", "key", "value")})  # noqa: E731
    assert "queries are torch.float64" in reason(wide)
    assert "one query a sequence" in reason(lambda call: call._replace(query=call.query.expand(-1, -1, 2, -1)))
    plan = LayerPlan.of(torch.eye(32)[None], torch.ones(1, 32), aqua.AquaConfig(k_ratio=0.5))
    states = torch.ones(1, 1, 4, 32)
    with pytest.raises(aqua.AquaError, match="only where it chooses tokens"):
        attend(plan.call(states[:, :, :1], states, states), plan, "cpu")


@compiled
def test_another_way_of_choosing_is_not_left_out_in_silence(monkeypatch):
    plan = plan_of(select_p=0.5, score_bits=16)
    call = call_of(plan)
    assert choose(call, plan).name == "cpu"
    monkeypatch.setattr(tokens, "WAY", tokens.Way(left_out="mean"))
    assert choose(call, plan).name != "cpu"


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are options for x86")
@pytest.mark.parametrize("without", ["avx512f", "avx2", "avx"])
def test_older_processors_choose_the_same(without, no_kernel_loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(no_kernel_loaded, "FLAGS", (*no_kernel_loaded.FLAGS, f"-mno-{without}"))
    for knobs in ({"select_p": 0.8}, {"select_tokens": 100}, {"select_p": 0.8, "score_bits": 16}):
        for dtype in (torch.float32, torch.bfloat16):
            plan = plan_of(**knobs)
            check(call_of(plan, batch=2, group=5, length=700, dtype=dtype), plan, monkeypatch, ties=1)
