# SPDX-License-Identifier: Apache-2.0
"""`explain`: what runs, what it reads, each reason that it can give, and the setting that helps."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from encoders import IMAGE_ENCODERS, TEXT_ENCODERS, VISION_LANGUAGE, pixels, token_batch
from standin import StandIn
from test_matrix import FAMILIES
from transformers import DynamicCache

import aqua_attention as aqua
from aqua_attention.attach import recording
from aqua_attention.attach.generate import GenerateCaches
from aqua_attention.attach.possible import why_not_host_free
from aqua_attention.errors import Reason, remedy_of, said
from aqua_attention.ops.backend import load, why_not_preferred, why_not_tiled
from aqua_attention.ops.backends import triton as gpu
from aqua_attention.ops.backends.cpu import build
from aqua_attention.ops.plan import LayerPlan
from conftest import calibrated, make_gemma3, make_llama, make_mistral

GROUP = {"k_ratio": 0.5, "selection": "weighted", "share": "group", "sink": 0, "recent": 0}
PROMPT = torch.tensor([[5, 6, 7, 8]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
NO_WINDOW, NO_PATTERN = "leave s_ratio out, or sink and recent", "leave out the pattern of layers (layers=...)"
NO_ASSISTANT = "leave out the assistant, or prompt lookup"
OWN_CACHE = (
    "given a cache of its own",
    "leave past_key_values out, or give new_cache(max_length, layout='tiled')",
)
compiled = pytest.mark.skipif(build.no_kernel_reason() is not None, reason=str(build.no_kernel_reason()))
pytestmark = [compiled, pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")]


@pytest.fixture(autouse=True)
def c_kernel(monkeypatch):
    """The kernel in C serves tiles, and not triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def graphs(monkeypatch):
    """Something to record steps with."""
    monkeypatch.setattr(recording, "CudaGraph", StandIn)


@pytest.fixture(scope="module")
def models():
    """(model, projections) of a family, made once."""
    makers = FAMILIES | {
        "wide": lambda: make_llama(head_dim=272),
        "hybrid": make_gemma3,
        "sliding": make_mistral,
        "softcap": FAMILIES["gemma2 (softcap)"],
        "sinks": FAMILIES["gpt_oss (s_aux)"],
    }
    made = {}

    def get(name):
        if name not in made:
            model = makers[name]()
            made[name] = model, calibrated(model)
        return made[name]

    return get


def attached(model, projections, *, settings=None, **options):
    return aqua.apply(model, projections, aqua.AquaConfig(**GROUP | (settings or {})), **options)


def half(model):
    return copy.deepcopy(model).to(torch.float16)


