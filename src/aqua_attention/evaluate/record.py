# SPDX-License-Identifier: Apache-2.0
"""What was measured, with what, and the figures or why not: one `Record`, in the files of a grid and of every command.

A grid has a file for each measurement, `FOLDER/records/SUITE-DIGEST.json`, with its figures in `result`. DIGEST is the
first 12 hexadecimal digits of the key's SHA-256. The key is what makes two measurements the same one, so that a stopped
run finds what it has done.

A command that measures several settings at once has one file for all, see `write_result`. Its figures stay at the top
level, where scripts look for them. The report knows it by its suite, and one of an older version by its keys.

Every file says how it was made (`made_by`), and on which projections it rests (`provenance`). What does not say so is
shown apart, see `Record.unsaid`.

This module loads neither torch nor transformers: the report needs it without them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.suites import SUITES, Rows, Suite
from aqua_attention.io.files import json_digest, remove_leftovers, write_json
from aqua_attention.version import __version__

if TYPE_CHECKING:
    from aqua_attention.calibration.projections import Projections

SCHEMA = 1
KEY_FIELDS = ("suite", "model", "config", "basis", "options", "projections_sha256", "text_sha256", "dtype", "seed")
FACTS = ("command", "commit", "version", "versions", "device", "started", "seconds")
SAID = {"projections_sha256": "projections", "command": "command", "version": "version"}
"""What a file must say to be set beside others, and the words for it."""
_FIELDS = ("suite", "model", "basis", "options", "result", "error")

Key = dict[str, Any]


class Unusable(Exception):
    """Why a file, or a part of it, is not used: a reason in words."""


@dataclass(frozen=True)
class Record:
    """One setting of one suite, measured (`result`) or failed (`error`: `{"kind", "message"}`).

    Attributes:
        setting: the AquaConfig's fields; None for dense attention, and where the suite has no setting.
        options: the suite's own.
        details: all else that a file says, such as `dtype`, `seed`, digests, and program and machine.
        key: see `record_key`; None where the file does not say.
        source: name of the file, in the results directory.
    """

    suite: str
    model: str
    setting: dict[str, Any] | None = None
    basis: str = "aqua"
    options: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    key: Key | None = None
    source: str = ""

    @classmethod
    def of(cls, value: dict[str, Any], source: str = "") -> Record:
        """The record that a file of a grid holds, not checked."""
        given = {name: value[name] for name in _FIELDS if name in value}
        details = {name: value[name] for name in value if name not in (*_FIELDS, "schema", "config")}
        key = _without_own_projections({name: value.get(name) for name in KEY_FIELDS})
        return cls(**given, setting=value.get("config"), details=details, key=key, source=source)

    @classmethod
    def read(cls, value: dict[str, Any], source: str = "") -> Record:
        """The same as the report takes it, also where it lacks what a page can do without; else Unusable."""
        check_schema(value)
        for name, words in (("suite", "a text"), ("model", "a text"), ("options", "an object")):
            _expect(words, f"its {name} is", value.get(name))
        result, error = value.get("result"), value.get("error")
        if (result is None) == (error is None):
            raise Unusable("it must have either a result or an error")
        if error is not None:
            if not isinstance(error, dict) or not isinstance(error.get("message"), str):
                raise Unusable("its error has no message")
            error = {"kind": str(error.get("kind", "error")), "message": error["message"]}
        setting, basis = read_setting(value.get("config")), str(value.get("basis") or "aqua")
        return replace(cls.of(value, source), setting=setting, basis=basis, error=error)

    def to_dict(self) -> dict[str, Any]:
        """As a grid's file holds it."""
        outcome = {"result": self.result} if self.error is None else {"error": self.error}
        mine = {"suite": self.suite, "model": self.model, "config": self.setting, "basis": self.basis}
        return {"schema": SCHEMA, **mine, "options": self.options, **self.details, **outcome}

    @property
    def figures(self) -> dict[str, Any]:
        """The result; empty where it failed."""
        return self.result or {}

    @property
    def knobs(self) -> dict[str, Any]:
        """The setting; empty for dense attention."""
        return self.setting or {}

    @property
    def is_dense(self) -> bool:
        """Whether it is what settings are compared with, which needs no projections."""
        return self.setting is None and bool(SUITES[self.suite].of_dense)

    @property
    def command(self) -> str | None:
        """The command line that made it, None where the file does not say."""
        command = self.details.get("command")
        return command if isinstance(command, str) else None

    @property
    def unsaid(self) -> list[str]:
        """What its file does not say of how it was made, in words. Without that nothing may be set beside it."""
        bare = SUITES[self.suite].bare
        missing = [words for name, words in SAID.items() if name not in self.details]
        missing += [] if self.model else ["model"]
        return [words for words in missing if not (bare and words in ("projections", "model"))]

    def checked(self) -> Record:
        """The record; raises Unusable where its result has not what its suite must have."""
        if self.suite not in SUITES:
            raise Unusable(f"its suite is {short(self.suite)}: it must be one of {', '.join(SUITES)}")
        result, suite = self.result, SUITES[self.suite]
        if result is None:
            return self
        _expect("an object", "its result is", result)
        # Dense attention has nothing to compare with.
        for name in suite.of_dense if self.setting is None and suite.of_dense else suite.numbers:
            if name not in result:
                raise Unusable(f"its result has no {name}")
            _expect("a number", f"its {name} is", result[name])
        for name in suite.words:
            _expect("a text", f"its {name} is", result.get(name))
        for rows in suite.rows:
            _check_rows(rows, result.get(rows.name))
        return self


