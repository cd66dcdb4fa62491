# SPDX-License-Identifier: Apache-2.0
"""A grid of settings: what its records hold, what is measured again and what is not, and who pays for dense."""

from __future__ import annotations

import json

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.attach.apply import layer_shape
from aqua_attention.config import PAPER
from aqua_attention.evaluate import record as records
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.record import Record, find_record, read_record, record_key, record_path, write_record
from aqua_attention.evaluate.run import Job, facts_of, failure_kind, run_jobs
from aqua_attention.evaluate.setting import Subject, grid_settings
from aqua_attention.evaluate.suites import SUITES, perplexity, retention, retrieval
from aqua_attention.evaluate.suites.grid import Sizes, grid_jobs, sizes_of
from aqua_attention.evaluate.suites.lines import lines_questions
from aqua_attention.evaluate.suites.needle import needle_questions
from aqua_attention.evaluate.suites.perplexity import DenseLogits, evaluate_perplexity
from aqua_attention.evaluate.suites.retention import evaluate_retention
from aqua_attention.evaluate.suites.retrieval import evaluate_retrieval
from aqua_attention.machine import write_profile
from aqua_attention.model.capture import attention_layers
from aqua_attention.report.record_tables import record_table

ESSAY = " ".join(f"w{i % 7} w{i % 11} w{i % 13} w{i % 5}." for i in range(300))
SMALL = {"context": 64, "tokens": 128, "retention_tokens": 64, "lengths": (150,), "depths": (0.0, 1.0)}
SMALL |= {"lines": (3,), "count": 2}
FACTS = {name: "" for name in records.FACTS if name not in ("started", "seconds")}


def key_of(number, suite="perplexity"):
    return record_key(suite, model="m", dtype="float32", config=None, options={"number": number})


def figures(number):
    """A result of the suite "perplexity"."""
    return dict.fromkeys(SUITES["perplexity"].figures, number)


@pytest.fixture
def subject(llama, word_tokenizer):
    model, projections = llama
    return Subject(
        "tiny", model, word_tokenizer, projections, "essay", ESSAY, {"projections_sha256": "0" * 64}, chat=False
    )


def settings_of(**knobs):
    return grid_settings({name: [value] for name, value in PAPER.items()} | {"k_ratio": [0.5]} | knobs)


# Settings


def test_settings_are_every_combination_once():
    settings = settings_of(
        k_ratio=[1, 0.5, 0.5], logit_error=[0.1], h2o_ratio=[1, 0.5], h2o_queries=[8], bits=[None, 8]
    )
    assert len(settings) == 3 * 2 * 2 == len(set(settings))
    assert {s.config.h2o_queries for s in settings if s.config.h2o_ratio == 1} == {None}
    assert {s.config.h2o_queries for s in settings if s.config.h2o_ratio < 1} == {8}
    assert [s.config.logit_error for s in settings[:3]] == [None, None, 0.1]
    with pytest.raises(aqua.AquaError, match="no setting to measure"):
        grid_settings({})
    with pytest.raises(aqua.AquaError, match="s_ratio is 1"):
        settings_of(s_ratio=[1])


# Records


def test_a_record_is_found_by_its_key_and_refused_when_damaged(tmp_path):
    key = key_of(1)
    path = record_path(tmp_path, key)
    assert path.parent == tmp_path / "records"
    assert path.name.startswith("perplexity-") and len(path.stem.split("-")[1]) == 12
    assert path != record_path(tmp_path, key_of(2))
    assert path == record_path(tmp_path, dict(reversed(key.items()))), "the order of fields is no part of a key"
    assert find_record(tmp_path, key) is None
    whole = {"schema": 1} | key | dict.fromkeys(records.FACTS, "") | {"result": figures(2)}
    write_record(tmp_path, Record.of(whole))
    assert find_record(tmp_path, key).to_dict() == whole
    for damage, words in (
        (json.dumps(whole)[:50], "is no whole record"),
        ("[]", "holds no JSON object"),
        (json.dumps(whole | {"schema": 7}), "has schema 7, not 1"),
        (json.dumps({name: value for name, value in whole.items() if name != "device"}), "it has no device"),
        (json.dumps(whole | {"error": {}}), "neither result nor error"),
        (json.dumps(whole | {"result": {"kl": 0.1}}), "no figure perplexity, perplexity_change, top1, mean_k, tokens"),
        (json.dumps(whole | {"result": figures(2) | {"top1": "x"}}), "no figure top1"),
        (json.dumps({name: whole[name] for name in whole if name != "result"} | {"error": {}}), "says no reason"),
        (json.dumps(whole | {"key_weights": [["x"]]}), "its key_weights are no numbers"),
        (json.dumps(whole | {"options": {"number": 5}}), "holds another measurement than its name says"),
    ):
        path.write_text(damage)
        with pytest.raises(aqua.AquaError, match=words) as raised:
            find_record(tmp_path, key)
        assert path.name in str(raised.value)
    with pytest.raises(aqua.AquaError, match="cannot read"):
        read_record(tmp_path)


