# SPDX-License-Identifier: Apache-2.0
"""Files of questions: rows of JSON lines or CSV, in a file of their own or in a folder of splits."""

import csv
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.io.files import json_lines, open_text, parse_json, unpacked

SUFFIXES = (".jsonl", ".json", ".csv")
SPLITS = ("train", "dev", "val", "valid", "validation", "test")
"""Words in the name of a file, or of its folder, that say which split it holds."""


@dataclass(frozen=True)
class Row:
    """One question as its file has it, and `where`: file and line.

    `stem` is the file's name without endings and split, such as "abstract_algebra" of "abstract_algebra_test.csv".
    """

    fields: dict[str, Any]
    where: str
    stem: str


def question_files(path: Path | str, splits: Sequence[str], *, by_subject: bool = False) -> list[Path]:
    """A file, or those files of a folder that hold a split.

    Args:
        path: .jsonl or .json (a list of objects), .csv, each also .gz; or a folder of such files.
        splits: of a folder, the first that there is; a single file without a split's name holds it too.
        by_subject: a split may have several files. Otherwise they are of several data sets, or versions of one.

    Raises:
        AquaError: no such file or split, or more than one file of it; the message names them and the remedy.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise AquaError(f"{path} is no file of questions: it must end in {', '.join(SUFFIXES)} (or these and .gz)")
        return [path]
    if not path.is_dir():
        raise AquaError(f"{path}: no such file or folder of questions: check the path")
    files = _of_split(path, splits)
    if len(files) > 1 and not by_subject:
        more = f" and {len(files) - 8} more" if len(files) > 8 else ""
        raise AquaError(
            f"the folder {path} has {len(files)} files of one split ({_some_of(files, path)}{more}), which may be "
            "different data sets, or one twice: name one of them, or a folder that holds only one"
        )
    return files


def read_rows(files: Sequence[Path], columns: Sequence[str] | None = None) -> list[Row]:
    """Read files of questions; `columns` are those of a .csv whose first line is a question already.

    AquaError where they are damaged, or all of them empty; the message names file, line and remedy.
    """
    rows = [row for file in files for row in _read(file, columns)]
    if not rows:
        raise AquaError(f"{', '.join(map(str, files))} is empty: give a file with questions")
    return rows


def has_split(path: Path | str, splits: Sequence[str]) -> bool:
    """Whether `path` is a folder with a file of one of these splits."""
    path = Path(path).expanduser()
    return path.is_dir() and any(_words(file, path) & set(splits) for file in _candidates(path))


def _candidates(folder: Path) -> list[Path]:
    """Files of questions in a folder; of files that differ in their ending only, the first by SUFFIXES."""
    found = sorted(
        (file for file in folder.rglob("*") if _suffix(file) in SUFFIXES and file.is_file()),
        key=lambda file: (str(file.parent), unpacked(file).stem, SUFFIXES.index(_suffix(file))),
    )
    return list({(file.parent, unpacked(file).stem): file for file in reversed(found)}.values())[::-1]


def _of_split(folder: Path, splits: Sequence[str]) -> list[Path]:
    files = _candidates(folder)
    for split in splits:
        if of_split := [file for file in files if split in _words(file, folder)]:
            return of_split
    if len(files) == 1 and not _words(files[0], folder) & set(SPLITS):
        return files
    seen = _some_of(files, folder) or f"no file ending in {', '.join(SUFFIXES)}"
    raise AquaError(
        f"the folder {folder} has no {' or '.join(splits)} split (it holds {seen}): name a file after its split, or "
        "give the file itself"
    )


def _some_of(files: Sequence[Path], folder: Path) -> str:
    return ", ".join(str(file.relative_to(folder)) for file in files[:8])


def _words(file: Path, folder: Path) -> set[str]:
    return set(re.split("[^a-z]+", str(file.relative_to(folder)).lower()))


def _suffix(path: Path) -> str:
    return unpacked(path).suffix.lower()


def _read(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    stem = re.sub(rf"[_-]({'|'.join(SPLITS)})$", "", unpacked(path).stem)
    try:
        # newline="": a quoted CSV field may have lines of its own.
        with open_text(path, newline="") as file:
            for fields, where in _fields(path, file, columns):
                if not isinstance(fields, dict):
                    raise AquaError(f"{where} is no JSON object: mend or drop it")
                yield Row(fields, where, stem)
    except UnicodeDecodeError as error:
        raise AquaError(f"{path} is not UTF-8 text ({error.reason}): convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise AquaError(f"{path} cannot be read ({error}): fetch it again") from error


def _fields(path: Path, file: Iterable[str], columns: Sequence[str] | None) -> Iterator[tuple[Any, str]]:
    """Rows of an open file, and where each is."""
    if _suffix(path) == ".csv":
        reader = csv.DictReader(file, fieldnames=columns, strict=True)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise AquaError(f"{where} has not the {len(reader.fieldnames or ())} columns of the others: mend it")
            yield row, where
    elif _suffix(path) == ".json":
        rows = parse_json("".join(file), str(path))
        if not isinstance(rows, list):
            raise AquaError(f"{path} is no JSON list of questions: give a list, or a .jsonl of one question a line")
        yield from ((row, f"{path}, entry {number}") for number, row in enumerate(rows, 1))
    else:
        yield from json_lines(path, file)
