# SPDX-License-Identifier: Apache-2.0
"""What AQUA does in one attention layer, resolved once; what changes from call to call; and what comes back.

A `LayerPlan` is made when AQUA is attached, a `Call` for each attention call. Backends take both, see `ops.backend`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aqua_attention.config import DECODING, AquaConfig
from aqua_attention.errors import AquaError, Reason

if TYPE_CHECKING:
    from aqua_attention.ops.score_copy import ScoreCopy


class Call(NamedTuple):
    """One attention call.

    Attributes:
        query: [batch, num_attention_heads, queries, head_dim], as the model computes it, after rotary embedding.
        key: rotated, [batch, num_key_value_heads, keys, kept]; value: [batch, num_key_value_heads, keys, value_dim].
        mask: see `ops.mask`; None is causal with the queries at the end of the keys.
        sink, recent: size of the exact window in tokens; uint8 masks carry it already.
        scaling: factor of the scores.
        softcap: soft limit c of the scores, c * tanh(score / c), as in Gemma 2.
        s_aux: [num_attention_heads], one extra logit a head that takes part in the softmax and has no value (gpt-oss).
        is_observed: somebody asks which dimensions were chosen, or what was read; it changes no route, see `Attended`.
        score_copy: of the keys, to score tokens by, where the cache has one; a backend may do without.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sink: int
    recent: int
    scaling: float
    softcap: float | None = None
    s_aux: Tensor | None = None
    is_observed: bool = False
    score_copy: ScoreCopy | None = None

    @property
    def has_window(self) -> bool:
        """Whether tokens are scored with every dimension, by `sink` and `recent`."""
        return self.sink + self.recent > 0

    @property
    def has_gradient(self) -> bool:
        """Whether autograd records this call."""
        return torch.is_grad_enabled() and any(each.requires_grad for each in self[:3])

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `ops.reference.attention_reference`."""
        return dict(zip(self._fields[3:9], self[3:9], strict=True))


class Reading(NamedTuple):
    """What each query and key-value head read, [batch, num_key_value_heads, queries].

    Attributes:
        read: tokens attended to; seen: tokens that it sees; int64.
        share: bytes of keys and values read, those that are scored too, to all of those seen in 16 bits; float32.
    """

    read: Tensor
    seen: Tensor
    share: Tensor


class Attended(NamedTuple):
    """What a backend returns.

    Attributes:
        output: [batch, num_attention_heads, queries, value_dim] in the dtype of the values.
        selected: the dimensions that each query multiplied outside the exact window, boolean, of shape `rotated`; None:
            all of them, or the call was not observed.
        rotated: shape of the rotated queries, [batch, num_attention_heads, queries, kept].
        reading: how many tokens were read; None: all, or the call was not observed.
    """

    output: Tensor
    selected: Tensor | None
    rotated: torch.Size
    reading: Reading | None = None


@dataclass(eq=False)
class LayerPlan:
    """Rotation, choice of dimensions, exact window and storage of one attention layer.

    Attributes:
        rotation: [num_key_value_heads, head_dim, width], leading columns of the layer's rotation; float32 for the
            kernels. Width is `kept`, or head_dim where tokens of the exact window keep every dimension.
        key_rms: root mean square of each rotated key dimension over the calibration text, not centred,
            [num_key_value_heads, kept]; of a learned basis its `key_spread`.
        config: the settings of this layer. `min_length` is a number.
        scaling: factor of the scores, where a call names none.
        key_scale, key_mean: standard deviation and mean of rotated keys, [num_key_value_heads, kept]: 8- and 4-bit keys
            are stored in their units. None where nothing is quantized.
        index: the layer's index in its model; causal: whether its attention is.
        key_weights: digest of the layer's key weights, so that no cache goes on under others; None: not known.
        projected: what its key and value projections make of a fixed input (`fingerprint.projected`), for the same.
        active: False once AQUA has left the model.
        head_dim, kept: dimensions of a head, and the leading rotated ones of a key that are stored.
        k: dimensions that a query multiplies outside the exact window; all of them where `logit_error` decides.
        sink, recent, min_length: see `AquaConfig`.
        is_adaptive: whether `logit_error` decides; selects: whether queries leave out dimensions at all.
        has_window_store: whether tokens of the exact window store more dimensions than others do.
    """

    rotation: Tensor
    key_rms: Tensor
    config: AquaConfig
    scaling: float
    key_scale: Tensor | None = None
    key_mean: Tensor | None = None
    index: int = 0
    causal: bool = True
    key_weights: list[float] | None = None
    projected: tuple[Tensor, ...] | None = None
    active: bool = True
    head_dim: int = field(init=False)
    kept: int = field(init=False)
    k: int = field(init=False)
    sink: int = field(init=False)
    recent: int = field(init=False)
    min_length: int = field(init=False)
    is_adaptive: bool = field(init=False)
    selects: bool = field(init=False)
    has_window_store: bool = field(init=False)

    def __post_init__(self) -> None:
        config, self.head_dim = self.config, self.rotation.shape[1]
        self.kept = config.kept_dims(self.head_dim)
        self.sink, self.recent, self.min_length = config.sink, config.recent, config.threshold
        self.is_adaptive = config.logit_error is not None
        self.k = self.kept if self.is_adaptive else min(config.selected_dims(self.head_dim), self.kept)
        self.selects = self.is_adaptive or self.k < self.kept
        self.has_window_store = self.kept < self.rotation.shape[2]

    @classmethod
    def of(cls, rotation: Tensor, key_rms: Tensor, config: AquaConfig, scaling: float | None = None) -> LayerPlan:
        """A plan from plain tensors.

        Args:
            rotation: [num_key_value_heads, head_dim, kept]; key_rms: [num_key_value_heads, kept].
            scaling: default 1/sqrt(head_dim).
        """
        return cls(rotation, key_rms, config, rotation.shape[1] ** -0.5 if scaling is None else scaling)

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.rotation.shape[0]

    @cached_property
    def dense(self) -> LayerPlan:
        """The same where every query multiplies every stored dimension and reads every token."""
        config = replace(self.config.reading_all(), k_ratio=1.0, logit_error=None, min_length=0)
        return replace(self, config=config)

    def for_queries(self, count: int) -> LayerPlan:
        """The plan of a call of so many queries: with `select_in` "decoding" those of a prompt choose nothing."""
        is_dense = count > 1 and self.config.chooses_tokens and self.config.select_in == DECODING
        return self.dense if is_dense else self

    @property
    def is_plain(self) -> bool:
        """Whether a cache gives back the very keys and values that it was given, rotated."""
        return self.config.bits is None and self.config.h2o_ratio == 1 and not self.has_window_store

    @property
    def needs_codes(self) -> bool:
        """Whether a mask must say more than what is visible, see `ops.mask`."""
        return self.sink + self.recent + self.min_length > 0

    def why_not_skipping(self, length: int) -> str | None:
        """Why queries multiply every stored dimension in sequences of so many tokens; None when they do not."""
        if not self.selects:
            return Reason(f"k_ratio is {self.config.k_ratio:g}: every dimension is multiplied", "set k_ratio below 1")
        if length < self.min_length:
            and_tokens = " and read every token" if self.config.chooses_tokens else ""
            text = f"sequences of fewer than {self.min_length} tokens multiply every dimension{and_tokens} (min_length)"
            return Reason(text)
        if length <= self.sink + self.recent:
            return Reason(f"all of so few tokens are in the exact window ({self.sink} + {self.recent})")
        return None

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Call:
        """A call of this layer, with its window and, unless `options` has another, its scaling."""
        return Call(query, key, value, mask, self.sink, self.recent, options.pop("scaling", self.scaling), **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPlan:
        """Itself: a copied cache belongs to the attachment that filled the first, and ends with it."""
        return self

    def __getstate__(self) -> Any:
        """Refuse pickling: a copy loaded elsewhere would belong to no attachment."""
        raise AquaError("a cache that AQUA has filled cannot be pickled: write it with Attachment.save_cache")
