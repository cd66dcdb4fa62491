# SPDX-License-Identifier: Apache-2.0
"""A tiled cache whose steps choose tokens, under a model: in triton's interpreter here."""

from __future__ import annotations

import copy

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.attach.rehearsal import Rehearsal, as_recorded
from aqua_attention.bench.memory import storage_bytes
from aqua_attention.cache.scored import ScoredLayer
from aqua_attention.ops import scored
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELECT = {"k_ratio": 0.5, "select_p": 0.8, "sink": 2, "recent": 5, "score_bits": 8}
COUNT = {"select_p": None, "select_tokens": 11}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
TIES = 2
slow = pytest.mark.select


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one program after the other, also those that find nothing to do."""
    if DEVICE == "cpu":
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.sm_count", lambda _: 2)


@pytest.fixture(scope="module")
def model():
    """(model, projections) of a Llama of one layer, whose query heads share keys by twos."""
    model = make_llama(num_hidden_layers=1)
    projections = calibrated(model)
    return model.to(DEVICE), projections


@pytest.fixture(scope="module")
def models():
    """The same of several layers, without shared keys, shared by threes, and in 16 bits, by name."""
    shapes = {
        "three layers": {"num_hidden_layers": 3},
        "apart": {"num_hidden_layers": 2, "num_key_value_heads": 4},
        "by threes": {"num_hidden_layers": 2, "num_attention_heads": 6, "hidden_size": 96},
        "16 bits": {"num_hidden_layers": 2},
    }
    made = {name: make_llama(**shape) for name, shape in shapes.items()}
    found = {name: (each.to(DEVICE), calibrated(each)) for name, each in made.items()}
    # The interpreter computes bfloat16 wrongly.
    made["16 bits"].to(torch.bfloat16 if DEVICE == "cuda" else torch.float16)
    return found


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(DEVICE)


def both(attachment, room):
    """A growing cache, and one whose steps the kernels decode."""
    caches = attachment.new_cache(), attachment.new_cache(max_length=room, layout="tiled")
    assert caches[1].layout == "tiled"
    return caches


def stepped(model, attachment, cache, ids, sizes, mask=None):
    """Logits of all tokens, given in parts of these sizes, and what steps read."""
    start, logits, readings = 0, [], []
    attachment.on_reading = lambda index, reading: readings.append(reading) if reading.read.shape[2] == 1 else None
    for size in sizes:
        part = slice(start, start + size)
        given = {} if mask is None else {"attention_mask": mask[:, : part.stop]}
        logits.append(model(ids[:, part], past_key_values=cache, **given).logits)
        start = part.stop
    attachment.on_reading = None
    return torch.cat(logits, 1), readings


def check(model, settings, length, *, steps=2, batch=2, mask=None, atol=2e-4, more=1):
    """Logits and counts are those of the growing cache; returns the latter."""
    model, projections = model
    ids, found = tokens(batch, length + steps), []
    with aqua.apply(model, projections, SELECT | settings) as attachment, torch.no_grad():
        for cache in both(attachment, length + steps + more):
            found.append(stepped(model, attachment, cache, ids, [length, *[1] * steps], mask))
            assert int(cache.get_seq_length()) == length + steps
        assert all(isinstance(layer, ScoredLayer) for layer in cache.layers)
    (expected, plain), (logits, tiled) = found
    real = slice(None) if mask is None else mask.bool()
    is_counted = settings.get("select_tokens") is not None
    if is_counted:
        # Of tokens that weigh nearly the same as the last one, weights of 11 bits choose others, or more.
        assert (logits - expected).norm() < 0.05 * expected.norm()
    else:
        torch.testing.assert_close(logits[real].float(), expected[real].float(), atol=atol, rtol=atol)
    for mine, theirs in zip(tiled, plain, strict=True):
        assert torch.equal(mine.seen, theirs.seen)
        more = mine.read - theirs.read
        assert int(more.min()) >= 0 and int(more.max()) <= (TIES if is_counted else 0)
        if is_counted:
            continue
        if "min_length" not in settings:  # short sequences are scored by all dimensions there
            torch.testing.assert_close(mine.share, theirs.share)
    return tiled


def test_a_step_is_that_of_the_growing_cache(model):
    readings = check(model, {}, 40)
    assert all(bool((each.read < each.seen).any()) for each in readings)


@slow
@pytest.mark.parametrize(
    ("name", "length", "settings"),
    [
        ("three layers", 1, {}),
        ("three layers", 129, {}),
        ("apart", 127, {}),
        ("by threes", 300, {"select_p": 0.5}),
        ("apart", 129, {"select_p": None, "select_tokens": 40}),
        ("by threes", 1, {"select_p": None, "select_tokens": 3}),
        ("three layers", 256, {"select_p": None, "select_tokens": 30}),
        ("three layers", 128, {"score_bits": 4}),
        ("by threes", 129, {"score_bits": 4}),
        ("apart", 1, {"score_bits": 4, "select_p": None, "select_tokens": 3}),
        # Rounding decides between tokens elsewhere.
        ("16 bits", 129, {"select_p": 1.0}),
    ],
)
def test_steps_are_those_of_the_growing_cache(models, name, length, settings):
    check(models[name], settings, length, atol=0.1 if name == "16 bits" else 5e-4)


@slow
@pytest.mark.parametrize("settings", [{"select_p": 1.0}, COUNT | {"select_tokens": 1000}, {"min_length": 1000}])
def test_everything_read_is_dense(models, settings):
    model, projections = models["three layers"]
    ids = tokens(2, 133)
    with torch.no_grad():
        dense = model(ids).logits
        with aqua.apply(model, projections, SELECT | settings) as attachment:
            _, cache = both(attachment, 140)
            logits, readings = stepped(model, attachment, cache, ids, [132, 1])
    torch.testing.assert_close(logits, dense, atol=2e-4, rtol=2e-4)
    assert all(torch.equal(each.read, each.seen) for each in readings)


@slow
def test_short_sequences_read_all_and_longer_ones_do_not(model):
    """From the step on that makes them long."""
    readings = check(model, {"min_length": 52, "select_p": 0.5}, 49, steps=4, mask=padded(2, 53, 2))
    counts = [[bool((each.read[row] < each.seen[row]).any()) for each in readings] for row in range(2)]
    assert counts == [[False, False, False, False], [False, False, True, True]]


def padded(batch, length, hidden):
    """A mask of rows of which the first begins with padding."""
    mask = torch.ones(batch, length, dtype=torch.long, device=DEVICE)
    mask[0, :hidden] = 0
    return mask


@slow
def test_padding_on_the_left_is_not_stored(models):
    readings = check(models["three layers"], {}, 140, mask=padded(2, 142, 30))
    assert readings[-1].seen[:, 0, 0].tolist() == [112, 142]


@slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_writes_what_it_writes_with_the_growing_cache(models, options):
    model, projections = models["three layers"]
    ids, mask = tokens(2, 20, seed=1), padded(2, 20, 7)
    with aqua.apply(model, projections, SELECT) as attachment:
        caches = both(attachment, 40)
        found = [model.generate(ids, attention_mask=mask, past_key_values=each, **GREEDY, **options) for each in caches]
    assert torch.equal(*found)


def test_generate_gets_such_a_cache_and_writes_the_same(model):
    model, projections = model
    ids = tokens(1, 30, seed=1)
    with aqua.apply(model, projections, SELECT, layout="plain") as attachment:
        expected = model.generate(ids, **GREEDY)
        assert attachment.explain().last.layout == "growing"
    with aqua.apply(model, projections, SELECT, layout="tiled", record=False) as attachment:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        explained = attachment.explain()
        assert (explained.last.layout, explained.last.steps) == ("tiled", 3)


@slow
@pytest.mark.parametrize("score_bits", [8, 4])
def test_a_prompt_in_pieces_and_a_cache_that_grows(model, score_bits):
    """Over the end of its room, with padding, and again after a reset."""
    model, projections = model
    ids, mask, sizes = tokens(2, 150, seed=2), padded(2, 150, 4), (60, 1, 66, 1, 1, 21)
    with aqua.apply(model, projections, SELECT | {"score_bits": score_bits}) as attachment, torch.no_grad():
        plain, cache = both(attachment, 128)
        expected, _ = stepped(model, attachment, plain, ids, sizes, mask)
        for _ in range(2):
            logits, _ = stepped(model, attachment, cache, ids, sizes, mask)
            torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=5e-4, rtol=5e-4)
            assert (cache.max_length, int(cache.get_seq_length())) == (192, 150)
            cache.reset()


@slow
@pytest.mark.parametrize("score_bits", [8, 4])
def test_eight_bits_lose_about_as_much_as_without_a_choice(model, score_bits):
    model, projections = model
    ids, logits = tokens(2, 134, seed=3), {}
    for name, settings in (("exact", {}), ("chosen", {"bits": 8}), ("all", {"bits": 8, "select_p": None})):
        settings = SELECT | {"select_p": 0.99, "score_bits": score_bits} | settings
        settings |= {"score_bits": 16, "k_ratio": 1.0} if settings["select_p"] is None else {}
        with aqua.apply(model, projections, settings) as attachment, torch.no_grad():
            cache = attachment.new_cache(max_length=140, layout="tiled")
            logits[name] = stepped(model, attachment, cache, ids, [132, 1, 1])[0][:, 132:]
    chosen, read_all = ((logits[name] - logits["exact"]).norm() for name in ("chosen", "all"))
    assert 0 < chosen < 3 * read_all


def test_a_cache_holds_what_explain_says(model):
    """Keys, values, and what is scored; with the share of each token in what rounds up a tile and the padding."""
    model, projections = model
    for bits, score_bits, each in (
        (None, 8, 2 * (32 * 4 + 16 + 2)),
        (8, 8, 2 * (3 * 16 + 4)),
        (None, 4, 2 * (32 * 4 + 8 + 2)),
        (8, 4, 2 * (2 * 16 + 8 + 6)),
    ):
        settings = SELECT | {"bits": bits, "score_bits": score_bits}
        with aqua.apply(model, projections, settings, layout="tiled") as attachment, torch.no_grad():
            cache = attachment.new_cache(max_length=1280, layout="tiled")
            model(tokens(1, 10), past_key_values=cache)
            found = attachment.explain(1280).decoding
            assert (found.layers, found.choice, found.unchosen) == ({"scored": 1}, "select_p=0.8", None)
            assert found.bytes.held == each
            assert 1280 * each <= storage_bytes(cache) <= 1280 * each + 2000


def test_explain_says_what_is_read_and_who_chooses(model):
    model, projections = model
    scored, whole = 2 * (8 + 2), 2 * 32 * 4
    with aqua.apply(model, projections, SELECT, layout="tiled") as attachment:
        found = attachment.explain(1000)
        assert (found.decoding.backends, found.decoding.layout, found.reason) == ({"triton": 1}, "tiled", None)
        assert (found.decoding.bytes.token, found.decoding.bytes.chosen) == (scored, whole)
        assert (found.decoding.bytes.step, found.decoding.bytes.is_bound) == (1000 * (scored + whole), True)
        assert "select_p=0.8: tokens are chosen by a kernel" in str(found)
        assert f"{scored} bytes for each token of context and {whole} bytes for each one chosen" in str(found)
    with aqua.apply(model, projections, SELECT | {"score_bits": 4}, layout="tiled") as attachment:
        found = attachment.explain(1000).decoding
        assert (found.backends, found.bytes.token, found.bytes.chosen) == ({"triton": 1}, 2 * (4 + 2), whole)
    with aqua.apply(model, projections, SELECT | COUNT | {"min_length": 900}, layout="tiled") as attachment:
        for length, read in ((1000, 11 + 2 + 5), (899, 899)):
            found = attachment.explain(length).decoding.bytes
            assert (found.step, found.is_bound) == (length * scored + read * whole, False)
        assert "and read every token (min_length)" in str(attachment.explain(899))


REFUSED = {
    "16 bits": ({"score_bits": 16}, "score_bits is 16, and the kernels score keys in 8 and 4: set score_bits=8"),
    "heads": ({"share": "head"}, "share is 'head'.*: set share='group'"),
    "adaptive": ({"logit_error": 0.1}, "set k_ratio in place of logit_error"),
    "two widths": ({"s_ratio": 0.25}, "leave s_ratio out, or sink and recent"),
    "window": ({"recent": 129}, "set sink and recent to 128 or less"),
    "int4": ({"bits": 4}, "set bits=8, or leave bits out|leave bits out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_take_is_refused(model, name):
    settings, words = REFUSED[name]
    with pytest.raises(aqua.AquaError, match=f"layout='tiled' is impossible here, because .*{words}"):
        aqua.apply(*model, SELECT | settings, layout="tiled").attach()


def test_wide_heads_are_refused():
    model = make_llama(num_hidden_layers=1, head_dim=144)
    projections = calibrated(model)
    with pytest.raises(aqua.AquaError, match=r"heads have 144 dimensions.* 128 at most"):
        aqua.apply(model.to(DEVICE), projections, SELECT, layout="tiled").attach()


def test_what_a_cache_of_fixed_size_cannot_do_is_said(model, tmp_path):
    model, projections = model
    with aqua.apply(model, projections, SELECT) as attachment, torch.no_grad():
        cache = attachment.new_cache(max_length=64, layout="tiled")
        model(tokens(2, 10), past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(aqua.AquaError, match="cannot repeat or select"):
            cache.batch_repeat_interleave(2)
        with pytest.raises(aqua.AquaError, match="only a growing cache"):
            attachment.save_cache(cache, tmp_path / "cache.safetensors")
        with pytest.raises(aqua.AquaError, match="holds 2 sequences"):
            model(tokens(1, 1), past_key_values=cache)


def test_a_cache_does_not_go_on_with_another_way_of_choosing(model):
    """Filled without a choice it has nothing to score; with one, no tiles, and what is scored has so many bits."""
    model, projections = model
    settings, few = [SELECT, SELECT | {"select_p": None, "score_bits": 16}], [SELECT, SELECT | {"score_bits": 4}]
    for first, second in (settings, settings[::-1], few, few[::-1]):
        with aqua.apply(model, projections, first) as attachment, torch.no_grad():
            cache = attachment.new_cache(max_length=64, layout="tiled")
            model(tokens(1, 10), past_key_values=cache)
        refused = pytest.raises(aqua.AquaError, match="apply the same projections and settings again, or start with")
        with aqua.apply(model, projections, second), torch.no_grad(), refused:
            model(tokens(1, 1), past_key_values=cache)
    with aqua.apply(model, projections, SELECT | {"select_p": 0.5}), torch.no_grad():
        cache.reset()
        model(tokens(1, 10), past_key_values=cache)
        assert isinstance(cache.layers[0], ScoredLayer)


@slow
def test_sliding_layers_stay_rings():
    model = make_gemma3()
    projections = calibrated(model)
    ids = tokens(2, 40)
    with aqua.apply(model.to(DEVICE), projections, SELECT) as attachment, torch.no_grad():
        plain, cache = both(attachment, 50)
        expected, _ = stepped(model, attachment, plain, ids, [38, 1, 1])
        logits, _ = stepped(model, attachment, cache, ids, [38, 1, 1])
        assert [type(each).__name__ for each in cache.layers] == ["RingLayer", "ScoredLayer", "RingLayer"]
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=5e-4)


def test_layers_share_what_kernels_work_in_and_copies_do_not(model):
    """And a step asks the host for nothing, and goes on in the same memory."""
    model, projections = model
    ids = tokens(1, 13)
    with aqua.apply(model, projections, SELECT, record=False) as attachment, torch.no_grad():
        cache = attachment.new_cache(max_length=64, layout="tiled")
        model(ids[:, :10], past_key_values=cache)
        model(ids[:, 10:11], past_key_values=cache)
        (layer,), addresses = cache.layers, cache.layers[0].addresses()
        assert layer.cache.memory is cache.memory and len(cache.memory) == 1
        twin = copy.deepcopy(cache)
        assert not set(twin.layers[0].addresses()) & set(addresses)
        with as_recorded(), Rehearsal() as rehearsal:
            model(ids[:, 11:12], past_key_values=cache)
        assert rehearsal.reason is None
        assert layer.addresses() == addresses
        model(tokens(1, 60), past_key_values=cache)
        assert layer.addresses() != addresses and int(twin.get_seq_length()) == 11


def test_a_recording_knows_the_size_and_all_addresses_of_its_cache(model):
    """Kernels are given the room as a number, which may change in tensors of the same size; and units of codes."""
    model, projections = model
    with aqua.apply(model, projections, SELECT) as attachment, torch.no_grad():
        cache = attachment.new_cache(max_length=150, layout="tiled")
        model(tokens(1, 10), past_key_values=cache)
        (layer,), recorder = cache.layers, attachment._recorder
        known, state = layer.addresses(), recorder._state(cache)
        assert recorder._state(cache) == state
        assert {each.data_ptr() for each in layer.cache.quantization} <= set(known)
        cache.reset()
        cache.make_room(160)
        # Memory that is freed and asked for again may be the same.
        assert layer.addresses() == known
        assert recorder._state(cache) != state


@pytest.mark.parametrize("score_bits", [8, 4])
def test_a_prompt_is_rounded_in_parts(monkeypatch, model, score_bits):
    model, projections = model
    with aqua.apply(model, projections, SELECT | {"score_bits": score_bits}) as attachment, torch.no_grad():
        caches = [attachment.new_cache(max_length=300, layout="tiled") for _ in range(2)]
        for most, cache in zip((1 << 25, 1), caches, strict=True):
            monkeypatch.setattr(scored, "MOST_AT_ONCE", most)
            model(tokens(2, 290), past_key_values=cache)
    whole, parts = (cache.layers[0].cache for cache in caches)
    for name in ("keys", "values", "codes", "scales", "lengths"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
