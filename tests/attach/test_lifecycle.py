# SPDX-License-Identifier: Apache-2.0
"""What happens to a model and its attachment beside a forward pass: threads, copies, an attachment that is dropped."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

import aqua_attention as aqua
from aqua_attention.calibration.run import collect
from conftest import VOCABULARY

QUARTER = aqua.AquaConfig.paper(k_ratio=0.25)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def tokens(batch=2, length=40, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tokens() if ids is None else ids).logits


def tables():
    return [set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)]


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


@pytest.fixture
def model_and_projections(llama):
    """A copy of the tiny Llama, so that one that stays broken breaks no other test."""
    return copy.deepcopy(llama[0]), llama[1]


def test_threads_that_attach_at_once_leave_a_usable_model(model_and_projections, monkeypatch):
    model, projections = model_and_projections
    expected, before, barrier, done = logits(model), tables(), threading.Barrier(8), []
    # Another thread comes to run wherever it can.
    monkeypatch.setattr(PreTrainedModel, "_can_set_attn_implementation", lambda _: time.sleep(0.001) or True)

    def attach(_):
        barrier.wait(60)
        for _ in range(8):
            try:
                with aqua.apply(model, projections, QUARTER):
                    done.append(None)
            except aqua.AquaError as error:
                done.append(str(error))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attach, range(8)))
    refusals = {reason for reason in done if reason}
    assert len(done) == 64 and None in done
    assert all("another thread" in reason or "attached to this model already" in reason for reason in refusals)
    assert tables() == before and not model.training
    assert torch.equal(logits(model), expected)
    with aqua.apply(model, projections, QUARTER):
        assert (logits(model) - expected).abs().max() > 0.1


def test_a_thread_that_looks_at_a_model_sees_no_other_threads_attention(model_and_projections):
    """Its own attention is compared with ours: meanwhile nobody may attach."""
    model, projections = model_and_projections
    passes, refusals = [], []

    def attach():
        with pytest.raises(aqua.AquaError, match="another thread is calibrating this model, or attaching") as refused:
            aqua.apply(model, projections, QUARTER).attach()
        refusals.append(refused)

    def in_between(*_):
        if threading.current_thread() is threading.main_thread() and not refusals:
            passes.append(model.config._attn_implementation)
            if passes[-1] == "sdpa":
                in_a_thread(attach)

    hook = model.model.layers[0].register_forward_pre_hook(in_between)
    with aqua.apply(model, projections, QUARTER):
        hook.remove()
        assert len(refusals) == 1


def test_a_model_that_a_thread_calibrates_is_refused_to_others(model_and_projections):
    model, projections = model_and_projections
    expected, windows, refusals = logits(model), tokens(3), []

    def attach():
        for part in (model, model.model):
            with pytest.raises(aqua.AquaError, match="another thread is calibrating this model") as refused:
                aqua.apply(part, projections, QUARTER)
            refusals.append(refused)

    collect(model, windows, progress=lambda done, total: done < total and in_a_thread(attach))
    assert len(refusals) == 2 * 3
    assert torch.equal(logits(model), expected)


def test_what_other_threads_do_with_a_model_is_not_calibrated_on(model_and_projections):
    model, _ = model_and_projections
    windows = tokens(3)
    expected = collect(model, windows)
    found = collect(model, windows, progress=lambda *_: in_a_thread(logits, model, tokens(seed=5)))
    for index, layer in expected.items():
        assert found[index].key_count == layer.key_count
        assert torch.equal(found[index].key_gram, layer.key_gram)


def test_one_attachment_is_detached_by_many_threads(model_and_projections):
    model, projections = model_and_projections
    expected, barrier = logits(model), threading.Barrier(8)

    def detach(_):
        barrier.wait(60)
        attachment.detach()

    attachment = aqua.apply(model, projections, QUARTER)
    for _ in range(5):
        attachment.attach()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(detach, range(8)))
    assert torch.equal(logits(model), expected)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch": saved_and_loaded}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [None, "layers.[01].*"], ids=["all", "some"])
def test_a_copied_model_is_a_detached_one(model_and_projections, way, layers):
    model, projections = model_and_projections
    expected, continued = logits(model), model.generate(tokens(), **GREEDY)
    with aqua.apply(model, projections, QUARTER, layers=layers):
        under_aqua = logits(model)
        copied = WAYS[way](model)
        assert torch.equal(logits(copied), expected)
        assert torch.equal(copied.generate(tokens(), **GREEDY), continued)
        assert torch.equal(logits(model), under_aqua)
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(WAYS[way](copied)), expected)
    with aqua.apply(copied, projections, QUARTER, layers=layers):
        assert torch.equal(logits(copied), under_aqua)
    with torch.no_grad():
        copied.lm_head.weight.zero_()  # it has weights of its own
    assert torch.equal(logits(model), expected)


def test_a_copied_part_wrapper_or_config_is_detached(model_and_projections):
    model, projections = model_and_projections
    expected, ids = logits(model), tokens()
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state
        with aqua.apply(model, projections, QUARTER):
            part, wrapped = copy.deepcopy(model.model), copy.deepcopy(nn.ModuleList([model]))[0]
            config = pickle.loads(pickle.dumps(copy.deepcopy(model.config)))
            assert torch.equal(part(input_ids=ids).last_hidden_state, states)
            assert torch.equal(logits(wrapped), expected)
        assert config._attn_implementation == "sdpa"
        assert AutoModelForCausalLM.from_config(config)(input_ids=ids).logits.shape == expected.shape


def test_a_copied_method_is_that_of_a_detached_model(model_and_projections):
    model, projections = model_and_projections
    expected = model.generate(tokens(), **GREEDY)
    with aqua.apply(model, projections, QUARTER):
        assert not torch.equal(model.generate(tokens(), **GREEDY), expected)
        held, shallow = model.generate, copy.copy(model)
        for way in WAYS.values():
            assert torch.equal(way(model.generate)(tokens(), **GREEDY), expected)
        assert copy.copy(model.generate) is model.generate
    for generate in (held, shallow.generate):
        assert torch.equal(generate(tokens(), **GREEDY), expected)


def test_a_method_that_was_replaced_before_is_copied(model_and_projections):
    """As accelerate does, which puts a forward of its own into a model."""
    model, projections = model_and_projections
    forward, expected = model.forward, logits(model)
    model.forward = Doubled(forward)
    with aqua.apply(model, projections, QUARTER):
        copied = WAYS["pickle"](model)
    assert torch.equal(logits(copied), 2 * expected)


class Doubled:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *args, **kwargs):
        output = self.forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_attachment_is_not_copied(model_and_projections, way):
    model, projections = model_and_projections
    with aqua.apply(model, projections, QUARTER) as attachment:
        with pytest.raises(aqua.AquaError, match="an Attachment cannot be copied"):
            way(attachment)
        model.aqua = attachment
        with pytest.raises(aqua.AquaError, match="an Attachment cannot be copied"):
            copy.deepcopy(model)
