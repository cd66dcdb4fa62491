# SPDX-License-Identifier: Apache-2.0
"""Calibration, second pass: the singular vectors are turned on a sample of what the model reads, see `learning`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aqua_attention.calibration.learning import ORIGINS, STATE, Learner, sorted_by_energy, spread_along
from aqua_attention.calibration.positions import begins, placed
from aqua_attention.calibration.projections import LEARNED, Projections, layer_projection
from aqua_attention.calibration.sample import Sample, draw, joined
from aqua_attention.errors import AquaError
from aqua_attention.io.state import RunState
from aqua_attention.io.tensors import Stored, write_tensors
from aqua_attention.model import capture
from aqua_attention.ops.plan import Call

KIND = "aqua_attention_learning"
QUERIES = 256
"""Queries drawn from a window; of one held out `QUERIES_HELD`."""
QUERIES_HELD = 96
STEPS = 8
"""Steps a window."""
LEAST_WINDOWS = 40
"""Windows read at least; with fewer in the text, the same ones are read at other positions."""
MOST_HELD, HELD_SHARE = 8, 6
CONSIDERED = 8
"""Windows after which the present rotation is measured on what was held out."""
RECENT = 4


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
    """Rotations that lose less than those of `projections`; for heads where none was found, the same.

    Args:
        projections: of the same model, by singular vectors.
        windows: token ids, [count, context]. One in six is held out; its loss decides what is kept.
        last_position: windows are read at positions up to this, see `positions.begins`; None: at the first ones.
        checkpoint: a file that keeps the state every `checkpoint_seconds`, and on Ctrl-C; a run goes on from it.
        progress: called as progress(windows done, windows in all).

    Raises:
        AquaError: too few windows, layers that are not causal, positions that the model lacks, NaN.
    """
    run = _Learning(model, projections, windows, last_position, seed)
    state = _State(checkpoint, run.identity, seconds=checkpoint_seconds)
    done = run.begin(state.load(run.sizes))
    try:
        for index in range(done, run.count):
            run.visit(index)
            done = index + 1
            state.keep(done, run.tensors())
            if progress:
                progress(done, run.count)
    except KeyboardInterrupt:
        state.save(done, run.tensors())
        raise
    return run.projections()


def windows_held(count: int) -> int:
    """How many of so many windows are held out."""
    return min(MOST_HELD, max(1, count // HELD_SHARE))


def windows_read(count: int) -> int:
    """How many windows `learn` reads, some of them again, where it is given so many."""
    return max(count - windows_held(count), LEAST_WINDOWS)


class _Learning:
    """One run: the heads of all layers of the same shape are learned together."""

    def __init__(
        self, model: PreTrainedModel, projections: Projections, windows: Tensor, last_position: int | None, seed: int
    ) -> None:
        self.model, self.base, self.seed = model, projections, seed
        found = [layer for layer in capture.attention_layers(model) if layer.index in projections.layers]
        if any(not layer.causal for layer in found):
            raise AquaError(f"{type(model).__name__} is no decoder of text: a basis is learned for decoders, use svd")
        if len(windows) < 2:
            raise AquaError(f"there is {len(windows)} window: a basis is learned from 2 or more, read more tokens")
        held = windows_held(len(windows))
        # Spread over the text, as the others are.
        which = {round((index + 0.5) * len(windows) / held) for index in range(held)}
        self._held = [window for index, window in enumerate(windows) if index in which]
        learned = [window for index, window in enumerate(windows) if index not in which]
        self.count = windows_read(len(windows))
        self._windows = [learned[index % len(learned)] for index in range(self.count)]
        context = windows.shape[1]
        self.last_position = last_position or context
        options = {"context": context, "last": self.last_position}
        self._begins = begins(model, self.count, seed=seed, **options)
        self._held_begins = begins(model, len(self._held), seed=seed, **options)
        self._shapes: dict[tuple[int, int], list[capture.AttentionLayer]] = {}
        for layer in found:
            group = layer.num_attention_heads // layer.num_key_value_heads
            self._shapes.setdefault((group, layer.head_dim), []).append(layer)
        self._layers, self._scaling = found, dict[nn.Module, float]()
        self._learners: list[Learner] = []
        self.sizes = [
            (sum(layer.num_key_value_heads for layer in layers), dim) for (_, dim), layers in self._shapes.items()
        ]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this run from another."""
        digest = hashlib.sha256(torch.stack(self._held + self._windows).numpy().tobytes())
        for layer in self.base.layers.values():
            digest.update(layer.rotation.numpy().tobytes())
        known = {"shape": self.base.model["shape"], "key_weights": self.base.model.get("key_weights")}
        return known | {"last_position": self.last_position, "seed": self.seed, "sha256": digest.hexdigest()}

    def begin(self, stored: tuple[int, list[dict[str, Tensor]]] | None) -> int:
        """Draw what is held out, and take up what is stored; returns the windows done."""
        held = self._joined(
            self._read(window, begin, QUERIES_HELD, -1 - index)
            for index, (window, begin) in enumerate(zip(self._held, self._held_begins, strict=True))
        )
        self._learners = []
        for sample, layers in zip(held, self._shapes.values(), strict=True):
            device = sample.query.device
            start = torch.cat([self.base.layers[layer.index].rotation for layer in layers]).to(device)
            self._learners.append(Learner(start, sample, sample.covariance(), self._scaling[layers[0].module]))
        if stored is None:
            return 0
        done, tensors = stored
        for index in range(max(0, done - RECENT), done):
            self._see(index)
        for learner, values in zip(self._learners, tensors, strict=True):
            for name, value in values.items():
                setattr(learner, name, value.to(learner.start.device))
            learner.windows, learner.steps = 1 + done, done * STEPS
        return done

    def visit(self, index: int) -> None:
        """Read a window, and take steps on what was read last."""
        self._see(index)
        for learner in self._learners:
            for step in range(index * STEPS, (index + 1) * STEPS):
                learner.step(step / (self.count * STEPS), self._number(step))
            if index % CONSIDERED == CONSIDERED - 1 or index == self.count - 1:
                learner.consider()

    def tensors(self) -> list[dict[str, Tensor]]:
        """The state of all learners."""
        return [{name: getattr(learner, name) for name in STATE} for learner in self._learners]

    def projections(self) -> Projections:
        """The best rotations found, trailing dimensions those that matter least."""
        layers, held = {}, {}
        for learner, shaped in zip(self._learners, self._shapes.values(), strict=True):
            best = sorted_by_energy(learner.best, learner.held, learner.covariance)
            spreads = spread_along(best, learner.covariance)
            sizes = [layer.num_key_value_heads for layer in shaped]
            parts = zip(
                *(each.cpu().split(sizes) for each in (best, spreads, learner.loss, learner.origin)), strict=True
            )
            for layer, (rotation, along, loss, origin) in zip(shaped, parts, strict=True):
                statistics = self.base.statistics[layer.index]
                # Of a layer whose keys all lie in the exact window nothing is known but their mean square.
                spread = along.contiguous() if bool(along.all()) else None
                layers[layer.index] = layer_projection(statistics, rotation.contiguous(), spread)
                names = [ORIGINS[place] for place in origin.tolist()]
                held[layer.index] = {"loss": [round(each, 4) for each in loss.tolist()], "from": names}
        facts = {"objective": "divergence and output", "windows": self.count, "last_position": self.last_position}
        facts |= {"seed": self.seed, "held_out": {str(index): held[index] for index in sorted(held)}}
        ordered = {index: layers[index] for index in self.base.layers}
        return replace(self.base, layers=ordered, basis=LEARNED, calibration=self.base.calibration | {LEARNED: facts})

    def _see(self, index: int) -> None:
        read = self._read(self._windows[index], self._begins[index], QUERIES, index)
        for learner, sample in zip(self._learners, read, strict=True):
            learner.see(sample)

    def _number(self, index: int) -> int:
        return (self.seed * 1_000_003 + index) % (1 << 62)

    def _read(self, window: Tensor, begin: int, queries: int, index: int) -> list[Sample]:
        """A sample of one window for each shape of heads."""
        samples: dict[nn.Module, Sample] = {}
        wanted = {layer.module for layer in self._layers}

        def see(module: nn.Module, call: Call) -> None:
            if module in wanted:
                samples[module] = draw(call, queries, self._number(2 * index + 1 << 20))
                self._scaling[module] = call.scaling

        model = self.model
        with torch.no_grad(), capture.watched(model, see), capture.evaluation_mode(model):
            capture.run_encoder_or_decoder(model, self._layers, placed(window, begin))
        found = []
        for layers in self._shapes.values():
            device = samples[layers[0].module].query.device
            parts = [Sample(*(each.to(device) for each in samples[layer.module])) for layer in layers]
            found.append(joined(parts, 0))
        return found

    @staticmethod
    def _joined(read: Iterable[list[Sample]]) -> list[Sample]:
        return [joined(list(each), 1) for each in zip(*read, strict=True)]


