# SPDX-License-Identifier: Apache-2.0
"""The command `aqua`: parsing and printing only. Libraries load inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli import records
from aqua_attention.cli.bench import benchmarks
from aqua_attention.cli.doctor import doctor
from aqua_attention.cli.evaluate import evaluations
from aqua_attention.cli.images import Images, Layers, Side, calibrate_on_images, images, text_for, wants_images
from aqua_attention.cli.options import (
    Basis,
    Chat,
    Context,
    ModelOptions,
    ProjectionsFile,
    Resuming,
    Serving,
    load_projections,
)
from aqua_attention.cli.outputs import check_apart, check_not_read, check_writable, warn_of_weights
from aqua_attention.cli.serve import serve
from aqua_attention.cli.spread import Commands
from aqua_attention.cli.tasks import lm_eval, tasks
from aqua_attention.cli.terminal import (
    USAGE_ERROR,
    Show,
    ended_by_signals,
    stoppable,
    usage_error,
)
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.progress import progress_bar, progress_bars, progress_steps
from aqua_attention.version import __version__

if TYPE_CHECKING:
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.report.tables import Table

app = Commands(
    name="aqua",
    help="AQUA attention: multiply only the query dimensions that matter (arXiv 2509.11155).\n\n"
    "Begin with `aqua demo`, or with `aqua calibrate MODEL -o FILE` and `aqua generate MODEL -p FILE --prompt TEXT`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (tasks, records.grid, records.transfer, records.context, images):
    evaluations.command()(command)
benchmarks.command()(serve)
app.add_typer(evaluations, name="eval")
app.add_typer(benchmarks, name="bench")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(f"aqua-attention {__version__}")
        raise typer.Exit()


@app.command()
def demo(
    *,
    out: Annotated[Path, "Folder for projections, table.md and summary.json."] = Path("demo-out"),
    show: Show,
) -> None:
    """Fetch a small model, calibrate it, measure what is gained and lost, and let it write: some 5 minutes.

    Example: `aqua demo --out demo-out`
    """
    from aqua_attention.cli.demo import run_demo
    from aqua_attention.report.tables import perplexity_table

    with progress_bars() as report:
        summary = run_demo(out, report)
    show(summary, perplexity_table(summary), suite="perplexity")
    generation = summary["generation"]
    typer.echo(f"\nprompt: {generation['prompt']}\n\n--- dense\n{generation['dense']}")
    typer.echo(f"\n--- AQUA, half the dimensions\n{generation['aqua']}")
    minutes, memory = sum(summary["seconds"].values()) / 60, summary["peak_memory_bytes"]
    used = f", peak memory {memory / 1e9:.1f} GB" if memory else ""
    typer.echo(f"\n{minutes:.1f} minutes{used}; results in {out}")


@app.command()
def calibrate(
    *,
    output: Annotated[Path, "--output", "-o", "Write the projections here (.safetensors)."],
    data: Annotated[
        str | None,
        "Text or images: a file or folder, hub:name, builtin:calibration, builtin:photographs (default: built-in).",
    ] = None,
    tokens: Annotated[int | None, "How many tokens to read (default: 32768; learned: 81920; tuned: 614400)."] = None,
    context: Context = 2048,
    basis: Basis,
    seed: Annotated[int, "Seed that chooses the windows."] = 0,
    side: Side = None,
    images: Images = 256,
    layers: Layers = None,
    resuming: Resuming,
    model: ModelOptions,
    show: Show,
) -> None:
    """Learn a model's projections from a text, or from images, once. Stopped or killed, it goes on with --resume.

    With --basis learned they lose about half as much, in ten minutes on a CPU or one on a GPU. With --basis tuned all
    layers are then turned together. They lose less again, but only a GPU does that in acceptable time. With --positions
    one file serves short and long contexts.

    Example: `aqua calibrate smollm2 --data notes.txt --basis learned --positions 0:8192 -o smollm2.safetensors`
    """
    check_writable("projections", output)  # before what has no name, such as ".", is given another
    partial = output.with_name(f"{output.name}.partial")
    check_writable("checkpoint", partial)
    check_apart(output, partial, show.json)
    warn_of_weights(output, model.model)
    from aqua_attention.calibration.checkpoint import check_no_unfinished, check_seconds, discard
    from aqua_attention.calibration.run import calibrate as run
    from aqua_attention.io.files import remove_leftovers

    check_seconds(resuming.checkpoint_seconds)
    if not resuming.resume:
        check_no_unfinished(partial)
    elif not partial.exists():
        typer.echo(f"there is no {partial}: beginning at the first window", err=True)
    options: dict[str, Any] = {"name": model.model, "layers": layers, **vars(resuming)}
    options["checkpoint"] = partial

    def kept() -> str:
        goes_on = f"{partial} keeps what is done, the same command with --resume goes on"
        return goes_on if partial.exists() else "nothing was kept yet"

    with stoppable(kept):
        if wants_images(model, data, side):
            if basis != Basis():
                raise AquaError("--basis and --positions are for text, and images are read: leave them out")
            projections = calibrate_on_images(model, data or "builtin:photographs", images, **options)
        else:
            text = text_for(model.model, data or "builtin:calibration")
            loaded, tokenizer = model.load(predicts=False)
            options |= {"tokens": tokens, "context": context, "seed": seed, "basis": basis.basis}
            options["last_position"] = basis.last_position
            with progress_bar("calibrate") as progress:
                projections = run(loaded, tokenizer, text, progress=progress, **options)
        projections.save(output)
    discard(partial)
    remove_leftovers(output)
    show(*_described(output, projections), suite="spectrum")
    typer.echo(f"wrote {output}")


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="File made by `aqua calibrate`.")], show: Show) -> None:
    """Check a projections file and show what is in it.

    Example: `aqua inspect smollm2.safetensors`
    """
    from aqua_attention.report.projections import spectrum_table

    projections = load_projections(file)
    result, where_from = _described(file, projections)
    show(result, where_from, spectrum_table(result["layers"]), suite="spectrum")


@app.command("merge")
def merge_files(
    first: Annotated[Path, typer.Argument(help="File made by `aqua calibrate`.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same model, from other text.")],
    output: Annotated[Path, "--output", "-o", "Write the joined projections here (.safetensors)."],
    show: Show,
) -> None:
    """Join two calibrations of one model, as if one run had read both texts (for calibrating on several machines).

    Example: `aqua merge a.safetensors b.safetensors -o both.safetensors`
    """
    check_writable("projections", output)
    check_apart(output, show.json)
    check_not_read(output, first, second)
    projections = load_projections(first).merged(load_projections(second))
    projections.save(output)
    show(*_described(output, projections), suite="spectrum")
    typer.echo(f"wrote {output}")


def _described(file: Path, projections: Projections) -> tuple[dict[str, Any], Table]:
    """Projections in figures, and where they come from."""
    from aqua_attention.calibration.projections import spectrum
    from aqua_attention.evaluate.record import provenance
    from aqua_attention.report.projections import provenance_table

    model = {"name": projections.model.get("name"), "shape": projections.model["shape"]}
    result = {"model": model, "calibration": projections.calibration, "layers": spectrum(projections)}
    return result | provenance(file, projections), provenance_table(projections)


@app.command()
def generate(
    *,
    projections: ProjectionsFile,
    prompt: Annotated[str, "What to continue."],
    max_new_tokens: Annotated[int, "Most tokens to write."] = 64,
    config: AquaConfig,
    compare: Annotated[bool, "--compare", "Also write the dense model's answer."] = False,
    explain: Annotated[bool, "--explain", "Say what it ran on, and what would be faster."] = False,
    serving: Serving,
    chat: Chat = True,
    model: ModelOptions,
    show: Show,
) -> None:
    """Continue a prompt with AQUA attention (greedy). It takes the fastest path there is, which --explain names.

    Example: `aqua generate smollm2 -p smollm2.safetensors --prompt "What is a list?" --preset fast
    --compare`
    """
    from aqua_attention.attach.apply import Attachment
    from aqua_attention.evaluate.generation import check_new_tokens, check_prompt, continue_tokens, encode_prompt
    from aqua_attention.evaluate.record import provenance

    check_prompt(prompt)
    check_new_tokens(max_new_tokens)
    learned = load_projections(projections)
    with progress_steps() as step:
        with step("load"):
            loaded, tokenizer = model.load()
        attachment = Attachment(loaded, learned, config, **vars(serving))
        result: dict[str, Any] = {"model": model.name} | provenance(projections, learned)
        result |= {"prompt": prompt, "setting": attachment.config.to_dict()}
        tokens = encode_prompt(tokenizer, prompt, chat=chat)
        written = partial(continue_tokens, loaded, tokenizer, tokens, max_new_tokens=max_new_tokens)
        if compare:
            with step("dense"):
                result["dense"] = written().text
        with attachment:
            with step("AQUA"):
                result["aqua"] = written().text
            explanation = attachment.explain(tokens.shape[1]) if explain else None
    if explanation:
        result["explain"] = explanation.to_dict()
    show(result)
    if compare:
        typer.echo(f"--- dense\n{result['dense']}\n--- AQUA")
    typer.echo(result["aqua"])
    if explanation:
        typer.echo(f"\n{explanation}")


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder that `aqua eval grid` wrote, or with --json files of other commands."
        ),
    ],
    show: Show,
) -> None:
    """Turn a folder of results into one page: DIR/report.html, and the same as DIR/report.md. Needs no network.

    It reads `DIR/records/*.json`, which `aqua eval grid` writes, and `DIR/*.json`, which other commands write with
    --json. Files that are none of these are named in the report.

    Example: `aqua report results`
    """
    from aqua_attention.report.collect import collect
    from aqua_attention.report.page import IMAGES, write_report

    collected = collect(folder)
    if not (collected.records or collected.failed):
        first = "; ".join(f"{name} is not used: {reason}" for name, reason in collected.unused[:1])
        raise AquaError(
            f"{folder} holds no results ({first}): give the folder that --json or `aqua eval grid` wrote into"
        )
    pages = folder / "report.html", folder / "report.md"
    check_writable("page", *pages, *(folder / IMAGES).glob("figure-*.svg"))
    check_apart(*pages, show.json)
    with progress_bar("report") as progress:
        paths = write_report(folder, collected, progress)
    suites, about = Counter(record.suite for record in collected.records), ("suite", "source", "setting", "error")
    result = {
        "settings": dict(suites),
        "failed": [{name: getattr(record, name) for name in about} for record in collected.failed],
        "unused": [{"file": name, "reason": reason} for name, reason in collected.unused],
        "written": [str(path) for path in paths],
    }
    show(result)
    for name, reason in collected.unused:
        typer.echo(f"not used: {name}: {reason}", err=True)
    counts = ", ".join(f"{count} {suite}" for suite, count in suites.items()) or "none"
    typer.echo(f"settings: {counts}; failed: {len(collected.failed)}; files not used: {len(collected.unused)}")
    for path in paths:
        typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


# Last in the help: what a newcomer needs first stands first.
app.command()(doctor)
# Everything after the first word is lm-eval's, its --help too.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
app.command("lm-eval", context_settings=_PASSED_ON)(lm_eval)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    warnings.showwarning = lambda message, *rest, **more: typer.echo(f"warning: {message}", err=True)
    try:
        with ended_by_signals():
            code = app(prog_name="aqua", standalone_mode=False)
    except AquaError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except USAGE_ERROR as error:
        # A group without a command shows its help.
        if type(error).__name__ != "NoArgsIsHelpError":
            typer.echo(usage_error(error), err=True)
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:
        is_full = "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in str(error) and not is_full:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if is_full:
            # What torch says on a CPU begins with a place in its source.
            asked = reason.partition("you tried to allocate ")[2].partition(".")[0]
            reason = f"this needs more memory than there is ({asked} at once): ask for less"
        typer.echo(f"error: {reason}", err=True)
        sys.exit(1)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
