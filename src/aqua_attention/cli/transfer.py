# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua eval transfer` and `context`: calibrated on one text, or length, and tested on another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from aqua_attention.cli.options import EvaluationData, ModelOptions, Quick, Rows, Seed
from aqua_attention.cli.records import ResultsFolder
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from aqua_attention.evaluate.setting import Setting

# Full, and quick.
CALIBRATION_TOKENS = 16384, 2048
TEST_TOKENS = 8192, 1024
CONTEXT = 2048, 512
WINDOWS = [512, 2048], [256, 512]
# The same in the words of the help.
CALIBRATED, TESTED, WINDOW = ("{}; quick {}".format(*sizes) for sizes in (CALIBRATION_TOKENS, TEST_TOKENS, CONTEXT))
LENGTHS = "512 2048; quick 256 512"

TestTokens = Annotated[int | None, f"Tokens that each is tested on ({TESTED})."]


def transfer(
    *,
    results: ResultsFolder,
    domain: Annotated[list[str], "NAME=TEXT, a text as --data takes; repeat, at least two."],
    knobs: Rows,
    calibration_tokens: Annotated[int | None, f"Tokens that each projection is calibrated on ({CALIBRATED})."] = None,
    tokens: TestTokens = None,
    context: Annotated[int | None, f"Tokens in a window ({WINDOW})."] = None,
    quick: Quick = False,
    seed: Seed = 0,
    model: ModelOptions,
) -> None:
    """Projections calibrated on each kind of text, tested on each: loss, and how far the rotations are apart.

    The first 80% of a text calibrate, the rest tests. Distance: chordal, of the leading dimensions; 0 the same, 1 as
    far as possible.

    Example: `aqua eval transfer results smollm2 --domain prose=novel.txt --domain code=src.txt --k-ratio 0.5`
    """
    from aqua_attention.data.text import load_text
    from aqua_attention.evaluate.run import check_sizes
    from aqua_attention.evaluate.suites.transfer import check_domains, split_domain, transfer_jobs
    from aqua_attention.report.record_tables import transfer_tables

    settings, domains = _settings(knobs), []
    for given in domain:
        name, separator, data = given.partition("=")
        if not (separator and name and data):
            raise AquaError(f"domain is {given!r}: write NAME=TEXT, such as prose=novel.txt")
        domains.append(split_domain(name, data, load_text(data)))
    check_domains(domains)
    sizes = {
        "calibration_tokens": CALIBRATION_TOKENS[quick] if calibration_tokens is None else calibration_tokens,
        "tokens": TEST_TOKENS[quick] if tokens is None else tokens,
        "context": CONTEXT[quick] if context is None else context,
    }
    check_sizes(**sizes)
    calibrator = results.calibrator(model)
    jobs = transfer_jobs(calibrator, domains, settings, **sizes, seed=seed)
    results.measure(jobs, calibrator.model, transfer_tables)


def context(
    *,
    results: ResultsFolder,
    calibrated_length: Annotated[list[int] | None, f"Tokens in a window of calibration; repeat ({LENGTHS})."] = None,
    tested_length: Annotated[list[int] | None, f"Tokens in a window of the test; repeat ({LENGTHS})."] = None,
    calibration_tokens: Annotated[
        list[int] | None, f"Tokens to calibrate on; repeat, to see how many are enough ({CALIBRATED})."
    ] = None,
    calibration_data: Annotated[str, "Text to calibrate on."] = "builtin:calibration",
    data: EvaluationData = "builtin:evaluation",
    knobs: Rows,
    tokens: TestTokens = None,
    quick: Quick = False,
    seed: Seed = 0,
    model: ModelOptions,
) -> None:
    """Calibrated on windows of one length and tested at another; calibrated on few tokens and on many.

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
