# SPDX-License-Identifier: Apache-2.0
"""The one error that this package raises for a mistake a user can mend, and why something is not done."""

from __future__ import annotations


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


def remedy_of(reason: str | None) -> str:
    """The remedy of a reason; empty for any other text."""
    return reason.remedy if isinstance(reason, Reason) else ""


def said(reason: str, otherwise: str = "") -> str:
    """A reason and what to do: its remedy, or what else there is."""
    remedies = ", or ".join(filter(None, (remedy_of(reason), otherwise)))
    return f"{reason}: {remedies}" if remedies else str(reason)
