# SPDX-License-Identifier: Apache-2.0
"""Tasks: what the model answers, what an answer is worth, and a run that goes on where it was killed."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.tasks import answers as task_answers
from aqua_attention.evaluate.tasks import run as tasks
from aqua_attention.evaluate.tasks.answers import Answers, answer_items, check_items
from aqua_attention.evaluate.tasks.formats import ChoiceItem, Task, WrittenItem
from aqua_attention.evaluate.tasks.run import METRICS, evaluate_tasks
from aqua_attention.machine import Shape, write_profile
from aqua_attention.model.capture import attention_layers
from aqua_attention.report.tables import tasks_table
from conftest import subject_of


def words(first, count):
    return " ".join(f"w{(7 * number + first) % 90}" for number in range(count))


def choice(seed, lengths=(1, 3, 2), context=12, right=0, **more):
    texts = [words(seed + 31 * place, length) for place, length in enumerate(lengths, 1)]
    contexts = (words(seed, context + seed % 5),) * len(texts)
    return ChoiceItem(contexts, tuple(f" {text}" for text in texts), right, f"{contexts[0]} {texts[right]}", **more)


CHOICES = [choice(seed, right=seed % 3) for seed in range(10)]
LETTERS = choice(5, lengths=(1, 1, 1, 1))
WRITTEN = [WrittenItem(words(seed, 4 + 3 * seed), "7", "") for seed in range(3)]


def task(items, *metrics, name="made"):
    return Task(name, "made.jsonl", tuple(items), metrics, 0)


def naive(model, tokenizer, context, continuation):
    """Log-likelihood from one whole, unpadded forward pass."""
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    return float(sum(log_p[place - 1, ids[0, place]] for place in range(start, ids.shape[1])))


@pytest.fixture
def short_answers(monkeypatch):
    """Because the tiny model knows 256 positions only."""
    monkeypatch.setattr(task_answers, "NEW_TOKENS", 6)


# What the model answers


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
def test_log_likelihoods_are_those_of_one_answer_alone(tiny, word_tokenizer, monkeypatch, at_once):
    """Whatever the padding, and where answers share what the model reads."""
    monkeypatch.setattr(task_answers, "TOKENS_AT_ONCE", at_once)
    model, _ = tiny
    items = [*CHOICES[:4], LETTERS]
    (found,) = answer_items(model, word_tokenizer, items, [None])
    expected = [
        [naive(model, word_tokenizer, *pair) for pair in zip(item.contexts, item.continuations, strict=True)]
        for item in items
    ]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-3)


def test_answers_that_differ_in_their_last_token_are_read_once(llama, word_tokenizer, monkeypatch):
    model, read = llama[0], []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **more: read.append(input_ids.shape) or forward(input_ids))
    list(answer_items(model, word_tokenizer, [LETTERS], [None]))
    assert read == [(1, 12)]


def test_aqua_acts_on_log_likelihoods(tiny, word_tokenizer):
    model, projections = tiny
    configs = [aqua.AquaConfig.paper(k_ratio=ratio) for ratio in (1, 0.25)]
    configs.append(aqua.AquaConfig.paper(k_ratio=1, sink=1, recent=4))
    runs = [None, *(aqua.apply(model, projections, config) for config in configs)]
    dense, full, quarter, window = (torch.tensor(rows) for rows in answer_items(model, word_tokenizer, CHOICES, runs))
    assert torch.allclose(full, dense, atol=1e-3)
    assert torch.allclose(window, dense, atol=1e-3)
    assert (quarter - dense).abs().max() > 0.1


def test_what_a_cache_forgets_or_rounds_counts(llama, word_tokenizer):
    model, projections = llama
    changes = [{"bits": 8}, {"h2o_ratio": 0.3}, {"h2o_ratio": 1.0}]
    runs = [None, *(aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1, **change)) for change in changes)]
    items = [choice(seed, lengths=(4, 5), context=200) for seed in range(3)]
    dense, rounded, evicted, whole = (torch.tensor(rows) for rows in answer_items(model, word_tokenizer, items, runs))
    assert torch.allclose(whole, dense, atol=1e-3)
    assert 1e-4 < (rounded - dense).abs().max() < 1
    assert (evicted - dense).abs().max() > 0.1
    # One token is decided before anything is evicted.
    (one,) = answer_items(model, word_tokenizer, [LETTERS], runs[2:3])
    (same,) = answer_items(model, word_tokenizer, [LETTERS], [None])
    assert one[0] == pytest.approx(same[0], abs=1e-3)


def test_a_padded_batch_writes_what_each_prompt_alone_does(llama, word_tokenizer, short_answers):
    model, projections = llama
    runs = [None, aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1)), aqua.apply(model, projections)]
    together = list(answer_items(model, word_tokenizer, WRITTEN, runs))
    alone = [[texts[0] for texts in answer_items(model, word_tokenizer, [item], runs)] for item in WRITTEN]
    assert together == [list(texts) for texts in zip(*alone, strict=True)]
    assert together[0] == together[1]
    assert all(len(text.split()) == 6 for text in together[0])


def test_aqua_acts_on_what_is_written(llama, word_tokenizer, short_answers):
    model, projections = llama
    quarter = aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25))
    dense, other = answer_items(model, word_tokenizer, WRITTEN, [None, quarter])
    assert dense != other


def test_a_stop_ends_the_answer(word_tokenizer, monkeypatch):
    """Of two rows one holds a stop, over several tokens; the prompt's own does not count."""
    monkeypatch.setattr(task_answers, "STOPS", ("w7 w8",))
    stops = task_answers._Stops(word_tokenizer, 2)
    ids = word_tokenizer(["w7 w8 w7 w1", "w1 w1 w7 w8"])["input_ids"]
    assert stops(torch.tensor(ids), None).tolist() == [False, True]
    assert task_answers._cut("w1 w7 w8 w2 w7 w8") == "w1 "
    assert task_answers._cut("w1 w7") == "w1 w7"


