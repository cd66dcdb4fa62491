# SPDX-License-Identifier: Apache-2.0
"""Which windows a basis is learned from, which are held out, and what one window gives."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aqua_attention.calibration.positions import begins, placed
from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.sample import RECENT, SINK, Sample, draw
from aqua_attention.errors import AquaError
from aqua_attention.model import capture
from aqua_attention.ops.plan import Call

LEAST_WINDOWS, LEAST_READ = 8, 34
"""Windows that are needed, and windows read at least: with fewer in the text they are read again."""
LEAST_CONTEXT = 2 * (SINK + RECENT)
MOST_HELD, HELD_SHARE = 8, 6


class Reading(NamedTuple):
    """Windows in the order in which they are read, and where each begins, see `positions.begins`.

    Attributes:
        windows: of token ids, [context] each; some are there twice where there are fewer than `LEAST_READ`.
        held: other windows, which only tell whether a rotation is better.
        distinct: how many different windows are read.
    """

    windows: list[Tensor]
    places: list[int | None]
    held: list[Tensor]
    held_places: list[int | None]
    distinct: int

    @classmethod
    def of(cls, model: PreTrainedModel, windows: Tensor, last_position: int | None, seed: int) -> Reading:
        """Hold out some of `windows`, [count, context], and put the others into an order that the seed chooses."""
        count, context = windows.shape
        held = windows_held(count)
        # Spread over the text, as the others are.
        which = set(spread(count, held))
        others = [window for index, window in enumerate(windows) if index not in which]
        chooser, read = random.Random(seed), windows_read(count)
        rounds = -(-read // len(others))
        order = [each for _ in range(rounds) for each in chooser.sample(range(len(others)), len(others))][:read]
        places, held_places = (
            begins(model, number, context=context, last=last_position, seed=seed) for number in (read, held)
        )
        kept = [window for index, window in enumerate(windows) if index in which]
        return cls([others[index] for index in order], list(places), kept, list(held_places), len(others))

    def identity(self, projections: Projections) -> dict[str, Any]:
        """What tells a run that begins at these projections from another."""
        digest = hashlib.sha256(torch.stack(self.held + self.windows).numpy().tobytes())
        for layer in projections.layers.values():
            digest.update(layer.rotation.numpy().tobytes())
        known = {name: projections.model.get(name) for name in ("shape", "key_weights")}
        return known | {"places": [*self.held_places, *self.places], "sha256": digest.hexdigest()}


def spread(count: int, wanted: int) -> list[int]:
    """Places of so many of `count` windows, or of all where there are fewer, at equal distances."""
    wanted = min(wanted, count)
    return [int((index + 0.5) * count / wanted) for index in range(wanted)]


def windows_held(count: int) -> int:
    """How many of so many windows are held out."""
    return min(MOST_HELD, max(2, count // HELD_SHARE))


def windows_read(count: int) -> int:
    """How many windows are read, some of them again, where so many are given."""
    return max(count - windows_held(count), LEAST_READ)


def check_learnable(name: str, layers: Sequence[capture.AttentionLayer], windows: Tensor) -> None:
    """Raise AquaError where no basis can be learned: other layers than a decoder's, or too little to read."""
    count, context = windows.shape
    if any(not layer.causal for layer in layers):
        raise AquaError(f"{name} is no decoder of text, and only for decoders a basis is learned: use basis svd")
    if count < LEAST_WINDOWS:
        few = f"{count} window" + "s" * (count != 1)
        raise AquaError(f"there are {few} to learn a basis from: {LEAST_WINDOWS} are needed, read more tokens")
    if context < LEAST_CONTEXT:
        raise AquaError(
            f"context is {context}: nearly all of it lies in the exact window of {SINK} + {RECENT} tokens, where "
            f"nothing is lost; learn a basis from windows of {LEAST_CONTEXT} or more"
        )


def numbered(seed: int, index: int) -> int:
    """A seed for one of many draws."""
    return (seed * 1_000_003 + index) % (1 << 62)


def sampled(
    model: PreTrainedModel,
    layers: Sequence[capture.AttentionLayer],
    window: Tensor,
    place: int | None,
    *,
    queries: int,
    seed: int,
) -> dict[nn.Module, Sample]:
    """A sample of `queries` of each layer, from one dense forward pass over a window."""
    samples: dict[nn.Module, Sample] = {}
    wanted = {layer.module for layer in layers}

    def see(module: nn.Module, call: Call) -> None:
        if module in wanted:
            samples[module] = draw(call, queries, seed)

    with capture.watched(model, see), capture.evaluation_mode(model):
        capture.run_encoder_or_decoder(model, list(layers), placed(window, place))
    return samples
