# SPDX-License-Identifier: Apache-2.0
"""What the commands that fill a folder of records share: where it is, what is measured, what is printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqua_attention.cli.terminal import Show, check_writable, command_line, progress_bar, stoppable
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aqua_attention.cli.options import ModelOptions
    from aqua_attention.evaluate.record import Record
    from aqua_attention.evaluate.run import Job
    from aqua_attention.evaluate.suites.transfer import Calibrator
    from aqua_attention.report.tables import Table


@dataclass(frozen=True, kw_only=True)
class ResultsFolder(Show):
    """A folder of records, and a file for all of them.

    Raises:
        AquaError: one cannot be made or written. Nothing is made yet, so that a mistake leaves no empty folder.
    """

    folder: Annotated[Path, typer.Argument(help="Results folder; made if missing, gone on with if not.")]

    def __post_init__(self) -> None:
        folder, json, nearest = self.folder, self.json, self.folder.absolute()
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise AquaError(f"cannot make the folder {folder}: {nearest} is no folder that is writable; choose another")
        if json is not None and json.resolve() == folder.resolve():
            raise AquaError(f"cannot write {json}: it is the results folder; give a file, such as {json / 'all.json'}")
        if json is None or json.absolute().parent.exists() or not json.resolve().is_relative_to(folder.resolve()):
            check_writable(json)

    def calibrator(self, model: ModelOptions) -> Calibrator:
        """What calibrates a model for the measurements, and keeps its projections here."""
        from aqua_attention.evaluate.suites.transfer import Calibrator

        return Calibrator(self.folder, model.name, *model.load(), _notice)

    def measure(
        self,
        jobs: Sequence[Job],
        loaded: PreTrainedModel,
        tables: Callable[[list[Record]], list[Table]],
        explained: bool = False,
    ) -> None:
        """Measure, write and print, for every kind of job. `explained`: the tables say why figures are missing."""
        from aqua_attention.evaluate.record import make_folder
        from aqua_attention.evaluate.run import facts_of, run_jobs
        from aqua_attention.report.record_tables import reasons

        make_folder(self.folder)
        if self.json:
            make_folder(self.json.absolute().parent)
        facts = facts_of(loaded, command_line())
        kept = f"{self.folder} keeps what is done, the same command goes on"
        with stoppable(lambda: kept), progress_bar("settings") as progress:
            records = run_jobs(self.folder, jobs, facts, progress=progress, notice=_notice)
        self({"records": [record.to_dict() for record in records]}, *tables(records))
        for line in [] if explained else reasons(records):
            typer.echo(line)
        failed = sum(record.error is not None for record in records)
        missing = f", {failed} of them without figures" if failed else ""
        typer.echo(f"{len(records)} records{missing} in {self.folder / 'records'}")
        if failed == len(records):
            raise typer.Exit(1)


def _notice(message: str) -> None:
    typer.echo(message, err=True)
