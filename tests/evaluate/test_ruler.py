# SPDX-License-Identifier: Apache-2.0
"""RULER: what each task hides and asks for, and what cannot be asked."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import pytest
from ruler_texts import ESSAY, LENGTH, essay, maker, squad, write_squad

import aqua_attention as aqua
from aqua_attention.evaluate.generation import encode_prompt
from aqua_attention.evaluate.ruler import material, needles, words
from aqua_attention.evaluate.ruler.squad import Reading, read_squad
from aqua_attention.evaluate.suites.ruler import TASKS

NEEDLE = re.compile(r"The vault of (\S+) opens with the (?:number|code) (\S+)[.]")
KINDS = ["niah_single_1", "niah_multivalue", "vt", "cwe", "fwe", "qa"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return write_squad(tmp_path_factory.mktemp("squad"))


@pytest.fixture
def make(word_tokenizer, asked):
    return maker(word_tokenizer, asked)


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


def test_words_of_other_scripts(word_tokenizer):
    """Marks of Hindi belong to its words; Chinese and Thai have no words that could be told apart."""
    assert material.Material(word_tokenizer, "किताबें और विद्यालय").words == ["विद्यालय", "किताबें"]
    assert material.Material(word_tokenizer, "читать книги").words == ["читать", "книги"]
    assert material.Material(word_tokenizer, "我们今天去图书馆。ภาษาไทยเขียนติดกัน").words == []
    assert material.Material(word_tokenizer, "12 34").words == []


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
