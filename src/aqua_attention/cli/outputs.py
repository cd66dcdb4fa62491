# SPDX-License-Identifier: Apache-2.0
"""Where results go: no file is replaced that is not ours, and a place that cannot be written is refused early."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError
from aqua_attention.io.files import check_room

LARGEST_JSON = 64 << 20
PAGE_BEGINS = 1 << 16
"""Bytes in which a page or a drawing says that it is ours."""


def check_writable(kind: str, *paths: Path | None) -> None:
    """Say now, not after minutes of work, that a result has nowhere to go, or would replace a file that is not ours.

    Args:
        kind: what will be written, one of `KINDS`. A file of another kind is not replaced either.
    """
    what, is_ours = KINDS[kind]
    for path in (path for path in paths if path is not None):
        folder = path.absolute().parent
        if path.is_dir():
            example = f", such as {path / EXAMPLES[kind]}" if kind in EXAMPLES else ""
            raise AquaError(f"cannot write {path}: it is a folder, give a file{example}")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise AquaError(f"cannot write {path}: give a file in a folder that exists and is writable")
        check_room(path)
        try:
            # An empty file holds nothing that could be lost.
            keeps = path.is_file() and path.stat().st_size > 0 and not is_ours(path)
        except OSError as error:
            raise AquaError(
                f"cannot read {path} ({error.strerror}), to see whether it may be replaced: give another name"
            ) from error
        if keeps:
            raise AquaError(f"{path} is there and holds no {what} of aqua: give another name, or delete it")


def check_apart(*paths: Path | None) -> None:
    """Say now that two results would go to one file."""
    given = [path for path in paths if path is not None]
    for path in given:
        if sum(path.resolve() == other.resolve() for other in given) > 1 and not path.is_char_device():
            raise AquaError(f"{path} is given for two results: give each a file of its own")


def check_not_read(path: Path, *inputs: Path) -> None:
    """Say now that a result would replace a file that it is made of."""
    if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
        raise AquaError(f"{path} is read here, and would be replaced: give -o another name")


def warn_of_weights(path: Path, model: str) -> None:
    """Warn of projections beside a model's weights, which vLLM would take for some of them."""
    if path.suffix == ".safetensors" and Path(model).is_dir() and path.resolve().parent.samefile(model):
        warnings.warn(
            f"{path} lies in the model's folder, and vLLM loads every safetensors file there as weights: to serve the "
            "model, write to another folder",
            stacklevel=2,
        )


def _holds_tensors(kind: str) -> Callable[[Path], bool]:
    """What tells the safetensors files of a `kind`, see `io.tensors`, by their header alone."""

    def is_ours(path: Path) -> bool:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = _json(file.read(size)) if size < LARGEST_JSON else None
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        return isinstance(metadata, dict) and kind in metadata

    return is_ours


def _holds_answers(path: Path) -> bool:
    value = _value(path)
    return isinstance(value, dict) and "aqua_attention_answers" in value


def _holds_figures(path: Path) -> bool:
    """Whether it is what a --json wrote: it names its command, or the report knows it."""
    from aqua_attention.evaluate.record import Unusable
    from aqua_attention.report.recognise import is_own_summary, records_of

    value = _value(path)
    if not isinstance(value, dict):
        return False
    if is_own_summary(value) or ("version" in value and str(value.get("command")).startswith("aqua ")):
        return True
    try:
        records_of(value, path.name)
    except Unusable:
        return False
    return True


def _holds_page(path: Path) -> bool:
    from aqua_attention.report.page import TITLE

    with path.open("rb") as file:
        begin = file.read(PAGE_BEGINS).decode(errors="replace")
    if path.suffix == ".md":
        return begin.startswith((f"# {TITLE}\n", f"# {DEMO_TITLE}\n"))
    # A page by its title, a drawing by its colours.
    return f"<title>{TITLE}</title>" in begin or "<style>svg{--ink:" in begin


def _value(path: Path) -> Any:
    return _json(path.read_bytes()) if path.stat().st_size <= LARGEST_JSON else None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


EXAMPLES = {"projections": "projections.safetensors", "answers": "answers.json", "figures": "figures.json"}
"""Names to propose to a user who gives a folder."""
DEMO_TITLE = "AQUA attention on SmolLM2-135M-Instruct"
KINDS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "projections": ("projections", _holds_tensors("aqua_attention")),
    "checkpoint": ("unfinished calibration", _holds_tensors("aqua_attention_checkpoint")),
    "answers": ("answers", _holds_answers),
    "figures": ("figures", _holds_figures),
    "page": ("report", _holds_page),
}
"""What is written, and what tells that a file holds such."""
