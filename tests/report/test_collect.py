# SPDX-License-Identifier: Apache-2.0
"""Results are read and checked: what is damaged or foreign is named with its reason, and nothing else is lost."""

from __future__ import annotations

import json

import pytest
import samples

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import write_result
from aqua_attention.report.collect import collect
from aqua_attention.report.tables import describe_setting

HALF = AquaConfig.paper(k_ratio=0.5)
GOOD = samples.record("perplexity", HALF, samples.losses(0.5))


def test_every_suite_is_read(tmp_path):
    found = collect(samples.write(tmp_path))
    assert not found.unused
    suites = {record.suite for record in found.records}
    grid = {"perplexity", "retention", "needle", "lines", "ruler", "tasks", "transfer", "context"}
    assert suites == grid | {"select", "decode", "generate", "serve", "memory", "spectrum", "breakeven"}
    assert sorted(record.error["kind"] for record in found.failed) == ["error", "out_of_memory"]
    # Dense first, then fewer and fewer dimensions.
    perplexity = [record.setting for record in found.records if record.suite == "perplexity"]
    assert perplexity[0] is None
    assert [setting["k_ratio"] for setting in perplexity[1:5]] == [1.0, 0.75, 0.5, 0.25]


def test_an_empty_folder_and_a_missing_one_are_errors_with_a_remedy(tmp_path):
    with pytest.raises(AquaError, match="holds no results: run `aqua eval grid"):
        collect(tmp_path)
    # What the report wrote itself is no result.
    own = {"settings": {}, "failed": [], "unused": [], "written": []}
    (tmp_path / "report.json").write_text(json.dumps(own))
    with pytest.raises(AquaError, match="holds no results: run `aqua eval grid"):
        collect(tmp_path)
    with pytest.raises(AquaError, match="is no folder"):
        collect(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "it is no JSON"),
        (b"", "it is no JSON"),
        (b"\xff\xfe\x00", "it is no text in UTF-8"),
        (b"[" * 100_000, "it is nested too deep"),
        (b"[1, 2]", "it holds a list, not an object"),
        (b'{"name": "package"}', "it is no result of this library"),
        (b'{"rows": [{"name": "x"}]}', "its keys are those of no benchmark"),
        (b'{"results": [3]}', "one of its results is no object"),
        (b'{"records": [3]}', "its records are not all objects"),
        (b'{"questions": 3, "rows": [{}]}', "its questions are damaged"),
        (
            b'{"questions": [{"length": [1], "correct": [true]}], "rows": [{}]}',
            "length, depth or lines [1], not a number",
        ),
        (b'{"rows": [{"perplexity": 2.0, "perplexity_change": 0.1, "kl": 0.1, "setting": {}}]}', "its dense is None"),
        (b'{"breakeven": [{"k_ratio": 1}], "rows": [{"length": 1, "aqua": 3}]}', "has aqua 3, not a list of numbers"),
        (b'{"layers": [{"layer": 0, "head_dim": 64, "dims_90": "x"}]}', "has dims_90 'x', not a list of numbers"),
    ],
)
def test_a_file_that_is_no_result_is_named_with_its_reason(tmp_path, content, reason):
    samples.write(tmp_path, values=[GOOD], files={})
    (tmp_path / "odd.json").write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    found = collect(tmp_path)
    assert len(found.records) == 1
    assert [name for name, _ in found.unused] == ["folder.json", "odd.json"]
    assert reason in found.unused[1][1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "its schema is 2, this version reads 1"),
        ({"suite": "speed"}, "its suite is 'speed': it must be one of perplexity, "),
        ({"model": None}, "its model is None, not a text"),
        ({"options": []}, "its options is [], not an object"),
        ({"result": None}, "either a result or an error"),
        ({"error": {"kind": "error", "message": "x"}}, "either a result or an error"),
        ({"result": None, "error": {"kind": "error"}}, "its error has no message"),
        ({"result": [1]}, "its result is [1], not an object"),
        ({"config": {"k_ratio": 7}}, "its config is wrong: k_ratio is 7"),
        ({"config": {"k_ratio": 0.5, "wings": 2}}, "fields that this version does not know: wings"),
        ({"config": 3}, "its config is 3, not an object"),
        ({"result": samples.losses(0.5) | {"kl": "small"}}, "its kl is 'small', not a number"),
        ({"result": samples.losses(0.5) | {"kl": True}}, "its kl is True, not a number"),
        ({"result": samples.losses(0.5) | {"perplexity": 10**400}}, "its perplexity is 1000"),
        ({"result": {"perplexity": 1.0}}, "its result has no perplexity_change"),
        ({"suite": "needle", "result": {"right": 1, "asked": 2}}, "its result has no lost"),
        ({"suite": "needle", "config": None, "result": {"right": 1, "asked": 2}}, "its cells is None"),
        (
            {"suite": "needle", "config": None, "result": {"right": 1, "asked": 2, "cells": [{"length": "long"}]}},
            "a row of its cells has length 'long', not a number",
        ),
        ({"suite": "transfer"}, "its calibrated is None, not a text"),
    ],
)
def test_a_record_with_a_wrong_field_is_named_with_its_reason(tmp_path, changes, reason):
    samples.write(tmp_path, values=[GOOD | changes], files={})
    found = collect(tmp_path)
    assert not found.records
    ((name, why),) = found.unused
    assert name.startswith("records/")
    assert reason in why


