# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter without work that it does twice."""

from __future__ import annotations

import functools
import sys
from types import FunctionType

FRAME = 70_000
"""Places of a frame that Python keeps in a chunk of 1 MB, of which 0.4 are left for the frames of its callees."""


def make_faster() -> None:
    """Change both things that follow; nothing where triton was not imported, or is another version than 3.9."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "_patch_lang") and not hasattr(interpreter._patch_lang, "is_once"):
        _prepare_once(interpreter)
        interpreter.GridExecutor.__call__ = _with_room(interpreter.GridExecutor.__call__)


def _with_room(function: FunctionType):
    """The function, called from a frame that is large.

    Python keeps frames in chunks of 16 KB. Calls that cross the end of one, again and again, ask the system for
    memory each time. Kernels in the interpreter do so by the million.
    """

    @functools.wraps(function)
    def call(*arguments, **options):
        return function(*arguments, **options)

    call.__code__ = call.__code__.replace(co_stacksize=FRAME)
    return call


def _prepare_once(interpreter) -> None:
    """Prepare triton's language once a launch, not again for each function that a kernel calls."""
    prepare = interpreter._patch_lang
    language, nothing = interpreter.tl, interpreter._LangPatchScope
    prepared: set[str] = set()

    def once(function: FunctionType):
        named = {each.__name__ for each in function.__globals__.values() if each is language or each is language.core}
        if named and named <= prepared:
            return nothing()
        is_launch, scope = not prepared, prepare(function)
        prepared.update(named)
        if is_launch:
            restore = scope.restore

            def restored() -> None:
                prepared.clear()
                restore()

            scope.restore = restored
        return scope

    once.is_once = True
    interpreter._patch_lang = once
