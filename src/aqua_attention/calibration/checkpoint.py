# SPDX-License-Identifier: Apache-2.0
"""The state of an unfinished calibration in a file, so that a killed run can go on."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from aqua_attention.calibration.projections import LEARNED, TUNED
from aqua_attention.calibration.statistics import Statistics, named_tensors, take_layer
from aqua_attention.errors import AquaError
from aqua_attention.io.files import remove_leftovers
from aqua_attention.io.state import RunState
from aqua_attention.io.tensors import Stored, write_tensors

KIND, LATER_KIND = "aqua_attention_checkpoint", "aqua_attention_later_pass"
Shapes = Sequence[Mapping[str, tuple[int, ...]]]
"""Of the tensors of each part, by name."""
Progressed = tuple[int, list[dict[str, Tensor]]]
"""Windows done, and tensors by name of each part."""
LATER = (LEARNED, TUNED)
"""Bases for which a calibration reads its windows again, with a state of its own."""


class Checkpoint(RunState):
    """Sums over the windows done so far, and their number: the content to `keep` or `save`.

    `run` has the `shape` of the model (see `fingerprint.shape_of`) and its `key_weights`, among others.

    The sums of whole windows are kept, in float64, and added in the same order after a resume: the projections are
    those of an uninterrupted run, bit for bit (on the same machine and number of threads).
    """

    def load(self) -> tuple[Statistics, int]:
        """Statistics and number of windows done, nothing and 0 when there is no file; errors as of `RunState.found`."""
        if (content := self.found()) is None:
            return {}, 0
        stored, done = content
        layers = self.run["shape"]["layers"]
        statistics = {index: take_layer(stored, index, groups, dim) for index, _, groups, dim in layers}
        stored.finish()
        return statistics, done

    def _read(self, path: Path) -> tuple[dict[str, Any], tuple[Stored, int]]:
        return _opened(path)

    def _write(self, path: Path, content: tuple[Statistics, int]) -> None:
        """Nothing while no window is done."""
        statistics, done = content
        if done:
            write_tensors(path, KIND, {"run": self.run, "windows_done": done}, named_tensors(statistics))

    def _differences(self, run: dict[str, Any]) -> list[str]:
        names = super()._differences(run)
        if names == ["key_weights"]:
            return names
        # Other options say enough: other weights follow from another model.
        options = [name for name in names if name in ("model", "tokens", "context", "seed", "dtype")]
        words = [f"{name} ({run.get(name)}, now {self.run.get(name)})" for name in options]
        return words or [name for name in names if name != "key_weights"]


class LaterState(RunState):
    """Windows done by a later pass, and its tensors: the content to `keep` or `save`."""

    def load(self, shapes: Shapes) -> Progressed | None:
        """Both, the tensors by name and of these shapes in each part; None: there is no file."""
        if (content := self.found()) is None:
            return None
        stored, done = content
        tensors = [
            {name: stored.take(f"{place}.{name}", torch.float32, *shape) for name, shape in part.items()}
            for place, part in enumerate(shapes)
        ]
        stored.finish()
        return done, tensors

    def _read(self, path: Path) -> tuple[dict[str, Any], tuple[Stored, int]]:
        return _opened(path, LATER_KIND)

    def _write(self, path: Path, content: tuple[int, list[dict[str, Tensor]]]) -> None:
        done, parts = content
        named = {f"{place}.{name}": each.cpu() for place, held in enumerate(parts) for name, each in held.items()}
        write_tensors(path, LATER_KIND, {"run": self.run, "windows_done": done}, named)


class LaterPass(Protocol):
    """What reads windows again, `count` of them; `shapes` are those of its tensors, see `LaterState.load`."""

    count: int
    shapes: Shapes

    def begin(self, stored: Progressed | None) -> int:
        """Take up what is stored; returns the windows done."""

    def visit(self, index: int) -> None:
        """Read a window. No tensor of before is written to, so that an interrupt finds the state between windows."""

    def tensors(self) -> list[dict[str, Tensor]]:
        """The state, to be stored."""


def carry_through(run: LaterPass, state: LaterState, progress: Callable[[int, int], None] | None) -> None:
    """Read all windows, from where a stopped run ended, and keep the state meanwhile and at the end."""
    kept = run.begin(state.load(run.shapes)), run.tensors()
    try:
        for index in range(kept[0], run.count):
            run.visit(index)
            kept = index + 1, run.tensors()
            state.keep(*kept)
            if progress:
                progress(index + 1, run.count)
    except KeyboardInterrupt:
        state.save(*kept)
        raise
    state.save(*kept)  # another pass may follow, and be stopped


def room_for(shape: dict[str, Any], *, later: bool = False) -> int:
    """Bytes that a run takes at most on the disk: its checkpoint, and the next one or the projections beside it.

    `later`: other passes follow, which keep five and three matrices of each head in float32, and write them anew.
    """
    sums = sum(groups * dim * (2 * dim + 1) * 8 for _, _, groups, dim in shape["layers"])
    others = sum(groups * dim * dim * 4 * (5 + 3 + 5) for _, _, groups, dim in shape["layers"]) if later else 0
    return sums * 9 // 4 + others + (1 << 16)


def calibrated_weights(path: Path) -> list[list[float]] | None:
    """Digest of the key weights that an unfinished calibration is of; None: not known. AquaError: a damaged file."""
    return _opened(path)[0].get("key_weights")


def _opened(path: Path, kind: str = KIND) -> tuple[dict[str, Any], tuple[Stored, int]]:
    stored = Stored(path, kind, what="an unfinished calibration", remedy="delete it, and calibrate without --resume")
    try:
        return dict(stored.header["run"]), (stored, int(stored.header["windows_done"]))
    except (KeyError, TypeError, ValueError) as error:
        raise stored.error(f"its metadata is incomplete ({error!r})") from error


def check_seconds(seconds: float) -> None:
    """Raise AquaError when `seconds` is no time between two savings."""
    if not 0 <= seconds < math.inf:
        raise AquaError(f"checkpoint_seconds is {seconds}: it must be a number of seconds, 0 or more")


def check_no_unfinished(path: Path) -> None:
    """Raise AquaError when `path` holds the state of an unfinished calibration."""
    if path.exists():
        raise AquaError(f"{path} holds an unfinished calibration: go on with --resume, or delete it")


def later_checkpoints(path: Path | str) -> list[Path]:
    """Where the later passes of a calibration keep their states."""
    return [Path(path).with_name(f"{Path(path).name}.{basis}") for basis in LATER]


def discard(path: Path) -> None:
    """Remove a checkpoint whose run is finished, and what killed writes have left beside it."""
    try:
        for each in (path, *later_checkpoints(path)):
            each.unlink(missing_ok=True)
            remove_leftovers(each)
    except OSError as error:
        raise AquaError(f"cannot remove {path} ({error.strerror}): delete it") from error
