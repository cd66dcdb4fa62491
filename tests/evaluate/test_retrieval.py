# SPDX-License-Identifier: Apache-2.0
"""Questions answered dense and with AQUA: the pairs, the test of their difference, and the two kinds of questions."""

from __future__ import annotations

import copy
import gzip
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import aqua_attention as aqua
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites import needle, retrieval
from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.evaluate.suites.lines import MOST_LINES, lines_questions, read_lines_questions
from aqua_attention.evaluate.suites.retrieval import Question, evaluate_retrieval, is_correct, paired_p_value
from aqua_attention.ops.plan import Reading
from aqua_attention.report.tables import retrieval_grid, retrieval_table
from conftest import subject_of

ESSAY = " ".join(f"w{i % 7} w{i % 11} w{i % 13} w{i % 5}." for i in range(300))


def test_an_answer_is_right_when_its_first_numbers_are_the_expected_ones():
    assert is_correct("2416>. Line 7", ["2416"])
    assert is_correct(" 12, 34 and 56.", ["12", "34", "56"])
    assert not is_correct("24160", ["2416"])
    assert not is_correct("line 7 is 2416", ["2416"])
    assert not is_correct("12, 34", ["12", "34", "56"])
    assert not is_correct("34, 12", ["12", "34"])
    assert not is_correct("", ["1"])


def test_paired_p_value_by_hand():
    assert paired_p_value(0, 0) == 1
    assert paired_p_value(3, 3) == 1
    assert paired_p_value(1, 0) == 1
    assert paired_p_value(5, 0) == pytest.approx(2 / 32)
    assert paired_p_value(8, 1) == pytest.approx(2 * (1 + 9) / 512)
    assert paired_p_value(2000, 1000) < 1e-60


@given(st.integers(0, 60), st.integers(0, 60))
def test_paired_p_value_is_a_symmetric_probability(lost, gained):
    value = paired_p_value(lost, gained)
    assert 0 < value <= 1
    assert value == paired_p_value(gained, lost)
    assert paired_p_value(lost + 1, 0) <= paired_p_value(lost, 0)


def question(number, **labels):
    return Question(prompt="w1 w2 w3", answer_start="w4 w5", expected=(str(number),), labels=labels)


