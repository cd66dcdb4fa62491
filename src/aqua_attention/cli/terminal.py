# SPDX-License-Identifier: Apache-2.0
"""How the command talks to the terminal: bars, tables and results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.outputs import check_writable
from aqua_attention.version import __version__

if TYPE_CHECKING:
    from aqua_attention.report.tables import Table


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
        AquaError: the file cannot be written, or is not ours, which is said before anything is measured.
    """

    json: Annotated[Path | None, "Also write the figures to this file."] = None

    def __post_init__(self) -> None:
        check_writable("figures", self.json)

    def __call__(self, result: dict[str, Any], *tables: Table, suite: str | None = None) -> None:
        """Write a result, if there is a file for it, and print its tables; that of a suite is written as a record."""
        if self.json and suite:
            from aqua_attention.evaluate.record import write_result

            write_result(self.json, suite, result, command_line())
        elif self.json:
            from aqua_attention.io.files import write_json

            write_json(self.json, {"command": command_line(), "version": __version__} | result)
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
