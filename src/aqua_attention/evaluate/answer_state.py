# SPDX-License-Identifier: Apache-2.0
"""Answers to a list of questions, kept in a file while they are given, so that a killed run asks only the others."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import Continuation
from aqua_attention.evaluate.run import facts_of_model
from aqua_attention.evaluate.setting import Subject
from aqua_attention.io.state import Run, RunState, read_sealed, write_sealed
from aqua_attention.version import __version__

KIND, FORMAT_VERSION = "aqua_attention_answer_state", 1
"""Of the file."""
REPLACED = "it is replaced now, and its questions are asked again"
Counts = dict[str, Any]
"""What `setting.Run.counts` gives."""


class AnswerState(RunState):
    """Answers of one setting, or of the dense model, in the order of the questions.

    The file is written every ten seconds at most, and when all is answered.

    Attributes:
        given: so far. counts: what was counted while they were.
        resumed: how many of them the file had.
    """

    def __init__(self, path: Path | None = None, run: Run | None = None) -> None:
        """What the file holds, if it is whole and of this run (see `asked`). Another file is replaced, with a warning.

        A `path` of None keeps nothing.
        """
        super().__init__(path, run or {})
        self.given: list[Continuation] = []
        self.counts: Counts = {}
        if self.path is not None and self.path.exists():
            try:
                self.counts, self.given = self._kept(self.path)
            except AquaError as error:
                warnings.warn(str(error), stacklevel=2)
        self.resumed = len(self.given)

    def _kept(self, path: Path) -> tuple[Counts, list[Continuation]]:
        run, content = self._read(path)
        if different := self._differences(run):
            raise AquaError(f"{path} is of another run, which differs in {', '.join(different)}: {REPLACED}")
        return content

    def add(self, answer: Continuation, counts: Callable[[], Counts]) -> None:
        """One more; `counts` is called when the file is written."""
        self.given.append(answer)
        self.keep(counts)

    def _write(self, path: Path, content: tuple[Callable[[], Counts]]) -> None:
        answers = [[answer.text, answer.token_ids] for answer in self.given]
        write_sealed(path, KIND, FORMAT_VERSION, {"run": self.run, "counts": content[0](), "answers": answers})

    def _read(self, path: Path) -> tuple[Run, tuple[Counts, list[Continuation]]]:
        whole = read_sealed(path, KIND, FORMAT_VERSION, what="answers of a grid", remedy=REPLACED)
        return whole["run"], (whole["counts"], [Continuation(text, tokens) for text, tokens in whole["answers"]])


def asked(subject: Subject, encoded: Sequence[tuple[Tensor, int]]) -> Run:
    """What answers are of: these questions, how many tokens each may have, the weights, and what computes."""
    digest = hashlib.sha256()
    for tokens, budget in encoded:
        digest.update(tokens.numpy().tobytes() + budget.to_bytes(8, "little"))
    return {"questions": digest.hexdigest(), "version": __version__} | facts_of_model(subject.model)
