# SPDX-License-Identifier: Apache-2.0
"""Answers to a list of questions, kept in a file as they are given, so that a killed run asks only the others."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.run import facts_of_model
from aqua_attention.evaluate.setting import Subject
from aqua_attention.io.files import json_digest, write_atomically
from aqua_attention.io.state import Run, RunState

Counts = dict[str, Any]
"""What `setting.Run.counts` gives."""


class Answers(RunState):
    """Those of one setting, or of the dense model, in the order of the questions.

    Attributes:
        given: so far. counts: what was counted while they were.
    """

    instead = "delete the file"

    def __init__(self, path: Path | None = None, run: Run | None = None) -> None:
        """What the file holds, if it is whole and of this run (see `asked`); else there are none yet."""
        super().__init__(path, run or {})
        self.given: list[Continuation] = []
        self.counts: Counts = {}
        try:
            found = self.found()
        except AquaError as error:
            warnings.warn(f"{error}; its questions are asked again now", stacklevel=2)
            found = None
        if found is not None:
            self.counts, self.given = found

    def add(self, answer: Continuation, counts: Callable[[], Counts]) -> None:
        """One more; `counts` is called when the file is written."""
        self.given.append(answer)
        self.keep(counts)

    def _read(self, path: Path) -> tuple[Run, tuple[Counts, list[Continuation]]]:
        try:
            value = json.loads(path.read_bytes())
            answers = [Continuation(str(text), [int(token) for token in tokens]) for text, tokens in value["answers"]]
            return dict(value["run"]), (dict(value["counts"]), answers)
        except OSError as error:
            raise AquaError(f"cannot read {path} ({error.strerror or error}): check the file") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AquaError(f"{path} is damaged ({type(error).__name__}: {error})") from error

    def _write(self, path: Path, content: tuple[Callable[[], Counts]]) -> None:
        answers = [[answer.text, answer.token_ids] for answer in self.given]
        value = {"run": self.run, "counts": content[0](), "answers": answers}
        write_atomically(path, (json.dumps(value, allow_nan=False) + "\n").encode())


def asked(subject: Subject, encoded: Sequence[tuple[Tensor, int]]) -> Run:
    """What answers are of: these questions, with how many tokens each answer may have, and these weights."""
    digest = json_digest([[tokens.tolist(), budget] for tokens, budget in encoded])
    return {"questions": digest, "key_weights": facts_of_model(subject.model)["key_weights"]}
