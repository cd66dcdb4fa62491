# SPDX-License-Identifier: Apache-2.0
"""The door to AQUA in a model: `apply` takes what users have at hand, and says so where its result was of no use."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from aqua_attention.attach.apply import Attachment
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig


def apply(
    model: PreTrainedModel,
    projections: Projections | Path | str,
    config: AquaConfig | dict[str, Any] | str | None = None,
    *,
    layers: str | None = None,
    layout: str = "auto",
    record: bool = True,
    compile: bool = True,
) -> Attachment:
    """AQUA attention for `model`, to be used as a context manager that restores everything, also after an error.

    Example:
        >>> with aqua.apply(model, projections):
        ...     model.generate(**inputs)

    For a lasting change: `attachment = aqua.apply(model, projections, config).attach()`, and `attachment.detach()`.
    Neither of the two: nothing is changed, and a warning says so where what this returns is dropped.

    A model has one AQUA at a time, which every thread that runs the model gets. While one thread attaches or
    calibrates, another one that would is refused. A copied or pickled model is a detached one.

    Args:
        projections: or the path of their file.
        config: or a dict of its fields, or the name of a preset; None is `AquaConfig()`.
        layers: only the layers whose name matches, such as "vision_tower.*" in a vision-language model; the others stay
            dense, as do those that the projections do not cover. `Attachment.dense` names them.
        layout: of the cache that `generate` gets. "auto": tiled where that is possible, for the decoding kernels;
            "tiled": an AquaError where it is not; "plain": a growing cache.
        record: on a GPU, record the decoding steps of `generate` as a CUDA graph, and replay it.
        compile: with `record`, have `torch.compile` make a few kernels of the model's norms, rotary embeddings and
            activations. It takes seconds once, and says so.

    An AquaError where the model does not use transformers' attention interface, the projections are not for it, or a
    setting means nothing to it: an encoder has no cache, and no token is its most recent one.
    """
    options: dict[str, Any] = {"layout": layout, "record": record, "compile": compile}
    attachment = Attachment(model, Projections.of(projections), AquaConfig.of(config), layers, **options)
    attachment.dropped = weakref.finalize(attachment, _warn_of_dense, type(model).__name__)
    return attachment


def _warn_of_dense(name: str) -> None:
    warnings.warn(
        f"AQUA was never attached to {name}, which ran dense: write `with aqua.apply(...):`, or call attach() on what "
        "`apply` returns, and keep it",
        stacklevel=3,
    )