def test_impossible_questions_are_refused(llama, word_tokenizer):
    model, _ = llama
    long = choice(0, context=301, lengths=(1, 1), where="a.jsonl, line 3")
    with pytest.raises(aqua.AquaError, match=r"made, a.jsonl, line 3: .* 302 tokens .* 256 positions: drop it, or ask"):
        check_items(model, word_tokenizer, task([*CHOICES, long]))
    with pytest.raises(aqua.AquaError, match="model knows 256 positions: ask with fewer"):
        check_items(model, word_tokenizer, replace(task([WRITTEN[0]]), few_shot=5))
    with pytest.raises(aqua.AquaError, match="leaves nothing of the answer ' '"):
        check_items(model, word_tokenizer, task([ChoiceItem(("w1",), (" ",), 0, "")]))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = float("nan")
    with pytest.raises(aqua.AquaError, match="gives NaN"):
        list(answer_items(broken, word_tokenizer, [ChoiceItem(("w1 w48 w2",), (" w3",), 0, "")], [None]))


def test_a_question_that_is_too_long_is_known_before_the_first_answer(llama, word_tokenizer, monkeypatch):
    model, projections = llama
    asked = []
    monkeypatch.setattr(tasks, "answer_items", lambda *given: asked.append(given))
    both = [task(CHOICES, "acc", name="a"), task([choice(0, context=301)], "acc", name="b")]
    with pytest.raises(aqua.AquaError, match=r"^b, a question: the question takes"):
        evaluate_tasks(subject_of(model, projections, word_tokenizer), [Setting(aqua.AquaConfig.paper())], both)
    assert asked == []


# What an answer is worth


def test_metrics_by_hand():
    item = ChoiceItem(("c",) * 3, (" aa", " bbbb", " ü"), 1, "")
    assert METRICS["acc"](item, [-2.0, -3.0, -4.0]) == 0
    assert METRICS["acc_norm"](item, [-2.0, -3.0, -4.0]) == 1, "-1, -0.75 and -2 a byte"
    assert METRICS["acc"](item, [-4.0, -3.0, -4.0]) == 1
    assert METRICS["acc"](item, [-3.0, -3.0, -4.0]) == 0, "among equals the first is taken"
    true = ChoiceItem(("c",) * 4, (" a", " b", " c", " d"), 0, "", (0, 1), (True, False, True, None))
    logs = [math.log(p) for p in (0.2, 0.1, 0.5, 0.9)]
    assert METRICS["mc1"](true, logs) == 1, "only the first two are offered"
    assert METRICS["mc2"](true, logs) == pytest.approx(7 / 8)
    assert METRICS["mc2"](true, [log - 5000 for log in logs]) == pytest.approx(7 / 8)
    written = WrittenItem("p", "12", "")
    assert [METRICS["exact_match"](written, text) for text in ("so #### 12.", "12", "#### 13 #### 12")] == [1, 0, 0]


