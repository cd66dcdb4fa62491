# SPDX-License-Identifier: Apache-2.0
"""Sliding-window layers whose decoding step can be recorded: as the growing ones, and the host is asked nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import aqua_attention as aqua
from aqua_attention.attach import apply as apply_module
from aqua_attention.cache.cache import sliding_windows
from aqua_attention.cache.layer import RotatedSlidingLayer
from aqua_attention.cache.ring import RingLayer
from aqua_attention.ops.mask import window_codes
from aqua_attention.ops.plan import LayerPlan
from conftest import SHAPE, VOCABULARY, calibrated, make_gemma3, make_mistral

SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]


def make(config, model, **changes):
    torch.manual_seed(0)
    return model(config(**SHAPE | {"sliding_window": 7} | changes)).eval()


FAMILIES = {
    "mistral": lambda: make_mistral(sliding_window=7),
    "gemma3": lambda: make_gemma3(sliding_window=7),
    "gemma2": lambda: make(
        tf.Gemma2Config, tf.Gemma2ForCausalLM, query_pre_attn_scalar=16, attn_implementation="eager"
    ),
    "gpt_oss": lambda: make(
        tf.GptOssConfig,
        tf.GptOssForCausalLM,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=SLIDING_AND_FULL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
SETTINGS = {
    "plain": {"k_ratio": 0.5},
    "window": {"k_ratio": 0.5, "share": "group", "selection": "weighted", "sink": 2, "recent": 3},
    "min_length": {"k_ratio": 0.25, "sink": 1, "recent": 2, "min_length": 14},
    "adaptive": {"logit_error": 0.2, "share": "group", "recent": 3},
    "static": {"k_ratio": 0.5, "selection": "static", "min_length": 9},
}
GREEDY = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 0}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(model, projections) of each family in turn; windows of 7 tokens."""
    model = FAMILIES[request.param]()
    return model, calibrated(model)


@pytest.fixture(scope="module")
def mistral():
    """(model, projections) of a model whose layers all slide over 7 tokens."""
    model = FAMILIES["mistral"]()
    return model, calibrated(model)


def tokens(batch, length, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(length, padding):
    """Tokens and mask of a batch of two, the second row with so much padding on the left."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    ids[1, :padding], mask[1, :padding] = 0, 0
    return ids, mask


def ring_cache(attachment, room=64):
    """A plain cache with rings in it: so no kernel is needed, and full layers may have softcap and s_aux."""
    cache = attachment.new_cache(max_length=room, layout="plain")
    for index, window in cache.windows.items():
        cache.layers[index] = RingLayer(cache.layers[index].plan, max_cache_len=room, sliding_window=window)
    assert any(isinstance(layer, RingLayer) for layer in cache.layers)
    return cache


def logits_of(model, cache, ids, mask, part):
    """Logits of some tokens of a sequence, after those before."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)[:, part]
    given = {"attention_mask": mask[:, : part.stop], "position_ids": places}
    return model(ids[:, part], past_key_values=cache, **given).logits


def in_pieces(model, cache, ids, mask, sizes):
    """Logits of tokens given in pieces of these sizes, each with the mask so far."""
    starts = itertools.accumulate(sizes, initial=0)
    parts = (slice(start, start + size) for start, size in zip(starts, sizes, strict=False))
    return torch.cat([logits_of(model, cache, ids, mask, part) for part in parts], 1)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("length", "padding"), [(4, 0), (7, 2), (20, 9)], ids=["short", "a window", "long"])
def test_generation_is_that_of_the_growing_cache(family, name, length, padding):
    model, projections = family
    ids, mask = padded(length, padding)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS[name])) as attachment:
        expected = model.generate(ids, attention_mask=mask, **GREEDY, **LOGITS)
        cache = ring_cache(attachment)
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY, **LOGITS)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=2e-4)


@pytest.mark.parametrize("window", [{}, {"sink": 2, "recent": 3}], ids=["no window", "window"])
def test_k_ratio_1_is_dense(family, window):
    model, projections = family
    ids, mask = padded(10, 4)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **window)) as attachment:
        found = model.generate(ids, attention_mask=mask, past_key_values=ring_cache(attachment), **GREEDY)
    assert torch.equal(found, expected)


def test_beams_are_those_of_the_growing_cache(family):
    model, projections = family
    ids, mask = padded(9, 3)
    beams = {"attention_mask": mask, "num_beams": 3} | GREEDY
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS["window"])) as attachment:
        expected = model.generate(ids, **beams)
        assert torch.equal(model.generate(ids, past_key_values=ring_cache(attachment), **beams), expected)