def test_records_in_one_file_and_in_their_own_count_once(tmp_path):
    samples.write(tmp_path, values=[GOOD], files={"all.json": {"records": [GOOD, GOOD | {"model": "other"}]}})
    assert [record.model for record in collect(tmp_path).records] == ["tiny", "other"]


def test_a_newer_success_replaces_the_failure_that_another_file_still_has(tmp_path):
    failure = {"kind": "error", "message": "too long"}
    old = samples.record("perplexity", HALF, error=failure, started="2025-01-02T03:04:05+00:00", commit="0" * 40)
    samples.write(tmp_path, values=[GOOD], files={"all.json": {"records": [old]}})
    found = collect(tmp_path)
    assert not found.failed
    assert [record.source.split("/")[0] for record in found.records] == ["records"]
    (tmp_path / "all.json").write_text(json.dumps({"records": [old | {"started": "2027-01-02T03:04:05+00:00"}]}))
    found = collect(tmp_path)
    assert (len(found.records), len(found.failed)) == (0, 1)


def test_figures_of_different_seeds_and_texts_both_count(tmp_path):
    values = [GOOD, GOOD | {"seed": 1}, GOOD | {"text_sha256": "3" * 64}, GOOD | {"projections_sha256": "4" * 64}]
    samples.write(tmp_path, values=values, files={})
    assert len(collect(tmp_path).records) == 4


def test_text_that_no_page_can_hold_is_cleaned(tmp_path):
    samples.write(tmp_path, values=[GOOD | {"model": "a\x00b\ud800c\n" + "d" * 9000}], files={})
    (record,) = collect(tmp_path).records
    assert record.model.startswith("a b?c d")
    assert len(record.model) < 2100
    json.dumps(record.model).encode()


def test_older_figures_lack_newer_fields_of_a_configuration(tmp_path):
    old = {"k_ratio": 0.5, "s_ratio": 0.0, "selection": "weighted", "share": "head", "sink": 4, "recent": 64}
    row = {"setting": old, "basis": "none", "perplexity": 21.0, "perplexity_change": 0.05, "kl": 0.02, "mean_k": 0.5}
    samples.write(tmp_path, values=[], files={"rows.json": {"dense": samples.DENSE, "rows": [row]}})
    dense, record = collect(tmp_path).records
    assert dense.setting is None
    assert record.setting == AquaConfig.paper(k_ratio=0.5, **samples.OURS).to_dict()
    assert record.basis == "none"


@pytest.mark.parametrize("fields", [{}, {"k_ratio": 0.5}, {"k_ratio": 0.5, "share": "group"}])
def test_what_a_record_of_an_earlier_version_leaves_out_was_as_in_the_paper(fields, tmp_path):
    """Even where the defaults are others by now; the words of the setting stay, too."""
    value = samples.record("perplexity", AquaConfig.paper(), samples.losses(0.75)) | {"config": fields}
    row = {"setting": fields, "basis": "aqua", "perplexity": 21.0, "perplexity_change": 0.05, "kl": 0.02, "mean_k": 0.5}
    samples.write(tmp_path, values=[value], files={"rows.json": {"dense": samples.DENSE, "rows": [row]}})
    settings = [record.setting for record in collect(tmp_path).records if record.setting is not None]
    assert settings == [AquaConfig.paper(**fields).to_dict()] * 2
    shared = ", shared by group" if "share" in fields else ""
    assert describe_setting(fields | {"k_ratio": 0.5}) == f"k_ratio 0.5{shared}"


def test_retrieval_figures_are_counted_by_cell(tmp_path):
    questions = [
        {"length": length, "depth": depth, "correct": [True, length == 64]}
        for length in (64, 128)
        for depth in (0.0, 1.0)
    ]
    row = {"setting": HALF.to_dict(), "basis": "aqua", "lost": 2, "gained": 0, "p_value": 0.5}
    value = {"dense": {"accuracy": 1.0}, "rows": [row], "questions": questions, "model": "tiny"}
    samples.write(tmp_path, values=[], files={"needle.json": value})
    dense, aqua = collect(tmp_path).records
    assert (dense.result["right"], dense.result["asked"]) == (4, 4)
    assert (aqua.result["right"], aqua.result["asked"]) == (2, 4)
    assert aqua.result["cells"][-1] == {"length": 128, "depth": 1.0, "right": 0, "asked": 1}


def test_a_command_s_file_is_known_by_its_suite_and_one_of_another_version_is_not_read(tmp_path):
    row = {"setting": HALF.to_dict(), "basis": "aqua", "score_loss": 0.1} | samples.losses(0.5)
    result = {"model": "tiny", "dense": samples.DENSE, "rows": [row]}
    write_result(tmp_path / "rows.json", "perplexity", result, "aqua eval perplexity tiny")
    (tmp_path / "newer.json").write_text(json.dumps(result | {"schema": 2, "suite": "perplexity"}))
    (tmp_path / "unknown.json").write_text(json.dumps(result | {"schema": 1, "suite": "speed"}))
    found = collect(tmp_path)
    assert [(record.suite, record.command) for record in found.records] == [
        ("perplexity", "aqua eval perplexity tiny")
    ] * 2, "its keys alone would be those of retention"
    assert [name for name, _ in found.unused] == ["newer.json", "unknown.json"]
    assert found.unused[0][1] == "its schema is 2, this version reads 1"
    assert found.unused[1][1].startswith("its suite is 'speed': it must be one of perplexity, ")