def scripted(monkeypatch, *columns):
    """Answers by question: what dense and each setting say, as right or wrong."""
    place = iter(range(100))

    def answers(model, tokenizer, items, attachments):
        first = next(place)
        for column in columns[: len(attachments)]:
            yield [[float(good), 0.5] for good in column[first * len(items) : (first + 1) * len(items)]]

    monkeypatch.setattr(tasks, "answer_items", answers)


def test_the_figures_count_pairs(llama, word_tokenizer, monkeypatch):
    """Dense right on 0, 1, 2; AQUA right on 0, 3."""
    model, projections = llama
    scripted(monkeypatch, (1, 1, 1, 0), (1, 0, 0, 1))
    made = task([choice(seed, lengths=(1, 1)) for seed in range(4)], "acc")
    ticks = []
    config = aqua.AquaConfig.paper(k_ratio=0.5)
    result = evaluate_tasks(
        *(subject_of(model, projections, word_tokenizer), [Setting(config)], [made]),
        batch=2,
        progress=lambda done, total: ticks.append((done, total)),
    )
    stderr = math.sqrt(3 / 4 * 1 / 4 / 3)
    assert result["dense"] == [
        {"task": "made", "metric": "acc", "value": 0.75, "stderr": pytest.approx(stderr), "count": 4}
    ]
    (row,) = result["rows"]
    assert row == {
        "setting": config.to_dict(),
        "basis": "aqua",
        "task": "made",
        "metric": "acc",
        "value": 0.5,
        "stderr": pytest.approx(math.sqrt(1 / 4 / 3)),
        "count": 4,
        "dense": 0.75,
        "lost": 2,
        "gained": 1,
        "p_value": 1.0,
        "outside_window": 1.0,
    }
    assert result["tasks"]["made"] == {
        "path": "made.jsonl",
        "files": [],
        "example_files": [],
        "questions": 4,
        "few_shot": 0,
        "mean_tokens": 14.5,
        "sha256": made.digest(),
    }
    assert ticks[0] == (0, 8)
    assert ticks[-1] == (8, 8)
    assert ticks == sorted(ticks)
    assert tasks_table(result)[1] == [
        ["made", "acc", "4", "dense", "", "75.0% ± 25.0%", "", "", "", ""],
        ["", "", "", "k_ratio 0.5", "100%", "50.0% ± 28.9%", "-25.0", "2", "1", "1"],
    ]


def test_mc2_is_compared_by_sign_and_rounding_is_a_tie(llama, word_tokenizer, monkeypatch):
    model, projections = llama
    items = [choice(seed, lengths=(1, 1), offered=(0, 1), true=(True, False)) for seed in range(8)]
    scripted(monkeypatch, (0.5,) * 8, (0.4,) * 6 + (0.500001, 0.6))
    (row,) = evaluate_tasks(
        subject_of(model, projections, word_tokenizer), [Setting(aqua.AquaConfig.paper())], [task(items, "mc2")]
    )["rows"]
    assert (row["lost"], row["gained"], row["p_value"]) == (6, 1, pytest.approx(2 * 8 / 128))
    assert row["dense"] == 0.5


