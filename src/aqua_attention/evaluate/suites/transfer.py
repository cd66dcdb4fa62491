# SPDX-License-Identifier: Apache-2.0
"""Projections of one text tested on another: what is lost, how far the rotations are apart, how much text is enough.

Transfer: of one kind of text on others. Context: of windows of one length at others, and of so many tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.calibration.checkpoint import calibrated_weights, discard
from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.run import calibrate
from aqua_attention.config import AquaConfig
from aqua_attention.data.text import text_digest, token_windows, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import make_folder, provenance, record_key
from aqua_attention.evaluate.run import Job, Progress, check_sizes
from aqua_attention.evaluate.setting import Setting, Subject, dtype_of, first_windows, resolved_settings
from aqua_attention.evaluate.suites.perplexity import DenseLogits, perplexity_figures
from aqua_attention.io.files import json_digest, remove_leftovers
from aqua_attention.io.state import same_digest
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest

CALIBRATION_SHARE = 0.8
SPLIT = "calibrated on the first 80% of the characters, tested on the rest; no character is in both"


@dataclass(frozen=True)
class Domain:
    """A kind of text that the user calls `name` and names by `data`, in two parts that do not overlap."""

    name: str
    data: str
    calibration: str
    test: str


def split_domain(name: str, data: str, text: str) -> Domain:
    """Cut `text` after four fifths, at the end of a line where there is one; AquaError where a part would be blank."""
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
    for first, domain in combinations(domains, 2):
        if (first.calibration, first.test) == (domain.calibration, domain.test):
            raise AquaError(
                f"domains {first.name} ({first.data}) and {domain.name} ({domain.data}) are the same text: give each "
                "a text of its own"
            )


@dataclass(frozen=True)
class Calibration:
    """From which text, and how much of it, projections are calibrated: `name` is the text's, for people."""

    name: str
    text_sha256: str
    tokens: int
    context: int
    seed: int

    @property
    def sizes(self) -> dict[str, Any]:
        """What `calibrate` and `token_windows` call them."""
        return {"tokens": self.tokens, "context": self.context, "seed": self.seed}


@dataclass(eq=False, repr=False)
class Calibrator:
    """Calibrates one model, and keeps the results in `FOLDER/projections` and in memory; a stopped one goes on.

    `notice` is told about a damaged file, or one of other weights, which is made again.
    """

    folder: Path
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notice: Callable[[str], None] = lambda message: None
    _kept: dict[Calibration, Subject] = field(default_factory=dict, init=False)

    @cached_property
    def _weights(self) -> list[list[float]] | None:
        """Tells the model from another one of its name."""
        return key_weight_digest(attention_layers(self.model))

    def subject(self, calibration: Calibration, text: str, progress: Progress | None = None) -> Subject:
        """The model with projections that are calibrated so; AquaError as `calibrate`, or for another or short text."""
        if calibration not in self._kept:
            path = self._path(calibration)
            found = self._load(path) or self._calibrate(calibration, text, path, progress)
            given = self.name, self.model, self.tokenizer, found
            self._kept[calibration] = Subject(*given, rests_on=provenance(path, found))
        return self._kept[calibration]

    def _path(self, calibration: Calibration) -> Path:
        run = asdict(calibration) | {"model": self.name, "dtype": dtype_of(self.model)}
        # Names are the user's: a file takes of them what every system can store.
        plain = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in calibration.name)[:40]
        return self.folder / "projections" / f"{plain}-{json_digest(run)[:12]}.safetensors"

    def _load(self, path: Path) -> Projections | None:
        if not path.exists():
            return None
        problem = f"{path} is of other weights of {self.name}"
        try:
            found = Projections.load(path)
            if same_digest(found.model.get("key_weights"), self._weights):
                return found
        except AquaError as error:
            problem = str(error)
        self.notice(f"{problem}; it is made again now")
        return None

    def _calibrate(self, calibration: Calibration, text: str, path: Path, progress: Progress | None) -> Projections:
        if text_digest(text) != calibration.text_sha256:
            raise AquaError(f"the text {calibration.name!r} is not the one of this calibration: read it again")
        check_enough(self.tokenizer, calibration, text)
        make_folder(path.parent)
        partial = path.with_name(f"{path.name}.partial")
        if partial.exists() and not same_digest(calibrated_weights(partial), self._weights):
            self.notice(f"{partial} is of other weights of {self.name}; it is begun anew now")
            discard(partial)
        kept: dict[str, Any] = {"name": self.name, "checkpoint": partial, "resume": True}
        projections = calibrate(self.model, self.tokenizer, text, **calibration.sizes, **kept, progress=progress)
        projections.save(path)
        discard(partial)
        remove_leftovers(path)
        return projections


