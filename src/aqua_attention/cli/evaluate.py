# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua eval ...`: parsing and printing only, see `evaluate/` for what they do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import Chat, ModelOptions, ProjectionsFile, Rows, Text, Tokens, Windows, settings_of
from aqua_attention.cli.spread import Commands
from aqua_attention.cli.terminal import Show
from aqua_attention.errors import AquaError
from aqua_attention.io.progress import progress_bar

if TYPE_CHECKING:
    from aqua_attention.evaluate.setting import Setting, Subject
    from aqua_attention.evaluate.suites.retrieval import Question

LINES = [100, 200]
LENGTHS = [1024, 2048, 4096]
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
RULER_LENGTHS = [4096]
QUESTIONS = 50

evaluations = Commands(
    no_args_is_help=True,
    help="Measure what AQUA loses against the dense model.\n\n"
    "Example: `aqua eval perplexity smollm2 -p smollm2.safetensors`",
)


@evaluations.command()
def perplexity(*, projections: ProjectionsFile, read: Windows, knobs: Rows, model: ModelOptions, show: Show) -> None:
    """Measure perplexity, KL divergence and top-1 agreement, dense and AQUA on the same text.

    Example: `aqua eval perplexity smollm2 -p smollm2.safetensors --k-ratio 0.75 --k-ratio 0.5 --json rows.json`
    """
    settings = settings_of(knobs)
    from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
    from aqua_attention.report.tables import perplexity_table

    subject = model.subject(projections, read.data)
    windows = subject.windows(read.tokens, read.context)
    with progress_bar("evaluate") as progress:
        result = evaluate_perplexity(subject, settings, windows, progress=progress)
    result |= subject.source() | subject.read(windows) | {"windows": len(windows)}
    show(result, perplexity_table(result), suite="perplexity")
    scored = "" if result["scored"] == "all" else f", of the {result['scored']} of each"
    count = f"{result['dense']['tokens']} predictions in {result['windows']} windows"
    typer.echo(f"{count} of {result['context']} tokens{scored}")


@evaluations.command()
def retention(
    *,
    projections: ProjectionsFile,
    read: Windows,
    tokens: Tokens = 4096,
    k_ratio: Annotated[
        list[float] | None, "Share of the key dimensions; may be repeated (default: 0.9 0.75 0.5 0.25)."
    ] = None,
    basis: str = "aqua",
    model: ModelOptions,
    show: Show,
) -> None:
    """Measure how much of scores and softmax each layer and head loses, by static, dynamic and weighted choice.

    Example: `aqua eval retention smollm2 -p smollm2.safetensors --json retention.json`
    """
    from aqua_attention.evaluate.suites.retention import K_RATIOS, evaluate_retention
    from aqua_attention.report.tables import retention_table

    subject = model.subject(projections, read.data, basis=basis, predicts=False)
    windows = subject.windows(tokens, read.context)
    with progress_bar("retention") as progress:
        result = evaluate_retention(subject, windows, k_ratios=k_ratio or K_RATIOS, progress=progress)
    result |= subject.source() | subject.read(windows)
    show(result, retention_table(result), suite="retention")


@evaluations.command()
def lines(
    *,
    projections: ProjectionsFile,
    data: Annotated[Path | None, "LongEval's .jsonl of line questions (default: generated questions)."] = None,
    count: Annotated[int | None, "How many questions (default: all of a file, 50 generated ones)."] = None,
    lines: Annotated[list[int] | None, "Lines in a generated question; may be repeated (default: 100 200)."] = None,
    seed: Annotated[int, "Seed that chooses the generated questions."] = 0,
    knobs: Rows,
    chat: Chat = True,
    model: ModelOptions,
    show: Show,
) -> None:
    """Ask for one of hundreds of numbered lines (LongEval), dense and AQUA the same questions.

    Example: `aqua eval lines smollm2 -p smollm2.safetensors --lines 100 --count 50 --k-ratio 0.75 --k-ratio 0.5
    --json lines.json`
    """
    settings = settings_of(knobs)
    from aqua_attention.evaluate.record import file_digest
    from aqua_attention.evaluate.suites.grid import Sizes
    from aqua_attention.evaluate.suites.lines import sized_questions

    if data is not None and lines:
        raise AquaError(f"--lines generates questions, --data {data} reads them: give one of the two")
    sizes = Sizes(lines=tuple(lines or LINES), count=count, lines_file=data)
    questions, read = sized_questions(sizes, seed), "generated" if data is None else str(data)
    subject = model.subject(projections, read, reads=False, seed=seed, chat=chat)
    _retrieve(
        "lines", subject, settings, questions, show, **({} if data is None else {"text_sha256": file_digest(data)})
    )


