# SPDX-License-Identifier: Apache-2.0
"""What users have at hand: paths, names, dicts and numpy's numbers are taken; else one line says what is needed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

import aqua_attention as aqua
from aqua_attention.vllm.settings import Serving
from conftest import VOCABULARY

SIZES = {"tokens": 256, "context": 64}


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "p.safetensors"
    llama[1].save(path)
    return path


@torch.no_grad()
def logits(model):
    ids = torch.randint(2, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("form", [str, Path, aqua.Projections.load])
@pytest.mark.parametrize(
    "config", [{"k_ratio": 0.5}, "fast", {"k_ratio": np.float32(0.5)}, {"preset": "fast", "min_length": 0}], ids=repr
)
def test_apply_takes_paths_dicts_and_presets(llama, saved, form, config):
    model, projections = llama
    with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=0.5)):
        expected = logits(model)
    with aqua.apply(model, form(saved), config):
        assert torch.equal(logits(model), expected)


def test_a_server_takes_a_preset_with_changes(saved):
    served = Serving.of(str(saved), '{"preset": "fast", "bits": 8}').config
    assert served == aqua.AquaConfig.preset("fast", bits=8)


@pytest.mark.parametrize("given", [None, 3, {"layers": 1}, torch.ones(2)])
def test_projections_of_another_kind_are_refused(llama, given):
    wrong = r"^projections is .*: give what `aqua.calibrate` returned, or the path of its file$"
    for use in (lambda: aqua.apply(llama[0], given), lambda: llama[1].merged(given)):
        with pytest.raises(aqua.AquaError, match=wrong):
            use()


def test_a_path_that_is_not_there_or_a_wrong_setting_is_said(llama, tmp_path):
    model, projections = llama
    for use, message in (
        (lambda: aqua.apply(model, "x.safetensors"), "x.safetensors: no such projections file"),
        (lambda: aqua.apply(model, projections, {"kratio": 0.5}), "did you mean 'k_ratio'"),
        (lambda: aqua.apply(model, projections, "fats"), "preset is 'fats'"),
        (lambda: aqua.apply(model, projections, 0.5), "config is 0.5: give an AquaConfig"),
        (lambda: aqua.apply(model, projections, layers=["layers.0"]), "layers is of type list: give one pattern"),
        (lambda: aqua.load_model(None), "the model's name is None: give 'smollm2'"),
        (lambda: aqua.load_model("smollm2", dtype=torch.int8), "dtype 'int8' is not one of"),
        (lambda: aqua.load_text(7), "the text's name is 7: it is one of builtin"),
    ):
        with pytest.raises(aqua.AquaError, match=message):
            use()


def test_merged_takes_a_path(llama, saved):
    projections = llama[1]
    assert projections.merged(saved).calibration["tokens"] == 2 * projections.calibration["tokens"]


@pytest.fixture
def text_file(words, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(words)
    return path


def test_calibrate_takes_a_name_a_path_and_numbers_of_numpy(tiny_folder, word_tokenizer, words, text_file, tmp_path):
    model, _ = aqua.load_model(Path(tiny_folder))
    expected = aqua.calibrate(model, word_tokenizer, words, **SIZES, seed=3)
    numbers = {name: np.int64(value) for name, value in SIZES.items()}
    for named, tokenizer, text in (
        (str(tiny_folder), None, words),
        (tiny_folder, word_tokenizer, text_file),
        (model, word_tokenizer, text_file),
    ):
        found = aqua.calibrate(named, tokenizer, text, **numbers, seed=np.int32(3))
        assert all(torch.equal(found.layers[each].rotation, expected.layers[each].rotation) for each in range(3))
        found.save(tmp_path / "p")
        assert aqua.Projections.load(tmp_path / "p").calibration == expected.calibration
    assert aqua.calibrate(tiny_folder, None, words, **SIZES).model["name"] == str(tiny_folder)
    assert aqua.calibrate(tiny_folder, None, words, **SIZES, name="mine").model["name"] == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "tokenizer is None: give the model's"),
        ({"tokenizer": "smollm2"}, "tokenizer is 'smollm2': give the model's"),
        ({"text": ["one", "two"]}, "text is of type list: give a string"),
        ({"text": None}, "text is None: give a string"),
        ({"text": Path("none.txt")}, "there is no file or folder 'none.txt'"),
        ({"tokens": 256.0}, "tokens is 256.0: it must be a whole number"),
        ({"context": "64"}, "context is '64': it must be a whole number"),
        ({"seed": 0.5}, "seed is 0.5: it must be a whole number"),
        ({"model": None}, "model is a NoneType"),
        ({"model": "no/such/../model"}, "cannot be loaded"),
    ],
)
def test_calibrate_says_what_is_wrong(llama, word_tokenizer, words, change, message):
    given = {"model": llama[0], "tokenizer": word_tokenizer, "text": words} | SIZES | change
    with pytest.raises(aqua.AquaError, match=message):
        aqua.calibrate(**given)


def test_one_input_alone_is_a_list_of_one(llama):
    model, one = llama[0], {"input_ids": torch.arange(2, 42)[None]}
    expected, found = aqua.calibrate_inputs(model, [one]), aqua.calibrate_inputs(model, one)
    assert torch.equal(found.layers[0].rotation, expected.layers[0].rotation)


def test_load_model_takes_dtypes_of_torch(tiny_folder):
    assert aqua.load_model(tiny_folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert aqua.load_model(Path(tiny_folder), dtype="float16")[0].dtype == torch.float16


def without_seconds(lines):
    """On a busy machine a step may take a second or more, and says so."""
    return [line.split(",")[0] for line in lines.splitlines()]


def test_calibrating_shows_lines_where_there_is_no_terminal(llama, word_tokenizer, words, capsys):
    aqua.calibrate(llama[0], word_tokenizer, words, tokens=1920, context=64)
    first, *_, last = without_seconds(capsys.readouterr().err)
    assert (first, last) == ("calibrate: 0 of 30", "calibrate: 30 of 30")
    aqua.calibrate_inputs(llama[0], [{"input_ids": torch.arange(2, 42)[None]}])
    assert without_seconds(capsys.readouterr().err) == ["calibrate: 0 of 1", "calibrate: 1 of 1"]


def test_calibrating_shows_a_bar_on_a_terminal(llama, word_tokenizer, words, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    aqua.calibrate(llama[0], word_tokenizer, words, **SIZES)
    shown = capsys.readouterr().err
    assert "━" in shown and "4/4" in shown and "of 4" not in shown


def test_progress_is_switched_off_or_told_to_a_function(llama, word_tokenizer, words, capsys):
    seen = []
    for progress in (False, None, lambda *at: seen.append(at)):
        aqua.calibrate(llama[0], word_tokenizer, words, **SIZES, progress=progress)
    transformers_logging.disable_progress_bar()
    try:
        aqua.calibrate(llama[0], word_tokenizer, words, **SIZES)
    finally:
        transformers_logging.enable_progress_bar()
    assert capsys.readouterr().err == ""
    assert seen == [(done, 4) for done in range(5)]


def test_the_command_shows_one_bar(aqua, tiny_folder, text_file, tmp_path):
    sizes = ("--tokens", 256, "--context", 64)
    code, _, shown = aqua("calibrate", tiny_folder, "--data", text_file, *sizes, "-o", tmp_path / "p")
    assert code == 0
    assert shown.count("4 of 4") + shown.count("4/4") == 1


def test_projections_say_what_they_are(llama):
    projections = llama[1]
    fits = "llama, 3 layers, 4 query and 2 key-value heads of 16"
    assert repr(projections) == f"<Projections of tiny ({fits}); basis aqua; calibrated on 256 tokens>"
    assert repr(projections.layers[0]) == "<LayerProjection: 2 key-value heads of 16>"
    assert repr(projections.statistics[0]) == "<LayerStatistics: 256 tokens, 2 key-value heads of 16>"