def test_the_figures_count_pairs(llama, word_tokenizer, monkeypatch):
    """Dense right on 1, 2, 3; AQUA right on 1, 4; equal text on 1 only."""
    model, projections = llama
    dense, scripted = ["1", "2", "3", "0"], ["1", "0", "0", "4"]
    asked = []

    def answer(model, tokenizer, token_ids, *, max_new_tokens, attachment=None):
        asked.append((token_ids.tolist(), max_new_tokens))
        if attachment is None:
            text = dense[len(asked) // 2]
        else:
            attachment.on_selection(0, None, torch.Size((1, 4, 1, 8)), 16)
            read, seen = torch.tensor([[[3]]]), torch.tensor([[[12]]])
            attachment.on_reading(0, Reading(read, seen, torch.tensor([[[0.5]]])))
            text = scripted[len(asked) // 2 - 1]
        return Continuation(text, [int(text)])

    monkeypatch.setattr(retrieval, "continue_tokens", answer)
    questions = [question(n, lines=n % 2) for n in (1, 2, 3, 4)]
    ticks = []
    result = evaluate_retrieval(
        *(subject_of(model, projections, word_tokenizer), [Setting(aqua.AquaConfig.paper(k_ratio=0.5))], questions),
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert result["dense"] == {"accuracy": 0.75, "questions": 4}
    (row,) = result["rows"]
    expected = {"accuracy": 0.5, "lost": 2, "gained": 1, "p_value": 1.0, "same_answer": 0.25, "mean_k": 0.5}
    expected |= {"tokens_read": 0.25, "bytes_read": 0.5}
    assert expected.items() <= row.items()
    assert result["questions"][3] == {
        "lines": 0,
        "tokens": 5,
        "expected": ["4"],
        "answers": ["0", "4"],
        "correct": [False, True],
    }
    assert asked[0][0] == [[3, 4, 5, 6, 7]], "the prompt, then the beginning of the answer"
    assert asked[0][1] == 1 + retrieval.SPARE_TOKENS
    assert ticks == [*((done, 8) for done in range(8)), (8, 8)]
    assert retrieval_grid(result) == (["lines", "dense", "k_ratio 0.5"], [["1", "2/2", "1/2"], ["0", "1/2", "1/2"]])
    assert retrieval_table(result)[1][1] == ["k_ratio 0.5", "50%", "50.0%", "2", "1", "1", "25.0%"]


def test_at_k_ratio_1_every_answer_is_the_dense_one(llama, word_tokenizer):
    model, projections = llama
    settings = [Setting(aqua.AquaConfig.paper(k_ratio=ratio)) for ratio in (1, 0.25)]
    questions = [Question(f"w{n} w7 w{n + 1} w9", "w3", ("1",), {"item": n}) for n in range(6)]
    full, quarter = evaluate_retrieval(subject_of(model, projections, word_tokenizer), settings, questions)["rows"]
    assert full["same_answer"] == 1
    assert quarter["same_answer"] < 1, "a quarter of the dimensions must change what this model writes"
    assert (full["mean_k"], quarter["mean_k"]) == (1, 0.25)


def test_impossible_questions_are_refused(llama, word_tokenizer):
    model, projections = llama
    with pytest.raises(aqua.AquaError, match="no questions"):
        evaluate_retrieval(subject_of(model, projections, word_tokenizer), [], [])
    with pytest.raises(aqua.AquaError, match="the model knows 256 positions"):
        evaluate_retrieval(
            subject_of(model, projections, word_tokenizer), [], [Question("w1 " * 252, "w2", ("1",), {})]
        )
    with pytest.raises(aqua.AquaError, match="prompt is empty"):
        evaluate_retrieval(subject_of(model, projections, word_tokenizer), [], [Question(" ", "w2", ("1",), {})])


def test_a_model_that_gives_nan_later_is_refused(llama, word_tokenizer):
    """The four tokens of the probe are fine; a token of the question is not."""
    model = copy.deepcopy(llama[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    ask = Question("w1 w48 w2", "w3", ("1",), {})
    with pytest.raises(aqua.AquaError, match="the model gives NaN"):
        evaluate_retrieval(subject_of(model, llama[1], word_tokenizer), [], [ask])


# Lines


def test_generated_lines_hold_one_answer_and_follow_the_seed():
    questions = lines_questions(40, count=5, seed=3)
    assert [q.prompt for q in questions] == [q.prompt for q in lines_questions(40, count=5, seed=3)]
    assert questions[0].prompt != lines_questions(40, count=1, seed=4)[0].prompt
    assert len({q.prompt for q in questions}) == 5
    for q in questions:
        record = dict(re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", q.prompt, re.M))
        assert len(record) == 40 == len(set(record.values()))
        name = re.search(r"of line (\S+)\?", q.prompt).group(1)
        assert q.expected == (record[name],)
        assert q.answer_start == f"line {name}: REGISTER_CONTENT is <"
        assert q.labels == {"lines": 40}


def test_lines_out_of_range():
    assert len(lines_questions(MOST_LINES, count=1)[0].prompt) > 100_000
    for lines, count in ((0, 1), (MOST_LINES + 1, 1), (5, 0)):
        with pytest.raises(aqua.AquaError, match=r"lines is|count is"):
            lines_questions(lines, count=count)


RECORD = "line calm-fox: REGISTER_CONTENT is <77>\nline odd-elk: REGISTER_CONTENT is <8>\n"
ROW = {"random_idx": ["calm-fox", 1], "expected_number": 77, "prompt": RECORD}


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_longeval_files_are_read(tmp_path, name):
    content = "".join(json.dumps(ROW | {"expected_number": n}) + "\n\n" for n in (77, 78, 79)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    questions = read_lines_questions(tmp_path / name)
    assert [q.expected for q in questions] == [("77",), ("78",), ("79",)]
    assert questions[0].answer_start == "line calm-fox: REGISTER_CONTENT is <"
    assert questions[0].labels == {"lines": 2}
    assert len(read_lines_questions(tmp_path / name, count=2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give a file with questions"),
        (b"{", "line 1 is no LongEval line question"),
        (b"[1]", "line 1 is no LongEval line question"),
        (b"[" * 200_000, "line 1 is no LongEval line question"),
        *(
            (json.dumps(ROW | {"expected_number": n}).encode(), "expected_number is")
            for n in ("77", 77.9, -5, True, None)
        ),
        (json.dumps(ROW | {"expected_number": float("inf")}).encode(), "expected_number is inf"),
        *((json.dumps(ROW | {"random_idx": name}).encode(), "random_idx is no text") for name in ([], [""], 3, None)),
        *((json.dumps(ROW | {"prompt": p}).encode(), "prompt is no text") for p in ("", " ", ["a"], "\ud800")),
        (json.dumps({"prompt": "x", "random_idx": "y"}).encode(), "line 1 has no field 'expected_number'"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_line_files_name_the_place(tmp_path, content, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(aqua.AquaError, match=message):
        read_lines_questions(path)


def test_missing_and_truncated_line_files(tmp_path):
    with pytest.raises(aqua.AquaError, match="count is -5"):
        read_lines_questions(tmp_path / "none.jsonl", count=-5)
    with pytest.raises(aqua.AquaError, match="no such file of line questions"):
        read_lines_questions(tmp_path / "none.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(ROW).encode() * 50)[:-12])
    with pytest.raises(aqua.AquaError, match="cannot be read"):
        read_lines_questions(cut)


# Needle


def needle_questions(tokenizer, text, *, seed=0, chat=True, **sizes):
    return needle.needle_questions(subject_of(None, None, tokenizer, text=text, seed=seed, chat=chat), Sizes(**sizes))


def place_of(prompt, number):
    """Where in the haystack a number is: words before it, over all words."""
    hay = prompt.split("\n\n")[1]
    return len(hay[: hay.index(number)].split()) / len(hay.split())


def test_the_needle_is_at_its_depth_in_a_text_of_its_length(word_tokenizer):
    questions = needle_questions(word_tokenizer, ESSAY, lengths=[150, 400], depths=[0, 0.3, 1], chat=False, repeats=2)
    assert len(questions) == 12
    assert len({q.expected for q in questions}) == 12
    for q in questions:
        tokens = len(word_tokenizer(q.prompt + " " + q.answer_start)["input_ids"])
        assert q.labels["length"] - 8 <= tokens <= q.labels["length"]
        assert q.prompt.count(q.expected[0]) == 1
        assert place_of(q.prompt, q.expected[0]) == pytest.approx(q.labels["depth"], abs=0.1)
        assert re.search(r"[.]\s+The secret number|^The secret number", q.prompt.split("\n\n")[1]), "between sentences"


def test_long_sentences_leave_the_haystack_full(word_tokenizer):
    text = ESSAY + " w1" * 164 + ". " + ESSAY
    for seed in range(20):
        (q,) = needle_questions(word_tokenizer, text, lengths=[200], depths=[0.5], seed=seed, chat=False)
        assert 0.85 * 200 <= len(word_tokenizer(f"{q.prompt} {q.answer_start}")["input_ids"]) <= 200


def test_a_cell_given_twice_is_asked_once(word_tokenizer):
    questions = needle_questions(word_tokenizer, ESSAY, lengths=[200, 200], depths=[0.5, 0.5], chat=False)
    assert len(questions) == 1


def test_several_needles_stand_in_the_order_they_are_asked_for(word_tokenizer):
    for q in needle_questions(word_tokenizer, ESSAY, lengths=[400], depths=[0, 0.5, 1], needles=3, chat=False):
        places = [place_of(q.prompt, number) for number in q.expected]
        assert places == sorted(places)
        first = q.labels["depth"]
        assert places == pytest.approx([first + (1 - first) * i / 3 for i in range(3)], abs=0.1)
        cities = re.search(r"secret numbers of (\w+), (\w+) and (\w+), in this order", q.prompt).groups()
        found = dict(re.findall(r"The secret number of (\w+) is (\d+)[.]", q.prompt))
        assert tuple(found[city] for city in cities) == q.expected
        assert q.answer_start.endswith("in this order, are")


def test_needle_questions_follow_the_seed(word_tokenizer):
    def prompts(seed):
        return [q.prompt for q in needle_questions(word_tokenizer, ESSAY, lengths=[200], depths=[0.5], seed=seed)]

    assert prompts(0) == prompts(0)
    assert prompts(0) != prompts(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needles": 0}, "needles is 0"),
        ({"needles": 25}, "needles is 25"),
        ({"repeats": 0}, "repeats is 0"),
        ({"depths": [1.5]}, "depth is 1.5"),
        ({"depths": [float("nan")]}, "depth is nan"),
        ({"lengths": [10]}, "length is 10: question and needles alone take"),
        ({"lengths": [100_000]}, "give more text"),
        ({"text": "w1 " * 900}, "too few parts of the text .* have about [0-9]+ tokens"),
        ({"text": " ".join(map(str, range(100_000, 1_000_000)))}, "full of 6-digit numbers"),
    ],
)
def test_impossible_needles_are_refused(word_tokenizer, changes, message):
    arguments = {"text": ESSAY, "lengths": [200], "depths": [0.5]} | changes
    with pytest.raises(aqua.AquaError, match=message):
        needle_questions(word_tokenizer, **arguments)
