# SPDX-License-Identifier: Apache-2.0
"""Weights and adapters may change while AQUA is attached: then caches that were filled before must not go on."""

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from aqua_attention.model.capture import AttentionLayer
from aqua_attention.model.fingerprint import are_equal, projected, same_projected
from aqua_attention.ops.plan import LayerPlan


class Weights:
    """Looks at what makes keys and values, where a prompt begins, and makes new plans when that has changed.

    A cache layer goes on only under the plan that filled it, or one of the same weights (`stores_the_same`).
    """

    def __init__(
        self,
        plans: dict[int, LayerPlan],
        layers: Sequence[AttentionLayer],
        digests: Callable[[], Mapping[nn.Module, list[float] | None]],
    ) -> None:
        """Note what is there now; `plans` of the `layers`, by the `id` of their modules, are replaced.

        `digests` takes their `key_weights` again.
        """
        self._plans, self._layers, self._digests = plans, layers, digests
        self._former: weakref.WeakSet[LayerPlan] = weakref.WeakSet()
        self._local, self._lock = threading.local(), threading.Lock()
        for layer in layers:
            plans[id(layer.module)].projected = projected(layer)

    def look(self) -> None:
        """Make new plans if weights or adapters are others now; where nothing has, it waits for the GPU once."""
        if getattr(self._local, "looked", False):
            return
        with self._lock:
            self._renew()

    @contextmanager
    def looked(self) -> Iterator[None]:
        """Look now, and not in forward passes while this is open: some of them are decoding steps of several tokens."""
        self.look()
        before, self._local.looked = getattr(self._local, "looked", False), True
        try:
            yield
        finally:
            self._local.looked = before

    def end(self) -> None:
        """AQUA leaves the model: no cache of any plan goes on."""
        for plan in self._former:
            plan.active = False

    def _renew(self) -> None:
        now = [projected(layer) for layer in self._layers]
        before = [self._plans[id(layer.module)].projected for layer in self._layers]
        if are_equal(now, before) or all(map(same_projected, now, before)):
            return
        digests = self._digests()
        for layer, made in zip(self._layers, now, strict=True):
            self._former.add(plan := self._plans[id(layer.module)])
            self._plans[id(layer.module)] = dataclasses.replace(plan, projected=made, key_weights=digests[layer.module])
