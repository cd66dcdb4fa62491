# SPDX-License-Identifier: Apache-2.0
"""The command `aqua`: parsing and printing only. Libraries load inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.errors import AquaError
from aqua_attention.terminal import check_writable, print_table, progress_bars
from aqua_attention.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aqua_attention.config import AquaConfig

app = typer.Typer(
    name="aqua",
    help="AQUA attention: multiply only the query dimensions that matter (arXiv 2509.11155).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
evaluations = typer.Typer(no_args_is_help=True, help="Measure what AQUA loses against the dense model.")
app.add_typer(evaluations, name="eval")

# Options that several commands share.
Model = Annotated[str, typer.Argument(help="smollm2 (fetched once), a local folder, a .gguf file, or a hub id.")]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file's name inside the folder or hub repository.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda when there is one).")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
ProjectionsFile = Annotated[Path, typer.Option("--projections", "-p", help="File made by `aqua calibrate`.")]
Context = Annotated[int, typer.Option(help="Tokens in a window.")]
SRatio = Annotated[float, typer.Option(help="Share of trailing key dimensions never stored, in [0, 1).")]
Selection = Annotated[str, typer.Option(help="magnitude (the paper), weighted (ours) or static (PCA slice).")]
Share = Annotated[str, typer.Option(help="head: each query head its own dimensions; group: one set a KV head.")]
Sink = Annotated[int, typer.Option(help="First tokens scored with every dimension.")]
Recent = Annotated[int, typer.Option(help="Last tokens scored with every dimension.")]
LogitError = Annotated[
    float | None, typer.Option(help="Adaptive k: variance of the logit error allowed to a query; replaces --k-ratio.")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"aqua-attention {__version__}")
        raise typer.Exit()


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the projections here (.safetensors).")],
    data: Annotated[str, typer.Option(help="Text: builtin:calibration, a file or folder, hub:name.")] = (
        "builtin:calibration"
    ),
    tokens: Annotated[int, typer.Option(help="How many tokens to read.")] = 32768,
    context: Context = 2048,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Learn a model's projections from a text, once.

    Example: `aqua calibrate smollm2 --data notes.txt --tokens 32768 -o smollm2.safetensors`
    """
    check_writable(output, json)
    from aqua_attention.calibration import calibrate as run
    from aqua_attention.files import write_json
    from aqua_attention.tables import provenance_table, spectrum
    from aqua_attention.text import load_text

    text = load_text(data)
    loaded, tokenizer = _load(model, gguf_file, dtype, device, trust_remote_code)
    with progress_bars() as report:
        projections = run(
            loaded,
            tokenizer,
            text,
            tokens=tokens,
            context=context,
            seed=seed,
            name=model,
            progress=lambda done, total: report("calibrate", done, total),
        )
    projections.save(output)
    if json:
        write_json(json, {"calibration": projections.calibration, "layers": spectrum(projections)})
    print_table(provenance_table(projections))
    typer.echo(f"wrote {output}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="File made by `aqua calibrate`.")],
    json: Json = None,
) -> None:
    """Check a projections file and show what is in it.

    Example: `aqua inspect smollm2.safetensors`
    """
    check_writable(json)
    from aqua_attention.files import write_json
    from aqua_attention.projections import Projections
    from aqua_attention.tables import provenance_table, spectrum, spectrum_table

    projections = Projections.load(file)
    if json:
        model = {"name": projections.model.get("name"), "shape": projections.model["shape"]}
        write_json(json, {"model": model, "calibration": projections.calibration, "layers": spectrum(projections)})
    print_table(provenance_table(projections))
    print_table(spectrum_table(projections))


@app.command("merge")
def merge_files(
    first: Annotated[Path, typer.Argument(help="File made by `aqua calibrate`.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same model, from other text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the merged projections here.")],
    json: Json = None,
) -> None:
    """Join two calibrations of one model, as if one run had read both texts (for calibrating on several machines).

    Example: `aqua merge a.safetensors b.safetensors -o both.safetensors`
    """
    check_writable(output, json)
    from aqua_attention.files import write_json
    from aqua_attention.projections import Projections
    from aqua_attention.tables import provenance_table, spectrum

    projections = Projections.load(first).merged(Projections.load(second))
    projections.save(output)
    if json:
        write_json(json, {"calibration": projections.calibration, "layers": spectrum(projections)})
    print_table(provenance_table(projections))
    typer.echo(f"wrote {output}")


