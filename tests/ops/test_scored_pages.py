# SPDX-License-Identifier: Apache-2.0
"""Pages whose tokens are chosen, in plain torch: what is where in them, and steps against contiguous sequences."""

from __future__ import annotations

import pytest
import torch
from decoding import DEVICE, random
from paged import problem, scored_pages

import aqua_attention as aqua
from aqua_attention.errors import AquaError
from aqua_attention.ops import scored_step
from aqua_attention.ops.api import attend_pages
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import PagedCache
from aqua_attention.ops.scored import ScoredCache, score_quantization
from aqua_attention.ops.scored_pages import PagedSequences, ScoredPages, scored_content

SHAPE = (4, 2), [0, 1, 16, 137], (16, 16, 24)
CHOICES = [{"select_p": 0.6}, {"select_tokens": 7, "sink": 2, "recent": 5, "min_length": 17}, {"select_p": 1.0}]


def config_of(choice, **others):
    return {"k_ratio": 0.25, "score_bits": 8} | choice | others


def contiguous(given):
    """The tokens before the last of each sequence, in a cache of its own."""
    plan, kept, value_dim = given.layer.plan, given.cache.kept, given.cache.value_dim
    total = max(given.lengths)
    cache = ScoredCache.empty(
        len(given.lengths), value_dim, total, score_quantization(plan), dtype=given.keys.dtype, device=DEVICE
    )
    assert given.keys.shape[3] == kept
    # A sequence of no token stays one.
    cache.fill(given.keys, given.values, torch.tensor([length - 1 for length in given.lengths], device=DEVICE))
    return cache


def test_a_page_has_keys_and_values_by_token_then_codes_by_dimension_and_their_scales():
    scoring = Quantization(torch.full((1, 2), 2.0), torch.ones(1, 2))
    cache = ScoredPages(torch.zeros(2, 1, 4, 6), 2, 3, scoring=scoring)
    key = torch.tensor([[[1.0, 255]], [[-253, 1]]])
    cache.write(key, torch.tensor([[[5.0, 6, 7]], [[8, 9, 10]]]), torch.tensor([5, 6]))
    assert cache.storage[0].eq(0).all()
    whole = cache.storage[1].flatten()
    assert whole[:20].tolist() == [0, 0, 1, 255, -253, 1, 0, 0, 0, 0, 0, 5, 6, 7, 8, 9, 10, 0, 0, 0]
    assert whole[20:22].view(torch.uint8).tolist() == [0, 128, 2, 0, 0, 254, 128, 0]
    assert whole[22:].view(torch.bfloat16).tolist() == [0, 1 + 2**-7, 1 + 2**-7, 0]
    assert torch.allclose(cache.read_copy(torch.tensor([1]), 3)[0, 1:], key[:, 0], atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "kept", "content"), [("float32", 16, 180), ("bfloat16", 16, 98), ("float16", 15, 96)]
)
def test_a_token_takes_a_byte_a_dimension_and_a_scale_more(dtype, kept, content):
    dtype = getattr(torch, dtype)
    assert scored_content(kept, 24, dtype.itemsize) == content
    width, units = content // dtype.itemsize, torch.ones(2, kept)
    ScoredPages(torch.zeros(3, 2, 16, width, dtype=dtype), kept, 24, scoring=Quantization(units, units))
    with pytest.raises(AquaError, match=f"{width} or more"):
        ScoredPages(torch.zeros(3, 2, 16, width - 1, dtype=dtype), kept, 24, scoring=Quantization(units, units))


