# SPDX-License-Identifier: Apache-2.0
"""The commands that fill a folder of records, `aqua eval grid`, `transfer` and `context`; they only parse and print."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import Chat, Grid, ModelOptions, ProjectionsFile, Quick, Rows, Seed, Text
from aqua_attention.cli.outputs import check_writable
from aqua_attention.cli.terminal import Show, command_line, stoppable
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.io.files import check_room
from aqua_attention.io.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aqua_attention.evaluate.record import Record
    from aqua_attention.evaluate.run import Job
    from aqua_attention.evaluate.setting import Setting
    from aqua_attention.evaluate.suites.grid import Sizes
    from aqua_attention.evaluate.suites.transfer import Calibrator
    from aqua_attention.report.tables import Table

    Tables = Callable[[list[Record]], list[Table]]

DEFAULT_SUITES = ["perplexity"]
GRID_SUITES = ", ".join(name for name, suite in SUITES.items() if suite.jobs)
_notice = partial(typer.echo, err=True)
# Full, and quick.
CALIBRATION_TOKENS = 16384, 2048
TEST_TOKENS = 8192, 1024
CONTEXT = 2048, 512
WINDOWS = [512, 2048], [256, 512]
# The same in the words of the help.
CALIBRATED, TESTED, WINDOW = (
    "default: {}; quick: {}".format(*sizes) for sizes in (CALIBRATION_TOKENS, TEST_TOKENS, CONTEXT)
)
LENGTHS = "default: 512 2048; quick: 256 512"

TestTokens = Annotated[int | None, f"Tokens of each test ({TESTED})."]


@dataclass(frozen=True, kw_only=True)
class ResultsFolder(Show):
    """A folder of records, and a file for all of them.

    Raises:
        AquaError: one cannot be made or written. Nothing is made yet, so that a mistake leaves no empty folder.
    """

    folder: Annotated[Path, typer.Argument(help="Folder of results. If it exists, the run goes on in it.")]

    def __post_init__(self) -> None:
        folder, json, absolute = self.folder, self.json, self.folder.absolute()
        nearest = next((each for each in (absolute, *absolute.parents) if each.exists()), absolute)
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise AquaError(f"cannot make the folder {folder}: {nearest} is no folder that is writable; choose another")
        check_room(nearest / folder.name)
        if json is not None and json.resolve() == folder.resolve():
            raise AquaError(f"cannot write {json}: it is the results folder; give a file, such as {json / 'all.json'}")
        if json is None or json.absolute().parent.exists() or not json.resolve().is_relative_to(folder.resolve()):
            check_writable("figures", json)

    def calibrator(self, model: ModelOptions) -> Calibrator:
        """What calibrates a model for the measurements, and keeps its projections here."""
        from aqua_attention.evaluate.suites.transfer import Calibrator

        return Calibrator(self.folder, model.name, *model.load(), _notice)

    def measure(self, jobs: Sequence[Job], loaded: PreTrainedModel, tables: Tables, explained: bool = False) -> None:
        """Measure, write and print, for every kind of job. `explained`: the tables say why figures are missing."""
        from aqua_attention.evaluate.record import make_folder
        from aqua_attention.evaluate.run import facts_of, run_jobs
        from aqua_attention.report.record_tables import reasons

        make_folder(self.folder)
        if self.json:
            make_folder(self.json.absolute().parent)
        facts = facts_of(loaded, command_line())
        with stoppable(self._kept), progress_bar("settings") as progress:
            records = run_jobs(self.folder, jobs, facts, progress=progress, notice=_notice)
        self({"records": [record.to_dict() for record in records]}, *tables(records))
        for line in [] if explained else reasons(records):
            typer.echo(line)
        failed = sum(record.error is not None for record in records)
        missing = f", {failed} of them without figures" if failed else ""
        typer.echo(f"{len(records)} records{missing} in {self.folder / 'records'}")
        if failed == len(records):
            raise typer.Exit(1)

    def _kept(self) -> str:
        """What a stopped run leaves, in words."""
        kept = ("records/*.json", "records/*.state", "projections/[!.]*")
        if any(any(self.folder.glob(pattern)) for pattern in kept):
            return f"{self.folder} keeps what is done, the same command goes on"
        return "nothing was kept yet"


@dataclass(frozen=True)
class SizeOptions:
    """How much each suite reads. Sizes that are not given are those of a full or a quick grid."""

    quick: Quick = False
    context: Annotated[int | None, "Tokens in a window (default: 2048; quick: 1024)."] = None
    tokens: Annotated[int | None, "Tokens to read (default: perplexity 8192, retention 4096; quick: 2048, 1024)."] = (
        None
    )
    length: Annotated[
        list[int] | None,
        "Needle, RULER: tokens of the prompt; may be repeated (default: 1024 2048 4096; quick: 512 1024).",
    ] = None
    depth: Annotated[
        list[float] | None, "Needle: where it is; may be repeated (default: 0 0.25 0.5 0.75 1; quick: 0 0.5 1)."
    ] = None
    needles: Annotated[int | None, "Needle: how many are hidden, and asked for (default: 1)."] = None
    repeats: Annotated[int | None, "Needle: haystacks for each length and depth (default: 1)."] = None
    lines: Annotated[list[int] | None, "Lines in a question; may be repeated (default: 100 200; quick: 10 20)."] = None
    lines_file: Annotated[Path | None, "LongEval's .jsonl of line questions (default: generated questions)."] = None
    task: Annotated[list[str] | None, "RULER: a task; may be repeated (default: all; quick: five of them)."] = None
    questions: Annotated[
        Path | None, "RULER: for the task qa, questions about paragraphs, a .json in SQuAD's format."
    ] = None
    count: Annotated[
        int | None, "Questions for each number of lines, and each task and length of RULER (default: 50; quick: 4)."
    ] = None

    def sizes(self) -> Sizes:
        """What the suites take; a size given twice counts once.

        Raises:
            AquaError: lines of a file, and lines to generate; fewer tokens than can predict one.
        """
        if self.lines_file is not None and self.lines:
            both = f"--lines generates questions, --lines-file {self.lines_file} reads them"
            raise AquaError(f"{both}: give one of the two")
        from aqua_attention.evaluate.run import check_sizes
        from aqua_attention.evaluate.suites.grid import sizes_of

        check_sizes(context=self.context, tokens=self.tokens)
        given: dict[str, Any] = dict(vars(self))
        given |= {name: tuple(dict.fromkeys(each)) or None for name, each in given.items() if isinstance(each, list)}
        named = {f"{name}s": given.pop(name) for name in ("length", "depth", "task")}
        return sizes_of(**given, **named, retention_tokens=self.tokens)


def grid(
    *,
    results: ResultsFolder,
    projections: ProjectionsFile,
    suite: Annotated[list[str], f"What to measure: {GRID_SUITES}; may be repeated."] = DEFAULT_SUITES,
    k_ratio: Annotated[
        list[float] | None,
        "Share of the key dimensions that a query multiplies; may be repeated (default: the preset's).",
    ] = None,
    logit_error: Annotated[
        list[float] | None,
        "Variance of the logit error that a query may have, beside the k_ratios given; may be repeated.",
    ] = None,
    knobs: Grid,
    data: Text = "builtin:evaluation",
    given: SizeOptions,
    seed: Annotated[int, "Seed that chooses needles, haystacks, lines and RULER's questions."] = 0,
    chat: Chat = True,
    model: ModelOptions,
) -> None:
    """Measure every combination of the repeated options by every suite. Stopped, the same command goes on.

    Example: `aqua eval grid results smollm2 -p smollm2.safetensors --quick --suite perplexity --suite needle
    --k-ratio 1 --k-ratio 0.5 --h2o-ratio 1 --h2o-ratio 0.5`
    """
    sizes = given.sizes()
    from aqua_attention.evaluate.setting import grid_settings
    from aqua_attention.evaluate.suites.grid import check_suites, grid_jobs
    from aqua_attention.report.record_tables import record_table

    k_ratio = k_ratio or ([] if logit_error else knobs["k_ratio"])
    settings = grid_settings(knobs | {"k_ratio": k_ratio, "logit_error": logit_error or []})
    check_suites(suite, settings)
    subject = model.subject(projections, data, seed=seed, chat=chat)
    jobs = grid_jobs(subject, suite, settings, sizes)
    results.measure(jobs, subject.model, lambda records: [record_table(records)], explained=True)


def transfer(
    *,
    results: ResultsFolder,
    domain: Annotated[list[str], "NAME=TEXT: a kind of text, as a file or folder, or hub:name; give two or more."],
    knobs: Rows,
    calibration_tokens: Annotated[int | None, f"Tokens of each calibration ({CALIBRATED})."] = None,
    tokens: TestTokens = None,
    context: Annotated[int | None, f"Tokens in a window ({WINDOW})."] = None,
    quick: Quick = False,
    seed: Seed = 0,
    model: ModelOptions,
) -> None:
    """Calibrate on each kind of text and test on each: what is lost, and how far the rotations are apart.

    The first 80% of a text are for calibration, the rest for the test. The distance is the chordal one of the leading
    dimensions: 0 is the same, 1 as far as possible.

    Example: `aqua eval transfer results smollm2 --domain prose=novel.txt --domain code=src.txt --k-ratio 0.5`
    """
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.run import check_sizes
    from aqua_attention.evaluate.suites.transfer import check_domains, split_domain, transfer_jobs
    from aqua_attention.report.record_tables import transfer_tables

    settings, domains = _settings(knobs), []
    for each in domain:
        name, _, data = each.partition("=")
        if not (name and data):
            raise AquaError(f"domain is {each!r}: write NAME=TEXT, such as prose=novel.txt")
        domains.append(split_domain(name, data, load_text(data)))
    check_domains(domains)
    full = {"calibration_tokens": CALIBRATION_TOKENS, "tokens": TEST_TOKENS, "context": CONTEXT}
    given = {"calibration_tokens": calibration_tokens, "tokens": tokens, "context": context}
    sizes = {name: full[name][quick] if value is None else value for name, value in given.items()}
    check_sizes(**sizes)
    calibrator = results.calibrator(model)
    jobs = transfer_jobs(calibrator, domains, settings, **sizes, seed=seed)
    results.measure(jobs, calibrator.model, transfer_tables)


def context(
    *,
    results: ResultsFolder,
    calibrated_length: Annotated[
        list[int] | None, f"Tokens in a window of calibration; may be repeated ({LENGTHS})."
    ] = None,
    tested_length: Annotated[list[int] | None, f"Tokens in a window of the test; may be repeated ({LENGTHS})."] = None,
    calibration_tokens: Annotated[
        list[int] | None, f"Tokens to calibrate on; may be repeated, to see how many are enough ({CALIBRATED})."
    ] = None,
    calibration_data: Annotated[str, "Text to calibrate on."] = "builtin:calibration",
    data: Text = "builtin:evaluation",
    knobs: Rows,
    tokens: TestTokens = None,
    quick: Quick = False,
    seed: Seed = 0,
    model: ModelOptions,
) -> None:
    """Calibrate on windows of one length and test at another; calibrate on few tokens and on many.

    Examples: `aqua eval context results smollm2 --calibrated-length 512 --calibrated-length 2048 --k-ratio 0.5`

    `aqua eval context results smollm2 --calibrated-length 1024 --tested-length 1024 --calibration-tokens 1024
    --calibration-tokens 4096 --calibration-tokens 16384`
    """
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.run import check_sizes
    from aqua_attention.evaluate.suites.transfer import context_jobs
    from aqua_attention.report.record_tables import context_tables

    settings = _settings(knobs)
    calibration, test = (calibration_data, load_text(calibration_data)), (data, load_text(data))
    if calibration[1] == test[1]:
        raise AquaError(f"{data} is calibrated on and tested on: give two different texts")
    calibrated, tested = calibrated_length or WINDOWS[quick], tested_length or WINDOWS[quick]
    read = calibration_tokens or [CALIBRATION_TOKENS[quick]]
    tokens = TEST_TOKENS[quick] if tokens is None else tokens
    check_sizes(calibrated_length=calibrated, tested_length=tested, calibration_tokens=read, tokens=tokens)
    calibrator = results.calibrator(model)
    lengths = {"calibrated_lengths": calibrated, "tested_lengths": tested, "calibration_tokens": read}
    jobs = context_jobs(calibrator, calibration, test, settings, **lengths, tokens=tokens, seed=seed)
    results.measure(jobs, calibrator.model, context_tables)


def _settings(knobs: dict[str, list[Any]]) -> list[Setting]:
    """One setting a k_ratio, or one of `logit_error`; the other options are the same in all."""
    from aqua_attention.evaluate.setting import grid_settings

    return grid_settings(knobs if knobs["logit_error"] == [None] else knobs | {"k_ratio": []})