def test_projections_are_part_of_the_key_unless_the_suite_makes_them():
    given = {"model": "m", "dtype": "float32", "config": None, "options": {}}
    one, two = (record_key("needle", **given, projections_sha256=digit * 64) for digit in "12")
    assert one != two
    one, two = (record_key("context", **given, projections_sha256=digit * 64) for digit in "12")
    assert one == two


def test_facts_name_library_and_machine(llama):
    facts = facts_of(llama[0], "aqua eval grid x")
    assert facts["key_weights"] == llama[1].model["key_weights"]
    assert facts["command"] == "aqua eval grid x"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"] == "cpu" or torch.cuda.is_available()
    assert facts["commit"] is None or len(facts["commit"].removesuffix("-dirty")) == 40


def test_an_installed_copy_has_no_commit(monkeypatch, tmp_path):
    """Its folder may be inside somebody else's repository."""
    package = tmp_path / "lib" / "site" / "aqua_attention"
    package.mkdir(parents=True)
    (tmp_path / "lib" / ".git").mkdir()
    monkeypatch.setattr(records, "__file__", str(package / "evaluate" / "records.py"))
    assert records.commit() is None


# Running


def test_only_what_is_missing_failed_or_damaged_is_measured(tmp_path):
    calls, notices, ticks = [], [], []

    def job(number, failure=None):
        def measure(progress, state):
            calls.append(number)
            progress(1, 2)
            if failure:
                raise failure
            return figures(number)

        return Job(key_of(number), measure)

    def run(jobs):
        calls.clear(), notices.clear(), ticks.clear()
        return run_jobs(tmp_path, jobs, FACTS, progress=lambda *tick: ticks.append(tick), notice=notices.append)

    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    first = run([job(1), job(2, memory), job(3, aqua.AquaError("impossible here")), job(4)])
    assert calls == [1, 2, 3, 4], "a failure does not end the grid"
    assert ticks[:4] == [(0, 4), (0.5, 4), (1, 4), (1, 4)]
    assert ticks[-1] == (4, 4)
    assert first[0].result == figures(1)
    assert first[1].error == {"kind": "out_of_memory", "message": "CUDA out of memory. Tried to allocate 2 GiB"}
    assert first[2].error == {"kind": "error", "message": "impossible here"}
    assert all("result" not in record.to_dict() for record in first[1:3])
    assert [read_record(record_path(tmp_path, key_of(n))) for n in (1, 2, 3, 4)] == first
    record_path(tmp_path, key_of(4)).write_text('{"schema": 1,')
    second = run([job(n) for n in (1, 2, 3, 4)])
    assert calls == [2, 3, 4]
    assert "is no whole record" in notices[0] and "measured again" in notices[0]
    assert f"1 of 4 measurements are in {tmp_path} already" in notices[1]
    assert [record.result["perplexity"] for record in second] == [1, 2, 3, 4]
    assert second[0] == first[0]
    run([job(n) for n in (1, 2, 3, 4)])
    assert (calls, ticks) == ([], [])


