# SPDX-License-Identifier: Apache-2.0
"""One JSON file for each measurement of a results folder: what was measured, with what, and the figures or why not.

`FOLDER/records/SUITE-DIGEST.json`, where DIGEST is the first 12 hexadecimal digits of the key's SHA-256. The key is
what makes two measurements the same one, so that a stopped run finds what it has done.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.io.files import remove_leftovers, write_json
from aqua_attention.model.capture import attention_layers, input_device
from aqua_attention.model.fingerprint import key_weight_digest
from aqua_attention.version import __version__

SCHEMA = 1
KEY_FIELDS = ("suite", "model", "config", "basis", "options", "projections_sha256", "text_sha256", "dtype", "seed")
CALIBRATING = ("transfer", "context")
"""Suites that calibrate by themselves: their options say how, and so the projections are a result, not part of the key.
"""
FACTS = ("command", "commit", "version", "versions", "device", "started", "seconds")
FAILURES = ("out_of_memory", "error")
LOSSES = ("perplexity", "perplexity_change", "kl", "top1", "mean_k", "tokens")
RETRIEVAL = ("right", "asked", "lost", "gained", "p_value")
FIGURES = {
    "perplexity": LOSSES,
    "retention": ("score_loss", "softmax_loss"),
    "needle": RETRIEVAL,
    "lines": RETRIEVAL,
    "transfer": (*LOSSES, "distance"),
    "context": LOSSES,
}
"""Numbers that a suite's result must have: without them, a record is none."""

Key = dict[str, Any]


def record_key(
    suite: str,
    *,
    model: str,
    dtype: str,
    config: dict[str, Any] | None,
    basis: str = "aqua",
    options: dict[str, Any],
    projections_sha256: str | None = None,
    text_sha256: str | None = None,
    seed: int | None = None,
) -> Key:
    """What identifies a measurement.

    Args:
        model: as the user named it. dtype: of its weights, such as "float32".
        config: the AquaConfig's fields, or None for the dense model.
        options: the suite's own, as JSON values.
        projections_sha256: of the file; left out of the key by suites that calibrate (`CALIBRATING`).
        text_sha256: of the text that is read; None when the suite writes its own.
    """
    key = {
        "suite": suite,
        "model": model,
        "config": config,
        "basis": basis,
        "options": options,
        "projections_sha256": None if suite in CALIBRATING else projections_sha256,
        "text_sha256": text_sha256,
        "dtype": dtype,
        "seed": seed,
    }
    return json.loads(json.dumps(key))  # as it will be read: lists, no tuples


def record_path(folder: Path, key: Key) -> Path:
    """Where the record of `key` is kept."""
    digest = hashlib.sha256(json.dumps({"schema": SCHEMA} | key, sort_keys=True).encode()).hexdigest()
    return folder / "records" / f"{key['suite']}-{digest[:12]}.json"


def read_record(path: Path) -> dict[str, Any]:
    """Read and check one record.

    Raises:
        AquaError: not readable, not whole, or of another version; the message names the file.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise AquaError(f"cannot read {path} ({error.strerror or error}): check the file") from error
    except (ValueError, RecursionError) as error:
        raise AquaError(f"{path} is no whole record ({error}): delete it or measure again") from error
    if not isinstance(record, dict):
        raise AquaError(f"{path} is no record (it holds no JSON object): delete it or measure again")
    if record.get("schema") != SCHEMA:
        raise AquaError(f"{path} has schema {record.get('schema')!r}, not {SCHEMA}: delete it or measure again")
    if missing := [name for name in (*KEY_FIELDS, *FACTS) if name not in record]:
        raise AquaError(f"{path} is no whole record (it has no {', '.join(missing)}): delete it or measure again")
    figures = [record.get(name) for name in ("result", "error") if name in record]
    if len(figures) != 1 or not isinstance(figures[0], dict):
        raise AquaError(f"{path} is no whole record (it has neither result nor error): delete it or measure again")
    weights = record.get("key_weights")
    if weights is not None and not (isinstance(weights, list) and all(map(_is_numbers, weights))):
        raise AquaError(f"{path} is no whole record (its key_weights are no numbers): delete it or measure again")
    needed = FIGURES.get(str(record["suite"]), ()) if "result" in record else ()
    if lacking := [name for name in needed if type(figures[0].get(name)) not in (int, float)]:
        raise AquaError(f"{path} is no whole record (no figure {', '.join(lacking)}): delete it or measure again")
    if "error" in record and not {"kind", "message"} <= figures[0].keys():
        raise AquaError(f"{path} is no whole record (its error says no reason): delete it or measure again")
    return record


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) in (int, float) for number in value)


def find_record(folder: Path, key: Key) -> dict[str, Any] | None:
    """The record of `key`, or None where there is none yet.

    Raises:
        AquaError: the file is damaged, or holds another measurement.
    """
    path = record_path(folder, key)
    if not path.exists():
        return None
    record = read_record(path)
    found = {name: record[name] for name in KEY_FIELDS}
    if key["suite"] in CALIBRATING:
        found["projections_sha256"] = None
    if found != key:
        raise AquaError(f"{path} holds another measurement than its name says: delete it or measure again")
    return record


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        AquaError: it cannot be made, or not be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AquaError(f"cannot make the folder {folder} ({error.strerror or error}): choose another") from error
    if not os.access(folder, os.W_OK):
        raise AquaError(f"cannot write into {folder}: give a folder that is writable")


def write_record(folder: Path, record: dict[str, Any], key: Key) -> None:
    """Write a record to its place, whole or not at all."""
    path = record_path(folder, key)
    make_folder(path.parent)
    remove_leftovers(path)
    write_json(path, record)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dtype_of(model: PreTrainedModel) -> str:
    """Such as "float32"."""
    return str(model.dtype).removeprefix("torch.")


def facts_of(model: PreTrainedModel, command: str) -> dict[str, Any]:
    """What a record says of program and machine: `command`, `commit`, `version`, `versions`, `device`, `key_weights`.

    The last is the digest of the model's key weights, by which other weights of the same name are known.
    """
    device = input_device(model)
    return {
        "command": command,
        "commit": commit(),
        "version": __version__,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "key_weights": key_weight_digest(attention_layers(model)),
    }


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
