# SPDX-License-Identifier: Apache-2.0
"""Where texts and images lie: in a file or folder, or in a dataset of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from aqua_attention.errors import AquaError

T = TypeVar("T")


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def local_path(spec: str, forms: str) -> Path:
    """The file or folder that `spec` names; an AquaError where there is none.

    For its message, `forms` says what it may be instead, such as "a text is one of ...".
    """
    try:
        path = Path(spec).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AquaError(f"{spec[:100]!r} is no usable path ({reason}): {forms}") from error
    if not exists:
        raise AquaError(f"there is no file or folder {spec!r}: {forms}")
    return path


def hub_rows(spec: str, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What `read` makes of each row of `dataset[:config[:split]]`, streamed; split "train" unless given.

    An AquaError where the dataset cannot be read.
    """
    name, *more = spec.split(":")
    if not name or len(more) > 2:
        raise AquaError(f"cannot read 'hub:{spec}': write hub:dataset[:config[:split]]")
    config, split = [*more, "", ""][:2]
    try:
        import datasets
    except ImportError as error:
        raise AquaError(
            f"reading 'hub:{spec}' takes the datasets package: pip install 'aqua-attention[data]'"
        ) from error
    try:
        yield from map(read, datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
    except AquaError:
        raise
    except Exception as error:  # loading scripts and servers fail in any way they like
        reason = first_line(error)
        raise AquaError(f"cannot read 'hub:{spec}' ({reason}): check the name and the network") from error
