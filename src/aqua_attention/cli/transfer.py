# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua eval transfer` and `context`: calibrated on one text, or length, and tested on another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aqua_attention.cli.evaluate import PAPER_K_RATIO
from aqua_attention.cli.options import (
    Basis,
    Bits,
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
    Recent,
    RemoteCode,
    Selection,
    Share,
    Sink,
    SRatio,
    load_model,
    min_length_of,
)
from aqua_attention.cli.records import Folder, Seed, check_places, model_name, print_notice, run_and_print
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from aqua_attention.evaluate.setting import Setting

CALIBRATION_TOKENS, QUICK_CALIBRATION_TOKENS = 16384, 2048
TEST_TOKENS, QUICK_TEST_TOKENS = 8192, 1024
CONTEXT, QUICK_CONTEXT = 2048, 512
WINDOWS, QUICK_WINDOWS = [512, 2048], [256, 512]

Quick = Annotated[bool, typer.Option("--quick", help="Short texts: minutes for the default model.")]
TestTokens = Annotated[
    int | None,
    typer.Option("--tokens", help=f"Tokens that each is tested on ({TEST_TOKENS}; quick {QUICK_TEST_TOKENS})."),
]


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
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that each projection is calibrated on "
            f"({CALIBRATION_TOKENS}; quick {QUICK_CALIBRATION_TOKENS})."
        ),
    ] = None,
    tokens: TestTokens = None,
    context: Annotated[int | None, typer.Option(help=f"Tokens in a window ({CONTEXT}; quick {QUICK_CONTEXT}).")] = None,
    quick: Quick = False,
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
    check_places(folder, json)
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.calibrated import Calibrator
    from aqua_attention.evaluate.run import check_sizes
    from aqua_attention.evaluate.suites.transfer import check_domains, split_domain, transfer_jobs
    from aqua_attention.report.record_tables import transfer_tables

    settings = _settings(
        k_ratio, logit_error, s_ratio, h2o_ratio, h2o_queries, bits, selection, share, sink, recent, min_length, basis
    )
    domains = []
    for given in domain:
        name, separator, data = given.partition("=")
        if not (separator and name and data):
            raise AquaError(f"domain is {given!r}: write NAME=TEXT, such as prose=novel.txt")
        domains.append(split_domain(name, data, load_text(data)))
    check_domains(domains)
    if calibration_tokens is None:
        calibration_tokens = QUICK_CALIBRATION_TOKENS if quick else CALIBRATION_TOKENS
    if tokens is None:
        tokens = QUICK_TEST_TOKENS if quick else TEST_TOKENS
    if context is None:
        context = QUICK_CONTEXT if quick else CONTEXT
    check_sizes(calibration_tokens=calibration_tokens, tokens=tokens, context=context)
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    jobs = transfer_jobs(
        Calibrator(folder, model_name(model, gguf_file), loaded, tokenizer, print_notice),
        domains,
        settings,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        context=context,
        seed=seed,
    )
    run_and_print(folder, jobs, loaded, transfer_tables, json)


def context(
    folder: Folder,
    model: Model,
    calibrated_length: Annotated[
        list[int] | None, typer.Option(help="Tokens in a window of calibration; repeat (512 2048; quick 256 512).")
    ] = None,
    tested_length: Annotated[
        list[int] | None, typer.Option(help="Tokens in a window of the test; repeat (512 2048; quick 256 512).")
    ] = None,
    calibration_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens to calibrate on; repeat, to see how many are enough "
            f"({CALIBRATION_TOKENS}; quick {QUICK_CALIBRATION_TOKENS})."
        ),
    ] = None,
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
    tokens: TestTokens = None,
    quick: Quick = False,
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
    check_places(folder, json)
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.calibrated import Calibrator
    from aqua_attention.evaluate.run import check_sizes
    from aqua_attention.evaluate.suites.context import context_jobs
    from aqua_attention.report.record_tables import context_tables

    settings = _settings(
        k_ratio, logit_error, s_ratio, h2o_ratio, h2o_queries, bits, selection, share, sink, recent, min_length, basis
    )
    calibration, test = (calibration_data, load_text(calibration_data)), (data, load_text(data))
    if calibration[1] == test[1]:
        raise AquaError(f"{data} is calibrated on and tested on: give two different texts")
    windows = QUICK_WINDOWS if quick else WINDOWS
    calibrated_length, tested_length = calibrated_length or windows, tested_length or windows
    calibration_tokens = calibration_tokens or [QUICK_CALIBRATION_TOKENS if quick else CALIBRATION_TOKENS]
    if tokens is None:
        tokens = QUICK_TEST_TOKENS if quick else TEST_TOKENS
    check_sizes(
        calibrated_length=calibrated_length,
        tested_length=tested_length,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
    )
    loaded, tokenizer = load_model(model, gguf_file, dtype, device, trust_remote_code)
    jobs = context_jobs(
        Calibrator(folder, model_name(model, gguf_file), loaded, tokenizer, print_notice),
        calibration,
        test,
        settings,
        calibrated_lengths=calibrated_length,
        tested_lengths=tested_length,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        seed=seed,
    )
    run_and_print(folder, jobs, loaded, context_tables, json)


def _settings(
    k_ratio: list[float],
    logit_error: float | None,
    s_ratio: float,
    h2o_ratio: float,
    h2o_queries: int | None,
    bits: int | None,
    selection: str,
    share: str,
    sink: int,
    recent: int,
    min_length: str,
    basis: str,
) -> list[Setting]:
    """One setting a k_ratio, or one of `logit_error`; the other options are the same in all."""
    from aqua_attention.evaluate.run import grid_settings

    return grid_settings(
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
