# SPDX-License-Identifier: Apache-2.0
"""Recorded steps give the tokens of unrecorded ones: every family, in every way to call `generate`."""

from __future__ import annotations

import pytest
from standin import use_graphs
from test_matrix import FAMILIES
from ways import (
    NEW,
    WAYS,
    assert_same,
    generated,
    made,
    plainly,
    recorded,
)

NOT_RECORDED = {
    "gemma2 (softcap)": "the kernel knows neither softcap nor extra softmax logits",
    "gpt_oss (s_aux)": "the kernel knows neither softcap nor extra softmax logits",
    "opt (scaling 1, learned positions)": "the model's step waits for a value (aten::_local_scalar_dense)",
}
"""Families whose steps are not recorded, and what is said of it."""


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What records steps here, see `standin`."""
    return use_graphs(monkeypatch)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, projections) of each family in turn."""
    return request.param, *made(FAMILIES[request.param])


@pytest.fixture(scope="module")
def expected(family):
    """What each way gives without recordings."""
    _, model, projections = family
    return plainly(model, projections, lambda model: {name: way(model) for name, way in WAYS.items()})


def test_every_way_gives_the_tokens_of_the_unrecorded_path(family, expected):
    family, model, projections = family
    with recorded(model, projections) as attachment:
        for name, way in WAYS.items():
            before = attachment._recorder.replays
            assert_same(way(model), expected[name], name)
            assert (attachment._recorder.replays > before) == (family not in NOT_RECORDED), name


def test_what_is_recorded_is_counted_and_what_is_not_is_explained(family, graphs):
    name, model, projections = family
    with recorded(model, projections) as attachment:
        counts = []
        for _ in range(3):
            generated(model)
            counts.append((graphs.recorded, attachment._recorder.replays))
        said = attachment._caches.reason or attachment._recorder.reason
    if name in NOT_RECORDED:
        assert counts == [(0, 0)] * 3
        assert said == NOT_RECORDED[name]
    else:
        # One step is rehearsed, one warms up; afterwards the cache and its recording serve again.
        assert counts == [(1, NEW - 3), (1, 2 * NEW - 4), (1, 3 * NEW - 5)]
        assert said == ""
