# SPDX-License-Identifier: Apache-2.0
"""Each of `ARCHITECTURES`: dense at k_ratio 1, different at 0.25, and cached decoding equal to uncached, or refused.

`make test-architectures` runs them.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, REFUSALS, SLIDING

import aqua_attention as aqua
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from conftest import VOCABULARY, calibrated

pytestmark = pytest.mark.architectures
LENGTH, PADDING, PROMPT = 40, 13, 32
LONG = 140
"""Tokens of a prompt of which `bits` rounds the first."""
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
REFUSED = "it is refused, as the table says and another test shows"
STORED = {"plain": {}, "`s_ratio`": {"s_ratio": 0.25}}
STORED |= {name: REFUSALS[name][0] for name in ("`bits`", "`s_ratio` with a window")}


@pytest.fixture(autouse=True)
def kernel_for_cpus(monkeypatch):
    """`generate` gets what it gets outside of tests: a tiled cache where a C compiler is."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request):
    """(architecture, model, projections) of each in turn."""
    architecture = ARCHITECTURES[request.param]
    model = architecture.make()
    return architecture, model, calibrated(model)


@pytest.fixture(scope="module")
def exact(subject):
    """The same in float64, where no rounding decides which of two dimensions is chosen."""
    architecture, _, projections = subject
    model = architecture.make().double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other one is for fewer dtypes
    return architecture, model, projections


def batch(length=LENGTH):
    """A left-padded batch: token ids, mask and positions."""
    ids = torch.randint(2, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, length, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


@torch.no_grad()
def logits(model, inputs):
    """Of real tokens, from one forward pass without a cache."""
    return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


@torch.no_grad()
def cached(model, inputs, prompt):
    """The cache that the model makes for a prompt and tokens that follow it one by one, and logits of all of them."""
    cache, parts, length = None, [], inputs["input_ids"].shape[1]
    for start, stop in ((0, prompt), *((place, place + 1) for place in range(prompt, length))):
        given = {name: inputs[name][:, start:stop] for name in ("input_ids", "position_ids")}
        given |= {"attention_mask": inputs["attention_mask"][:, :stop], "past_key_values": cache, "use_cache": True}
        output = model(**given)
        cache, parts = output.past_key_values, [*parts, output.logits]
    return cache, torch.cat(parts, 1)


def halved(**changes):
    return aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", **changes)


def row(inputs, number, start=0):
    """One row of a batch, from a token on."""
    return {name: tensor[number : number + 1, start:] for name, tensor in inputs.items()}


def assert_close(found, expected):
    """As close as float32 is: within one part in 10 000 of the largest logit."""
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("window", [{}, {"sink": 2, "recent": 5}], ids=["no window", "window"])
def test_k_ratio_1_is_dense_in_a_padded_batch(subject, window):
    _, model, projections = subject
    expected = logits(model, batch())
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **window)):
        assert_close(logits(model, batch()), expected)


def test_a_quarter_of_the_dimensions_moves_the_logits(subject):
    _, model, projections = subject
    expected = logits(model, batch())
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25)):
        assert float((logits(model, batch()) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("layout", ["auto", "plain"])
def test_generate_gives_dense_tokens_from_the_cache_of_the_table(subject, layout):
    architecture, model, projections = subject
    inputs = batch()
    if "padding with a cache" in architecture.refused:
        inputs = row(inputs, 0)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**given, **GREEDY)
    with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=1, sink=2, recent=5), layout=layout) as attachment:
        assert torch.equal(model.generate(**given, **GREEDY), expected)
        last = attachment.explain().last
    assert last.layout == ("growing" if layout == "plain" or no_kernel_reason() else architecture.cache), last.untiled


@pytest.mark.parametrize("name", STORED)
def test_cached_decoding_equals_uncached(exact, name):
    architecture, model, projections = exact
    if name in architecture.refused:
        pytest.skip(REFUSED)
    inputs = row(batch(), 0)
    with aqua.apply(model, projections, halved(**STORED[name])):
        assert_close(cached(model, inputs, PROMPT)[1][0], logits(model, inputs))


def test_a_prompt_of_which_bits_rounds_a_part_equals_uncached(exact):
    """What is decoded after it is rounded later than without a cache."""
    architecture, model, projections = exact
    if "`bits`" in architecture.refused:
        pytest.skip(REFUSED)
    inputs = row(batch(LONG), 0)
    with aqua.apply(model, projections, halved(bits=8)):
        cache, found = cached(model, inputs, LONG)
        assert_close(found[0], logits(model, inputs))
    full = [layer for layer in cache.layers if isinstance(layer, RotatedLayer)]
    assert all(layer.values.shape[2] == LONG > 128 for layer in full)


def test_evicting_leaves_the_prompt_as_it_is_and_a_padded_row_what_it_is_alone(exact):
    architecture, model, projections = exact
    if "`h2o_ratio`" in architecture.refused:
        pytest.skip(REFUSED)
    inputs = batch()
    alone = row(inputs, 1, PADDING)
    with aqua.apply(model, projections, halved()):
        expected = logits(model, alone)[: PROMPT - PADDING]
    with aqua.apply(model, projections, halved(h2o_ratio=0.5)):
        cache, both = cached(model, inputs, PROMPT)
        _, found = cached(model, alone, PROMPT - PADDING)
    assert_close(found[0, : PROMPT - PADDING], expected)
    assert_close(both[1, PADDING:], found[0])
    full = [layer for layer in cache.layers if isinstance(layer, RotatedLayer)]
    assert all(layer.has_evicted for layer in full)
    assert full or architecture.special == SLIDING


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_table_refuses_is_an_error_with_a_remedy(subject, name):
    architecture, model, projections = subject
    if name not in architecture.refused:
        pytest.skip("it is not refused")
    changes, remedy = REFUSALS[name]
    with (
        pytest.raises(aqua.AquaError, match=remedy),
        aqua.apply(model, projections, halved(**changes)),
    ):
        cached(model, batch(), PROMPT)
