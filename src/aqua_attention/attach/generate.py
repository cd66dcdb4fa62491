# SPDX-License-Identifier: Apache-2.0
"""What a model's `generate` gets while AQUA is attached: a tiled cache of the size it needs, and recorded steps."""

import functools
import inspect
import operator
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from aqua_attention.cache.cache import AquaCache
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError, Reason

ROOM = 256
"""Sizes are multiples of so many tokens, so that the next call can have the same cache."""
MOST_NEW = 2048
"""Tokens that room is made for beyond twice the prompt, however many are allowed: `generate` may end early."""
UPDATE = "_update_model_kwargs_for_generation"
BATCHING = "init_continuous_batching"
ASSISTED = "assisted generation"
MODES = ("greedy_search", "sample")
REMEDIES = {"beam search": "set num_beams=1", "beam sample": "set num_beams=1"}
REMEDIES |= {ASSISTED: "leave out the assistant, or prompt lookup"}
NEVER_CALLED = Reason("generate was not called so far")


class Replaced:
    """A method of one model, replaced while AQUA is attached. Copied or pickled it is the model's own method again."""

    def __init__(self, model: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        """Call `replacement(original, *args, **kwargs)` from now on, where the original is the model's own method."""
        self._model, self._name = model, name
        self._replacement: Callable[..., Any] | None = replacement
        self._had = vars(model).get(name)
        self.original = getattr(model, name)
        functools.update_wrapper(self, self.original)
        setattr(model, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement; once AQUA is detached, the model's own method, in case somebody kept this object."""
        if self._replacement is None:
            return self.original(*args, **kwargs)
        return self._replacement(self.original, *args, **kwargs)

    def undo(self) -> None:
        """Put the method back, unless somebody else has replaced ours."""
        self._replacement = None
        if vars(self._model).get(self._name) is not self:
            return
        delattr(self._model, self._name)
        if self._had is not None:
            setattr(self._model, self._name, self._had)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model is copied before its methods are: where they are looked up, it has none of ours yet.
        return (getattr, (self._model, self._name)) if self._had is None else (operator.getitem, ((self._had,), 0))


def refuse_batching(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refuse continuous batching, which keeps keys in pages of its own."""
    raise AquaError(
        "AQUA does not know continuous batching (generate_batch), which keeps keys and values in pages of its own: "
        "call generate with a padded batch, or detach AQUA"
    )


class GenerateCaches:
    """Gives `generate` its cache: a new one, or the one that an earlier call of the same shape has left.

    A call that hands its cache to the user leaves none.
    """

    def __init__(self, make: Callable[[int], AquaCache], why_not: Callable[[], str | None], config: AquaConfig) -> None:
        """Let `make(room)` make them, unless `why_not()` gives a reason."""
        self._make, self._why_not, self._config = make, why_not, config
        self._spare: tuple[int, AquaCache] | None = None
        self._lock = threading.Lock()
        self._local = threading.local()
        self.reason: str | None = NEVER_CALLED
        """Why the last call got no cache of ours; None when it got one."""
        self.layout = ""
        """Of the cache of the last call: "tiled", "plain", "growing", or what the user has asked for."""

    def prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `_prepare_cache_for_generation`: put a cache where it finds one that the user gave."""
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if self._config.h2o_ratio < 1 and _takes_back(given):
            raise AquaError(
                f"assisted decoding and prompt lookup take tokens back, and h2o_ratio={self._config.h2o_ratio:g} has "
                "forgotten others by then: leave one of the two out"
            )
        self.reason = self._why_not_given(given) or self._why_not()
        self.layout = "tiled" if self.reason is None else _layout(given)
        if self.reason is None:
            config = given["generation_config"]
            batch = given["batch_size"] * max(config.num_return_sequences or 1, 1)
            self._local.cache = batch, self._take(batch, _room(given))
            given["model_kwargs"]["past_key_values"] = self._local.cache[1]
        return original(*args, **kwargs)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `generate`: keep the cache for the next call where nobody else has it."""
        outer, self._local.cache = getattr(self._local, "cache", None), None
        try:
            result = original(*args, **kwargs)
            made = self._local.cache
        finally:
            self._local.cache = outer
        is_given_away = made is not None and getattr(result, "past_key_values", None) is made[1]
        if made is not None and not is_given_away and kwargs.get("custom_generate") is None:
            self._spare = made
        return result

    def forget(self) -> None:
        """Free what is kept."""
        self._spare = None

    def _why_not_given(self, given: dict[str, Any]) -> str | None:
        names = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")
        if missing := [name for name in names if name not in given]:
            text = f"this version of transformers does not say {', '.join(missing)} where it makes its cache"
            return Reason(text, "install transformers 5.16")
        config, mode = given["generation_config"], given["generation_mode"]
        if given["model_kwargs"].get("past_key_values") is not None:
            remedy = "leave past_key_values out, or give new_cache(max_length, layout='tiled')"
            return Reason("the call was given a cache of its own", remedy)
        if config.use_cache is False:
            return Reason("use_cache is False", "set use_cache=True")
        if config.cache_implementation not in (None, "dynamic"):
            return Reason(f"cache_implementation is {config.cache_implementation!r}", "leave cache_implementation out")
        if getattr(mode, "value", mode) not in MODES or _takes_back(given):
            name = ASSISTED if _takes_back(given) else str(getattr(mode, "value", mode)).replace("_", " ")
            return Reason(f"{name} moves or drops tokens of its cache", REMEDIES.get(name, ""))
        return None

    def _take(self, batch: int, room: int) -> AquaCache:
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and spare[0] == batch and room <= (spare[1].max_length or 0) <= 2 * room:
            spare[1].reset()
            return spare[1]
        del spare  # it makes room first
        return self._make(room)


def _takes_back(given: dict[str, Any]) -> bool:
    """Whether a call of `generate` drops tokens of its cache again, as assisted decoding does, in both models."""
    mode = given.get("generation_mode")
    is_assistant = getattr(given.get("generation_config"), "is_assistant", False)
    return bool(is_assistant) or str(getattr(mode, "value", mode)).replace("_", " ") == ASSISTED


def _layout(given: dict[str, Any]) -> str:
    """What kind of cache a call has that gets none of ours."""
    cache, config = given.get("model_kwargs", {}).get("past_key_values"), given.get("generation_config")
    if isinstance(cache, AquaCache):
        return cache.layout if cache.max_length else "growing"
    if cache is not None:
        return type(cache).__name__
    if getattr(config, "use_cache", None) is False:
        return "no"
    return getattr(config, "cache_implementation", None) or "growing"


def extends_masks(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether `generate`, called with these options, gives each step the mask before and tokens that are seen."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    chunk = options.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    steps = (getattr(model, name, None) for name in ("prepare_inputs_for_generation", UPDATE))
    known = all(str(getattr(step, "__module__", "")).startswith("transformers.") for step in steps)
    return known and chunk != 1 and options.get("custom_generate") is None


def _room(given: dict[str, Any]) -> int:
    """Tokens that a call needs room for, rounded up."""
    inputs, allowed = given["model_kwargs"], int(given["max_cache_length"])
    mask = inputs.get("attention_mask")
    embedded = inputs.get("inputs_embeds")
    prompt = max(0 if each is None else each.shape[1] for each in (mask, embedded))
    prompt = max(prompt, getattr(given["generation_config"], "_mask_length", 0))
    needed = max(1, min(allowed, prompt + max(prompt, MOST_NEW)) if prompt else allowed)
    return -(-needed // ROOM) * ROOM