def test_at_k_ratio_1_every_figure_is_the_dense_one(tiny, word_tokenizer, short_answers):
    model, projections = tiny
    several = [choice(seed, lengths=(1, 1, 1), offered=(0, 1), true=(True, False, True)) for seed in range(10)]
    asked = [
        task(CHOICES, "acc", "acc_norm", name="a"),
        task(several, "mc1", "mc2", name="b"),
        task(WRITTEN, "exact_match", name="c"),
    ]
    settings = [Setting(aqua.AquaConfig.paper(k_ratio=ratio)) for ratio in (1, 0.25)]
    rows = evaluate_tasks(subject_of(model, projections, word_tokenizer), settings, asked)["rows"]
    assert [(row["task"], row["metric"]) for row in rows[:5]] == [
        *(("a", "acc"), ("a", "acc_norm"), ("b", "mc1"), ("b", "mc2"), ("c", "exact_match"))
    ]
    for row in rows[:5]:
        assert (row["lost"], row["gained"], row["p_value"]) == (0, 0, 1)
        assert row["value"] == pytest.approx(row["dense"], abs=1e-4)
    mass = rows[8]
    assert mass["metric"] == "mc2"
    assert mass["lost"] + mass["gained"] > 5, "a quarter of the dimensions must move these probabilities"


def test_what_lies_outside_the_window_is_said(llama, word_tokenizer, monkeypatch):
    """Prompts of 13 and 14 tokens, of which 12 are exact: 1 and 3 of 91 and 105 pairs are not."""
    scripted(monkeypatch, (1, 1), (1, 1), (1, 1))
    settings = [Setting(aqua.AquaConfig.paper(sink=2, recent=recent)) for recent in (10, 12)]
    made = task([choice(seed, lengths=(1, 1)) for seed in range(2)], "acc")
    rows = evaluate_tasks(subject_of(llama[0], llama[1], word_tokenizer), settings, [made])["rows"]
    assert [row["outside_window"] for row in rows] == [pytest.approx(4 / 196), 0]


def test_short_queries_lie_inside_the_window(llama, word_tokenizer, monkeypatch):
    """Of prompts of 13 and 14 tokens: only the 14th token sees 14, of which 12 are exact; none sees 15."""
    scripted(monkeypatch, *[(1, 1)] * 5)
    configs = [aqua.AquaConfig.paper(sink=2, recent=10, min_length=length) for length in (0, 12, 14, 15)]
    made = task([choice(seed, lengths=(1, 1)) for seed in range(2)], "acc")
    rows = evaluate_tasks(
        subject_of(llama[0], llama[1], word_tokenizer), [Setting(config) for config in configs], [made]
    )["rows"]
    assert [row["outside_window"] * 196 for row in rows] == pytest.approx([4, 4, 2, 0])


def test_min_length_auto_is_a_number_in_rows_and_state(llama, word_tokenizer, monkeypatch, tmp_path):
    """A profile measured again must not let a run go on with answers of the old one."""
    model, projections = llama
    layer = attention_layers(model)[0]
    shape = Shape(
        torch.device("cpu"), layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, model.dtype
    )
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    write_profile(shape, {0.25: 6}, [4, 8], {})
    given = (
        subject_of(model, projections, word_tokenizer),
        [Setting(aqua.AquaConfig.paper(k_ratio=0.25, min_length="auto"))],
    )
    result = evaluate_tasks(*given, [task(CHOICES, "acc")], state=tmp_path / "state")
    assert result["rows"][0]["setting"]["min_length"] == 6
    assert 0 < result["rows"][0]["outside_window"] < 1
    write_profile(shape, {0.25: 8}, [4, 8], {})
    with pytest.raises(aqua.AquaError, match="differs in settings"):
        evaluate_tasks(*given, [task(CHOICES, "acc")], state=tmp_path / "state")


def test_wrong_requests(llama, word_tokenizer):
    model, projections = llama
    made = task(CHOICES, "acc")
    for asked, batch, message in (
        ([], 8, "the tasks are none"),
        ([made, made], 8, "made, made: give at least one, and each once"),
        ([made], 0, "batch is 0"),
    ):
        with pytest.raises(aqua.AquaError, match=message):
            evaluate_tasks(subject_of(model, projections, word_tokenizer), [], asked, batch=batch)


# A run that is stopped