def check_enough(tokenizer: PreTrainedTokenizerBase, calibration: Calibration, text: str) -> None:
    """Raise AquaError when `text` has fewer tokens than `calibration` says, which would give it a wrong name."""
    if calibration.tokens < calibration.context:
        raise AquaError(
            f"calibration tokens are {calibration.tokens}, fewer than one window of {calibration.context}: give more "
            "tokens or shorter windows"
        )
    ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(ids, prefix=prefix, **calibration.sizes)
    if len(windows) < calibration.tokens // calibration.context:
        raise AquaError(
            f"the text {calibration.name!r} has {len(ids)} tokens to calibrate on, {calibration.tokens} are asked for: "
            "give more text, or ask for fewer"
        )


_Source = tuple[Calibration, str]
"""How projections are calibrated, and its text."""


@dataclass(frozen=True)
class _Cross:
    """Projections of `source` tested on `windows` of the text `tested`; those of `own` are the text's own.

    The record's key has the `options`, and its result begins with the `labels`.
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
    dense_logits, settings = DenseLogits(), resolved_settings(calibrator.model, settings)

    def measure(cross: _Cross, setting: Setting, progress: Progress, _: Path) -> dict[str, Any]:
        def half(place: int) -> Progress:
            return lambda done, total: progress(place * total + done, 2 * total)

        subject = calibrator.subject(*cross.source, half(0))
        own = calibrator.subject(*cross.own, half(0)) if cross.own else None
        figures = perplexity_figures(subject, setting, cross.windows, dense_logits=dense_logits, progress=half(1))
        distance = _distance(setting, subject, own) if own else {}
        names = ("projections", "projections_sha256", "calibration_tokens")
        return cross.labels | figures | distance | {name: subject.rests_on[name] for name in names}

    jobs = []
    for cross, setting in product(crosses, settings):
        windows = {"context": cross.windows.shape[1], "tokens": cross.windows.numel()}
        own: dict[str, Any] = {"config": setting.config.to_dict(), "basis": setting.basis}
        own |= {"options": cross.options | windows, "text_sha256": text_digest(cross.tested), "seed": seed}
        key = record_key(suite, model=calibrator.name, dtype=dtype_of(calibrator.model), **own)
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

    Its result is that of `perplexity_figures`, with `calibrated` and `tested` (names), `distance` (see
    `subspace_distance`) between the projections of the two domains, and `distance_dims`, of which subspaces.
    AquaError as `check_domains`, `check_sizes`, `check_enough` and `resolved_settings`.

    Args:
        calibration_tokens: that each projection sees. tokens: that each is tested on. context: in a window of both.
    """
    check_domains(domains)
    check_sizes(calibration_tokens=calibration_tokens, tokens=tokens, context=context)
    model, tokenizer = calibrator.model, calibrator.tokenizer
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

    Its result is that of `perplexity_figures`, with `calibrated_length`, `tested_length` and `calibration_tokens`
    (those that were read). AquaError as `check_sizes` and `resolved_settings`; a window longer than the test text or
    the positions.

    Args:
        calibration, test: names and texts, different ones.
        calibrated_lengths, tested_lengths: tokens in a window.
        calibration_tokens: each a calibration of its own for each length. tokens: tested, the same for all lengths.
    """
    lengths = {"calibrated_length": calibrated_lengths, "tested_length": tested_lengths}
    check_sizes(**lengths, calibration_tokens=calibration_tokens, tokens=tokens)
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


def _distance(setting: Setting, subject: Subject, own: Subject) -> dict[str, Any]:
    ours, theirs = (each.projections.with_basis(setting.basis) for each in (subject, own))
    dims = {index: leading_dims(setting.config, layer.rotation.shape[-1]) for index, layer in ours.layers.items()}
    return {"distance": subspace_distance(ours, theirs, dims), "distance_dims": max(dims.values())}


def leading_dims(config: AquaConfig, head_dim: int) -> int:
    """The k whose subspaces are compared: that of the setting, or half of the dimensions where k is adaptive."""
    return config.selected_dims(head_dim) if config.logit_error is None else max(1, head_dim // 2)


def subspace_distance(first: Projections, second: Projections, dims: dict[int, int]) -> float:
    """Mean over layers and key-value heads of the chordal distance of the leading subspaces of two projections.

    For subspaces with orthonormal bases U and V, [d, k], that is sqrt((k - |U^T V|_F^2) / min(k, d - k)): the chordal
    (projection) distance |U U^T - V V^T|_F / sqrt(2) over the largest that two subspaces of this size can have. 0: the
    same subspaces; 1: as far apart as possible; two random ones: about sqrt(max(k, d - k) / d). The whole space
    (k = d) is at distance 0 from itself. `dims` has k by layer index.
    """
    distances = []
    for index, layer in first.layers.items():
        k, dim = dims[index], layer.rotation.shape[-1]
        ours, theirs = layer.rotation[..., :k].double(), second.layers[index].rotation[..., k:].double()
        # What of ours lies in their other dimensions, k - |U^T V|_F^2, without the difference of two large numbers.
        beyond = (theirs.transpose(-1, -2) @ ours).square().sum((-1, -2))
        distances.append((beyond / max(1, min(k, dim - k))).sqrt())
    return float(torch.cat(distances).mean())
