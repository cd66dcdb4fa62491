# SPDX-License-Identifier: Apache-2.0
"""How the command talks to the terminal: bars, tables and results."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
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

LINE_SECONDS = 30.0
"""Between two lines of progress."""
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""What typer raises for a command line that it cannot read: click's exception, or that of its own copy of click."""


def command_line() -> str:
    """How this command was called, for records."""
    return shlex.join(["aqua", *sys.argv[1:]])


def usage_error(error: Any) -> str:
    """What typer says of a command line in a box, in one line, with the value that is wrong."""
    reason, context = " ".join(error.format_message().split()).rstrip("."), getattr(error, "ctx", None)
    # Newer versions have pydantic read values, and do not say which.
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    if found:
        needed = found[0]["msg"].split(",")[0].replace("Input should", "it must")
        reason = f"{'/'.join(error.param.opts)} is {found[0]['input']!r}: {needed}"
    return f"error: {reason}; see `{context.command_path} --help`" if context else f"error: {reason}"


@contextmanager
def progress_bars() -> Iterator[Callable[[str, float, int], None]]:
    """A bar a step on the error stream, with the time left; lines where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    tasks: dict[str, Any] = {}
    # A step may take minutes; from the last half minute alone there would be no estimate then.
    with Progress(*columns, console=console, speed_estimate_period=600) as bars:

        def report(name: str, done: float, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report


def _progress_lines() -> Callable[[str, float, int], None]:
    """What writes a line when a step begins and when it ends, and between them one every `LINE_SECONDS`."""
    begun: dict[str, float] = {}
    due: dict[str, float] = {}

    def report(name: str, done: float, total: int) -> None:
        now = time.monotonic()
        start = begun.setdefault(name, now)
        if now >= due.get(name, now) or (done >= total and due[name] < math.inf):
            due[name] = now + LINE_SECONDS if done < total else math.inf  # an end is said once
            passed = f", {now - start:.0f} s" if now - start >= 1 else ""
            typer.echo(f"{name}: {done:g} of {total}{passed}", err=True)

    return report


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float, int], None]]:
    """One bar, moved by progress(done, total)."""
    with progress_bars() as report:
        yield partial(report, name)


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
