# SPDX-License-Identifier: Apache-2.0
"""A tuned basis: its attention is the reference's, the whole model loses less, and a stopped run goes on."""

from dataclasses import replace

import pytest
import torch
import transformers as tf

import aqua_attention as aqua
from aqua_attention.calibration import learned, learning, reading, tuning
from aqua_attention.calibration.checkpoint import room_for
from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.reading import Reading
from aqua_attention.calibration.tuning import TARGETS, attention_dropping, outside_and_hidden, tune
from aqua_attention.ops.mask import visible_and_exact
from aqua_attention.ops.plan import Call, LayerPlan
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.select import rotate, select_dimensions
from conftest import SHAPE, VOCABULARY, calibrated, make_gemma3, make_llama, make_mistral, make_qwen3

CONTEXT = 144


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(reading, "LEAST_READ", 6)
    monkeypatch.setattr(tuning, "RATE", 0.01)


def windows(count=8, seed=1):
    return torch.randint(2, VOCABULARY, (count, CONTEXT), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def svd(llama):
    return llama[0], calibrated(llama[0], windows=6, context=CONTEXT)


@pytest.fixture
def known(monkeypatch):
    """What is held out is what is read, so that a step in the right direction is certain to show."""
    read = list(windows(2))
    same = Reading(read * 10, [None, 40] * 10, read, [None, 40], 2)
    monkeypatch.setattr(tuning.Reading, "of", lambda *_: same)


def kl(projections):
    return projections.calibration["tuned"]["kl"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("case", ["float32", "bfloat16", "mask", "s_aux", "multi-query"])
def test_its_attention_is_the_references(target, case):
    generator = torch.Generator().manual_seed(0)
    groups, length, dim = (1 if case == "multi-query" else 2), 90, 16
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32

    def draw(heads):
        return torch.randn(2, heads, length, dim, generator=generator).to(dtype)

    query, key, value = draw(4), draw(groups), draw(groups)
    mask = torch.ones(length, length).tril().bool()[None, None].repeat(2, 1, 1, 1) if case == "mask" else None
    if mask is not None:
        mask[1, :, :, :5] = False  # padding on the left
    rotation = torch.linalg.qr(torch.randn(groups, dim, dim, generator=generator))[0]
    spread = torch.rand(groups, dim, generator=generator)
    plan = LayerPlan(rotation, spread[:, : target.config.kept_dims(dim)], target.config, 0.3)
    extra = torch.randn(4, generator=generator) if case == "s_aux" else None
    call = Call(query, key, value, mask, 0, 0, 0.3, None, extra)
    window = {"sink": plan.sink, "recent": plan.recent}
    seen = visible_and_exact(mask, queries=length, keys=length, start=0, **window, device=query.device)
    rotated = rotate(query, rotation)
    expected = attention_reference(
        rotated,
        rotate(key, rotation),
        value,
        select_dimensions(rotated, plan),
        mask=mask,
        scaling=0.3,
        s_aux=extra,
        **window,
    )
    found = attention_dropping(call, [plan, plan], rotation, *outside_and_hidden(*seen))
    real = ~torch.isnan(found)
    assert real[:, :, 5:].all()
    tolerance = 0.03 if case == "bfloat16" else 1e-4
    assert torch.allclose(found[real].float(), expected[real].float(), atol=tolerance)
    dense = attention_reference(query, key, value, None, mask=mask, scaling=0.3, s_aux=extra)
    assert not torch.allclose(found[real].float(), dense[real].float(), atol=tolerance)


def test_targets_one_by_one_are_those_at_once(svd, known, monkeypatch):
    together = tune(*svd, windows())
    monkeypatch.setattr(tuning, "MOST_NUMBERS", 1)
    alone = tune(*svd, windows())
    for name, losses in kl(together).items():
        assert losses == pytest.approx(kl(alone)[name], rel=0.02)


@pytest.mark.parametrize("make", [make_llama, make_qwen3, make_gemma3])
def test_the_model_loses_less_in_every_way_and_stays_exact(make, known):
    model = make()
    start = calibrated(model, windows=6, context=CONTEXT)
    found = tune(model, start, windows())
    assert found.basis == "learned"
    assert found.calibration["tuned"]["kept"]
    assert list(kl(found)) == [target.name for target in TARGETS]
    for name, (before, after) in kl(found).items():
        assert after < before, name
    for index, layer in found.layers.items():
        eye = torch.eye(layer.rotation.shape[-1])
        assert torch.allclose(
            layer.rotation.transpose(-1, -2) @ layer.rotation, eye.expand_as(layer.rotation), atol=1e-6
        )
        assert torch.allclose(layer.key_spread.norm(dim=-1), start.layers[index].key_rms.norm(dim=-1), rtol=1e-4)
    tokens = windows(1, 5)
    with torch.no_grad():
        dense = model(tokens).logits
        with aqua.apply(model, found, aqua.AquaConfig(k_ratio=1.0)):
            assert torch.allclose(model(tokens).logits, dense, atol=1e-3)


def test_the_loss_in_the_file_is_what_an_evaluation_measures(svd, known):
    """Without positions: by `apply`, its own kernels and cache."""
    model, start = svd
    found = tune(model, start, windows())
    held, total = windows(2), {target.name: [] for target in TARGETS}
    for window, place in zip(held, (None, 40), strict=True):
        inputs = {"input_ids": window[None]}
        if place is not None:
            inputs["position_ids"] = place + torch.arange(CONTEXT)[None]
        with torch.no_grad():
            dense = model(**inputs).logits[0, 68:].log_softmax(-1)
            for target in TARGETS:
                with aqua.apply(model, found, target.config):
                    now = model(**inputs).logits[0, 68:].log_softmax(-1)
                total[target.name].append(float((dense.exp() * (dense - now)).sum(-1).mean()))
    for name, parts in total.items():
        assert sum(parts) / 2 == pytest.approx(kl(found)[name][1], rel=0.02, abs=1e-5)


def test_what_is_no_better_on_what_was_held_out_is_not_kept(svd, monkeypatch):
    model, start = svd
    monkeypatch.setattr(tuning, "RATE", 0.5)  # far too fast
    found = tune(model, start, windows())
    assert not found.calibration["tuned"]["kept"]
    assert found.basis == start.basis
    for index, layer in start.layers.items():
        assert torch.equal(found.layers[index].rotation, layer.rotation)


def test_layers_that_slide_keep_their_rotations(known):
    """They multiply every dimension by default, so that nothing is known of them."""
    model = make_gemma3()
    start = calibrated(model, windows=6, context=CONTEXT)
    found = tune(model, start, windows())
    assert [found.layers[each] is start.layers[each] for each in range(3)] == [True, False, True]
    model = make_mistral()
    start = calibrated(model, windows=6, context=CONTEXT)
    found = tune(model, start, windows())
    assert not found.calibration["tuned"]["kept"]
    assert set(map(tuple, kl(found).values())) == {(0.0, 0.0)}


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(svd, tmp_path, after):
    expected = tune(*svd, windows(), last_position=200)

    def stop(done, total):
        assert total == 6
        if done == after:
            raise KeyboardInterrupt

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        tune(*svd, windows(), last_position=200, checkpoint=path, progress=stop)
    read = []
    found = tune(*svd, windows(), last_position=200, checkpoint=path, progress=lambda done, _: read.append(done))
    assert read == list(range(after + 1, 7))
    assert found.calibration == expected.calibration
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].rotation, layer.rotation)
    with pytest.raises(aqua.AquaError, match=r"is of another run, which differs in places"):
        tune(*svd, windows(), last_position=256, checkpoint=path)