def test_a_record_without_its_figures_or_of_other_weights_is_measured_again(tmp_path):
    notices, weights = [], [[0.25, -0.5], [0.125, 1.0]]

    def run(number, key_weights):
        jobs = [Job(key_of(place), lambda *_: figures(number)) for place in (1, 2)]
        notices.clear()
        return run_jobs(tmp_path, jobs, FACTS | {"key_weights": key_weights}, notice=notices.append)

    first = run(1, weights)
    assert first[0].details["key_weights"] == weights
    rounded = [[number + 1e-6 for number in row] for row in weights]
    assert run(2, rounded) == first, "the last digit depends on the number of threads"
    assert run(2, None) == first, "where weights cannot be read, nothing is known"
    other = [[0.25, -0.5], [0.125, 0.9]]
    again = run(3, other)
    assert [record.result["kl"] for record in again] == [3, 3]
    assert notices == [f"2 of 2 measurements in {tmp_path} are of other weights; they are made again now"]
    assert run(4, other[:1])[0].result["kl"] == 4, "another number of layers"
    path = record_path(tmp_path, key_of(1))
    path.write_text(path.read_text().replace('"kl"', '"lk"'))
    assert [record.result["kl"] for record in run(5, other[:1])] == [5, 4]
    assert "no figure kl" in notices[0] and "measured again" in notices[0]


def test_what_is_done_stays_when_a_run_ends_and_a_defect_is_not_recorded(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    def defect(*_):
        raise RuntimeError("a defect")

    good = Job(key_of(1), lambda *_: figures(1))
    for end, error in ((stop, KeyboardInterrupt), (defect, RuntimeError)):
        with pytest.raises(error):
            run_jobs(tmp_path, [good, Job(key_of(2), end)], FACTS)
        assert [path.name for path in (tmp_path / "records").iterdir()] == [record_path(tmp_path, key_of(1)).name]


def test_a_folder_that_cannot_be_is_an_error_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    with pytest.raises(aqua.AquaError, match="cannot make the folder"):
        run_jobs(tmp_path / "file", [Job(key_of(1), lambda *_: calls.append(1) or {})], FACTS)
    assert calls == []


def test_kinds_of_failure():
    assert failure_kind(torch.OutOfMemoryError("x")) == "out_of_memory"
    assert failure_kind(MemoryError()) == "out_of_memory"
    assert failure_kind(aqua.AquaError("x")) == "error"
    assert failure_kind(RuntimeError("shapes cannot be multiplied")) is None
    assert failure_kind(KeyError("x")) is None
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert failure_kind(raised.value) == "out_of_memory", "torch's own words on this system's processor"


# Suites


def run_suite(tmp_path, subject, suite, settings, **changes):
    jobs = grid_jobs(subject, [suite], settings, sizes_of(False, **SMALL | changes))
    return run_jobs(tmp_path, jobs, FACTS)


def test_perplexity_records_are_the_rows_of_one_evaluation_and_dense_is_computed_once(tmp_path, subject, monkeypatch):
    settings = settings_of(k_ratio=[1, 0.25], basis=["aqua", "none"])
    windows = subject.windows(128, 64)
    expected = evaluate_perplexity(subject, settings, windows)
    dense_passes, original = [], perplexity._logits

    def counted(model, tokens, attachment=None):
        if attachment is None:
            dense_passes.append(tokens)
        return original(model, tokens, attachment)

    monkeypatch.setattr(perplexity, "_logits", counted)
    dense, *found = run_suite(tmp_path, subject, "perplexity", settings)
    assert len(dense_passes) == 2, "one for each window"
    assert (dense.setting, dense.details["projections_sha256"]) == (None, None)
    assert dense.result["perplexity"] == expected["dense"]["perplexity"]
    assert dense.options == {"data": "essay", "context": 64, "tokens": 128, "scored": "all"}
    for record, row in zip(found, expected["rows"], strict=True):
        assert (record.setting, record.basis) == (row["setting"], row["basis"])
        result = record.result | {"setting": row["setting"], "basis": row["basis"]}
        assert result == row | {"dense": expected["dense"], "scored": "all"}
        assert record.details["projections_sha256"] == "0" * 64
    assert found[1].result["kl"] > 0.1


def test_dense_logits_are_kept_within_their_bytes_and_of_the_windows_asked_for(llama):
    model = llama[0]
    windows = torch.arange(2, 66).reshape(2, 32)
    one = 31 * 97 * 4
    kept, none = DenseLogits(), DenseLogits(most_bytes=one - 1)
    first = kept.of(model, windows, 0)
    assert first.nbytes == one
    assert kept.of(model, windows, 0).data_ptr() == kept.of(model, windows, 0).data_ptr()
    assert torch.equal(none.of(model, windows, 0), first)
    assert none.of(model, windows, 0).data_ptr() != first.data_ptr()
    other = kept.of(model, windows.flip(0), 0)
    assert not torch.equal(other, first)
    assert torch.equal(other, kept.of(model, windows, 1))


def test_min_length_is_a_knob_and_auto_a_number_in_the_key(tmp_path, subject, monkeypatch):
    layer = attention_layers(subject.model)[0]
    shape = layer_shape(layer, subject.model.dtype)
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    write_profile(shape, {0.25: 40}, [32, 64], {})
    settings = settings_of(k_ratio=[0.25], min_length=[0, 40, "auto"])
    _, whole, short = run_suite(tmp_path, subject, "perplexity", settings)
    assert [record.setting["min_length"] for record in (whole, short)] == [0, 40], "auto is 40, and each once"
    assert short.result["kl"] < whole.result["kl"]
    write_profile(shape, {0.25: 64}, [32, 64], {})
    found = run_suite(tmp_path, subject, "perplexity", settings_of(k_ratio=[0.25], min_length=["auto"]))
    assert found[1].setting["min_length"] == 64
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path / "none"))
    with pytest.raises(aqua.AquaError, match='min_length is "auto", but this machine has no profile'):
        grid_jobs(subject, ["perplexity"], settings_of(min_length=["auto"]), sizes_of(False, **SMALL))


