# SPDX-License-Identifier: Apache-2.0
"""min_length="auto": read from this machine's profile when AQUA is applied, and refused without one."""

from __future__ import annotations

import json

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.machine import Shape, device_name, profile_path, resolved, write_profile

SHAPE = Shape(torch.device("cpu"), 4, 2, 16, torch.float32)
COMMAND = "run: aqua bench breakeven --device cpu --heads 4 --groups 2 --head-dim 16 --dtype float32"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    return tmp_path


def min_length(shapes=(SHAPE,), **changes):
    return resolved(aqua.AquaConfig.paper(**{"min_length": "auto"} | changes), shapes).min_length


def test_the_next_larger_measured_ratio_counts():
    write_profile(SHAPE, {0.75: 700, 0.5: 300}, [64, 4096], {})
    assert min_length(k_ratio=0.75) == 700
    assert min_length(k_ratio=0.6) == 700
    assert min_length(k_ratio=0.5) == min_length(k_ratio=0.1) == 300
    assert min_length(logit_error=0.1) == 700
    assert min_length(k_ratio=1) == 0, "there is nothing to switch"
    assert min_length(k_ratio=0.5, min_length=9) == 9, "a number stays"
    with pytest.raises(aqua.AquaError) as refusal:
        min_length(k_ratio=0.8)
    assert "knows no k_ratio of 0.8 or more" in str(refusal.value)
    assert f"{COMMAND} --k-ratio 0.8" in str(refusal.value)


def test_the_slowest_layer_counts_and_never_is_said():
    other = SHAPE._replace(head_dim=32)
    write_profile(SHAPE, {0.5: 300}, [64, 4096], {})
    write_profile(other, {0.5: 900}, [64, 4096], {})
    assert min_length([SHAPE, other, SHAPE], k_ratio=0.5) == 900
    write_profile(other, {0.5: None}, [64, 4096], {})
    with pytest.raises(aqua.AquaError, match=r"was not faster up to 4096 tokens.* give a number of tokens, or measure"):
        min_length([SHAPE, other], k_ratio=0.5)


def test_a_profile_is_of_one_device_shape_and_dtype():
    write_profile(SHAPE, {0.5: 300}, [64, 4096], {"torch": "2"})
    kept = json.loads(profile_path(SHAPE).read_text())
    assert kept == {
        "format": 2,
        "device": device_name(torch.device("cpu")),
        "thresholds": [{"k_ratio": 0.5, "min_length": 300}],
        "lengths": [64, 4096],
        "torch": "2",
    }
    for changes in (
        {"num_attention_heads": 8},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"dtype": torch.bfloat16},
    ):
        with pytest.raises(aqua.AquaError, match="has no profile of such layers"):
            min_length([SHAPE._replace(**changes)], k_ratio=0.5)
    with pytest.raises(aqua.AquaError, match=r"no profiles for torch\.float16 on cpu"):
        min_length([SHAPE._replace(dtype=torch.float16)], k_ratio=0.5)
    assert min_length([SHAPE._replace(head_dim=2)], k_ratio=0.9) == 0, "no dimension is left out"
    with pytest.raises(aqua.AquaError, match=r"--k-ratio 0\.3333333333333333"):
        min_length([SHAPE._replace(num_attention_heads=8)], k_ratio=1 / 3)
    with pytest.raises(aqua.AquaError, match="for cpu and cuda, not for meta"):
        min_length([SHAPE._replace(device=torch.device("meta"))], k_ratio=0.5)


DAMAGED = ["", "{", "[]", "{}", '{"format": 1, "thresholds": []}', '{"format": 2, "thresholds": [{"k_ratio": 0.5}]}']
DAMAGED += [
    f'{{"format": 2, "thresholds": [{{"k_ratio": 0.5, "min_length": {bad}}}], "lengths": [9]}}'
    for bad in ("-1", '"9"', "1.5", "true")
]


