# SPDX-License-Identifier: Apache-2.0
"""A learned basis: orthogonal, never worse on what was held out, the same again, and resumed as if never stopped."""

from dataclasses import replace

import pytest
import torch
import transformers as tf

import aqua_attention as aqua
from aqua_attention.calibration import learned, learning, reading
from aqua_attention.calibration.learned import learn
from aqua_attention.calibration.learning import ORIGINS, TARGETS, Learner, losses
from aqua_attention.calibration.positions import begins, placed
from aqua_attention.calibration.projections import Projections, spectrum
from aqua_attention.calibration.sample import Sample, draw
from aqua_attention.model import capture
from aqua_attention.model.capture import attention_layers
from aqua_attention.ops.plan import Call
from aqua_attention.ops.reference import attention_probabilities
from conftest import SHAPE, VOCABULARY, calibrated, make_gemma3, make_llama, make_qwen3, subject_of

CONTEXT = 144


def make(config, model, **changes):
    torch.manual_seed(0)
    return model(config(**SHAPE | changes)).eval()


def make_neox():
    return make(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(reading, "LEAST_READ", 6)
    for name, value in (("QUERIES", 48), ("QUERIES_HELD", 96), ("STEPS", 8), ("CONSIDERED", 2)):
        monkeypatch.setattr(learned, name, value)
    monkeypatch.setattr(learning, "MARGIN", 0.0)


def windows(count=8, seed=1):
    return torch.randint(2, VOCABULARY, (count, CONTEXT), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def svd(llama):
    return llama[0], calibrated(llama[0], windows=6, context=CONTEXT)


def held_out(projections):
    return [loss for layer in projections.calibration["learned"]["held_out"].values() for loss in layer["loss"]]


@pytest.mark.parametrize("make", [make_llama, make_qwen3, make_neox])
def test_it_is_orthogonal_loses_less_and_stays_exact(make, monkeypatch):
    monkeypatch.setattr(learned, "STEPS", 16)
    model = make()
    start = calibrated(model, windows=6, context=CONTEXT)
    found = learn(model, start, windows(), last_position=250)
    for layer in found.layers.values():
        wide = layer.rotation.double()
        assert float((wide.mT @ wide - torch.eye(wide.shape[-1])).abs().max()) < 1e-6
    assert max(held_out(found)) <= 1
    assert min(held_out(found)) < 0.99
    ids = windows(2, seed=5)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with aqua.apply(model, found, aqua.AquaConfig(k_ratio=1.0)):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)


def test_layers_that_lose_nothing_keep_the_singular_vectors():
    """Windows of 12 tokens lie in the exact window."""
    model = make_gemma3()
    start = calibrated(model, windows=6, context=CONTEXT)
    found = learn(model, start, windows())
    facts = found.calibration["learned"]["held_out"]["0"]
    assert facts == {"loss": [1.0, 1.0], "from": ["svd", "svd"]}
    assert torch.equal(found.layers[0].rotation, start.layers[0].rotation)
    assert torch.equal(found.layers[0].key_spread, start.layers[0].key_rms)
    whole = model.config.layer_types.index("full_attention")
    assert not torch.equal(found.layers[whole].key_spread, start.layers[whole].key_rms)


def test_less_is_lost_in_the_model_too(svd):
    from aqua_attention.evaluate.setting import Setting
    from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity

    model, start = svd
    found = learn(model, start, windows(12))
    setting = [Setting(aqua.AquaConfig(k_ratio=0.25))]
    kl = [
        evaluate_perplexity(subject_of(model, each), setting, windows(4, 7))["rows"][0]["kl"] for each in (start, found)
    ]
    assert kl[1] < kl[0]


def test_a_seed_gives_the_same_again_and_another_seed_another(svd):
    first, same, other = (learn(*svd, windows(), seed=seed).layers[1].rotation for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(svd, tmp_path, after):
    expected = learn(*svd, windows())

    def stop(done, total):
        assert total == 6
        if done == after:
            raise KeyboardInterrupt

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        learn(*svd, windows(), checkpoint=path, progress=stop)
    read = []
    found = learn(*svd, windows(), checkpoint=path, progress=lambda done, _: read.append(done))
    assert read == list(range(after + 1, 7))
    assert found.calibration == expected.calibration
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].rotation, layer.rotation)
        assert torch.equal(found.layers[index].key_spread, layer.key_spread)
    with pytest.raises(aqua.AquaError, match=r"is of another run, which differs in seed"):
        learn(*svd, windows(), checkpoint=path, seed=3)


