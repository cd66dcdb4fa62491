# SPDX-License-Identifier: Apache-2.0
"""A cache layer of fixed size in the layout of the decoding kernels (`ops.backend.tiled_backend`).

A decoded token is rotated, appended and attended to by few kernels, which look at no mask and no length on the CPU, so
that a step can be recorded as a CUDA graph. Padding is not stored: each sequence has its own length.

On a CPU, where lengths are known, a sequence shorter than `min_length` is not rotated: nothing is chosen there.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from aqua_attention.cache.layer import (
    Readable,
    Recordable,
    attend_by_token,
    check_active,
    check_handed_out,
    never_compiled,
    real_tokens,
    tagged,
)
from aqua_attention.cache.store import tokens_at
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import rotate
from aqua_attention.ops.backend import tiled_backend
from aqua_attention.ops.layout import Quantization, TiledCache
from aqua_attention.ops.plan import Attended, Call, LayerPlan


class TiledLayer(Readable, Recordable, CacheLayerMixin):
    """A cache layer of fixed size: keys in tiles by dimension, values by token, see `TiledCache`."""

    is_sliding = False
    cache: TiledCache
    """There since the first states."""

    def __init__(self, plan: LayerPlan, *, max_cache_len: int) -> None:
        # Not CacheLayerMixin's, which sets `keys` and `values`.
        self.plan, self.max_cache_len = plan, max_cache_len
        self.reset()

    def reset(self) -> None:
        """Forget all tokens. Memory stays allocated, because recorded CUDA graphs know its addresses."""
        self.is_initialized = False
        self._is_filled = False
        self._new = None
        """Keys as they came, the same rotated, and values of all tokens so far, that the next attention stores; while
        decoding those of the new one, not rotated."""

    def addresses(self) -> list[int]:
        """See `Recordable`."""
        held = (*vars(self.cache).values(), self._padding)
        return [tensor.data_ptr() for tensor in held if isinstance(tensor, Tensor)]

    @torch.inference_mode(False)  # so that what is allocated now can be written to in any mode
    def grow(self, room: int) -> None:
        """Make room for so many tokens, and keep those that are held. Addresses change, so steps are recorded anew."""
        if self.is_initialized:
            self.cache = self.cache.enlarged(room)
        self.max_cache_len = room

    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, dtype and device of the first states."""
        # Under autocast keys are wider than values; attention is in the values' dtype.
        self.dtype, self.device = value_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        shape = (self.batch_size, self.num_heads, self.plan.kept, value_states.shape[3])
        sizes = shape, self.max_cache_len, self.dtype, self.device
        held = self.__dict__.get("cache")
        if held is None or (held.shape[:4], held.max_length, held.dtype, held.device) != sizes:
            held = None
            self.__dict__.pop("cache", None)  # the old one makes room first
            self.cache = self._new_cache(value_states.shape[3])
            self._padding = torch.zeros((), dtype=torch.long, device=self.device)
            """Padding tokens of the first sequence, which are given but not stored."""
        else:
            held.clear()
            self._padding.zero_()
        self._nothing = key_states.new_full((1,), torch.nan)
        """What is handed out while decoding."""
        self._backend = tiled_backend(self.device)
        if self._backend.keeps_short_unrotated:
            self.cache.rotated_from = self.plan.min_length if self.plan.kept == key_states.shape[3] else 0
        self._real = torch.ones(self.batch_size, 0, dtype=torch.bool, device=self.device)
        """Which of the tokens given at once were no padding, [batch, so many]; decoded ones all are."""
        self.is_initialized = True

    def _new_cache(self, value_dim: int) -> TiledCache:
        """An empty one for the states that come."""
        quantization = None
        if self.plan.config.bits == 8:
            assert self.plan.key_scale is not None and self.plan.key_mean is not None
            quantization = Quantization(self.plan.key_scale, self.plan.key_mean)
        shape = (self.batch_size, self.num_heads, self.plan.kept, value_dim, self.max_cache_len)
        return TiledCache(*shape, self.dtype, self.device, quantization=quantization)

    @never_compiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; `attend` writes them. An AquaError once AQUA has left the model.

        Returns rotated keys and values of all tokens given, padding too; while decoding, NaN in place of them: AQUA's
        attention function asks the layer itself.
        """
        check_active(self.plan)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.decodes(key_states.shape[2]):
            keys = self._nothing.expand(*key_states.shape[:3], self.plan.kept)
            values = self._nothing.to(value_states.dtype).expand(value_states.shape)
            self._new = key_states, values, value_states
            return tagged(keys, self), values
        keys, values = rotate(key_states, self.plan.rotation), value_states
        raw = key_states
        if self._is_filled:
            held, old_keys, old_values = self._given()
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            raw = torch.cat([held, raw], 2) if self.cache.rotated_from else keys
        self._new = raw, keys, values
        return tagged(keys, self), values

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """See `CacheLayer`: a decoding step by the kernel, or attention to what `update` returned, stored afterwards.

        An AquaError for a sliding window, softcap or extra softmax logits, which the kernels do not know.
        """
        if is_sliding or call.softcap or call.s_aux is not None:
            raise AquaError(
                "the tiled layout knows neither sliding windows, softcap nor extra softmax logits: make the "
                "cache with layout='plain'"
            )
        if self.decodes(call.query.shape[2]):
            return self._decode(call)
        if self._new is not None:
            check_handed_out(call.value, self._new[2], "the tiled layout")
        attended = attend_by_token(call, self.plan)
        # What is stored may be quantized; what was attended to is not.
        self.store(call.mask)
        return attended

    @never_compiled
    def _decode(self, call: Call) -> Attended:
        """Rotate, choose, append what `update` took, attend."""
        key, handed, value = self._taken()
        check_handed_out(call.value, handed, "the tiled layout")
        query, key, value = call.query.squeeze(2), key.squeeze(2), value.squeeze(2)
        if not query.dtype == key.dtype == value.dtype == self.dtype:
            query, key, value = query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)
        attended = self._step(query, key, value, call)
        return attended._replace(output=attended.output.unsqueeze(2).to(call.value.dtype))

    def _step(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Attended:
        """One token of each sequence by the kernels; `output` has no dimension of queries yet."""
        output, rotated, chosen = self._backend.decode(query, key, value, self.cache, self.plan, call.scaling)
        selected = chosen.selected(query.shape[1]) if call.is_observed and chosen is not None else None
        return Attended(output, selected, torch.Size((*rotated.shape[:2], 1, rotated.shape[2])))

    @never_compiled
    def store(self, mask: Tensor | None) -> None:
        """See `Recordable`."""
        raw, keys, values = (states.to(self.dtype) for states in self._taken())
        lengths, order = self._counted(mask, keys.shape[2])
        if self.cache.rotated_from:
            # Those that are short still are held as they came.
            keys = torch.where((lengths < self.cache.rotated_from)[:, None, None, None], raw, keys)
        self._backend.fill(self.cache, keys, values, lengths, order)
        self._is_filled = True

    def _counted(self, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor | None]:
        """Real tokens of each sequence, once `length` were given, and the order with these first; None: as they are."""
        if mask is None and self._real.shape[1] == 0:
            return torch.full((self.batch_size,), length, device=self.device), None
        given = int(self.get_seq_length()) if self._is_filled else 0
        new = real_tokens(mask, self.batch_size, length - given, self.device)
        self._real = real = torch.cat([self._known(given), new], 1)
        self._padding.copy_((~real[0]).sum())
        # A GPU is not asked whether that is needed: the answer takes longer.
        in_order = self.device.type == "cpu" and bool(real.all())
        return real.sum(-1), None if in_order else (~real).to(torch.int8).sort(dim=-1, stable=True).indices

    def get_seq_length(self) -> int:  # type: ignore[override,unused-ignore]
        """Tokens given so far, padding too: a tensor, so that a recorded step goes on counting."""
        if not self.is_initialized:
            return 0
        return self.cache.lengths[0].long() + self._padding  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Tokens that it holds at most, before it grows."""
        return self.max_cache_len

    def held_states(self) -> tuple[Tensor, Tensor] | None:
        """See `Readable`; at places of padding is any token."""
        return self._given()[1:] if self._is_filled else None

    def knows(self, mask: Tensor) -> bool:
        """See `Recordable`."""
        if not self._is_filled:
            return True
        given = int(self.get_seq_length())
        if mask.ndim != 2 or mask.shape[0] != self.batch_size or mask.shape[1] <= given:
            return False
        return torch.equal(mask[:, : given + 1].to(self.device, torch.bool), self._known(given + 1))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask and the position of the first; a decoding step needs none and asks for one."""
        if self.decodes(query_length):
            return 1, 0
        return int(self.get_seq_length()) + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these indices (beam search)."""
        if self.is_initialized:
            beam_idx = beam_idx.to(self.device)
            self.cache.take(beam_idx)
            self._real = self._real.index_select(0, beam_idx)
            self._padding.copy_((~self._real[0]).sum())

    def _by_token(self) -> tuple[Tensor, Tensor]:
        """Keys and values that are held, [batch, num_key_value_heads, longest, width]."""
        return self.cache.read()

    def _known(self, given: int) -> Tensor:
        """Which of the tokens so far were no padding, [batch, given]."""
        return torch.nn.functional.pad(self._real, (0, given - self._real.shape[1]), value=True)

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys as held, keys rotated, and values of all tokens so far, at the places at which they were given."""
        given = int(self.get_seq_length())
        places = (self._known(given).cumsum(-1) - 1).clamp(min=0)
        keys, values = (tokens_at(places, states) for states in self._by_token())
        # A GPU is not asked: there all are rotated.
        if not self.cache.rotated_from or not bool((short := self.cache.lengths < self.cache.rotated_from).any()):
            return keys, keys, values
        return keys, torch.where(short[:, None, None, None], rotate(keys, self.plan.rotation), keys), values
