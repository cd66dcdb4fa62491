# SPDX-License-Identifier: Apache-2.0
"""What every evaluation measures: a subject, and settings that are attached to its model, a row each."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach.apply import Attachment, layer_shape
from aqua_attention.calibration.projections import Projections, check_basis
from aqua_attention.config import AUTO, DECODING, DENSE_PROMPTS, QUERIES_WITHOUT_EVICTION, AquaConfig, knobs
from aqua_attention.data.text import text_digest, token_windows, tokenize, warn_of_windows
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import record_key
from aqua_attention.evaluate.run import Job, Progress, facts_of_model
from aqua_attention.machine import resolved
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.limits import check_tokens
from aqua_attention.model.sides import TEXT
from aqua_attention.ops.plan import Reading

READ = ("tokens_read", "bytes_read")
"""Figures of a run that chooses tokens: shares of what is seen, and of what dense attention reads."""


@dataclass(frozen=True)
class Setting:
    """The knobs, and the basis they work in, see `Projections.with_basis`."""

    config: AquaConfig
    basis: str = "aqua"

    def __post_init__(self) -> None:
        check_basis(self.basis)


@dataclass(frozen=True)
class Subject:
    """A model with its projections, and what it reads.

    Attributes:
        name, data: the model and what it reads, as the user named them.
        tokenizer, text: None and empty for images.
        rests_on: the `provenance` of the projections.
        seed: chooses needles, haystacks, lines and RULER's questions.
        chat: put questions into the tokenizer's chat template, if it has one.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    projections: Projections
    data: str = ""
    text: str = ""
    rests_on: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    chat: bool = True

    def windows(self, tokens: int, context: int) -> Tensor:
        """Windows from the text's start, [count, context]."""
        return first_windows(self.model, tokenize(self.tokenizer, self.text), tokens, context)

    def read(self, windows: Tensor) -> dict[str, Any]:
        """What the options of a record say of windows of the subject's text."""
        return {"data": self.data, "context": windows.shape[1], "tokens": windows.numel()}

    def source(self) -> dict[str, Any]:
        """What a command says of it beside the figures."""
        digest = {"text_sha256": text_digest(self.text)} if self.text else {}
        named = {"model": self.name, "dtype": dtype_of(self.model), "data": self.data}
        return named | digest | self.rests_on | facts_of_model(self.model)

    def jobs(
        self,
        suite: str,
        settings: Sequence[Setting | None],
        options: dict[str, Any],
        measure: Callable[[Any, Progress, Path], dict[str, Any]],
        **other: Any,
    ) -> list[Job]:
        """A job a setting, which calls measure(setting, progress, state), see `Job`; `options` and `other` are of the
        record's key.

        A setting of None is the dense model, whose figures are the same whatever the projections.
        """
        jobs, same = [], {"model": self.name, "dtype": dtype_of(self.model), "options": options} | other
        for setting in settings:
            own: dict[str, Any] = {"config": None}
            rests_on: dict[str, Any] = {}
            if setting is not None:
                own, rests_on = {"config": setting.config.to_dict(), "basis": setting.basis}, self.rests_on
                own["projections_sha256"] = rests_on.get("projections_sha256")
            jobs.append(Job(record_key(suite, **same, **own), partial(measure, setting), rests_on))
        return jobs


def dtype_of(model: PreTrainedModel) -> str:
    """Such as "float32"."""
    return str(model.dtype).removeprefix("torch.")


