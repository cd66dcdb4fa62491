# SPDX-License-Identifier: Apache-2.0
"""The answers so far in a file, so that a killed evaluation can go on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.tasks.answers import Answer
from aqua_attention.io.files import write_atomically
from aqua_attention.io.state import RunState

KIND = "aqua_attention_answers"
FORMAT_VERSION = 1


class Answers(RunState):
    """Answers to each task's questions, in their order: for each question dense's, then each setting's.

    Kept in a JSON file, when there is a path, at most every few seconds and when `save` is called.
    """

    instead = "give another --state"

    def __init__(self, run: dict[str, Any], path: Path | str | None = None, *, seconds: float = 10.0) -> None:
        """Go on with what `path` holds, if it is there.

        Args:
            run: JSON values that tell this run from others; `tasks` among them, a dict of which each entry tells a task
                from others of its name. Tasks of earlier runs stay in the file, and new ones may join.

        Raises:
            AquaError: the file is damaged, or of another run; the message says in what they differ.
        """
        super().__init__(path, run, seconds=seconds)
        self.of_task: dict[str, list[list[Answer]]]
        self.of_task, earlier = self.found() or ({}, {})
        self.run["tasks"] = earlier | self.run["tasks"]

    def add(self, task: str, answers: list[list[Answer]]) -> None:
        """Add the answers to a task's next questions."""
        # One assignment, so that an interrupt finds all of them or none.
        self.of_task[task] = [*self.of_task.get(task, []), *answers]
        self.keep()

    def _write(self, path: Path, content: tuple[()]) -> None:
        whole = {KIND: FORMAT_VERSION, "run": self.run, "answers": self.of_task}
        whole["sha256"] = _digest(whole)
        write_atomically(path, (json.dumps(whole, allow_nan=False) + "\n").encode())

    def _read(self, path: Path) -> tuple[dict[str, Any], tuple[dict[str, list[list[Answer]]], dict[str, Any]]]:
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
        return run, (answers, run["tasks"])

    def _differences(self, run: dict[str, Any]) -> list[str]:
        ours, theirs = self.run["tasks"], run["tasks"]
        names = [name for name in super()._differences(run) if name != "tasks"]
        asked = sorted(ours.keys() & theirs.keys())
        return names + [f"the questions of {task}" for task in asked if ours[task] != theirs[task]]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
