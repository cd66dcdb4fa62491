# SPDX-License-Identifier: Apache-2.0
"""How far a run is, on the error stream: a bar on a terminal or in a notebook, elsewhere some lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called as progress(done, in all)."""
LINES = 10
"""At most so many more lines than one in a run, so that a log stays short."""


@contextmanager
def shown(name: str) -> Iterator[Progress]:
    """While open, show what is done under a name, such as "calibrate"."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield lines(name)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # A step may take minutes; from the last half minute alone there would be no estimate then.
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def lines(name: str) -> Progress:
    """Print a line at the beginning, at the end, and at each tenth in between."""
    printed: set[int] = set()

    def progress(done: int, total: int) -> None:
        part = LINES * done // max(total, 1)
        if part not in printed:
            printed.add(part)
            print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)

    return progress