@pytest.mark.parametrize(("method", "call"), [("see", 3), ("step", 10), ("consider", 2)])
def test_an_interrupt_in_the_middle_of_a_window_loses_no_bit(svd, tmp_path, monkeypatch, method, call):
    expected, path, calls = learn(*svd, windows()), tmp_path / "state", []
    original = getattr(Learner, method)

    def interrupted(self, *given):
        result = original(self, *given)
        calls.append(given)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Learner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(*svd, windows(), checkpoint=path)
    found = learn(*svd, windows(), checkpoint=path)
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].rotation, layer.rotation)
        assert torch.equal(found.layers[index].key_spread, layer.key_spread)


def test_the_loss_in_the_file_is_that_of_what_the_file_holds(svd, monkeypatch):
    """Measured again on what was held out, from rotations and spreads alone."""
    kept = []
    original = Learner.chosen
    monkeypatch.setattr(Learner, "chosen", lambda self: (kept.append(self), original(self))[1])
    found = learn(*svd, windows(12))
    (learner,) = kept
    own = [found.layers[index] for index in sorted(found.layers)]
    now, base = (
        losses(learner.held, torch.cat([each.rotation for each in own]), torch.cat([each.key_spread for each in own])),
        losses(learner.held, learner.start, learner.start_spread),
    )
    weights = torch.tensor([target.weight for target in TARGETS])
    relative = ((now / base).mean(0) * weights[:, None]).sum(0) / weights.sum()
    assert torch.allclose(relative, torch.tensor(held_out(found)), atol=1e-3)
    assert float(relative.max()) <= 1 + 1e-6
    origins = [origin for layer in found.calibration["learned"]["held_out"].values() for origin in layer["from"]]
    assert "learned" in origins
    for layer in own:
        assert torch.allclose(layer.key_spread.norm(dim=-1), layer.key_rms.norm(dim=-1), rtol=1e-4)


def test_calibrate_stops_and_goes_on_in_both_passes(tmp_path, word_tokenizer, words):
    model, options = make_llama(), {"tokens": 1440, "context": 144, "basis": "learned", "last_position": 200}
    expected = aqua.calibrate(model, word_tokenizer, words, progress=False, **options)

    def stopping(at):
        def progress(done, total):
            assert total == 10 + 8
            if done == at:
                raise KeyboardInterrupt

        return progress

    path = tmp_path / "p.partial"
    for at, resume in ((3, False), (14, True)):
        with pytest.raises(KeyboardInterrupt):
            aqua.calibrate(
                model, word_tokenizer, words, checkpoint=path, resume=resume, progress=stopping(at), **options
            )
    with pytest.raises(aqua.AquaError, match=r"unfinished calibration"):
        aqua.calibrate(model, word_tokenizer, words, checkpoint=path, **options)
    found = aqua.calibrate(model, word_tokenizer, words, checkpoint=path, resume=True, progress=False, **options)
    assert torch.equal(found.layers[2].rotation, expected.layers[2].rotation)
    assert "learned" in str(found.calibration["learned"]["held_out"])
    assert found.calibration["last_position"] == 200


