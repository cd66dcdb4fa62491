# SPDX-License-Identifier: Apache-2.0
"""Projections calibrated on windows of one length and tested at others, from so many tokens: how much is enough?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

from aqua_attention.data.text import text_digest, tokenize
from aqua_attention.evaluate.calibrated import Calibration, Calibrator
from aqua_attention.evaluate.run import Job, Progress, check_sizes, halves
from aqua_attention.evaluate.setting import Setting, resolved_settings
from aqua_attention.evaluate.suites.grid import first_windows, measured_key
from aqua_attention.evaluate.suites.perplexity import DenseLogits, perplexity_figures


def context_jobs(
    calibrator: Calibrator,
    calibration: tuple[str, str],
    test: tuple[str, str],
    settings: Sequence[Setting],
    *,
    calibrated_lengths: Sequence[int],
    tested_lengths: Sequence[int],
    calibration_tokens: Sequence[int],
    tokens: int,
    seed: int,
) -> list[Job]:
    """A job for every length tested, length calibrated, number of calibration tokens, and setting.

    Its result is what `perplexity_figures` gives, with `calibrated_length`, `tested_length` and `calibration_tokens`
    (those really read).

    Args:
        calibration, test: names and texts, different ones.
        calibrated_lengths, tested_lengths: tokens in a window.
        calibration_tokens: numbers of tokens, each a calibration of its own for each length.
        tokens: how many tokens are tested, the same for all lengths.

    Raises:
        AquaError: the test text is shorter than a window, a window longer than the model's positions, sizes below 2, a
            `min_length` of "auto" where nothing is known of this machine.
    """
    check_sizes(
        calibrated_length=calibrated_lengths,
        tested_length=tested_lengths,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
    )
    settings = resolved_settings(calibrator.model, settings)
    dense_logits, model = DenseLogits(), calibrator.model
    (source, source_text), (data, text) = calibration, test
    digest, read = text_digest(source_text), {"text_sha256": text_digest(text), "seed": seed}
    tokenized = tokenize(calibrator.tokenizer, text)

    def measure(learn: Calibration, windows: Tensor, setting: Setting, progress: Progress) -> dict[str, Any]:
        calibrating, testing = halves(progress)
        projections, sha256 = calibrator.projections(learn, source_text, calibrating)
        return {
            "calibrated_length": learn.context,
            "tested_length": windows.shape[1],
            "calibration_tokens": projections.calibration["tokens"],
            **perplexity_figures(model, projections, setting, windows, dense_logits, progress=testing),
            "projections_sha256": sha256,
        }

    jobs = []
    for length in dict.fromkeys(tested_lengths):
        windows = first_windows(model, tokenized, max(tokens, length), length)
        for context, count in product(dict.fromkeys(calibrated_lengths), dict.fromkeys(calibration_tokens)):
            learn = Calibration(source, digest, tokens=count, context=context, seed=seed)
            options = {"data": data, "calibrated": asdict(learn), "context": length, "tokens": windows.numel()}
            for setting in settings:
                key = measured_key("context", calibrator.name, model, setting, options, **read)
                jobs.append(Job(key, partial(measure, learn, windows, setting)))
    return jobs
