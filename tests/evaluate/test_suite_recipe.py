# SPDX-License-Identifier: Apache-2.0
"""The recipe for a suite: a module with its jobs, and a line in `SUITES`. Here is one, from the grid to the report."""

from __future__ import annotations

import json

import pytest
from test_grid import FACTS

from aqua_attention.config import AquaConfig
from aqua_attention.evaluate.run import run_jobs
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites import SUITES, Suite
from aqua_attention.evaluate.suites.grid import grid_jobs, sizes_of
from aqua_attention.report.collect import collect
from aqua_attention.report.record_tables import record_table


def dummy_jobs(subject, settings, sizes):
    """How many tokens are read at each k_ratio."""
    windows = subject.windows(sizes.tokens, sizes.context)

    def measure(setting, progress, _):
        progress(1, 1)
        return {"products": setting.config.k_ratio * windows.numel(), "tokens_read": windows.numel()}

    return subject.jobs("dummy", settings, {"data": subject.data, "context": sizes.context}, measure)


@pytest.fixture
def dummy(monkeypatch):
    monkeypatch.setitem(SUITES, "dummy", Suite(("products", "tokens_read"), jobs=f"{__name__}:dummy_jobs"))


def test_a_suite_runs_in_a_grid_and_is_in_the_report(dummy, llama, word_tokenizer, words, tmp_path):
    subject = Subject("tiny", llama[0], word_tokenizer, llama[1], "words", words, {"projections_sha256": "0" * 64})
    settings = [Setting(AquaConfig.paper(ratio)) for ratio in (0.5, 0.25)]
    jobs = grid_jobs(subject, ["dummy"], settings, sizes_of(False, context=64, tokens=128))
    records = run_jobs(tmp_path, jobs, FACTS)
    assert [record.result["products"] for record in records] == [64, 32]
    assert record_table(records)[1][0] == ["dummy", "k_ratio 0.5", "products 64, tokens_read 128", "", ""]
    (first, _) = sorted((tmp_path / "records").iterdir())
    assert first.name.startswith("dummy-")
    found = collect(tmp_path)
    assert (len(found.records), found.unused) == (2, [])
    pytest.importorskip("matplotlib")
    from aqua_attention.report.page import sections_of

    (section,) = sections_of(found)
    assert section.title == "Dummy"
    assert section.blocks[0].table == (
        ["setting", "products", "tokens read"],
        [["k_ratio 0.5", "64", "128"], ["k_ratio 0.25", "32", "128"]],
    )
    first.write_text(json.dumps(json.loads(first.read_text()) | {"result": {"products": 1}}))
    assert collect(tmp_path).unused[0][1] == "its result has no tokens_read"