class _State(RunState):
    """The rotations so far, and the number of windows done."""

    def load(self, sizes: list[tuple[int, int]]) -> tuple[int, list[dict[str, Tensor]]] | None:
        """Windows done and the tensors of each learner, of so many heads and dimensions; None: there is no file."""
        if (content := self.found()) is None:
            return None
        stored, done = content
        tensors = []
        for place, (heads, dim) in enumerate(sizes):
            shapes = dict.fromkeys(STATE, (heads, dim, dim)) | {"loss": (heads,), "origin": (heads,)}
            kinds = dict.fromkeys(STATE, torch.float32) | {"origin": torch.int64}
            tensors.append({name: stored.take(f"{place}.{name}", kinds[name], *shapes[name]) for name in STATE})
        stored.finish()
        return done, tensors

    def _read(self, path: Path) -> tuple[dict[str, Any], tuple[Stored, int]]:
        stored = Stored(path, KIND, what="a basis being learned", remedy="delete it, and begin anew")
        try:
            return dict(stored.header["run"]), (stored, int(stored.header["windows_done"]))
        except (KeyError, TypeError, ValueError) as error:
            raise stored.error(f"its metadata is incomplete ({error!r})") from error

    def _write(self, path: Path, content: tuple[int, list[dict[str, Tensor]]]) -> None:
        done, learners = content
        named = {f"{place}.{name}": each.cpu() for place, held in enumerate(learners) for name, each in held.items()}
        write_tensors(path, KIND, {"run": self.run, "windows_done": done}, named)
