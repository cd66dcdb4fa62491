# SPDX-License-Identifier: Apache-2.0
"""RULER: what answers score, and the way from a model to its records and the report."""

from __future__ import annotations

import json

import pytest
import torch
from ruler_texts import ESSAY, LENGTH, maker, write_squad

import aqua_attention as aqua
from aqua_attention.evaluate import record as records
from aqua_attention.evaluate.generation import Continuation, encode_prompt
from aqua_attention.evaluate.run import run_jobs
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites import retrieval
from aqua_attention.evaluate.suites.grid import QUICK, Sizes, grid_jobs
from aqua_attention.evaluate.suites.retrieval import any_found, evaluate_retrieval, share_found
from aqua_attention.evaluate.suites.ruler import TASKS, ruler_questions
from aqua_attention.report.collect import collect
from aqua_attention.report.recognise import records_of
from aqua_attention.report.record_tables import record_table
from aqua_attention.report.tables import retrieval_grid, retrieval_table
from conftest import calibrated, make_llama, subject_of

HALF = Setting(aqua.AquaConfig.paper(k_ratio=0.5))
FACTS = {name: "" for name in records.FACTS if name not in ("started", "seconds")}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return write_squad(tmp_path_factory.mktemp("squad"))


@pytest.fixture
def make(word_tokenizer, asked):
    return maker(word_tokenizer, asked)


# Scores


def test_scores_by_hand():
    assert share_found("they are 17, 4 and 99", ["17", "99"]) == 1
    assert share_found("only 17", ["17", "99", "4", "5"]) == 0.25
    assert share_found("ABCDE = abc", ["abcde", "FGHIJ"]) == 0.5
    assert share_found("", ["1"]) == 0
    assert any_found("In the year of Denver Broncos.", ["the broncos", "Denver broncos"])
    assert not any_found("Denver", ["Denver Broncos"])


