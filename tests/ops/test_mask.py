# SPDX-License-Identifier: Apache-2.0
"""The exact window as mask codes: by hand, and equal in each of the forms a mask can take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_attention.ops.mask import (
    APPROXIMATE,
    EXACT,
    HIDDEN,
    bidirectional,
    mask_rows,
    visible_and_exact,
    window_codes,
)

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
CPU = torch.device("cpu")
sizes = st.integers(0, 9)


def causal(queries, keys, padding=0):
    """Boolean [1, 1, queries, keys]: the queries are the last tokens, the first `padding` keys are hidden."""
    positions = torch.arange(keys)
    return ((positions <= positions[keys - queries :, None]) & (positions >= padding))[None, None]


def codes_of(queries, keys, sink, recent, padding=0):
    positions = torch.arange(keys)[None] - padding
    return window_codes(causal(queries, keys, padding), positions[:, keys - queries :], positions, sink, recent)


def split(mask, queries=None, keys=None, start=0, sink=0, recent=0):
    if mask is not None:
        queries, keys = mask.shape[-2:]
        start = keys - queries
    return visible_and_exact(mask, queries=queries, keys=keys, start=start, sink=sink, recent=recent, device=CPU)


def test_codes_of_a_causal_mask_with_one_sink_and_two_recent_tokens():
    assert codes_of(5, 5, sink=1, recent=2)[0, 0].tolist() == [
        [2, 0, 0, 0, 0],
        [2, 2, 0, 0, 0],
        [2, 2, 2, 0, 0],
        [2, 1, 2, 2, 0],
        [2, 1, 1, 2, 2],
    ]
    assert codes_of(5, 5, sink=1, recent=2).dtype == torch.uint8


def test_a_recent_window_of_one_is_the_query_itself():
    assert codes_of(3, 3, sink=0, recent=1)[0, 0].tolist() == [[2, 0, 0], [1, 2, 0], [1, 1, 2]]


def test_sinks_alone_are_the_first_keys_as_far_as_they_are_visible():
    assert codes_of(3, 3, sink=2, recent=0)[0, 0].tolist() == [[2, 0, 0], [2, 2, 0], [2, 2, 1]]


def test_without_a_window_the_codes_are_visibility():
    assert torch.equal(codes_of(5, 5, sink=0, recent=0), causal(5, 5).to(torch.uint8))


def test_left_padding_moves_the_sink_to_the_first_token():
    # Two padding tokens; sink 1 is key 2.
    assert codes_of(6, 6, sink=1, recent=2, padding=2)[0, 0].tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 2, 0, 0, 0],
        [0, 0, 2, 2, 0, 0],
        [0, 0, 2, 2, 2, 0],
        [0, 0, 2, 1, 2, 2],
    ]


def test_each_row_of_a_batch_has_its_own_first_token():
    positions = torch.tensor([[0, 1, 2, 3], [-1, 0, 1, 2]])
    visible = torch.cat([causal(4, 4), causal(4, 4, padding=1)])
    codes = window_codes(visible, positions, positions, sink=1, recent=1)
    assert codes[:, 0, 3].tolist() == [[2, 1, 1, 2], [0, 2, 1, 2]]


def test_queries_after_a_cache_are_placed_by_their_offset():
    assert codes_of(2, 5, sink=1, recent=2)[0, 0].tolist() == [[2, 1, 2, 2, 0], [2, 1, 1, 2, 2]]


def test_keys_of_a_sliding_cache_are_placed_by_their_offset_and_have_lost_the_sink():
    visible = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    codes = window_codes(visible, torch.tensor([[4]]), torch.arange(2, 5)[None], sink=1, recent=2)
    assert codes.tolist() == [[[[1, 2, 2]]]]


def test_the_window_reveals_nothing_that_a_sliding_window_hides():
    positions = torch.arange(6)
    sliding = causal(6, 6) & (positions > positions[:, None] - 2)
    codes = window_codes(sliding, positions[None], positions[None], sink=1, recent=4)
    assert torch.equal(codes != HIDDEN, sliding)
    assert codes[0, 0, 5].tolist() == [0, 0, 0, 0, 2, 2]


def test_codes_are_split_into_visible_and_exact():
    mask = torch.tensor([[[[HIDDEN, APPROXIMATE, EXACT]]]], dtype=torch.uint8)
    visible, exact = split(mask)
    assert visible.tolist() == [[[[False, True, True]]]]
    assert exact.tolist() == [[[[False, False, True]]]]


def test_a_boolean_mask_without_a_window_has_nothing_exact():
    visible, exact = split(causal(4, 6, padding=1))
    assert torch.equal(visible, causal(4, 6, padding=1))
    assert not exact.any()


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (1, 0), (0, 2), (2, 2), (9, 0), (0, 9)])
def test_a_boolean_mask_counts_the_window_among_what_a_query_sees(sink, recent):
    mask = torch.tensor([[[[True, False, True, True, False, True]]]])
    _, exact = split(mask, sink=sink, recent=recent)
    seen = [0, 2, 3, 5]
    expected = set(seen[:sink]) | set(seen[len(seen) - min(recent, 4) :])
    assert set(exact.flatten().nonzero().flatten().tolist()) == expected


@given(queries=st.integers(1, 8), before=st.integers(0, 6), padding=st.integers(0, 5), sink=sizes, recent=sizes)
@QUICK
def test_counting_equals_codes_for_causal_and_left_padded_masks(queries, before, padding, sink, recent):
    keys = queries + before
    codes = codes_of(queries, keys, sink, recent, padding)
    visible, exact = split(causal(queries, keys, padding), sink=sink, recent=recent)
    assert torch.equal(visible, codes != HIDDEN)
    assert torch.equal(exact, codes == EXACT)


@given(queries=st.integers(1, 8), before=st.integers(0, 6), sink=sizes, recent=sizes)
@QUICK
def test_none_is_the_causal_mask_written_out(queries, before, sink, recent):
    keys = queries + before
    implicit = split(None, queries, keys, start=before, sink=sink, recent=recent)
    explicit = split(causal(queries, keys), sink=sink, recent=recent)
    codes = split(codes_of(queries, keys, sink, recent))
    for part in range(2):
        assert torch.equal(implicit[part], explicit[part])
        assert torch.equal(implicit[part], codes[part])


def test_a_query_that_sees_nothing_has_nothing_exact():
    for mask in (causal(3, 3, padding=3), codes_of(3, 3, sink=2, recent=2, padding=3)):
        visible, exact = split(mask, sink=2, recent=2)
        assert not visible.any()
        assert not exact.any()


def test_later_tokens_that_a_mask_shows_are_not_recent_ones():
    """As in an encoder, or in one image: exact are the first token, a query's own and the one before it."""
    positions, visible = torch.arange(5)[None], torch.ones(1, 1, 5, 5, dtype=torch.bool)
    codes = window_codes(visible, positions, positions, sink=1, recent=2)[0, 0]
    exact = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert [torch.nonzero(row == EXACT).flatten().tolist() for row in codes] == exact
    assert (codes != HIDDEN).all()


