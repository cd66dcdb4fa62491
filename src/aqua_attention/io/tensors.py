# SPDX-License-Identifier: Apache-2.0
"""Our files: tensors and a JSON header in one safetensors file, written whole and checked when read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.io.files import write_atomically

FORMAT_VERSION = 1
LONGEST_HEADER = 100_000_000
"""Bytes: safetensors takes no longer ones."""


def write_tensors(path: Path | str, kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file of a `kind`, such as "aqua_attention", with a digest of all in it; AquaError where it cannot be."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {"format_version": FORMAT_VERSION} | header
    header["sha256"] = _digest(header, tensors)
    write_atomically(path, safetensors.torch.save(tensors, {kind: json.dumps(header)}))


class Stored:
    """A file that `write_tensors` wrote: `header`, and tensors to `take` one after the other, then `finish`.

    Attributes:
        header: the JSON header, without the format's version and digest.
        remedy: what every error message advises.
    """

    def __init__(self, path: Path, kind: str, *, what: str, remedy: str) -> None:
        """Open a file of `what`, such as "AQUA projections"; AquaError if it is of another kind or version."""
        self.path, self.remedy = path, remedy
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                raw = (file.metadata() or {}).get(kind)
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise self.error(f"not a complete safetensors file ({error})") from error
        if raw is None:
            raise self.error(f"a safetensors file, but not of {what}")
        try:
            self.header: dict[str, Any] = json.loads(raw)
            version = self.header["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise self.error(f"its metadata is damaged ({error!r})") from error
        if version != FORMAT_VERSION:
            problem = f"format version {version!r}, this library reads {FORMAT_VERSION}"
            raise self.error(problem, "upgrade aqua-attention or ")
        if "sha256" not in self.header:
            raise self.error("its metadata is incomplete (KeyError('sha256'))")
        self._claimed = self.header.pop("sha256")
        self._found = _digest(self.header, self._tensors)

    def error(self, problem: str, first: str = "") -> AquaError:
        """An error that names file, problem and remedy."""
        return AquaError(f"{self.path}: {problem}: {first}{self.remedy}")

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Take a tensor out; AquaError where it is missing, of another dtype or shape, or holds NaN or infinity."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise self.error(f"tensor {name} is missing")
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise self.error(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise self.error(f"tensor {name} holds NaN or infinity")
        return tensor

    def finish(self) -> None:
        """Raise AquaError when tensors are left, or the file was changed after it was written."""
        if self._tensors:
            raise self.error(f"holds tensors that do not belong in it ({min(self._tensors)})")
        if self._found != self._claimed:
            raise self.error("its content was changed after it was written")


def begins_as_safetensors(path: Path) -> bool:
    """Whether a file begins with a header's length and brace, or is cut off before. No text and no JSON does."""
    with path.open("rb") as file:
        begin = file.read(9)
    return len(begin) < 9 or (int.from_bytes(begin[:8], "little") <= LONGEST_HEADER and begin[8:] == b"{")


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
