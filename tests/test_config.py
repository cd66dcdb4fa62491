# SPDX-License-Identifier: Apache-2.0
"""AquaConfig: every bad value is refused by name, and the counts of dimensions round as documented."""

import dataclasses
import json
import math

import numpy as np
import pytest

from aqua_attention.config import PAPER, PRESETS, AquaConfig, check_bidirectional, encoder_config, knobs
from aqua_attention.errors import AquaError

BAD_VALUES = [
    *(("k_ratio", value, "a number with 0 < k_ratio <= 1") for value in (0, -0.25, 1.5, math.nan, math.inf)),
    *(("k_ratio", value, "a number with 0 < k_ratio <= 1") for value in (True, "x", None)),
    *(("s_ratio", value, "a number with 0 <= s_ratio < 1") for value in (1, 1.5, -0.1, math.nan, -math.inf)),
    *(("s_ratio", value, "a number with 0 <= s_ratio < 1") for value in (False, "0.5", None)),
    *(("selection", value, "one of magnitude, weighted, static") for value in ("largest", "", None)),
    *(("share", value, "one of head, group") for value in ("layer", "Head", None)),
    *(("sink", value, "a whole number of tokens, 0 or more") for value in (-1, 2.5, 4.0, True, "4", None)),
    *(("recent", value, "a whole number of tokens, 0 or more") for value in (-1, 2.5, False, math.inf)),
    *(("min_length", value, 'a whole number of tokens, 0 or more, or "auto"') for value in (-1, 2.5, True, "no", None)),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_is_refused_naming_field_value_and_range(field, value, allowed):
    with pytest.raises(AquaError) as refusal:
        AquaConfig(**{field: value})
    assert str(refusal.value) == f"{field} is {value!r}: it must be {allowed}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k_ratio", 1),
        ("k_ratio", 1.0),
        ("k_ratio", 1e-9),
        ("s_ratio", 0),
        ("s_ratio", 0.999),
        ("selection", "static"),
        ("share", "group"),
        ("sink", 0),
        ("recent", 100_000),
        ("min_length", 100_000),
        ("min_length", "auto"),
    ],
)
def test_the_ends_of_each_range_are_taken(field, value):
    assert getattr(AquaConfig(**{field: value}), field) == value


def test_the_defaults_are_accurate_and_for_the_decoding_kernels():
    assert AquaConfig() == AquaConfig(0.9, 0.0, "weighted", "group", 4, 64, None, None, 1.0, None, 0)
    assert AquaConfig() == AquaConfig.preset() == AquaConfig.preset("accurate")


@pytest.mark.parametrize("config", [AquaConfig(), AquaConfig.paper(0.5), AquaConfig(bits=8, min_length="auto")])
def test_a_dict_and_back(config):
    assert AquaConfig.from_dict(config.to_dict()) == config
    assert AquaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert AquaConfig(**config.changes) == config


def test_what_a_dict_leaves_out_has_its_default():
    assert AquaConfig.from_dict({"k_ratio": 0.5}) == AquaConfig(k_ratio=0.5)
    assert AquaConfig.from_dict({}) == AquaConfig()


@pytest.mark.parametrize("make", [AquaConfig.from_dict, AquaConfig.of])
def test_a_dict_may_name_a_preset_and_change_it(make):
    assert make({"preset": "fast", "bits": 8}) == AquaConfig.preset("fast", bits=8)
    assert make({"k_ratio": 0.25, "preset": "paper"}) == AquaConfig.paper(0.25)
    assert make({"preset": "accurate"}) == AquaConfig()
    for wrong in ("fats", None, ["fast"]):
        with pytest.raises(AquaError, match=r"^preset is .*: it must be one of accurate, fast, small, select, paper$"):
            make({"preset": wrong})
    with pytest.raises(AquaError, match=r"^there is no setting 'prest': did you mean 'preset'\?$"):
        make({"prest": "fast"})


def test_a_name_is_proposed_only_where_it_is_near():
    for name, meant in (("recents", "recent"), ("bit", "bits"), ("shrae", "share"), ("select_k", "select_p")):
        with pytest.raises(AquaError, match=f"did you mean '{meant}'"):
            AquaConfig.from_dict({name: 1})
    for name in ("present", "window", "ratio_of_keys", 7):
        with pytest.raises(AquaError, match=f"there is no setting {name!r}: they are k_ratio, "):
            AquaConfig.preset("fast", **{name: 1}) if isinstance(name, str) else AquaConfig.from_dict({name: 1})