def test_where_one_setting_evicts_all_are_scored_alike(tmp_path, subject):
    alone = run_suite(tmp_path, subject, "perplexity", settings_of())
    dense, whole, evicting = run_suite(tmp_path, subject, "perplexity", settings_of(h2o_ratio=[1, 0.25]))
    assert {record.options["scored"] for record in (dense, whole, evicting)} == {"second half"}
    assert {record.result["tokens"] for record in (dense, whole, evicting)} == {2 * 31}
    assert whole.result["dense"] == evicting.result["dense"]
    assert alone[1].result["tokens"] == 2 * 63
    assert evicting.result["kl"] > whole.result["kl"]


def test_retention_records_are_the_rows_of_one_pass(tmp_path, subject, monkeypatch):
    passes = []

    def counted(*args, **options):
        passes.append(options)
        return evaluate_retention(*args, **options)

    monkeypatch.setattr(retention, "evaluate_retention", counted)
    settings = settings_of(k_ratio=[0.75, 0.25], selection=["magnitude", "weighted"], h2o_ratio=[1, 0.5])
    found = run_suite(tmp_path, subject, "retention", settings)
    assert len(passes) == 1
    expected = evaluate_retention(
        *(subject, subject.windows(64, 64)),
        k_ratios=[0.75, 0.25],
        selections=["magnitude", "weighted"],
    )["rows"]
    assert [record.result for record in found] == expected, "eviction is nothing that retention looks at"
    assert {record.setting["h2o_ratio"] for record in found} == {1.0}


