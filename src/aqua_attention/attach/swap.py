# SPDX-License-Identifier: Apache-2.0
"""Functions of modules and modeling files, replaced for a while and for one thread."""

import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

ABSENT = object()


class Place(NamedTuple):
    """Where a function is looked up when it is called: the `__dict__` of a module or of a Python file, and its name."""

    namespace: dict[str, Any]
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """What tells places apart; dictionaries cannot be hashed."""
        return id(self.namespace), self.name


Key = tuple[int, str]


@dataclass
class _Swap:
    """What was at a place before, and how many contexts replace it now."""

    before: Any
    count: int = 0


class _Replacements(threading.local):
    """What each thread calls instead; nothing in a thread that has entered no context."""

    def __init__(self) -> None:
        self.at: Mapping[Key, Callable[..., Any]] = {}


_swaps: dict[Key, _Swap] = {}
_lock = threading.Lock()
_replacements = _Replacements()


@contextmanager
def replaced(functions: list[tuple[Place, Callable[..., Any], Callable[..., Any]]]) -> Iterator[None]:
    """While open, this thread calls the last of each (place, original, replacement); others call the original.

    A place holds a function that asks whose call it is, and what it held before when the last context has closed.
    Contexts of several threads may therefore close in any order.
    """
    before = _replacements.at
    entered = []
    try:
        for place, original, _ in functions:
            _enter(place, original)
            entered.append(place)
        _replacements.at = {**before, **{place.key: replacement for place, _, replacement in functions}}
        yield
    finally:
        _replacements.at = before
        for place in entered:
            _leave(place)


def current(place: Place) -> Any:
    """What is at a place when nothing replaces it; `ABSENT` when nothing is there."""
    with _lock:
        swap = _swaps.get(place.key)
        return place.namespace.get(place.name, ABSENT) if swap is None else swap.before


class _Call:
    """What is at a place meanwhile. Copied or pickled with its module, it is the original of the copied module."""

    def __init__(self, key: Key, original: Callable[..., Any]) -> None:
        self._key, self._original = key, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _replacements.at.get(self._key, self._original)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, ((self._original,), 0)


def _enter(place: Place, original: Callable[..., Any]) -> None:
    key, call = place.key, _Call(place.key, original)
    with _lock:
        if key not in _swaps:
            _swaps[key] = _Swap(place.namespace.get(place.name, ABSENT))
            place.namespace[place.name] = call
        _swaps[key].count += 1


def _leave(place: Place) -> None:
    with _lock:
        swap = _swaps[place.key]
        swap.count -= 1
        if swap.count:
            return
        del _swaps[place.key]
        if swap.before is ABSENT:
            del place.namespace[place.name]
        else:
            place.namespace[place.name] = swap.before
