# SPDX-License-Identifier: Apache-2.0
"""Answers are kept while a grid asks, so that a killed run asks only the others."""

from __future__ import annotations

import json

import pytest
from test_grid import settings_of, subject  # noqa: F401 (a fixture)

from aqua_attention.evaluate.answers import Answers
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.run import facts_of, run_jobs
from aqua_attention.evaluate.suites import retrieval
from aqua_attention.evaluate.suites.grid import Sizes, grid_jobs

SIZES = Sizes(lines=(3, 4), count=3)
CHOOSING = {"k_ratio": [0.5], "select_p": [0.5], "score_bits": [8], "sink": [0], "recent": [0]}


@pytest.fixture(autouse=True)
def kept_at_once(monkeypatch):
    """Each answer, and not once in ten seconds."""
    monkeypatch.setattr(Answers, "keep", Answers.save)


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with each answer; set its `limit` to be killed before a later one."""

    class Asked(list):
        limit = None

    asked, real = Asked(), retrieval.continue_tokens

    def continue_tokens(model, tokenizer, tokens, **options):
        if asked.limit is not None and len(asked) >= asked.limit:
            raise KeyboardInterrupt
        asked.append("dense" if options["attachment"] is None else "aqua")
        return real(model, tokenizer, tokens, **options)

    monkeypatch.setattr(retrieval, "continue_tokens", continue_tokens)
    return asked


def grid(folder, subject):  # noqa: F811
    jobs = grid_jobs(subject, ["lines"], settings_of(**CHOOSING), SIZES)
    return [record.result for record in run_jobs(folder, jobs, facts_of(subject.model, "a test"))]


def test_a_killed_run_asks_only_the_others(tmp_path, subject, counted):  # noqa: F811
    whole = grid(tmp_path / "whole", subject)
    assert counted == 6 * ["dense"] + 6 * ["aqua"]
    assert 0 < whole[1]["tokens_read"] < 1
    counted.clear()
    for limit in (4, 9):
        counted.limit = limit
        with pytest.raises(KeyboardInterrupt):
            grid(tmp_path / "parts", subject)
    counted.limit = None
    assert grid(tmp_path / "parts", subject) == whole
    assert counted == 6 * ["dense"] + 6 * ["aqua"]


def test_another_setting_does_not_ask_the_dense_model_again(tmp_path, subject, counted):  # noqa: F811
    grid(tmp_path, subject)
    counted.clear()
    jobs = grid_jobs(subject, ["lines"], settings_of(k_ratio=[0.25]), SIZES)
    run_jobs(tmp_path, jobs, facts_of(subject.model, "a test"))
    assert counted == 6 * ["aqua"]


@pytest.mark.parametrize("damage", ["half", "other questions", "other weights", "no tokens"])
def test_what_is_damaged_or_of_something_else_is_asked_again(tmp_path, subject, counted, damage):  # noqa: F811
    first = grid(tmp_path, subject)
    for path in (tmp_path / "records").glob("*.json"):
        path.unlink()
    for path in (tmp_path / "records").glob("*.state"):
        value = json.loads(path.read_text())
        if damage == "other questions":
            value["run"]["questions"] = "0"
        elif damage == "other weights":
            value["run"]["key_weights"][0][0] += 1
        elif damage == "no tokens":
            value["answers"][0] = ["text"]
        path.write_text(path.read_text()[:40] if damage == "half" else json.dumps(value))
    counted.clear()
    with pytest.warns(UserWarning, match="its questions are asked again now"):
        assert grid(tmp_path, subject) == first
    assert len(counted) == 12


def test_a_file_is_read_as_it_was_written(tmp_path):
    kept = Answers(tmp_path / "a.state", {"questions": "1"})
    kept.add(Continuation("ß 1", [3, 4]), lambda: {"read": {"0": [0.1, 0.2, 1e300]}})
    again = Answers(tmp_path / "a.state", {"questions": "1"})
    assert again.given == [Continuation("ß 1", [3, 4])]
    assert again.counts == {"read": {"0": [0.1, 0.2, 1e300]}}
    assert Answers().given == []


def test_a_file_that_is_none_of_ours_is_named(tmp_path):
    (tmp_path / "a.state").write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match=r"a\.state is damaged"):
        assert Answers(tmp_path / "a.state").given == []
