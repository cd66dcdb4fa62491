# SPDX-License-Identifier: Apache-2.0
"""The growing cache layer: keys rotated on write, held in stores, attended to there, and evicted from.

After an eviction it stores fewer tokens than its length says; positions and masks follow the length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from aqua_attention.cache.layer import (
    Readable,
    attend_by_token,
    check_handed_out,
    real_tokens,
    rotated_keys,
    tagged,
    wait_for_offloading,
)
from aqua_attention.cache.store import SLACK, nested
from aqua_attention.cache.stored import eviction_of, stored_specially, stores
from aqua_attention.cache.window import WindowStore
from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attention, rotate
from aqua_attention.ops.mask import HIDDEN, short_queries
from aqua_attention.ops.mass import attention_mass, group_mass
from aqua_attention.ops.plan import Attended, Call, LayerPlan
from aqua_attention.ops.reference import attention_probabilities, weighted_values
from aqua_attention.ops.score_copy import ScoreCopy
from aqua_attention.ops.select import select_dimensions

FEW_QUERIES = 16
"""So many queries multiply with stored codes; for more, the codes are widened into keys and values first."""
LEAST_EVICTED = 16
"""Eviction waits for so many new tokens, or one part in `SLACK` of the stored ones: then it moves these."""
NUMBERS, TENSORS = ("evicted", "after_eviction", "evict_from", "has_padding"), ("mass", "real", "lengths")
"""What a `RotatedLayer` holds beside keys and values."""


class RotatedLayer(Readable, DynamicLayer):
    """A growing cache layer of rotated keys, [batch, num_key_value_heads, stored, kept], and values.

    Its length is the number of tokens it was given; it may store fewer of them.
    """

    def __init__(self, plan: LayerPlan) -> None:
        # Not DynamicLayer's, which sets `keys` and `values`.
        self.is_initialized = False
        self.plan = plan
        self._eviction = eviction_of(plan)
        self._clear()

    def _clear(self) -> None:
        self._keys, self._values = stores(self.plan)
        self._evicted = 0
        self._after_eviction = 0
        """Tokens that the last eviction left."""
        self._evict_from = 0
        """Tokens stored at which eviction is due again: moving the others for each new one would cost too much."""
        self._mass: Tensor | None = None
        """Attention that each stored token was given, [batch, num_key_value_heads, stored]."""
        self._real: Tensor | None = None
        """Boolean [batch, stored]: which tokens are no padding. Kept where a window store or eviction needs it."""
        self._lengths: Tensor | None = None
        """Real tokens of each sequence so far, evicted ones too, [batch]."""
        self._has_padding = False
        self._is_offloaded = False
        self._score_copy: ScoreCopy | None = None
        self._handed: Tensor | None = None
        """The values that stand for the stored ones until attention has asked for these."""

    @property
    def stored(self) -> int:
        """Tokens stored; less than the length after an eviction."""
        return self._keys.length

    @property
    def score_copy(self) -> ScoreCopy | None:
        """The copy of the keys by which the current plan chooses tokens; None if it chooses none."""
        if not self.plan.is_plain or not self.plan.config.chooses_tokens or self.plan.config.score_bits != 8:
            return None
        if self._score_copy is None or self._score_copy.plan is not self.plan:
            self._score_copy = ScoreCopy(self.plan)
        return self._score_copy

    def held_states(self) -> tuple[Tensor, Tensor] | None:
        """See `Readable`. Under `s_ratio` with an exact window keys are zero where they were not stored."""
        return (self._keys.read(), self._values.read()) if self.stored else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rotate and append; returns all rotated keys and all values. An AquaError once AQUA has left the model.

        Where the stores hold something else than plain states, what is returned has their shape and is NaN: AQUA's
        attention function asks the layer itself (`attend`), and nobody else must read it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotated = rotated_keys(self.plan, key_states)
        self._keys.append(rotated)
        self._values.append(value_states)
        if self.plan.is_plain:
            return tagged(self._keys.read(), self), self._values.read()
        nothing = rotated.new_full((1,), torch.nan)
        keys = nothing.expand(*rotated.shape[:2], self.stored, rotated.shape[3])
        self._handed = nothing.to(value_states).expand(*keys.shape[:3], value_states.shape[3])
        return tagged(keys, self), self._handed

    def attend(self, call: Call, is_sliding: bool) -> Attended:
        """See `CacheLayer`. Then tokens are evicted, if that is due; never those of a layer with a sliding window."""
        if self.plan.is_plain:
            return attend_by_token(call._replace(score_copy=self.score_copy), self.plan)
        check_handed_out(call.value, self._handed, stored_specially(self.plan))
        self._handed = None
        if offloaded := self._is_offloaded:
            self.prefetch()
        queries, eviction = call.query.shape[2], None if is_sliding else self._eviction
        real, mass = None, None
        if eviction is not None or isinstance(self._keys, WindowStore):
            self._has_padding = self._has_padding or call.mask is not None
            real = real_tokens(call.mask, self._keys.batch, queries, self.device)
        if eviction is None and (queries > FEW_QUERIES or self.plan.config.chooses_tokens):
            attended = attend_by_token(call._replace(key=self._keys.read(), value=self._values.read()), self.plan)
        else:
            counted = eviction.counted(real) if eviction is not None and real is not None else None
            attended, mass = self._attend_stored(call, counted)
        if real is not None:
            self._attended(real, mass)
        if offloaded:
            self.offload()
        return attended

    def _attend_stored(self, call: Call, counted: Tensor | None) -> tuple[Attended, Tensor | None]:
        """Attention to what is stored, which may be fewer tokens than were given; and what each token was given by
        `counted` queries.
        """
        queries, keys = call.query.shape[2], call.key.shape[2]
        query = rotate(call.query, self.plan.rotation).to(call.value.dtype)
        short = short_queries(call.mask, self.plan.min_length, queries=queries, keys=keys, device=query.device)
        selected = select_dimensions(query, self.plan, short, scaling=call.scaling)
        call = call._replace(query=query, mask=self._visible(call.mask, queries))
        attend = self._attend_few if queries <= FEW_QUERIES else self._attend_many
        output, mass = attend(call, selected, counted)
        return Attended(output, selected, query.shape), mass

    def _attend_few(self, call: Call, selected: Tensor | None, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output of a few rotated queries, multiplied with what is stored, and what `counted` ones give each token."""
        heads = call.value.shape[1]
        probabilities = attention_probabilities(
            call.query, self._keys.products, selected, num_key_value_heads=heads, keys=self.stored, **call.options
        )
        output = weighted_values(probabilities, self._values.mixture, heads).to(call.value.dtype)
        return output, None if counted is None else group_mass(probabilities, heads, counted)

    def _attend_many(self, call: Call, selected: Tensor | None, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same where tokens are evicted, with keys and values made of what is stored."""
        assert counted is not None and self._eviction is not None
        query, key, options = call.query, self._keys.read().to(call.value.dtype), call.options
        output = attention(query, key, self._values.read(), selected, **options)
        # Without padding it is known without a look at the mask that only the last queries count.
        limit, mask = self._eviction.queries, options.pop("mask")
        last = slice(-limit if limit and mask is None else None, None)
        chosen, seen = (None if each is None else each[:, :, last] for each in (selected, mask))
        return output, attention_mass(query[:, :, last], key, chosen, counted[:, last], seen, **options)

    def get_seq_length(self) -> int:
        """Tokens given so far, evicted ones too: the position of the next one."""
        return self.stored + self._evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask, and the position of the first; after an eviction, see `_visible`."""
        return self.stored + query_length, self._evicted

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, if `check_crop` lets it: -n forgets n of them, n keeps n.

        Tokens that had left the exact window or the unrounded end do not get back what they lost then, and the
        attention that forgotten queries gave stays counted.
        """
        removed = self.check_crop(tokens_to_remove)
        left = self.stored - removed
        self._keys.keep(left)
        self._values.keep(left)
        if self._score_copy is not None:
            self._score_copy.keep(left)
        if self._real is not None and self._lengths is not None:
            self._lengths = self._lengths - self._real[:, left:].sum(-1)
            self._real = self._real[:, :left]
        if self._mass is not None:
            self._mass = self._mass[..., :left]
        if left == 0:
            self._clear()

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens a crop would forget; an AquaError if others were evicted after the last that would stay."""
        length = self.get_seq_length()
        removed = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(length, -tokens_to_remove)
        if self._evicted and removed > self.stored - self._after_eviction:
            raise AquaError(
                f"the last {removed} tokens cannot be taken back, others were evicted after them: with h2o_ratio, "
                "leave out assisted decoding and cropping"
            )
        return removed

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices; beam search takes some of them twice."""
        self._change(lambda states: states[indices.to(states.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move to the CPU."""
        self._change(lambda states: states.to("cpu", non_blocking=True))
        self._is_offloaded = True

    def prefetch(self) -> None:
        """Move back to the device of the model."""
        if self.is_initialized:
            wait_for_offloading(self.device)
            self._change(lambda states: states.to(self.device, non_blocking=True))
        self._is_offloaded = False

    @property
    def batch(self) -> int:
        """Sequences stored; 0 before the first token."""
        return self._keys.batch if self.stored else 0

    @property
    def has_evicted(self) -> bool:
        """Whether it stores fewer tokens than it was given."""
        return self._evicted > 0

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All that is held, to be written to a file: numbers and tensors by name."""
        numbers = {name: int(getattr(self, f"_{name}")) for name in NUMBERS}
        tensors = {name: getattr(self, f"_{name}") for name in TENSORS if getattr(self, f"_{name}") is not None}
        for part, store in (("keys", self._keys), ("values", self._values)):
            tensors |= {f"{part}.{name}": tensor for name, tensor in store.tensors().items()}
        return numbers, tensors

    def restore(self, numbers: dict[str, int], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Hold what `state` once returned, of a model in `dtype`."""
        self._clear()
        for name in NUMBERS:
            setattr(self, f"_{name}", type(getattr(self, f"_{name}"))(numbers[name]))
        self._keys.restore(nested("keys", tensors))
        self._values.restore(nested("values", tensors))
        for name in TENSORS:
            setattr(self, f"_{name}", tensors.get(name))
        if self._keys.length != self._values.length:
            raise ValueError(f"{self._keys.length} keys, {self._values.length} values")
        if isinstance(self._keys, WindowStore) and self._real is not None:
            self._keys.settle(self._real)
        nothing = self.plan.rotation.new_empty(0, dtype=dtype)
        self.lazy_initialization(nothing, nothing)

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self._keys.change(function)
        self._values.change(function)
        if self._score_copy is not None:
            self._score_copy.change(function)
        for name in TENSORS:
            if (tensor := getattr(self, f"_{name}")) is not None:
                setattr(self, f"_{name}", function(tensor))

    def _visible(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """A mask over the stored tokens, from the model's own, which knows nothing of evictions.

        Only its last columns, of the new tokens, are right after one. All earlier tokens are visible but for padding,
        and the exact window is counted among them: its tokens are never evicted, so it is the same window.
        """
        if self._evicted == 0 or self._real is None:
            return mask
        if mask is None and queries == 1 and not self._has_padding:
            return None
        if mask is None:
            new = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=self._real.device).tril()
        else:
            new = mask[..., -queries:] != HIDDEN
        old = self._known(self.stored - queries)[0][:, None, None]
        return torch.cat([old.expand(-1, new.shape[1], queries, -1), new.expand(len(old), -1, -1, -1)], -1)

    def _known(self, old: int) -> tuple[Tensor, Tensor]:
        """Which of the first `old` tokens are real, and how many of a sequence ever were; others count as real."""
        if self._real is None or self._lengths is None:
            real = torch.ones(self._keys.batch, old, dtype=torch.bool, device=self.device)
            return real, real.sum(-1)
        new = old - self._real.shape[1]
        return torch.nn.functional.pad(self._real, (0, new), value=True), self._lengths + new

    def _attended(self, new: Tensor, mass: Tensor | None) -> None:
        """Note which of the new tokens are real and who was attended to; trim the window store; evict."""
        before, counted = self._known(self.stored - new.shape[1])
        self._real, self._lengths = torch.cat([before, new], -1), counted + new.sum(-1)
        if isinstance(self._keys, WindowStore):
            self._keys.settle(self._real)
        if mass is not None:
            assert self._eviction is not None
            if self._mass is not None:
                known = torch.nn.functional.pad(self._mass, (0, self.stored - self._mass.shape[-1]))
                mass = self._eviction.added(known, mass, new)
            self._mass = mass
            self._evict()

    def _evict(self) -> None:
        eviction, stored = self._eviction, self.stored
        assert eviction is not None and self._mass is not None and self._real is not None and self._lengths is not None
        if stored < self._evict_from or stored <= eviction.at_most(self.get_seq_length()):
            return
        whole = max(self._keys.whole, self._values.whole)
        places, real = eviction.chosen(self._mass, self._real, self._lengths, whole)
        self._evict_from = places.shape[2] + max(places.shape[2] // SLACK, LEAST_EVICTED)
        if places.shape[2] == stored:
            return
        self._keys.gather(places)
        self._values.gather(places)
        self._mass, self._real = self._mass.gather(2, places), real
        if isinstance(self._keys, WindowStore):
            self._keys.settle(real)
        self._evicted += stored - self.stored
        self._after_eviction = self.stored
