# SPDX-License-Identifier: Apache-2.0
"""The command `aqua eval grid`: many measurements into a folder of records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aqua_attention.cli.evaluate import PAPER_K_RATIO
from aqua_attention.cli.options import (
    Chat,
    Device,
    Dtype,
    EvaluationData,
    GgufFile,
    H2OQueries,
    Json,
    Model,
    ProjectionsFile,
    RemoteCode,
    load_model,
    min_length_of,
)
from aqua_attention.cli.records import Folder, check_places, model_name, run_and_print
from aqua_attention.errors import AquaError

# Lists, as typer wants the defaults of options that repeat.
SUITES = ["perplexity"]
BITS = ["none"]
SELECTIONS = ["magnitude"]
SHARES = ["head"]
BASES = ["aqua"]
NOTHING, EVERYTHING, NO_TOKENS = [0.0], [1.0], [0]
MIN_LENGTHS = ["0"]


def grid(
    folder: Folder,
    model: Model,
    projections: ProjectionsFile,
    suite: Annotated[list[str], typer.Option(help="perplexity, retention, needle, lines; repeat.")] = SUITES,
    quick: Annotated[bool, typer.Option("--quick", help="Short texts: minutes for the default model.")] = False,
    k_ratio: Annotated[list[float] | None, typer.Option(help="Share of dimensions multiplied; repeat (0.75).")] = None,
    logit_error: Annotated[
        list[float] | None, typer.Option(help="Adaptive k, beside the k_ratios given; repeat.")
    ] = None,
    s_ratio: Annotated[list[float], typer.Option(help="Share of key dimensions never stored; repeat.")] = NOTHING,
    h2o_ratio: Annotated[
        list[float], typer.Option("--h2o-ratio", help="Share of the tokens that stays in the cache; repeat.")
    ] = EVERYTHING,
    h2o_queries: H2OQueries = None,
    bits: Annotated[list[str], typer.Option(help="none, 8 or 4: how keys and values are stored; repeat.")] = BITS,
    selection: Annotated[list[str], typer.Option(help="magnitude, weighted, static; repeat.")] = SELECTIONS,
    share: Annotated[list[str], typer.Option(help="head, group; repeat.")] = SHARES,
    sink: Annotated[list[int], typer.Option(help="First tokens scored with every dimension; repeat.")] = NO_TOKENS,
    recent: Annotated[list[int], typer.Option(help="Last tokens scored with every dimension; repeat.")] = NO_TOKENS,
    min_length: Annotated[
        list[str], typer.Option(help="Queries that see fewer tokens multiply every dimension, or auto; repeat.")
    ] = MIN_LENGTHS,
    basis: Annotated[list[str], typer.Option(help="aqua, none, key-pca; repeat.")] = BASES,
    data: EvaluationData = "builtin:evaluation",
    context: Annotated[int | None, typer.Option(help="Tokens in a window (2048; quick 1024).")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to read (perplexity 8192, retention 4096; quick 2048, 1024).")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Needle: tokens of the prompt; repeat (1024 2048 4096; quick 512 1024).")
    ] = None,
    depth: Annotated[
        list[float] | None, typer.Option(help="Needle: where it is; repeat (0 0.25 0.5 0.75 1; quick 0 0.5 1).")
    ] = None,
    needles: Annotated[int | None, typer.Option(help="Needle: how many are hidden, and asked for (1).")] = None,
    repeats: Annotated[int | None, typer.Option(help="Needle: haystacks for each length and depth (1).")] = None,
    lines: Annotated[list[int] | None, typer.Option(help="Lines in a question; repeat (100 200; quick 10 20).")] = None,
    lines_file: Annotated[
        Path | None, typer.Option(help="LongEval's .jsonl of line questions; generated when left out.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Questions for each number of lines (50; quick 4).")] = None,
    seed: Annotated[int, typer.Option(help="Chooses needles, haystacks and lines.")] = 0,
    chat: Chat = True,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Every combination of the repeated options under every suite, a record each; stopped, the same command goes on.

    Example: `aqua eval grid results smollm2 -p smollm2.safetensors --quick --suite perplexity --suite needle
    --k-ratio 1 --k-ratio 0.5 --h2o-ratio 1 --h2o-ratio 0.5 --selection weighted --sink 4 --recent 64`
    """
    check_places(folder, json)
    if lines_file is not None and lines:
        raise AquaError(f"--lines generates questions, --lines-file {lines_file} reads them: give one of the two")
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.record import file_digest
    from aqua_attention.evaluate.run import check_sizes, grid_settings
    from aqua_attention.evaluate.suites.grid import Subject, check_suites, grid_jobs, sizes_of
    from aqua_attention.report.record_tables import record_table

    settings = grid_settings(
        k_ratio=k_ratio or ([] if logit_error else PAPER_K_RATIO),
        logit_error=logit_error or [],
        s_ratio=s_ratio,
        h2o_ratio=h2o_ratio,
        h2o_queries=h2o_queries,
        bits=[_bits(value) for value in bits],
        selection=selection,
        share=share,
        sink=sink,
        recent=recent,
        min_length=[min_length_of(value) for value in min_length],
        basis=basis,
    )
    sizes = sizes_of(
        quick,
        context=context,
        tokens=tokens,
        retention_tokens=tokens,
        lengths=_some(length),
        depths=_some(depth),
        needles=needles,
        repeats=repeats,
        lines_file=lines_file,
        lines=_some(lines),
        count=count,
    )
    check_suites(suite, settings)
    check_sizes(context=context, tokens=tokens)
    learned, text = Projections.load(projections), load_text(data)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    subject = Subject(
        *(model_name(model, gguf_file), loaded, tokenizer, learned),
        projections_sha256=file_digest(projections),
        data=data,
        text=text,
        seed=seed,
        chat=chat,
    )
    jobs = grid_jobs(subject, suite, settings, sizes)
    run_and_print(folder, jobs, loaded, lambda records: [record_table(records)], json, explained=True)


def _some(values: list[Any] | None) -> tuple[Any, ...] | None:
    return tuple(dict.fromkeys(values)) if values else None


def _bits(value: str) -> int | None:
    if value not in ("none", "8", "4"):
        raise AquaError(f"bits is {value!r}: it must be one of none, 8, 4")
    return None if value == "none" else int(value)
