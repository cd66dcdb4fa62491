# SPDX-License-Identifier: Apache-2.0
"""The commands for tasks that others measure too, our own and lm-evaluation-harness: parsing and printing only."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from aqua_attention.cli.options import ModelOptions, ProjectionsFile, Rows, settings_of
from aqua_attention.cli.outputs import check_apart, check_writable
from aqua_attention.cli.terminal import Show, stoppable
from aqua_attention.errors import AquaError, install_extra
from aqua_attention.io.progress import progress_bar

NAMES = "hellaswag, winogrande, arc_easy, arc_challenge, truthfulqa, mmlu or gsm8k"
QUICK_CHOICES, QUICK_WRITTEN = 10, 2
"""Questions of a task under --quick: written answers take the longest."""


def tasks(
    *,
    projections: ProjectionsFile,
    task: Annotated[list[str], f"NAME=PATH, a file or a folder of splits; may be repeated. NAME is {NAMES}."],
    limit: Annotated[
        int | None, "How many questions of a task, from its start (MMLU: of a subject; default: all)."
    ] = None,
    few_shot: Annotated[
        int | None, "Examples before each question (default: gsm8k 5, others 0; truthfulqa always 0)."
    ] = None,
    seed: Annotated[int, "Seed that draws the examples."] = 0,
    quick: Annotated[bool, "--quick", f"Only {QUICK_CHOICES} questions of a task, {QUICK_WRITTEN} of gsm8k."] = False,
    state: Annotated[Path | None, "Keep the answers in this file; after Ctrl-C or a kill, go on from it."] = None,
    batch: Annotated[int, "How many questions are answered at once."] = 8,
    knobs: Rows,
    model: ModelOptions,
    show: Show,
) -> None:
    """Answer multiple-choice and arithmetic questions of local files, dense and AQUA the same questions.

    Example: `aqua eval tasks smollm2 -p smollm2.safetensors --task hellaswag=hellaswag_val.jsonl --task gsm8k=gsm8k/
    --limit 100 --k-ratio 0.5 --state tasks.state --json tasks.json`
    """
    settings = settings_of(knobs)
    check_writable("answers", state)
    check_apart(state, show.json)
    from aqua_attention.evaluate.tasks.formats import load_task
    from aqua_attention.evaluate.tasks.run import check_request, evaluate_tasks
    from aqua_attention.report.tables import tasks_table

    if quick and limit is not None:
        raise AquaError(f"--quick asks few questions, --limit {limit} says how many: give one of the two")
    if unnamed := [each for each in task if "=" not in each]:
        raise AquaError(f"--task {unnamed[0]} names no file: write NAME=PATH, such as hellaswag=hellaswag_val.jsonl")
    paths = [each.split("=", 1) for each in task]
    check_request([name for name, _ in paths], batch)
    asked = []
    for name, path in paths:
        examples = None if name == "truthfulqa" else few_shot
        most = (QUICK_WRITTEN if name == "gsm8k" else QUICK_CHOICES) if quick else limit
        asked.append(load_task(name, path, limit=most, few_shot=examples, seed=seed))
    subject = model.subject(projections, "", reads=False)

    def kept() -> str:
        if state is None:
            return "nothing was kept (--state)"
        goes_on = f"{state} keeps the answers so far, the same command goes on"
        return goes_on if state.exists() else "nothing was kept yet"

    with stoppable(kept), progress_bar("answers") as progress:
        result = evaluate_tasks(subject, settings, asked, batch=batch, state=state, progress=progress)
    result |= subject.source() | {"seed": seed, "limit": limit, "quick": quick}
    show(result, tasks_table(result), suite="tasks")
    for name, entry in result["tasks"].items():
        beside = f", examples of {_some_of(entry['example_files'])}" if entry["example_files"] else ""
        typer.echo(f"{name}: {entry['questions']} questions of {_some_of(entry['files'])}{beside}")


def _some_of(files: list[Any]) -> str:
    """Names of files in a line; of many, only the first and the last."""
    return ", ".join(files) if len(files) < 3 else f"{len(files)} files, {files[0]} to {files[-1]}"


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the model type `aqua`. All arguments are its own (`aqua lm-eval run --help`).

    --model_args takes what it takes for `--model hf`, and projections, basis, preset, k_ratio and the other knobs.
    --output_path writes the figures. With --use_cache a stopped run goes on.

    Example: `aqua lm-eval run --model aqua --model_args
    pretrained=smollm2,projections=smollm2.safetensors,preset=fast
    --tasks arc_easy --limit 100`
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import aqua_attention.evaluate.lm_eval  # noqa: F401 (makes the model type known)
    except ImportError as error:
        remedy = install_extra("lm-eval")
        raise AquaError(f"lm-evaluation-harness cannot be loaded ({error}): {remedy}") from error
    sys.argv = ["lm-eval", *context.args]
    try:
        with stoppable(lambda: "with --use_cache, the same command goes on"):
            cli_evaluate()
    except AquaError:
        raise
    except (TypeError, ValueError) as error:  # what it raises for values and tasks that it does not know
        raise AquaError(f"lm-eval refuses this ({error}): see `aqua lm-eval run --help`") from error
