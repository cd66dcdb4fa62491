# SPDX-License-Identifier: Apache-2.0
"""A vLLM server in a process of its own, with AQUA or stock: started, asked, read in its log, and always ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from aqua_attention.errors import AquaError, install_extra
from aqua_attention.vllm.settings import CONFIG, PROJECTIONS

HOST = "127.0.0.1"
START_SECONDS = 1200
"""For a large model: weights are read, graphs captured."""
END_SECONDS = 30
ANSWER_SECONDS = 600
CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
DTYPE = re.compile(r"\bdtype=torch\.(\w+)")
ERROR = re.compile(r"^(?:\(.*?\) )?(?:ERROR [^\]]*\] )?(?:\w+\.)*(\w+Error): (.+)", re.MULTILINE)
"""The end of a traceback, in the words of a logger or bare; warnings name errors too."""
BACKEND = re.compile(r"Using (\w+) attention backend")
OURS = "AQUA attention: "
"""Begins the line that the plugin writes where it attends."""


def check_vllm() -> None:
    """An AquaError where this Python has no vLLM."""
    if find_spec("vllm") is None:
        raise AquaError(f"{sys.executable} has no vLLM: {install_extra('vllm')}, or use another Python")


def environment_of(projections: Path | str | None, setting: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Of a process with these projections and this setting; None is stock, whatever this process has."""
    kept = {name: value for name, value in os.environ.items() if name not in (PROJECTIONS, CONFIG)}
    return kept if projections is None else kept | {PROJECTIONS: str(projections), CONFIG: json.dumps(setting or {})}


@dataclass
class Server:
    """A server that has started.

    Attributes:
        model: as it was given; requests name it so.
        log: what it and all its processes write.
        process: the first of them; the others are of its process group.
    """

    model: str
    port: int
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    @property
    def capacity(self) -> int | None:
        """Tokens that its key-value cache has room for, as its log says; None where it does not."""
        found = CAPACITY.findall(self.log.read_text(errors="replace"))
        return int(found[-1].replace(",", "")) if found else None

    @property
    def dtype(self) -> str | None:
        """In which it computes, as its log says."""
        found = DTYPE.search(self.log.read_text(errors="replace"))
        return found[1] if found else None

    @property
    def backend(self) -> str | None:
        """The attention of its own that it chose, as its log says."""
        found = BACKEND.search(self.log.read_text(errors="replace"))
        return found[1] if found else None

    @property
    def has_aqua(self) -> bool:
        """Whether AQUA attends in it."""
        return OURS in self.log.read_text(errors="replace")

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = ANSWER_SECONDS) -> bytes:
        """The answer to a request; an OSError when none comes."""
        data = None if body is None else json.dumps(body).encode()
        with urlopen(
            Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"}), timeout=seconds
        ) as answer:
            content: bytes = answer.read()
        return content

    def complete(self, prompt: str | list[int], new_tokens: int, **options: Any) -> dict[str, Any]:
        """A greedy answer of `new_tokens` tokens, with its `token_ids`; `options` are fields of the request."""
        wanted = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "return_token_ids": True}
        body = {"model": self.model, "prompt": prompt} | wanted | options
        try:
            answer = json.loads(self.ask("v1/completions", body))
        except HTTPError as error:
            raise AquaError(f"the server refused a request ({error.code}): {error.read().decode()[:200]}") from error
        first: dict[str, Any] = answer["choices"][0]
        return first


@contextmanager
def served(
    model: str,
    options: Sequence[str] = (),
    *,
    log: Path,
    projections: Path | str | None = None,
    setting: Mapping[str, Any] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """A server of `model` while open: AQUA with these projections, or stock. All its processes are ended.

    Args:
        options: of `vllm serve`.
        setting: fields of an `AquaConfig`.
        seconds: in which it has to start.

    An AquaError, with the log's own reason, where it does not start.
    """
    port = _free_port()
    # `vllm serve` asks for the version of a package that the CPU build does not call by that name.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", HOST, "--port", str(port), *options]
    with log.open("wb") as file:
        # In a session of its own, so that Ctrl-C reaches us alone, and all its processes can be ended together.
        process = subprocess.Popen(
            command,
            env=environment_of(projections, setting),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(model, port, log, process)
    try:
        _wait(server, seconds)
        yield server
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while server.process.poll() is None:
        with suppress(OSError):
            server.ask("health", seconds=5)
            return
        if time.monotonic() > end:
            raise AquaError(f"vLLM's server did not start in {seconds:.0f} s: see {server.log}")
        time.sleep(0.5)
    raise AquaError(f"vLLM's server did not start ({reason_in(server.log)}): see {server.log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it has started, also where we are interrupted again meanwhile."""
    try:
        process.terminate()
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        end = time.monotonic() + END_SECONDS
        with suppress(ProcessLookupError):  # there is none left
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # The next server needs their memory.
            while time.monotonic() < end:
                os.killpg(process.pid, 0)
                time.sleep(0.01)


def reason_in(log: Path) -> str:
    """Why a server ended, as its log says: an error of ours, else the first of others, else the last line."""
    text = log.read_text(errors="replace")
    errors = ERROR.findall(text)
    ours = [words for name, words in errors if name == "AquaError"]
    others = [f"{name}: {words}" for name, words in errors]
    return next(iter(ours + others + text.splitlines()[-1:]), "it wrote nothing").strip()
