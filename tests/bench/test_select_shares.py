# SPDX-License-Identifier: Apache-2.0
"""What layers of a model read: recorded by `benchmarks/select_shares.py`, replayed by `select_decode.py --shares`."""

from __future__ import annotations

import json
import runpy
import sys
from types import SimpleNamespace

import pytest

from aqua_attention.errors import AquaError
from pages.files import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def replay(monkeypatch):
    """The module that reads the file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import select_replay

    return select_replay


@pytest.fixture
def run(monkeypatch, capsys):
    """Run benchmarks/select_shares.py ARGS; returns (exit code or words, standard output)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["benchmarks/select_shares.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(BENCHMARKS / "select_shares.py"), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        return code, capsys.readouterr().out

    return run


def test_shares_are_recorded_and_read_again(run, replay, tiny_folder, projections_file, tmp_path, words):
    text, path = tmp_path / "words.txt", tmp_path / "shares.json"
    text.write_text(words)
    given = (tiny_folder, "-p", projections_file, "--test", text, "--select-p", 0.6, "--json", path)
    code, out = run(*given, "--length", 120, "--length", 240, "--dtype", "float32")
    assert code == 0
    value = json.loads(path.read_text())
    for name in ("command", "versions", "started", "projections_sha256", "text_sha256", "key_weights", "device"):
        assert value[name], name
    assert value["suite"] is None and value["setting"]["select_p"] == 0.6
    assert [(each["length"], each["windows"]) for each in value["results"]] == [(120, 2), (240, 2)]
    for result in value["results"]:
        assert [row["layer"] for row in result["layers"]] == [0, 1, 2]
        shares = [share for row in result["layers"] for share in row["shares"]]
        assert len(shares) == 6 and all(0.2 < share <= 1 for share in shares)
        assert result["mean"] == pytest.approx(sum(shares) / 6)
        assert f"{result['mean']:.1%} are read" in out
    # The exact window of 68 is more of a short window.
    assert value["results"][0]["mean"] > value["results"][1]["mean"]
    for length, nearest in ((100, 120), (160, 120), (180, 240), (32768, 240)):
        found = replay.recorded(path, length)
        assert (found.length, found.mass, sorted(found.layers)) == (nearest, 0.6, [0, 1, 2])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"setting": {"select_p": 0.9}, "results": []}', '{"results": [{"length": 1}]}']
)
def test_another_kind_of_file_is_refused(replay, tmp_path, content):
    path = tmp_path / "shares.json"
    path.write_text(content)
    with pytest.raises(AquaError, match=r"holds no shares: make it by benchmarks/select_shares\.py --json"):
        replay.recorded(path, 8192)
    with pytest.raises(AquaError, match="holds no shares"):
        replay.recorded(tmp_path / "none.json", 8192)


def test_what_is_replayed_by_hand(replay):
    # 100 of 1000 tokens are of the exact window; few are left, and at most what the mass is.
    assert replay.heavy_shares([0.3, 0.1, 1.0], 1000, 100, 0.9) == pytest.approx([0.2, 0.032, 0.9])
    assert replay.same_count(0.25, 1000, 68) == 182
    assert replay.same_count(0.01, 1000, 68) == 1
    found = replay.summary({0: (2.0, 2.0), 5: (3.3, 3.0), 7: (6.0, 5.0)})
    assert found == {
        "mass_seconds": pytest.approx(11.3),
        "count_seconds": 10.0,
        "ratio": pytest.approx(1.13),
        "worst": 1.2,
        "worst_layer": 7,
        "within": pytest.approx(2 / 3),
    }
    assert "layer 7 at most (1.20); 67% of the layers within 10%" in replay.said(found)


def test_each_layer_is_timed_by_mass_and_by_the_same_count(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import select_decode

    path, asked = tmp_path / "shares.json", []
    layers = [{"layer": 0, "shares": [0.3, 0.1]}, {"layer": 4, "shares": [0.5, 0.5]}]
    path.write_text(json.dumps({"setting": {"select_p": 0.9}, "results": [{"length": 8192, "layers": layers}]}))

    def measure(batch, length, knobs, head_shares, given):
        asked.append((knobs, head_shares))
        return {"seconds": 2e-6 if head_shares is None else 2.1e-6, "read": 0.25}

    monkeypatch.setattr(select_decode, "measure", measure)
    found, summary = select_decode.replayed(8, 10000, SimpleNamespace(shares=path, layer=None))
    window = 68 / 10000
    assert asked[:2] == [
        ({"select_p": 0.9}, pytest.approx([0.3 - window, 0.1 - window])),
        ({"select_tokens": 2500 - 68}, None),
    ]
    assert [(row["name"], row["layer"]) for row in found] == [
        *(("layer 0, mass 0.9", 0), ("as many, all alike", 0), ("layer 4, mass 0.9", 4), ("as many, all alike", 4))
    ]
    assert [row["recorded"] for row in found[::2]] == [0.2, 0.5]
    assert summary["ratio"] == pytest.approx(1.05) and summary["within"] == 1
    assert len(select_decode.replayed(8, 10000, SimpleNamespace(shares=path, layer=[4]))[0]) == 2
    with pytest.raises(SystemExit, match="--layer is none of 0, 4"):
        select_decode.replayed(8, 10000, SimpleNamespace(shares=path, layer=[3]))