@evaluations.command()
def needle(
    *,
    projections: ProjectionsFile,
    data: Text = "builtin:evaluation",
    length: Annotated[list[int], "Tokens of the prompt; may be repeated."] = LENGTHS,
    depth: Annotated[list[float], "Where the needle is, from 0 (beginning) to 1 (end); may be repeated."] = DEPTHS,
    needles: Annotated[int, "How many needles are hidden, and asked for."] = 1,
    repeats: Annotated[int, "Haystacks for each length and depth."] = 1,
    seed: Annotated[int, "Seed that chooses needles and haystacks."] = 0,
    knobs: Rows,
    chat: Chat = True,
    model: ModelOptions,
    show: Show,
) -> None:
    """Hide secret numbers at each depth of texts of each length and ask for them, dense and AQUA.

    Example: `aqua eval needle smollm2 -p smollm2.safetensors --data essays/ --length 2048 --length 4096 --k-ratio 0.5
    --json needle.json`
    """
    settings = settings_of(knobs)
    from aqua_attention.evaluate.suites.grid import Sizes
    from aqua_attention.evaluate.suites.needle import needle_questions

    subject = model.subject(projections, data, seed=seed, chat=chat)
    sizes = Sizes(lengths=tuple(length), depths=tuple(depth), needles=needles, repeats=repeats)
    _retrieve("needle", subject, settings, needle_questions(subject, sizes), show, needles=needles)


@evaluations.command()
def ruler(
    *,
    projections: ProjectionsFile,
    data: Text = "builtin:evaluation",
    length: Annotated[list[int], "Tokens of prompt and answer together; may be repeated."] = RULER_LENGTHS,
    task: Annotated[list[str] | None, "A task by its name; may be repeated (default: all)."] = None,
    count: Annotated[int, "Questions for each task and length."] = QUESTIONS,
    questions: Annotated[Path | None, "For the task qa: questions about paragraphs, a .json in SQuAD's format."] = None,
    seed: Annotated[int, "Seed that chooses everything in the questions."] = 0,
    knobs: Rows,
    chat: Chat = True,
    model: ModelOptions,
    show: Show,
) -> None:
    """Ask RULER's questions (arXiv 2404.06654), made from a text at each length, dense and AQUA the same.

    Tasks: niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery (needles), vt (variable
    tracking), cwe and fwe (common and frequent words), qa (question answering among documents cut from the text).
    cwe takes words between spaces, so the text cannot be Chinese, Japanese or Thai. All tasks at 50 questions take
    hours on a CPU: give --count and --task. `aqua eval grid --suite ruler` keeps answers every ten seconds.

    Example: `aqua eval ruler smollm2 -p smollm2.safetensors --data essays/ --length 4096 --length 8192
    --questions dev-v1.1.json --k-ratio 0.5 --json ruler.json`
    """
    settings = settings_of(knobs)
    from aqua_attention.evaluate.suites.grid import Sizes
    from aqua_attention.evaluate.suites.ruler import asked_tasks, questions_named, ruler_questions

    sizes = Sizes(lengths=tuple(length), tasks=tuple(task or ()), count=count, questions=questions)
    sizes = replace(sizes, tasks=tuple(asked_tasks(sizes)))
    subject = model.subject(projections, data, seed=seed, chat=chat)
    with progress_bar("questions") as progress:
        asked = ruler_questions(subject, sizes, progress)
    _retrieve("ruler", subject, settings, asked, show, **questions_named(sizes))


def _retrieve(
    suite: str, subject: Subject, settings: list[Setting], questions: list[Question], show: Show, **source: Any
) -> None:
    """Ask, write and print: the same for every kind of question."""
    from aqua_attention.evaluate.suites.retrieval import evaluate_retrieval
    from aqua_attention.report.tables import retrieval_grid, retrieval_table

    with progress_bar("answers") as progress:
        result = evaluate_retrieval(subject, settings, questions, progress=progress)
    result |= subject.source() | {"seed": subject.seed, "chat": subject.chat} | source
    show(result, retrieval_table(result), retrieval_grid(result), suite=suite)
