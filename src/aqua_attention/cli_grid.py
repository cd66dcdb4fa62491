# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua eval grid`, `transfer` and `context`: many measurements into a folder of records."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli_evaluate import PAPER_K_RATIO
from aqua_attention.cli_options import (
    Basis,
    Bits,
    Chat,
    Context,
    Device,
    Dtype,
    EvaluationData,
    GgufFile,
    H2OQueries,
    H2ORatio,
    Json,
    KRatios,
    LogitError,
    MinLength,
    Model,
    ProjectionsFile,
    Recent,
    RemoteCode,
    Selection,
    Share,
    Sink,
    SRatio,
    load_model,
    min_length_of,
)
from aqua_attention.errors import AquaError
from aqua_attention.terminal import check_folder, check_writable, print_table, progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aqua_attention.evaluate.grid import Job
    from aqua_attention.tables import Table

# Lists, as typer wants the defaults of options that repeat.
SUITES = ["perplexity"]
BITS = ["none"]
SELECTIONS = ["magnitude"]
SHARES = ["head"]
BASES = ["aqua"]
NOTHING, EVERYTHING, NO_TOKENS = [0.0], [1.0], [0]
MIN_LENGTHS = ["0"]
WINDOWS = [512, 2048]
CALIBRATION = [16384]

Folder = Annotated[Path, typer.Argument(help="Results folder; made if missing, gone on with if not.")]
CalibrationTokens = Annotated[int, typer.Option(help="Tokens that each projection is calibrated on.")]
Seed = Annotated[int, typer.Option(help="Chooses the windows calibrated on.")]
TestTokens = Annotated[int, typer.Option("--tokens", help="Tokens that each is tested on.")]


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
    _check_places(folder, json)
    if lines_file is not None and lines:
        raise AquaError(f"--lines generates questions, --lines-file {lines_file} reads them: give one of the two")
    from aqua_attention.evaluate.grid import check_sizes, grid_settings
    from aqua_attention.evaluate.records import file_digest
    from aqua_attention.evaluate.suites import Subject, check_suites, grid_jobs, sizes_of
    from aqua_attention.projections import Projections
    from aqua_attention.record_tables import record_table
    from aqua_attention.text import load_text

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
        *(_named(model, gguf_file), loaded, tokenizer, learned, file_digest(projections)),
        data=data,
        text=text,
        seed=seed,
        chat=chat,
    )
    jobs = grid_jobs(subject, suite, settings, sizes)
    _run(folder, jobs, loaded, lambda records: [record_table(records)], json, explained=True)


