# SPDX-License-Identifier: Apache-2.0
"""`aqua eval tasks` and `aqua lm-eval` as a user types them."""

from __future__ import annotations

import json
import sys

import pytest

from aqua_attention.cli.options import ModelOptions
from aqua_attention.evaluate.tasks import answers as task_answers
from aqua_attention.evaluate.tasks import run as tasks


@pytest.fixture
def given(tmp_path, tiny_folder, projections_file, monkeypatch):
    """Arguments of `aqua eval tasks` up to its options, with 12 questions of HellaSwag and 3 of GSM8K."""
    monkeypatch.setattr(task_answers, "NEW_TOKENS", 6)
    rows = [
        {"query": f"w{n} w{7 * n} w2 w{3 * n}", "choices": [f"w{n + c} w{5 * c}" for c in range(4)], "gold": n % 4}
        for n in range(12)
    ]
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"w{n} w9", "answer": f"w{n} #### {n}"} for n in range(3)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = (f"hellaswag={tmp_path / 'hellaswag.jsonl'}", f"gsm8k={tmp_path / 'gsm8k'}")
    return ("eval", "tasks", tiny_folder, "-p", projections_file, "--task", named[0], "--task", named[1])


def test_eval_tasks_prints_and_writes_a_row_a_setting_and_metric(aqua, given, tmp_path):
    written = tmp_path / "out.json"
    options = ("--preset", "paper", "--k-ratio", 1, "--k-ratio", 0.25, "--few-shot", 2, "--json", written)
    code, out, err = aqua(*given, *options)
    assert code == 0, err
    assert "k_ratio 0.25" in out
    assert "exact_match" in out
    result = json.loads(written.read_text())
    names = [("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("gsm8k", "exact_match")]
    assert [(row["task"], row["metric"]) for row in result["rows"]] == names * 2
    assert [(row["task"], row["metric"], row["count"]) for row in result["dense"]] == [
        *((*name, 12) for name in names[:2]),
        (*names[2], 3),
    ]
    for row in result["rows"][:3]:
        assert row["setting"]["k_ratio"] == 1
        assert (row["value"], row["lost"], row["gained"], row["p_value"]) == (row["dense"], 0, 0, 1)
    assert result["tasks"]["gsm8k"]["few_shot"] == 2
    assert result["tasks"]["hellaswag"]["questions"] == 12
    assert result["tasks"]["gsm8k"]["files"] == [str(tmp_path / "gsm8k" / "test.jsonl")]
    assert result["dtype"] == "float32"
    assert f"12 questions of {tmp_path / 'hellaswag.jsonl'}, examples of {tmp_path / 'hellaswag.jsonl'}" in out
    train = tmp_path / "gsm8k" / "train.jsonl"
    assert f"3 questions of {tmp_path / 'gsm8k' / 'test.jsonl'}, examples of {train}" in out


def test_limit_and_quick_ask_few(aqua, given, tmp_path):
    written = tmp_path / "out.json"
    for options, counts in ((("--limit", 2), (2, 2)), (("--quick",), (10, 2))):
        code, _, err = aqua(*given, *options, "--few-shot", 0, "--json", written)
        assert code == 0, err
        asked = json.loads(written.read_text())["tasks"]
        assert (asked["hellaswag"]["questions"], asked["gsm8k"]["questions"]) == counts


def test_after_ctrl_c_the_same_command_goes_on(aqua, given, tmp_path, monkeypatch):
    state, written = tmp_path / "tasks.state", tmp_path / "out.json"
    options = ("--few-shot", 0, "--batch", 4, "--preset", "paper", "--k-ratio", 0.25, "--json", written)
    assert aqua(*given, *options)[0] == 0
    expected = json.loads(written.read_text())
    answer, batches = tasks.answer_items, []

    def interrupted(*args):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(tasks, "answer_items", interrupted)
    code, _, err = aqua(*given, *options, "--state", state)
    assert code == 130
    assert f"stopped: {state} keeps the answers so far" in err.replace("\n", "")
    code, _, err = aqua(*given, *options, "--state", state)
    assert code == 0, err
    assert len(batches) == 3 + 2, "two of four batches were left"
    found = json.loads(written.read_text())
    assert "--state" in found.pop("command")
    assert "--state" not in expected.pop("command")
    assert found.pop("started") >= expected.pop("started")
    assert found == expected


def test_mistakes_are_one_line(aqua, given, tmp_path):
    for options, message in (
        (("--quick", "--limit", 2), "give one of the two"),
        (("--task", "hellaswag"), "--task hellaswag names no file: write NAME=PATH"),
        (("--task", "winogrand=x"), "there is no task 'winogrand'"),
        (("--task", "winogrande=x"), "x: no such file or folder of questions"),
        (("--task", f"arc_easy={tmp_path / 'hellaswag.jsonl'}", "--few-shot", 99), "ask for fewer"),
        (("--batch", 0), "batch is 0"),
        (("--state", tmp_path / "none" / "x"), "cannot write"),
        (("--state", tmp_path / "x", "--json", tmp_path / "x"), "give each a file of its own"),
    ):
        code, _, err = aqua(*given, "--few-shot", 0, *options)
        assert (code, message in err) == (2, True), (options, err)
        assert "Traceback" not in err


def test_mistakes_are_known_before_the_model_is_loaded(aqua, given, monkeypatch):
    monkeypatch.setattr(ModelOptions, "load", lambda *_: pytest.fail("the model was loaded"))
    for options, message in (
        (("--batch", 0), "batch is 0"),
        (("--batch", -1), "batch is -1"),
        (("--basis", "pca"), "basis is 'pca'"),
        (("--task", "gsm8k=x"), "give at least one, and each once"),
    ):
        code, _, err = aqua(*given, *options)
        assert (code, message in err) == (2, True), (options, err)


def test_lm_eval_that_is_not_installed_names_its_extra(aqua, monkeypatch):
    for name in ("lm_eval", "lm_eval.__main__"):  # another test may have loaded it
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = aqua("lm-eval", "run", "--model", "aqua", "--tasks", "arc_easy")
    assert code == 2
    assert "pip install '.[lm-eval]' in the clone" in err