def test_what_is_written_is_read_and_negative_slots_are_not_written():
    scoring = Quantization(random(2, 8, seed=5).abs() + 0.1, random(2, 8, seed=6))
    cache = scored_pages(5, 2, 16, 8, 12, torch.float32, scoring, spare=3)
    key, value = random(20, 2, 8, seed=0), random(20, 2, 12, seed=1)
    cache.write(key, value, torch.full((20,), -1, device=DEVICE))
    assert cache.storage.isnan().all()
    blocks, places = torch.tensor([3, 1, 99], device=DEVICE), torch.arange(20, device=DEVICE)
    cache.write(key, value, blocks[places // 16] * 16 + places % 16)
    found = cache.read(blocks, 20, torch.float32)
    assert torch.equal(found[0][0].transpose(0, 1), key)
    assert torch.equal(found[1][0].transpose(0, 1), value)
    copy = cache.read_copy(blocks, 20).transpose(0, 1)
    step = ((key - scoring.channel_mean) / scoring.channel_scale).abs().amax(-1, keepdim=True) / 127
    assert ((copy - key).abs() <= 0.52 * step * scoring.channel_scale + 1e-6).all() and not torch.equal(copy, key)
    assert cache.storage[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("kept", [16, 15])
def test_a_step_is_that_of_contiguous_sequences(choice, block_size, kept):
    if kept < 16:
        choice = choice | {"sink": 0, "recent": 0}
    given = problem(*SHAPE[:2], (16, kept, 24), block_size=block_size, impl="torch", **config_of(choice))
    plan, cache = given.layer.plan, contiguous(given)
    expected = scored_step.selected_step(given.query, given.key, given.value, cache, plan, plan.scaling)
    found = given.decode("torch")
    assert torch.allclose(found, expected.output, atol=1e-6) and not found[0].any()
    sequences = PagedSequences.of(given.cache, given.step.block_table, given.step.lengths)
    for row, length in enumerate(given.lengths):
        if length:
            for own, other in zip(sequences.read(row, length), cache.read(row, length), strict=True):
                assert torch.allclose(own, other, atol=1e-6)
    step = scored_step.attend_selected(expected.rotated, sequences, plan, plan.scaling)
    assert torch.equal(step.read[..., :137], expected.read[..., :137])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_step_is_the_last_query_of_a_prompt(choice, softcap):
    given = problem(*SHAPE, block_size=16, impl="torch", softcap=softcap, **config_of(choice))
    found, plan = given.decode("torch"), given.layer.plan
    for row, length in enumerate(given.lengths):
        if length:
            part = given.keys[row, None, :, :length], given.values[row, None, :, :length]
            options = {"scaling": given.layer.scaling, "softcap": softcap}
            call = plan.call(given.query[row, None, :, None], *part, **options)
            expected = aqua.ops.api.attend(call, plan, "reference").output
            assert torch.allclose(found[row], expected[0, :, 0], atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("queries", [1, 25, 60])
def test_each_query_of_a_prompt_or_a_part_chooses(choice, queries):
    given = problem((4, 2), [60], (16, 16, 16), block_size=16, impl="torch", **config_of(choice))
    given.decode("torch")
    query, plan = random(queries, 4, 16, seed=9), given.layer.plan
    found = attend_pages(query, given.cache, given.layer, given.step.block_table[0], 60)
    call = plan.call(query.transpose(0, 1)[None], given.keys, given.values)
    expected = aqua.ops.api.attend(call, plan, "reference").output
    assert torch.allclose(found, expected[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("queries", [60, 13, 1])
def test_only_decoding_chooses_where_that_is_asked(queries):
    query, choice = random(queries, 4, 16, seed=9), {"select_tokens": 7, "sink": 2, "recent": 5}

    def attended(**knobs):
        given = problem((4, 2), [60], (16, 16, 16), block_size=16, impl="torch", **config_of(choice | knobs))
        given.decode("torch")
        return attend_pages(query, given.cache, given.layer, given.step.block_table[0], 60)

    decoding, chosen, dense = attended(select_in="decoding"), attended(), attended(select_p=1.0, select_tokens=None)
    assert not torch.allclose(dense, chosen, atol=1e-3)
    torch.testing.assert_close(decoding, chosen if queries == 1 else dense, atol=1e-5, rtol=1e-5)


def test_pages_without_a_copy_are_not_these():
    assert not isinstance(problem(*SHAPE, block_size=16, impl="torch", k_ratio=0.5).cache, ScoredPages)
    given = problem(*SHAPE, block_size=16, impl="torch", **config_of({"select_p": 0.5}))
    assert isinstance(given.cache, ScoredPages) and isinstance(given.cache, PagedCache)
    with pytest.raises(AquaError, match=r"impl='triton' cannot take these pages"):
        given.decode("triton")
