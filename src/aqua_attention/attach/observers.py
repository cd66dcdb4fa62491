# SPDX-License-Identifier: Apache-2.0
"""Who is told what attention chose and read, and what they are told while a step is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

NAMES = ("on_selection", "on_reading")
"""Of an `Attachment`."""


def observers_of(observing: Any) -> dict[str, Any]:
    """Those that there are, by name."""
    found = ((name, getattr(observing, name, None)) for name in NAMES)
    return {name: observer for name, observer in found if observer is not None}


@contextmanager
def noted(observing: Any, told: list[tuple[str, Any]]) -> Iterator[None]:
    """While open, what observers would be told is put into a list, with their names; every replay writes it anew."""
    observers = observers_of(observing)
    for name in observers:
        setattr(observing, name, lambda *seen, name=name: told.append((name, seen)))
    try:
        yield
    finally:
        for name, observer in observers.items():
            setattr(observing, name, observer)


def tell(observing: Any, told: list[tuple[str, Any]]) -> None:
    """Tell observers what was noted, in clones. One may remove itself, or another, while it is told."""
    for name, seen in told:
        if (observer := getattr(observing, name)) is None:
            continue
        # A size is a tuple, but none to be looked into.
        cloned = tree_map_only(Tensor, torch.clone, seen, is_leaf=lambda each: isinstance(each, torch.Size))
        observer(*cloned)
