# SPDX-License-Identifier: Apache-2.0
"""Projections of one text tested on others, at other lengths, from few tokens: `aqua eval transfer` and `context`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.data.text import text_digest, token_windows, tokenize
from aqua_attention.evaluate.record import FACTS as FACT_NAMES
from aqua_attention.evaluate.record import file_digest
from aqua_attention.evaluate.run import facts_of, run_jobs
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites import transfer
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from aqua_attention.evaluate.suites.transfer import (
    Calibration,
    Calibrator,
    context_jobs,
    leading_dims,
    split_domain,
    subspace_distance,
    transfer_jobs,
)
from aqua_attention.report.record_tables import context_tables, reasons, transfer_tables
from conftest import subject_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* tokens are few for heads"),
    pytest.mark.filterwarnings("ignore:the text is short"),
]

FACTS = {name: "" for name in FACT_NAMES if name not in ("started", "seconds")}
SIZES = {"calibration_tokens": 256, "tokens": 128, "context": 64, "seed": 0}
HALF = Setting(aqua.AquaConfig.paper(k_ratio=0.5))


def numbers(seed, low, high):
    """600 words of a part of the vocabulary, ten a line."""
    found = torch.randint(low, high, (600,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "\n".join(" ".join(f"w{n}" for n in found[start : start + 10]) for start in range(0, 600, 10))


@pytest.fixture
def domains():
    return [split_domain("low", "low.txt", numbers(1, 0, 20)), split_domain("high", "high.txt", numbers(2, 60, 94))]


@pytest.fixture
def calibrator(llama, word_tokenizer, tmp_path):
    return Calibrator(tmp_path, "tiny", llama[0], word_tokenizer)


# The split


def test_the_parts_of_a_domain_do_not_overlap_and_end_with_a_line():
    text = numbers(1, 0, 20)
    domain = split_domain("low", "low.txt", text)
    assert domain.calibration + domain.test == text
    assert domain.calibration.endswith("\n")
    assert 0.78 < len(domain.calibration) / len(text) < 0.83
    one_line = split_domain("d", "d.txt", "word " * 100)
    assert (len(one_line.calibration), len(one_line.test)) == (400, 100)
    for short in ("a", "word    \n", " " * 20 + "word"):
        with pytest.raises(aqua.AquaError, match=r"domain 'd' \(d.txt\) is too short"):
            split_domain("d", "d.txt", short)


# The distance


def with_rotations(projections, rotation):
    layers = {
        index: replace(layer, rotation=rotation.expand(2, 16, 16).clone())
        for index, layer in projections.layers.items()
    }
    return aqua.Projections(layers, projections.statistics, projections.model)


def turned(angle, one, other):
    """The identity with dimension `one` turned towards `other`."""
    rotation = torch.eye(16)
    rotation[[one, other], [one, other]] = math.cos(angle)
    rotation[one, other], rotation[other, one] = -math.sin(angle), math.sin(angle)
    return rotation


def test_distance_of_planes_by_hand(llama):
    same, tilted = (with_rotations(llama[1], turned(angle, 0, 15)) for angle in (0.0, 0.3))
    dims = dict.fromkeys(llama[1].layers, 4)
    assert subspace_distance(same, same, dims) == 0
    # One principal angle of 0.3, three of 0: sin^2(0.3) of k = 4.
    assert subspace_distance(same, tilted, dims) == pytest.approx(math.sin(0.3) / 2, rel=1e-5)
    # A plane of 12 dimensions shares at least 8 with any other, so that 4 is the most they can differ by.
    assert subspace_distance(same, tilted, dict.fromkeys(dims, 12)) == pytest.approx(math.sin(0.3) / 2, rel=1e-5)
    assert subspace_distance(same, tilted, dict.fromkeys(dims, 16)) == 0
    within = with_rotations(llama[1], turned(0.3, 0, 1))
    assert subspace_distance(same, within, dims) == pytest.approx(0, abs=1e-6), "a turn inside a subspace is none of it"
    reversed_order = with_rotations(llama[1], torch.eye(16).flip(-1))
    assert subspace_distance(same, reversed_order, dims) == pytest.approx(1)
    half_far = aqua.Projections(same.layers | {0: reversed_order.layers[0]}, same.statistics, same.model)
    assert subspace_distance(same, half_far, dims) == pytest.approx(1 / 3), "a mean over three layers"


def test_random_subspaces_are_as_far_apart_as_the_docstring_says(llama):
    generator = torch.Generator().manual_seed(0)
    one, two = (
        with_rotations(llama[1], torch.linalg.qr(torch.randn(2, 16, 16, generator=generator))[0]) for _ in range(2)
    )
    for k in (4, 8, 12):
        found = subspace_distance(one, two, dict.fromkeys(one.layers, k))
        assert found == pytest.approx(math.sqrt(max(k, 16 - k) / 16), abs=0.08)


def test_the_leading_dimensions_are_those_of_the_setting():
    assert leading_dims(aqua.AquaConfig.paper(k_ratio=0.25), 16) == 4
    assert leading_dims(aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.5), 16) == 4
    assert leading_dims(aqua.AquaConfig.paper(logit_error=0.1), 16) == 8


# Transfer


def test_every_pair_is_tested_with_the_projections_of_its_calibration_part(calibrator, domains, llama, word_tokenizer):
    jobs = transfer_jobs(calibrator, domains, [HALF], **SIZES)
    folder = calibrator.folder
    records = run_jobs(folder, jobs, FACTS)
    pairs = [(record.result["calibrated"], record.result["tested"]) for record in records]
    assert pairs == [("low", "low"), ("high", "low"), ("low", "high"), ("high", "high")]
    learned = aqua.calibrate(
        llama[0], word_tokenizer, domains[0].calibration, tokens=256, context=64, seed=0, name="tiny"
    )
    ids, prefix = tokenize(word_tokenizer, domains[1].test)
    windows = token_windows(ids, tokens=128, context=64, seed=None, prefix=prefix)
    expected = evaluate_perplexity(subject_of(llama[0], learned), [HALF], windows)
    result = records[2].result
    assert result["perplexity"] == expected["rows"][0]["perplexity"]
    assert result["dense"] == expected["dense"]
    assert result["calibration_tokens"] == 256
    assert records[2].details["text_sha256"] == text_digest(domains[1].test)
    options = records[2].options
    assert options["calibrated"]["text_sha256"] == text_digest(domains[0].calibration)
    assert "no character is in both" in options["split"]
    files = sorted((folder / "projections").iterdir())
    assert [path.name.split("-")[0] for path in files] == ["high", "low"]
    assert [record.details["projections_sha256"] for record in records] == [file_digest(files[i]) for i in (1, 0, 1, 0)]
    own, far = records[0].result, records[1].result
    assert max(own["distance"], records[3].result["distance"]) < 1e-5
    assert 0.01 < far["distance"] < 1
    assert far["distance"] == pytest.approx(result["distance"]), "a distance is the same both ways"
    assert far["distance_dims"] == 8
    loss, distance = transfer_tables(records)
    assert loss[0] == ["k_ratio 0.5; calibrated on", "tested on low", "tested on high"]
    assert loss[1][0][2] == f"{result['perplexity_change']:+.2%} (KL {result['kl']:.4f})"
    assert [row[0] for row in loss[1]] == ["low", "high"]
    assert distance[1][0] == ["low", "0.000", f"{result['distance']:.3f}"]


def test_projections_are_made_once_and_again_when_damaged(calibrator, domains, monkeypatch):
    made, folder, notices = [], calibrator.folder, []

    def counted(*args, **options):
        made.append(options["tokens"])
        return aqua.calibrate(*args, **options)

    monkeypatch.setattr(transfer, "calibrate", counted)
    first = run_jobs(folder, transfer_jobs(calibrator, domains, [HALF], **SIZES), FACTS)
    assert made == [256, 256]

    def again(setting):
        """As a new process would."""
        fresh = Calibrator(folder, "tiny", calibrator.model, calibrator.tokenizer, notices.append)
        return run_jobs(folder, transfer_jobs(fresh, domains, [setting], **SIZES), FACTS)

    assert again(HALF) == first
    again(Setting(aqua.AquaConfig.paper(k_ratio=0.25)))
    assert (made, notices) == ([256, 256], [])
    damaged = next((folder / "projections").glob("low-*"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:500])
    again(Setting(aqua.AquaConfig.paper(k_ratio=0.75)))
    assert (made[2:], damaged.read_bytes() == whole) == ([256], True)
    assert damaged.name in notices[0] and "made again" in notices[0]


def test_a_stopped_calibration_goes_on(calibrator, domains, monkeypatch):
    from aqua_attention.calibration.statistics import LayerStatistics

    folder, calls, original = calibrator.folder, [], LayerStatistics.of

    def interrupted(query, key):
        calls.append(0)
        if len(calls) == 8:  # three layers a window: in the third one
            raise KeyboardInterrupt
        return original(query, key)

    monkeypatch.setattr(LayerStatistics, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(folder, transfer_jobs(calibrator, domains, [HALF], **SIZES), FACTS)
    (partial,) = (folder / "projections").iterdir()
    assert partial.name.endswith(".partial")
    run_jobs(folder, transfer_jobs(calibrator, domains, [HALF], **SIZES), FACTS)
    assert len(calls) == 8 + (4 - 2) * 3 + 4 * 3, "the two windows that were done are not read again"
    assert all(path.suffix == ".safetensors" for path in (folder / "projections").iterdir())


@pytest.fixture
def other_weights(llama):
    """The same model with key weights of its own, as after further training."""
    other = copy.deepcopy(llama[0])
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.k_proj.weight *= torch.linspace(0.9, 1.1, 64)
    return other


def test_projections_of_other_weights_are_made_again(calibrator, domains, other_weights, recwarn):
    folder, notices = calibrator.folder, []
    run_jobs(folder, transfer_jobs(calibrator, domains, [HALF], **SIZES), facts_of(calibrator.model, ""))
    old = {path: path.read_bytes() for path in (folder / "projections").iterdir()}
    changed = Calibrator(folder, "tiny", other_weights, calibrator.tokenizer, notices.append)
    jobs = transfer_jobs(changed, domains, [HALF], **SIZES)
    records = run_jobs(folder, jobs, facts_of(other_weights, ""), notice=notices.append)
    assert "4 of 4 measurements" in notices[0]
    assert all("is of other weights of tiny; it is made again now" in notice for notice in notices[1:3])
    assert set((folder / "projections").iterdir()) == set(old)
    assert all(path.read_bytes() != content for path, content in old.items())
    learned = aqua.Projections.load(next(path for path in old if path.name.startswith("low")))
    assert records[0].details["projections_sha256"] == file_digest(
        next(path for path in old if path.name.startswith("low"))
    )
    assert learned.model["key_weights"] == records[0].details["key_weights"]
    assert not [each for each in recwarn.list if "other weights" in str(each.message)], (
        "none of other weights were used"
    )


def test_a_stopped_calibration_of_other_weights_is_begun_anew(calibrator, domains, other_weights, monkeypatch):
    from aqua_attention.calibration.statistics import LayerStatistics

    folder, calls, notices, original = calibrator.folder, [], [], LayerStatistics.of

    def interrupted(query, key):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(query, key)

    monkeypatch.setattr(LayerStatistics, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(folder, transfer_jobs(calibrator, domains, [HALF], **SIZES), FACTS)
    changed = Calibrator(folder, "tiny", other_weights, calibrator.tokenizer, notices.append)
    records = run_jobs(folder, transfer_jobs(changed, domains, [HALF], **SIZES), FACTS)
    assert all(record.result for record in records)
    assert len(notices) == 1 and "it is begun anew now" in notices[0]


def test_sizes_from_which_nothing_follows_are_refused_at_once(calibrator, domains):
    for name in ("tokens", "context", "calibration_tokens"):
        with pytest.raises(aqua.AquaError, match=f"^{name.replace('_', ' ')} is 1: it must be at least 2 tokens"):
            transfer_jobs(calibrator, domains, [HALF], **SIZES | {name: 1})
    for changes in ({"tested_lengths": [64, 1]}, {"calibrated_lengths": [0]}, {"calibration_tokens": [-5]}):
        with pytest.raises(aqua.AquaError, match="it must be at least 2 tokens"):
            contexts(calibrator, **changes)


def test_impossible_domains_are_refused_at_once(calibrator, domains):
    again = replace(domains[0], name="again", data="copy.txt")
    with pytest.raises(aqua.AquaError, match=r"domains low \(low.txt\) and again \(copy.txt\) are the same text"):
        transfer_jobs(calibrator, [domains[0], again], [HALF], **SIZES)
    with pytest.raises(aqua.AquaError, match="domains are low: give at least two"):
        transfer_jobs(calibrator, domains[:1], [HALF], **SIZES)
    with pytest.raises(aqua.AquaError, match="each with a name of its own"):
        transfer_jobs(calibrator, [domains[0]] * 2, [HALF], **SIZES)
    with pytest.raises(aqua.AquaError, match="'low' has 490 tokens to calibrate on, 640 are asked for"):
        transfer_jobs(calibrator, domains, [HALF], **SIZES | {"calibration_tokens": 640})
    with pytest.raises(aqua.AquaError, match="calibration tokens are 32, fewer than one window of 64"):
        transfer_jobs(calibrator, domains, [HALF], **SIZES | {"calibration_tokens": 32})


def test_another_text_under_the_same_calibration_is_refused(calibrator):
    learn = Calibration("low", text_digest("w1 w2"), tokens=64, context=64, seed=0)
    with pytest.raises(aqua.AquaError, match="the text 'low' is not the one of this calibration"):
        calibrator.subject(learn, "w3 w4")


# Context


def contexts(calibrator, **changes):
    given = {"calibrated_lengths": [32, 64], "tested_lengths": [32, 128], "calibration_tokens": [256], "tokens": 128}
    return context_jobs(
        *(calibrator, ("one.txt", numbers(1, 0, 90)), ("two.txt", numbers(2, 0, 90)), [HALF]),
        **given | {"seed": 0} | changes,
    )


def test_lengths_are_calibrated_and_tested_crosswise(calibrator, llama, word_tokenizer):
    records = run_jobs(calibrator.folder, contexts(calibrator), FACTS)
    lengths = [(record.result["calibrated_length"], record.result["tested_length"]) for record in records]
    assert lengths == [(32, 32), (64, 32), (32, 128), (64, 128)]
    learned = aqua.calibrate(llama[0], word_tokenizer, numbers(1, 0, 90), tokens=256, context=64, seed=0)
    assert learned.calibration["context"] == 64
    ids, prefix = tokenize(word_tokenizer, numbers(2, 0, 90))
    windows = token_windows(ids, tokens=128, context=128, seed=None, prefix=prefix)
    row = evaluate_perplexity(subject_of(llama[0], learned), [HALF], windows)["rows"][0]
    assert records[3].result["perplexity"] == row["perplexity"]
    assert len({record.details["projections_sha256"] for record in records}) == 2
    ((titles, rows),) = context_tables(records)
    assert titles == ["k_ratio 0.5; calibrated on", "windows of 32", "windows of 128"]
    assert [cells[0] for cells in rows] == ["256 tokens in windows of 32", "256 tokens in windows of 64"]
    assert rows[1][2] == f"{row['perplexity_change']:+.2%} (KL {row['kl']:.4f})"


def test_more_calibration_tokens_than_there_are_is_one_refused_row(calibrator):
    jobs = contexts(calibrator, calibrated_lengths=[64], tested_lengths=[64], calibration_tokens=[32, 64, 512, 1024])
    records = run_jobs(calibrator.folder, jobs, FACTS)
    assert [record.error is not None for record in records] == [True, False, False, True]
    assert [records[place].result["calibration_tokens"] for place in (1, 2)] == [64, 512]
    assert "fewer than one window of 64" in records[0].error["message"]
    messages = [f"refused: {records[place].error['message']}" for place in (0, 3)]
    assert reasons([*records, records[0]]) == [f"{messages[0]} (2 records)", messages[1]]
    assert "'one.txt' has 600 tokens to calibrate on, 1024 are asked for" in records[3].error["message"]
    assert [row[1] for row in context_tables(records)[0][1]][::3] == ["refused", "refused"]


def test_a_tested_length_beyond_the_model_is_refused_at_once(calibrator):
    with pytest.raises(aqua.AquaError, match="the model knows 256 positions"):
        contexts(calibrator, tested_lengths=[512])
