# SPDX-License-Identifier: Apache-2.0
"""`aqua doctor`: what this machine can do."""

from __future__ import annotations

from aqua_attention.cli.terminal import Show


def doctor(show: Show) -> None:
    """Show what this machine can do: versions, GPU, compilers, which path decodes here, and what would be faster.

    Builds the C kernel if it is not there yet. Exits with 0 whatever it finds.

    Example: `aqua doctor --json doctor.json`
    """
    from aqua_attention.bench.doctor import check_up

    found = check_up()
    rows = [[each.name, each.found, each.note] for each in found.checks]
    show(found.to_dict(), (["", "found", "what that means"], rows))
