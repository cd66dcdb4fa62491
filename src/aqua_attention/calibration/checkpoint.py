# SPDX-License-Identifier: Apache-2.0
"""The state of an unfinished calibration in a file, so that a killed run can go on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from aqua_attention.calibration.statistics import Statistics, named_tensors, take_layer
from aqua_attention.errors import AquaError
from aqua_attention.io.files import remove_leftovers
from aqua_attention.io.tensors import Stored, write_tensors
from aqua_attention.model.fingerprint import same_digest

KIND = "aqua_attention_checkpoint"


class Checkpoint:
    """Sums over the windows done so far, written at most every few seconds.

    The sums of whole windows are kept, in float64, and added in the same order after a resume: the projections are
    those of an uninterrupted run, bit for bit (on the same machine and number of threads).
    """

    def __init__(self, path: Path | str, run: dict[str, Any], *, seconds: float = 10.0) -> None:
        """Nothing is read or written yet.

        Args:
            run: JSON values that tell this run from others; `shape` (see `fingerprint.shape_of`) and `key_weights` of
                the model among them.
            seconds: how old the file may get.

        Raises:
            AquaError: `seconds` is negative, infinite or NaN.
        """
        check_seconds(seconds)
        self.path, self.seconds = Path(path), seconds
        self.run: dict[str, Any] = json.loads(json.dumps(run))  # as it will be read: lists, no tuples
        self._saved = time.monotonic()

    def load(self) -> tuple[Statistics, int]:
        """Statistics and number of windows done; nothing and 0 when there is no file.

        Raises:
            AquaError: the file is damaged, or of another run; the message says in what they differ.
        """
        if not self.path.exists():
            return {}, 0
        stored, run, done = _opened(self.path)
        if different := self._differences(run):
            raise AquaError(
                f"{self.path} is of another run, which differs in {', '.join(different)}: repeat the options of that "
                "run, or delete the file to begin anew"
            )
        statistics = {index: take_layer(stored, index, groups, dim) for index, _, groups, dim in run["shape"]["layers"]}
        stored.finish()
        return statistics, done

    def keep(self, statistics: Statistics, done: int) -> None:
        """Save, if the last time is long enough ago and there is something to save."""
        if done and time.monotonic() - self._saved >= self.seconds:
            self.save(statistics, done)

    def save(self, statistics: Statistics, done: int) -> None:
        """Write the statistics of the first `done` windows, whole or not at all; nothing when there are none."""
        if done:
            write_tensors(self.path, KIND, {"run": self.run, "windows_done": done}, named_tensors(statistics))
            self._saved = time.monotonic()

    def _differences(self, run: dict[str, Any]) -> list[str]:
        ours, theirs = dict(self.run), dict(run)
        weights = ours.pop("key_weights", None), theirs.pop("key_weights", None)
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names or weights[0] == weights[1]:
            options = [name for name in names if name in ("model", "tokens", "context", "seed", "dtype")]
            return [f"{name} ({theirs.get(name)}, now {ours.get(name)})" for name in options] or names
        return [] if all(weights) and same_digest(*weights) else ["key_weights"]


def calibrated_weights(path: Path) -> list[list[float]] | None:
    """Digest of the key weights that an unfinished calibration is of; None when it is not known.

    Raises:
        AquaError: the file is damaged.
    """
    weights: list[list[float]] | None = _opened(path)[1].get("key_weights")
    return weights


def _opened(path: Path) -> tuple[Stored, dict[str, Any], int]:
    stored = Stored(
        path,
        KIND,
        what="an unfinished calibration",
        remedy="delete it, and calibrate without --resume",
    )
    try:
        return stored, dict(stored.header["run"]), int(stored.header["windows_done"])
    except (KeyError, TypeError, ValueError) as error:
        raise stored.error(f"its metadata is incomplete ({error!r})") from error


def check_seconds(seconds: float) -> None:
    """Raise AquaError when `seconds` is no time between two savings."""
    if not 0 <= seconds < math.inf:
        raise AquaError(f"checkpoint_seconds is {seconds}: it must be a number of seconds, 0 or more")


def check_finished(path: Path) -> None:
    """Raise AquaError when `path` holds the state of an unfinished calibration."""
    if path.exists():
        raise AquaError(f"{path} holds an unfinished calibration: go on with --resume, or delete it")


def discard(path: Path) -> None:
    """Remove a checkpoint whose run is finished, and what killed writes have left beside it."""
    try:
        path.unlink(missing_ok=True)
        remove_leftovers(path)
    except OSError as error:
        raise AquaError(f"cannot remove {path} ({error.strerror}): delete it") from error
