# SPDX-License-Identifier: Apache-2.0
"""What happens to a model and its attachment beside a forward pass: threads, copies, an attachment that is dropped."""

from __future__ import annotations

import copy
import copyreg
import gc
import io
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

import aqua_attention as aqua
from aqua_attention.attach.compiled import CompiledParts
from aqua_attention.calibration.run import collect
from aqua_attention.model.capture import attention_layers
from conftest import VOCABULARY, calibrated, subject_of

QUARTER = aqua.AquaConfig.paper(k_ratio=0.25)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def tokens(batch=2, length=40, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tokens() if ids is None else ids).logits


def tables():
    return [
        set(AttentionInterface._global_mapping),
        set(AttentionMaskInterface._global_mapping),
        set(copyreg.dispatch_table),
    ]


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


def test_the_name_in_a_config_is_a_plain_string(model_and_projections):
    """`torch.compile` of torch 2.11 takes one of a subclass for unequal to all others."""
    model, projections = model_and_projections
    before = tables()
    with aqua.apply(model, projections, QUARTER):
        assert type(model.config._attn_implementation) is str
        assert tables() != before
    assert tables() == before


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


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_copied_in_the_middle_of_a_step_has_its_own_parts(model_and_projections, way):
    """Norms and MLPs are replaced while a step runs."""
    model, _ = model_and_projections
    expected = logits(model)
    with CompiledParts(model, attention_layers(model), backend="eager").used():
        assert "forward" in vars(model.model.norm)
        copied = WAYS[way](model)
    assert torch.equal(logits(copied), expected)
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    assert torch.equal(logits(model), expected)
    assert not logits(copied).any()


def make_gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, num_hidden_layers=2, head_dim=16, **sizes)).eval()


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


@pytest.fixture
def no_collector():
    """Who holds on to an attachment in a circle is found out."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


NEVER = "AQUA was never attached to LlamaForCausalLM, which ran dense"


def test_apply_without_with_warns(model_and_projections, no_collector):
    model, projections = model_and_projections
    with pytest.warns(UserWarning, match=NEVER) as told:
        aqua.apply(model, projections, QUARTER)
    assert len(told) == 1 and told[0].filename == __file__


def test_an_attachment_that_was_kept_and_never_attached_warns(model_and_projections, no_collector):
    model, projections = model_and_projections

    def use():
        attachment = aqua.apply(model, projections, QUARTER)
        logits(model)
        with pytest.raises(aqua.AquaError, match="not attached"):
            attachment.new_cache()

    with pytest.warns(UserWarning, match=NEVER):
        use()
    with pytest.warns(UserWarning, match=NEVER):
        aqua.apply(model, projections, QUARTER).detach()


def test_an_attachment_that_is_kept_to_the_end_warns_there(model_and_projections):
    attachment = aqua.apply(*model_and_projections)
    assert attachment.dropped.alive and attachment.dropped.atexit
    with attachment:
        assert not attachment.dropped.alive


def test_whoever_attached_or_was_refused_hears_nothing(model_and_projections):
    model, projections = model_and_projections
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = aqua.apply(model, projections, QUARTER)
        logits(model)
        with attachment:
            logits(model)
        del attachment
        aqua.apply(model, projections, QUARTER).attach().detach()
        with pytest.raises(aqua.AquaError):
            aqua.apply(model, projections, QUARTER, layers="nothing")
        with aqua.apply(model, projections), pytest.raises(aqua.AquaError, match="attached to this model already"):
            aqua.apply(model, projections)
        softcapped = make_gemma2()
        with pytest.raises(aqua.AquaError, match="layout='tiled' is impossible"):
            aqua.apply(softcapped, calibrated(softcapped), layout="tiled").attach()
        gc.collect()


def test_an_evaluation_that_ends_early_does_not_warn(llama):
    """Its attachments are made before any of them is attached."""
    from aqua_attention.evaluate.setting import Setting, runs_of

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs_of(subject_of(*llama), [Setting(QUARTER), Setting(aqua.AquaConfig())])


def test_an_attachment_says_what_it_is(model_and_projections):
    model, projections = model_and_projections
    with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=0.5), layers="layers.[01].*") as attachment:
        assert repr(attachment) == (
            "<Attachment of LlamaForCausalLM: 2 layers under AQUA, 1 dense; AquaConfig(k_ratio=0.5); attached>"
        )
    assert "not attached: use it in `with`, or call attach()" in repr(attachment)
