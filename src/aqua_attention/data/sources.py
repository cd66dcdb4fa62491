# SPDX-License-Identifier: Apache-2.0
"""Where texts and images lie: in a file or folder, or in a dataset of the hub."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from aqua_attention.errors import AquaError, install_extra
from aqua_attention.io.files import unpacked

T = TypeVar("T")
PACKED = (".txt", ".md", ".raw", ".rst", ".jsonl")
"""What may end in .gz too."""
HUB_SECONDS = 5
"""How long the hub may take to answer at all."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def usable_path(spec: str, wrong: str = "is no usable path", remedy: str = "check it") -> Path:
    """The path that `spec` is, whether something is there or not; an AquaError where it cannot be one."""
    try:
        path = Path(spec).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AquaError(f"{spec[:100]!r} {wrong} ({reason}): {remedy}") from error
    return path


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds: of a packed text the one before .gz."""
    suffix = unpacked(path).suffix.lower()
    return suffix if suffix in PACKED else path.suffix.lower()


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files in a folder and below it that end in one of these, by path."""
    return sorted(file for file in folder.rglob("*") if suffix_of(file) in suffixes and file.is_file())


def local_files(spec: str, suffixes: Sequence[str], forms: str, unknown: str, kind: str) -> list[Path]:
    """The file that `spec` names, or all of the folder, at least one; an AquaError if it is of no such `kind`.

    For its message, `forms` says what it may be, such as "a text is one of ...", and `unknown` that its name does not.
    """
    path = usable_path(spec, remedy=forms)
    if not path.exists():
        raise AquaError(f"there is no file or folder {spec!r}: {forms}")
    if not path.is_dir() and suffix_of(path) not in suffixes:
        raise AquaError(f"{unknown}: {forms}")
    files = files_below(path, suffixes) if path.is_dir() else [path]
    if not files:
        raise AquaError(f"the folder {spec!r} holds no {kind} ending in {', '.join(suffixes)}: give another one")
    return files


@contextmanager
def hub_at_hand(name: str) -> Iterator[None]:
    """While open, a hub that does not answer is not asked. Cached files are found, and all else fails at once.

    Without this, libraries ask again and again, for a minute, in silence. Nothing is asked about a local `name`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    if not before and not usable_path(name).exists():
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception:  # whatever the client of this version raises
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
        remedy = install_extra("data")
        raise AquaError(f"reading 'hub:{spec}' takes the datasets package: {remedy}") from error
    try:
        with hub_at_hand(name):
            yield from map(read, datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
    except AquaError:
        raise
    except Exception as error:  # loading scripts and servers fail in any way they like
        reason = first_line(error)
        raise AquaError(f"cannot read 'hub:{spec}' ({reason}): check the name and the network") from error
