# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny model: what it writes, and that dense and AQUA are told apart."""

from __future__ import annotations

import json

from aqua_attention.calibration.projections import Projections
from aqua_attention.cli import demo
from aqua_attention.config import AquaConfig


def test_the_demo_writes_projections_table_and_summary(monkeypatch, tmp_path, llama, word_tokenizer, words):
    runs = []

    def recorded(model, tokenizer, prompt, *, max_new_tokens, attachment=None):
        runs.append(attachment is not None)
        return demo_continue(model, tokenizer, "w1 w2 w3", max_new_tokens=8, attachment=attachment)

    demo_continue = demo.continue_prompt
    monkeypatch.setattr(demo, "continue_prompt", recorded)
    monkeypatch.setattr(demo, "load_model", lambda name: (llama[0], word_tokenizer))
    monkeypatch.setattr(demo, "load_text", lambda spec: words)
    monkeypatch.setattr(demo, "CONTEXT", 64)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 256)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 128)
    steps = []
    summary = demo.run_demo(tmp_path / "out", lambda name, done, total: steps.append(name))

    assert list(dict.fromkeys(steps)) == ["load", "calibrate", "evaluate", "generate"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "smollm2.safetensors",
        "summary.json",
        "table.md",
    ]
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: written[name] for name in summary} == summary
    assert (written["suite"], written["projections"]) == ("perplexity", str(tmp_path / "out" / "smollm2.safetensors"))
    assert sorted(Projections.load(tmp_path / "out" / "smollm2.safetensors").layers) == [0, 1, 2]
    assert [row["setting"]["k_ratio"] for row in summary["rows"]] == [0.75, 0.5, 0.25, 0.9, 0.75, 0.5, 0.25]
    assert [row["setting"]["sink"] for row in summary["rows"]] == [0, 0, 0, 4, 4, 4, 4]
    assert summary["rows"][3]["setting"] == AquaConfig().to_dict()
    assert runs == [False, True]
    dense = demo_continue(llama[0], word_tokenizer, "w1 w2 w3", max_new_tokens=8)
    assert summary["generation"]["dense"] == dense.text
    page = (tmp_path / "out" / "table.md").read_text()
    assert page.count("| k_ratio") == 7
    assert f"**Dense.** {dense.text}" in page
