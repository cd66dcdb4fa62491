# SPDX-License-Identifier: Apache-2.0
"""What cannot be recorded takes the unrecorded path, gives the same tokens, and says why; and what only looks so."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf
from encoders import VISION_LANGUAGE
from standin import DEVICE, use_graphs
from torch import nn
from ways import (
    MAKERS,
    NEW,
    assert_same,
    generated,
    made,
    plainly,
    prompt,
    recorded,
)

import aqua_attention as aqua
from aqua_attention.attach.recording import CHANGING
from conftest import VOCABULARY, make_llama


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


def test_a_hook_of_the_users_is_called_for_each_token(llama):
    model, projections = llama
    with recorded(model, projections) as attachment:
        expected, calls = generated(model), []
        places = (
            model.model.layers[1].mlp.register_forward_hook,
            model.lm_head.register_forward_pre_hook,
            nn.modules.module.register_module_forward_hook,
        )
        for register in places:
            calls.clear()
            hook = register(lambda module, *args: calls.append(type(module)))
            assert torch.equal(generated(model), expected)
            hook.remove()
            assert max(calls.count(kind) for kind in calls) >= NEW
            assert "a replayed step would not call" in attachment._recorder.reason
        generated(model)
        assert attachment._recorder.reason == ""


ANOTHER_CACHE = {
    "beam search": ({"num_beams": 3}, "beam search moves or drops tokens"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation moves or drops tokens"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, "cache_implementation is 'static'"),
}


@pytest.mark.parametrize("name", ANOTHER_CACHE)
def test_what_cannot_be_recorded_says_why(family, name):
    model, projections = family
    (options, words), given = ANOTHER_CACHE[name], prompt(1, padding=0)
    expected = plainly(model, projections, lambda model: generated(model, given, **options))
    with recorded(model, projections) as attachment:
        assert torch.equal(generated(model, given, **options), expected)
        assert words in attachment._caches.reason
        assert attachment._recorder.replays == 0 and attachment._recorder.reason


def test_an_assistant_takes_the_unrecorded_path(llama):
    model, projections = llama
    assistant, given = make_llama(num_hidden_layers=1).to(DEVICE), prompt(1, padding=0)
    expected = plainly(model, projections, lambda model: generated(model, given, assistant_model=assistant))
    with recorded(model, projections) as attachment:
        assert torch.equal(generated(model, given, assistant_model=assistant), expected)
        assert "assisted generation" in attachment._caches.reason and attachment._recorder.replays == 0


def test_beams_on_a_tiled_cache_of_the_users(family):
    """They move its sequences in place, which a recording follows."""
    model, projections = family
    expected = plainly(model, projections, lambda model: generated(model, num_beams=3))
    with recorded(model, projections) as attachment:
        cache = attachment.new_cache(max_length=64, layout="tiled")
        assert torch.equal(generated(model, num_beams=3, past_key_values=cache), expected)


class Forgetful(tf.LlamaForCausalLM):
    """Hides a token in the middle of an answer, as models with masks of their own do."""

    def _update_model_kwargs_for_generation(self, *args, **kwargs):
        changed = super()._update_model_kwargs_for_generation(*args, **kwargs)
        mask = changed["attention_mask"]
        if mask is not None and mask.shape[1] > 24:
            mask[:, 10] = 0
        return changed


class Wide(tf.LlamaForCausalLM):
    """Gives each step a mask of four dimensions."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        length = kwargs["attention_mask"].shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        shown = visible & kwargs["attention_mask"].bool()[:, None, None]
        inputs["attention_mask"] = shown[:, :, -inputs["input_ids"].shape[1] :]
        return inputs


@pytest.mark.parametrize(("kind", "reads"), [(Forgetful, True), (Wide, False)])
def test_masks_of_the_models_own_are_obeyed(llama, kind, reads):
    model, projections = llama
    model.__class__ = kind
    config = aqua.AquaConfig(k_ratio=0.5, share="group")
    expected = plainly(model, projections, config=config)
    with recorded(model, projections, config) as attachment:
        assert torch.equal(generated(model), expected)
        assert attachment._recorder.reason == "the mask hides more than the padding of the prompt"
        assert (attachment._recorder.replays > 0) == reads


def test_a_wait_that_only_a_recording_would_meet_is_found_before(llama, graphs):
    """On a GPU a recording that fails takes the process with it."""
    model, projections = llama
    norm = model.model.norm
    original = norm.forward
    norm.forward = lambda states: original(states) if float(states.detach().flatten()[0]) < 1e9 else states
    expected = plainly(model, projections)
    with recorded(model, projections) as attachment:
        assert torch.equal(generated(model), expected) and torch.equal(generated(model), expected)
        assert attachment._recorder.reason == "the model's step waits for a value (aten::_local_scalar_dense)"
        assert graphs.recorded == 0


def test_a_recording_that_fails_is_not_tried_again(llama, graphs, monkeypatch):
    model, projections = llama
    expected, tries = plainly(model, projections), []

    def fail(graph, run):
        tries.append(graph)
        raise RuntimeError("no memory\nand more words")

    monkeypatch.setattr(graphs, "record", fail)
    with recorded(model, projections) as attachment:
        assert torch.equal(generated(model), expected)
        assert attachment._recorder.reason == "recording failed: no memory" and len(tries) == 1


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_an_answer_about_an_image(name):
    model, given = (made() for made in VISION_LANGUAGE[name])
    projections = aqua.calibrate_inputs(model, [given, given])
    given = {key: value.to(DEVICE) for key, value in given.items()}
    model = model.to(DEVICE)
    config = aqua.AquaConfig(k_ratio=0.5, share="group")
    with aqua.apply(model, projections, config, layout="plain", record=False):
        expected = generated(model, given)
    with recorded(model, projections, config) as attachment:
        found = [generated(model, given) for _ in range(2)]
        assert_same(found, [expected] * 2)
        if "hybrid" in name:
            assert "of the cache counts its tokens on the host" in attachment._recorder.reason
        else:
            # Up to transformers 5.17 some inputs of Qwen2-VL change from step to step.
            changing = attachment._recorder.reason == CHANGING
            assert changing or (attachment._recorder.reason == "" and attachment._recorder.replays >= 2 * NEW - 5)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of one character a token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1} | {chr(30 + number): number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<s>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


def test_stop_strings(llama, letters):
    model, projections = llama
    options = {"stop_strings": [letters.decode(plainly(model, projections)[0, 23:25])], "tokenizer": letters}
    expected = plainly(model, projections, lambda model: generated(model, prompt(1), **options))
    with recorded(model, projections) as attachment:
        assert torch.equal(generated(model, prompt(1), **options), expected)
        assert expected.shape[1] == 25
        assert attachment._recorder.replays == 2, attachment._recorder.reason + str(attachment._caches.reason)


def test_attentions_are_asked_for(llama):
    """AQUA gives none, recorded or not."""
    model, projections = llama
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    expected = plainly(model, projections, lambda model: generated(model, **asked))
    with recorded(model, projections):
        found = generated(model, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    pairs = zip(itertools.chain(*found.attentions), itertools.chain(*expected.attentions), strict=True)
    assert all(one is None and other is None for one, other in pairs)
