# SPDX-License-Identifier: Apache-2.0
"""The command `aqua report`: parsing and printing only, see `report/` for what it does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from aqua_attention.cli.terminal import Show, check_writable, progress_bar


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Results: what `aqua eval grid` wrote, or --json of other commands.")
    ],
    show: Show,
) -> None:
    """Turn a folder of results into one page: DIR/report.html, and the same as DIR/report.md. Needs no network.

    Reads `DIR/*.json` and `DIR/records/*.json`: those of `aqua eval grid`, and what `aqua eval`, `aqua bench` and
    `aqua inspect` write with --json. Files that are none of these are named in the report.

    Example: `aqua report results`
    """
    from aqua_attention.report.collect import collect
    from aqua_attention.report.page import write_report

    collected = collect(folder)
    check_writable(folder / "report.html", folder / "report.md", show.json)
    with progress_bar("report") as progress:
        paths = write_report(folder, collected, progress)
    suites, about = Counter(record.suite for record in collected.records), ("suite", "source", "setting", "error")
    result = {
        "settings": dict(suites),
        "failed": [{name: getattr(record, name) for name in about} for record in collected.failed],
        "unused": [{"file": name, "reason": reason} for name, reason in collected.unused],
        "written": [str(path) for path in paths],
    }
    show(result)
    for name, reason in collected.unused:
        typer.echo(f"not used: {name}: {reason}", err=True)
    counts = ", ".join(f"{count} {suite}" for suite, count in suites.items()) or "none"
    typer.echo(f"settings: {counts}; failed: {len(collected.failed)}; files not used: {len(collected.unused)}")
    for path in paths:
        typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
