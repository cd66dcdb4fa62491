# SPDX-License-Identifier: Apache-2.0
"""The one error that this package raises for a mistake a user can mend, and why something is not done."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

REPORT = "this is a defect of AQUA, report it with what `aqua doctor` says"
"""The remedy where a check of ours fails, which no user can mend."""


NEAR = 0.8
"""How much alike two words are where one could be a slip for the other, in [0, 1], as difflib counts."""


class AquaError(ValueError):
    """A user's mistake, said in one line with its remedy; the command exits with code 2."""


class Reason(str):
    """Why something faster is not possible, made where that is decided.

    Attributes:
        remedy: the one setting that would change it, as an instruction; empty where none would.
    """

    remedy: str

    def __new__(cls, text: str, remedy: str = "") -> Reason:
        """A text that knows its remedy."""
        made = super().__new__(cls, text)
        made.remedy = remedy
        return made


def brief(value: Any) -> str:
    """A value of the wrong type for a message: itself where it is short, else of which type it is."""
    if value is None or isinstance(value, bool | int | float | str | PurePath):
        return repr(value)[:80]
    return f"of type {type(value).__name__}"


def did_you_mean(given: Any, known: Iterable[str]) -> str:
    """A question for the known name that is a slip away from the given one; empty where none is that near."""
    near = get_close_matches(str(given), known, 1, cutoff=NEAR)
    return f"did you mean {near[0]!r}?" if near else ""


def install_extra(name: str) -> str:
    """What to do where the packages of an extra are missing. This package is installed from a clone."""
    return f"install it beside this package (pip install '.[{name}]' in the clone)"


def remedy_of(reason: str | None) -> str:
    """The remedy of a reason; empty for any other text."""
    return reason.remedy if isinstance(reason, Reason) else ""


def said(reason: str, otherwise: str = "") -> str:
    """A reason and what to do: its remedy, or what else there is."""
    remedies = ", or ".join(filter(None, (remedy_of(reason), otherwise)))
    return f"{reason}: {remedies}" if remedies else str(reason)
