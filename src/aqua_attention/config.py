# SPDX-License-Identifier: Apache-2.0
"""The knobs of AQUA attention: one frozen dataclass, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from aqua_attention.errors import AquaError

SELECTIONS = ("magnitude", "weighted", "static")
SHARES = ("head", "group")
BITS = (None, 8, 4)
AUTO = "auto"
"""A `min_length` that `apply` reads from the machine's profile."""


@dataclass(frozen=True)
class AquaConfig:
    """What is multiplied, what is stored, and which tokens are exact.

    The defaults are the paper's method at its headline setting. `AquaConfig(k_ratio=0.5,
    selection="weighted", sink=4, recent=64)` is what we recommend: less work and less loss.

    Attributes:
        k_ratio: share of the kept dimensions whose products are computed for a query, in (0, 1];
            k = ceil(k_ratio * kept). 1 is dense attention, up to rounding.
        logit_error: adaptive k, replaces `k_ratio` when given: each query keeps the fewest dimensions, in the order of
            `selection`, for which the expected squared error of its logits, sum over the dropped dimensions of
            (scaling * q_i * rms(k_i))^2, is at most this; summed over the query heads when `share` is "group". It is in
            the logit's own units, so one value fits every layer, head and model: 0.05 to 0.2 are sensible.
        s_ratio: share of trailing (low-variance) rotated key dimensions that are never stored, in [0, 1)
            ("AQUA-Memory"); kept = head_dim - round(s_ratio * head_dim). Tokens of an exact window keep all of them,
            and so do, when there is one, all tokens of sliding-window layers.
        selection: which dimensions a query keeps. "magnitude": largest |q_i| (the paper). "weighted": largest
            |q_i| * rms(k_i), the expected size of what is dropped (ours). "static": always the first k, whatever
            the query (plain PCA slicing, for comparison).
        share: "head": each query head its own dimensions (the paper). "group": one set for all query heads of
            a key-value head, which is what lets a GPU read fewer key bytes under grouped-query attention.
        sink: number of first (non-padding) tokens scored with every dimension.
        recent: number of last tokens, the query's own included, scored with every dimension.
        bits: 8 or 4 stores keys (by rotated channel, with calibrated scales) and values in int8 or int4, except for the
            last 64 to 128 tokens (or `recent`, if more); None stores them as the model computes them. With 4, the first
            quarter of the key dimensions has 8.
        h2o_ratio: share of a sequence's tokens so far that a cache keeps, in (0, 1] ("AQUA-H2O"): for each key-value
            head half of them those that were given most attention, half the most recent; `sink` and `recent` tokens
            always stay. 1 keeps all.
        h2o_queries: only the last so many queries say which tokens stay, as in SnapKV; None: all so far, as in H2O. In
            decoding the attention of earlier ones fades, by one part in so many for each new token.
        min_length: a query that sees fewer tokens of its sequence, its own included and padding not, multiplies every
            stored dimension: below it, choosing costs more than it saves. In a sliding-window layer all tokens so far
            count. "auto": `apply` takes the number from what `aqua bench breakeven` measured here, for decoding.

    Sliding-window layers are never rounded and lose no tokens, whatever `bits` and `h2o_ratio` say.

    Raises:
        AquaError: a value is out of range; the message names the field, the value and the range.
    """

    k_ratio: float = 0.75
    s_ratio: float = 0.0
    selection: str = "magnitude"
    share: str = "head"
    sink: int = 0
    recent: int = 0
    logit_error: float | None = None
    bits: int | None = None
    h2o_ratio: float = 1.0
    h2o_queries: int | None = None
    min_length: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        if not _is_number(self.k_ratio) or not 0 < self.k_ratio <= 1:
            raise AquaError(f"k_ratio is {self.k_ratio!r}: it must be a number with 0 < k_ratio <= 1")
        if not _is_number(self.s_ratio) or not 0 <= self.s_ratio < 1:
            raise AquaError(f"s_ratio is {self.s_ratio!r}: it must be a number with 0 <= s_ratio < 1")
        if self.selection not in SELECTIONS:
            raise AquaError(f"selection is {self.selection!r}: it must be one of {', '.join(SELECTIONS)}")
        if self.share not in SHARES:
            raise AquaError(f"share is {self.share!r}: it must be one of {', '.join(SHARES)}")
        if self.logit_error is not None and not (_is_number(self.logit_error) and self.logit_error >= 0):
            raise AquaError(f"logit_error is {self.logit_error!r}: it must be a number, 0 or more, or None")
        if self.bits not in BITS or type(self.bits) not in (int, type(None)):
            raise AquaError(f"bits is {self.bits!r}: it must be one of {', '.join(map(str, BITS))}")
        if not _is_number(self.h2o_ratio) or not 0 < self.h2o_ratio <= 1:
            raise AquaError(f"h2o_ratio is {self.h2o_ratio!r}: it must be a number with 0 < h2o_ratio <= 1")
        if self.h2o_queries is not None and (type(self.h2o_queries) is not int or self.h2o_queries < 1):
            raise AquaError(f"h2o_queries is {self.h2o_queries!r}: it must be a whole number, 1 or more, or None")
        for name in ("sink", "recent", "min_length"):
            value, is_length = getattr(self, name), name == "min_length"
            if is_length and value == AUTO:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                other = ', or "auto"' if is_length else ""
                raise AquaError(f"{name} is {value!r}: it must be a whole number of tokens, 0 or more{other}")

    def kept_dims(self, head_dim: int) -> int:
        """Number of leading rotated key dimensions that are stored, of `head_dim`."""
        kept = head_dim - round(self.s_ratio * head_dim)
        if kept < 1:
            raise AquaError(f"s_ratio {self.s_ratio} stores none of {head_dim} key dimensions: lower it")
        return kept

    def selected_dims(self, head_dim: int) -> int:
        """Number k of dimensions multiplied for a query outside the exact window, by `k_ratio`."""
        # The small term keeps 0.28 * 25 = 7.000000000000001 from becoming 8.
        return max(1, math.ceil(self.k_ratio * self.kept_dims(head_dim) - 1e-9))

    @property
    def threshold(self) -> int:
        """`min_length` as a number of tokens.

        Raises:
            AquaError: it is "auto", which only `apply` turns into a number.
        """
        if self.min_length == AUTO:
            raise AquaError('min_length is "auto": only `apply` looks it up; give a number of tokens here')
        return int(self.min_length)

    @property
    def effective_ratio(self) -> float | None:
        """E = k_ratio * (1 - s_ratio), the share of head_dim multiplied (paper); None when `logit_error` decides."""
        return None if self.logit_error is not None else self.k_ratio * (1 - self.s_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


def check_bidirectional(model_name: str, config: AquaConfig) -> None:
    """Raise AquaError for a setting that means nothing where every token sees every other one and there is no cache."""
    for name, meaning in (
        ("recent", "no token is the most recent one"),
        ("min_length", "all queries of a sequence see as many tokens"),
        ("bits", "it has no cache"),
        ("h2o_ratio", "it has no cache"),
    ):
        value = getattr(config, name)
        if value != getattr(AquaConfig, name):
            raise AquaError(f"{name} is {value!r}, but {model_name} is bidirectional ({meaning}): leave it out")


def encoder_config(config: AquaConfig) -> AquaConfig:
    """What of a configuration is for the bidirectional layers of a model that has causal ones too."""
    return dataclasses.replace(config, recent=0, min_length=0, bits=None, h2o_ratio=1.0, h2o_queries=None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