class Run:
    """A setting with its attachment, not attached yet, and how many dimensions it multiplies.

    In `setting`, a `min_length` of "auto" is a number.
    """

    def __init__(self, model: PreTrainedModel, projections: Projections, setting: Setting) -> None:
        """`projections` are in the setting's basis."""
        self.attachment = Attachment(model, projections, setting.config)
        self.attachment.on_selection = self._count
        self.attachment.on_reading = self._count_read
        self.setting = replace(setting, config=self.attachment.config)
        # By layer, summed over queries; the first on the model's device, so that counting never waits for a GPU.
        self._selected: dict[int, Tensor | int] = {}
        self._selectable: dict[int, int] = {}
        self._read: dict[int, Tensor] = {}

    def _count(self, layer: int, selected: Tensor | None, queries: torch.Size, head_dim: int) -> None:
        rows = queries.numel() // queries[-1]
        chosen = rows * queries[-1] if selected is None else selected.sum()
        self._selected[layer] = self._selected.get(layer, 0) + chosen
        self._selectable[layer] = self._selectable.get(layer, 0) + rows * head_dim

    def _count_read(self, layer: int, reading: Reading) -> None:
        read, seen, share = reading
        found = torch.stack([read.sum(), seen.sum(), (share * seen).sum()]).double()
        self._read[layer] = self._read[layer].to(found.device) + found if layer in self._read else found

    def head(self) -> dict[str, Any]:
        """How the row of every evaluation begins: `setting` (the AquaConfig's fields) and `basis`."""
        return {"setting": self.setting.config.to_dict(), "basis": self.setting.basis}

    def mean_k(self) -> float:
        """Share of head_dim that was multiplied outside the exact window, mean over all queries of all layers."""
        return sum(int(count) for count in self._selected.values()) / sum(self._selectable.values())

    def shares(self) -> dict[str, float]:
        """`mean_k`, and where tokens are chosen `tokens_read` and `bytes_read`, shares of all that is seen."""
        return {"mean_k": self.mean_k()} | {
            name: float(part.sum() / whole.sum()) for name, part, whole in self._reads()
        }

    def mean_ks(self) -> dict[str, Any]:
        """`shares`, and each also for each layer, as a list in `mean_k_per_layer` and so on."""
        layers = [int(self._selected[layer]) / self._selectable[layer] for layer in sorted(self._selected)]
        found = self.shares() | {"mean_k_per_layer": layers}
        return found | {f"{name}_per_layer": (part / whole).tolist() for name, part, whole in self._reads()}

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as JSON values."""
        selected = {str(layer): int(count) for layer, count in self._selected.items()}
        read = {str(layer): sums.tolist() for layer, sums in self._read.items()}
        selectable = {str(layer): count for layer, count in self._selectable.items()}
        return {"selected": selected, "selectable": selectable, "read": read}

    def restore(self, counts: dict[str, Any]) -> None:
        """Go on from what `counts` gave; nothing where it is empty."""
        for layer, count in counts.get("selected", {}).items():
            self._selected[int(layer)] = int(count)
            self._selectable[int(layer)] = int(counts["selectable"][layer])
        for layer, sums in counts.get("read", {}).items():
            self._read[int(layer)] = torch.tensor(sums, dtype=torch.float64)

    def _reads(self) -> list[tuple[str, Tensor, Tensor]]:
        if not self._read:
            return []
        read, seen, shares = torch.stack([self._read[layer].cpu() for layer in sorted(self._read)]).unbind(1)
        return list(zip(READ, (read, shares), (seen, seen), strict=True))


def warn_of_dense_prompts(settings: Sequence[Setting]) -> None:
    """Of settings that leave prompts dense, where only prompts are looked at."""
    if any(setting.config.select_in == DECODING for setting in settings):
        warnings.warn(DENSE_PROMPTS, stacklevel=3)


def runs_of(subject: Subject, settings: Sequence[Setting], side: str = TEXT) -> list[Run]:
    """A run for each setting, under which `side` is read; AquaError as `apply` and `check_covered`."""
    by_basis = {basis: subject.projections.with_basis(basis) for basis in {setting.basis for setting in settings}}
    runs = [Run(subject.model, by_basis[setting.basis], setting) for setting in settings]
    for run in runs:
        check_covered(subject.model, run.attachment.sides, (side,))
    return runs


def check_covered(model: PreTrainedModel, covered: Collection[str], read: Collection[str]) -> None:
    """Raise AquaError when the projections cover no layer of any side that is read, see `sides`."""
    if not set(covered) & set(read):
        side = " and ".join(sorted(read))
        raise AquaError(
            f"the projections have no layers that read {side}: calibrate {type(model).__name__} on {side}, and "
            "join the two files by `aqua merge`"
        )


def first_windows(model: PreTrainedModel, tokenized: tuple[list[int], list[int]], tokens: int, context: int) -> Tensor:
    """Windows from the start of a text, [count, context], checked; see `text.tokenize` for `tokenized`."""
    ids, prefix = tokenized
    windows = token_windows(ids, tokens=tokens, context=context, seed=None, prefix=prefix)
    check_tokens(model, windows, context=windows.shape[1])
    warn_of_windows(windows, tokens)
    return windows


def resolved_settings(model: PreTrainedModel, settings: Sequence[Setting]) -> list[Setting]:
    """The settings with a number for a `min_length` of "auto", each once; AquaError as `machine.resolved`."""
    if all(setting.config.min_length != AUTO for setting in settings):
        return list(settings)
    shapes = [layer_shape(layer, model.dtype) for layer in attention_layers(model)]
    return list(dict.fromkeys(replace(setting, config=resolved(setting.config, shapes)) for setting in settings))


_FASTEST = ("min_length", "bits", "h2o_ratio", "h2o_queries", "s_ratio")
"""The knobs that vary fastest in a grid, but for k; before them the others, in the order of their declaration."""


def grid_settings(values: Mapping[str, Iterable[Any]]) -> list[Setting]:
    """Every combination, each once; AquaError for a value that no setting can have.

    Args:
        values: of each knob, and of `basis`; what is left out has its default. `k_ratio` and `logit_error` are one
            list: a setting has either. None is no `logit_error`. `h2o_queries` is for an `h2o_ratio` below 1.
    """
    declared, either = knobs(), ("k_ratio", "logit_error")

    def of(name: str) -> list[Any]:
        is_float = declared[name].type is float
        return [float(value) if is_float and value is not None else value for value in values.get(name, ())]

    amounts = [{name: value} for name in either for value in of(name) if value is not None]
    names = [name for name in declared if name in values and name not in either]
    names.sort(key=lambda name: _FASTEST.index(name) if name in _FASTEST else -1)
    if not any(ratio < 1 for ratio in of("h2o_ratio")) and any(count is not None for count in of("h2o_queries")):
        warnings.warn(QUERIES_WITHOUT_EVICTION, stacklevel=2)
    settings = []
    for basis, *chosen, amount in product(values.get("basis", ["aqua"]), *map(of, names), amounts):
        given = dict(zip(names, chosen, strict=True)) | amount
        if not given.get("h2o_ratio", 1) < 1:
            given.pop("h2o_queries", None)
        settings.append(Setting(AquaConfig(**given), basis))
    if not settings:
        raise AquaError("there is no setting to measure: give at least one k_ratio or logit_error")
    return list(dict.fromkeys(settings))