@pytest.fixture
def run(llama, word_tokenizer, short_answers):
    """Run two tasks under one setting, with or without a state; returns result and batches asked."""
    model, projections = llama
    asked = [task(CHOICES, "acc", name="a"), task(WRITTEN, "exact_match", name="c")]

    def run(state, stop_at=None, config=None, **more):
        calls = []

        def progress(done, total):
            calls.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        settings = [Setting(config or aqua.AquaConfig.paper(k_ratio=0.25))]
        given = {"tasks": asked, "batch": 2} | more
        result = evaluate_tasks(
            *(subject_of(model, projections, word_tokenizer), settings), state=state, progress=progress, **given
        )
        return result, calls

    return run


@pytest.mark.parametrize("stop_at", [0, 2, 4, 6, 20, 22, 24, 26])
def test_a_stopped_run_goes_on_and_ends_the_same(run, tmp_path, stop_at):
    expected, _ = run(None)
    state = tmp_path / "answers.json"
    with pytest.raises(KeyboardInterrupt):
        run(state, stop_at)
    kept = json.loads(state.read_text())["answers"]
    assert sum(map(len, kept.values())) <= stop_at / 2
    assert sum(map(len, kept.values())) >= stop_at / 2 - 2, "all whole batches are kept"
    result, calls = run(state)
    assert result == expected
    assert calls[0] == 2 * sum(map(len, kept.values())), "what was answered is not asked again"
    again, calls = run(state)
    assert again == expected
    assert calls[0] == calls[-1] == 26
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]


def test_a_state_of_another_run_is_refused(run, tmp_path, llama, word_tokenizer):
    state = tmp_path / "answers.json"
    run(state)
    for changes, what in (
        ({"config": aqua.AquaConfig.paper(k_ratio=0.5)}, "settings"),
        ({"batch": 4}, "batch"),
        ({"tasks": [task(CHOICES[1:], "acc", name="a")]}, "the questions of a"),
    ):
        with pytest.raises(aqua.AquaError, match=f"is of another run, which differs in {what}: repeat"):
            run(state, **changes)
    other = copy.deepcopy(llama[0])
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.k_proj.weight *= torch.linspace(0.97, 1.03, 64)
    with pytest.raises(aqua.AquaError, match="differs in key_weights"), pytest.warns(UserWarning):
        evaluate_tasks(
            *(subject_of(other, llama[1], word_tokenizer), [Setting(aqua.AquaConfig.paper(k_ratio=0.25))]),
            [task(CHOICES, "acc", name="a"), task(WRITTEN, "exact_match", name="c")],
            batch=2,
            state=state,
        )


def test_tasks_may_join_and_be_left_out(run, tmp_path):
    state = tmp_path / "answers.json"
    whole, _ = run(None)
    first, second = task(CHOICES, "acc", name="a"), task(WRITTEN, "exact_match", name="c")
    run(state, tasks=[second])
    result, calls = run(state, tasks=[first])
    assert calls[0] == 0
    assert [row["task"] for row in result["rows"]] == ["a"]
    result, calls = run(state)
    assert result == whole
    assert calls[0] == 26, "both were answered before"


def test_a_damaged_state_is_refused(run, tmp_path):
    state = tmp_path / "answers.json"
    run(state)
    content = json.loads(state.read_text())
    for text, message in (
        ("", "holds no answers of `aqua eval tasks`"),
        ("[1]", "holds no answers"),
        ('{"aqua_attention_answers": 1}', "holds no answers"),
        (json.dumps(content | {"aqua_attention_answers": 9}), "format version 9"),
        (json.dumps(content | {"answers": {}}), "changed after it was written"),
    ):
        state.write_text(text)
        with pytest.raises(aqua.AquaError, match=message):
            run(state)


def test_answers_are_kept_while_the_run_goes_on(tmp_path):
    path = tmp_path / "answers.json"
    what = {"x": 1, "tasks": {"a": "1"}}
    answers = Answers(what, path, seconds=0)
    answers.add("a", [[[0.1 + 0.2], "text"]])
    assert Answers(what, path).of_task == {"a": [[[0.1 + 0.2], "text"]]}
    seldom = Answers(what, path, seconds=60)
    seldom.add("a", [[[1.0], ""]])
    assert len(Answers(what, path).of_task["a"]) == 1
    seldom.save()
    assert len(Answers(what, path).of_task["a"]) == 2