def test_the_file_holds_what_was_learned(svd, tmp_path):
    model, start = svd
    found, path = learn(model, start, windows()), tmp_path / "learned.safetensors"
    found.save(path)
    read = Projections.load(path)
    assert (read.basis, read.calibration) == ("learned", found.calibration)
    plans = [each.layers[0].plan(aqua.AquaConfig()) for each in (found, read)]
    assert torch.equal(plans[0].rotation, plans[1].rotation)
    # What "weighted" reads is the spread of the keys that are attended to, and no longer their mean square.
    assert torch.equal(plans[1].key_rms, found.layers[0].key_spread)
    assert not torch.allclose(plans[1].key_rms, read.layers[0].key_rms)
    row = spectrum(read)[0]
    assert len(row["held_out"]) == len(row["origin"]) == 2
    assert set(row["origin"]) <= set(ORIGINS)


def test_bases_of_a_learned_file(svd):
    model, start = svd
    found = learn(model, start, windows())
    assert found.with_basis("aqua") is found.with_basis("learned") is found
    assert torch.equal(found.with_basis("svd").layers[0].rotation, start.layers[0].rotation)
    assert found.with_basis("svd").basis == "aqua"
    assert start.with_basis("svd") is start
    assert torch.equal(found.with_basis("none").layers[0].rotation[0], torch.eye(16))
    with pytest.raises(aqua.AquaError, match=r"learned projections cannot be merged: learn on both texts"):
        found.merged(found)


def test_without_a_spread_a_file_is_damaged(svd, tmp_path):
    path = tmp_path / "p.safetensors"
    replace(svd[1], basis="aqua").save(path)
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(
        tensors, path, {name: text.replace('"basis": "aqua"', '"basis": "learned"') for name, text in header.items()}
    )
    with pytest.raises(aqua.AquaError, match=r"tensor layers\.0\.key_spread is missing"):
        Projections.load(path)


def test_what_cannot_be_learned_is_refused(svd):
    with pytest.raises(aqua.AquaError, match=r"there are 1 window to learn a basis from: 8 are needed, read more"):
        learn(*svd, windows(1))
    with pytest.raises(aqua.AquaError, match=r"context is 64: nearly all of it lies in the exact window of 4 \+ 64"):
        learn(*svd, windows(8)[:, :64])
    encoder = make(tf.BertConfig, tf.BertModel)
    with pytest.raises(
        aqua.AquaError, match=r"is no decoder of text, and only for decoders a basis is learned: use basis svd"
    ):
        learn(encoder, calibrated(encoder), windows())


def one_call(length=40, heads=(2, 3), dim=8):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads[0] * heads[1], length, dim, generator=generator)
    key, value = (torch.randn(1, heads[0], length, dim, generator=generator) for _ in range(2))
    return Call(query, key, value, None, 0, 0, dim**-0.5)


@pytest.fixture
def small_window(monkeypatch):
    from aqua_attention.calibration import sample

    for name, value in (("SINK", 2), ("RECENT", 5), ("FIRST", 10)):
        monkeypatch.setattr(sample, name, value)


@pytest.mark.usefixtures("small_window")
def test_losses_of_a_sample_that_holds_all_keys_are_those_of_attention():
    call = one_call()
    sample = draw(call, 16, seed=0)
    places = torch.randint(10, 40, (16,), generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3))).Q
    spread = torch.einsum("hji,hjk,hki->hi", rotation, sample.covariance(), rotation).sqrt()
    found = losses(sample, rotation, spread)
    query = (call.query.view(2, 3, 40, 8) @ rotation[:, None]).view(1, 6, 40, 8)
    key = call.key @ rotation
    energy = (query.view(2, 3, 40, 8) * spread[:, None, None]).square().sum(1, keepdim=True)
    chosen = torch.zeros_like(energy, dtype=torch.bool).scatter_(-1, energy.topk(4, -1).indices, True)
    options = {"num_key_value_heads": 2, "keys": 40, "sink": 2, "recent": 5, "scaling": call.scaling}
    dense, ours = (
        attention_probabilities(query, lambda tall: tall @ key.mT, selected, **options).view(2, 3, 40, 40)[:, :, places]
        for selected in (None, chosen.expand(2, 3, 40, 8).reshape(1, 6, 40, 8))
    )
    divergence = (dense * (dense / ours).log().nan_to_num(0.0, 0.0, 0.0)).sum(-1).mean((1, 2))
    error = ((ours - dense) @ call.value[0, :, None]).square().sum(-1).mean((1, 2))
    place = TARGETS.index(next(target for target in TARGETS if target[:2] == (0.5, "group")))
    # Keys and values of a sample are in bfloat16.
    assert torch.allclose(found[0, place], divergence, rtol=0.03)
    assert torch.allclose(found[1, place], error, rtol=0.03)


