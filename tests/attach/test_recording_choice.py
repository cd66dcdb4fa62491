# SPDX-License-Identifier: Apache-2.0
"""Recorded steps that choose tokens by the kernels of a GPU: here in triton's interpreter, and a stand-in records."""

from __future__ import annotations

import pytest
import torch
from standin import DEVICE, GRAPH, decode

import aqua_attention as aqua
from aqua_attention.attach import recording
from aqua_attention.cache.tiled import TiledLayer
from conftest import VOCABULARY, calibrated, make_llama

pytest.importorskip("triton")
pytestmark = pytest.mark.select
SETTING = {"k_ratio": 0.5, "select_p": 0.8, "sink": 2, "recent": 5, "score_bits": 8}
NEW = 8


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What records steps here, and few programs, because the interpreter runs one after the other."""
    if DEVICE == "cpu":
        monkeypatch.setattr("aqua_attention.ops.backends.triton.token_work.sm_count", lambda _: 2)
        monkeypatch.setattr(TiledLayer, "_decode", decode)
    monkeypatch.setattr(recording, "CudaGraph", GRAPH)
    monkeypatch.setattr(GRAPH, "recorded", 0)
    return GRAPH


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
def test_recorded_steps_write_and_tell_what_others_do(graphs, watched):
    """In two calls of different prompts on one cache; layers share what the kernels work in."""
    model = make_llama(num_hidden_layers=2)
    projections, model = calibrated(model), model.to(DEVICE)
    prompts = torch.randint(1, VOCABULARY, (2, 1, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for record in (False, True):
        texts, told = [], []
        options = {"layout": "tiled", "record": record, "compile": False}
        with aqua.apply(model, projections, SETTING, **options) as attachment:
            if watched:
                attachment.on_reading = lambda layer, reading, told=told: told.append((layer, *reading))
                attachment.on_selection = lambda layer, selected, *_, told=told: told.append((layer, selected))
            for prompt in prompts:
                texts.append(model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0))
            replays = attachment._recorder.replays
        found.append((texts, told))
    # One step is rehearsed and one warms up; afterwards the cache and its recording serve again.
    assert (graphs.recorded, replays) == (1, 2 * NEW - 4)
    (texts, told), (recorded, retold) = found
    assert all(map(torch.equal, recorded, texts))
    assert len(retold) == len(told) == (2 * 2 * 2 * NEW if watched else 0)
    for mine, theirs in zip(retold, told, strict=True):
        assert mine[0] == theirs[0]
        assert all(torch.equal(*pair) for pair in zip(mine[1:], theirs[1:], strict=True))