def check_schema(value: dict[str, Any]) -> None:
    """Raise Unusable for a file of another version."""
    if value.get("schema") != SCHEMA:
        raise Unusable(f"its schema is {value.get('schema')!r}, this version reads {SCHEMA}")


def read_setting(value: Any) -> dict[str, Any] | None:
    """All fields of an AquaConfig; Unusable where they are none.

    An earlier version wrote fewer: what it left out was as in the paper.
    """
    if value is None:
        return None
    _expect("an object", "its config is", value)
    fields = {name: each for name, each in value.items() if name != "effective_ratio"}
    if unknown := sorted(set(fields) - set(AquaConfig().to_dict())):
        raise Unusable(f"its config has fields that this version does not know: {', '.join(unknown)}")
    try:
        return AquaConfig.paper(**fields).to_dict()
    except (AquaError, TypeError) as error:
        raise Unusable(f"its config is wrong: {error}") from error


def number(value: Any) -> float:
    """A figure as a float; NaN where a file holds null, which is how JSON says it, or no number at all."""
    return float(value) if value is not None and _is_number(value) else math.nan


def numbers(value: Any) -> list[float]:
    """A list of figures; of one where there is a single one."""
    return [number(each) for each in value] if isinstance(value, list) else [number(value)]


def short(value: Any) -> str:
    """A value in the words of a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_rows(kind: Rows, rows: Any) -> None:
    _expect("a list of objects", f"its {kind.name} is", rows)
    for row in rows:
        has = f"a row of its {kind.name} has"
        if kind.title:
            _expect("a text", f"{has} {kind.title}", row.get(kind.title))
            if "absent" in row:
                continue
        for words, keys in (("a number", kind.numbers), ("a list of numbers", kind.lists)):
            for key in keys:
                _expect(words, f"{has} {key}", row.get(key))


def _is_number(value: Any) -> bool:
    """None counts: JSON says NaN so."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value is None or isinstance(value, float) or is_whole


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": _is_number,
    "an object": lambda value: isinstance(value, dict),
    "a list of objects": lambda value: _is_list(value, "an object"),
    "a list of numbers": lambda value: _is_list(value, "a number"),
}


def _is_list(value: Any, kind: str) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_KINDS[kind], value))


def _expect(kind: str, what: str, value: Any) -> None:
    if not _KINDS[kind](value):
        raise Unusable(f"{what} {short(value)}, not {kind}")


def record_key(suite: str, *, model: str, dtype: str, config: dict[str, Any] | None, **others: Any) -> Key:
    """What identifies a measurement: KEY_FIELDS, as `Record` has them; those not given are None.

    `dtype` is of the weights, such as "float32". The projections' digest is left out of suites that calibrate.
    """
    given = {"basis": "aqua"} | others | {"suite": suite, "model": model, "dtype": dtype, "config": config}
    assert given.keys() <= set(KEY_FIELDS)
    key = _without_own_projections({name: given.get(name) for name in KEY_FIELDS})
    return json.loads(json.dumps(key))  # as it will be read: lists, no tuples


