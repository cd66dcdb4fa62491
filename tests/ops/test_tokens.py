# SPDX-License-Identifier: Apache-2.0
"""AQUA-Select: which tokens are read, by hand and by its properties, and attention to these."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attend
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.tokens import choose_tokens, scored_keys

NOTHING = {"sink": 0, "recent": 0}


def plan_of(dim=8, kv_heads=1, seed=0, **knobs):
    """A plan with a random rotation, whose keys have channels of other scales and means."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(kv_heads, dim, dim, generator=generator)).Q
    rms = torch.rand(kv_heads, dim, generator=generator) + 0.5
    config = AquaConfig(**(NOTHING | knobs))
    kept = config.kept_dims(dim)
    width = dim if config.sink + config.recent else kept
    return LayerPlan(
        rotation[..., :width].contiguous(),
        rms[:, :kept].contiguous(),
        config,
        dim**-0.5,
        key_scale=torch.ones(kv_heads, kept),
        key_mean=torch.zeros(kv_heads, kept),
    )


def states(plan, *, batch=1, heads=1, length=24, queries=None, dtype=torch.float32, seed=1):
    """Queries as a model computes them, rotated keys as they are stored, and values."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim, width = plan.rotation.shape
    query = torch.randn(batch, heads, queries or length, dim, generator=generator).to(dtype)
    key = torch.randn(batch, kv_heads, length, width, generator=generator)
    if width > plan.kept and length > plan.sink + plan.recent:
        key[:, :, plan.sink : length - plan.recent, plan.kept :] = 0
    return query, key.to(dtype), torch.randn(batch, kv_heads, length, dim, generator=generator).to(dtype)


def chosen(weights, *, exact=(), hidden=(), **knobs):
    """Places that one query reads."""
    weight = torch.tensor(weights, dtype=torch.float64).view(1, 1, 1, -1)
    window, visible = (torch.zeros(weight.shape, dtype=torch.bool) for _ in range(2))
    window[..., list(exact)] = True
    visible = ~visible
    visible[..., list(hidden)] = False
    read = choose_tokens(weight, visible, window, plan_of(**knobs))
    return read[0, 0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("weights", "knobs", "read"),
    [
        ([0.5, 0.25, 0.25], {"select_p": 0.5}, [0]),
        ([0.5, 0.375, 0.125], {"select_p": 0.51}, [0, 1]),
        ([0.5, 0.375, 0.125], {"select_p": 0.875}, [0, 1]),
        ([0.125, 0.375, 0.5], {"select_p": 0.876}, [0, 1, 2]),
        ([0.4, 0.2, 0.2, 0.2], {"select_p": 0.5}, [0, 1, 2, 3]),  # ties of the last one
        ([0.4, 0.2, 0.1, 0.2, 0.1], {"select_p": 0.5}, [0, 1, 3]),
        ([0.5, 0.3, 0.2], {"select_p": 1.0}, [0, 1, 2]),
        ([1.0, 0.0, 0.0], {"select_p": 1.0}, [0, 1, 2]),
        ([0.5, 0.3, 0.2], {"select_tokens": 1}, [0]),
        ([0.4, 0.2, 0.2, 0.2], {"select_tokens": 2}, [0, 1, 2, 3]),
        ([0.5, 0.3, 0.2], {"select_tokens": 9}, [0, 1, 2]),
    ],
)
def test_tokens_by_hand(weights, knobs, read):
    assert chosen(weights, **knobs) == read


def test_the_exact_window_is_read_and_counts():
    """It holds a part of what `select_p` asks for, and is no part of `select_tokens`."""
    weights = [0.125, 0.5, 0.1875, 0.125, 0.0625]
    assert chosen(weights, exact=(0, 4), select_p=0.625) == [0, 1, 4]
    assert chosen(weights, exact=(1,), select_p=0.5) == [1]
    assert chosen(weights, exact=(1,), select_p=0.4) == [1]
    assert chosen(weights, exact=(1,), select_tokens=1) == [1, 2]


def test_hidden_tokens_are_not_read():
    assert chosen([0.0, 0.5, 0.5, 0.0], hidden=(0, 3), select_p=1.0) == [1, 2]
    assert chosen([0.0, 0.7, 0.3, 0.0], hidden=(0, 3), select_tokens=4) == [1, 2]
    assert chosen([math.nan] * 3, hidden=(2,), select_p=0.5) == [0, 1]
    assert chosen([math.nan] * 3, hidden=(2,), select_tokens=1) == [0, 1]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(0, 3),
)
def test_the_fewest_that_suffice_and_monotone(counts, one, other, window):
    """Without its lightest tokens a choice would not reach p; a larger p reads at least as much."""
    weights, exact = [each / sum(counts) for each in counts], tuple(range(min(window, len(counts))))
    small, large = (chosen(weights, exact=exact, select_p=p) for p in sorted((one, other)))
    assert set(small) <= set(large)
    p = min(one, other)
    assert sum(weights[each] for each in small) >= p - 1e-9
    others = [each for each in small if each not in exact]
    if others and p < 1:
        least = min(weights[each] for each in others)
        assert sum(weights[each] for each in small if each in exact or weights[each] > least) < p + 1e-9


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("knobs", [{"select_p": 1.0}, {"select_tokens": 1000}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_read_is_dense(heads, kv_heads, knobs, dtype):
    """Whatever scores the tokens: what is read is multiplied with every dimension."""
    plan = plan_of(16, kv_heads, k_ratio=0.25, score_bits=4, sink=2, recent=3, **knobs)
    query, key, value = states(plan, batch=2, heads=heads, length=37, dtype=dtype)
    for impl in ("reference", "chunked", "auto"):
        found = attend(plan.call(query, key, value)._replace(is_observed=True), plan, impl)
        turned = (query.float() @ plan.rotation.repeat_interleave(heads // kv_heads, 0)).to(dtype)
        dense = attention_reference(turned, key, value, None, scaling=plan.scaling)
        torch.testing.assert_close(found.output, dense)
        assert torch.equal(found.reading.read, found.reading.seen)


def by_hand(query, key, value, plan, heads_of_group):
    """The definition for one sequence and key-value head, a query at a time, in plain loops; exact window included."""
    length, outputs, counts = key.shape[0], [], []
    turned = query @ plan.rotation[0]
    first = length - query.shape[1]
    for place in range(query.shape[1]):
        seen = first + place + 1
        window = [each for each in range(seen) if each < plan.sink or each >= seen - plan.recent]
        weight, full = torch.zeros(seen), []
        rows = turned[:, place]
        importance = ((rows * plan.key_rms[0]) ** 2).sum(0)
        dims = importance.sort(descending=True, stable=True).indices[: plan.k]
        for head in range(heads_of_group):
            exact = key[:seen] @ rows[head] * plan.scaling
            cheap = scored_keys(key[None, None, :seen], plan)[0, 0][:, dims] @ rows[head, dims] * plan.scaling
            cheap[window] = exact[window]
            weight += cheap.softmax(-1)
            full.append(exact)
        read, others = set(window), sorted(set(range(seen)) - set(window), key=lambda each: -float(weight[each]))
        target = plan.config.select_p * heads_of_group
        for each in others:
            if float(sum(weight[one] for one in read)) >= target:
                break
            read.add(each)
        read = sorted(read)
        outputs.append(torch.stack([each[read].softmax(-1) @ value[read] for each in full]))
        counts.append(len(read))
    return torch.stack(outputs, 1), counts


@pytest.mark.parametrize("score_bits", [16, 8, 4])
@pytest.mark.parametrize("queries", [1, 5, 24])
def test_attention_is_the_definition(score_bits, queries):
    plan = plan_of(8, k_ratio=0.5, select_p=0.8, score_bits=score_bits, sink=2, recent=3)
    query, key, value = states(plan, heads=3, length=24, queries=queries)
    expected, counts = by_hand(query[0], key[0, 0], value[0, 0], plan, 3)
    for impl in ("reference", "chunked", "auto"):
        found = attend(plan.call(query, key, value)._replace(is_observed=True), plan, impl)
        torch.testing.assert_close(found.output[0], expected)
        assert found.reading.read[0, 0].tolist() == counts
    assert min(counts) < 24 or queries == 1


def test_blocks_of_queries_are_the_whole(monkeypatch):
    plan = plan_of(8, 2, k_ratio=0.5, select_p=0.7, sink=1, recent=2)
    query, key, value = states(plan, batch=2, heads=4, length=40)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[1, :, :, :7] = False
    for given_mask in (None, mask):
        call = plan.call(query, key, value, given_mask)
        expected = attend(call, plan, "reference")
        monkeypatch.setattr("aqua_attention.ops.reference.CHUNK_SCORES", 64)
        found = attend(call, plan, "chunked")
        monkeypatch.undo()
        torch.testing.assert_close(found.output, expected.output)
        assert all(map(torch.equal, found.reading, expected.reading))


def test_padding_changes_nothing():
    """A padded row gives what it gives alone, and its padding is neither seen nor read."""
    plan = plan_of(8, 2, k_ratio=0.5, select_p=0.7, sink=2, recent=2)
    query, key, value = states(plan, heads=4, length=30)
    alone = attend(plan.call(*(each[:, :, 6:] for each in (query, key, value))), plan)
    mask = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    mask[..., :6] = False
    padded = attend(plan.call(query, key, value, mask), plan)
    torch.testing.assert_close(padded.output[:, :, 6:], alone.output)
    assert torch.equal(padded.reading.read[..., 6:], alone.reading.read)
    assert padded.output[:, :, :6].abs().max() == 0 == padded.reading.seen[..., :6].max()


def test_the_order_of_tokens_outside_the_window_does_not_matter():
    plan = plan_of(8, k_ratio=0.5, select_p=0.7, sink=2, recent=3, score_bits=8)
    query, key, value = states(plan, heads=2, length=30, queries=1)
    order = torch.arange(30)
    order[2:27] = order[2:27][torch.randperm(25, generator=torch.Generator().manual_seed(0))]
    found, moved = (attend(plan.call(query, key[:, :, each], value[:, :, each]), plan) for each in (slice(None), order))
    torch.testing.assert_close(moved.output, found.output)
    assert torch.equal(moved.reading.read, found.reading.read)


def test_short_sequences_read_everything():
    plan = plan_of(8, k_ratio=0.5, select_p=0.3, min_length=20)
    query, key, value = states(plan, length=32)
    read, seen, _ = attend(plan.call(query, key, value), plan).reading
    assert torch.equal(read[..., :19], seen[..., :19])
    assert bool((read[..., 19:] < seen[..., 19:]).any())


def test_composes_with_memory_and_with_an_extra_logit():
    """`s_ratio` with a window, whose tokens keep every dimension; and softcap and s_aux, at p = 1 as dense."""
    plan = plan_of(8, k_ratio=0.5, s_ratio=0.25, select_p=1.0, sink=2, recent=3)
    query, key, value = states(plan, heads=2, length=1 + plan.sink + plan.recent + 10, queries=1)
    turned = query @ plan.rotation
    everything = torch.ones_like(turned, dtype=torch.bool)
    everything[..., plan.kept :] = False
    expected = attention_reference(
        turned, key, value, everything, sink=2, recent=3, scaling=plan.scaling, softcap=2.0, s_aux=torch.ones(2)
    )
    call = plan.call(query, key, value, softcap=2.0, s_aux=torch.ones(2))
    torch.testing.assert_close(attend(call, plan).output, expected)


def test_nan_stays_visible():
    """In a query, or in a key that is seen: its output is NaN; other queries and heads are as before."""
    plan = plan_of(8, 2, k_ratio=0.5, select_p=0.7)
    query, key, value = states(plan, heads=2, length=20)
    clean = attend(plan.call(query, key, value), plan).output
    query[0, 0, 11], key[0, 1, 15] = torch.nan, torch.nan
    found = attend(plan.call(query, key, value), plan).output
    assert found[0, 0, 11].isnan().all() and found[0, 1, 15:].isnan().all()
    torch.testing.assert_close(found[0, 0, :11], clean[0, 0, :11])
    torch.testing.assert_close(found[0, 1, :15], clean[0, 1, :15])


def test_few_bits_are_near():
    plan = {bits: plan_of(16, 2, select_p=0.5, score_bits=bits) for bits in (16, 8, 4)}
    _, key, _ = states(plan[16], length=50)
    assert torch.equal(scored_keys(key, plan[16]), key)
    for bits, most in ((8, 0.01), (4, 0.1)):
        error = (scored_keys(key, plan[bits]) - key).norm() / key.norm()
        assert 0 < error < most
    key[0, 0, 3] = 0
    assert torch.equal(scored_keys(key, plan[4])[0, 0, 3], key[0, 0, 3])


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"select_p": 0.0}, "select_p is 0.0"),
        ({"select_p": 1.1}, "select_p is 1.1"),
        ({"select_p": math.nan}, "select_p is nan"),
        ({"select_tokens": 0}, "select_tokens is 0"),
        ({"select_p": 0.5, "select_tokens": 3}, "give one of them"),
        ({"select_p": 0.5, "h2o_ratio": 0.5}, "all tokens must stay"),
        ({"select_tokens": 5, "h2o_ratio": 0.5}, "all tokens must stay"),
        ({"score_bits": 8}, "score_bits is 8, but no tokens are chosen"),
        ({"select_in": "decoding"}, "select_in is decoding, but no tokens are chosen"),
        ({"select_p": 0.5, "select_in": "prompts"}, "select_in is 'prompts'.*all, decoding"),
        ({"select_p": 0.5, "score_bits": 5}, "score_bits is 5"),
    ],
)
def test_bad_settings_are_refused(knobs, said):
    with pytest.raises(AquaError, match=said):
        AquaConfig(**knobs)
