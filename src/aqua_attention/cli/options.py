# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they make together: a model, a configuration, settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aqua_attention.config import AquaConfig

Model = Annotated[str, typer.Argument(help="smollm2 (fetched once), a local folder, a .gguf file, or a hub id.")]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file's name inside the folder or hub repository.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda when there is one).")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
ProjectionsFile = Annotated[Path, typer.Option("--projections", "-p", help="File made by `aqua calibrate`.")]
Context = Annotated[int, typer.Option(help="Tokens in a window.")]
EvaluationData = Annotated[str, typer.Option("--data", help="Text: builtin:evaluation, a file or folder, hub:name.")]
KRatios = Annotated[
    list[float], typer.Option("--k-ratio", help="Share of dimensions multiplied; repeat for a row each.")
]
SRatio = Annotated[float, typer.Option(help="Share of trailing key dimensions never stored, in [0, 1).")]
Selection = Annotated[str, typer.Option(help="magnitude (the paper), weighted (ours) or static (PCA slice).")]
Share = Annotated[str, typer.Option(help="head: each query head its own dimensions; group: one set a KV head.")]
Sink = Annotated[int, typer.Option(help="First tokens scored with every dimension.")]
Recent = Annotated[int, typer.Option(help="Last tokens scored with every dimension.")]
LogitError = Annotated[
    float | None, typer.Option(help="Adaptive k: variance of the logit error allowed to a query; replaces --k-ratio.")
]
Bits = Annotated[
    int | None, typer.Option(help="8 or 4: keys and values are stored in int8 or int4 (default: as computed).")
]
H2ORatio = Annotated[float, typer.Option("--h2o-ratio", help="Share of the tokens that stays in the cache, in (0, 1].")]
H2OQueries = Annotated[
    int | None, typer.Option("--h2o-queries", help="Only the last so many queries say which (default: all, H2O).")
]
MinLength = Annotated[
    str, typer.Option(help="Queries that see fewer tokens multiply every dimension; auto: see `aqua bench breakeven`.")
]
Basis = Annotated[str, typer.Option(help="aqua; to compare: none (not rotated) or key-pca (keys alone).")]
Chat = Annotated[bool, typer.Option(help="Use the model's chat template.")]


def aqua_config(
    k_ratio: float,
    s_ratio: float,
    selection: str,
    share: str,
    sink: int,
    recent: int,
    logit_error: float | None,
    bits: int | None,
    h2o_ratio: float,
    h2o_queries: int | None,
    min_length: str,
) -> AquaConfig:
    """The configuration that the options name."""
    from aqua_attention.config import AquaConfig

    knobs = k_ratio, s_ratio, selection, share, sink, recent, logit_error, bits, h2o_ratio, h2o_queries
    return AquaConfig(*knobs, min_length_of(min_length))


def min_length_of(given: str) -> int | Literal["auto"]:
    """A `min_length` as it is typed; AquaConfig refuses what is neither a number nor "auto"."""
    return int(given) if given.isdecimal() else given  # type: ignore[return-value]


def load_model(
    model: str,
    gguf_file: str | None,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
    predicts: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the options name.

    Args:
        predicts: whether it has to predict next tokens, which an encoder does not.
    """
    from aqua_attention.calibration.run import check_predicts
    from aqua_attention.data import models

    loaded, tokenizer = models.load_model(
        model, gguf_file=gguf_file, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    if predicts:
        check_predicts(loaded)
    return loaded, tokenizer