# What is known before `generate` is called: model, settings, options of `apply`, words of the reason, remedy.
BEFORE = {
    "share": ("llama", {"share": "head"}, {}, "share is 'head'", "set share='group' to read fewer bytes"),
    "bits 4": ("llama", {"bits": 4}, {}, "neither bits=4", "leave bits out (bits=8 needs a GPU)"),
    "bits 8": ("llama", {"bits": 8}, {}, "the CPU kernel reads no bits=8", "leave bits out"),
    "eviction": ("llama", {"h2o_ratio": 0.5}, {}, "h2o_ratio", "set h2o_ratio=1"),
    "stored window": ("llama", {"s_ratio": 0.25, "sink": 2}, {}, "s_ratio with", NO_WINDOW),
    "sink": ("llama", {"sink": 200}, {}, "sink is 200 and recent 0", "set sink and recent to 128 or less"),
    "recent": ("llama", {"recent": 129}, {}, "recent 129", "set sink and recent to 128 or less"),
    "wide": ("wide", {}, {}, "heads have 272 dimensions, and it takes 256 at most", ""),
    "softcap": ("softcap", {}, {}, "neither softcap nor extra", ""),
    "sinks": ("sinks", {}, {}, "neither softcap nor extra", ""),
    "layout": ("llama", {}, {"layout": "plain"}, "layout is 'plain'", "leave layout out"),
    "layers": ("llama", {}, {"layers": "layers.0.*"}, "some layers are left dense", NO_PATTERN),
    "all slide": ("sliding", {"bits": 8}, {}, "all layers slide, and none", "leave bits out"),
    "record": ("llama", {}, {"record": False}, "record is False", "set record=True"),
    "compile": ("llama", {}, {"compile": False}, "compile is False", "set compile=True"),
    "k_ratio": ("llama", {"k_ratio": 1.0}, {}, "k_ratio is 1: every dimension is multiplied", "set k_ratio below 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_each_setting_that_prevents_something_is_named_before_a_call(graphs, models, name):
    family, settings, options, words, remedy = BEFORE[name]
    with attached(*models(family), settings=settings, **options) as attachment:
        found = attachment.explain()
    assert found.last is None
    assert words in found.reason
    assert found.remedy == remedy
    decoding = found.decoding
    is_tiled = name in ("record", "compile", "k_ratio")
    assert (decoding.layout == "tiled", decoding.untiled is None) == (is_tiled, is_tiled)
    assert decoding.recorded == (name in ("compile", "k_ratio"))
    line = next(line for line in str(found).splitlines() if "not faster" in line)
    assert line == f"  not faster, because {found.reason}: {remedy or 'no setting changes that'}"


def test_nothing_prevents_anything(graphs, models):
    with attached(*models("llama")) as attachment:
        found = attachment.explain(100)
    assert (found.reason, found.remedy, found.prompt.reason) == (None, "", None)
    assert "not faster" not in str(found)
    assert found.decoding.recorded
    assert str(found).splitlines()[:2] == [
        "prompt of 100 tokens: fused",
        "decoding after 100 tokens: cpu, tiled cache, steps recorded as a CUDA graph",
    ]


def test_a_cpu_records_nothing_and_that_is_no_obstacle(models):
    for options in ({}, {"record": False}, {"compile": False}):
        with attached(*models("llama"), **options) as attachment:
            found = attachment.explain()
        assert (found.reason, found.decoding.recorded) == (None, False)
        assert "steps not recorded (only steps on a CUDA GPU are recorded)" in str(found)


def test_the_dtype(models):
    model, projections = models("llama")
    with attached(half(model), projections) as attachment:
        found = attachment.explain()
    assert "the model is torch.float16, and the CPU kernel takes float32 and bfloat16" in found.reason
    assert found.remedy == "load the model with dtype='bfloat16' or 'float32'"


def test_no_compiler(models, monkeypatch, no_kernel_loaded):
    monkeypatch.setattr(build, "_compiler", lambda: None)
    with attached(*models("llama")) as attachment:
        found = attachment.explain()
    assert (found.reason, found.remedy) == ("there is no C compiler", "install gcc, or set CC")


def test_another_system(models, monkeypatch, no_kernel_loaded):
    monkeypatch.setattr(build.platform, "system", lambda: "Plan9")
    with attached(*models("llama")) as attachment:
        found = attachment.explain()
    assert (found.reason, found.remedy) == ("the kernel is for Linux, this is Plan9", "")


def test_the_interpreter_runs_only_where_it_is_named(models, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with attached(*models("llama")) as attachment:
        found = attachment.explain()
    assert "triton's interpreter" in found.reason
    assert found.remedy == "set layout='tiled'"
    with attached(*models("llama"), layout="tiled") as attachment:
        assert attachment.explain().decoding.backends == {"triton": 3}


def test_keys_that_do_not_come_from_the_cache(models, monkeypatch):
    with attached(*models("llama")) as attachment:
        monkeypatch.setattr(attachment, "_rotates_on_write", False)
        found = attachment.explain()
    assert found.reason == "LlamaForCausalLM does not take its keys straight from its cache"
    assert (found.decoding.layout, found.decoding.layers, found.decoding.backends) == ("model's own", {}, {"fused": 3})


def test_layers_that_the_projections_do_not_cover(models, word_tokenizer, words):
    model, _ = models("llama")
    part = aqua.calibrate(model, word_tokenizer, words, tokens=256, context=64, layers="layers.1.*")
    with attached(model, part) as attachment:
        found = attachment.explain()
    assert "some layers are left dense" in found.reason
    assert found.remedy == "calibrate all layers"
    assert found.dense == 2
    assert "  2 layers dense" in str(found).splitlines()


def test_hooks_and_devices_prevent_recording(graphs, models):
    model, projections = models("llama")
    with attached(model, projections) as attachment:
        hook = model.model.layers[0].register_forward_hook(lambda *_: None)
        found = attachment.explain()
        assert "model.layers.0 has a forward hook" in found.reason
        assert (found.remedy, found.decoding.recorded, found.decoding.layout) == ("remove the hook", False, "tiled")
        hook.remove()
        model.elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"))
        try:
            found = attachment.explain()
        finally:
            del model.elsewhere
        assert "the model lies on several devices (cpu, meta)" in found.reason
        assert found.remedy == "load the model onto one device"
        assert attachment.explain().reason is None


def test_a_layer_that_counts_on_the_host_cannot_be_recorded():
    strange = SimpleNamespace(layers=[SimpleNamespace()])
    assert why_not_host_free(strange) == "a SimpleNamespace of the cache counts its tokens on the host"


# What a call of `generate` was given: how, words of the reason, remedy, what the layout is called.
GIVEN = {
    "static": ({"cache_implementation": "static"}, "is 'static'", "leave cache_implementation out", "static"),
    "dynamic cache": ({"past_key_values": lambda _: DynamicCache()}, *OWN_CACHE, "DynamicCache"),
    "plain cache": ({"past_key_values": lambda a: a.new_cache(64, layout="plain")}, *OWN_CACHE, "plain"),
    "growing cache": ({"past_key_values": lambda a: a.new_cache()}, *OWN_CACHE, "growing"),
    "beams": ({"num_beams": 2}, "beam search moves or drops tokens", "set num_beams=1", "growing"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam sample moves", "set num_beams=1", "growing"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted generation moves", NO_ASSISTANT, "growing"),
    "no cache": ({"use_cache": False}, "use_cache is False", "set use_cache=True", "no"),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_the_last_call_was_given_wins(graphs, models, name):
    given, words, remedy, layout = GIVEN[name]
    model, projections = models("llama")
    with attached(model, projections) as attachment:
        options = {key: value(attachment) if callable(value) else value for key, value in given.items()}
        model.generate(PROMPT, **GREEDY | options)
        found = attachment.explain()
        assert words in found.reason
        assert (found.remedy, found.last.layout, found.last.replays) == (remedy, layout, 0)
        assert found.decoding.untiled is None, "the next call would be faster"
        assert f"last call: {layout} cache" in str(found)
        model.generate(PROMPT, **GREEDY)
        assert attachment.explain().reason is None


def test_a_tiled_cache_that_is_given_is_no_obstacle(graphs, models):
    model, projections = models("llama")
    with attached(model, projections) as attachment:
        model.generate(PROMPT, past_key_values=attachment.new_cache(64, layout="tiled"), **GREEDY)
        found = attachment.explain()
    assert (found.reason, found.last.layout, found.last.replays) == (None, "tiled", 3)


def test_a_call_says_how_many_steps_were_replayed(graphs, models):
    model, projections = models("llama")
    with attached(model, projections, compile=True) as attachment:
        before = attachment.explain()
        assert (before.last, before.decoding.recorded) == (None, True)
        model.generate(PROMPT, **GREEDY)
        first = attachment.explain().last
        assert (first.steps, first.replays, first.unreplayed, first.untiled) == (5, 3, None, None)
        assert first.seconds > 0
        model.generate(PROMPT, **GREEDY | {"max_new_tokens": 9})
        found = attachment.explain()
        # The recording of the first call serves again.
        assert (found.last.steps, found.last.replays, found.last.seconds) == (8, 8, 0)
        assert str(found).splitlines()[-1] == "last call: tiled cache, 8 of 8 steps replayed"
        model.generate(PROMPT.repeat(2, 1), **GREEDY | {"max_new_tokens": 2})
        found = attachment.explain()
        assert (found.last.steps, found.last.replays, found.reason) == (1, 0, None), "a first step is never recorded"


class Failing(StandIn):
    """A graph that cannot be recorded."""

    def record(self, run):
        raise RuntimeError("no memory is left\nmore lines")


def test_a_recording_that_fails_is_named(models, monkeypatch):
    monkeypatch.setattr(recording, "CudaGraph", Failing)
    model, projections = models("llama")
    with attached(model, projections) as attachment:
        model.generate(PROMPT, **GREEDY)
        found = attachment.explain()
    assert (found.reason, found.remedy) == ("recording failed: no memory is left", "")
    assert (found.last.steps, found.last.replays) == (5, 0)
    assert str(found).splitlines()[-1] == "last call: tiled cache, 5 steps"


# Steps that are no recorded ones: inputs beside token and cache, words of the reason, remedy.
STEPS = {
    "mask": (
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1]]), "position_ids": torch.tensor([[4]])},
        "the mask hides more than the padding",
        "",
    ),
    "positions": ({"attention_mask": torch.ones(1, 5)}, "there is a mask and no position_ids", "give position_ids"),
    "tuple": ({"return_dict": False}, "return_dict is False", "leave return_dict out"),
    "object": ({"thing": object()}, "thing is a object, and only tensors and numbers", ""),
}