def transfer(
    folder: Folder,
    model: Model,
    domain: Annotated[list[str], typer.Option(help="NAME=TEXT, a text as --data takes; repeat, at least two.")],
    k_ratio: KRatios = PAPER_K_RATIO,
    s_ratio: SRatio = 0.0,
    selection: Selection = "magnitude",
    share: Share = "head",
    sink: Sink = 0,
    recent: Recent = 0,
    logit_error: LogitError = None,
    bits: Bits = None,
    h2o_ratio: H2ORatio = 1.0,
    h2o_queries: H2OQueries = None,
    min_length: MinLength = "0",
    basis: Basis = "aqua",
    calibration_tokens: CalibrationTokens = 16384,
    tokens: TestTokens = 8192,
    context: Context = 2048,
    seed: Seed = 0,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Projections calibrated on each kind of text, tested on each: loss, and how far the rotations are apart.

    The first 80% of a text calibrate, the rest tests. Distance: chordal, of the leading dimensions; 0 the same, 1 as
    far as possible.

    Example: `aqua eval transfer results smollm2 --domain prose=novel.txt --domain code=src.txt --k-ratio 0.5`
    """
    _check_places(folder, json)
    from aqua_attention.evaluate.calibrated import Calibrator
    from aqua_attention.evaluate.grid import check_sizes, grid_settings
    from aqua_attention.evaluate.transfer import check_domains, split_domain, transfer_jobs
    from aqua_attention.record_tables import transfer_tables
    from aqua_attention.text import load_text

    settings = grid_settings(
        k_ratio=[] if logit_error is not None else k_ratio,
        logit_error=[] if logit_error is None else [logit_error],
        s_ratio=[s_ratio],
        h2o_ratio=[h2o_ratio],
        h2o_queries=h2o_queries,
        bits=[bits],
        selection=[selection],
        share=[share],
        sink=[sink],
        recent=[recent],
        min_length=[min_length_of(min_length)],
        basis=[basis],
    )
    domains = []
    for given in domain:
        name, separator, data = given.partition("=")
        if not (separator and name and data):
            raise AquaError(f"domain is {given!r}: write NAME=TEXT, such as prose=novel.txt")
        domains.append(split_domain(name, data, load_text(data)))
    check_domains(domains)
    check_sizes(calibration_tokens=calibration_tokens, tokens=tokens, context=context)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    jobs = transfer_jobs(
        Calibrator(folder, _named(model, gguf_file), loaded, tokenizer, _notice),
        domains,
        settings,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        context=context,
        seed=seed,
    )
    _run(folder, jobs, loaded, transfer_tables, json)


def context(
    folder: Folder,
    model: Model,
    calibrated_length: Annotated[list[int], typer.Option(help="Tokens in a window of calibration; repeat.")] = WINDOWS,
    tested_length: Annotated[list[int], typer.Option(help="Tokens in a window of the test; repeat.")] = WINDOWS,
    calibration_tokens: Annotated[
        list[int], typer.Option(help="Tokens to calibrate on; repeat, to see how many are enough.")
    ] = CALIBRATION,
    calibration_data: Annotated[str, typer.Option(help="Text to calibrate on.")] = "builtin:calibration",
    data: EvaluationData = "builtin:evaluation",
    k_ratio: KRatios = PAPER_K_RATIO,
    s_ratio: SRatio = 0.0,
    selection: Selection = "magnitude",
    share: Share = "head",
    sink: Sink = 0,
    recent: Recent = 0,
    logit_error: LogitError = None,
    bits: Bits = None,
    h2o_ratio: H2ORatio = 1.0,
    h2o_queries: H2OQueries = None,
    min_length: MinLength = "0",
    basis: Basis = "aqua",
    tokens: TestTokens = 8192,
    seed: Seed = 0,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Calibrated on windows of one length and tested at another; calibrated on few tokens and on many.

    Examples: `aqua eval context results smollm2 --calibrated-length 512 --calibrated-length 2048 --k-ratio 0.5`

    `aqua eval context results smollm2 --calibrated-length 1024 --tested-length 1024 --calibration-tokens 1024
    --calibration-tokens 4096 --calibration-tokens 16384`
    """
    _check_places(folder, json)
    from aqua_attention.evaluate.calibrated import Calibrator
    from aqua_attention.evaluate.context import context_jobs
    from aqua_attention.evaluate.grid import check_sizes, grid_settings
    from aqua_attention.record_tables import context_tables
    from aqua_attention.text import load_text

    settings = grid_settings(
        k_ratio=[] if logit_error is not None else k_ratio,
        logit_error=[] if logit_error is None else [logit_error],
        s_ratio=[s_ratio],
        h2o_ratio=[h2o_ratio],
        h2o_queries=h2o_queries,
        bits=[bits],
        selection=[selection],
        share=[share],
        sink=[sink],
        recent=[recent],
        min_length=[min_length_of(min_length)],
        basis=[basis],
    )
    calibration, test = (calibration_data, load_text(calibration_data)), (data, load_text(data))
    if calibration[1] == test[1]:
        raise AquaError(f"{data} is calibrated on and tested on: give two different texts")
    check_sizes(
        calibrated_length=calibrated_length,
        tested_length=tested_length,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
    )
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    jobs = context_jobs(
        Calibrator(folder, _named(model, gguf_file), loaded, tokenizer, _notice),
        calibration,
        test,
        settings,
        calibrated_lengths=calibrated_length,
        tested_lengths=tested_length,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        seed=seed,
    )
    _run(folder, jobs, loaded, context_tables, json)


def _run(
    folder: Path,
    jobs: Sequence[Job],
    loaded: PreTrainedModel,
    tables: Callable[[list[dict[str, Any]]], list[Table]],
    json: Path | None,
    explained: bool = False,
) -> None:
    """Measure, write and print: the same for every kind of job. `explained`: the tables say why figures are missing."""
    from aqua_attention.evaluate.grid import run_jobs
    from aqua_attention.evaluate.records import facts_of, make_folder
    from aqua_attention.files import write_json
    from aqua_attention.record_tables import reasons

    make_folder(folder)
    if json:
        make_folder(json.absolute().parent)
    facts = facts_of(loaded, shlex.join(["aqua", *sys.argv[1:]]))
    try:
        with progress_bars() as report:
            records = run_jobs(
                folder, jobs, facts, progress=lambda done, total: report("settings", done, total), notice=_notice
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped: {folder} keeps what is done, the same command goes on", err=True)
        raise typer.Exit(130) from None
    if json:
        write_json(json, {"records": records})
    for table in tables(records):
        print_table(table)
    for line in [] if explained else reasons(records):
        typer.echo(line)
    failed = sum("error" in record for record in records)
    missing = f", {failed} of them without figures" if failed else ""
    typer.echo(f"{len(records)} records{missing} in {folder / 'records'}")
    if failed == len(records):
        raise typer.Exit(1)


def _check_places(folder: Path, json: Path | None) -> None:
    """Before anything is loaded. Nothing is made yet, so that a mistake leaves no empty folder."""
    check_folder(folder)
    if json is not None and json.resolve() == folder.resolve():
        raise AquaError(f"cannot write {json}: it is the results folder; give a file, such as {json / 'all.json'}")
    if json is None or json.absolute().parent.exists() or not json.resolve().is_relative_to(folder.resolve()):
        check_writable(json)


def _notice(message: str) -> None:
    typer.echo(message, err=True)


def _named(model: str, gguf_file: str | None) -> str:
    """The model in a record: a folder may hold several GGUF files."""
    return f"{model}:{gguf_file}" if gguf_file else model


def _some(values: list[Any] | None) -> tuple[Any, ...] | None:
    return tuple(dict.fromkeys(values)) if values else None


def _bits(value: str) -> int | None:
    if value not in ("none", "8", "4"):
        raise AquaError(f"bits is {value!r}: it must be one of none, 8, 4")
    return None if value == "none" else int(value)
