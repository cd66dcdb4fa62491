# SPDX-License-Identifier: Apache-2.0
"""How the command talks to the terminal: tables and results, mistakes in a line, and how it ends."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.outputs import check_writable
from aqua_attention.errors import NEAR
from aqua_attention.evaluate.record import now, write_result

if TYPE_CHECKING:
    from aqua_attention.report.tables import Table

USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""What typer raises for a command line that it cannot read: click's exception, or that of its own copy of click."""


def command_line() -> str:
    """How this command was called, for records."""
    return shlex.join(["aqua", *sys.argv[1:]])


def usage_error(error: Any) -> str:
    """What typer says of a command line in a box, in one line, with the value that is wrong."""
    if likely := getattr(error, "possibilities", None):
        error.possibilities = get_close_matches(error.option_name, likely, cutoff=NEAR) or None
    reason, context = " ".join(error.format_message().split()).rstrip("."), getattr(error, "ctx", None)
    # Newer versions have pydantic read values, and do not say which.
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    if found:
        needed = found[0]["msg"].split(",")[0].replace("Input should", "it must")
        reason = f"{'/'.join(error.param.opts)} is {found[0]['input']!r}: {needed}"
    return f"error: {reason}; see `{context.command_path} --help`" if context else f"error: {reason}"


@contextmanager
def stoppable(kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """After Ctrl-C, say what is kept and how to go on, and leave with exit code 130; so after `ended_by_signals`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        number, words = (*stop.args, signal.SIGINT)[0], kept()
        by = f" by {signal.Signals(number).name}" if stop.args else ""
        typer.echo(f"stopped{by}{': ' if words else ''}{words}", err=True)
        raise typer.Exit(128 + number) from None


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP end the work as Ctrl-C does. Those that are ignored or handled stay so."""
    owner, before = os.getpid(), {}

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a library's worker process
            os._exit(128 + number)
        raise KeyboardInterrupt(number)

    for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Show:
    """Where a command's result goes; called with what was measured, its tables, and its suite.

    Raises:
        AquaError: the file cannot be written, or is not ours, which is said before anything is measured.
    """

    json: Annotated[Path | None, "Also write the figures to this file, as JSON."] = None
    started: str = field(default_factory=now, init=False)

    def __post_init__(self) -> None:
        check_writable("figures", self.json)

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
