# SPDX-License-Identifier: Apache-2.0
"""A cache layer of fixed size in the layout of the decoding kernels (`ops.triton`, `ops.cpu`).

A decoded token is rotated, appended and attended to by few kernels, which look at no mask and no length on the CPU, so
that a step can be recorded as a CUDA graph. Padding is not stored: each sequence has its own length.

On a CPU, where lengths are known, a sequence shorter than `min_length` is not rotated: nothing is chosen there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from aqua_attention.cache.growing import check_active, tagged
from aqua_attention.cache.spec import CacheSpec
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import KERNEL_DTYPES, is_interpreted, no_kernels_reason
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.ops.layout import LARGEST_QUANTIZED, TILE, WIDEST, Chosen, TiledCache
from aqua_attention.ops.mask import HIDDEN

LARGEST_FLOAT32_HEAD = 128


def untiled_reason(config: AquaConfig, spec: CacheSpec, query_heads: int, dtype: torch.dtype) -> str | None:
    """Why a layer cannot be stored for the decoding kernel; None when it can."""
    groups, head_dim, _ = spec.matrix.shape
    device = spec.matrix.device
    on_cpu = device.type == "cpu" and not is_interpreted(device)
    if reason := no_kernel_reason() if on_cpu else no_kernels_reason(device):
        return reason
    if on_cpu and dtype not in (torch.float32, torch.bfloat16):
        return f"the model is {dtype}, and the CPU kernel takes float32 and bfloat16"
    if config.share != "group" and query_heads != groups:
        return f"share is {config.share!r}, and the kernel reads the same dimensions for a group (share='group')"
    if spec.bits == 4 or spec.eviction is not None or spec.has_window_store:
        return "it stores neither bits=4, h2o_ratio nor s_ratio with an exact window"
    if spec.bits is not None and on_cpu:
        return "the CPU kernel reads no bits=8"
    if spec.bits is not None and head_dim > LARGEST_QUANTIZED:
        return f"heads have {head_dim} dimensions, and with bits=8 it takes {LARGEST_QUANTIZED} at most"
    if max(config.sink, config.recent) > TILE:
        return f"sink is {config.sink} and recent {config.recent}, and it takes {TILE} at most"
    if dtype not in KERNEL_DTYPES:
        return f"the model is {dtype}, and it takes bfloat16, float16 and float32"
    if dtype == torch.float32 and head_dim > LARGEST_FLOAT32_HEAD and spec.matrix.is_cuda:
        return f"heads have {head_dim} dimensions, and in float32 it takes {LARGEST_FLOAT32_HEAD} at most"
    if head_dim > WIDEST:
        return f"heads have {head_dim} dimensions, and it takes {WIDEST} at most"
    return None


class TiledLayer(StaticLayer):
    """A cache layer of fixed size: keys in tiles by dimension, values by token, see `TiledCache`."""

    def __init__(self, spec: CacheSpec, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.spec = spec
        self.cache: TiledCache | None = None
        self.mask_is_known = True
        """Whether the mask of the coming forward pass hides nothing but the padding of a prompt; else tokens are
        attended to one by one in plain torch. Set before each pass, where nothing is being recorded."""
        self.reset()

    def reset(self) -> None:
        """Forget everything; what is allocated stays, because recorded CUDA graphs know its addresses."""
        self.is_initialized = False
        self._is_filled = False
        self._new: tuple[Tensor, Tensor, Tensor] | None = None
        """Keys as they came, the same rotated (while decoding not), and values, that the next attention stores."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        shape = (self.batch_size, self.num_heads, self.spec.kept, value_states.shape[3], self.max_cache_len)
        held = self.cache
        if held is None or (held.shape, held.dtype, held.tail.device) != (shape, self.dtype, self.device):
            self.cache = held = None  # the old one makes room first
            self.cache = TiledCache(*shape, self.dtype, self.device, quantization=self.spec.quantization)
            self._padding = torch.zeros((), dtype=torch.long, device=self.device)
            """Padding tokens of the first sequence, which are given but not stored."""
        else:
            held.clear()
            self._padding.zero_()
        on_cpu = self.device.type == "cpu" and not is_interpreted(self.device)
        whole = self.spec.kept == key_states.shape[3]
        assert self.cache is not None
        self.cache.rotated_from = self.spec.min_length if on_cpu and whole else 0
        self._real = torch.ones(self.batch_size, 0, dtype=torch.bool, device=self.device)
        """Which of the tokens given at once were no padding, [batch, so many]; decoded ones all are."""
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; `decode` or `store` writes them.

        Returns rotated keys and values of all tokens given, padding too; while decoding, NaN in place of them: AQUA's
        attention function asks the layer itself.

        Raises:
            AquaError: AQUA has left the model.
        """
        check_active(self.spec)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.decodes(key_states.shape[2]):
            self._new = key_states, key_states, value_states
            nothing = key_states.new_full((1,), torch.nan)
            keys = nothing.expand(*key_states.shape[:3], self.spec.kept)
            return tagged(keys, self), nothing.expand(value_states.shape)
        keys, values = self.spec.rotated(key_states), value_states
        self._new = key_states, keys, values
        if self._is_filled:
            _, old_keys, old_values = self._given()
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        return tagged(keys, self), values

    def decodes(self, queries: int) -> bool:
        """Whether so many new tokens are a decoding step for the kernel."""
        return queries == 1 and self._is_filled and self.mask_is_known

    @torch.compiler.disable
    def decode(
        self, query: Tensor, key_rms: Tensor, config: AquaConfig, scaling: float
    ) -> tuple[Tensor, Tensor, Chosen | None]:
        """Rotate, choose, append what `update` took, attend.

        Args:
            query: as the model computes it, [batch, num_attention_heads, 1, head_dim].
            key_rms: float32 [num_key_value_heads, kept].

        Returns:
            Output [batch, num_attention_heads, 1, value_dim], the query as keys were multiplied with it, [batch,
            num_attention_heads, 1, kept], and what of it (None: every dimension).
        """
        key, _, value = self._taken()
        assert self.cache is not None
        given = query[:, :, 0], key[:, :, 0], value[:, :, 0], self.cache, self.spec.matrix, key_rms, config
        if query.device.type == "cpu" and not is_interpreted(query.device):
            from aqua_attention.ops.backends.cpu.step import decode_step
        else:
            from aqua_attention.ops.backends.triton.step import decode_step
        output, multiplied, chosen = decode_step(*given, scaling=scaling)
        return output[:, :, None], multiplied[:, :, None], chosen

    @torch.compiler.disable
    def store(self, mask: Tensor | None) -> None:
        """Write the tokens that `update` took and that the mask of their attention shows to be no padding."""
        raw, keys, values = self._taken()
        assert self.cache is not None
        batch, new = self.batch_size, keys.shape[2]
        real = torch.ones(batch, new, dtype=torch.bool, device=self.device)
        if mask is not None:
            # A real token sees itself, a padding token is seen by none.
            places = torch.arange(new, device=self.device)
            seen = mask[:, :, places, mask.shape[3] - new + places] != HIDDEN
            real = seen.any(1).expand(batch, -1)
        if self._is_filled:
            held, old_keys, old_values = self._given()
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            raw = torch.cat([held, raw], 2) if self.cache.rotated_from else keys
            real = torch.cat([self._known(held.shape[2]), real], 1)
        self._real = real
        self._padding.copy_((~real[0]).sum())
        if self.cache.rotated_from:
            # Those that are short still are held as they came.
            keys = torch.where((real.sum(-1) < self.cache.rotated_from)[:, None, None, None], raw, keys)
        if not bool(real.all()):
            # The real ones first, in order.
            order = (~real).to(torch.int8).sort(dim=-1, stable=True).indices[:, None, :, None]
            keys, values = (
                states.gather(2, order.expand(*states.shape[:2], -1, states.shape[3])) for states in (keys, values)
            )
        self.cache.fill(keys, values, real.sum(-1))
        self._is_filled = True

    def get_seq_length(self) -> int:  # type: ignore[override,unused-ignore]
        """Tokens given so far, padding too: a tensor, so that a recorded step goes on counting."""
        if self.cache is None or not self.is_initialized:
            return 0
        return self.cache.lengths[0].long() + self._padding  # type: ignore[return-value]

    def knows(self, mask: Tensor) -> bool:
        """Whether a mask, [batch, tokens so far and one more], hides nothing but what was padding in a prompt."""
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
        if self.cache is not None and self.is_initialized:
            beam_idx = beam_idx.to(self.device)
            self.cache.take(beam_idx)
            self._real = self._real.index_select(0, beam_idx)
            self._padding.copy_((~self._real[0]).sum())

    def _taken(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._new is None:
            raise AquaError(
                f"{type(self).__name__}: the model asked for attention twice after one update of its cache, which the "
                "tiled layout cannot follow: make the cache with layout='plain'"
            )
        new, self._new = self._new, None
        return new

    def _known(self, given: int) -> Tensor:
        """Which of the tokens so far were no padding, [batch, given]."""
        return torch.nn.functional.pad(self._real, (0, given - self._real.shape[1]), value=True)

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys as held, keys rotated, and values of all tokens so far, at the places at which they were given."""
        assert self.cache is not None
        given = int(self.get_seq_length())
        places = (self._known(given).cumsum(-1) - 1).clamp(min=0)[:, None, :, None]
        keys, values = (
            states.gather(2, places.expand(*states.shape[:2], -1, states.shape[3])) for states in self.cache.read()
        )
        # A GPU is not asked: there all are rotated.
        if not self.cache.rotated_from or not bool((short := self.cache.lengths < self.cache.rotated_from).any()):
            return keys, keys, values
        return keys, torch.where(short[:, None, None, None], self.spec.rotated(keys), keys), values