@pytest.mark.usefixtures("small_window")
def test_what_is_drawn_weighs_as_much_as_all_that_it_stands_for(monkeypatch):
    from aqua_attention.calibration import sample

    monkeypatch.setattr(sample, "KEYS", 6)
    call = one_call(length=64)
    drawn = draw(call, 32, seed=1)
    monkeypatch.setattr(sample, "KEYS", 64)
    whole = draw(call, 32, seed=1)
    assert drawn.key.shape[2] == 12
    assert torch.equal(drawn.query, whole.query)
    assert torch.allclose(drawn.weight.sum(-1), whole.weight.sum(-1), atol=1e-5)
    assert torch.allclose(drawn.inside, whole.inside, atol=1e-6)
    difference = (drawn.covariance() - whole.covariance()).norm() / whole.covariance().norm()
    assert float(difference) < 0.35


@pytest.mark.usefixtures("small_window")
def test_an_extra_logit_takes_its_share_and_a_soft_limit_is_refused():
    call = one_call()
    plain, shared = draw(call, 8, 0), draw(call._replace(s_aux=torch.full((6,), 6.0)), 8, 0)
    assert float(shared.weight.sum()) < 0.5 * float(plain.weight.sum())
    with pytest.raises(aqua.AquaError, match=r"soft limit \(softcap\): use basis svd"):
        draw(call._replace(softcap=1.0), 8, 0)


def test_layers_of_images_are_joined_to_learned_ones_of_text(svd):
    model, start = svd
    names = [f"layers.{index}" for index in range(3)]
    found = learn(model, start, windows())

    def part(projections, first):
        rows = [[first + row[0], *row[1:]] for row in projections.model["shape"]["layers"]]
        shape = projections.model["shape"] | {"layers": rows, "names": [f"{first}.{name}" for name in names]}
        moved = {
            name: {first + index: each for index, each in getattr(projections, name).items()}
            for name in ("layers", "statistics")
        }
        return replace(projections, model=projections.model | {"shape": shape}, **moved)

    both = part(found, 0).merged(part(start, 10))
    assert (both.basis, sorted(both.layers)) == ("learned", [0, 1, 2, 10, 11, 12])
    assert both.calibration["learned"]["held_out"] == found.calibration["learned"]["held_out"]
    assert torch.equal(both.layers[10].key_spread, start.layers[0].key_rms)


@pytest.mark.usefixtures("small_window")
def test_windows_of_a_layer_and_padding_hide_keys():
    call = one_call(length=32)
    token = torch.arange(32)
    mask = (token <= token[:, None]) & (token > token[:, None] - 12)
    weight = draw(call._replace(mask=mask[None, None]), 16, seed=2)
    places = torch.randint(10, 32, (16,), generator=torch.Generator().manual_seed(2))
    seen = mask & (token >= 2) & (token <= token[:, None] - 5)
    scores = (call.query.view(2, 3, 32, 8) @ call.key[0, :, None].mT * call.scaling).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) * seen).sum(-1)[:, :, places].mT
    assert torch.allclose(weight.weight.sum(-1), expected, atol=1e-5)


