# SPDX-License-Identifier: Apache-2.0
"""RULER: what each task hides and asks for, what its answers score, and the way from a model to the report."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.evaluate import record as records
from aqua_attention.evaluate.generation import Continuation, encode_prompt
from aqua_attention.evaluate.ruler import material, needles, words
from aqua_attention.evaluate.ruler.squad import Reading, read_squad
from aqua_attention.evaluate.run import run_jobs
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites import retrieval
from aqua_attention.evaluate.suites.grid import QUICK, Sizes, grid_jobs
from aqua_attention.evaluate.suites.names import names
from aqua_attention.evaluate.suites.retrieval import any_found, evaluate_retrieval, share_found
from aqua_attention.evaluate.suites.ruler import TASKS, ruler_questions
from aqua_attention.report.collect import collect
from aqua_attention.report.recognise import records_of
from aqua_attention.report.record_tables import record_table
from aqua_attention.report.tables import retrieval_grid, retrieval_table
from conftest import calibrated, make_llama, subject_of

HALF = Setting(aqua.AquaConfig.paper(k_ratio=0.5))
FACTS = {name: "" for name in records.FACTS if name not in ("started", "seconds")}
NEEDLE = re.compile(r"The vault of (\S+) opens with the (?:number|code) (\S+)[.]")
KINDS = ["niah_single_1", "niah_multivalue", "vt", "cwe", "fwe", "qa"]
LENGTH = 700


def essay(sentences=700):
    """Sentences of eight words each, of a thousand words, none of which stands in another one."""
    rng = random.Random(1)
    vocabulary = [name.replace("-", "") for name in names(rng, 1000)]
    return " ".join(" ".join(rng.choices(vocabulary, k=8)) + "." for _ in range(sentences))


ESSAY = essay()


def squad(count=12):
    """Questions whose answers are words that no essay holds."""
    qas = [
        {
            "context": f"Number {'abcdefghijklm'[n]}{'zyxwvutsrqpon'[n]}qq was found by a sailor in the {n}th year.",
            "qas": [
                {
                    "question": f"What was found in the {n}th year?",
                    "answers": [{"text": f"{'abcdefghijklm'[n]}{'zyxwvutsrqpon'[n]}qq"}, {"text": "elsewhere"}],
                }
            ],
        }
        for n in range(count)
    ]
    return {"data": [{"paragraphs": qas}]}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "questions.json"
    path.write_text(json.dumps(squad()))
    return path


@pytest.fixture
def make(word_tokenizer, asked):
    """Questions about the essay, or another text."""

    def questions(*tasks, text=ESSAY, seed=0, **sizes):
        subject = subject_of(None, None, word_tokenizer, text=text, seed=seed, chat=False)
        given = {"lengths": (LENGTH,), "count": 2, "questions": asked} | sizes
        return ruler_questions(subject, Sizes(tasks=tasks, **given))

    return questions


def found_in(prompt):
    """What the needles of a prompt say: the numbers of each vault."""
    found = {}
    for vault, number in NEEDLE.findall(prompt):
        found.setdefault(vault, []).append(number)
    return found


# Items


@pytest.mark.parametrize("task", TASKS)
def test_an_item_is_as_long_as_it_was_asked_for(task, make, word_tokenizer):
    for q in make(task, lengths=(LENGTH, 1500), count=3):
        prompt = encode_prompt(word_tokenizer, q.prompt, chat=False, answer_start=q.answer_start)
        length = q.labels["length"]
        assert 0.88 * length <= prompt.shape[1] + q.new_tokens <= length
        assert q.labels == {"task": task, "length": length}


@pytest.mark.parametrize("task", TASKS)
def test_items_follow_the_seed_and_nothing_else(task, make):
    first = [q.prompt for q in make(task)]
    assert len(set(first)) == 2
    assert first == [q.prompt for q in make(task, count=3, lengths=(900, LENGTH), seed=0)[3:5]]
    assert first == [q.prompt for q in make("fwe", task) if q.labels["task"] == task]
    assert not set(first) & {q.prompt for q in make(task, seed=1)}


def test_a_length_or_task_given_twice_is_asked_once(make):
    assert len(make("fwe", "fwe", lengths=(LENGTH, LENGTH))) == 2


def test_the_answer_stands_in_the_text_only(make):
    """Not in the question, the example, the instructions or the beginning of the answer."""
    for q in make(*(task for task in TASKS if task not in ("cwe", "fwe", "qa"))):
        for text in q.expected:
            assert text not in q.answer_start
            assert q.prompt.count(text) == 1 + (q.labels["task"] == "vt" and text != q.expected[-1])
        question = q.prompt.rsplit("\n\n", 1)[1]
        assert not any(text in question for text in q.expected)


@pytest.mark.parametrize(
    ("task", "vaults", "each", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_needles_hide_what_they_ask_for(task, vaults, each, answers, make):
    for q in make(task):
        found = found_in(q.prompt)
        assert (len(found), {len(set(numbers)) for numbers in found.values()}) == (vaults, {each})
        named = [name for name in found if name in q.answer_start]
        assert sorted(q.expected) == sorted(number for name in named for number in found[name])
        assert len(q.expected) == answers
        form = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if task.endswith("single_3") else r"\d{7}"
        assert all(re.fullmatch(form, number) for number in q.expected)
        hay = NEEDLE.sub("", q.prompt.split("\n\n", 1)[1].rsplit("\n\n", 1)[0])
        if task == "niah_single_1":
            assert {line for line in hay.split("\n") if line} == {needles.NOISE}
        else:
            assert " ".join(hay.split()) in ESSAY, "a piece of the text, between whose sentences the needles stand"


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_needle_among_needles_is_one_of_many(task, make):
    for q in make(task):
        hay = q.prompt.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        found = found_in(hay)
        assert all(NEEDLE.fullmatch(line) for line in hay.split("\n")), "the needle looks as all others do"
        assert len(found) > 10
        assert len({number for numbers in found.values() for number in numbers}) == len(found)
        (name,) = [name for name in found if f"of {name}" in q.answer_start]
        assert q.expected == tuple(found[name])
        code = "-4" in name and len(name) == 36
        assert code == (task == "niah_multikey_3")


def test_needles_of_a_text_full_of_their_numbers_are_others(make, monkeypatch):
    monkeypatch.setattr(needles, "DIGITS", 2)
    text = essay(300) + " 10 11 12 13 14 15 16 17 18 19 20 21."
    for q in make("niah_multivalue", text=text, count=8):
        assert not set(q.expected) & set(map(str, range(10, 22)))


def followed(text):
    """Variables by value, as a reader finds them who goes through the text once."""
    value, holders = {}, {}
    for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        value[name] = value.get(given, given)
        holders.setdefault(value[name], []).append(name)
    return holders


def test_variables_are_a_chain_in_the_order_of_the_text(make):
    for q in make("vt", count=4):
        example, text = q.prompt.rsplit("In the text below", 1)
        asked = re.search(r"have the value (\d+)", q.answer_start).group(1)
        assert followed(text) == {asked: list(q.expected)}
        assert len(set(q.expected)) == 5
        (shown,) = followed(example).values()
        assert example.split("\n\n")[-2].endswith(f"namely: {' '.join(shown)}"), "the example has its answer"
        assert not any(name in other for name in shown for other in q.expected)


@pytest.mark.parametrize(("length", "often", "seldom"), [(LENGTH, 6, 1), (4096, 30, 3)])
def test_common_words_come_more_often_than_all_others(length, often, seldom, make):
    for q in make("cwe", lengths=(length,)):
        example, text = q.prompt.split("\nAnswer: ")
        entries = re.findall(r"(\d+)[.] (\w+)", text.split("\n\n")[2])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert {counts.pop(word) for word in q.expected} == {often}
        assert len(set(q.expected)) == 10
        assert set(counts.values()) == {seldom} and len(counts) >= 10
        assert all(word in ESSAY for word in counts)
        assert not any(word in other for word in q.expected for other in counts), "an answer is no part of another"
        shown = re.findall(r"\d+[.] (\w+)", text.split("\n\n")[0])
        in_example = Counter(re.findall(r"\d+[.] (\w+)", example))
        assert sorted(shown) == sorted(word for word, _ in in_example.most_common(10))
        assert not set(in_example) & {*counts, *q.expected}


def test_frequent_words_are_the_three_first_behind_the_dots(make):
    for q in make("fwe", lengths=(200, LENGTH, 4000)):
        counts = Counter(q.prompt.split("\n\n")[1].split())
        (dots, most), *ranked = counts.most_common()
        assert dots == words.NOISE
        assert {word for word, _ in ranked[:3]} == set(q.expected)
        assert most > ranked[0][1] and ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
    # Zipf's law: 1, 1/4, 1/9 and so on of 6/pi².
    assert words._counts(5, 1000) == [607, 151, 67, 37, 24]


def test_a_question_is_answered_by_one_document(make):
    taken = set()
    for q in make("qa", count=12, lengths=(400,)):
        assert q.expected[1:] == (), "an answer that is not in the paragraph is none"
        documents = re.split(r"\n\nDocument \d+:\n", q.prompt.rsplit("\n\n", 2)[0])[1:]
        holding = [document for document in documents if q.expected[0] in document]
        assert len(holding) == 1 and len(documents) > 1
        assert all(document in ESSAY for document in documents if document not in holding)
        assert q.prompt.count(q.expected[0]) == 1
        taken.add(q.expected)
    assert len(taken) == 12, "every question once"


def test_documents_with_the_answer_are_no_distractors(word_tokenizer, tmp_path, make):
    text = essay(60) + " The Answer is here." + essay(60)
    path = tmp_path / "answer.json"
    qas = [{"question": "What?", "answers": [{"text": "the answer"}]}]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Find the answer.", "qas": qas}]}]}))
    found = material.Material(word_tokenizer, text).documents
    assert sum("the answer" in document.lower for document in found) == 1
    assert all(document.tokens <= material.DOCUMENT_TOKENS for document in found)
    for seed in range(4):
        (q,) = make("qa", text=text, questions=path, count=1, lengths=(900,), seed=seed)
        assert q.prompt.lower().count("the answer") == 1


def test_words_are_those_that_stand_in_no_other(word_tokenizer):
    text = "The orchard has an orchards, an Apple; pineapple, 1234 x1y2 and äpfel. Straßen"
    assert sorted(material.Material(word_tokenizer, text).words) == ["orchards", "pineapple", "straßen", "äpfel"]


# Files of questions


def test_questions_are_read_packed_or_not_and_only_those_with_an_answer(tmp_path, asked):
    value = squad(3)
    qas = value["data"][0]["paragraphs"][0]["qas"]
    qas += [{"question": "None?", "answers": [], "is_impossible": True}, qas[0]]
    packed = tmp_path / "questions.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(value).encode()))
    found = read_squad(packed)
    assert found == read_squad(asked)[:3]
    paragraph = "Number azqq was found by a sailor in the 0th year."
    assert found[0] == Reading("What was found in the 0th year?", paragraph, ("azqq",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not in SQuAD's format"),
        (b'{"data": [{"paragraphs": [{"qas": []}]}]}', "is not in SQuAD's format .KeyError: 'context'."),
        (b'{"data": [{"paragraphs": [{"context": "a", "qas": 3}]}]}', "is not in SQuAD's format"),
        (b'{"data": []}', "has no question with an answer"),
        (
            json.dumps(squad(1)).replace("sailor", r"\ud800").encode(),
            "has half a surrogate pair in .*: mend its .u esc",
        ),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_files_of_questions_are_an_error(tmp_path, content, message):
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    with pytest.raises(aqua.AquaError, match=message):
        read_squad(path)
    with pytest.raises(aqua.AquaError, match="no such file of questions"):
        read_squad(tmp_path / "none.json")


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
        *("--json", tmp_path / "all.json"),
    )
    assert code == 0, err
    dense, full = json.loads((tmp_path / "all.json").read_text())["records"]
    assert full["options"]["tasks"] == ["qa"] and full["options"]["questions_file"] == str(asked)
    assert full["result"]["same_answer"] == 1
    assert dense["projections_sha256"] is None
    assert set(QUICK.tasks) < set(TASKS)


# Mistakes


def test_without_questions_all_tasks_are_all_but_one_and_a_warning_says_so(make):
    with pytest.warns(UserWarning, match=r"task qa is left out: it takes a file in SQuAD's format \(--questions\)"):
        questions = make(questions=None, count=1)
    assert [q.labels["task"] for q in questions] == [task for task in TASKS if task != "qa"]


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        (["niah"], {}, "task is 'niah': it must be one of niah_single_1, "),
        (["qa"], {"questions": None}, "task qa has no questions: give a file"),
        (["fwe"], {"count": 0}, "count is 0: it must be at least 1"),
        (["qa"], {"count": 13}, "count is 13: .* has 12 questions, give a smaller count"),
        *(([task], {"lengths": (60,)}, f"length is 60: {task} takes at least [0-9]+ tokens") for task in KINDS),
        (["niah_single_2"], {"lengths": (20_000,)}, "the text has 6300 tokens, the haystack .* give more text"),
        (["cwe"], {"text": essay(20), "lengths": (1500,)}, "the text has [0-9]+ different words .* give more text"),
        (["qa"], {"text": essay(20), "lengths": (900,)}, "tokens of documents without the answer .* give more text"),
        (["niah_multikey_2"], {"lengths": (200_000,)}, "length is 200000: the vaults have [0-9]+ names"),
    ],
)
def test_what_cannot_be_asked_is_an_error_with_a_remedy(tasks, changes, message, make):
    with pytest.raises(aqua.AquaError, match=message) as raised:
        make(*tasks, **changes)
    assert "\n" not in str(raised.value)


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
