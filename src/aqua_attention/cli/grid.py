# SPDX-License-Identifier: Apache-2.0
"""The command `aqua eval grid`: many measurements into a folder of records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from aqua_attention.cli.options import (
    PAPER_K_RATIO,
    Chat,
    EvaluationData,
    Grid,
    ModelOptions,
    ProjectionsFile,
    Quick,
)
from aqua_attention.cli.records import ResultsFolder
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from aqua_attention.evaluate.suites.grid import Sizes

SUITES = ["perplexity"]


@dataclass(frozen=True)
class SizeOptions:
    """How much each suite reads; what is not given is that of a full or a quick grid."""

    quick: Quick = False
    context: Annotated[int | None, "Tokens in a window (2048; quick 1024)."] = None
    tokens: Annotated[int | None, "Tokens to read (perplexity 8192, retention 4096; quick 2048, 1024)."] = None
    length: Annotated[list[int] | None, "Needle: tokens of the prompt; repeat (1024 2048 4096; quick 512 1024)."] = None
    depth: Annotated[list[float] | None, "Needle: where it is; repeat (0 0.25 0.5 0.75 1; quick 0 0.5 1)."] = None
    needles: Annotated[int | None, "Needle: how many are hidden, and asked for (1)."] = None
    repeats: Annotated[int | None, "Needle: haystacks for each length and depth (1)."] = None
    lines: Annotated[list[int] | None, "Lines in a question; repeat (100 200; quick 10 20)."] = None
    lines_file: Annotated[Path | None, "LongEval's .jsonl of line questions; generated when left out."] = None
    count: Annotated[int | None, "Questions for each number of lines (50; quick 4)."] = None

    def sizes(self) -> Sizes:
        """What the suites take; a size given twice counts once.

        Raises:
            AquaError: lines of a file, and lines to generate; fewer tokens than can predict one.
        """
        if self.lines_file is not None and self.lines:
            both = f"--lines generates questions, --lines-file {self.lines_file} reads them"
            raise AquaError(f"{both}: give one of the two")
        from aqua_attention.evaluate.run import check_sizes
        from aqua_attention.evaluate.suites.grid import sizes_of

        check_sizes(context=self.context, tokens=self.tokens)
        given: dict[str, Any] = {
            name: tuple(dict.fromkeys(value)) or None if isinstance(value, list) else value
            for name, value in vars(self).items()
        }
        lengths, depths = given.pop("length"), given.pop("depth")
        return sizes_of(**given, retention_tokens=self.tokens, lengths=lengths, depths=depths)


def grid(
    *,
    results: ResultsFolder,
    projections: ProjectionsFile,
    suite: Annotated[list[str], "perplexity, retention, needle, lines; repeat."] = SUITES,
    k_ratio: Annotated[list[float] | None, "Share of dimensions multiplied; repeat (0.75)."] = None,
    logit_error: Annotated[list[float] | None, "Adaptive k, beside the k_ratios given; repeat."] = None,
    knobs: Grid,
    data: EvaluationData = "builtin:evaluation",
    given: SizeOptions,
    seed: Annotated[int, "Chooses needles, haystacks and lines."] = 0,
    chat: Chat = True,
    model: ModelOptions,
) -> None:
    """Every combination of the repeated options under every suite, a record each; stopped, the same command goes on.

    Example: `aqua eval grid results smollm2 -p smollm2.safetensors --quick --suite perplexity --suite needle
    --k-ratio 1 --k-ratio 0.5 --h2o-ratio 1 --h2o-ratio 0.5 --selection weighted --sink 4 --recent 64`
    """
    sizes = given.sizes()
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.record import file_digest
    from aqua_attention.evaluate.setting import grid_settings
    from aqua_attention.evaluate.suites.grid import check_suites, grid_jobs
    from aqua_attention.report.record_tables import record_table

    k_ratio = k_ratio or ([] if logit_error else PAPER_K_RATIO)
    settings = grid_settings(knobs | {"k_ratio": k_ratio, "logit_error": logit_error or []})
    check_suites(suite, settings)
    subject = model.subject(projections, data, load_text(data), name=model.name, seed=seed, chat=chat)
    subject = replace(subject, projections_sha256=file_digest(projections))
    results.measure(
        grid_jobs(subject, suite, settings, sizes),
        subject.model,
        lambda records: [record_table(records)],
        explained=True,
    )
