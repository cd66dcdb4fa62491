# SPDX-License-Identifier: Apache-2.0
"""Projections of one text tested on another: what is lost, how far the rotations are apart, how much text is enough.

Transfer: of one kind of text on others. Context: of windows of one length at others, and of so many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.data.text import text_digest, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.calibrated import Calibration, Calibrator, check_enough
from aqua_attention.evaluate.run import Job, Progress, check_sizes, halves
from aqua_attention.evaluate.setting import Setting, in_basis, resolved_settings
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


_Source = tuple[Calibration, str]
"""How projections are calibrated, and its text."""


@dataclass(frozen=True)
class _Cross:
    """Projections of `source` tested on `windows` of the text `tested`.

    Attributes:
        options: of the record's key.
        labels: how the result begins.
        own: those of the tested domain, whose distance is told.
    """

    source: _Source
    windows: Tensor
    tested: str
    options: dict[str, Any]
    labels: dict[str, Any]
    own: _Source | None = None


def _jobs(
    suite: str, calibrator: Calibrator, settings: Sequence[Setting], crosses: Sequence[_Cross], seed: int
) -> list[Job]:
    """A job for each of `crosses` and setting; its result is what `perplexity_figures` gives, and more."""
    dense_logits, model = DenseLogits(), calibrator.model

    def measure(cross: _Cross, setting: Setting, progress: Progress) -> dict[str, Any]:
        calibrating, testing = halves(progress)
        projections, sha256 = calibrator.projections(*cross.source, calibrating)
        own = calibrator.projections(*cross.own, calibrating)[0] if cross.own else None
        figures = perplexity_figures(
            model, projections, setting, cross.windows, dense_logits=dense_logits, progress=testing
        )
        distance = {} if own is None else _distance(setting, projections, own)
        read = {"calibration_tokens": projections.calibration["tokens"], "projections_sha256": sha256}
        return cross.labels | figures | distance | read

    jobs = []
    for cross, setting in product(crosses, settings):
        windows = {"context": cross.windows.shape[1], "tokens": cross.windows.numel()}
        read = {"text_sha256": text_digest(cross.tested), "seed": seed}
        key = measured_key(suite, calibrator.name, model, setting, cross.options | windows, **read)
        jobs.append(Job(key, partial(measure, cross, setting)))
    return jobs


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
    settings, model, tokenizer = resolved_settings(calibrator.model, settings), calibrator.model, calibrator.tokenizer
    sources, crosses = [], []
    for domain in domains:
        digest = text_digest(domain.calibration)
        learn = Calibration(domain.name, digest, tokens=calibration_tokens, context=context, seed=seed)
        check_enough(tokenizer, learn, domain.calibration)
        sources.append((learn, domain.calibration))
    for tested, own in zip(domains, sources, strict=True):
        windows = first_windows(model, tokenize(tokenizer, tested.test), tokens, context)
        for calibrated, source in zip(domains, sources, strict=True):
            options = {
                "calibrated": asdict(source[0]) | {"data": calibrated.data},
                "tested": {"name": tested.name, "data": tested.data},
                "split": SPLIT,
            }
            labels = {"calibrated": calibrated.name, "tested": tested.name}
            crosses.append(_Cross(source, windows, tested.test, options, labels, own))
    return _jobs("transfer", calibrator, settings, crosses, seed)


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
    lengths = {"calibrated_length": calibrated_lengths, "tested_length": tested_lengths}
    check_sizes(**lengths, calibration_tokens=calibration_tokens, tokens=tokens)
    settings = resolved_settings(calibrator.model, settings)
    (source, source_text), (data, text) = calibration, test
    digest, tokenized = text_digest(source_text), tokenize(calibrator.tokenizer, text)
    crosses = []
    for length in dict.fromkeys(tested_lengths):
        windows = first_windows(calibrator.model, tokenized, max(tokens, length), length)
        for context, count in product(dict.fromkeys(calibrated_lengths), dict.fromkeys(calibration_tokens)):
            learn = Calibration(source, digest, tokens=count, context=context, seed=seed)
            options = {"data": data, "calibrated": asdict(learn)}
            labels = {"calibrated_length": context, "tested_length": length, "calibration_tokens": count}
            crosses.append(_Cross((learn, source_text), windows, text, options, labels))
    return _jobs("context", calibrator, settings, crosses, seed)


def _distance(setting: Setting, projections: Projections, own: Projections) -> dict[str, Any]:
    heads = {index: layer.rotation.shape[-1] for index, layer in projections.layers.items()}
    dims = {index: leading_dims(setting.config, head_dim) for index, head_dim in heads.items()}
    ours, theirs = (in_basis(each, setting.basis) for each in (projections, own))
    return {"distance": subspace_distance(ours, theirs, dims), "distance_dims": max(dims.values())}


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
