# SPDX-License-Identifier: Apache-2.0
"""The command `aqua bench serve`: parsing and printing only, see `bench/serve.py`."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from aqua_attention.cli.options import ProjectionsFile, load_projections
from aqua_attention.cli.terminal import Show
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.progress import progress_bar

CONCURRENCY = [1, 8]


@dataclass(frozen=True)
class LoadOptions:
    """What vLLM's client sends."""

    input_len: Annotated[int, "Tokens of each prompt, which are random."] = 1024
    output_len: Annotated[int, "Tokens of each answer."] = 128
    concurrency: Annotated[list[int] | None, "Requests at once; may be repeated (default: 1 8)."] = None
    requests: Annotated[int, "Requests in all, for each of those at once: 4 at 8 at once are 32."] = 4


def serve(
    model: Annotated[str, typer.Argument(help="As vLLM takes it: a folder with safetensors, or a hub id.")],
    *,
    projections: ProjectionsFile,
    config: AquaConfig,
    load: LoadOptions,
    gate: Annotated[bool, "First check that AQUA with every dimension gives the stock server's tokens."] = True,
    server: Annotated[str, "Options of both servers, in quotes, such as '--dtype float32 --enforce-eager'."] = "",
    show: Show,
) -> None:
    """Measure a vLLM server on this machine with vLLM's benchmark client: a stock server, then one with AQUA.

    Needs vLLM in this Python. Both servers have the same options, and only one runs at a time. The cache's capacity is
    read from vLLM's log.

    Example: `aqua bench serve model/ -p model.safetensors --k-ratio 0.5 --concurrency 8 --json serve.json`
    """
    from aqua_attention.bench.serve import Load, ServeBenchmark
    from aqua_attention.bench.server import check_vllm
    from aqua_attention.evaluate.record import provenance
    from aqua_attention.machine import warn_of_load
    from aqua_attention.report.tables import serve_table
    from aqua_attention.vllm.settings import Serving

    check_vllm()
    try:
        options = tuple(shlex.split(server))
    except ValueError as error:
        raise AquaError(f"server is {server!r}: it must be options as a shell takes them ({error})") from error
    Serving.of(str(projections), json.dumps(config.to_dict()))
    sent = vars(load) | {"concurrency": tuple(dict.fromkeys(load.concurrency or CONCURRENCY))}
    shared: dict[str, Any] = {"model": model, "server": server, "requests": load.requests}
    shared |= provenance(projections, load_projections(projections))
    warn_of_load("measure again when the machine is idle")
    folder = Path(tempfile.mkdtemp(prefix="aqua-serve-"))
    name = _backend_name()
    benchmark = ServeBenchmark(model, projections.absolute(), config, Load(**sent), folder, options, name, gate)
    with progress_bar("serve") as progress:
        results = benchmark.measure(progress)
    # Kept where something has failed.
    shutil.rmtree(folder)
    show(shared | _machine() | {"results": results}, serve_table(results), suite="serve")
    if found := results[0]["gate"]:
        others = (
            f", the others part at a tie (of {found['gap']:.2g} in log-probability at most)" if found["gap"] else ""
        )
        typer.echo(f"with every dimension {found['equal']} of {found['prompts']} answers are stock's{others}")


def _backend_name() -> str:
    from aqua_attention.vllm.plugin import backend_name

    return backend_name()


def _machine() -> dict[str, Any]:
    """Device and vLLM's version; asked last, so that no server finds memory of its GPU taken."""
    import torch
    import vllm

    from aqua_attention.machine import device_name

    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"device": device, "vllm": vllm.__version__}
