# SPDX-License-Identifier: Apache-2.0
"""From C to functions: compile `decode.c` for this very processor, once, and keep the result in the cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from aqua_attention.errors import AquaError, Reason, said
from aqua_attention.io.files import cache_folder

SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC")
"""Whatever a NaN or an infinity needs stays: no -ffast-math."""
SECONDS = 120


def no_kernel_reason() -> str | None:
    """Why there can be no kernel on this machine; None when there can be one, as far as is known before compiling.

    A kernel that is loaded needs no compiler, and looking for one takes as long as a short step.
    """
    if kernels.cache_info().currsize:
        return None
    if platform.system() != "Linux":
        return f"the kernel is for Linux, this is {platform.system()}"
    if _compiler() is None:
        return Reason("there is no C compiler", "install gcc, or set CC")
    return None


@functools.cache
def kernels() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        AquaError: there is no compiler, it fails, or the result cannot be kept or loaded.
    """
    if reason := no_kernel_reason():
        raise AquaError(f"impl='cpu' is impossible here, because {said(reason)}")
    compiler = _compiler()
    assert compiler is not None
    folder = cache_folder("kernels")
    target = folder / f"decode-{_fingerprint(compiler)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:
                pass  # damaged: compile it again
        _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise AquaError(
            f"the CPU kernel cannot be kept in or loaded from {folder} ({error}): set AQUA_CACHE_DIR"
        ) from error


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder) / "decode.o", Path(folder) / "decode.so"
        # Linked without OpenMP: the one that torch has loaded serves, and with it torch's threads.
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            except subprocess.TimeoutExpired as error:
                raise AquaError(
                    f"the C compiler {compiler} did not end within {SECONDS} s: set CC to another"
                ) from error
            if done.returncode != 0:
                said_why = " ".join(done.stderr.split())[-400:]
                raise AquaError(
                    f"the C compiler {compiler} cannot compile {SOURCE.name} ({said_why}): set CC to another"
                )
        linked.replace(target)


def _fingerprint(compiler: str) -> str:
    """Of everything that the result depends on: source, flags, compiler and processor."""
    sources = b"".join(path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.inc"))))
    digest = hashlib.sha256(sources + " ".join(FLAGS).encode())
    digest.update(f"{compiler} {Path(compiler).stat().st_mtime_ns} {platform.machine()}".encode())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        digest.update("".join(line for line in lines[:40] if line.startswith(("model name", "flags"))).encode())
    except OSError:
        pass
    return digest.hexdigest()[:16]
