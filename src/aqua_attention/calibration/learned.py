# SPDX-License-Identifier: Apache-2.0
"""Calibration, second pass: the singular vectors are turned on a sample of what the model reads, see `learning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.calibration.checkpoint import LaterState, Shapes, carry_through
from aqua_attention.calibration.learning import KEPT, ORIGINS, STATE, Learner
from aqua_attention.calibration.projections import LEARNED, Projections, layer_projection
from aqua_attention.calibration.reading import Reading, check_learnable, numbered, sampled
from aqua_attention.calibration.sample import KEYS, Sample, joined
from aqua_attention.model import capture, interface

QUERIES, QUERIES_HELD = 256, 768
"""Queries drawn from a window, and from all windows held out together, unless they take more memory than `MOST_BYTES`
and three times that."""
MOST_BYTES = 1 << 30
STEPS = 8
"""Steps a window."""
CONSIDERED = 8
"""Windows after which the present rotation is measured on what was held out."""


def learn(
    model: PreTrainedModel,
    projections: Projections,
    windows: Tensor,
    *,
    last_position: int | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> Projections:
    """Rotations that lose less than those of `projections`. Heads for which none is found keep theirs.

    Memory: three samples of `MOST_BYTES` at most, and `KEPT` of them, where the model is.

    Args:
        projections: of the same model, by singular vectors.
        windows: token ids, [count, context]. One in six is held out; its loss decides what is kept.
        last_position: windows are read at positions up to this, see `positions.begins`; None: at the first ones.
        checkpoint: a file that keeps the state every `checkpoint_seconds`, and on Ctrl-C; a run goes on from it.
        progress: called as progress(windows done, windows in all).

    Raises:
        AquaError: as of `check_learnable`, positions that the model lacks, scores with a soft limit, a checkpoint of
            another run.
    """
    found = [layer for layer in capture.attention_layers(model) if layer.index in projections.layers]
    check_learnable(type(model).__name__, found, windows)
    with torch.inference_mode(False), torch.no_grad(), interface.looking_at(model):
        run = _Learning(model, projections, found, windows, last_position, seed)
        known = {"pass": LEARNED, "last_position": last_position, "seed": seed}
        state = LaterState(checkpoint, known | run.reading.identity(projections), seconds=checkpoint_seconds)
        carry_through(run, state, progress)
        return run.projections()


class _Learning:
    """One run: the heads of all layers of the same shape are learned together."""

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections,
        layers: list[capture.AttentionLayer],
        windows: Tensor,
        last_position: int | None,
        seed: int,
    ) -> None:
        self.model, self.base, self.seed, self.last_position = model, projections, seed, last_position
        self._layers, self._learners = layers, list[Learner]()
        self.reading = Reading.of(model, windows, last_position, seed)
        self.count, held = len(self.reading.windows), len(self.reading.held)
        self._shapes: dict[tuple[int, int], list[capture.AttentionLayer]] = {}
        for layer in layers:
            group = layer.num_attention_heads // layer.num_key_value_heads
            self._shapes.setdefault((group, layer.head_dim), []).append(layer)
        sizes = [(sum(layer.num_key_value_heads for layer in shaped), dim) for (_, dim), shaped in self._shapes.items()]
        self.shapes: Shapes = [dict.fromkeys(STATE, (heads, dim, dim)) | {"loss": (heads,)} for heads, dim in sizes]
        # A query has its keys and values in bfloat16.
        most = MOST_BYTES // (8 * KEYS * sum(heads * dim for heads, dim in sizes))
        self._queries = max(1, min(QUERIES, most))
        self._queries_held = max(1, min(QUERIES_HELD, 3 * most) // held)

    def begin(self, stored: tuple[int, list[dict[str, Tensor]]] | None) -> int:
        """Draw what is held out, and take up what is stored; returns the windows done."""
        places = enumerate(zip(self.reading.held, self.reading.held_places, strict=True))
        held = _joined(self._read(*each, self._queries_held, -1 - index) for index, each in places)
        for sample, shaped in zip(held, self._shapes.values(), strict=True):
            own = [self.base.layers[layer.index] for layer in shaped]
            start, spread = (
                torch.cat(each).to(sample.query.device)
                for each in ([layer.rotation for layer in own], [layer.key_rms for layer in own])
            )
            self._learners.append(Learner(start, spread, sample))
        if stored is None:
            return 0
        done, tensors = stored
        for index in range(max(0, done - KEPT), done):
            self._see(index)
        for learner, values in zip(self._learners, tensors, strict=True):
            for name, value in values.items():
                setattr(learner, name, value.to(learner.start.device))
            learner.windows, learner.steps = done, done * STEPS
        return done

    def visit(self, index: int) -> None:
        """Read a window, and take steps on what was read last."""
        self._see(index)
        for learner in self._learners:
            for step in range(index * STEPS, (index + 1) * STEPS):
                learner.step(step / (self.count * STEPS), numbered(self.seed, step))
            if index % CONSIDERED == CONSIDERED - 1 or index == self.count - 1:
                learner.consider()

    def tensors(self) -> list[dict[str, Tensor]]:
        """The state of all learners."""
        return [{name: getattr(learner, name) for name in STATE} for learner in self._learners]

    def projections(self) -> Projections:
        """The best rotation for each head, trailing dimensions those that matter least."""
        layers, held = {}, {}
        for learner, shaped in zip(self._learners, self._shapes.values(), strict=True):
            sizes = [layer.num_key_value_heads for layer in shaped]
            parts = zip(*(each.cpu().split(sizes) for each in learner.chosen()), strict=True)
            for layer, (rotation, spread, loss, origin) in zip(shaped, parts, strict=True):
                tensors = rotation.contiguous(), spread.contiguous()
                layers[layer.index] = layer_projection(self.base.statistics[layer.index], *tensors)
                names = [ORIGINS[place] for place in origin.tolist()]
                held[layer.index] = {"loss": [round(each, 4) for each in loss.tolist()], "from": names}
        facts = {"objective": "divergence and output", "windows": self.reading.distinct, "windows_read": self.count}
        facts |= {"last_position": self.last_position, "seed": self.seed}
        facts |= {"held_out": {str(index): held[index] for index in sorted(held)}}
        ordered = {index: layers[index] for index in self.base.layers}
        return replace(self.base, layers=ordered, basis=LEARNED, calibration=self.base.calibration | {LEARNED: facts})

    def _see(self, index: int) -> None:
        read = self._read(self.reading.windows[index], self.reading.places[index], self._queries, index)
        for learner, sample in zip(self._learners, read, strict=True):
            learner.see(sample)

    def _read(self, window: Tensor, begin: int | None, queries: int, index: int) -> list[Sample]:
        """A sample of one window for each shape of heads."""
        # Apart from the numbers of steps.
        number = numbered(self.seed, index + (1 << 40))
        samples = sampled(self.model, self._layers, window, begin, queries=queries, seed=number)
        found = []
        for shaped in self._shapes.values():
            device = samples[shaped[0].module].query.device
            found.append(joined([Sample(*(each.to(device) for each in samples[layer.module])) for layer in shaped], 0))
        return found


def _joined(read: Iterable[list[Sample]]) -> list[Sample]:
    return [joined(list(each), 1) for each in zip(*read, strict=True)]
