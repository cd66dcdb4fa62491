# SPDX-License-Identifier: Apache-2.0
"""The state of an unfinished run in a file, so that a killed run can go on; and what tells one run from another."""

import json
import math
import time
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.io.files import json_digest, remove_leftovers, write_atomically

Run = dict[str, Any]
Digest = list[list[float]]
"""A row a layer: `SKETCHES` numbers of its key weights' direction, then logarithms of their scale, see
`model.fingerprint`. Rows of earlier versions end before the scale."""
SKETCHES = 4


class RunState:
    """A file that belongs to one run, and keeps what the run has done. A subclass reads and writes its content.

    Attributes:
        run: JSON values that tell this run from others. `key_weights`, if there, is a digest of the model's weights.
        instead: what to do about a file of another run, beside repeating that run's options.
    """

    instead = "delete the file to begin anew"

    def __init__(self, path: Path | str | None, run: Run, *, seconds: float = 10.0) -> None:
        """Nothing is read or written yet. A `path` of None keeps nothing; `seconds`: how old the file may get."""
        self.path, self.seconds = None if path is None else Path(path), seconds
        self.run: Run = json.loads(json.dumps(run))  # as it will be read: lists, no tuples
        self._saved = time.monotonic()

    def found(self) -> Any:
        """What the file holds, None when there is none; AquaError where it is damaged, or of another run."""
        if self.path is None or not self.path.exists():
            return None
        run, content = self._read(self.path)
        if different := self._differences(run):
            raise AquaError(
                f"{self.path} is of another run, which differs in {', '.join(different)}: repeat the options of that "
                f"run, or {self.instead}"
            )
        return content

    def keep(self, *content: Any) -> None:
        """Save, if the last time is long enough ago."""
        if time.monotonic() - self._saved >= self.seconds:
            self.save(*content)

    def save(self, *content: Any) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            self._write(self.path, content)
            remove_leftovers(self.path)
            self._saved = time.monotonic()

    def _read(self, path: Path) -> tuple[Run, Any]:
        raise NotImplementedError

    def _write(self, path: Path, content: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def _differences(self, run: Run) -> list[str]:
        """Names of what differs between this run and another."""
        names = [name for name in {**self.run, **run} if self.run.get(name) != run.get(name)]
        ours, theirs = self.run.get("key_weights"), run.get("key_weights")
        if "key_weights" in names and ours and theirs and same_digest(ours, theirs):
            names.remove("key_weights")
        return names


def write_sealed(path: Path, kind: str, version: int, content: dict[str, Any]) -> None:
    """Write JSON with its kind, its format version and a digest of all, whole or not at all."""
    whole = {kind: version} | content
    whole["sha256"] = json_digest(whole)
    write_atomically(path, (json.dumps(whole, allow_nan=False) + "\n").encode())


def read_sealed(path: Path, kind: str, version: int, *, what: str, remedy: str) -> dict[str, Any]:
    """What `write_sealed` wrote; AquaError where the file is none of that kind or version, or was changed.

    Args:
        what: in words, such as "answers"; remedy: what to do about another file.
    """
    try:
        whole = json.loads(path.read_bytes())
        found, claimed = whole[kind], whole.pop("sha256")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AquaError(f"{path} holds no {what} ({error!r}): {remedy}") from error
    if found != version:
        raise AquaError(f"{path} has format version {found!r}, this library reads {version}: {remedy}")
    if claimed != json_digest(whole):
        raise AquaError(f"{path} was changed after it was written: {remedy}")
    return dict(whole)


def weight_difference(first: Digest, second: Digest) -> float:
    """Estimated relative difference between the key weights of two digests: 0 equal, above 1 unrelated.

    Scale counts as far as both digests know it: those of earlier versions do not.
    """
    squares = []
    for one, two in zip(first, second, strict=True):
        directions = [(a - b) ** 2 for a, b in zip(one[:SKETCHES], two[:SKETCHES], strict=True)]
        scales = [(1 - math.exp(-abs(a - b))) ** 2 for a, b in zip(one[SKETCHES:], two[SKETCHES:], strict=False)]
        squares.append(sum(directions) / max(len(directions), 1) + max(scales, default=0.0))
    return math.sqrt(sum(squares) / len(squares))


def same_digest(first: Digest | None, second: Digest | None) -> bool:
    """Whether two digests are of the same weights, as far as is known: one that is None says nothing.

    The last digit does not count, because it depends on the number of threads.
    """
    if not first or not second:
        return True
    sizes = [[len(row[:SKETCHES]) for row in digest] for digest in (first, second)]
    return sizes[0] == sizes[1] and weight_difference(first, second) < 1e-5
