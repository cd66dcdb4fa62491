# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua eval ...`: parsing and printing only, see `evaluate/` for what they do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import (
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
    aqua_config,
    load_model,
)
from aqua_attention.cli.terminal import check_writable, command_line, print_table, progress_bars
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from aqua_attention.config import AquaConfig
    from aqua_attention.evaluate.suites.grid import Subject
    from aqua_attention.evaluate.suites.retrieval import Question

PAPER_K_RATIO = [0.75]
LINES = [100, 200]
LENGTHS = [1024, 2048, 4096]
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]

evaluations = typer.Typer(no_args_is_help=True, help="Measure what AQUA loses against the dense model.")


@evaluations.command()
def perplexity(
    model: Model,
    projections: ProjectionsFile,
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
    context: Context = 2048,
    tokens: Annotated[int, typer.Option(help="How many tokens to evaluate, from the start of the text.")] = 8192,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement, dense and AQUA in one run.

    Example: `aqua eval perplexity smollm2 -p smollm2.safetensors --k-ratio 0.75 --k-ratio 0.5 --json rows.json`
    """
    configs = [
        aqua_config(
            ratio, s_ratio, selection, share, sink, recent, logit_error, bits, h2o_ratio, h2o_queries, min_length
        )
        for ratio in k_ratio
    ]
    check_writable(json)
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.record import write_result
    from aqua_attention.evaluate.setting import Setting
    from aqua_attention.evaluate.suites.grid import Sizes, Subject
    from aqua_attention.evaluate.suites.perplexity import measure_perplexity
    from aqua_attention.report.tables import perplexity_table

    learned, text = Projections.load(projections), load_text(data)
    settings = [Setting(config, basis) for config in configs]
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    subject, sizes = Subject(model, loaded, tokenizer, learned, data, text), Sizes(context=context, tokens=tokens)
    with progress_bars() as report:
        result = measure_perplexity(subject, settings, sizes, lambda done, total: report("evaluate", done, total))
    if json:
        write_result(json, "perplexity", result, command_line())
    print_table(perplexity_table(result))
    scored = "" if result["scored"] == "all" else f", of the {result['scored']} of each"
    typer.echo(
        f"{result['dense']['tokens']} predictions in {result['windows']} windows of {result['context']} tokens{scored}"
    )


@evaluations.command()
def retention(
    model: Model,
    projections: ProjectionsFile,
    data: EvaluationData = "builtin:evaluation",
    k_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of dimensions; repeat (0.9 0.75 0.5 0.25).")
    ] = None,
    basis: Basis = "aqua",
    context: Context = 2048,
    tokens: Annotated[int, typer.Option(help="How many tokens to read, from the start of the text.")] = 4096,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """How much of scores and softmax is lost, per layer and head: static, dynamic and weighted choice of dimensions.

    Example: `aqua eval retention smollm2 -p smollm2.safetensors --json retention.json`
    """
    check_writable(json)
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.record import write_result
    from aqua_attention.evaluate.suites.grid import Sizes, Subject
    from aqua_attention.evaluate.suites.retention import K_RATIOS, measure_retention
    from aqua_attention.report.tables import retention_table

    learned, text = Projections.load(projections).with_basis(basis), load_text(data)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code, predicts=False)
    subject = Subject(model, loaded, tokenizer, learned, data, text)
    sizes = Sizes(context=context, retention_tokens=tokens)
    with progress_bars() as report:
        result = measure_retention(
            subject, k_ratio or K_RATIOS, sizes, lambda done, total: report("retention", done, total)
        )
    if json:
        write_result(json, "retention", result, command_line())
    print_table(retention_table(result))


@evaluations.command()
def lines(
    model: Model,
    projections: ProjectionsFile,
    data: Annotated[
        Path | None, typer.Option(help="LongEval's .jsonl of line questions; generated when left out.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many questions (a file: all of them; generated: 50).")] = None,
    lines: Annotated[list[int] | None, typer.Option(help="Lines in a generated question; repeat (100 200).")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the generated questions.")] = 0,
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
    chat: Chat = True,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Line retrieval (LongEval): find one of hundreds of numbered lines; dense and AQUA on the same questions.

    Example: `aqua eval lines smollm2 -p smollm2.safetensors --lines 100 --count 50 --k-ratio 0.75 --k-ratio 0.5
    --selection weighted --sink 4 --recent 64 --json lines.json`
    """
    configs = [
        aqua_config(
            ratio, s_ratio, selection, share, sink, recent, logit_error, bits, h2o_ratio, h2o_queries, min_length
        )
        for ratio in k_ratio
    ]
    check_writable(json)
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.evaluate.suites.grid import Sizes, Subject
    from aqua_attention.evaluate.suites.lines import sized_questions

    if data is not None and lines:
        raise AquaError(f"--lines generates questions, --data {data} reads them: give one of the two")
    learned = Projections.load(projections)
    questions = sized_questions(Sizes(lines=tuple(lines or LINES), count=count, lines_file=data), seed)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    read = "generated" if data is None else str(data)
    subject = Subject(model, loaded, tokenizer, learned, read, seed=seed, chat=chat)
    _retrieve("lines", subject, configs, basis, questions, {"seed": None if data else seed}, json)


@evaluations.command()
def needle(
    model: Model,
    projections: ProjectionsFile,
    data: EvaluationData = "builtin:evaluation",
    length: Annotated[list[int], typer.Option(help="Tokens of the prompt; repeat.")] = LENGTHS,
    depth: Annotated[
        list[float], typer.Option(help="Where the needle is, 0 the beginning, 1 the end; repeat.")
    ] = DEPTHS,
    needles: Annotated[int, typer.Option(help="How many are hidden, and asked for.")] = 1,
    repeats: Annotated[int, typer.Option(help="Haystacks for each length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="Chooses needles and haystacks.")] = 0,
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
    chat: Chat = True,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Needle in a haystack: secret numbers hidden at each depth of texts of each length, dense and AQUA.

    Example: `aqua eval needle smollm2 -p smollm2.safetensors --data essays/ --length 2048 --length 4096 --k-ratio 0.5
    --selection weighted --sink 4 --recent 64 --json needle.json`
    """
    configs = [
        aqua_config(
            ratio, s_ratio, selection, share, sink, recent, logit_error, bits, h2o_ratio, h2o_queries, min_length
        )
        for ratio in k_ratio
    ]
    check_writable(json)
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.suites.grid import Sizes, Subject
    from aqua_attention.evaluate.suites.needle import subject_questions

    learned, text = Projections.load(projections), load_text(data)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    subject = Subject(model, loaded, tokenizer, learned, data, text, seed=seed, chat=chat)
    sizes = Sizes(lengths=tuple(length), depths=tuple(depth), needles=needles, repeats=repeats)
    _retrieve("needle", subject, configs, basis, subject_questions(subject, sizes), {"needles": needles}, json)


def _retrieve(
    suite: str,
    subject: Subject,
    configs: list[AquaConfig],
    basis: str,
    questions: list[Question],
    source: dict[str, Any],
    json: Path | None,
) -> None:
    """Ask, write and print: the same for every kind of question."""
    from aqua_attention.evaluate.record import write_result
    from aqua_attention.evaluate.setting import Setting
    from aqua_attention.evaluate.suites.retrieval import measure_retrieval
    from aqua_attention.report.tables import retrieval_grid, retrieval_table

    settings = [Setting(config, basis) for config in configs]
    with progress_bars() as report:
        result = measure_retrieval(subject, settings, questions, lambda done, total: report("answers", done, total))
    if json:
        write_result(json, suite, result | source, command_line())
    print_table(retrieval_table(result))
    print_table(retrieval_grid(result))
