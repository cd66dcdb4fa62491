# SPDX-License-Identifier: Apache-2.0
"""Answers to a list of questions, kept in a file while they are given, so that a killed run asks only the others."""

import hashlib
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
from aqua_attention.version import __version__

KIND, FORMAT_VERSION = "aqua_attention_answer_state", 1
"""Of the file."""
Counts = dict[str, Any]
"""What `setting.Run.counts` gives."""


class AnswerState(RunState):
    """Answers of one setting, or of the dense model, in the order of the questions.

    The file is written every ten seconds at most, and when all is answered.

    Attributes:
        given: so far. counts: what was counted while they were.
        resumed: how many of them the file had.
    """

    instead = "delete the file"

    def __init__(self, path: Path | None = None, run: Run | None = None) -> None:
        """What the file holds, if it is whole and of this run (see `asked`). Another file is replaced, with a warning.

        A `path` of None keeps nothing.
        """
        super().__init__(path, run or {})
        self.given: list[Continuation] = []
        self.counts: Counts = {}
        try:
            found = self.found()
        except AquaError as error:
            warnings.warn(f"{error}. It is replaced now: all its questions are asked again", stacklevel=2)
            found = None
        if found is not None:
            self.counts, self.given = found
        self.resumed = len(self.given)

    def add(self, answer: Continuation, counts: Callable[[], Counts]) -> None:
        """One more; `counts` is called when the file is written."""
        self.given.append(answer)
        self.keep(counts)

    def _write(self, path: Path, content: tuple[Callable[[], Counts]]) -> None:
        answers = [[answer.text, answer.token_ids] for answer in self.given]
        whole = {KIND: FORMAT_VERSION, "run": self.run, "counts": content[0](), "answers": answers}
        whole["sha256"] = json_digest(whole)
        write_atomically(path, (json.dumps(whole, allow_nan=False) + "\n").encode())

    def _read(self, path: Path) -> tuple[Run, tuple[Counts, list[Continuation]]]:
        try:
            whole = json.loads(path.read_bytes())
            version, claimed = whole[KIND], whole.pop("sha256")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise AquaError(f"{path} holds no answers of a grid ({error!r})") from error
        if version != FORMAT_VERSION:
            raise AquaError(f"{path} has format version {version!r}, and this library reads {FORMAT_VERSION}")
        if claimed != json_digest(whole):
            raise AquaError(f"{path} was changed after it was written")
        return whole["run"], (whole["counts"], [Continuation(text, tokens) for text, tokens in whole["answers"]])

    def _differences(self, run: Run) -> list[str]:
        """What differs, in words; the digest of questions says nothing by itself."""
        return [{"key_weights": "the model's weights"}.get(name, name) for name in super()._differences(run)]


def asked(subject: Subject, encoded: Sequence[tuple[Tensor, int]]) -> Run:
    """What answers are of: these questions, how many tokens each may have, the weights, and what computes."""
    digest = hashlib.sha256()
    for tokens, budget in encoded:
        digest.update(tokens.numpy().tobytes() + budget.to_bytes(8, "little"))
    return {"questions": digest.hexdigest(), "version": __version__} | facts_of_model(subject.model)
