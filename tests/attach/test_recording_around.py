# SPDX-License-Identifier: Apache-2.0
"""Recorded steps and what happens around them: threads, errors, other weights, caches that grow, detaching."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from standin import DEVICE, use_graphs
from torch import nn
from transformers import LogitsProcessorList
from ways import (
    CONFIG,
    GREEDY,
    MAKERS,
    NEW,
    Raises,
    Told,
    assert_same,
    generated,
    made,
    plainly,
    prompt,
    recorded,
)

import aqua_attention as aqua
from conftest import make_llama

OTHER, FEW = aqua.AquaConfig(k_ratio=0.25, share="group"), 5


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What records steps here, see `standin`."""
    return use_graphs(monkeypatch)


@pytest.fixture(scope="module", params=MAKERS)
def family(request):
    """(model, projections): full layers only, and sliding ones too."""
    return made(MAKERS[request.param])


@pytest.fixture
def llama():
    """(model, projections), to be changed by a test."""
    return made(make_llama)


def ours(model):
    """What of ours is left on a model, by name."""
    names = {"generate", "forward", "_prepare_cache_for_generation"} & vars(model).keys()
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]
    return names, hooks, str(model.config._attn_implementation).startswith("aqua-")


@pytest.mark.parametrize("first", [20, 30], ids=["while decoding", "in a prompt"])
def test_a_small_cache_of_the_users_grows_in_the_middle(family, first, graphs):
    """Twice in one answer, and by a prompt between two answers: the recording is of other addresses then."""
    model, projections = family

    def chat(model, cache=None):
        given, found = prompt(length=first), []
        for turn in range(2):
            said = generated(model, given, past_key_values=cache, max_new_tokens=20, return_dict_in_generate=True)
            cache = said.past_key_values
            ids = torch.cat([said.sequences, prompt(length=90, padding=0, seed=turn)["input_ids"]], 1)
            mask = torch.ones_like(ids)
            mask[1, :7] = 0
            given, found = {"input_ids": ids, "attention_mask": mask}, [*found, said.sequences]
        return found

    expected = plainly(model, projections, chat)
    with recorded(model, projections) as attachment:
        cache = attachment.new_cache(max_length=24, layout="tiled")
        assert_same(chat(model, cache), expected)
        assert cache.max_length > int(cache.get_seq_length()) == first + 20 + 90 + 19
        assert graphs.recorded >= 2 and attachment._recorder.replays > 15


def test_a_cache_whose_memory_was_allocated_anew_is_recorded_anew(family):
    """Between two calls of the same shape it held another batch, so that a recording has the old addresses."""
    model, projections = family
    expected = plainly(model, projections)
    with recorded(model, projections) as attachment:
        cache = attachment.new_cache(max_length=64, layout="tiled")
        for _ in range(3):
            assert torch.equal(generated(model, past_key_values=cache), expected)
            cache.reset()
            with torch.no_grad():
                model(**prompt(rows=3), past_key_values=cache)
            cache.reset()
        assert attachment._recorder.reason == ""


def test_inference_mode_and_no_grad_share_a_cache(family, graphs):
    model, projections = family
    expected = plainly(model, projections)
    with recorded(model, projections) as attachment:
        cache = attachment.new_cache(max_length=24, layout="tiled")
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(generated(model), expected)
                assert attachment._recorder.reason == ""
                cache.reset()
                assert torch.equal(generated(model, past_key_values=cache), expected)
        assert graphs.recorded >= 3


def test_autocast_is_part_of_what_is_recorded(llama):
    """A call outside it must not replay its 16-bit products."""
    model, projections = llama

    def both(model):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            half = generated(model, output_logits=True, return_dict_in_generate=True)
        whole = generated(model, output_logits=True, return_dict_in_generate=True)
        # Of the first tokens: in 16 bits rounding may choose others later.
        return [torch.stack(each.logits[:FEW]) for each in (half, whole)]

    half, whole = plainly(model, projections, both)
    with recorded(model, projections) as attachment:
        found = both(model)
        assert torch.allclose(found[0], half, rtol=0, atol=0.1 * float(half.abs().max()))
        assert torch.allclose(found[1], whole, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3)
        assert attachment._recorder.replays > NEW


def test_threads(family):
    """One after the other, and two at once: whoever is not alone records nothing, and replays what there is."""
    model, projections = family
    prompts = [prompt(rows, seed=rows) for rows in (1, 2)]
    expected = plainly(model, projections, lambda model: [generated(model, each) for each in prompts])
    with recorded(model, projections) as attachment:
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(generated, model, prompts[0]).result(), expected[0])
        assert attachment._recorder.replays == NEW - 3
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda each: model.generate(**each, **GREEDY), prompts * 2))
        assert_same(found, expected * 2)


