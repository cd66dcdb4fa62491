# SPDX-License-Identifier: Apache-2.0
"""How far a run is, on the error stream: a bar a step on a terminal or in a notebook, elsewhere some lines."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

Progress = Callable[[int, int], None]
"""Called as progress(done, in all)."""
LINE_SECONDS = 30.0
"""Between two lines of progress."""


@contextmanager
def progress_bars() -> Iterator[Callable[[str, float, int], None]]:
    """A bar a step, with the time left, moved by progress(name, done, total); lines where there is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
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


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float, int], None]]:
    """One bar, moved by progress(done, total)."""
    with progress_bars() as report:
        yield partial(report, name)


@contextmanager
def progress_steps() -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """A bar for each `with step(name)`, of steps that cannot say how far they are: it moves at their end."""
    with progress_bars() as report:

        @contextmanager
        def step(name: str) -> Iterator[None]:
            report(name, 0, 1)
            yield
            report(name, 1, 1)

        yield step


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
            if passed and 0 < done < total:
                passed += f", about {(now - start) * (total - done) / done:.0f} s left"
            print(f"{name}: {done:g} of {total}{passed}", file=sys.stderr, flush=True)

    return report
