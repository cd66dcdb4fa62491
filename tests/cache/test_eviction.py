# SPDX-License-Identifier: Apache-2.0
"""Eviction: which tokens stay, held against a plain list-based cache through any sequence of operations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.cache.eviction import NEIGHBOURS, Eviction
from aqua_attention.cache.growing import LEAST_EVICTED, RotatedLayer
from aqua_attention.cache.store import SLACK
from aqua_attention.calibration.projections import LayerProjection
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama

GROUPS, HEADS, DIM = 2, 4, 4
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def choose(mass, ratio=0.5, real=None, lengths=None, whole=0, queries=None, sink=0, recent=0):
    mass = torch.tensor(mass)
    real = torch.ones(mass.shape[0], mass.shape[2], dtype=torch.bool) if real is None else torch.tensor(real).bool()
    lengths = real.sum(-1) if lengths is None else torch.tensor(lengths)
    places, real = Eviction(ratio, queries, sink, recent).chosen(mass, real, lengths, whole)
    return places.tolist(), real.long().tolist()


def test_half_heavy_half_recent_for_each_head():
    """Of eight tokens four stay: the last two, and the two that were given most."""
    mass = [[[5.0, 1, 4, 1, 3, 1, 9, 9], [1, 5, 1, 4, 1, 3, 0, 0]]]
    assert choose(mass) == ([[[0, 2, 6, 7], [1, 3, 6, 7]]], [[1, 1, 1, 1]])


def test_the_first_and_last_tokens_are_protected_and_the_budget_grows_for_them():
    mass = [[[0.0, 0, 1, 2, 3, 0, 0, 0]]]
    assert choose(mass, sink=1)[0] == [[[0, 4, 6, 7]]]
    assert choose(mass, ratio=0.25, sink=2, recent=3)[0] == [[[0, 1, 5, 6, 7]]]


def test_ties_keep_the_earlier_token_and_nan_counts_as_most():
    assert choose([[[1.0] * 8]])[0] == [[[0, 1, 6, 7]]]
    assert choose([[[0.0, 1, 1, math.nan, 0, 0, 0, 0]]])[0] == [[[1, 3, 6, 7]]]
    assert choose([[[0.0, 0, math.nan, math.nan, math.nan, 0, 0, 0]]], sink=2)[0] == [[[0, 1, 6, 7]]]


def test_a_padded_row_keeps_its_own_share_and_begins_with_padding():
    """Eight and four real tokens: four and two stay."""
    mass = [[[5.0, 1, 4, 1, 3, 1, 9, 9]], [[9, 9, 9, 9, 1, 2, 3, 4]]]
    real = [[1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
    places, kept = choose(mass, real=real)
    assert kept == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert places[0] == [[0, 2, 6, 7]]
    assert places[1][0][2:] == [6, 7]


def test_evicted_tokens_count_for_the_budget():
    """Six tokens are left of twelve: the running length decides, not what is stored."""
    assert len(choose([[[1.0] * 6]], lengths=[12])[0][0][0]) == 6
    assert len(choose([[[1.0] * 6]], lengths=[6])[0][0][0]) == 3


def test_whole_tokens_stay_in_their_places_real_or_not():
    mass = [[[3.0, 2, 1, 0, 0, 0]]]
    assert choose(mass, whole=3, real=[[1, 1, 1, 1, 0, 0]], ratio=0.1) == ([[[3, 4, 5]]], [[1, 0, 0]])


def test_with_h2o_queries_neighbours_of_a_heavy_token_count_as_much():
    mass = [[[0.0] * 20]]
    mass[0][0][8] = 1.0
    stay = choose(mass, ratio=0.5, queries=4)[0][0][0]
    assert set(range(8 - NEIGHBOURS // 2, 8 + NEIGHBOURS // 2 + 1)) & set(stay) >= {5, 6, 7, 8, 9}


def test_old_attention_fades_as_queries_pass_and_padding_counts_for_nothing():
    one = torch.ones(1, 1, 1)
    assert Eviction(0.5, None, 0, 0).added(one, one, torch.ones(1, 2)) == 2
    assert Eviction(0.5, 4, 0, 0).added(one, one, torch.ones(1, 1)) == 1.75
    assert Eviction(0.5, 4, 0, 0).added(one, one, torch.ones(1, 9)) == 1
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(Eviction(0.5, None, 0, 0).counted(real), real)
    assert Eviction(0.5, 2, 0, 0).counted(real).long().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]


class Lists:
    """The same cache with a Python list for each sequence and head: (token, key, value, real), and its mass."""

    def __init__(self, config, batch):
        self.config = config
        self.rows = [[[] for _ in range(GROUPS)] for _ in range(batch)]
        self.lengths, self.evict_from, self.evicted, self.since = [0] * batch, 0, 0, 0

    def attend(self, query, keys, values, real, first):
        """Append, attend, evict; returns [batch, HEADS, queries, DIM]."""
        batch, _, queries, _ = query.shape
        output = torch.zeros_like(query)
        for row in range(batch):
            self.lengths[row] += int(real[row].sum())
            for group in range(GROUPS):
                tokens = self.rows[row][group]
                for place in range(queries):
                    token = [first + place, keys[row, group, place], values[row, group, place], real[row, place], 0.0]
                    tokens.append(token)
                for place in range(queries):
                    seen = [token for token in tokens if token[3] and token[0] <= first + place]
                    if not seen or not real[row, place]:
                        continue
                    for head in (2 * group, 2 * group + 1):
                        scores = torch.stack([token[1] for token in seen]) @ query[row, head, place] * DIM**-0.5
                        probabilities = scores.softmax(-1)
                        output[row, head, place] = probabilities @ torch.stack([token[2] for token in seen])
                        for token, probability in zip(seen, probabilities.tolist(), strict=True):
                            token[4] += probability
        self.since += queries
        self.evict(first + queries)
        return output

    @property
    def stored(self):
        return len(self.rows[0][0])

    def evict(self, length):
        ratio, sink, recent = self.config.h2o_ratio, self.config.sink, self.config.recent
        if self.stored < self.evict_from or self.stored <= max(1, math.ceil(length * ratio - 1e-9)):
            return
        left, before = [], self.stored
        for row, tokens_of_heads in enumerate(self.rows):
            budget = math.ceil(self.lengths[row] * ratio - 1e-9)
            last = max(budget // 2, recent, 1)
            budget = max(budget, last + sink)
            for tokens in tokens_of_heads:
                present = [token for token in tokens if token[3]]
                safe = present[:sink] + present[max(0, len(present) - last) :]
                safe = {token[0] for token in safe}
                others = sorted((t for t in present if t[0] not in safe), key=lambda t: (-t[4], t[0]))
                stay = safe | {token[0] for token in others[: max(0, budget - len(safe))]}
                left.append([token for token in present if token[0] in stay])
        size = max(map(len, left))
        self.evict_from = size + max(size // SLACK, LEAST_EVICTED)
        if size == before:
            return
        padding = [-1, torch.zeros(DIM), torch.zeros(DIM), False, 0.0]
        left = [[padding] * (size - len(tokens)) + tokens for tokens in left]
        self.rows = [left[row * GROUPS : (row + 1) * GROUPS] for row in range(len(self.rows))]
        self.evicted += before - size
        self.since = 0


def make_layer(config):
    ones = torch.ones(GROUPS, DIM)
    rotation = torch.eye(DIM).expand(GROUPS, DIM, DIM)
    return RotatedLayer(LayerProjection(rotation, ones, 0 * ones, ones, ones, ones, ones).plan(config))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 17, 30])),
        st.tuples(st.just("crop"), st.integers(1, 20)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(
    OPERATIONS,
    st.sampled_from([0.3, 0.5, 0.9]),
    st.sampled_from([(0, 0), (2, 3)]),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
)
def test_any_sequence_of_operations_is_what_lists_do(operations, ratio, window, padding):
    """Stored tokens, length, output and errors; left-padded rows of different lengths."""
    config = aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=ratio, sink=window[0], recent=window[1])
    layer, lists, generator = make_layer(config), Lists(config, 3), torch.Generator().manual_seed(0)
    for turn, (name, value) in enumerate([("append", 20), *operations]):
        batch, first = len(lists.rows), layer.get_seq_length()
        if name == "append":
            query = torch.randn(batch, HEADS, value, DIM, generator=generator)
            keys, values = (torch.randn(batch, GROUPS, value, DIM, generator=generator) for _ in range(2))
            real = torch.ones(batch, value, dtype=torch.bool)
            if turn == 0:
                real = torch.arange(value) >= torch.tensor(padding)[:, None]
            expected = lists.attend(query, keys, values, real, first)
            stored, offset = layer.get_mask_sizes(value)
            columns, rows = torch.arange(stored) + offset, torch.arange(first, first + value)
            mask = (columns <= rows[:, None])[None, None].repeat(batch, 1, 1, 1)
            mask[..., stored - value :] &= real[:, None, None]
            call = layer.plan.call(query, *layer.update(keys, values), mask)
            found = layer.attend(call, is_sliding=False).output
            shown = real[:, None, :, None].expand_as(found)
            assert torch.allclose(found[shown], expected[shown], rtol=0, atol=1e-4)
        elif name == "crop":
            if lists.evicted and value > lists.since:
                before = layer.keys.clone()
                with pytest.raises(aqua.AquaError, match="others were evicted after them"):
                    layer.crop(-value)
                assert torch.equal(layer.keys, before)
                continue
            value = min(value, lists.stored - 1)
            layer.crop(-value)
            for row, heads in enumerate(lists.rows):
                lists.lengths[row] -= sum(bool(token[3]) for token in heads[0][lists.stored - value :])
            lists.rows = [[tokens[: len(tokens) - value] for tokens in heads] for heads in lists.rows]
            lists.since -= value
        else:
            rows = (
                [index % batch for index in value]
                if name == "select"
                else [i for i in range(batch) for _ in range(value)]
            )
            if len(rows) > 6:
                return
            if name == "select":
                layer.batch_select_indices(torch.tensor(rows))
            else:
                layer.batch_repeat_interleave(value)
            lists.rows = [[[list(token) for token in tokens] for tokens in lists.rows[row]] for row in rows]
            lists.lengths = [lists.lengths[row] for row in rows]
        assert layer.stored == lists.stored
        assert layer.get_seq_length() == lists.stored + lists.evicted
        for row, heads in enumerate(lists.rows):
            for group, tokens in enumerate(heads):
                for place, token in enumerate(tokens):
                    assert layer._real[row, place] == token[3]
                    if token[3]:
                        assert torch.equal(layer.keys[row, group, place], token[1])
                        assert torch.equal(layer.values[row, group, place], token[2])


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def tokens(length=200, batch=2):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("queries", [None, 8])
@pytest.mark.parametrize("s_ratio", [0.0, 0.25])
def test_generation_keeps_the_share_and_pages_of_a_prompt_give_what_one_gives(llama, bits, queries, s_ratio):
    model, projections = llama
    config = aqua.AquaConfig.paper(
        k_ratio=0.5, s_ratio=s_ratio, bits=bits, h2o_ratio=0.5, h2o_queries=queries, sink=2, recent=20
    )
    ids = tokens(600)
    with aqua.apply(model, projections, config):
        cache = DynamicCache(config=model.config)
        model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == 611
        assert abs(cache.layers[0].stored - 306) <= LEAST_EVICTED
        paged = DynamicCache(config=model.config)
        model.generate(ids, past_key_values=paged, prefill_chunk_size=100, **GREEDY)
        assert paged.get_seq_length() == 611
        assert abs(paged.layers[0].stored - 306) <= LEAST_EVICTED + 8


def test_a_ratio_that_keeps_everything_changes_nothing(llama):
    """Nothing is evicted before there are more tokens than the protected ones."""
    model, projections = llama
    ids = tokens(60)
    dense = model.generate(ids, **GREEDY)
    for config in (
        aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.01, recent=80),
        aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.99, recent=71, h2o_queries=3),
    ):
        with aqua.apply(model, projections, config):
            assert torch.equal(model.generate(ids, **GREEDY), dense)
            assert torch.equal(model.generate(ids, num_beams=3, **GREEDY), model.generate(ids, num_beams=3, **GREEDY))


def test_a_row_of_a_padded_batch_evicts_what_it_evicts_alone(llama):
    model, projections = llama
    ids = tokens(batch=1)
    both = torch.cat([torch.cat([torch.zeros(1, 40, dtype=torch.long), ids], 1), tokens(240, 1)])
    mask = torch.ones_like(both)
    mask[0, :40] = 0
    config = aqua.AquaConfig.paper(k_ratio=0.5, h2o_ratio=0.4, sink=2, recent=8)
    with aqua.apply(model, projections, config):
        alone = model.generate(ids, **GREEDY)[0, 200:]
        batched = model.generate(both, attention_mask=mask, **GREEDY)[0, 240:]
    assert torch.equal(alone, batched)


def test_eviction_moves_the_logits_and_more_of_it_moves_them_more(llama):
    model, projections = llama
    ids = tokens(300)
    dense, moved = logits(model, ids)[:, 200:], []
    for ratio in (0.9, 0.5, 0.1):
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=ratio)):
            cache = DynamicCache(config=model.config)
            first = logits(model, ids[:, :200], past_key_values=cache)
            assert torch.allclose(first, logits(model, ids[:, :200], use_cache=True), atol=1e-4)
            moved.append(float((logits(model, ids[:, 200:], past_key_values=cache) - dense).norm() / dense.norm()))
    assert 0.01 < moved[0] < moved[1] < moved[2]


def test_sliding_layers_lose_nothing_and_full_ones_beside_them_do():
    model = make_gemma3()
    projections, ids = calibrated(model), tokens(100)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.3)):
        cache = DynamicCache(config=model.config)
        model.generate(ids, past_key_values=cache, **GREEDY)
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert {type(layer).__name__ for layer in cache.layers} == {"RotatedLayer", "RotatedSlidingLayer"}
    for layer, count in zip(cache.layers, stored, strict=True):
        if isinstance(layer, RotatedLayer):
            assert count <= 0.3 * 111 + LEAST_EVICTED + 1
        else:
            assert count == layer.sliding_window - 1


def test_only_the_last_queries_count_in_a_short_prompt_too(llama):
    model, projections = llama
    for length in (16, 17):
        with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.9, h2o_queries=4, recent=20)):
            cache = DynamicCache(config=model.config)
            logits(model, tokens(length, 1), past_key_values=cache)
        assert torch.allclose(cache.layers[0]._mass.sum(-1), torch.tensor(2 * 4.0)), "two heads a group, four queries"


@pytest.mark.parametrize("kinds", ["FSF", "SFS", "SSF"])
def test_a_cache_made_without_a_config_knows_the_sliding_layers(kinds):
    names = {"F": "full_attention", "S": "sliding_attention"}
    model = make_gemma3(layer_types=[names[kind] for kind in kinds])
    projections, ids = calibrated(model), tokens(100)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, h2o_ratio=0.5, bits=4)):
        bare, whole = DynamicCache(), DynamicCache(config=model.config)
        for part in (slice(0, 70), slice(70, 100)):
            found = logits(model, ids[:, part], past_key_values=bare)
            assert torch.equal(found, logits(model, ids[:, part], past_key_values=whole))


def test_an_assistant_is_refused_once_its_guesses_cannot_be_taken_back(llama):
    model, projections = llama
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.3)),
        pytest.raises(aqua.AquaError, match=r"h2o_ratio=0.3 has forgotten others by then"),
    ):
        model.generate(
            tokens(60, 1), assistant_model=make_llama(num_hidden_layers=1), max_new_tokens=60, pad_token_id=0
        )


def test_requests_that_cannot_be_met_are_one_clear_error(llama):
    model, projections = llama
    ids = tokens(100)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.5)):
        with pytest.raises(aqua.AquaError, match=r"h2o_ratio=0.5 needs a cache that AQUA has filled"):
            logits(model, ids, use_cache=False)
        with pytest.raises(aqua.AquaError, match=r"h2o_ratio=0.5 has no gradient"):
            model(input_ids=ids)
        cache = DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="the last 10 tokens cannot be taken back"):
            cache.crop(-10)
        assert cache.get_seq_length() == 100
        assert cache.layers[0].stored == 50
        with pytest.raises(aqua.AquaError, match="a 4-D mask no longer says which tokens it means"):
            logits(model, ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1, 1, 51, dtype=torch.bool))
    for value in (0, 1.5, "half", True):
        with pytest.raises(aqua.AquaError, match=r"h2o_ratio is .*: it must be a number with 0 < h2o_ratio <= 1"):
            aqua.AquaConfig.paper(h2o_ratio=value)
    with pytest.raises(aqua.AquaError, match="h2o_queries is 0: it must be a whole number"):
        aqua.AquaConfig.paper(h2o_queries=0)


@pytest.mark.parametrize("queries", [None, 8, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_of_what_is_kept(llama, queries, side):
    """The same 80 tokens alone and padded by 60: the same are kept, by the same attention."""
    model, projections = llama
    ids, padding = tokens(80, 1), torch.zeros(1, 60, dtype=torch.long)
    parts = [padding, ids] if side == "left" else [ids, padding]
    mask = torch.cat([part > 0 for part in parts], 1).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, h2o_ratio=0.5, h2o_queries=queries)):
        alone, padded = DynamicCache(config=model.config), DynamicCache(config=model.config)
        logits(model, ids, past_key_values=alone)
        logits(model, torch.cat(parts, 1), attention_mask=mask, position_ids=positions, past_key_values=padded)
    for one, other in zip(alone.layers, padded.layers, strict=True):
        kept = other._real[0]
        assert kept.sum() == one.stored == 40
        assert torch.allclose(other.keys[:, :, kept], one.keys, rtol=0, atol=1e-4)
        assert torch.allclose(other._mass[:, :, kept], one._mass, rtol=0, atol=1e-3)
