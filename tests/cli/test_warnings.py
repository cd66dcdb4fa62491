# SPDX-License-Identifier: Apache-2.0
"""What runs, but not as the user may think: one line on the error stream."""

from __future__ import annotations

import json
import os
import warnings

import pytest

from aqua_attention import AquaConfig
from aqua_attention.bench import breakeven
from aqua_attention.calibration.projections import Projections
from aqua_attention.evaluate.setting import grid_settings
from conftest import calibrated, make_llama


@pytest.fixture
def warned(aqua):
    """Run `aqua ARGS`, which must succeed; returns the lines of its warnings."""

    def run(*arguments):
        code, _, err = aqua(*arguments)
        assert code == 0, err
        return [line for line in err.splitlines() if line.startswith("warning: ")]

    return run


@pytest.fixture
def files(tmp_path, words):
    """A text, one sentence 400 times, and two calibrations of random tokens."""
    (tmp_path / "words.txt").write_text(words)
    (tmp_path / "again.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9. " * 400)
    return tmp_path


@pytest.fixture
def calibrate(warned, files, tiny_folder):
    def run(name, data="words.txt", tokens=512, context=64, **options):
        given = [each for name, value in options.items() for each in (f"--{name}", value)]
        sizes = ("--tokens", tokens, "--context", context, *given)
        return warned("calibrate", tiny_folder, "--data", files / data, *sizes, "-o", files / name)

    return run


def test_a_sound_calibration_warns_of_nothing(calibrate):
    assert calibrate("p") == []


def test_merging_the_same_text_twice(calibrate, warned, files):
    words = "both were calibrated on the same text, which counts twice now"
    half = (files / "words.txt").read_text()[:6000]
    (files / "half.txt").write_text(half)
    assert [calibrate("a"), calibrate("b", data="half.txt"), calibrate("c", seed=1)] == [[], [], []]
    assert warned("merge", files / "a", files / "b", "-o", files / "ab") == []
    # The same file, another calibration of the text, and one that has read it among others.
    for first, second in (("a", "a"), ("a", "c"), ("b", "ab")):
        (line,) = warned("merge", files / first, files / second, "-o", files / "both")
        assert line.startswith(f"warning: {words}")
    assert Projections.load(files / "both").calibration["tokens"] == 1536


def test_a_text_that_is_shorter_than_the_tokens_asked_for(calibrate, warned, files, tiny_folder):
    (line,) = calibrate("p", tokens=99999999)
    assert line == "warning: the text is short: 2944 tokens (46 windows of 64) are read, not 99999999"
    given = (tiny_folder, "-p", files / "p", "--data", files / "words.txt", "--context", 250, "--tokens", 5000)
    for suite in ("perplexity", "retention"):
        (line,) = warned("eval", suite, *given, "--k-ratio", 0.5)
        assert line == "warning: the text is short: 3000 tokens (12 windows of 250) are read, not 5000"


def test_few_tokens_for_wide_heads(calibrate):
    (line,) = calibrate("p", tokens=64)
    assert line == "warning: 64 tokens are few for heads of 16 dimensions: calibrate on 256 or more"
    assert calibrate("p", tokens=256) == []


def test_a_text_that_repeats_itself(calibrate, warned, files, tiny_folder):
    (line,) = calibrate("p", data="again.txt")
    assert line.startswith("warning: the text repeats itself (of its 456 runs of 8 tokens only 10 differ)")
    given = (tiny_folder, "-p", files / "p", "--data", files / "again.txt", "--context", 64, "--tokens", 256)
    (line,) = warned("eval", "perplexity", *given, "--k-ratio", 0.5)
    assert "the text repeats itself" in line
    thrice = " ".join([(files / "words.txt").read_text()[:1500]] * 3)
    (files / "thrice.txt").write_text(thrice)
    (line,) = calibrate("p", data="thrice.txt", tokens=1024)
    assert "the text repeats itself" in line


def test_queries_that_say_what_stays_where_all_stays(warned, files, tiny_folder):
    calibrated(make_llama()).save(files / "p")
    words = "h2o_queries says which tokens stay, but with h2o_ratio 1 all do: give a smaller h2o_ratio"
    given = (tiny_folder, "-p", files / "p")
    prompt = ("--prompt", "w1 w2", "--max-new-tokens", 1, "--h2o-queries", 8)
    assert warned("generate", *given, *prompt) == [f"warning: {words}"]
    assert warned("generate", *given, *prompt, "--h2o-ratio", 0.5) == []
    with pytest.warns(UserWarning, match=words):
        AquaConfig.preset("fast", h2o_queries=4)
    # A grid has both, and so a use for it; without any eviction it has none.
    values = {"k_ratio": [1.0, 0.5], "h2o_queries": [8]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid_settings(values | {"h2o_ratio": [1.0, 0.5]})
    with pytest.warns(UserWarning, match=words):
        grid_settings(values | {"h2o_ratio": [1.0]})


@pytest.mark.parametrize("content", [{}, {"architectures": ["LlamaForCausalLM"]}, [1], None])
def test_a_report_of_nothing_is_an_error(content, aqua, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    before = sorted(tmp_path.iterdir())
    code, _, err = aqua("report", tmp_path)
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith(f"error: {tmp_path} holds no results")
    assert ("config.json is not used: it " in line) == (content is not None)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("load", "processors", "is_busy"), [(2.0, 2, True), (0.3, 2, False), (3.0, 64, False)])
def test_times_of_a_busy_machine(load, processors, is_busy, aqua, monkeypatch, tmp_path):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    row = {"dense": 1.0, "dense_name": "sdpa", "whole": 1.0}
    monkeypatch.setattr(breakeven, "_row", lambda shape, length, ratios, *rest: row | {"length": length, "aqua": [0.5]})
    given = ("--device", "cpu", "--k-ratio", 0.5, "--lengths", "64..128", "--json", tmp_path / "figures.json")
    code, out, err = aqua("bench", "breakeven", *given)
    assert code == 0
    found = [line for line in err.splitlines() if line.startswith("warning: this machine is busy (load 2.0")]
    assert len(found) == is_busy
    assert all("no profile will be kept: measure again when the machine" in line for line in found)
    # Profiles of such times would be read by min_length="auto".
    kept = list(tmp_path.glob("profiles/*"))
    assert json.loads((tmp_path / "figures.json").read_text())["profile"] == (str(kept[0]) if kept else None)
    assert (len(kept), "wrote " in out) == (not is_busy, not is_busy)
    words = "the machine was busy, and no profile was kept: run this again on an idle machine\n"
    assert err.endswith(words) == is_busy