@pytest.mark.parametrize("make", [AquaConfig.from_dict, lambda values: AquaConfig.preset("fast", **values)])
def test_a_name_that_is_no_knob_is_refused(make):
    with pytest.raises(AquaError, match=r"^there is no setting 'kratio': did you mean 'k_ratio'\?$"):
        make({"kratio": 0.5})
    with pytest.raises(AquaError, match=r"^there is no setting 'colour': they are k_ratio, s_ratio, "):
        make({"colour": 1})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("k_ratio", np.float32(0.2), 0.2),
        ("k_ratio", np.float64(0.7), 0.7),
        ("logit_error", np.float16(0.5), 0.5),
        ("sink", np.int64(7), 7),
        ("recent", np.uint8(9), 9),
        ("bits", np.int32(8), 8),
        ("min_length", np.int64(100), 100),
    ],
)
def test_numbers_of_numpy_become_those_of_python(field, value, expected):
    config = AquaConfig(**{field: value})
    assert config == AquaConfig(**{field: expected})
    assert json.loads(json.dumps(config.to_dict()))[field] == expected


@pytest.mark.parametrize(
    ("field", "value"), [("k_ratio", np.float32(1.5)), ("sink", np.bool_(True)), ("bits", np.int8(3))]
)
def test_numbers_of_numpy_have_the_same_ranges(field, value):
    with pytest.raises(AquaError, match=f"^{field} is .*: it must be "):
        AquaConfig(**{field: value})


@pytest.mark.parametrize("given", [3, ["k_ratio"], 0.5, AquaConfig])
def test_what_is_no_setting_is_refused(given):
    with pytest.raises(
        AquaError, match=r"^config is .*: give an AquaConfig, a dict of its fields, or a preset's name$"
    ):
        AquaConfig.of(given)


def test_the_logit_error_has_one_name():
    """In the command's help and in Python."""
    assert "variance of the logit error" in knobs()["logit_error"].help.lower()
    assert "the variance of the logit error" in " ".join(AquaConfig.__doc__.split())


def test_the_method_of_the_paper_has_a_name():
    assert AquaConfig.paper() == AquaConfig(
        0.75, 0.0, "magnitude", "head", 0, 0, None, None, 1.0, None, 0, "approximate"
    )
    assert AquaConfig.paper() == AquaConfig(**PAPER) == AquaConfig.preset("paper")
    assert AquaConfig.paper(0.5, sink=4) == AquaConfig(0.5, 0.0, "magnitude", "head", 4, 0, sliding="approximate")
    with pytest.raises(AquaError, match="k_ratio is 2"):
        AquaConfig.paper(2)


def test_a_preset_is_a_setting_by_name_and_what_is_given_beside_it_counts():
    assert list(PRESETS) == ["accurate", "fast", "small", "select", "paper"]
    assert AquaConfig.preset("fast") == AquaConfig(k_ratio=0.5)
    assert AquaConfig.preset("small") == AquaConfig(bits=8)
    select = AquaConfig.preset("select")
    assert select == AquaConfig(k_ratio=0.25, select_p=0.95, score_bits=8)
    assert (select.selection, select.share, select.sink, select.recent) == ("weighted", "group", 4, 64)
    assert AquaConfig.preset("select", bits=8, select_p=0.9) == AquaConfig(
        k_ratio=0.25, select_p=0.9, score_bits=8, bits=8
    )
    assert AquaConfig.preset("fast", k_ratio=0.25, share="head") == AquaConfig(k_ratio=0.25, share="head")
    assert AquaConfig.preset("paper", recent=64) == AquaConfig.paper(recent=64)
    with pytest.raises(AquaError, match="preset is 'best': it must be one of accurate, fast, small, select, paper"):
        AquaConfig.preset("best")


