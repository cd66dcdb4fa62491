# SPDX-License-Identifier: Apache-2.0
"""Narrow keys with a wide window: what is stored gives what full-width keys would have given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.cache.store import Growing
from aqua_attention.cache.window import LEAST_RECENT, WindowStore
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama

CONFIG = aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.5, selection="weighted", sink=3, recent=20)


def tokens(length=200, batch=2):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 5, 40])),
        st.tuples(st.just("keep"), st.integers(0, 16)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(
    OPERATIONS, st.integers(0, 4), st.sampled_from([0, 10, 30]), st.lists(st.integers(0, 60), min_size=3, max_size=3)
)
def test_the_window_is_wide_and_the_rest_is_narrow(operations, sink, recent, padding):
    """Whatever was appended, taken back and selected; rows begin with padding, some with much of it."""
    kept, width, generator = 3, 5, torch.Generator().manual_seed(0)
    store, plain = WindowStore(Growing(), kept, sink, recent), torch.zeros(3, 2, 0, width)
    starts = torch.tensor(padding)
    for name, value in operations:
        if name == "append":
            new = torch.randn(plain.shape[0], 2, value, width, generator=generator)
            store.append(new)
            plain = torch.cat([plain, new], 2)
            assert torch.equal(store.read()[:, :, -value:], new), "new tokens are wide until they have been attended to"
            store.settle(torch.arange(plain.shape[2]) >= starts[:, None])
        elif plain.shape[2] == 0:
            continue
        elif name == "keep":
            # As assisted decoding does: some tokens back, fewer than are kept beyond the window.
            length = max(0, plain.shape[2] - min(value, store._rest.length))
            store.keep(length)
            plain = plain[:, :, :length]
        else:
            rows = torch.tensor([index % plain.shape[0] for index in value])
            store.change(lambda tensor, rows=rows: tensor[rows])
            plain, starts = plain[rows], starts[rows]
        assert store.length == plain.shape[2]
        if store.length == 0:
            continue
        read = store.read()
        assert torch.equal(read[..., :kept], plain[..., :kept])
        place, first = torch.arange(store.length), starts[:, None]
        wide = ((place >= first) & (place < first + sink)) | (place >= store.length - store._rest.length)
        wide = wide[:, None, :, None]
        assert torch.equal(read[..., kept:], torch.where(wide, plain[..., kept:], 0))
        assert store._rest.length <= 2 * max(recent, LEAST_RECENT) or name == "append"
        query = torch.randn(plain.shape[0], 2, 7, width, generator=generator)
        assert torch.allclose(store.products(query), query @ read.transpose(-1, -2), atol=1e-5)


@pytest.mark.parametrize("make", [make_llama, make_gemma3])
@pytest.mark.parametrize("steps", [[1] * 60, [30, 1, 29], [5] * 12])
def test_a_cache_gives_what_scoring_without_one_gives(make, steps):
    """Rows of 200, 120 and 3 real tokens at first: the last one's first tokens arrive one by one."""
    model = make()
    projections, ids = calibrated(model), tokens(260, 3)
    mask = torch.arange(260) >= torch.tensor([0, 80, 197])[:, None]
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    with aqua.apply(model, projections, CONFIG):
        expected = logits(model, ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        cache, done = DynamicCache(config=model.config), 0
        for count in [200, *steps]:
            part = slice(done, done + count)
            done += count
            found = logits(
                model,
                ids[:, part],
                attention_mask=mask[:, :done].long(),
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            real = mask[:, part]
            assert torch.allclose(found[real], expected[:, part][real], rtol=0, atol=2e-3)


def test_taking_tokens_back_leaves_the_window_wide(llama):
    model, projections = llama
    ids = tokens()
    with aqua.apply(model, projections, CONFIG):
        expected = logits(model, ids[:, :190], use_cache=False)
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :180], past_key_values=cache)
        for guess in (3, 5):
            logits(model, ids[:, :guess], past_key_values=cache)
            cache.crop(-guess)
        found = logits(model, ids[:, 180:190], past_key_values=cache)
    assert torch.allclose(found, expected[:, 180:], rtol=0, atol=1e-3)


def test_without_a_window_nothing_is_wide(llama):
    model, projections = llama
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.5)):
        cache = DynamicCache(config=model.config)
        logits(model, tokens(), past_key_values=cache)
    assert cache.layers[0].held_states()[0].shape[-1] == 8
    assert not isinstance(cache.layers[0]._keys, WindowStore)


def test_the_window_repairs_most_of_what_narrow_keys_lose(llama):
    """The reason for the store: with it the same s_ratio moves the logits much less."""
    model, projections = llama
    ids, moved = tokens(), []
    dense = logits(model, ids)
    for sink, recent in ((0, 0), (3, 60)):
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, s_ratio=0.5, sink=sink, recent=recent)):
            moved.append(float((logits(model, ids) - dense).norm() / dense.norm()))
    assert moved[1] < 0.8 * moved[0]
