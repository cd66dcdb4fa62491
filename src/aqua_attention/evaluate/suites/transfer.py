# SPDX-License-Identifier: Apache-2.0
"""Projections of one kind of text tested on others: what is lost, and how far the rotations are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.data.text import text_digest, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.calibrated import Calibration, Calibrator, check_enough
from aqua_attention.evaluate.run import Job, Progress, check_sizes, halves
from aqua_attention.evaluate.setting import Setting, resolved_settings
from aqua_attention.evaluate.suites.grid import first_windows, measured_key
from aqua_attention.evaluate.suites.perplexity import DenseLogits, perplexity_figures

CALIBRATION_SHARE = 0.8
SPLIT = "calibrated on the first 80% of the characters, tested on the rest; no character is in both"


@dataclass(frozen=True)
class Domain:
    """A kind of text, in two parts that do not overlap.

    Attributes:
        name, data: what the user calls it, and where it is.
        calibration: the first four fifths. test: the rest.
    """

    name: str
    data: str
    calibration: str
    test: str


def split_domain(name: str, data: str, text: str) -> Domain:
    """Cut `text` into its two parts, at the end of a line where there is one.

    Raises:
        AquaError: a part would be blank.
    """
    least = int(len(text) * CALIBRATION_SHARE)
    line = text.find("\n", least)
    cut = line + 1 if 0 <= line < len(text) - 1 and text[line:].strip() else least
    first, rest = text[:cut], text[cut:]
    if not (first.strip() and rest.strip()):
        raise AquaError(f"the text of domain {name!r} ({data}) is too short to calibrate on and to test: give more")
    return Domain(name, data, first, rest)


def check_domains(domains: Sequence[Domain]) -> None:
    """Raise AquaError for fewer than two domains, and for two of one name or of one text."""
    names = [domain.name for domain in domains]
    if len(set(names)) < max(2, len(names)):
        raise AquaError(f"domains are {', '.join(names) or 'none'}: give at least two, each with a name of its own")
    seen: dict[tuple[str, str], Domain] = {}
    for domain in domains:
        first = seen.setdefault((domain.calibration, domain.test), domain)
        if first is not domain:
            raise AquaError(
                f"domains {first.name} ({first.data}) and {domain.name} ({domain.data}) are the same text: give each "
                "a text of its own"
            )


def transfer_jobs(
    calibrator: Calibrator,
    domains: Sequence[Domain],
    settings: Sequence[Setting],
    *,
    calibration_tokens: int,
    tokens: int,
    context: int,
    seed: int,
) -> list[Job]:
    """A job for every test text, calibration text and setting.

    Its result is what `perplexity_figures` gives, with `calibrated` and `tested` (names), `distance` (see
    `subspace_distance`) between the projections of the two domains, and `distance_dims`, of which subspaces.

    Args:
        calibration_tokens: how many tokens each projection sees. tokens: how many each is tested on.
        context: tokens in a window, of both.

    Raises:
        AquaError: fewer than two domains, two of one name or text, a text with too few tokens for its part, sizes below
            2, a `min_length` of "auto" where nothing is known of this machine.
    """
    check_domains(domains)
    check_sizes(calibration_tokens=calibration_tokens, tokens=tokens, context=context)
    settings = resolved_settings(calibrator.model, settings)
    dense_logits, model = DenseLogits(), calibrator.model
    sources = {
        domain.name: Calibration(
            domain.name, text_digest(domain.calibration), tokens=calibration_tokens, context=context, seed=seed
        )
        for domain in domains
    }

    def learned(domain: Domain, progress: Progress) -> tuple[Projections, str]:
        return calibrator.projections(sources[domain.name], domain.calibration, progress)

    def measure(
        calibrated: Domain, tested: Domain, windows: Tensor, setting: Setting, progress: Progress
    ) -> dict[str, Any]:
        calibrating, testing = halves(progress)
        projections, sha256 = learned(calibrated, calibrating)
        own, _ = learned(tested, calibrating)
        figures = perplexity_figures(model, projections, setting, windows, dense_logits, progress=testing)
        dims = {
            index: leading_dims(setting.config, layer.rotation.shape[-1]) for index, layer in projections.layers.items()
        }
        return {
            "calibrated": calibrated.name,
            "tested": tested.name,
            **figures,
            "distance": subspace_distance(projections.with_basis(setting.basis), own.with_basis(setting.basis), dims),
            "distance_dims": max(dims.values()),
            "calibration_tokens": projections.calibration["tokens"],
            "projections_sha256": sha256,
        }

    for domain in domains:
        check_enough(calibrator.tokenizer, sources[domain.name], domain.calibration)
    jobs = []
    for tested in domains:
        windows = first_windows(model, tokenize(calibrator.tokenizer, tested.test), tokens, context)
        read = {"text_sha256": text_digest(tested.test), "seed": seed}
        for calibrated in domains:
            options = {
                "calibrated": asdict(sources[calibrated.name]) | {"data": calibrated.data},
                "tested": {"name": tested.name, "data": tested.data},
                "split": SPLIT,
                "context": windows.shape[1],
                "tokens": windows.numel(),
            }
            for setting in settings:
                key = measured_key("transfer", calibrator.name, model, setting, options, **read)
                jobs.append(Job(key, partial(measure, calibrated, tested, windows, setting)))
    return jobs


def leading_dims(config: AquaConfig, head_dim: int) -> int:
    """The k whose subspaces are compared: that of the setting, or half of the dimensions where k is adaptive."""
    return config.selected_dims(head_dim) if config.logit_error is None else max(1, head_dim // 2)


def subspace_distance(first: Projections, second: Projections, dims: dict[int, int]) -> float:
    """Mean over layers and key-value heads of the chordal distance of the leading subspaces of two projections.

    For subspaces with orthonormal bases U and V, [d, k], that is sqrt((k - |U^T V|_F^2) / min(k, d - k)): the chordal
    (projection) distance |U U^T - V V^T|_F / sqrt(2) over the largest that two subspaces of this size can have. 0: the
    same subspaces; 1: as far apart as possible; two random ones: about sqrt(max(k, d - k) / d). The whole space
    (k = d) is at distance 0 from itself.

    Args:
        dims: by layer index, k.
    """
    distances = []
    for index, layer in first.layers.items():
        k, dim = dims[index], layer.rotation.shape[-1]
        if k == dim:
            distances.append(torch.zeros(len(layer.rotation), dtype=torch.float64))
            continue
        ours, theirs = layer.rotation[..., :k].double(), second.layers[index].rotation[..., k:].double()
        # What of ours lies in their other dimensions, k - |U^T V|_F^2, without the difference of two large numbers.
        beyond = (theirs.transpose(-1, -2) @ ours).square().sum((-1, -2))
        distances.append((beyond / min(k, dim - k)).sqrt())
    return float(torch.cat(distances).mean())