@pytest.fixture
def scripted(monkeypatch):
    """Dense names all that is expected, AQUA the first half of it."""

    def answer(model, tokenizer, token_ids, *, max_new_tokens, attachment=None):
        question = expected.pop(0)
        if attachment is not None:
            attachment.on_selection(0, None, torch.Size((1, 4, 1, 8)), 16)
            text = " ".join(question.expected[: len(question.expected) // 2])
        else:
            expected.insert(0, question)
            text = " ".join(question.expected)
        budgets.append(max_new_tokens)
        return Continuation(text, [len(text)])

    expected, budgets = [], []
    monkeypatch.setattr(retrieval, "continue_tokens", answer)
    return expected, budgets


@pytest.fixture(scope="module")
def long_llama():
    model = make_llama(max_position_embeddings=2048)
    return model, calibrated(model)


def test_a_question_counts_by_its_share_and_is_lost_where_the_share_falls(make, scripted, long_llama, word_tokenizer):
    questions = make("niah_multiquery", "niah_single_1", "vt", count=1)
    scripted[0].extend(questions)
    result = evaluate_retrieval(subject_of(*long_llama, word_tokenizer, chat=False), [HALF], questions)
    (row,) = result["rows"]
    assert result["dense"] == {"accuracy": 1, "questions": 3}
    figures = {"accuracy": (0.5 + 0 + 0.4) / 3, "right": 0.9, "asked": 3, "lost": 3, "gained": 0, "p_value": 0.25}
    assert {name: row[name] for name in figures} == pytest.approx(figures)
    assert [(cell["task"], cell["length"], cell["right"], cell["asked"]) for cell in row["cells"]] == [
        ("niah_multiquery", LENGTH, 0.5, 1),
        ("niah_single_1", LENGTH, 0, 1),
        ("vt", LENGTH, 0.4, 1),
    ]
    assert [question["correct"] for question in result["questions"]] == [[1, 0.5], [1, 0], [1, 0.4]]
    assert scripted[1] == [128, 128, 128, 128, 30, 30]
    titles, rows = retrieval_grid(result)
    assert titles == ["task", "length", "dense", "k_ratio 0.5"]
    assert rows[0] == ["niah_multiquery", str(LENGTH), "1/1", "0.5/1"]
    assert rows[3:] == [["all", str(LENGTH), "3/3", "0.9/3"]]
    assert retrieval_table(result)[1][1][:4] == ["k_ratio 0.5", "50%", "30.0%", "3"]


def test_answers_may_have_as_many_tokens_as_in_the_paper(make):
    budgets = {q.labels["task"]: q.new_tokens for q in make(count=1)}
    needle_tasks = [task for task in TASKS if task.startswith("niah")]
    assert budgets == dict.fromkeys(needle_tasks, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


# From a model to the report


def test_records_of_a_grid_have_cells_by_task_and_are_found_again(long_llama, word_tokenizer, tmp_path):
    rests_on = {"projections_sha256": "0" * 64}
    subject = subject_of(*long_llama, word_tokenizer, text=ESSAY, data="essay", rests_on=rests_on, chat=False)
    sizes = Sizes(tasks=("niah_multivalue", "fwe"), lengths=(400, LENGTH), count=1)
    asked = ruler_questions(subject, sizes)
    jobs = grid_jobs(subject, ["ruler"], [HALF], sizes)
    assert jobs[0].key["options"] == {
        "data": "essay",
        "lengths": [400, LENGTH],
        "tasks": ["niah_multivalue", "fwe"],
        "count": 1,
        "chat": False,
    }

    def answer(model, tokenizer, token_ids, *, max_new_tokens, attachment=None):
        place = next(n for n, q in enumerate(asked) if token_ids.tolist() == encoded[n])
        if attachment is not None:
            attachment.on_selection(0, None, torch.Size((1, 4, 1, 8)), 16)
        kept = asked[place].expected[: None if attachment is None else 1]
        return Continuation(" ".join(kept), [len(kept)])

    encoded = [encode_prompt(word_tokenizer, q.prompt, chat=False, answer_start=q.answer_start).tolist() for q in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "continue_tokens", answer)
        dense, half = run_jobs(tmp_path, jobs, FACTS)
    assert (dense.result["right"], dense.result["asked"]) == (4, 4)
    assert half.result["cells"] == [
        {"task": "niah_multivalue", "length": 400, "depth": None, "right": 0.25, "asked": 1},
        {"task": "niah_multivalue", "length": LENGTH, "depth": None, "right": 0.25, "asked": 1},
        {"task": "fwe", "length": 400, "depth": None, "right": 0.3333, "asked": 1},
        {"task": "fwe", "length": LENGTH, "depth": None, "right": 0.3333, "asked": 1},
    ]
    assert (half.result["lost"], half.result["gained"], half.result["right"]) == (4, 0, 1.1667)
    assert record_table([dense, half])[1][1][2:4] == ["1.2/4 right", "4 lost, 0 gained"]
    told = []
    again = run_jobs(tmp_path, grid_jobs(subject, ["ruler"], [HALF], sizes), FACTS, notice=told.append)
    assert [record.result for record in again] == [dense.result, half.result]
    assert "2 of 2 measurements are in" in told[0]
    found = collect(tmp_path)
    assert ([record.suite for record in found.records], found.unused) == (["ruler", "ruler"], [])
    pytest.importorskip("matplotlib")
    from aqua_attention.report.page import sections_of

    sections = {section.title: section for section in sections_of(found)}
    (block,) = sections["Retrieval"].blocks
    assert block.title.startswith("RULER: ")
    titles, rows = block.table
    assert titles[:5] == ["setting", "task", "length 400", f"length {LENGTH}", "all"]
    assert rows[3][:8] == ["k_ratio 0.5", "niah_multivalue", "0.2/1", "0.2/1", "1.2/4", "4", "0", "0.12"]
    assert rows[4][:5] == ["k_ratio 0.5", "fwe", "0.3/1", "0.3/1", ""]
    assert rows[5][:5] == ["k_ratio 0.5", "all", "0.6/2", "0.6/2", ""]
    assert len(block.panels) == 2 and "fwe" in block.panels[0].svg
    gain = sections["What you gain and lose"].blocks[0].table
    assert gain[0][-1] == "ruler: right"
    assert [row[-1] for row in gain[1]] == ["4/4", "1.2/4"]


def test_at_k_ratio_1_a_tiny_model_answers_as_dense(make, long_llama, word_tokenizer):
    questions = make("vt", "fwe", "qa", count=1, lengths=(400,))
    subject = subject_of(*long_llama, word_tokenizer, chat=False)
    settings = [Setting(aqua.AquaConfig.paper(k_ratio=ratio)) for ratio in (1, 0.25)]
    full, quarter = evaluate_retrieval(subject, settings, questions)["rows"]
    assert (full["same_answer"], full["lost"], full["gained"], full["p_value"]) == (1, 0, 0, 1)
    assert quarter["same_answer"] < 1


def test_the_end_of_a_sequence_ends_an_answer(make, long_llama, word_tokenizer):
    """The third token that this model writes is made its end of sequence."""
    from aqua_attention.evaluate.generation import continue_tokens

    model = long_llama[0]
    (q,) = make("vt", count=1, lengths=(400,))
    prompt = encode_prompt(word_tokenizer, q.prompt, chat=False, answer_start=q.answer_start)
    given = {"max_new_tokens": q.new_tokens}
    whole = continue_tokens(model, word_tokenizer, prompt, **given).token_ids
    assert len(whole) == 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", whole[2])
        cut = continue_tokens(model, word_tokenizer, prompt, **given).token_ids
    assert cut == whole[: whole.index(whole[2]) + 1]


def test_the_command_asks_and_the_report_knows_its_file(aqua, projections_file, tiny_folder, asked, tmp_path):
    text = tmp_path / "essay.txt"
    text.write_text(ESSAY)
    target = tmp_path / "results" / "ruler.json"
    target.parent.mkdir()
    command = ("eval", "ruler", tiny_folder, "-p", projections_file, "--data", text, "--length", 240)
    tasks = ("--task", "niah_single_1", "--task", "qa", "--count", 1)
    code, out, err = aqua(*command, *tasks, "--questions", asked, "--k-ratio", 1, "--k-ratio", 0.5, "--json", target)
    assert code == 0, err
    value = json.loads(target.read_text())
    assert [(q["task"], q["length"]) for q in value["questions"]] == [("niah_single_1", 240), ("qa", 240)]
    assert value["rows"][0]["same_answer"] == 1
    assert (value["questions_file"], len(value["questions_sha256"])) == (str(asked), 64)
    assert "niah_single_1" in out and "answers: 6 of 6" in err
    dense, full, _ = found = collect(target.parent).records
    assert {record.suite for record in found} == {"ruler"}
    assert dense.is_dense and full.figures["cells"] == [
        {"length": 240, "task": task, "right": full.figures["cells"][place]["right"], "asked": 1}
        for place, task in enumerate(("niah_single_1", "qa"))
    ]
    assert full.options["questions_file"] == str(asked)
    for damage, words_of in (({"task": 3}, "has task 3, not a text"), ({"length": "x"}, "has length, depth or lines")):
        questions = [question | damage for question in value["questions"]]
        with pytest.raises(records.Unusable, match=words_of):
            records_of(value | {"questions": questions}, "ruler.json")


def test_the_grid_takes_tasks_and_questions(aqua, projections_file, tiny_folder, asked, tmp_path):
    text = tmp_path / "essay.txt"
    text.write_text(ESSAY)
    code, _, err = aqua(
        *("eval", "grid", tmp_path / "results", tiny_folder, "-p", projections_file, "--data", text, "--quick"),
        *("--suite", "ruler", "--task", "qa", "--questions", asked, "--length", 200, "--count", 1, "--k-ratio", 1),
        *("--select-tokens", 1000, "--json", tmp_path / "all.json"),
    )
    assert code == 0, err
    dense, full = json.loads((tmp_path / "all.json").read_text())["records"]
    assert full["options"]["tasks"] == ["qa"] and full["options"]["questions_file"] == str(asked)
    assert full["result"]["same_answer"] == full["result"]["tokens_read"] == 1 < full["result"]["bytes_read"]
    assert dense["projections_sha256"] is None and "tokens_read" not in dense["result"]
    assert set(QUICK.tasks) < set(TASKS)


def test_mistakes_of_the_command_are_one_line(aqua, projections_file, tiny_folder, tmp_path):
    command = ("eval", "ruler", tiny_folder, "-p", projections_file, "--count", 1)
    for given, message in (
        (("--task", "best"), "task is 'best': it must be one of"),
        (("--task", "qa"), "task qa has no questions"),
        (("--task", "qa", "--questions", tmp_path / "none.json"), "no such file of questions"),
        (("--task", "fwe", "--length", 4096), "the model knows 256 positions"),
        (("--task", "fwe", "--length", -5), "give a larger length"),
    ):
        code, _, err = aqua(*command, *given)
        assert (code, message in err, "Traceback" in err) == (2, True, False), err