def test_what_causality_and_caches_are_for_does_nothing_in_bidirectional_layers():
    config = AquaConfig(k_ratio=0.5, recent=9, bits=8, h2o_ratio=0.5, h2o_queries=3, min_length="auto")
    assert encoder_config(config) == AquaConfig(k_ratio=0.5, recent=0)
    for harmless in (AquaConfig(), AquaConfig.paper(), AquaConfig(recent=0, sink=1, selection="static")):
        check_bidirectional("X", harmless)
    with pytest.raises(AquaError, match=r"recent is 9, but X is bidirectional \(no token is the most recent one\)"):
        check_bidirectional("X", AquaConfig(recent=9))


@pytest.mark.parametrize(
    ("s_ratio", "head_dim", "kept"),
    [
        (0.0, 64, 64),
        (0.25, 64, 48),
        (0.1, 64, 58),  # 6.4 dropped: 6
        (0.11, 64, 57),  # 7.04 dropped: 7
        (0.3, 10, 7),  # 0.3 * 10 is exact enough to drop 3
        (0.9, 10, 1),
        (0.01, 10, 10),  # 0.1 dropped: none
    ],
)
def test_kept_dims_drops_the_rounded_share(s_ratio, head_dim, kept):
    assert AquaConfig(s_ratio=s_ratio).kept_dims(head_dim) == kept


@pytest.mark.parametrize(("s_ratio", "head_dim"), [(0.99, 4), (0.6, 1)])
def test_an_s_ratio_that_stores_nothing_is_refused(s_ratio, head_dim):
    config = AquaConfig(s_ratio=s_ratio)
    for count in (config.kept_dims, config.selected_dims):
        with pytest.raises(AquaError, match=rf"s_ratio {s_ratio} stores none of {head_dim} key dimensions"):
            count(head_dim)


@pytest.mark.parametrize(
    ("k_ratio", "s_ratio", "head_dim", "selected"),
    [
        (0.75, 0.0, 64, 48),
        (0.51, 0.0, 64, 33),  # 32.64, rounded up
        (0.28, 0.0, 25, 7),  # 7.000000000000001 in floating point
        (0.55, 0.0, 100, 55),  # 55.00000000000001
        (0.001, 0.0, 64, 1),  # never none
        (1e-12, 0.0, 64, 1),
        (1.0, 0.0, 80, 80),
        (0.5, 0.25, 64, 24),  # half of the 48 that are kept
        (0.5, 0.1, 10, 5),  # half of 9, rounded up
    ],
)
def test_selected_dims_rounds_the_share_of_kept_dims_up(k_ratio, s_ratio, head_dim, selected):
    assert AquaConfig(k_ratio=k_ratio, s_ratio=s_ratio).selected_dims(head_dim) == selected


def test_selected_dims_of_whole_percentages_is_exact_integer_arithmetic():
    for percent in range(1, 101):
        config = AquaConfig(k_ratio=percent / 100)
        for head_dim in range(1, 257):
            expected = -(-percent * head_dim // 100)
            assert config.selected_dims(head_dim) == expected, f"{percent}% of {head_dim}"


def test_a_config_is_frozen_and_a_changed_copy_is_checked_again():
    config = AquaConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k_ratio = 0.5
    with pytest.raises(AquaError, match="sink is -1"):
        dataclasses.replace(config, sink=-1)


def test_to_dict_holds_every_field_and_survives_json():
    config = AquaConfig(0.5, 0.1, "weighted", "group", 4, 64)
    assert config.to_dict() == {
        "k_ratio": 0.5,
        "s_ratio": 0.1,
        "selection": "weighted",
        "share": "group",
        "sink": 4,
        "recent": 64,
        "logit_error": None,
        "bits": None,
        "h2o_ratio": 1.0,
        "h2o_queries": None,
        "min_length": 0,
        "select_p": None,
        "select_tokens": None,
        "score_bits": 16,
        "select_in": "all",
        "sliding": "exact",
    }
    assert AquaConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "x"])
def test_a_bad_logit_error_is_refused(value):
    with pytest.raises(AquaError, match=r"logit_error is .*: it must be a number, 0 or more, or None"):
        AquaConfig(logit_error=value)


def test_a_threshold_is_a_number_and_auto_is_none_yet():
    assert (AquaConfig().threshold, AquaConfig(min_length=7).threshold) == (0, 7)
    with pytest.raises(AquaError, match='min_length is "auto": only `apply` looks it up'):
        _ = AquaConfig(min_length="auto").threshold
