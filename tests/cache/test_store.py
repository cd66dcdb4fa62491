# SPDX-License-Identifier: Apache-2.0
"""Stores of keys and values: any sequence of operations leaves what a plain tensor would hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aqua_attention as aqua
from aqua_attention.cache.quantized import UNQUANTIZED_RECENT, Quantized
from aqua_attention.cache.store import SLACK, Growing

HEADS, WIDTH = 2, 5
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 200)),
        st.tuples(st.just("keep"), st.integers(0, 400)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
    ),
    min_size=1,
    max_size=12,
)


def states(count, seed=0, batch=3):
    return torch.randn(batch, HEADS, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def follow(store, operations, check):
    """Do the operations on the store and on a plain tensor; `check` both after each."""
    plain = torch.zeros(3, HEADS, 0, WIDTH)
    for turn, (name, value) in enumerate(operations):
        if name == "append":
            new = states(value, turn, plain.shape[0]) * 10 ** (turn % 3 - 1)
            store.append(new)
            plain = torch.cat([plain, new], 2)
        elif plain.shape[2] == 0:
            continue
        elif name == "keep":
            store.keep(value)
            plain = plain[:, :, :value]
        else:
            indices = torch.tensor([index % plain.shape[0] for index in value] if name == "select" else [0])

            def change(tensor, name=name, value=value, indices=indices):
                return tensor[indices] if name == "select" else tensor.repeat_interleave(value, 0)

            store.change(change)
            plain = change(plain)
            if plain.shape[0] > 6:
                return
        assert store.length == plain.shape[2]
        if plain.shape[2]:
            assert store.batch == plain.shape[0]
            check(store, plain)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_a_growing_store_holds_what_a_tensor_holds(operations):
    def same(store, plain):
        assert torch.equal(store.read(), plain)

    follow(Growing(), operations, same)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.sampled_from([8, 4]))
def test_a_rounding_store_holds_it_to_half_a_step_and_the_last_tokens_exactly(operations, bits):
    def close(store, plain):
        read = store.read()
        assert read.shape == plain.shape
        steps = plain.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((read - plain).abs() <= 0.52 * steps).all()
        whole = store._tail.length
        assert torch.equal(read[:, :, store.length - whole :], plain[:, :, store.length - whole :])

    follow(Quantized(bits, recent=0), operations, close)


def test_the_last_tokens_are_whole_and_their_number_is_bounded():
    store = Quantized(8, recent=100)
    for count in [1] * 50 + [500] + [1] * 300:
        store.append(states(count))
        assert min(store.length, 100) <= store._tail.length <= 200
    assert Quantized(8, recent=3).recent == UNQUANTIZED_RECENT


def test_calibrated_scales_save_small_channels_beside_large_ones():
    """One channel far from zero and large: a step for the whole token would round the others to nothing."""
    scale, mean = (
        torch.tensor([[30.0, 1, 1, 1, 0.1]]).expand(HEADS, 5),
        torch.tensor([[500.0, 0, 0, 0, 0]]).expand(HEADS, 5),
    )
    keys = states(400) * scale[:, None] + mean[:, None]
    calibrated, plain = Quantized(8, 0, scale, mean), Quantized(8, 0)
    calibrated.append(keys)
    plain.append(keys)
    old = slice(0, 400 - UNQUANTIZED_RECENT)
    errors = [(store.read() - keys)[:, :, old].square().mean((0, 1, 2)).sqrt() for store in (calibrated, plain)]
    assert (errors[0] < 0.02 * scale[0]).all()
    assert errors[1][1] > 0.5, "without them the small channels are lost"


def test_a_token_is_written_in_place_and_little_room_is_left():
    store, addresses, copied = Growing(), [], 0
    store.append(states(8192))
    for _ in range(200):
        store.append(states(1))
        addresses.append(store.read().data_ptr())
        room = store.read().untyped_storage().nbytes() / (store.read().numel() * 4)
        assert room <= 1 + 1 / SLACK + 1e-6
    copied = len(set(addresses))
    assert copied == 1, "204 tokens of room"


@pytest.mark.parametrize(("bits", "share"), [(8, 0.56), (4, 0.34)])
def test_bits_are_what_is_held(bits, share):
    store = Quantized(bits, 0)
    keys = torch.randn(1, 3, 8192, 64, dtype=torch.bfloat16)
    store.append(keys)
    held = sum(part.read().untyped_storage().nbytes() for part in store._stores)
    assert held < share * keys.nbytes
    assert store.read().dtype == torch.bfloat16


def test_steps_follow_what_is_stored_for_tiny_and_zero_states():
    for size in (0.0, 1e-20, 1e-8, 1e8):
        store = Quantized(8, 0)
        keys = states(300) * size
        store.append(keys)
        assert torch.isfinite(store.read()).all()
        assert torch.allclose(store.read(), keys, rtol=0, atol=size * 0.03 + 1e-30)


@pytest.mark.parametrize("make", [Growing, lambda: Quantized(8, 0)])
def test_an_emptied_store_takes_another_batch(make):
    store = make()
    store.append(states(300))
    store.keep(0)
    other = states(4, batch=1)
    store.append(other)
    assert store.batch == 1
    assert torch.equal(store.read(), other)


def test_growing_keeps_gradients_and_int8_refuses_them():
    first, second = states(3).requires_grad_(), states(2, 1).requires_grad_()
    store = Growing()
    store.append(first)
    seen = store.read() * 2
    store.append(second)
    (seen.sum() + store.read().square().sum()).backward()
    assert torch.allclose(first.grad, 2 + 2 * first)
    assert torch.allclose(second.grad, 2 * second)
    with pytest.raises(aqua.AquaError, match="int8 storage has no gradient"):
        Quantized(8, 0).append(first)


def test_what_was_filled_in_inference_mode_goes_on_outside():
    store = Growing()
    with torch.inference_mode():
        store.append(states(5))
    with torch.no_grad():
        store.append(states(1, 1))
    assert torch.equal(store.read(), torch.cat([states(5), states(1, 1)], 2))