@pytest.mark.parametrize("row", ["1", '{"k_ratio": 0.5}', '{"k_ratio": 0.5, "select_p": 0.9}'])
def test_damaged_choices_are_refused(row):
    write_profile(SHAPE, {0.5: 300}, [64, 4096], {})
    profile = json.loads(profile_path(SHAPE).read_text()) | {"selects": [json.loads(row)]}
    profile_path(SHAPE).write_text(json.dumps(profile))
    with pytest.raises(aqua.AquaError, match="is damaged or of another version: run: aqua bench breakeven"):
        min_length(share="group", k_ratio=0.5, select_p=0.9)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_profile_is_refused(content):
    write_profile(SHAPE, {0.5: 300}, [64, 4096], {})
    profile_path(SHAPE).write_text(content)
    with pytest.raises(aqua.AquaError, match="is damaged or of another version: run: aqua bench breakeven"):
        min_length(k_ratio=0.5)


def select(k_ratio, min_length, **choice):
    """A choice of tokens as `measure_breakeven` hands it to the profile."""
    given = {"k_ratio": k_ratio, "select_p": None, "select_tokens": None, "select_share": None, "score_bits": 8}
    return given | choice | {"min_length": min_length}


def test_a_choice_of_tokens_has_lengths_of_its_own():
    selects = [select(0.5, 900, select_p=0.9), select(0.25, 700, select_p=0.9), select(0.25, 50, select_tokens=64)]
    selects += [select(0.25, None, select_p=0.99), select(0.25, 1, select_share=0.1)]
    write_profile(SHAPE, {0.5: 300}, [64, 4096], {}, selects)
    assert len(json.loads(profile_path(SHAPE).read_text())["selects"]) == 4
    chosen = {"share": "group", "score_bits": 8}
    assert min_length(k_ratio=0.5) == 300
    assert min_length(**chosen, k_ratio=0.25, select_p=0.9) == 700
    assert min_length(**chosen, k_ratio=0.3, select_p=0.9) == 900
    assert min_length(**chosen, logit_error=0.1, select_p=0.9) == 900
    assert min_length(**chosen, k_ratio=0.25, select_tokens=64) == 50
    with pytest.raises(aqua.AquaError, match=r"choosing tokens was not faster up to 4096 tokens"):
        min_length(**chosen, k_ratio=0.25, select_p=0.99)
    for changes, options in (
        ({"select_p": 0.95}, "--k-ratio 0.25 --select-p 0.95 --score-bits 8"),
        ({"select_tokens": 65}, "--k-ratio 0.25 --select-tokens 65 --score-bits 8"),
        ({"select_p": 0.9, "score_bits": 16}, "--k-ratio 0.25 --select-p 0.9 --score-bits 16"),
        ({"select_p": 0.9, "k_ratio": 1.0}, "--k-ratio 1.0 --select-p 0.9 --score-bits 8"),
    ):
        with pytest.raises(aqua.AquaError) as refusal:
            min_length(**chosen | {"k_ratio": 0.25} | changes)
        assert "with select_" in str(refusal.value) and str(refusal.value).endswith(f"{COMMAND} {options}")
    write_profile(SHAPE, {0.5: 300}, [64, 4096], {})
    with pytest.raises(aqua.AquaError, match=r"knows no k_ratio of 0\.25 or more with select_p=0\.9"):
        min_length(**chosen, k_ratio=0.25, select_p=0.9)


def test_apply_resolves_auto(llama):
    model, projections = llama
    config = aqua.AquaConfig.paper(k_ratio=0.25, min_length="auto")
    with pytest.raises(aqua.AquaError) as refusal:
        aqua.apply(model, projections, config)
    assert f"{COMMAND} --k-ratio 0.25" in str(refusal.value)
    write_profile(SHAPE, {0.5: 20}, [64, 4096], {})
    ids = torch.arange(2, 32)[None]
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        assert attachment.config.min_length == 20
        found = model(ids).logits
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25, min_length=20)), torch.no_grad():
        assert torch.equal(model(ids).logits, found)
    write_profile(SHAPE, {0.5: 20}, [64, 4096], {}, [select(0.25, 25, select_p=0.95)])
    with aqua.apply(model, projections, aqua.AquaConfig.preset("select", min_length="auto")) as attachment:
        assert attachment.config.min_length == 25
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25)), torch.no_grad():
        assert (model(ids).logits - found).abs().max() > 0.1


def test_a_profile_that_cannot_be_kept_is_refused(cache_folder):
    (cache_folder / "profiles").write_text("in the way")
    with pytest.raises(aqua.AquaError, match="set AQUA_CACHE_DIR to another folder"):
        write_profile(SHAPE, {0.5: 300}, [64, 4096], {})