@pytest.mark.parametrize("name", STEPS)
def test_why_a_step_was_not_replayed(graphs, models, name):
    inputs, words, remedy = STEPS[name]
    model, projections = models("llama")
    with attached(model, projections) as attachment, torch.no_grad():
        model.generate(PROMPT, **GREEDY)
        with attachment._recorder.generating():
            cache = attachment.new_cache(64, layout="tiled")
            model(input_ids=PROMPT, past_key_values=cache)
            model(input_ids=PROMPT[:, :1], past_key_values=cache, **inputs)
        found = attachment.explain()
    assert words in found.reason
    assert (found.remedy, found.last.steps, found.last.replays) == (remedy, 1, 0)


def test_a_step_with_gradients_or_without_a_prompt(graphs, models):
    model, projections = copy.deepcopy(models("llama")[0]).requires_grad_(False), models("llama")[1]
    with attached(model, projections) as attachment:
        model.generate(PROMPT, **GREEDY)
        with attachment._recorder.generating():
            cache = attachment.new_cache(64, layout="tiled")
            model(input_ids=PROMPT, past_key_values=cache)
            with torch.enable_grad():
                model(input_ids=PROMPT[:, :1], past_key_values=cache)
        found = attachment.explain()
        assert (found.reason, found.remedy) == ("gradients are being recorded", "use torch.no_grad()")
        with attachment._recorder.generating(), torch.no_grad():
            model(input_ids=PROMPT[:, :1], past_key_values=attachment.new_cache(64, layout="tiled"))
        assert attachment.explain().reason == "there was no prompt"