def test_the_model_is_left_as_it_was(svd):
    model, start = svd
    model.train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = [each.requires_grad for each in model.parameters()]
    name = model.config._attn_implementation
    try:
        tune(model, start, windows())
        assert model.training
        assert [each.requires_grad for each in model.parameters()] == before
        assert all(each.grad is None for each in model.parameters())
        assert model.config._attn_implementation == name
    finally:
        model.eval().requires_grad_(True)


def test_what_cannot_be_tuned_is_refused(svd):
    with pytest.raises(aqua.AquaError, match=r"there are 1 window to learn a basis from: 8 are needed"):
        tune(*svd, windows(1))
    half = make_llama().half()
    with pytest.raises(aqua.AquaError, match=r"is float16, in which gradients vanish: load it in float32 or bfloat16"):
        tune(half, svd[1], windows())
    headless = tf.LlamaModel(tf.LlamaConfig(**SHAPE)).eval()
    with pytest.raises(aqua.AquaError, match=r"LlamaModel"):
        tune(headless, calibrated(headless), windows())


def test_calibrate_goes_through_three_passes_and_stops_in_the_last(tmp_path, word_tokenizer, words, monkeypatch):
    for name, value in (("QUERIES", 48), ("QUERIES_HELD", 96), ("STEPS", 4)):
        monkeypatch.setattr(learned, name, value)
    monkeypatch.setattr(learning, "MARGIN", 0.0)
    model, options = make_llama(), {"tokens": 1440, "context": 144, "basis": "tuned", "last_position": 200}
    expected = aqua.calibrate(model, word_tokenizer, words, progress=False, **options)
    assert expected.basis == "learned"
    assert {"learned", "tuned"} <= set(expected.calibration)

    def stop(done, total):
        assert total == 10 + 8 + 8
        if done == 22:
            raise KeyboardInterrupt

    path = tmp_path / "p.partial"
    with pytest.raises(KeyboardInterrupt):
        aqua.calibrate(model, word_tokenizer, words, checkpoint=path, progress=stop, **options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.partial", "p.partial.learned", "p.partial.tuned"]
    found = aqua.calibrate(model, word_tokenizer, words, checkpoint=path, resume=True, progress=False, **options)
    assert torch.equal(found.layers[2].rotation, expected.layers[2].rotation)
    found.save(tmp_path / "p.safetensors")
    assert Projections.load(tmp_path / "p.safetensors").calibration == found.calibration
    aqua.calibration.checkpoint.discard(path)
    assert [each.name for each in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(aqua.AquaError, match=r"basis is 'best': it must be one of svd, learned, tuned"):
        aqua.calibrate(model, word_tokenizer, words, basis="best")


def test_inspect_shows_what_tuning_did(svd):
    from aqua_attention.report.projections import provenance_table

    start = svd[1]
    losses = {"0.5 group": [0.02, 0.01]}
    learnt = {"windows": 8, "last_position": None, "held_out": {"0": {"loss": [0.5, 0.7], "from": ["learned", "svd"]}}}
    for kept, said in ((True, "8 windows"), (False, "8 windows; no better, so not kept")):
        facts = {"windows": 8, "windows_read": 40, "seed": 0, "kl": losses, "kept": kept}
        tuned = replace(start, basis="learned", calibration=start.calibration | {"learned": learnt, "tuned": facts})
        rows = dict(provenance_table(tuned)[1])
        assert rows["tuned on"] == said
        assert rows["held-out KL by tuning"] == "0.5 group 0.0200 to 0.0100"


def test_a_state_of_one_basis_is_not_gone_on_with_for_another(tmp_path, word_tokenizer, words, monkeypatch):
    """The first pass reads other windows, where there are more than it needs."""
    monkeypatch.setattr("aqua_attention.calibration.run.FIRST_WINDOWS", 4)
    model, options = make_llama(), {"tokens": 1440, "context": 144}

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "p.partial"
    with pytest.raises(KeyboardInterrupt):
        aqua.calibrate(model, word_tokenizer, words, basis="learned", checkpoint=path, progress=stop, **options)
    with pytest.raises(aqua.AquaError, match=r"is of another run"):
        aqua.calibrate(model, word_tokenizer, words, checkpoint=path, resume=True, **options)


def test_in_bfloat16_less_is_lost_too(known):
    model = make_llama().bfloat16()
    found = tune(model, calibrated(model, windows=6, context=CONTEXT), windows())
    assert found.calibration["tuned"]["kept"]
    assert kl(found)["0.5 group"][1] < kl(found)["0.5 group"][0]


def test_a_number_that_overflows_takes_no_step(svd, known, monkeypatch):
    original, calls = tuning._Tuning._divergences, []

    def overflowing(self, *given):
        calls.append(given)
        found = original(self, *given)
        return found * float("nan") if torch.is_grad_enabled() and len(calls) % 2 else found

    monkeypatch.setattr(tuning._Tuning, "_divergences", overflowing)
    found = tune(*svd, windows())
    assert found.calibration["tuned"]["kept"]
    for layer in found.layers.values():
        assert torch.isfinite(layer.rotation).all()


def test_a_soft_limit_of_scores_is_refused():
    model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE, attn_logit_softcapping=5.0)).eval()
    with pytest.raises(aqua.AquaError, match=r"soft limit \(softcap\): use basis svd"):
        tune(model, calibrated(model, windows=6, context=CONTEXT), windows())


def test_inference_mode_around_it_changes_nothing(svd, known):
    expected = tune(*svd, windows())
    with torch.inference_mode():
        found = tune(*svd, windows())
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].rotation, layer.rotation)


def test_all_passes_together_take_no_more_room_than_is_asked_for(llama, words, word_tokenizer, tmp_path):
    """What lies on the disk at any time, and the largest file once more while it is written."""
    largest = 0

    def look(*_):
        nonlocal largest
        sizes = [each.stat().st_size for each in tmp_path.iterdir()]
        largest = max(largest, sum(sizes) + max(sizes, default=0))

    options = {"checkpoint": tmp_path / "state", "checkpoint_seconds": 0.0, "progress": look, "basis": "tuned"}
    found = aqua.calibrate(llama[0], word_tokenizer, words, tokens=8 * CONTEXT, context=CONTEXT, **options)
    room = room_for(found.model["shape"], later=True)
    assert room / 4 < largest <= room
