# SPDX-License-Identifier: Apache-2.0
"""The answers so far in a file, so that a killed evaluation can go on."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.tasks.answers import Answer
from aqua_attention.io.files import remove_leftovers, write_atomically
from aqua_attention.model.fingerprint import same_digest

KIND = "aqua_attention_answers"
FORMAT_VERSION = 1


class Answers:
    """Answers to each task's questions, in their order: for each question dense's, then each setting's.

    Kept in a JSON file, when there is a path, at most every few seconds and when `save` is called.
    """

    def __init__(self, run: dict[str, Any], path: Path | str | None = None, *, seconds: float = 10.0) -> None:
        """Go on with what `path` holds, if it is there.

        Args:
            run: JSON values that tell this run from others; `tasks` among them, a dict of which each entry tells a task
                from others of its name. Tasks of earlier runs stay in the file, and new ones may join.

        Raises:
            AquaError: the file is damaged, or of another run; the message says in what they differ.
        """
        self.run: dict[str, Any] = json.loads(json.dumps(run))  # as it will be read: lists, no tuples
        self.path, self.seconds = None if path is None else Path(path), seconds
        self.of_task: dict[str, list[list[Answer]]] = {}
        self._saved = time.monotonic()
        if self.path is not None and self.path.exists():
            self.of_task, earlier = self._read(self.path)
            self.run["tasks"] = earlier | self.run["tasks"]

    def add(self, task: str, answers: list[list[Answer]]) -> None:
        """Add the answers to a task's next questions."""
        # One assignment, so that an interrupt finds all of them or none.
        self.of_task[task] = [*self.of_task.get(task, []), *answers]
        if time.monotonic() - self._saved >= self.seconds:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            content = {KIND: FORMAT_VERSION, "run": self.run, "answers": self.of_task}
            content["sha256"] = _digest(content)
            write_atomically(self.path, (json.dumps(content, allow_nan=False) + "\n").encode())
            remove_leftovers(self.path)
            self._saved = time.monotonic()

    def _read(self, path: Path) -> tuple[dict[str, list[list[Answer]]], dict[str, Any]]:
        try:
            content = json.loads(path.read_bytes())
            version, run, answers, claimed = content[KIND], content["run"], content["answers"], content.pop("sha256")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise AquaError(
                f"{path} holds no answers of `aqua eval tasks` ({error!r}): give another --state, or delete it"
            ) from error
        if version != FORMAT_VERSION:
            raise AquaError(f"{path} has format version {version!r}, this library reads {FORMAT_VERSION}: delete it")
        if claimed != _digest(content):
            raise AquaError(f"{path} was changed after it was written: delete it, or give another --state")
        if different := _differences(run, self.run):
            raise AquaError(
                f"{path} is of another run, which differs in {', '.join(different)}: repeat the options of that run, "
                "or give another --state"
            )
        return answers, run["tasks"]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name) and name != "tasks"]
    one, two = ours.get("key_weights"), theirs.get("key_weights")
    if "key_weights" in names and one and two and same_digest(one, two):
        names.remove("key_weights")
    both = ours["tasks"].keys() & theirs["tasks"].keys()
    return names + [f"the questions of {task}" for task in sorted(both) if ours["tasks"][task] != theirs["tasks"][task]]