@evaluations.command()
def perplexity(
    model: Model,
    projections: ProjectionsFile,
    data: Annotated[str, typer.Option(help="Text: builtin:evaluation, a file or folder, hub:name.")] = (
        "builtin:evaluation"
    ),
    k_ratio: Annotated[list[float], typer.Option(help="Share of dimensions multiplied; repeat for a row each.")] = [  # noqa: B006 (typer)
        0.75
    ],
    s_ratio: SRatio = 0.0,
    selection: Selection = "magnitude",
    share: Share = "head",
    sink: Sink = 0,
    recent: Recent = 0,
    logit_error: LogitError = None,
    basis: Annotated[str, typer.Option(help="aqua; to compare: none (not rotated) or key-pca (keys alone).")] = "aqua",
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
    configs = [_config(ratio, s_ratio, selection, share, sink, recent, logit_error) for ratio in k_ratio]
    check_writable(json)
    from aqua_attention.evaluate.perplexity import Setting, evaluate_perplexity
    from aqua_attention.files import write_json
    from aqua_attention.projections import Projections
    from aqua_attention.tables import perplexity_table
    from aqua_attention.text import load_text, text_digest, token_windows, tokenize

    learned, text = Projections.load(projections), load_text(data)
    settings = [Setting(config, basis) for config in configs]
    loaded, tokenizer = _load(model, gguf_file, dtype, device, trust_remote_code)
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
    result |= {"model": model, "data": data, "text_sha256": text_digest(text), "context": windows.shape[1]}
    if json:
        write_json(json, result)
    print_table(perplexity_table(result))
    typer.echo(f"{result['dense']['tokens']} predictions in {len(windows)} windows of {windows.shape[1]} tokens")


@evaluations.command()
def retention(
    model: Model,
    projections: ProjectionsFile,
    data: Annotated[str, typer.Option(help="Text: builtin:evaluation, a file or folder, hub:name.")] = (
        "builtin:evaluation"
    ),
    k_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of dimensions; repeat (0.9 0.75 0.5 0.25).")
    ] = None,
    basis: Annotated[str, typer.Option(help="aqua; to compare: none (not rotated) or key-pca (keys alone).")] = "aqua",
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
    from aqua_attention.evaluate.retention import K_RATIOS, evaluate_retention
    from aqua_attention.files import write_json
    from aqua_attention.projections import Projections
    from aqua_attention.tables import retention_table
    from aqua_attention.text import load_text, text_digest, token_windows, tokenize

    learned, text = Projections.load(projections).with_basis(basis), load_text(data)
    loaded, tokenizer = _load(model, gguf_file, dtype, device, trust_remote_code)
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
    result |= {"model": model, "data": data, "text_sha256": text_digest(text), "context": windows.shape[1]}
    if json:
        write_json(json, result)
    print_table(retention_table(result))


@app.command()
def generate(
    model: Model,
    projections: ProjectionsFile,
    prompt: Annotated[str, typer.Option(help="What to continue; put into the model's chat template if it has one.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 64,
    k_ratio: Annotated[float, typer.Option(help="Share of dimensions multiplied, in (0, 1].")] = 0.75,
    s_ratio: SRatio = 0.0,
    selection: Selection = "magnitude",
    share: Share = "head",
    sink: Sink = 0,
    recent: Recent = 0,
    logit_error: LogitError = None,
    compare: Annotated[bool, typer.Option("--compare", help="Write the dense model's answer too.")] = False,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template.")] = True,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Continue a prompt with AQUA attention (greedy).

    Example: `aqua generate smollm2 -p smollm2.safetensors --prompt "What is a list?" --k-ratio 0.5
    --selection weighted --sink 4 --recent 64 --compare`
    """
    config = _config(k_ratio, s_ratio, selection, share, sink, recent, logit_error)
    check_writable(json)
    from aqua_attention.files import write_json
    from aqua_attention.generation import continue_prompt
    from aqua_attention.projections import Projections

    learned = Projections.load(projections)
    loaded, tokenizer = _load(model, gguf_file, dtype, device, trust_remote_code)

    def run(with_aqua: bool) -> str:
        return continue_prompt(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            projections=learned if with_aqua else None,
            config=config,
            chat=chat,
        ).text

    result: dict[str, Any] = {"prompt": prompt, "setting": config.to_dict()}
    if compare:
        result["dense"] = run(with_aqua=False)
    result["aqua"] = run(with_aqua=True)
    if json:
        write_json(json, result)
    if compare:
        typer.echo(f"--- dense\n{result['dense']}\n--- AQUA")
    typer.echo(result["aqua"])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for projections, table.md and summary.json.")] = Path("demo-out"),
    json: Json = None,
) -> None:
    """Fetch a small model, calibrate it, measure gain and loss, and let it write: everything in one go.

    Example: `aqua demo --out demo-out`
    """
    check_writable(json)
    from aqua_attention.demo import run_demo
    from aqua_attention.files import write_json
    from aqua_attention.tables import perplexity_table

    with progress_bars() as report:
        summary = run_demo(out, report)
    if json:
        write_json(json, summary)
    print_table(perplexity_table(summary))
    generation = summary["generation"]
    typer.echo(f"\nprompt: {generation['prompt']}\n\n--- dense\n{generation['dense']}")
    typer.echo(f"\n--- AQUA, half the dimensions\n{generation['aqua']}")
    minutes = sum(summary["seconds"].values()) / 60
    memory = summary["peak_memory_bytes"]
    used = f", peak memory {memory / 1e9:.1f} GB" if memory else ""
    typer.echo(f"\n{minutes:.1f} minutes{used}; results in {out}")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    warnings.showwarning = lambda message, *rest, **more: typer.echo(f"warning: {message}", err=True)
    try:
        app()
    except AquaError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        typer.echo(f"error: {reason}", err=True)
        sys.exit(1)


def _config(
    k_ratio: float, s_ratio: float, selection: str, share: str, sink: int, recent: int, logit_error: float | None
) -> AquaConfig:
    from aqua_attention.config import AquaConfig

    return AquaConfig(k_ratio, s_ratio, selection, share, sink, recent, logit_error)


def _load(
    model: str, gguf_file: str | None, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from aqua_attention.models import load_model

    return load_model(model, gguf_file=gguf_file, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


if __name__ == "__main__":
    main()
