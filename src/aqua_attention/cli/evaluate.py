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
from aqua_attention.cli.terminal import check_writable, print_table, progress_bars
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aqua_attention.calibration.projections import Projections
    from aqua_attention.config import AquaConfig
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
    from aqua_attention.data.text import load_text, text_digest, token_windows, tokenize
    from aqua_attention.evaluate.record import dtype_of
    from aqua_attention.evaluate.setting import Setting
    from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
    from aqua_attention.io.files import write_json
    from aqua_attention.report.tables import perplexity_table

    learned, text = Projections.load(projections), load_text(data)
    settings = [Setting(config, basis) for config in configs]
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(ids, tokens=tokens, context=context, seed=None, prefix=prefix)
    with progress_bars() as report:
        result = evaluate_perplexity(
            loaded,
            learned,
            settings,
            windows,
            progress=lambda done, total: report("evaluate", done, total),
        )
    source = {"model": model, "dtype": dtype_of(loaded), "data": data, "text_sha256": text_digest(text)}
    result |= source | {"context": windows.shape[1]}
    if json:
        write_json(json, result)
    print_table(perplexity_table(result))
    scored = "" if result["scored"] == "all" else f", of the {result['scored']} of each"
    typer.echo(
        f"{result['dense']['tokens']} predictions in {len(windows)} windows of {windows.shape[1]} tokens{scored}"
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
    from aqua_attention.data.text import load_text, text_digest, token_windows, tokenize
    from aqua_attention.evaluate.record import dtype_of
    from aqua_attention.evaluate.suites.retention import K_RATIOS, evaluate_retention
    from aqua_attention.io.files import write_json
    from aqua_attention.report.tables import retention_table

    learned, text = Projections.load(projections).with_basis(basis), load_text(data)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code, predicts=False)
    ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(ids, tokens=tokens, context=context, seed=None, prefix=prefix)
    with progress_bars() as report:
        result = evaluate_retention(
            loaded,
            learned,
            windows,
            k_ratios=k_ratio or K_RATIOS,
            progress=lambda done, total: report("retention", done, total),
        )
    source = {"model": model, "dtype": dtype_of(loaded), "data": data, "text_sha256": text_digest(text)}
    result |= source | {"basis": basis, "context": windows.shape[1]}
    if json:
        write_json(json, result)
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
    from aqua_attention.evaluate.suites.lines import lines_questions, read_lines_questions

    if data is not None and lines:
        raise AquaError(f"--lines generates questions, --data {data} reads them: give one of the two")
    learned = Projections.load(projections)
    if data is not None:
        questions = read_lines_questions(data, count=count)
    else:
        each = 50 if count is None else count
        # A number given twice would count the same questions twice.
        questions = [q for n in dict.fromkeys(lines or LINES) for q in lines_questions(n, count=each, seed=seed)]
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    source = {"model": model, "data": "generated" if data is None else str(data), "seed": None if data else seed}
    _retrieve(loaded, tokenizer, learned, configs, basis, questions, chat, source, json)


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
    from aqua_attention.data.text import load_text, text_digest
    from aqua_attention.evaluate.suites.needle import needle_questions

    learned, text = Projections.load(projections), load_text(data)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    questions = needle_questions(
        tokenizer,
        text,
        lengths=length,
        depths=depth,
        needles=needles,
        repeats=repeats,
        seed=seed,
        chat=chat,
    )
    source = {"model": model, "data": data, "text_sha256": text_digest(text), "seed": seed, "needles": needles}
    _retrieve(loaded, tokenizer, learned, configs, basis, questions, chat, source, json)


def _retrieve(
    loaded: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    learned: Projections,
    configs: list[AquaConfig],
    basis: str,
    questions: list[Question],
    chat: bool,
    source: dict[str, Any],
    json: Path | None,
) -> None:
    """Ask, write and print: the same for every kind of question."""
    from aqua_attention.evaluate.record import dtype_of
    from aqua_attention.evaluate.setting import Setting
    from aqua_attention.evaluate.suites.retrieval import evaluate_retrieval
    from aqua_attention.io.files import write_json
    from aqua_attention.report.tables import retrieval_grid, retrieval_table

    with progress_bars() as report:
        result = evaluate_retrieval(
            loaded,
            tokenizer,
            learned,
            [Setting(config, basis) for config in configs],
            questions,
            chat=chat,
            progress=lambda done, total: report("answers", done, total),
        )
    result |= source | {"dtype": dtype_of(loaded), "chat": chat}
    if json:
        write_json(json, result)
    print_table(retrieval_table(result))
    print_table(retrieval_grid(result))