@pytest.mark.parametrize("suite", ["needle", "lines"])
def test_retrieval_records_count_cells_and_dense_answers_once(suite, tmp_path, subject, monkeypatch):
    """Dense right on every question, AQUA on none but the first."""
    if suite == "lines":
        questions = lines_questions(3, count=2, seed=0)
    else:
        questions = needle_questions(subject, Sizes(lengths=(150,), depths=(0.0, 1.0)))
    asked = {None: 0, "aqua": 0}

    def answer(model, tokenizer, token_ids, *, max_new_tokens, attachment=None):
        who = None if attachment is None else "aqua"
        place = asked[who] % len(questions)
        asked[who] += 1
        if attachment is not None:
            attachment.on_selection(0, None, torch.Size((1, 4, 1, 8)), 16)
        right = attachment is None or place == 0
        return Continuation(questions[place].expected[0] if right else "none", [place])

    monkeypatch.setattr(retrieval, "continue_tokens", answer)
    dense, half, evicting = run_suite(tmp_path, subject, suite, settings_of(h2o_ratio=[1, 0.5]))
    assert asked == {None: 2, "aqua": 4}
    assert (dense.result["right"], dense.result["asked"]) == (2, 2)
    assert half.setting["h2o_ratio"] == 1
    assert evicting.setting["h2o_ratio"] == 0.5
    figures = {"right": 1, "asked": 2, "lost": 1, "gained": 0, "p_value": 1.0}
    assert figures.items() <= half.result.items()
    if suite == "lines":
        assert half.result["cells"] == [{"lines": 3, "depth": None, "right": 1, "asked": 2}]
        assert half.details["text_sha256"] is None
    else:
        cells = [{"length": 150, "depth": depth, "right": right, "asked": 1} for depth, right in ((0.0, 1), (1.0, 0))]
        assert half.result["cells"] == cells
    assert half.details["seed"] == 0


def test_the_needle_under_eviction_is_what_the_suite_measures_by_itself(tmp_path, subject):
    settings = settings_of(k_ratio=[1], h2o_ratio=[1, 0.25])
    questions = needle_questions(subject, Sizes(lengths=SMALL["lengths"], depths=SMALL["depths"]))
    expected = evaluate_retrieval(subject, settings, questions)["rows"]
    _, full, evicting = run_suite(tmp_path, subject, "needle", settings)
    assert full.result["same_answer"] == expected[0]["same_answer"] == 1
    assert evicting.result["same_answer"] == expected[1]["same_answer"] < 1


def test_an_impossible_setting_is_recorded_and_the_table_says_so(tmp_path, subject):
    dense, good, refused = run_suite(tmp_path, subject, "perplexity", settings_of(s_ratio=[0, 0.99]))
    assert dense.result and good.result
    assert refused.error["kind"] == "error"
    assert "s_ratio 0.99 stores none of 16 key dimensions" in refused.error["message"]
    _, rows = record_table([dense, good, refused])
    assert rows[0][:2] == ["perplexity", "dense"]
    assert f"{good.result['perplexity']:.3f}" in rows[1][2]
    assert f"{good.result['perplexity_change']:+.2%}" == rows[1][3]
    assert rows[2][1:] == ["k_ratio 0.5, s_ratio 0.99", "refused", "", refused.error["message"]]


def test_a_suite_that_cannot_be_is_an_error_at_once(subject, llama):
    with pytest.raises(aqua.AquaError, match="suite is 'speed': it must be one of perplexity, retention, needle"):
        grid_jobs(subject, ["speed"], settings_of(), sizes_of(False))
    for suites_given in (["retention"], ["perplexity", "retention"]):
        with pytest.raises(aqua.AquaError, match="retention measures k_ratios only, and every setting has a logit_e"):
            grid_jobs(subject, suites_given, grid_settings({"logit_error": [0.1]}), sizes_of(False, **SMALL))
    with pytest.raises(aqua.AquaError, match="fewer than one window of 2048"):
        grid_jobs(subject, ["perplexity"], settings_of(), sizes_of(False))
    other = aqua.Projections(
        llama[1].layers, llama[1].statistics, {**llama[1].model, "shape": {"model_type": "other", "layers": []}}
    )
    wrong = Subject("tiny", llama[0], subject.tokenizer, other, data="essay", text=ESSAY)
    with pytest.raises(aqua.AquaError, match="these projections are for other"):
        grid_jobs(wrong, ["perplexity"], settings_of(), sizes_of(False, **SMALL))


def test_quick_is_smaller_and_gives_way_to_what_is_given():
    quick, full = sizes_of(True), sizes_of(False)
    assert quick.tokens < full.tokens
    assert max(quick.lengths) < max(full.lengths)
    assert sizes_of(True, context=8, lengths=None).context == 8
    assert sizes_of(True, lengths=None).lengths == quick.lengths