def test_attachments_one_after_the_other(family):
    """Two settings in turn, and the dense model again after each, with nothing left on it."""
    model, projections = family
    dense, before = generated(model), ours(model)
    for config in (CONFIG, OTHER, CONFIG):
        expected = plainly(model, projections, config=config)
        attachment = recorded(model, projections, config).attach()
        try:
            assert torch.equal(generated(model), expected) and attachment._recorder.replays
            with pytest.raises(aqua.AquaError, match="attached to this model already"):
                recorded(model, projections).attach()
            assert torch.equal(generated(model), expected)
            held = attachment._recorder
            assert len(held._steps) == 1
        finally:
            attachment.detach()
        assert len(held._steps) == 0
        assert ours(model) == before == (set(), [], False)
        assert torch.equal(generated(model), dense)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_a_usable_state(family, error):
    model, projections = family
    expected = plainly(model, projections)
    with recorded(model, projections) as attachment:
        cache = attachment.new_cache(max_length=64, layout="tiled")
        for given in ({}, {"past_key_values": cache}):
            for _ in range(2):
                options = {"streamer": Told(error())}
                if error is ZeroDivisionError:
                    options = {"logits_processor": LogitsProcessorList([Raises()])}
                with pytest.raises(error):
                    generated(model, **given, **options)
                cache.reset()
                assert torch.equal(generated(model, **given), expected)
                assert attachment._recorder.reason == ""
                cache.reset()
    assert ours(model) == (set(), [], False)


def test_a_copy_of_an_attached_model_does_not_run_the_original(family):
    model, projections = family
    dense = generated(model)
    with recorded(model, projections) as attachment:
        copied = copy.deepcopy(model)
        replays = attachment._recorder.replays
        assert torch.equal(generated(copied), dense)
        assert attachment._recorder.replays == replays
        assert copied.generate.__self__ is copied and copied.forward.__self__ is copied
    assert torch.equal(generated(model), dense)


class Adapter(nn.Module):
    """As peft's: beside a layer, on or off by an attribute."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, {"default": 0.0}
        self.more = nn.Linear(layer.in_features, layer.out_features, bias=False, device=DEVICE)

    def forward(self, states):
        return self.layer(states) + self.scale["default"] * self.more(states)


def replaced_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0).clone())


def inserted_adapter(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Adapter(mlp.down_proj)


def switched_adapter(model):
    model.model.layers[1].mlp.down_proj.scale["default"] = 5.0


def other_activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def other_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda states: mlp.down_proj(mlp.up_proj(states))


def weights_in_place(model):
    model.lm_head.weight.data.neg_()


def test_a_changed_model_is_recorded_anew(llama, graphs):
    model, projections = llama
    changes = (replaced_weight, inserted_adapter, switched_adapter, other_activation, other_forward, weights_in_place)
    twin, expected = copy.deepcopy(model), []
    for change in changes:
        change(twin)
        expected.append(plainly(twin, projections))
    with recorded(model, projections):
        generated(model)
        for change, tokens in zip(changes, expected, strict=True):
            change(model)
            assert torch.equal(generated(model), tokens), change.__name__
        assert graphs.recorded == len(changes)  # what is changed in place needs no new one
    assert len({str(tokens.tolist()) for tokens in expected}) == len(changes) - 1  # the adapter is off at first


def test_observers_are_told_the_same_and_change_nothing(family):
    """For each step; what one keeps stays, though a replay writes to the same place."""
    model, projections = family
    results = []
    for record, layout in ((False, "plain"), (True, "auto")):
        with aqua.apply(model, projections, CONFIG, record=record, layout=layout, compile=False) as attachment:
            unseen, told = generated(model), []
            attachment.on_selection = lambda *seen, told=told: told.append(seen)
            assert torch.equal(generated(model), unseen)
            assert attachment._recorder.replays > NEW or not record
            results.append((unseen, told))
    (expected, plain), (found, seen) = results
    assert torch.equal(found, expected)
    assert len(seen) == len(plain) == 3 * NEW
    for (index, selected, shape, dim), (other, chosen, size, same) in zip(seen, plain, strict=True):
        assert (index, shape, dim) == (other, size, same)
        assert type(shape) is torch.Size
        assert (selected is None and chosen is None) or torch.equal(selected, chosen)


def test_an_observer_may_remove_itself(family):
    """In the middle of a step, too, of which a replay tells the rest afterwards."""
    model, projections = family
    with recorded(model, projections) as attachment:
        unseen, told = generated(model), []

        def observer(index, *_):
            told.append(index)
            if len(told) == 3 * 6 + 1:
                attachment.on_selection = None

        attachment.on_selection = observer
        assert torch.equal(generated(model), unseen)
    assert told == [*range(3)] * 6 + [0]


def test_compiled_parts_are_recorded_too(family):
    """On a CPU the parts are left as they are; on a GPU rounding differs, and tokens of these models do not."""
    model, projections = family
    expected = plainly(model, projections)
    with aqua.apply(model, projections, CONFIG) as attachment:
        assert_same([generated(model), generated(model)], [expected] * 2)
        assert attachment._recorder.replays == 2 * NEW - 4
