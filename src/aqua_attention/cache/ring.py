# SPDX-License-Identifier: Apache-2.0
"""A sliding-window layer of fixed size whose decoding step can be recorded as a CUDA graph.

It is a ring: token number t, padding counted, lies in slot t % size. So a decoded token overwrites the one that leaves
the window, and no shape and no number on the host depends on the length. Attention does not care in which order keys
lie. What a key is to a query (hidden, exact) follows from its place in its sequence, which is kept beside it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from aqua_attention.cache.layer import (
    Readable,
    Recordable,
    attend_by_token,
    never_compiled,
    real_tokens,
    rotated_keys,
    tagged,
)
from aqua_attention.ops.mask import window_codes
from aqua_attention.ops.plan import Attended, Call, LayerPlan


class RingLayer(Readable, Recordable, CacheLayerMixin):
    """Rotated keys and values of the last tokens: those of its window, or of the whole cache where that is shorter.

    Attributes:
        sliding_window: tokens that a query sees, its own too.
        max_cache_len: slots of the ring.
        slots: rotated keys and values, both [batch, num_key_value_heads, max_cache_len, width].
        places: of the token in each slot among the real tokens of its row, from 0; -1 for padding and where there is
            none, int64 [batch, max_cache_len].
        counted: real tokens so far, int64 [batch].
        given: tokens so far, padding too, the same number for all rows, int64 [].

    The tensors are there since the first states. They keep their addresses, which recorded CUDA graphs know, until the
    ring grows or another batch comes.
    """

    is_sliding = True
    slots: tuple[Tensor, Tensor] | None
    places: Tensor
    counted: Tensor
    given: Tensor

    def __init__(self, plan: LayerPlan, *, max_cache_len: int, sliding_window: int) -> None:
        # Not CacheLayerMixin's, which sets `keys` and `values`.
        self.plan, self.sliding_window, self.slots = plan, sliding_window, None
        self.max_cache_len = min(max_cache_len, sliding_window)
        self.reset()

    def reset(self) -> None:
        """Forget everything; what is allocated stays."""
        self.is_initialized = self._is_filled = False
        self._new = None
        """Rotated keys and values that the next attention stores."""

    def addresses(self) -> list[int]:
        """See `Recordable`."""
        return [each.data_ptr() for each in (*self._stored(), self.places, self.counted, self.given)]

    @torch.inference_mode(False)  # so that what is allocated now can be written to in any mode
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, dtypes and device of the first states, which are not rotated."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, heads = key_states.shape[:2]
        size, width = self.max_cache_len, self.plan.rotation.shape[2]
        keys_like = torch.Size((self.batch_size, heads, size, width)), key_states
        values_like = torch.Size((self.batch_size, heads, size, value_states.shape[3])), value_states
        wanted = keys_like, values_like
        if self.slots is None or not all(_is_like(held, *like) for held, like in zip(self.slots, wanted, strict=True)):
            self.slots = None  # the old ones make room first
            self.slots = key_states.new_empty(keys_like[0]), value_states.new_empty(values_like[0])
            self.places = torch.empty(self.batch_size, size, dtype=torch.long, device=self.device)
            self.counted = torch.empty(self.batch_size, dtype=torch.long, device=self.device)
            self.given = torch.empty((), dtype=torch.long, device=self.device)
        # Also keys and values: what is hidden has no weight, but a NaN in it would be seen.
        for tensor in (*self._stored(), self.counted, self.given):
            tensor.zero_()
        self.places.fill_(-1)
        self.is_initialized = True

    @never_compiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens. A decoded one is written at once, others by `attend`, whose mask tells which are padding.

        Returns:
            Rotated keys and values: of the window before and the new tokens, as transformers' layer does; in a decoding
            step the whole ring. An AquaError once AQUA has left the model.
        """
        keys, values = rotated_keys(self.plan, key_states), value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.decodes(key_states.shape[2]):
            self._append(keys, values)
            keys, values = self._stored()
            return tagged(keys[:], self), values
        self._new = keys, values
        if self._is_filled:
            old_keys, old_values = self._window()
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        return tagged(keys, self), values

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """See `CacheLayer`. The mask of a decoding step is made here, because its window lies in the order of slots."""
        if self.decodes(call.query.shape[2]):
            return attend_by_token(call._replace(mask=self._mask()), self.plan)
        attended = attend_by_token(call, self.plan)
        self.store(call.mask)
        return attended

    @never_compiled
    def store(self, mask: Tensor | None) -> None:
        """Write the tokens that `update` took; the mask of their attention shows which are padding."""
        keys, values = self._taken()
        new = keys.shape[2]
        real = real_tokens(mask, self.batch_size, new, self.device)
        places = torch.where(real, self.counted[:, None] + real.cumsum(-1) - 1, -1)
        last = slice(max(new - self.max_cache_len, 0), new)
        numbers = torch.arange(last.start, last.stop, device=self.device) + self.given
        self._write(numbers % self.max_cache_len, keys[:, :, last], values[:, :, last], places[:, last])
        self.counted += real.sum(-1)
        self.given += new
        self._is_filled = True

    def get_seq_length(self) -> int:  # type: ignore[override,unused-ignore]
        """Tokens given so far, padding too: a tensor, so that a recorded step goes on counting."""
        return self.given.clone() if self.is_initialized else 0  # type: ignore[return-value]

    def held_states(self) -> tuple[Tensor, Tensor] | None:
        """See `Readable`: what the next token sees."""
        return self._window() if self._is_filled else None

    def get_max_length(self) -> int:
        """Tokens that it holds at most."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask and the position of the first; a decoding step needs none and asks for one."""
        if self.decodes(query_length):
            return 1, 0
        given = int(self.get_seq_length())
        before = min(given, self.sliding_window - 1)
        return before + query_length, given - before

    def knows(self, mask: Tensor) -> bool:
        """See `Recordable`. Of tokens that have left the window only their number means anything."""
        if not self._is_filled:
            return True
        given = int(self.given)
        if mask.ndim != 2 or mask.shape[0] != self.batch_size or mask.shape[1] <= given:
            return False
        shown = mask[:, : given + 1].to(self.device, torch.bool)
        numbers = torch.arange(max(given - self.max_cache_len, 0), given, device=self.device)
        held = self.places.index_select(1, numbers % self.max_cache_len) >= 0
        same_window = (shown.index_select(1, numbers) == held).all()
        same_count = (shown[:, :given].sum(-1) == self.counted).all()
        return bool(same_window & same_count & shown[:, given].all())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these indices (beam search)."""
        if self.is_initialized:
            for tensor in (*self._stored(), self.places, self.counted):
                tensor.copy_(tensor.index_select(0, beam_idx.to(self.device)))

    @torch.inference_mode(False)
    def grow(self, room: int) -> None:
        """Make room for so many tokens, as far as the window needs it; nothing is forgotten.

        A ring that is smaller than its window has held all tokens so far, each in the slot of its own number.
        """
        more = min(room, self.sliding_window) - self.max_cache_len
        if more <= 0:
            return
        if self.is_initialized:
            keys, values = (pad(states, (0, 0, 0, more)) for states in self._stored())
            self.slots = keys, values
            self.places = pad(self.places, (0, more), value=-1)
        self.max_cache_len += more

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Write the token of a decoding step, which is no padding."""
        self._write((self.given % self.max_cache_len)[None], keys, values, self.counted[:, None])
        self.counted += 1
        self.given += 1

    def _write(self, slots: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
        held_keys, held_values = self._stored()
        held_keys.index_copy_(2, slots, keys)
        held_values.index_copy_(2, slots, values)
        self.places.index_copy_(1, slots, places)

    def _mask(self) -> Tensor:
        """What the last token sees, boolean or codes as `mask_builder` has them, [batch, 1, 1, max_cache_len].

        Whatever is in the ring is in the window.
        """
        visible, plan = (self.places >= 0)[:, None, None], self.plan
        if not plan.needs_codes:
            return visible
        own = self.counted[:, None] - 1
        return window_codes(visible, own, self.places, plan.sink, plan.recent, plan.min_length)

    def _window(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the next token sees, in the order in which they were given."""
        given = int(self.given)
        numbers = torch.arange(max(given - self.sliding_window + 1, 0), given, device=self.device)
        keys, values = (states.index_select(2, numbers % self.max_cache_len) for states in self._stored())
        return keys, values

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.slots is not None
        return self.slots


def _is_like(tensor: Tensor, shape: torch.Size, like: Tensor) -> bool:
    """Whether a tensor has this shape, and dtype and device of another."""
    return (tensor.shape, tensor.dtype, tensor.device) == (shape, like.dtype, like.device)
