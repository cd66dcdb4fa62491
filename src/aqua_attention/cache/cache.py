# SPDX-License-Identifier: Apache-2.0
"""Whole caches that rotate keys once, when they are written, and store less of them: dimensions, bits, tokens.

Growing full-attention layers are in `growing.py`. Sliding-window layers are bounded, and stay as they are but for the
rotation (`layer.py`); so do layers of a fixed size. In the tiled layout, whose decoding step can be recorded, full ones
are in tiles for the decoding kernels (`tiled.py`), or where tokens are chosen by token with a copy to score
(`scored.py`), and sliding ones are rings (`ring.py`).
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache, cache_utils

from aqua_attention.cache import layer as common
from aqua_attention.cache.growing import RotatedLayer
from aqua_attention.cache.ring import RingLayer
from aqua_attention.cache.scored import ScoredLayer
from aqua_attention.cache.stored import needs_own_cache, stores_the_same
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.errors import AquaError, said
from aqua_attention.ops.plan import LayerPlan

LAYOUTS = ("auto", "tiled", "plain")
Plans = dict[int, LayerPlan]
"""Of the layers that share a cache, by layer index."""


class AquaCache(Cache):
    """A cache made for one attachment, by `Attachment.new_cache`: growing, or of a fixed size.

    Attributes:
        max_length: tokens for which there is room. It grows when more come. None: a growing cache.
        layout: "tiled" for the decoding kernels, whose steps can be recorded; or "plain".
        windows: sizes of the sliding windows in tokens, by layer index.
        memory: what kernels that choose tokens work in, one layer after the other.

    An ordinary `DynamicCache`, which `generate` makes by itself, becomes the same as the growing one while it is empty.
    """

    def __init__(
        self, config: PreTrainedConfig, plans: Plans, max_length: int | None, offloading: bool, layout: str
    ) -> None:
        self.max_length, self.layout, self._config = max_length, layout, config
        self.memory: dict[Any, Any] = {}
        if max_length is None:
            layers = DynamicCache(config=config).layers
        else:
            layers = StaticCache(config=config, max_cache_len=max_length).layers
        self.windows = sliding_windows(config)
        super().__init__(layers=layers, offloading=offloading)
        rotate_on_write(self, plans, config)

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile by itself: a compiled step cannot say that there is no room."""
        return False

    def make_room(self, tokens: int) -> None:
        """Make room for so many tokens. A cache that is too small grows by half, or to that number if it is larger."""
        if self.max_length is None or tokens <= self.max_length:
            return
        room = max(tokens, self.max_length + self.max_length // 2)
        sizes = StaticCache(config=self._config, max_cache_len=room).layers
        for layer, like in zip(self.layers, sizes, strict=True):
            if layer.max_cache_len < like.max_cache_len:
                layer.grow(like.max_cache_len)
        self.max_length = room  # only now: memory may have ended

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n forgets n of them; an AquaError where a layer cannot, and nothing is changed."""
        for layer in self.layers:
            if isinstance(layer, RotatedLayer):
                layer.check_crop(tokens_to_remove)
            elif isinstance(layer, common.RotatedSlidingLayer):
                if layer.get_seq_length() >= layer.sliding_window and not layer.record_past:
                    raise AquaError(
                        "a sliding-window layer has forgotten what a crop would need: call activate_past_recording() "
                        "on the cache before it is filled"
                    )
            else:
                raise AquaError(
                    "a static cache cannot be cropped, as assisted decoding and prompt lookup do: make it without "
                    "max_length"
                )
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence; an AquaError for a cache of a fixed size."""
        self._check_growing()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices; an AquaError for a cache of a fixed size."""
        self._check_growing()
        super().batch_select_indices(indices)

    def _check_growing(self) -> None:
        if self.max_length is not None:
            raise AquaError("a static cache cannot repeat or select sequences: make it without max_length")


def rotate_on_write(cache: Cache, plans: Plans, config: PreTrainedConfig) -> None:
    """Make the layers of `cache` rotate what is written to them, if their content stays right.

    Empty layers are replaced. Layers that an earlier attachment filled go on under this one, if they store the same.
    Everything else stays as it is: ordinary layers with content, other kinds of layer. `config` is the decoder's.
    """
    if not cache.layers and cache.layer_class_to_replicate is cache_utils.DynamicLayer:
        cache.layers.extend(DynamicCache(config=config).layers)
    for index, plan, layer, mine in _planned(cache, plans):
        if mine is plan:
            continue
        if int(layer.get_seq_length()) == 0:
            cache.layers[index] = _empty(cache, index, plan) or layer
        elif mine is not None and stores_the_same(plan, mine) and _has_room_for_choice(layer, plan):
            layer.plan = plan


def _planned(cache: Cache, plans: Plans) -> list[tuple[int, LayerPlan, Any, LayerPlan | None]]:
    """The layers that plans are for: index, plan, the layer in the cache, and the plan that it has."""
    found = [(index, plan, cache.layers[index]) for index, plan in plans.items() if index < len(cache.layers)]
    return [(*each, getattr(each[2], "plan", None)) for each in found]


def _empty(cache: Cache, index: int, plan: LayerPlan) -> cache_utils.CacheLayerMixin | None:
    """The rotated layer that replaces an empty one; None if its kind has no rotated one.

    Layers of a fixed size are replaced in an `AquaCache` only.
    """
    layer: Any = cache.layers[index]
    if type(layer) in (cache_utils.DynamicLayer, RotatedLayer):
        return RotatedLayer(plan)
    if type(layer) in (cache_utils.DynamicSlidingWindowLayer, common.RotatedSlidingLayer):
        sliding = common.RotatedSlidingLayer(plan, sliding_window=layer.sliding_window)
        if layer.record_past:
            sliding.activate_past_recording()
        return sliding
    if not isinstance(cache, AquaCache):
        return None
    is_tiled, length = cache.layout == "tiled", getattr(layer, "max_cache_len", 0)
    if type(layer) in (cache_utils.StaticLayer, common.RotatedStaticLayer, TiledLayer, ScoredLayer):
        if is_tiled and plan.config.chooses_tokens:
            return ScoredLayer(plan, max_cache_len=length, memory=cache.memory)
        return (TiledLayer if is_tiled else common.RotatedStaticLayer)(plan, max_cache_len=length)
    if type(layer) in (cache_utils.StaticSlidingWindowLayer, common.RotatedStaticSlidingLayer, RingLayer):
        if is_tiled and index in cache.windows:
            return RingLayer(plan, max_cache_len=length, sliding_window=cache.windows[index])
        # Its length is its window, or the whole cache where that is shorter.
        return common.RotatedStaticSlidingLayer(plan, max_cache_len=length, sliding_window=length)
    return None


def _has_room_for_choice(layer: Any, plan: LayerPlan) -> bool:
    """Whether a filled layer can go on with this choice of tokens, or of none: in tiles they are held in other ways."""
    if isinstance(layer, ScoredLayer):
        return plan.config.chooses_tokens and plan.config.score_bits == layer.plan.config.score_bits
    return not isinstance(layer, TiledLayer) or not plan.config.chooses_tokens


def foreign_layers(config: PreTrainedConfig, indices: Collection[int]) -> str:
    """Why no cache rotates what some of these layers write, in words; empty where it can: keys are rotated when read.

    Such are layers that hold more than keys and values, as those of Falcon-H1 do for its state space.
    """
    ordinary = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    layers = enumerate(DynamicCache(config=config).layers) if indices else ()
    kinds = {type(layer).__name__ for index, layer in layers if index in indices and type(layer) not in ordinary}
    if not kinds:
        return ""
    return f"a cache of this model has layers that hold more than keys and values ({', '.join(sorted(kinds))})"


def sliding_windows(config: PreTrainedConfig) -> dict[int, int]:
    """Sizes of sliding windows by layer index, of layers that see the last tokens; chunks, as Llama 4's, are none.

    It must be the config's own window: masks are made for that.
    """
    config = config.get_text_config(decoder=True)
    kinds, own = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    # A layer that shares the keys of another (Gemma 3n) has a dummy in the cache, or no place: its kind says it.
    layers, unsaid = DynamicCache(config=config).layers, own if kinds else None
    sizes = [getattr(layer, "sliding_window", unsaid) for layer in layers] + [own] * (len(kinds or ()) - len(layers))
    return {
        index: own
        for index, size in enumerate(sizes)
        if own and size == own and (not kinds or kinds[index] == "sliding_attention")
    }


def bounded_layers(config: PreTrainedConfig) -> set[int]:
    """The layers of which a cache keeps a part of the tokens, as transformers does it: sliding windows, and chunks."""
    layers = enumerate(DynamicCache(config=config).layers)
    return {index for index, layer in layers if getattr(layer, "sliding_window", None)}


def prepare_for(cache: Cache, plans: Plans, batch: int, new: int) -> None:
    """Before any layer has run: see that `new` tokens of `batch` sequences can follow on `cache`.

    A cache of fixed size grows where they do not fit. An AquaError for another batch, or other settings.
    """
    for _, plan, layer, mine in _planned(cache, plans):
        if mine is None:
            continue
        if mine is not plan:
            common.check_active(mine)
            raise AquaError(common.OTHER_SETTINGS)
        if layer.batch not in (0, batch):
            if int(layer.get_seq_length()) == 0:
                getattr(layer, "held", layer).is_initialized = False  # it allocates again
                continue
            raise AquaError(
                f"the cache holds {layer.batch} sequences, the batch has {batch}: start with a new cache, or repeat or "
                "select its sequences first"
            )
    if isinstance(cache, AquaCache) and cache.max_length is not None:
        cache.make_room(int(cache.get_seq_length()) + new)


def make_cache(
    config: PreTrainedConfig, plans: Plans, max_length: int | None, offloading: bool, layout: str, untiled: str | None
) -> AquaCache:
    """An empty cache, see `Attachment.new_cache`; `untiled` says why its layers cannot be tiled, None when they can."""
    if layout not in LAYOUTS:
        raise AquaError(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    if max_length is not None and max_length < 1:
        raise AquaError(f"max_length is {max_length}: it must be 1 or more")
    needs = needs_own_cache(next(iter(plans.values())).config)
    if max_length is None or offloading:
        untiled = "it has a fixed size and stays where it is (give max_length, no offloading)"
    on_gpu = all(plan.rotation.is_cuda for plan in plans.values())
    tiled = not untiled and (layout == "tiled" or (layout == "auto" and on_gpu))
    if not tiled and max_length is not None and (needs or any(plan.has_window_store for plan in plans.values())):
        stored, remedy = needs or "s_ratio with an exact window", "leave it out" if needs else "give sink=0, recent=0"
        raise AquaError(
            f"a static cache cannot store {stored}: leave out max_length, or {remedy}"
            + ("; in the tiled layout bits=8 is possible" if not untiled else "")
        )
    if layout == "tiled" and untiled:
        raise AquaError(
            f"a cache in the tiled layout is impossible here, because {said(untiled, 'use layout auto or plain')}"
        )
    cache = AquaCache(config, plans, max_length, offloading, "tiled" if tiled else "plain")
    if needs and max_length is not None and not any(isinstance(layer, TiledLayer) for layer in cache.layers):
        raise AquaError(f"a static cache cannot store {needs}: leave out max_length, or that")
    if not any(isinstance(layer, common.Recordable) for layer in cache.layers):
        if layout == "tiled":
            raise AquaError(
                "a cache in the tiled layout is impossible here, because no layer can have it: use layout auto or plain"
            )
        cache.layout = "plain"
    return cache