def test_a_head_for_which_none_is_best_is_not_rotated():
    """Queries and keys along axes: any other basis spreads them."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.randint(8, (1, 64, 1), generator=generator)
    query = torch.nn.functional.one_hot(axis, 8).float() * 2
    key = torch.randn(1, 64, 12, 8, generator=generator).bfloat16()
    weight = torch.full((1, 64, 1, 12), 1 / 13)
    sample = Sample(query, key, key, weight, torch.zeros(1, 64, 1, 8))
    start = torch.linalg.qr(torch.randn(1, 8, 8, generator=generator)).Q
    learner = Learner(start, torch.ones(1, 8), sample)
    learner.see(sample)
    chosen = learner.chosen()
    assert ORIGINS[chosen.origin[0]] == "none"
    assert float(chosen.loss[0]) < 0.97
    assert torch.equal(chosen.rotation[0].abs().sum(0), torch.ones(8))


class TestPositions:
    def test_half_of_the_windows_begin_at_zero_and_the_others_are_spread(self, llama):
        places = begins(llama[0], 8, context=56, last=256)
        assert places[::2] == [0] * 4
        assert sorted(places[1::2]) == [50, 100, 150, 200]
        assert begins(llama[0], 8, context=56, last=256) == places

    def test_a_moved_window_has_the_keys_of_a_longer_text(self, llama):
        """Turned to where they would lie: scores do not change, keys do."""
        (model, _), seen = llama, []
        layers = attention_layers(model)
        with capture.observed(model, lambda module, query, key, _: seen.append((query, key))), torch.no_grad():
            for begin in (0, 100):
                capture.run_encoder_or_decoder(model, layers, placed(windows(1)[0], begin))
        (query, key), (moved_query, moved_key) = seen[0], seen[len(seen) // 2]
        assert not torch.allclose(key, moved_key, atol=0.1)
        key, moved_key = (each.repeat_interleave(2, 1) for each in (key, moved_key))
        assert torch.allclose(query @ key.mT, moved_query @ moved_key.mT, atol=1e-3)

    @pytest.mark.parametrize(
        ("last", "message"),
        [
            (300, r"positions go to 300: the model knows 256, choose at most that"),
            (100, r"positions go to 100, and a window has 128: choose at least that"),
        ],
    )
    def test_positions_that_cannot_be(self, llama, last, message):
        with pytest.raises(aqua.AquaError, match=message):
            begins(llama[0], 4, context=128, last=last)

    def test_a_model_that_counts_positions_itself_is_refused(self):
        model = make(tf.BartConfig, tf.BartForCausalLM, decoder_layers=2, decoder_attention_heads=4, d_model=64)
        with pytest.raises(aqua.AquaError, match=r"takes no position_ids: leave positions out"):
            begins(model, 4, context=64, last=200)
        assert begins(model, 4, context=64, last=None) == [None] * 4

    def test_learned_positions_are_not_relative(self):
        options = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3, "dropout": 0.0}
        model = make(tf.OPTConfig, tf.OPTForCausalLM, **options)
        with pytest.raises(aqua.AquaError, match=r"positions of \w+ are not relative .*: leave positions out"):
            begins(model, 4, context=64, last=200)

    def test_statistics_of_positions_are_of_them(self, word_tokenizer, words):
        model = make_llama()
        options = {"tokens": 512, "context": 64, "progress": False}
        plain, moved = (aqua.calibrate(model, word_tokenizer, words, **options, last_position=at) for at in (None, 240))
        assert moved.calibration["last_position"] == 240
        assert "last_position" not in plain.calibration
        traces = [each.statistics[0].key_gram.diagonal(dim1=1, dim2=2).sum(-1) for each in (plain, moved)]
        assert torch.allclose(traces[0], traces[1], rtol=1e-4)  # a turn changes no length
        assert not torch.allclose(plain.statistics[0].key_gram, moved.statistics[0].key_gram, rtol=1e-2)
