# SPDX-License-Identifier: Apache-2.0
"""What the commands that fill a folder of records share: where it is, what is measured, what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqua_attention.cli.terminal import check_folder, check_writable, command_line, progress_bar, show, stoppable
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aqua_attention.evaluate.record import Record
    from aqua_attention.evaluate.run import Job
    from aqua_attention.report.tables import Table

Folder = Annotated[Path, typer.Argument(help="Results folder; made if missing, gone on with if not.")]
Seed = Annotated[int, "Chooses the windows calibrated on."]


def run_and_print(
    folder: Path,
    jobs: Sequence[Job],
    loaded: PreTrainedModel,
    tables: Callable[[list[Record]], list[Table]],
    json: Path | None,
    explained: bool = False,
) -> None:
    """Measure, write and print: the same for every kind of job. `explained`: the tables say why figures are missing."""
    from aqua_attention.evaluate.record import make_folder
    from aqua_attention.evaluate.run import facts_of, run_jobs
    from aqua_attention.report.record_tables import reasons

    make_folder(folder)
    if json:
        make_folder(json.absolute().parent)
    facts = facts_of(loaded, command_line())
    kept = f"{folder} keeps what is done, the same command goes on"
    with stoppable(lambda: kept), progress_bar("settings") as progress:
        records = run_jobs(folder, jobs, facts, progress=progress, notice=print_notice)
    show({"records": [record.to_dict() for record in records]}, json, *tables(records))
    for line in [] if explained else reasons(records):
        typer.echo(line)
    failed = sum(record.error is not None for record in records)
    missing = f", {failed} of them without figures" if failed else ""
    typer.echo(f"{len(records)} records{missing} in {folder / 'records'}")
    if failed == len(records):
        raise typer.Exit(1)


def check_places(folder: Path, json: Path | None) -> None:
    """Before anything is loaded. Nothing is made yet, so that a mistake leaves no empty folder."""
    check_folder(folder)
    if json is not None and json.resolve() == folder.resolve():
        raise AquaError(f"cannot write {json}: it is the results folder; give a file, such as {json / 'all.json'}")
    if json is None or json.absolute().parent.exists() or not json.resolve().is_relative_to(folder.resolve()):
        check_writable(json)


def print_notice(message: str) -> None:
    """Say something that is no result."""
    typer.echo(message, err=True)