def test_sequences_change_places_with_their_padding(mistral):
    model, projections = mistral
    ids, mask = padded(16, 5)
    order = torch.tensor([1, 0])
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS["min_length"])) as attachment, torch.no_grad():
        results = []
        for cache in (attachment.new_cache(), ring_cache(attachment)):
            in_pieces(model, cache, ids[:, :9], mask[:, :9], [8, 1])
            cache.reorder_cache(order)
            steps = [slice(number, number + 1) for number in range(9, 16)]
            results.append(torch.cat([logits_of(model, cache, ids[order], mask[order], step) for step in steps], 1))
            assert not isinstance(cache.layers[0], RingLayer) or cache.layers[0].mask_is_known
    assert torch.allclose(results[1], results[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sizes", [(9, 1, 1, 8, 1, 1, 10), (3, 1, 2, 1, 1, 1, 1, 15, 3, 3)], ids=["long", "short"])
def test_logits_and_choices_of_a_chat_are_those_of_the_growing_cache(mistral, name, sizes):
    model, projections = mistral
    (ids, mask), results = padded(sum(sizes), 2), []
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS[name])) as attachment, torch.no_grad():
        for cache in (attachment.new_cache(), ring_cache(attachment, room=31)):
            seen = []
            attachment.on_selection = lambda index, selected, *_, seen=seen: seen.append(selected)
            logits = in_pieces(model, cache, ids, mask, sizes)
            attachment.on_selection = None
            results.append((logits[mask.bool()], [each[0] for each in seen]))
            assert int(cache.get_seq_length()) == 31
        model(ids[:, :1], past_key_values=cache)
        assert (cache.max_length, int(cache.get_seq_length())) == (46, 32)
    (expected, chosen), (found, mine) = results
    assert torch.allclose(found, expected, rtol=0, atol=2e-4)
    assert all(torch.equal(*pair) for pair in zip(mine, chosen, strict=True))


HIDDEN = {
    "padding within a prompt": ([12] + [1] * 10, {(0, 3), (0, 8), (1, 11)}),
    "left padding, one by one": ([1] * 22, {(0, 0), (0, 1), (0, 2)}),
    "between turns": ([4, 1, 1, 2, 1, 1, 9, 1, 1, 1], {(0, 5), (1, 8), (1, 14), (0, 20)}),
}


@pytest.mark.parametrize("name", ["plain", "window", "min_length"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_masks_that_hide_more_than_left_padding_are_obeyed(mistral, name, hidden):
    model, projections = mistral
    sizes, places = HIDDEN[hidden]
    ids, mask = padded(22, 0)
    mask[tuple(zip(*places, strict=True))] = 0
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS[name])) as attachment, torch.no_grad():
        caches = attachment.new_cache(), ring_cache(attachment)
        expected, found = (in_pieces(model, cache, ids, mask, sizes)[mask.bool()] for cache in caches)
    assert torch.allclose(found, expected, rtol=0, atol=2e-4)
    rings = [layer for layer in caches[1].layers if isinstance(layer, RingLayer)]
    assert all(torch.equal(ring.counted, mask.sum(-1)) for ring in rings)


@pytest.mark.parametrize("name", ["plain", "window", "min_length"])
@pytest.mark.parametrize(
    ("before", "after"),
    [([], [2]), ([], [11]), ([9], [11]), ([11], [])],
    ids=["outside the window", "inside it", "another one", "shown again"],
)
def test_what_is_hidden_may_change_afterwards(mistral, name, before, after):
    model, projections = mistral
    ids, mask = padded(18, 0)
    then = mask.clone()
    mask[0, before], then[0, after] = 0, 0
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS[name])) as attachment, torch.no_grad():
        results = []
        for cache in (attachment.new_cache(), ring_cache(attachment)):
            in_pieces(model, cache, ids[:, :13], mask[:, :13], [12, 1])
            steps = [logits_of(model, cache, ids, then, slice(number, number + 1)) for number in range(13, 18)]
            results.append(torch.cat(steps, 1))
    assert torch.allclose(results[1], results[0], rtol=0, atol=2e-4)


class AsksTheHost(TorchDispatchMode):
    """Raises where a number leaves the device, or a shape depends on one."""

    REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_boolean = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func._schema.name.startswith(self.REFUSED) or by_boolean:
            raise AssertionError(f"{func} asks the host")
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_what_it_is_for():
    numbers = torch.arange(3)
    for question in (lambda: numbers[0].item(), lambda: bool(numbers.any()), lambda: numbers[numbers > 1]):
        with AsksTheHost(), pytest.raises(AssertionError, match="asks the host"):
            question()


