# SPDX-License-Identifier: Apache-2.0
"""Files of questions, as they are published: read whole, or refused with their place."""

from __future__ import annotations

import gzip
import json

import pytest

import aqua_attention as aqua
from aqua_attention.evaluate.tasks import files as task_files
from aqua_attention.evaluate.tasks.formats import FORMATS, final_number, load_task

HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A cook opens the oven. [step] She looks [title] Waits.",
    "ctx_b": "then she",
    "endings": ["sings  loud.", "[substeps] takes out the bread.", "flies.", "sleeps."],
    "label": 1,
}
WINOGRANDE = {
    "sentence": "The cup fell off the shelf because _ was slim.",
    "option1": "the cup",
    "option2": "the shelf",
}
ARC = {
    "question": "What do plants need?",
    "choices": {"text": ["light", "noise", "salt"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
MMLU = {"question": " 1 + 1? ", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "simple_sums"}
GSM8K = {"question": "How many?", "answer": "First 1 + 1 = <<1+1=2>>2.\n#### 1,234"}
TRUTHFULQA = {
    "question": "Is water wet?",
    "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["Yes.", "It is.", "No.", "Never."], "labels": [1, 1, 0, 0]},
}
ROWS = {
    "hellaswag": HELLASWAG,
    "winogrande": WINOGRANDE | {"answer": "2"},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "truthfulqa": TRUTHFULQA,
    "mmlu": MMLU,
    "gsm8k": GSM8K,
}


def read_rows(path, splits):
    return task_files.read_rows(task_files.question_files(path, splits))


def write(path, *rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def item(tmp_path, name, row):
    (only,) = load_task(name, write(tmp_path / "rows.jsonl", row), few_shot=0).items
    return only


def test_every_task_has_a_row_here():
    assert set(ROWS) == set(FORMATS)


def test_hellaswag_by_hand(tmp_path):
    found = item(tmp_path, "hellaswag", HELLASWAG)
    assert found.contexts == ("Baking: A cook opens the oven. She looks. Waits. Then she",) * 4
    assert found.continuations == (" sings loud.", "  takes out the bread.", " flies.", " sleeps.")
    assert found.right == 1
    assert item(tmp_path, "hellaswag", HELLASWAG | {"label": "1"}) == found, "the hub's labels are strings"


def test_hellaswag_without_a_second_part(tmp_path):
    found = item(tmp_path, "hellaswag", HELLASWAG | {"ctx_a": "She waits.", "ctx_b": ""})
    assert found.contexts[0] == "Baking: She waits."


def test_winogrande_scores_what_follows_the_blank(tmp_path):
    found = item(tmp_path, "winogrande", ROWS["winogrande"])
    start = "The cup fell off the shelf because the"
    assert found.contexts == (f"{start} cup", f"{start} shelf")
    assert found.continuations == (" was slim.",) * 2
    assert found.right == 1
    row = {"context_options": list(found.contexts), "continuation": "was slim.", "gold": 1}
    assert item(tmp_path, "winogrande", row) == found, "as llm-foundry has it"


def test_arc_in_three_forms(tmp_path):
    found = item(tmp_path, "arc_easy", ARC)
    assert found.contexts == ("Question: What do plants need?\nAnswer:",) * 3
    assert found.continuations == (" light", " noise", " salt")
    assert found.right == 0
    choices = [{"text": text, "label": label} for text, label in zip(*ARC["choices"].values(), strict=True)]
    published = {"question": {"stem": ARC["question"], "choices": choices}, "answerKey": "1"}
    assert item(tmp_path, "arc_easy", published) == found
    foundry = {"query": "Question: What do plants need?", "choices": ARC["choices"]["text"], "gold": 0}
    assert item(tmp_path, "arc_easy", foundry) == found


def test_truthfulqa_from_the_hub_the_authors_json_and_their_csv(tmp_path):
    found = item(tmp_path, "truthfulqa", TRUTHFULQA)
    assert found.contexts[0] == "Q: Is water wet?\nA:"
    assert found.continuations == (" Yes.", " No.", " It is.", " Never.")
    assert (found.right, found.offered, found.true) == (0, (0, 1), (True, False, True, False))
    published = {"question": "Is water wet?", "mc1_targets": {"Yes.": 1, "No.": 0}}
    published["mc2_targets"] = {"Yes.": 1, "It is.": 1, "No.": 0, "Never.": 0}
    (tmp_path / "mc_task.json").write_text(json.dumps([published]))
    assert load_task("truthfulqa", tmp_path / "mc_task.json").items == (found,)
    table = tmp_path / "TruthfulQA.csv"
    table.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'a,b,"Is water\nwet?",Yes,Yes; It is.,No; Never,c\n'
    )
    (of_csv,) = load_task("truthfulqa", table).items
    assert of_csv.contexts[0] == "Q: Is water\nwet?\nA:"
    assert of_csv.continuations == (" Yes.", " No.", " Never.", " It is.")
    assert (of_csv.right, of_csv.offered, of_csv.true) == (0, (0, 1, 2), (True, False, False, True))


def test_mmlu_of_the_hub_and_of_the_authors(tmp_path):
    found = item(tmp_path, "mmlu", MMLU)
    preface = "The following are multiple choice questions (with answers) about simple sums.\n\n"
    assert found.contexts[0] == f"{preface}1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert found.continuations == (" A", " B", " C", " D")
    assert found.right == 1
    table = tmp_path / "test" / "simple_sums_test.csv"
    table.parent.mkdir()
    table.write_text("1 + 1?,1,2,3,4,B\n")
    assert load_task("mmlu", tmp_path).items == (found,)


def test_gsm8k_by_hand(tmp_path):
    found = item(tmp_path, "gsm8k", GSM8K)
    assert (found.prompt, found.number) == ("Question: How many?\nAnswer:", "1234")
    assert final_number("so #### -1,000.50. Done") == "-1000.50"
    assert final_number("#### 7\n\n#### 8") == "7"
    assert final_number("It is 7.") is None


def test_examples_come_from_the_split_for_them(tmp_path):
    write(tmp_path / "test.jsonl.gz", *(GSM8K | {"question": f"Test {n}?"} for n in range(4)))
    write(tmp_path / "train_first64.jsonl", *(GSM8K | {"question": f"Train {n}?"} for n in range(9)))
    task = load_task("gsm8k", tmp_path)
    assert task.few_shot == 5
    assert len(task.items) == 4
    for place, found in enumerate(task.items):
        parts = found.prompt.split("\n\n")
        assert parts[-1] == f"Question: Test {place}?\nAnswer:"
        assert len(set(parts[:-1])) == 5
        assert all(part.startswith("Question: Train ") and part.endswith("#### 1,234") for part in parts[:-1])
    assert len({found.prompt.rpartition("\n\n")[0] for found in task.items}) == 4, "drawn for each question"
    assert load_task("gsm8k", tmp_path, limit=2).items == task.items[:2]
    assert load_task("gsm8k", tmp_path, seed=1).items != task.items
    assert load_task("gsm8k", tmp_path, few_shot=0).items[3].prompt == "Question: Test 3?\nAnswer:"


def test_examples_of_a_single_file_are_its_other_questions(tmp_path):
    path = write(tmp_path / "rows.jsonl", *(ROWS["winogrande"] | {"option1": f"cup {n}"} for n in range(4)))
    for place, found in enumerate(load_task("winogrande", path, few_shot=3).items):
        assert f"because cup {place} was" not in found.contexts[1]
        *examples, question = found.contexts[0].split("\n\n")
        assert set(examples) == {"The cup fell off the shelf because the shelf was slim."}
        assert question.endswith(f"because cup {place}")
    with pytest.raises(aqua.AquaError, match="has 3 examples for a question of winogrande: ask for fewer"):
        load_task("winogrande", path, few_shot=4)


def test_mmlu_takes_the_first_examples_of_its_subject_and_limits_each(tmp_path):
    for subject in ("one_thing", "other_thing"):
        rows = [MMLU | {"question": f"{subject} {n}?", "subject": subject} for n in range(5)]
        write(tmp_path / "dev" / f"{subject}_dev.jsonl", *rows)
        write(tmp_path / "test" / f"{subject}_test.jsonl", *rows[:3])
    task = load_task("mmlu", tmp_path, few_shot=2, limit=2)
    assert [found.group for found in task.items] == ["one thing", "one thing", "other thing", "other thing"]
    text = task.items[3].contexts[0]
    assert text.index("about other thing") < text.index("other_thing 0?") < text.index("other_thing 1?")
    assert text.count("other_thing 1?") == 2, "the question itself comes last"
    assert "Answer: B\n\n" in text


def test_a_folder_names_its_splits(tmp_path):
    write(tmp_path / "train.jsonl", HELLASWAG)
    write(tmp_path / "test.jsonl", HELLASWAG | {"label": ""})
    with pytest.raises(aqua.AquaError, match=r"has no validation or val .* split \(it holds test.jsonl, train.jsonl\)"):
        load_task("hellaswag", tmp_path)
    write(tmp_path / "hellaswag_val.jsonl", HELLASWAG)
    assert len(load_task("hellaswag", tmp_path).items) == 1
    with pytest.raises(aqua.AquaError, match=r"test.jsonl, line 1: its field 'label' is '', not the right answer's"):
        load_task("hellaswag", tmp_path / "test.jsonl")


def test_the_same_questions_in_two_formats_are_read_once(tmp_path):
    write(tmp_path / "ARC-Easy-Test.jsonl", ARC)
    (tmp_path / "ARC-Easy-Test.csv").write_text("questionID,question\n1,2\n")
    (tmp_path / "README.txt").write_text("test")
    assert [row.fields for row in read_rows(tmp_path, ("test",))] == [ARC]


def test_several_files_of_a_split_are_refused_and_named(tmp_path):
    """Joined, they would mix data sets, or ask the same questions twice."""
    write(tmp_path / "gsm8k" / "test.jsonl", GSM8K)
    write(tmp_path / "gsm8k" / "test_socratic.jsonl", GSM8K)
    for part in ("ARC-Easy", "ARC-Challenge"):
        write(tmp_path / "arc" / part / f"{part}-Test.jsonl", ARC)
    with pytest.raises(
        aqua.AquaError, match=r"2 files of one split \(test.jsonl, test_socratic.jsonl\).*: name one of"
    ):
        load_task("gsm8k", tmp_path / "gsm8k", few_shot=0)
    with pytest.raises(aqua.AquaError, match=r"ARC-Challenge/ARC-Challenge-Test.jsonl, ARC-Easy/ARC-Easy-Test.jsonl"):
        load_task("arc_easy", tmp_path / "arc")
    named = load_task("gsm8k", tmp_path / "gsm8k" / "test.jsonl", few_shot=0)
    assert (len(named.items), named.files) == (1, (str(tmp_path / "gsm8k" / "test.jsonl"),))
    assert len(load_task("arc_easy", tmp_path / "arc" / "ARC-Easy").items) == 1
    (tmp_path / "gsm8k" / "test_socratic.jsonl").unlink()
    write(tmp_path / "gsm8k" / "train.jsonl", *[GSM8K] * 6)
    write(tmp_path / "gsm8k" / "train_socratic.jsonl", *[GSM8K] * 6)
    with pytest.raises(aqua.AquaError, match=r"2 files of one split \(train.jsonl, train_socratic.jsonl\)"):
        load_task("gsm8k", tmp_path / "gsm8k")
    assert len(load_task("gsm8k", tmp_path / "gsm8k", few_shot=0).items) == 1, "no examples are needed"


def test_a_task_says_which_files_were_read(tmp_path):
    write(tmp_path / "test.jsonl", GSM8K)
    write(tmp_path / "train.jsonl", *[GSM8K] * 6)
    task = load_task("gsm8k", tmp_path)
    assert (task.files, task.example_files) == ((str(tmp_path / "test.jsonl"),), (str(tmp_path / "train.jsonl"),))
    assert task.items[0].where == f"{tmp_path / 'test.jsonl'}, line 1"
    assert load_task("gsm8k", tmp_path, few_shot=0).example_files == ()
    moved = write(tmp_path / "elsewhere" / "rows.jsonl", GSM8K)
    assert load_task("gsm8k", moved, few_shot=0).digest() == load_task("gsm8k", tmp_path, few_shot=0).digest()


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("damage", ["missing", "empty", "number", "nothing"])
def test_a_damaged_row_names_its_line(tmp_path, name, damage):
    """Whatever field is wrong, in whatever way, the message names file and line."""
    for field in set(ROWS[name]) - {"subject", "option2"}:
        row = dict(ROWS[name])
        if damage == "missing":
            del row[field]
        else:
            row[field] = {"empty": [], "number": 77.5, "nothing": None}[damage]
        path = write(tmp_path / "rows.jsonl", ROWS[name], row)
        with pytest.raises(aqua.AquaError, match=r"rows.jsonl, line 2: it.* (mend|drop)"):
            load_task(name, path, few_shot=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give a file with questions"),
        (b"\n \n", "is empty"),
        (b'{"a": 1}\n{', "line 2 is not JSON"),
        (b"[1]", "line 1 is no JSON object"),
        (b"[" * 200_000, "line 1 is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_damaged_file_names_the_place(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(aqua.AquaError, match=message):
        read_rows(path, ("test",))


def test_damaged_tables_lists_and_archives(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("x,y\n1,2\n3\n")
    with pytest.raises(aqua.AquaError, match="line 3 has not the 2 columns of the others"):
        read_rows(table, ("test",))
    table.write_text('x,y\n1,"2')
    with pytest.raises(aqua.AquaError, match="cannot be read"):
        read_rows(table, ("test",))
    listed = tmp_path / "a.json"
    listed.write_text('{"x": 1}')
    with pytest.raises(aqua.AquaError, match="is no JSON list"):
        read_rows(listed, ("test",))
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"x": 1}\n' * 50)[:-12])
    with pytest.raises(aqua.AquaError, match="cannot be read"):
        read_rows(cut, ("test",))
    for path, message in ((tmp_path / "none.jsonl", "no such file or folder"), (tmp_path / "a.txt", "must end in")):
        path.write_text("x") if path.suffix == ".txt" else None
        with pytest.raises(aqua.AquaError, match=message):
            read_rows(path, ("test",))
    (tmp_path / "bare").mkdir()
    with pytest.raises(aqua.AquaError, match="it holds no file ending in"):
        read_rows(tmp_path / "bare", ("test",))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("hellaswag", HELLASWAG | {"label": 4}, "none of its 4 answers"),
        ("hellaswag", HELLASWAG | {"label": -1}, "none of its 4 answers"),
        ("hellaswag", HELLASWAG | {"label": True}, "'label' is True"),
        ("hellaswag", HELLASWAG | {"endings": ["a"]}, "no list of 2 to 8 texts"),
        ("hellaswag", HELLASWAG | {"endings": ["a", " "]}, "'endings' is no text"),
        ("hellaswag", HELLASWAG | {"ctx_a": "\ud800"}, "surrogate"),
        ("winogrande", WINOGRANDE | {"answer": "0"}, "none of its 2 answers"),
        ("winogrande", WINOGRANDE | {"answer": "1", "sentence": "no blank"}, "has no blank"),
        ("winogrande", WINOGRANDE | {"answer": "1", "sentence": "at the end _"}, "has no blank"),
        ("arc_easy", ARC | {"answerKey": "4"}, "answerKey '4' is none of its labels"),
        ("truthfulqa", TRUTHFULQA | {"mc1_targets": {"Yes.": 1, "So.": 1}}, "one right answer"),
        ("truthfulqa", TRUTHFULQA | {"mc2_targets": {"Yes.": 1}}, "both true and false"),
        ("truthfulqa", TRUTHFULQA | {"mc2_targets": {"choices": ["a"], "labels": []}}, "list of answers with a label"),
        ("mmlu", MMLU | {"answer": "E"}, "none of its 4 answers"),
        ("mmlu", MMLU | {"answer": "BC"}, "neither a letter nor an index"),
        ("gsm8k", GSM8K | {"answer": "7"}, "no number after '#### '"),
    ],
)
def test_impossible_rows_are_refused(tmp_path, name, row, message):
    with pytest.raises(aqua.AquaError, match=message):
        load_task(name, write(tmp_path / "rows.jsonl", row), few_shot=0)


def test_arguments_out_of_range(tmp_path):
    path = write(tmp_path / "rows.jsonl", GSM8K)
    for arguments, message in (
        ({"name": "hellaswagg"}, "there is no task 'hellaswagg': it must be one of hellaswag, "),
        ({"limit": 0}, "limit is 0"),
        ({"few_shot": -1}, "few_shot is -1"),
        ({"name": "truthfulqa", "few_shot": 2}, "truthfulqa has no examples"),
    ):
        with pytest.raises(aqua.AquaError, match=message):
            load_task(**{"name": "gsm8k", "path": path} | arguments)