def test_a_version_of_transformers_that_says_less():
    reason = GenerateCaches(lambda room: None, lambda: None, aqua.AquaConfig())._why_not_given({"batch_size": 1})
    assert "does not say generation_config, model_kwargs, generation_mode, max_cache_length" in reason
    assert remedy_of(reason) == "install transformers 5.16"


def test_a_hybrid_model_is_counted(graphs, models):
    model, projections = models("hybrid")
    with attached(model, projections) as attachment:
        found = attachment.explain(100)
        assert found.decoding.layers == {"ring": 2, "tiled": 1}
        assert (found.decoding.sliding, found.decoding.backends) == (2, {"fused": 2, "cpu": 1})
        assert (found.reason, found.decoding.unskipped) == (None, None), "windows are exact on purpose"
        line = "  2 of 3 layers slide: they read their window only, AQUA saves nothing there"
        assert line in str(found).splitlines()
        model.generate(PROMPT, **GREEDY)
        assert attachment.explain().last.replays == 3
    with attached(model, projections, layout="plain") as attachment:
        assert attachment.explain().decoding.layers == {"sliding": 2, "growing": 1}
    # 2 key-value heads of 16 dimensions in float32, and 2 windows of 12 tokens.
    bytes_read = found.decoding.bytes
    assert (bytes_read.token, bytes_read.dense_token) == (2 * (8 + 16) * 4, 2 * (16 + 16) * 4)
    assert bytes_read.step == 100 * 192 + 2 * 12 * 256
    assert bytes_read.dense_step == 100 * 256 + 2 * 12 * 256


def test_a_prompt_beyond_the_window_needs_a_mask_there(models):
    with attached(*models("hybrid"), settings={"sink": 2, "recent": 2, "sliding": "approximate"}) as attachment:
        assert attachment.explain(12).prompt.backends == {"fused": 3}
        assert attachment.explain(13).prompt.backends == {"chunked": 2, "fused": 1}
        assert "prompt of 13 tokens: chunked (2 layers), fused (1 layer)" in str(attachment.explain(13))


