# SPDX-License-Identifier: Apache-2.0
"""The knobs of AQUA attention: one frozen dataclass, checked on construction. Each is declared here alone."""

import dataclasses
import math
import numbers
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

from aqua_attention.errors import AquaError, brief, did_you_mean

SELECTIONS = ("magnitude", "weighted", "static")
SHARES = ("head", "group")
BITS = (None, 8, 4)
SCORE_BITS = (16, 8, 4)
SLIDING = ("exact", "approximate")
DECODING = "decoding"
SELECT_IN = ("all", DECODING)
AUTO = "auto"
"""A `min_length` that `apply` reads from the machine's profile."""
PAPER: dict[str, Any] = {"k_ratio": 0.75, "selection": "magnitude", "share": "head", "sink": 0, "recent": 0}
PAPER["sliding"] = "approximate"
"""The paper's method, where the defaults are another. A file of an earlier version that lacks a knob means this."""
DEFAULT_PRESET, NAMED = "accurate", "preset"
PRESETS: dict[str, dict[str, Any]] = {
    DEFAULT_PRESET: {},
    "fast": {"k_ratio": 0.5},
    "small": {"bits": 8},
    "select": {"k_ratio": 0.25, "select_p": 0.95, "score_bits": 8},
    "paper": PAPER,
}
"""Settings by name: what each changes of the defaults."""
QUERIES_WITHOUT_EVICTION = "h2o_queries says which tokens stay, but with h2o_ratio 1 all do: give a smaller h2o_ratio"
DENSE_PROMPTS = (
    f"select_in is {DECODING!r}, so prompts are dense: figures of them alone, as perplexity and log-likelihoods, show "
    "no choice of tokens"
)
_TOKENS, _NO_CACHE = "of tokens, 0 or more", "it has no cache"
_ALL_READ = "tokens are chosen in decoders only"
_LESS = {"<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Knob:
    """What a field of `AquaConfig` does and may be: checks, options and tables are made from this.

    Attributes:
        help: what it does, in a line.
        range: its numbers, such as "0 < k_ratio <= 1", "0 or more" or "of tokens, 0 or more".
        choices: its values that are in no range, besides a default of None.
        causal: why it means nothing to a bidirectional model; empty where it does.
        type, default: the field's, filled in by `knobs`; the type is that of its numbers, or str.
    """

    help: str
    range: str = ""
    choices: tuple[Any, ...] = ()
    causal: str = ""
    type: Any = str
    default: Any = None

    def allowed(self) -> str:
        """Its values in words."""
        if not self.range:
            return f"one of {', '.join(map(str, self.choices))}"
        joined = " with " if "<" in self.range else " " if "," in self.range else ", "
        others = "".join(f', or "{choice}"' for choice in self.choices) + (", or None" if self.default is None else "")
        return f"a {'number' if self.type is float else 'whole number'}{joined}{self.range}{others}"

    def allows(self, value: Any) -> bool:
        """Whether it may have a value. Truth values, NaN and infinity are no numbers."""
        if any(type(value) is type(choice) and value == choice for choice in (*self.choices, self.default)):
            return True
        if not self.range or isinstance(value, bool) or not isinstance(value, (int, self.type)):
            return False
        if "<" not in self.range:
            return float(self.range.removesuffix(" or more").split()[-1]) <= value < math.inf
        low, above, _, below, high = self.range.split()
        return bool(_LESS[above](float(low), value) and _LESS[below](value, float(high)))


@dataclass(frozen=True)
class AquaConfig:
    """What is multiplied, what is stored, and which tokens are exact.

    The defaults lose little (docs/results/loss.md has the figures), and the decoding kernels take them.
    `AquaConfig.paper()` is the paper's method. `AquaConfig.preset(name)` knows other settings by name.

    Attributes:
        k_ratio: share of the kept dimensions whose products are computed for a query, in (0, 1];
            k = ceil(k_ratio * kept). 1 is dense attention, up to rounding.
        logit_error: adaptive k, which replaces `k_ratio` when given. Each query keeps the fewest dimensions, in the
            order of `selection`, for which the variance of the logit error is at most this. The variance is the sum of
            (scaling * q_i * rms(k_i))^2 over the dropped dimensions, and over the query heads when `share` is "group".
            It has no unit, so one value fits every layer, head and model: 0.05 to 0.2 are sensible.
        s_ratio: share of trailing (low-variance) rotated key dimensions that are never stored, in [0, 1)
            ("AQUA-Memory"); kept = head_dim - round(s_ratio * head_dim). Tokens of an exact window keep all of them,
            and so do, when there is one, all tokens of sliding-window layers.
        selection: which dimensions a query keeps. "magnitude": largest |q_i| (the paper). "weighted": largest
            |q_i| * rms(k_i), the expected size of what is dropped (ours). "static": always the first k (PCA slicing,
            for comparison).
        share: "head": each query head its own dimensions (the paper). "group": one set for all query heads of
            a key-value head, which is what lets a GPU read fewer key bytes under grouped-query attention.
        sink: number of first (non-padding) tokens scored with every dimension.
        recent: number of last tokens, the query's own included, scored with every dimension.
        bits: 8 or 4 stores keys (by rotated channel, with calibrated scales) and values in int8 or int4, except for the
            last 64 to 128 tokens (or `recent`, if more); None stores them as the model computes them. With 4, the first
            quarter of the key dimensions has 8.
        h2o_ratio: share of a sequence's tokens so far that a cache keeps, in (0, 1] ("AQUA-H2O"). For each key-value
            head, half of these were given most attention, and half are the most recent. `sink` and `recent` tokens
            always stay. 1 keeps all.
        h2o_queries: how many last queries decide which tokens stay, as in SnapKV. None: all so far, as in H2O. With
            h2o_queries = n, the attention of earlier queries fades by 1/n for each decoded token.
        min_length: a query that sees fewer tokens of its sequence multiplies every stored dimension: below it, choosing
            costs more than it saves. Its own token counts, padding does not. In a sliding-window layer all tokens so
            far count. "auto": `apply` takes the number that `aqua bench breakeven` measured here, for decoding; where
            tokens are chosen, the one that it measured for this `select_p` or `select_tokens`. Such a query reads all.
        sliding: sliding-window layers of a decoder. "exact": they multiply and store every dimension (ours). They read
            their window only, so leaving dimensions out would save no time there, and cost most of the loss.
            "approximate": they are like the others (the paper).
        select_p: each query reads only some tokens ("AQUA-Select"): for each key-value head the fewest that hold this
            share of its approximate softmax, in (0, 1]. `k_ratio` then says how many dimensions score them. Attention
            to what is read multiplies every stored dimension. Tokens of the exact window are always read. None: all.
        select_tokens: the same with a fixed number of tokens, besides those of the exact window.
        score_bits: 16, 8 or 4, of the copy of the keys that `select_p` and `select_tokens` score.
        select_in: which queries choose tokens. "all". "decoding": calls of one query alone; others, as those of a
            prompt, attend densely, which is much faster there. So figures of whole texts, as perplexity, do not see
            the choice then.

    Sliding-window layers are never rounded, lose no tokens and read all, whatever `bits`, `h2o_ratio` and others say.
    Numbers of numpy become Python's own.

    Raises:
        AquaError: a value is out of range; the message names the field, the value and the range.
    """

    k_ratio: Annotated[float, Knob("Share of the key dimensions that a query multiplies", "0 < k_ratio <= 1")] = 0.9
    s_ratio: Annotated[
        float, Knob("Share of the key dimensions, the last ones, that is never stored", "0 <= s_ratio < 1")
    ] = 0.0
    selection: Annotated[
        str,
        Knob(
            "How dimensions are chosen: magnitude (the paper), weighted (ours) or static (always the first)",
            choices=SELECTIONS,
        ),
    ] = "weighted"
    share: Annotated[
        str,
        Knob(
            "Who chooses: head (each query head for itself) or group (those of a key-value head together)",
            choices=SHARES,
        ),
    ] = "group"
    sink: Annotated[int, Knob("How many first tokens are scored with every dimension", _TOKENS)] = 4
    recent: Annotated[
        int,
        Knob("How many last tokens are scored with every dimension", _TOKENS, causal="no token is the most recent one"),
    ] = 64
    logit_error: Annotated[
        float | None,
        Knob("Variance of the logit error that a query may have; chooses k, replaces k_ratio", "0 or more"),
    ] = None
    bits: Annotated[
        int | None,
        Knob("Store keys and values in int8 (8) or int4 (4) (default: as computed)", choices=BITS, causal=_NO_CACHE),
    ] = None
    h2o_ratio: Annotated[
        float,
        Knob(
            "Share of the tokens that the cache keeps; the others are forgotten (H2O)",
            "0 < h2o_ratio <= 1",
            causal=_NO_CACHE,
        ),
    ] = 1.0
    h2o_queries: Annotated[
        int | None, Knob("How many last queries decide which tokens stay (default: all)", "1 or more")
    ] = None
    min_length: Annotated[
        int | Literal["auto"],
        Knob(
            "A query that sees fewer tokens multiplies every dimension; auto: as `aqua bench breakeven` found",
            *(_TOKENS, (AUTO,), "all queries of a sequence see as many tokens"),
        ),
    ] = 0
    sliding: Annotated[
        str, Knob("Layers with a sliding window: exact, or approximate like the others (the paper)", choices=SLIDING)
    ] = "exact"
    select_p: Annotated[
        float | None,
        Knob(
            "Read the fewest tokens that hold this share of the softmax (default: all)",
            "0 < select_p <= 1",
            causal=_ALL_READ,
        ),
    ] = None
    select_tokens: Annotated[
        int | None, Knob("Read this many tokens, besides the exact ones (default: all)", "1 or more", causal=_ALL_READ)
    ] = None
    score_bits: Annotated[
        int,
        Knob(
            "Bits of the copy of the keys by which select_p and select_tokens choose",
            choices=SCORE_BITS,
            causal=_ALL_READ,
        ),
    ] = 16
    select_in: Annotated[
        str,
        Knob(
            "Which queries choose tokens: all, or those of decoding alone, so that prompts are dense",
            choices=SELECT_IN,
            causal=_ALL_READ,
        ),
    ] = "all"

    def __post_init__(self) -> None:
        config: Any = type(self)
        for name, knob in knobs(config).items():
            value = as_python(getattr(self, name))
            object.__setattr__(self, name, value)
            if not knob.allows(value):
                raise AquaError(f"{name} is {value!r}: it must be {knob.allowed()}")
        if self.h2o_queries is not None and self.h2o_ratio == 1:
            warnings.warn(QUERIES_WITHOUT_EVICTION, stacklevel=3)
        if self.select_p is not None and self.select_tokens is not None:
            raise AquaError(f"select_p is {self.select_p:g} and select_tokens {self.select_tokens}: give one of them")
        if self.chooses_tokens and self.h2o_ratio < 1:
            raise AquaError(
                f"h2o_ratio is {self.h2o_ratio:g}: with select_p or select_tokens all tokens must stay, set it to 1"
            )
        for name in ("score_bits", "select_in"):
            value = getattr(self, name)
            if value != knobs(config)[name].default and not self.chooses_tokens:
                raise AquaError(
                    f"{name} is {value}, but no tokens are chosen: leave it out, or give select_p or select_tokens"
                )

    @classmethod
    def preset(cls, name: str = DEFAULT_PRESET, **changes: Any) -> Self:
        """A setting by name, with changes.

        Args:
            name: "accurate": the defaults. "fast": half of the products, for speed. "small": keys and values in int8.
                "select": reads the tokens that hold most of the softmax, for long contexts. "paper": see `paper`.

        An AquaError for another name.
        """
        return cls._made(name, changes)

    @classmethod
    def paper(cls, k_ratio: float = PAPER["k_ratio"], **changes: Any) -> Self:
        """The paper's method: largest |q_i|, each query head its own dimensions, and no exact window."""
        return cls.preset("paper", k_ratio=k_ratio, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The setting that `to_dict` wrote; what is left out has its default. An AquaError for an unknown name.

        `{"preset": NAME}` begins with that preset, see `preset`, and what else is given counts beside it.
        """
        changes = {name: value for name, value in values.items() if name != NAMED}
        return cls._made(values.get(NAMED, DEFAULT_PRESET), changes, NAMED)

    @classmethod
    def of(cls, given: Any) -> Self:
        """A setting as `apply` takes it: one, a dict for `from_dict`, a preset's name, or None for the defaults."""
        if isinstance(given, cls):
            return given
        if given is None or isinstance(given, str):
            return cls.preset(given or DEFAULT_PRESET)
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        raise AquaError(f"config is {brief(given)}: give an AquaConfig, a dict of its fields, or a preset's name")

    @classmethod
    def _made(cls, preset: Any, changes: dict[str, Any], *others: str) -> Self:
        """A preset with changes. `others` are names that are no knobs, and could have been meant."""
        if not isinstance(preset, str) or preset not in PRESETS:
            raise AquaError(f"preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
        config: Any = cls
        known = [*knobs(config), *others]
        for name in changes:
            if name not in known:
                remedy = did_you_mean(name, known) or f"they are {', '.join(known)}"
                raise AquaError(f"there is no setting {name!r}: {remedy}")
        return cls(**PRESETS[preset] | changes)

    @property
    def chooses_tokens(self) -> bool:
        """Whether queries read only some tokens."""
        return self.select_p is not None or self.select_tokens is not None

    @property
    def choice(self) -> str:
        """How many tokens are read, in words; empty: all."""
        if self.select_p is not None:
            return f"select_p={self.select_p:g}"
        return "" if self.select_tokens is None else f"select_tokens={self.select_tokens}"

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        config: Any = type(self)
        return {name: value for name, value in self.to_dict().items() if value != knobs(config)[name].default}

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

    def exact(self) -> Self:
        """The same with every dimension multiplied and stored, for a layer where nothing is to be saved."""
        nothing: dict[str, Any] = {"logit_error": None, "s_ratio": 0.0, "sink": 0, "recent": 0, "min_length": 0}
        return dataclasses.replace(self.reading_all(), k_ratio=1.0, **nothing)

    def reading_all(self) -> Self:
        """The same without a choice of tokens."""
        return dataclasses.replace(self, select_p=None, select_tokens=None, score_bits=16, select_in="all")


def as_python(value: Any) -> Any:
    """A number of numpy as Python's own, which JSON needs; float32's 0.2 is 0.2. Anything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(str(value) if hasattr(value, "dtype") else value)


def whole_number(name: str, value: Any) -> int:
    """A number of things as Python's own; an AquaError, which names it, where it is no whole number."""
    if type(number := as_python(value)) is not int:
        raise AquaError(f"{name} is {brief(number)}: it must be a whole number")
    return number


@cache
def knobs(config: Any = AquaConfig) -> dict[str, Knob]:
    """The knobs that a class declares, `AquaConfig` or one that adds to it, by name."""
    hints, found = get_type_hints(config, include_extras=True), {}
    for field in dataclasses.fields(config):
        kind, knob = get_args(hints[field.name])
        number = next((one for one in (float, int) if one in (get_args(kind) or (kind,))), str)
        found[field.name] = dataclasses.replace(knob, type=number, default=field.default)
    return found


def check_bidirectional(model_name: str, config: AquaConfig) -> None:
    """Raise AquaError for a setting that means nothing where every token sees every other one and there is no cache.

    A default is no such setting: nobody has given it, and `encoder_config` leaves it out.
    """
    neutral = _neutral_causal_knobs()
    for name, value in neutral.items():
        knob, given = knobs()[name], getattr(config, name)
        if given not in (value, knob.default):
            raise AquaError(f"{name} is {given!r}, but {model_name} is bidirectional ({knob.causal}): leave it out")


def encoder_config(config: AquaConfig) -> AquaConfig:
    """What of a configuration is for bidirectional layers, of an encoder or beside causal ones."""
    return dataclasses.replace(config, h2o_queries=None, **_neutral_causal_knobs())


def _neutral_causal_knobs() -> dict[str, Any]:
    """The knobs that mean nothing to bidirectional layers, at the values that do nothing: the paper knows none."""
    paper = AquaConfig.paper()
    return {name: getattr(paper, name) for name, knob in knobs().items() if knob.causal}
