# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua eval ...`: parsing and printing only, see `evaluate/` for what they do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import (
    Chat,
    EvaluationData,
    Json,
    ModelOptions,
    ProjectionsFile,
    Rows,
    Tokens,
    Windows,
    load_projections,
    settings_of,
)
from aqua_attention.cli.spread import spread
from aqua_attention.cli.terminal import check_writable, progress_bar, show
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from aqua_attention.evaluate.setting import Setting, Subject
    from aqua_attention.evaluate.suites.retrieval import Question

LINES = [100, 200]
LENGTHS = [1024, 2048, 4096]
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]

evaluations = typer.Typer(no_args_is_help=True, help="Measure what AQUA loses against the dense model.")


@evaluations.command()
@spread
def perplexity(
    *, projections: ProjectionsFile, read: Windows, knobs: Rows, model: ModelOptions, json: Json = None
) -> None:
    """Perplexity, KL divergence and top-1 agreement, dense and AQUA in one run.

    Example: `aqua eval perplexity smollm2 -p smollm2.safetensors --k-ratio 0.75 --k-ratio 0.5 --json rows.json`
    """
    settings = settings_of(knobs)
    check_writable(json)
    from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
    from aqua_attention.report.tables import perplexity_table

    subject = read.subject(projections, model)
    windows = subject.windows(read.tokens, read.context)
    with progress_bar("evaluate") as progress:
        result = evaluate_perplexity(subject, settings, windows, progress=progress)
    result |= subject.source() | {"context": windows.shape[1], "windows": len(windows)}
    show(result, json, perplexity_table(result), suite="perplexity")
    scored = "" if result["scored"] == "all" else f", of the {result['scored']} of each"
    typer.echo(
        f"{result['dense']['tokens']} predictions in {result['windows']} windows of {result['context']} tokens{scored}"
    )


@dataclass(frozen=True)
class FewerWindows(Windows):
    """Half as many: retention looks at every layer."""

    tokens: Tokens = 4096


@evaluations.command()
@spread
def retention(
    *,
    projections: ProjectionsFile,
    read: FewerWindows,
    k_ratio: Annotated[list[float] | None, "Share of dimensions; repeat (0.9 0.75 0.5 0.25)."] = None,
    basis: str = "aqua",
    model: ModelOptions,
    json: Json = None,
) -> None:
    """How much of scores and softmax is lost, per layer and head: static, dynamic and weighted choice of dimensions.

    Example: `aqua eval retention smollm2 -p smollm2.safetensors --json retention.json`
    """
    check_writable(json)
    from aqua_attention.evaluate.suites.retention import K_RATIOS, evaluate_retention
    from aqua_attention.report.tables import retention_table

    subject = read.subject(projections, model, predicts=False, basis=basis)
    windows = subject.windows(read.tokens, read.context)
    with progress_bar("retention") as progress:
        result = evaluate_retention(subject, windows, k_ratios=k_ratio or K_RATIOS, progress=progress)
    result |= subject.source() | {"basis": subject.projections.basis, "context": windows.shape[1]}
    show(result, json, retention_table(result), suite="retention")


@evaluations.command()
@spread
def lines(
    *,
    projections: ProjectionsFile,
    data: Annotated[Path | None, "LongEval's .jsonl of line questions; generated when left out."] = None,
    count: Annotated[int | None, "How many questions (a file: all of them; generated: 50)."] = None,
    lines: Annotated[list[int] | None, "Lines in a generated question; repeat (100 200)."] = None,
    seed: Annotated[int, "Chooses the generated questions."] = 0,
    knobs: Rows,
    chat: Chat = True,
    model: ModelOptions,
    json: Json = None,
) -> None:
    """Line retrieval (LongEval): find one of hundreds of numbered lines; dense and AQUA on the same questions.

    Example: `aqua eval lines smollm2 -p smollm2.safetensors --lines 100 --count 50 --k-ratio 0.75 --k-ratio 0.5
    --selection weighted --sink 4 --recent 64 --json lines.json`
    """
    settings = settings_of(knobs)
    check_writable(json)
    from aqua_attention.evaluate.setting import Subject
    from aqua_attention.evaluate.suites.grid import Sizes
    from aqua_attention.evaluate.suites.lines import sized_questions

    if data is not None and lines:
        raise AquaError(f"--lines generates questions, --data {data} reads them: give one of the two")
    learned = load_projections(projections)
    questions = sized_questions(Sizes(lines=tuple(lines or LINES), count=count, lines_file=data), seed)
    read = "generated" if data is None else str(data)
    subject = Subject(model.model, *model.load(), learned, read, seed=seed, chat=chat)
    _retrieve("lines", subject, settings, questions, {"seed": None if data else seed}, json)


@evaluations.command()
@spread
def needle(
    *,
    projections: ProjectionsFile,
    data: EvaluationData = "builtin:evaluation",
    length: Annotated[list[int], "Tokens of the prompt; repeat."] = LENGTHS,
    depth: Annotated[list[float], "Where the needle is, 0 the beginning, 1 the end; repeat."] = DEPTHS,
    needles: Annotated[int, "How many are hidden, and asked for."] = 1,
    repeats: Annotated[int, "Haystacks for each length and depth."] = 1,
    seed: Annotated[int, "Chooses needles and haystacks."] = 0,
    knobs: Rows,
    chat: Chat = True,
    model: ModelOptions,
    json: Json = None,
) -> None:
    """Needle in a haystack: secret numbers hidden at each depth of texts of each length, dense and AQUA.

    Example: `aqua eval needle smollm2 -p smollm2.safetensors --data essays/ --length 2048 --length 4096 --k-ratio 0.5
    --selection weighted --sink 4 --recent 64 --json needle.json`
    """
    settings = settings_of(knobs)
    check_writable(json)
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.setting import Subject
    from aqua_attention.evaluate.suites.grid import Sizes
    from aqua_attention.evaluate.suites.needle import needle_questions

    learned, text = load_projections(projections), load_text(data)
    subject = Subject(model.model, *model.load(), learned, data, text, seed=seed, chat=chat)
    sizes = Sizes(lengths=tuple(length), depths=tuple(depth), needles=needles, repeats=repeats)
    _retrieve("needle", subject, settings, needle_questions(subject, sizes), {"needles": needles}, json)


def _retrieve(
    suite: str,
    subject: Subject,
    settings: list[Setting],
    questions: list[Question],
    source: dict[str, Any],
    json: Path | None,
) -> None:
    """Ask, write and print: the same for every kind of question."""
    from aqua_attention.evaluate.suites.retrieval import evaluate_retrieval
    from aqua_attention.report.tables import retrieval_grid, retrieval_table

    with progress_bar("answers") as progress:
        result = evaluate_retrieval(subject, settings, questions, progress=progress)
    result |= subject.source() | {"seed": subject.seed, "chat": subject.chat} | source
    show(result, json, retrieval_table(result), retrieval_grid(result), suite=suite)