@pytest.mark.parametrize(
    ("settings", "layout", "token"),
    [
        ({}, "tiled", 3 * 2 * (8 + 16) * 4),
        ({"k_ratio": 1.0}, "tiled", 3 * 2 * (16 + 16) * 4),
        ({"s_ratio": 0.25}, "tiled", 3 * 2 * (6 + 16) * 4),
        ({"min_length": 101}, "tiled", 3 * 2 * (16 + 16) * 4),
        ({"min_length": 100}, "tiled", 3 * 2 * (8 + 16) * 4),
        ({"logit_error": 0.1}, "tiled", 3 * 2 * (16 + 16) * 4),
        # A growing cache multiplies whatever it stores.
        ({"share": "head"}, "growing", 3 * 2 * (16 + 16) * 4),
        ({"s_ratio": 0.25, "sink": 2}, "growing", 3 * 2 * (12 + 16) * 4),
        ({"h2o_ratio": 0.5}, "growing", 3 * 2 * (16 + 16) * 4 // 2),
        # A byte a number, and a scale and a zero point of two bytes each for key and value.
        ({"bits": 8}, "growing", 3 * 2 * (16 + 16 + 8)),
        # 4 leading key dimensions of a byte and 12 of half a byte; two halves of values: groups with four bytes each.
        ({"bits": 4}, "growing", 3 * 2 * (4 + 6 + 3 * 4 + 8 + 2 * 4)),
    ],
)
def test_bytes_are_those_computed_by_hand(models, settings, layout, token):
    with attached(*models("llama"), settings=settings) as attachment:
        one, three = attachment.explain(100), attachment.explain(100, batch=3)
    read, dense = one.decoding.bytes, 3 * 2 * (16 + 16) * 4
    assert (one.decoding.layout, read.token, read.step) == (layout, token, 100 * token)
    assert (read.dense_token, read.dense_step) == (dense, 100 * dense)
    assert (three.decoding.bytes.step, three.decoding.bytes.dense_step) == (300 * token, 300 * dense)
    assert read.is_bound == ("logit_error" in settings)
    assert (
        f"{'at most ' if read.is_bound else ''}{token} bytes for each token of context (dense: {dense} bytes)"
        in str(one)
    )
    assert "for 3 new tokens" in str(three)
    has_threshold = "sequences of fewer than 101 tokens multiply every dimension (min_length)" in str(one)
    assert has_threshold == (settings.get("min_length") == 101)


def test_the_exact_window_is_read_whole_and_may_be_all_there_is(models):
    with attached(*models("llama"), settings={"sink": 4, "recent": 8}) as attachment:
        long, short = attachment.explain(100), attachment.explain(12)
        assert attachment.explain(13).decoding.unskipped is None
    dense = 3 * 2 * (16 + 16) * 4
    assert (long.decoding.bytes.token, long.decoding.bytes.dense_token) == (3 * 2 * (8 + 16) * 4, dense)
    assert long.decoding.bytes.step == 88 * long.decoding.bytes.token + 12 * dense
    assert (short.decoding.bytes.token, short.decoding.bytes.step) == (dense, 12 * dense)
    assert "; all of so few tokens are in the exact window (4 + 8)" in str(short)


def test_eight_bits_in_all_sliding_layers_still_generate(models):
    model, projections = models("sliding")
    with attached(model, projections) as attachment:
        expected = model.generate(PROMPT, **GREEDY)
    with attached(model, projections, settings={"bits": 8}) as attachment:
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected), "windows are never rounded"
        assert attachment.explain().last.layout == "growing"


def test_a_layout_that_is_asked_for_and_impossible_is_an_error(models):
    model, projections = models("llama")
    words = r"layout='tiled' is impossible here, because share is 'head'.*: set share='group' .*, or leave layout out"
    with pytest.raises(aqua.AquaError, match=words):
        attached(model, projections, settings={"share": "head"}, layout="tiled").attach()
    with attached(model, projections) as attachment:
        assert attachment.explain().decoding.layout == "tiled"


def test_what_cannot_be_explained_is_an_error(models):
    attachment = attached(*models("llama"))
    with pytest.raises(aqua.AquaError, match="AQUA is not attached"):
        attachment.explain()
    with attachment, pytest.raises(aqua.AquaError, match="length is 0 and batch 1"):
        attachment.explain(0)


@pytest.mark.parametrize("name", ["bert", "modernbert (local layers, rotary)", "gemma 3 (bidirectional)", "vit"])
def test_an_encoder_decodes_nothing(name):
    model = (TEXT_ENCODERS | IMAGE_ENCODERS)[name]()
    inputs = {"pixel_values": pixels()} if name == "vit" else {"input_ids": token_batch()[0][:1]}
    with attached(model, aqua.calibrate_inputs(model, [inputs])) as attachment:
        found = attachment.explain(32)
    assert (found.decoding, found.reason, list(found.prompt.backends)) == (None, None, ["fused"])
    assert str(found) == "prompt of 32 tokens: fused"