def test_a_decoding_step_of_a_whole_model_asks_the_host_nothing(mistral, monkeypatch):
    model, projections = mistral
    ids, mask = padded(16, 4)
    for settings in SETTINGS.values():
        with aqua.apply(model, projections, aqua.AquaConfig.paper(**settings)) as attachment, torch.no_grad():
            caches = attachment.new_cache(), attachment.new_cache(max_length=20, layout="tiled")
            for cache in caches:
                in_pieces(model, cache, ids[:, :10], mask[:, :10], [9, 1])
            expected = logits_of(model, caches[0], ids, mask, slice(10, 11))
            with monkeypatch.context() as patch, AsksTheHost():
                patch.setattr(apply_module, "is_captured", lambda: True)
                found = logits_of(model, caches[1], ids, mask, slice(10, 11))
            assert torch.allclose(found, expected, rtol=0, atol=2e-4)


class Tape(AsksTheHost):
    """Writes operations down with every number that the host gave them, to repeat them: a CUDA graph for any device."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self, result):
        """Repeat everything; returns what has come to be in place of the tensor `result`."""
        now = {}

        def current(value):
            return now.get(id(value), value)

        for func, args, kwargs, before in self.operations:
            after = func(*tree_map(current, args), **tree_map(current, kwargs))
            pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
            now |= {id(old): new for old, new in pairs if isinstance(old, torch.Tensor)}
        return now[id(result)]


def some_plan(config):
    """A layer of two key-value heads of 16 dimensions, and states of 30 tokens of two rows for it."""
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator)).Q
    plan = LayerPlan.of(rotation, torch.linspace(2, 0.5, 16).expand(2, 16), config)
    sizes = ((30, 2, heads, 1, 16) for heads in (4, 2, 2))
    return plan, [torch.randn(size, generator=generator) for size in sizes]


def attended(layer, states, mask=None, **extra):
    """Attention of new tokens (query, key, value) in a cache layer."""
    query, *new = states
    return layer.attend(layer.plan.call(query, *layer.update(*new), mask, **extra), True).output


def mask_of(plan, length, window):
    """What the token at place `length` sees, for a growing layer."""
    begin = max(length - window + 1, 0)
    visible = torch.ones(1, 1, 1, length + 1 - begin, dtype=torch.bool)
    if not plan.needs_codes:
        return visible
    places = torch.tensor([[length]]), torch.arange(begin, length + 1)[None]
    return window_codes(visible, *places, plan.sink, plan.recent, plan.min_length)


EXTRAS = {"": {}, "softcap": {"softcap": 2.0}, "s_aux": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_recorded_step_goes_on_by_itself(name, extra):
    plan, states = some_plan(aqua.AquaConfig.paper(**SETTINGS[name]))
    ring, growing = RingLayer(plan, max_cache_len=40, sliding_window=7), RotatedSlidingLayer(plan, sliding_window=7)
    tape, static, recorded = Tape(), [torch.empty_like(each[0]) for each in states], None
    for length, new in enumerate(zip(*states, strict=True)):
        expected = attended(growing, new, mask_of(plan, length, 7), **EXTRAS[extra])
        for mine, given in zip(static, new, strict=True):
            mine.copy_(given)
        if length < 3:
            found = attended(ring, static, mask_of(plan, length, 7), **EXTRAS[extra])
        elif recorded is None:
            with tape:
                found = recorded = attended(ring, static, **EXTRAS[extra])
        else:
            found = tape.replay(recorded)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5), length
    assert int(ring.get_seq_length()) == 30


@pytest.mark.parametrize("room", [9, 30])
def test_a_ring_grows_up_to_its_window(room):
    plan, states = some_plan(aqua.AquaConfig.paper(**SETTINGS["window"]))
    grown, large = (RingLayer(plan, max_cache_len=size, sliding_window=12) for size in (5, 30))
    for number, new in enumerate(zip(*states, strict=True)):
        if number == 5:
            grown.grow(4)
            assert grown.slots[0].shape[2] == 5
            grown.grow(room)
            assert grown.slots[0].shape[2] == grown.places.shape[1] == grown.get_max_length() == min(room, 12)
        if number == room:
            break
        mask = mask_of(plan, number, 12)
        assert torch.allclose(attended(grown, new, mask), attended(large, new, mask), rtol=0, atol=1e-6), number
    held = grown.places[0].sort().values
    assert held.tolist() == list(range(max(room - 12, 0), room))


def test_an_empty_ring_grows_too():
    plan, states = some_plan(aqua.AquaConfig.paper(**SETTINGS["plain"]))
    ring = RingLayer(plan, max_cache_len=5, sliding_window=12)
    for size in (8, 12):
        ring.grow(size)
        attended(ring, [each[0] for each in states])
        assert ring.slots[0].shape[2] == ring.places.shape[1] == size
        ring.reset()


def test_a_reset_keeps_addresses_and_forgets(mistral):
    model, projections = mistral
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS["window"])) as attachment, torch.no_grad():
        cache, ids = attachment.new_cache(max_length=40, layout="tiled"), tokens(2, 12)
        layer = cache.layers[0]

        def addresses():
            tensors = (*layer.slots, layer.places, layer.counted, layer.given)
            return [tensor.data_ptr() for tensor in tensors]

        first = model(ids[:, :4], past_key_values=cache).logits
        before = addresses()
        layer.slots[1][:] = torch.nan  # as a model that overflowed left them
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids[:, :4], past_key_values=cache).logits, first)
        step = model(ids[:, 4:5], past_key_values=cache).logits
        assert addresses() == before
        assert step.isfinite().all()
        with pytest.raises(aqua.AquaError, match="holds 2 sequences, the batch has 1"):
            model(ids[:1, :1], past_key_values=cache)
        cache.reset()
        model(ids[:1], past_key_values=cache)
        assert layer.batch == 1
        assert layer.slots[0].shape == (1, 2, 7, 16)


def test_bfloat16_stays_near_the_growing_cache():
    model = make_mistral(sliding_window=7)
    projections = calibrated(model)
    model, ids, logits = model.bfloat16(), tokens(2, 24), []
    ones = torch.ones_like(ids)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(**SETTINGS["window"])) as attachment, torch.no_grad():
        for cache in (attachment.new_cache(), attachment.new_cache(max_length=24, layout="tiled")):
            logits.append(in_pieces(model, cache, ids, ones, [9] + [1] * 15).float())
    assert (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()


def test_a_model_of_sliding_layers_only_needs_no_kernel(mistral):
    """Whatever the kernels do not know: heads that choose by themselves, whole keys in the window (s_ratio)."""
    model, projections = mistral
    ids, mask = padded(10, 3)
    for settings in ({"k_ratio": 0.5, "recent": 200}, {"k_ratio": 0.5, "s_ratio": 0.25, "sink": 1, "recent": 3}):
        with aqua.apply(model, projections, aqua.AquaConfig.paper(**settings)) as attachment:
            expected = model.generate(ids, attention_mask=mask, **GREEDY)
            cache = attachment.new_cache(max_length=40, layout="tiled")
            assert {type(layer) for layer in cache.layers} == {RingLayer}
            assert cache.layout == "tiled"
            assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), expected)
            with pytest.raises(aqua.AquaError, match="cannot be cropped"):
                cache.crop(-1)
            with pytest.raises(aqua.AquaError, match="the tiled layout has no gradient"):
                model(ids[:, :1].expand(2, 1), past_key_values=attachment.new_cache(max_length=40, layout="tiled"))
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(bits=8)) as attachment,
        pytest.raises(aqua.AquaError, match="a static cache cannot store bits=8"),
    ):
        attachment.new_cache(max_length=40, layout="tiled")


def test_a_layer_left_dense_needs_a_whole_mask(mistral):
    model, projections = mistral
    ids = tokens(1, 10)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5), layers="*.0.*") as attachment:
        with pytest.raises(aqua.AquaError, match="some layers are left dense"):
            attachment.new_cache(max_length=40, layout="tiled")
        expected = model.generate(ids, **GREEDY)
        cache = attachment.new_cache(max_length=40)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)


def test_chunks_are_no_sliding_windows():
    config = tf.Llama4TextConfig(num_hidden_layers=4, attention_chunk_size=8, sliding_window=8)
    assert "chunked_attention" in config.layer_types
    assert sliding_windows(config) == {}
    config = tf.Gemma3TextConfig(num_hidden_layers=3, sliding_window=12, layer_types=SLIDING_AND_FULL)
    assert sliding_windows(config) == {0: 12, 2: 12}


@pytest.mark.gpu
@pytest.mark.parametrize("maker", [make_mistral, make_gemma3])
@pytest.mark.parametrize("name", ["plain", "window"])
def test_a_step_recorded_as_a_cuda_graph_goes_on_by_itself(maker, name):
    model = maker()
    projections = calibrated(model)
    model = model.cuda()
    ids, total = tokens(2, 60).cuda(), 60
    config = aqua.AquaConfig.paper(**SETTINGS[name] | {"share": "group"})
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        cache = attachment.new_cache(max_length=total)
        assert cache.layout == "tiled"
        model(ids[:, :8], past_key_values=cache)
        expected = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(8, total)]
        cache.reset()
        model(ids[:, :8], past_key_values=cache)
        token, stream = ids[:, 8:9].clone(), torch.cuda.Stream()
        # The other stream reads what this one writes.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [model(token, past_key_values=cache).logits]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=cache).logits
        for place in range(9, total):
            token.copy_(ids[:, place : place + 1])
            graph.replay()
            found.append(logits.clone())
        assert int(cache.get_seq_length()) == total
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
