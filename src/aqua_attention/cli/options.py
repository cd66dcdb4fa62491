# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they make together: a model, windows of a text, settings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.spread import Knobs
from aqua_attention.config import AquaConfig, knobs
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aqua_attention.calibration.projections import Projections
    from aqua_attention.evaluate.setting import Setting, Subject

Dtype = Annotated[str, "auto, float32, bfloat16 or float16."]
Device = Annotated[str | None, "cpu, cuda, cuda:1, ... (default: cuda when there is one)."]
ProjectionsFile = Annotated[Path, "--projections", "-p", "File made by `aqua calibrate`."]
Context = Annotated[int, "Tokens in a window."]
Text = Annotated[str, "Text: builtin:evaluation, a file or folder, hub:name."]
Tokens = Annotated[int, "How many tokens to read, from the start of the text."]
Chat = Annotated[bool, "Put the prompt into the model's chat template, if it has one."]
Seed = Annotated[int, "Seed that chooses the windows to calibrate on."]
Quick = Annotated[bool, "--quick", "Read short texts, which takes minutes for the default model."]

Rows = Annotated[dict[str, list[Any]], Knobs(repeat=("k_ratio",))]
"""A row a `k_ratio`; the other knobs are the same in all."""
# `h2o_queries` is for what evicts, whatever its share.
Grid = Annotated[dict[str, list[Any]], Knobs(repeat=(*(name for name in knobs() if name != "h2o_queries"), "basis"))]
"""Every combination of all knobs."""


@dataclass(frozen=True)
class ModelOptions:
    """A model, and how it is loaded."""

    model: Annotated[str, typer.Argument(help="smollm2 (fetched once), a local folder, a .gguf file, or a hub id.")]
    gguf_file: Annotated[str | None, "Name of a GGUF file in the model's folder or hub repository."] = None
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: Annotated[
        bool, "--trust-remote-code", "Run code that comes with the model: only if you trust it."
    ] = False

    @property
    def name(self) -> str:
        """The model in a record: a folder may hold several GGUF files."""
        return f"{self.model}:{self.gguf_file}" if self.gguf_file else self.model

    def load(self, predicts: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer.

        Args:
            predicts: whether it has to predict next tokens, which an encoder does not.
        """
        from aqua_attention.data.models import load_model
        from aqua_attention.model.limits import check_predicts

        given = dict(vars(self))
        loaded, tokenizer = load_model(given.pop("model"), **given)
        if predicts:
            check_predicts(loaded)
        return loaded, tokenizer

    def subject(
        self,
        projections: Path,
        data: str,
        *,
        reads: bool = True,
        basis: str = "",
        predicts: bool = True,
        **options: Any,
    ) -> Subject:
        """What is measured: the model, its projections from a file, in another basis where one is named, and a text.

        Args:
            reads: whether `data` names that text.
            options: those of `Subject`.
        """
        from aqua_attention.data.text import load_text
        from aqua_attention.evaluate.record import provenance
        from aqua_attention.evaluate.setting import Subject

        text, learned = load_text(data) if reads else "", load_projections(projections)
        learned = learned.with_basis(basis) if basis else learned
        loaded, rests_on = self.load(predicts), provenance(projections, learned)
        return Subject(self.name, *loaded, learned, data, text, rests_on=rests_on, **options)


@dataclass(frozen=True)
class Serving:
    """How `generate` decodes under AQUA, as `apply` takes it."""

    layout: Annotated[
        str, "Layout of the cache: auto, tiled (for the decoding kernels) or plain (grows with each token)."
    ] = "auto"
    record: Annotated[bool, "On a GPU, record decoding steps as a CUDA graph and replay it."] = True
    compile: Annotated[bool, "Compile norms, MLPs and rotary embeddings for recorded steps."] = True


@dataclass(frozen=True)
class Basis:
    """Which basis is calibrated, and at which positions windows are read."""

    basis: Annotated[
        str,
        "svd: singular vectors (the paper). learned: loses about half. tuned: loses less again, slow without a GPU.",
    ] = "svd"
    positions: Annotated[
        str | None, "For long contexts, 0:LAST such as 0:32768: read half of the windows as if they began later."
    ] = None

    @property
    def last_position(self) -> int | None:
        """LAST of the positions; AquaError where they are not 0:LAST."""
        if self.positions is None:
            return None
        first, colon, last = self.positions.partition(":")
        if first != "0" or not colon or not last.isdecimal():
            raise AquaError(f"positions is {self.positions!r}: it must be 0:LAST, such as 0:32768")
        return int(last)


@dataclass(frozen=True)
class Resuming:
    """How a killed calibration goes on."""

    resume: Annotated[bool, "--resume", "Go on where a stopped or killed run ended."] = False
    checkpoint_seconds: Annotated[float, "Seconds after which the state is kept again, in OUTPUT.partial."] = 10.0


@dataclass(frozen=True)
class Windows:
    """Windows of a text, from its start."""

    data: Text = "builtin:evaluation"
    context: Context = 2048
    tokens: Tokens = 8192


@dataclass(frozen=True)
class MaybeModel(ModelOptions):
    """A model, where the command has one of its own too."""

    model: Annotated[
        str | None,
        typer.Argument(help="smollm2, a local folder, a .gguf file, or a hub id (left out: random weights)."),
    ] = None  # type: ignore[assignment]


def load_projections(path: Path) -> Projections:
    """The projections of a file."""
    from aqua_attention.calibration.projections import Projections

    return Projections.load(path)


def settings_of(given: dict[str, list[Any]]) -> list[Setting]:
    """A setting for every combination, the first knobs varying slowest."""
    *values, bases = given.values()
    combinations = [AquaConfig(**dict(zip(given, each, strict=False))) for each in product(*values)]
    from aqua_attention.evaluate.setting import Setting

    return [Setting(config, basis) for config in combinations for basis in bases]
