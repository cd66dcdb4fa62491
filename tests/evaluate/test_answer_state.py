# SPDX-License-Identifier: Apache-2.0
"""AnswerState are kept while a grid asks, so that a killed run asks only the others."""

from __future__ import annotations

import json

import pytest
from test_grid import settings_of, subject  # noqa: F401 (a fixture)

from aqua_attention.evaluate import answer_state
from aqua_attention.evaluate.answer_state import AnswerState
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.run import facts_of, run_jobs
from aqua_attention.evaluate.suites import retrieval
from aqua_attention.evaluate.suites.grid import Sizes, grid_jobs
from aqua_attention.io.files import json_digest

SIZES = Sizes(lines=(3, 4), count=3)
CHOOSING = {"k_ratio": [0.5], "select_p": [0.5], "score_bits": [8], "sink": [0], "recent": [0]}


@pytest.fixture(autouse=True)
def kept_at_once(monkeypatch):
    """Each answer, and not once in ten seconds."""
    monkeypatch.setattr(AnswerState, "keep", AnswerState.save)


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
    parts = grid(tmp_path / "parts", subject)
    assert [result.pop("resumed") for result in parts] == [4, 3]
    assert parts == whole
    assert counted == 6 * ["dense"] + 6 * ["aqua"]


def test_another_setting_does_not_ask_the_dense_model_again(tmp_path, subject, counted):  # noqa: F811
    grid(tmp_path, subject)
    counted.clear()
    jobs = grid_jobs(subject, ["lines"], settings_of(k_ratio=[0.25]), SIZES)
    run_jobs(tmp_path, jobs, facts_of(subject.model, "a test"))
    assert counted == 6 * ["aqua"]


@pytest.mark.parametrize("damage", ["half", "changed", "other questions", "other weights", "other version", "later"])
def test_what_is_damaged_or_of_something_else_is_asked_again(tmp_path, subject, counted, damage):  # noqa: F811
    first = grid(tmp_path, subject)
    (path,) = (tmp_path / "records").glob("*.state")
    value = json.loads(path.read_text())
    del value["sha256"]
    if damage == "changed":
        value["answers"][0] = ["text"]
    elif damage == "later":
        value[answer_state.KIND] = 2
    elif damage == "other weights":
        value["run"]["key_weights"][0][0] += 1
    elif damage != "half":
        value["run"][damage.removeprefix("other ")] = "0"
    digest = "" if damage == "changed" else json_digest(value)
    path.write_text(path.read_text()[:40] if damage == "half" else json.dumps(value | {"sha256": digest}))
    for record in (tmp_path / "records").glob("*.json"):
        record.unlink()
    counted.clear()
    with pytest.warns(UserWarning, match="it is replaced now, and its questions are asked again"):
        assert grid(tmp_path, subject) == first
    assert len(counted) == 12


def test_only_the_dense_models_answers_stay(tmp_path, subject, counted):  # noqa: F811
    grid(tmp_path, subject)
    assert len(list((tmp_path / "records").glob("*.state"))) == 1
    for record in (tmp_path / "records").glob("*.json"):
        record.unlink()
    counted.clear()
    dense, _ = grid(tmp_path, subject)
    assert counted == 6 * ["aqua"]
    assert dense["resumed"] == 6


def test_a_file_is_read_as_it_was_written(tmp_path):
    kept = AnswerState(tmp_path / "a.state", {"questions": "1"})
    kept.add(Continuation("ß 1", [3, 4]), lambda: {"read": {"0": [0.1, 0.2, 1e300]}})
    again = AnswerState(tmp_path / "a.state", {"questions": "1"})
    assert again.given == [Continuation("ß 1", [3, 4])]
    assert again.counts == {"read": {"0": [0.1, 0.2, 1e300]}}
    assert AnswerState().given == []


def test_a_file_that_is_none_of_ours_is_named(tmp_path):
    (tmp_path / "a.state").write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match=r"a\.state holds no answers of a grid"):
        assert AnswerState(tmp_path / "a.state").given == []
