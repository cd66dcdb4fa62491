# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all; texts are read packed or not."""

import glob
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from platformdirs import user_cache_dir

from aqua_attention.errors import AquaError


def write_atomically(path: Path | str, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename; on a failure, an AquaError, nothing of it remains."""
    path = Path(path)
    is_stream = _is_stream(path)
    # A link is written through, not replaced; one to a pipe (/dev/stdout) names no file.
    path = path if is_stream else path.resolve()
    if not path.parent.is_dir():
        raise AquaError(f"cannot write {path}: there is no folder {path.parent}, make it first")
    if path.is_dir():
        raise AquaError(f"cannot write {path}: it is a folder, give a file")
    temporary = None
    try:
        if is_stream:
            # A device or a pipe cannot be replaced, only written to.
            path.write_bytes(content)
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        raise AquaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_room(path: Path, size: int = 1 << 16) -> None:
    """Try whether `size` bytes can be written to `path`, and leave nothing of them; an AquaError where they cannot."""
    zeros = bytes(min(size, 1 << 20))
    try:
        if path.is_char_device() and not _is_terminal(path):
            path.write_bytes(b"\n")
        if _is_stream(path):
            return
        with tempfile.TemporaryFile(dir=path.resolve().parent) as file:
            for start in range(0, size, len(zeros)):
                file.write(zeros[: size - start])
    except OSError as error:
        remedy = f"give a file in a folder that is writable and has {size / 1e6:.1f} MB free"
        raise AquaError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error


def _is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_terminal(path: Path) -> bool:
    with path.open("rb") as file:
        return file.isatty()


def remove_leftovers(path: Path | str) -> None:
    """Remove the temporary files of writes to `path` that were killed. Not while another process writes to it."""
    path = Path(path).resolve()
    # Exactly mkstemp's eight characters: the temporary files of "part-1" are not those of "part".
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-????????.tmp"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are an error, JSON has none."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal; the order of its names does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_folder(name: str) -> Path:
    """A folder of ours in the user's cache folder, or in `AQUA_CACHE_DIR`; it need not be there."""
    return Path(os.environ.get("AQUA_CACHE_DIR") or user_cache_dir("aqua-attention")).expanduser() / name


def unpacked(path: Path) -> Path:
    """A file's name without .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name)


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a UTF-8 text, packed where its name ends in .gz; a byte order mark is no part of it."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig", newline=newline))


def json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[Any, str]]:
    """What each line of a file holds, but for blank ones, and where it is; AquaError where it is no JSON."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield parse_json(line, where), where


def parse_json(text: str, where: str) -> Any:
    """The value; AquaError, which says `where`, where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AquaError(f"{where} is not JSON ({getattr(error, 'msg', None) or error}): mend or drop it") from error