def test_images_and_layers_without_attention_beside_text(graphs):
    """Every second layer of this model is linear attention, whose state nobody records."""
    make, prompt = VISION_LANGUAGE["qwen3.5 (hybrid)"]
    model, inputs = make(), prompt()
    with attached(model, aqua.calibrate_inputs(model, [inputs, inputs])) as attachment:
        found = attachment.explain(32)
        assert sum(found.prompt.backends.values()) == len(attachment._found)
        assert (found.decoding.backends, found.decoding.layout, found.decoding.recorded) == ({"cpu": 2}, "tiled", False)
        assert found.reason == "a LinearAttentionLayer of the cache counts its tokens on the host"
        model.generate(**inputs, **GREEDY)
        last = attachment.explain(32).last
    assert (last.layout, last.replays, last.unreplayed) == ("tiled", 0, found.reason)


def test_the_dictionary_is_json(graphs, models):
    model, projections = models("softcap")
    with attached(model, projections, settings={"share": "head"}) as attachment:
        model.generate(PROMPT, **GREEDY)
        found = attachment.explain(50)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["reason"] == found.reason
    assert read["remedy"] == ""
    reason = "fused attention has no softcap"
    assert read["prompt"] == {"backends": {"chunked": 3}, "reason": reason, "remedy": "", "is_dense": False}
    assert read["decoding"]["bytes"]["token"] == found.decoding.bytes.token
    assert read["last"]["layout"] == "growing"
    assert "prompt of 50 tokens: chunked, because fused attention has no softcap" in str(found)


def plan(head_dim=16, **settings):
    config = aqua.AquaConfig(**GROUP | settings)
    rotation = torch.eye(head_dim).expand(2, head_dim, head_dim)
    return LayerPlan.of(rotation[..., : config.kept_dims(head_dim)], torch.ones(2, config.kept_dims(head_dim)), config)


def call(plan, dtype=torch.float32, width=16):
    states = torch.ones(1, 2, 4, width, dtype=dtype)
    return plan.call(states, states, states)


def test_what_the_gpu_kernels_say(monkeypatch):
    """Where triton's interpreter stands for a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not gpu.HAS_TRITON:
        pytest.skip("triton is not installed")
    backend = load("triton")

    def tiled(dtype=torch.float32, **settings):
        reason = backend.why_not_tiled(plan(**settings), 4, dtype)
        return str(reason), remedy_of(reason)

    assert tiled(head_dim=256, bits=8)[1] == "leave bits out"
    assert tiled(torch.float64) == (
        "the model is torch.float64, and it takes bfloat16, float16 and float32",
        gpu.LOAD_BFLOAT16,
    )
    assert tiled(head_dim=272) == ("heads have 272 dimensions, and it takes 256 at most", "")
    assert remedy_of(backend.why_not(call(plan(), torch.float64), plan())) == gpu.LOAD_BFLOAT16
    assert remedy_of(backend.why_not(call(plan(272), width=272), plan(272))) == ""
    wide = LayerPlan.of(torch.eye(16).expand(2, 16, 16), torch.ones(2, 12), aqua.AquaConfig(s_ratio=0.25, sink=2))
    assert remedy_of(backend.why_not(call(wide), wide)) == "leave s_ratio out, or sink and recent"
    monkeypatch.setattr(gpu, "HAS_TRITON", False)
    assert (tiled(), remedy_of(backend.why_not(call(plan()), plan()))) == (
        ("triton is not installed", "install triton"),
        "install triton",
    )


def test_old_gpus_have_no_remedy(monkeypatch):
    if not gpu.HAS_TRITON:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = gpu.no_kernels_reason(torch.device("cuda"))
    assert reason == "the kernels are for NVIDIA GPUs of compute capability 8.0 and newer"
    assert remedy_of(reason) == ""


def test_the_preferred_backend_for_a_prompt():
    here = plan()
    assert why_not_preferred(call(here), here) is None
    assert why_not_preferred(call(here)._replace(softcap=5.0), here) == "fused attention has no softcap"


def test_a_reason_is_a_text_with_a_remedy():
    reason = Reason("it is so", "do that")
    assert reason == "it is so"
    assert copy.deepcopy(reason).remedy == "do that"
    assert (said(reason), said(reason, "go"), said("so"), said("so", "go")) == (
        "it is so: do that",
        "it is so: do that, or go",
        "so",
        "so: go",
    )
    assert remedy_of("any text") == remedy_of(None) == ""
    assert why_not_tiled(plan(share="head"), 4, torch.float32).remedy == "set share='group' to read fewer bytes"


def test_windows_that_skip_nothing_are_no_obstacle(models):
    with attached(*models("sliding"), settings={"k_ratio": 1.0}) as attachment:
        found = attachment.explain()
    assert (found.reason, found.decoding.unskipped, found.decoding.sliding) == (None, None, 3)