def _without_own_projections(key: Key) -> Key:
    return key | {"projections_sha256": None} if SUITES.get(str(key["suite"]), Suite()).calibrates else key


def record_path(folder: Path, key: Key) -> Path:
    """Where the record of `key` is kept."""
    return folder / "records" / f"{key['suite']}-{json_digest({'schema': SCHEMA} | key)[:12]}.json"


def read_record(path: Path) -> Record:
    """Read one record of a grid; AquaError where it is not readable, not whole, or of another version."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise AquaError(f"cannot read {path} ({error.strerror or error}): check the file") from error
    except (ValueError, RecursionError) as error:
        raise AquaError(f"{path} is no whole record ({error}): delete it or measure again") from error
    if not isinstance(value, dict):
        raise AquaError(f"{path} is no record (it holds no JSON object): delete it or measure again")
    if value.get("schema") != SCHEMA:
        raise AquaError(f"{path} has schema {value.get('schema')!r}, not {SCHEMA}: delete it or measure again")
    if problem := _lacking(value):
        raise AquaError(f"{path} is no whole record ({problem}): delete it or measure again")
    return Record.of(value)


def _lacking(value: dict[str, Any]) -> str | None:
    """What a record must have to count as measured, and this one has not."""
    if missing := [name for name in (*KEY_FIELDS, *FACTS) if name not in value]:
        return f"it has no {', '.join(missing)}"
    outcomes = [value.get(name) for name in ("result", "error") if name in value]
    if len(outcomes) != 1 or not isinstance(outcomes[0], dict):
        return "it has neither result nor error"
    weights = value.get("key_weights")
    if not (weights is None or (isinstance(weights, list) and all(map(_are_numbers, weights)))):
        return "its key_weights are no numbers"
    # Nothing is required of a suite that is not known.
    needed = SUITES.get(str(value["suite"]), Suite()).figures if "result" in value else ()
    if lacking := [name for name in needed if type(outcomes[0].get(name)) not in (int, float)]:
        return f"no figure {', '.join(lacking)}"
    return "its error says no reason" if "error" in value and not {"kind", "message"} <= outcomes[0].keys() else None


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) in (int, float) for each in value)


def find_record(folder: Path, key: Key) -> Record | None:
    """The record of `key`, or None where there is none yet; AquaError as `read_record`, or for another's file."""
    path = record_path(folder, key)
    if not path.exists():
        return None
    record = read_record(path)
    if record.key != key:
        raise AquaError(f"{path} holds another measurement than its name says: delete it or measure again")
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write a record that has a key to its place, whole or not at all."""
    assert record.key is not None
    path = record_path(folder, record.key)
    make_folder(path.parent)
    remove_leftovers(path)
    write_json(path, record.to_dict())


def write_result(
    path: Path, suite: str | None, result: dict[str, Any], command: str = "", started: str | None = None
) -> None:
    """Write what a command measured: the suite's `result` at the top level, and beside it fields of a record.

    A suite of None: the report has no place for it.
    """
    head = {"schema": SCHEMA, "suite": suite} | made_by(command) | {"started": started or now()}
    write_json(path, head | result)


def made_by(command: str) -> dict[str, Any]:
    """What a record says of the program: the command line, the commit of this library, and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    versions["python"] = platform.python_version()
    return {"command": command, "commit": commit(), "version": __version__, "versions": versions}


def provenance(path: Path, projections: Projections) -> dict[str, Any]:
    """What a record says of the projections it rests on: their file and its digest, tokens read, and basis."""
    names = {"projections": str(path), "projections_sha256": file_digest(path)}
    return names | {"calibration_tokens": projections.calibration.get("tokens"), "basis": projections.basis}


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing; AquaError where it cannot be, or not be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AquaError(f"cannot make the folder {folder} ({error.strerror or error}): choose another") from error
    if not os.access(folder, os.W_OK):
        raise AquaError(f"cannot write into {folder}: give a folder that is writable")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str | None:
    """Git commit of this library, with "-dirty" when files were changed since; None when it is no checkout."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    # Not the repository of whoever has installed the library somewhere inside it.
    if package != root / "src" / "aqua_attention" or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