def image_in_a_prompt(length, first, last):
    """Causal, but that the tokens of an image see each other; [1, 1, length, length]."""
    mask = causal(length, length)
    mask[..., first:last, first:last] = True
    return mask


def test_a_boolean_mask_counts_recent_tokens_up_to_the_query_only():
    """Tokens 1 to 3 are an image: what one of them sees of the later ones is not recent."""
    _, exact = split(image_in_a_prompt(6, 1, 4), sink=1, recent=2)
    expected = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
    assert [row.nonzero().flatten().tolist() for row in exact[0, 0]] == expected


@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 6), sizes, sizes, st.integers(1, 5))
@QUICK
def test_counting_equals_codes_with_an_image_whole_and_by_rows(length, first, size, sink, recent, block):
    mask, positions = image_in_a_prompt(length, first, first + size), torch.arange(length)[None]
    codes = window_codes(mask, positions, positions, sink, recent)
    visible, exact = split(mask, sink=sink, recent=recent)
    assert torch.equal(visible, codes != HIDDEN)
    assert torch.equal(exact, codes == EXACT)
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        part = mask_rows(mask, rows, sink=sink, recent=recent)
        assert torch.equal(part.to(torch.uint8), codes[:, :, rows])


def test_the_empty_end_of_a_static_cache_takes_no_place_in_the_window():
    mask = torch.cat([causal(2, 5), torch.zeros(1, 1, 2, 4, dtype=torch.bool)], -1)
    _, exact = split(mask, sink=1, recent=2)
    assert [row.nonzero().flatten().tolist() for row in exact[0, 0]] == [[0, 2, 3], [0, 3, 4]]


def test_the_mask_of_an_encoder_hides_nothing_and_marks_the_first_tokens():
    assert bidirectional(3, 4, sink=0, device=torch.device("cpu")).all()
    codes = bidirectional(3, 4, sink=2, device=torch.device("cpu"))
    assert codes.shape == (1, 1, 3, 4)
    assert codes[0, 0].tolist() == [[EXACT, EXACT, APPROXIMATE, APPROXIMATE]] * 3
