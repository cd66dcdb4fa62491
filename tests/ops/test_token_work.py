# SPDX-License-Identifier: Apache-2.0
"""How many programs choose tokens, who shares their memory, and which of them start early."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from selecting import plan_of

from aqua_attention.ops.backends.triton import token_work
from aqua_attention.ops.backends.triton.token_work import Sizes, TokenWork
from aqua_attention.ops.scored import ScoredCache, score_quantization


def cache_of(length, memory=None, **options):
    """An empty cache of 2 sequences."""
    quantization, given = (
        score_quantization(plan_of(2, 16, select_p=0.5)),
        {"dtype": torch.float32, "device": "cpu"} | options,
    )
    return ScoredCache.empty(2, 16, length, quantization, memory=memory, **given)


@pytest.mark.parametrize(
    ("places", "tiles", "programs"),
    [
        (8, 1, 1),
        (8, 128, 1),  # a short one
        (64, 256, 1),  # registers suffice, and there are others
        (8, 256, 16),
        (8, 1024, 32),  # as many as 264 programs have room for
        (64, 1024, 4),
        (512, 512, 2),  # more than there is room for at once
        (1, 100_000, 64),
    ],
)
def test_few_long_sequences_have_several_programs(places, tiles, programs):
    assert token_work._chunks(places, tiles, 264, 64) == programs


@pytest.mark.parametrize(("most", "programs"), [(64, 16), (15, 8), (7, 4), (1, 1)])
def test_a_small_gpu_has_fewer(most, programs):
    assert token_work._chunks(8, 2049, 2 * most + 2, most) == programs


def test_caches_share_memory_that_fits_both():
    memory = {}
    plain, other, int8 = cache_of(300, memory), cache_of(300, memory), cache_of(300, memory, bits=8)
    work = TokenWork.shared(plain, 4, 4)
    assert TokenWork.shared(other, 4, 4) is work
    assert TokenWork.shared(int8, 4, 4) is not work
    assert TokenWork.shared(plain, 4, 5) is not work
    grown = TokenWork.shared(plain.enlarged(900), 4, 4)
    assert grown is not work
    assert grown.scratch.weights.shape[1] == 8


def test_few_tiles_start_early(monkeypatch):
    assert TokenWork.of(cache_of(1), 4, 4).starts_early() == {"EARLY": 0}
    monkeypatch.setattr(token_work, "starts_early", lambda _: {"EARLY": 2, "launch_pdl": True})
    monkeypatch.setattr(token_work, "EARLY_TILES", 12)
    for length, early in ((3 * 128, 2), (3 * 128 + 1, 1)):
        assert TokenWork.of(cache_of(length), 4, 4).starts_early() == {"EARLY": early, "launch_pdl": True}


@pytest.mark.parametrize(
    ("batch", "widths", "options", "by_hand"),
    [
        (16, (128, 128), {}, True),
        (17, (128, 128), {}, False),
        (17, (128, 128), {"is_quantized": True}, True),
        (1, (128, 128), {"paged": True}, False),
        (1, (112, 64), {}, True),
        (1, (120, 64), {}, False),
        (1, (144, 64), {}, False),
        (1, (128, 96), {}, False),
    ],
)
def test_who_attends_to_the_chosen_tokens(batch, widths, options, by_hand):
    like = torch.empty(0, dtype=torch.bfloat16)
    sizes = Sizes.of((batch, 8, *widths, 256), 32, 32, like, by_hand=True, **options)
    assert sizes.gather_by_hand == by_hand
    assert not Sizes.of((batch, 8, *widths, 256), 32, 32, like, by_hand=False, **options).gather_by_hand
    assert not Sizes.of((batch, 8, *widths, 256), 32, 32, like.float(), by_hand=True, **options).gather_by_hand
