# SPDX-License-Identifier: Apache-2.0
"""How the command talks to the terminal: bars, tables, and an early word about places that cannot be written."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import now, write_result

if TYPE_CHECKING:
    from aqua_attention.report.tables import Table


def check_writable(*paths: Path | None) -> None:
    """Say now, not after minutes of work, that a result has nowhere to go, or that two would go to one place."""
    given = [path for path in paths if path is not None]
    for path in given:
        if sum(path.resolve() == other.resolve() for other in given) > 1 and not path.is_char_device():
            raise AquaError(f"{path} is given for two results: give each a file of its own")
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise AquaError(f"cannot write {path}: give a file in a folder that exists and is writable")


def command_line() -> str:
    """How this command was called, for records."""
    return shlex.join(["aqua", *sys.argv[1:]])


@contextmanager
def progress_bars() -> Iterator[Callable[[str, float, int], None]]:
    """A bar a step on the terminal's error stream, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    tasks: dict[str, Any] = {}
    # A step may take minutes; from the last half minute alone there would be no estimate then.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bars:

        def report(name: str, done: float, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float, int], None]]:
    """One bar, moved by progress(done, total)."""
    with progress_bars() as report:
        yield partial(report, name)


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """After Ctrl-C, say what is kept and how to go on, and leave with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped: {kept()}", err=True)
        raise typer.Exit(130) from None


@dataclass(frozen=True)
class Show:
    """Where a command's result goes; called with what was measured, its tables, and its suite.

    Raises:
        AquaError: the file cannot be written, which is said before anything is measured.
    """

    json: Annotated[Path | None, "Also write the figures to this file."] = None
    started: str = field(default_factory=now, init=False)

    def __post_init__(self) -> None:
        check_writable(self.json)

    def __call__(self, result: dict[str, Any], *tables: Table, suite: str | None = None) -> None:
        """Write a result as a record, if there is a file for it, and print its tables."""
        if self.json:
            write_result(self.json, suite, result, command_line(), self.started)
        for table in tables:
            print_table(table)


def print_table(table: Table) -> None:
    """Print titles and rows; wide enough for a file when the output is no terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    titles, rows = table
    grid = RichTable(show_header=any(titles))
    for title in titles:
        grid.add_column(title, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console()
    if not console.is_terminal:
        # A pipe has no width; a table that wraps at 80 columns is of no use in a file.
        console = Console(width=160)
    console.print(grid, markup=False)
