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
    """AQUA attention (arXiv 2509.11155) for `model`. Use it as a context manager: it restores the model at its end.

    Example:
        >>> with aqua.apply(model, projections):
        ...     model.generate(**inputs)

    For a lasting change call `attachment = aqua.apply(model, projections, config).attach()`, and later
    `attachment.detach()`. Without `with` or `attach()` nothing changes, and a warning says so once the result is gone.

    A model has one AQUA at a time, and every thread that runs the model gets it. While one thread attaches or
    calibrates, another one that tries is refused. A copied or pickled model is a detached one.

    Args:
        model: a transformers model in any floating dtype, on any device.
        projections: what `calibrate` returned, or the path of its file.
        config: an AquaConfig, a dict of its fields (and of a `preset` to begin with), or the name of a preset; None is
            `AquaConfig()`.
        layers: a pattern of names, such as "vision_tower.*" in a vision-language model. Layers that do not match stay
            dense, as do those that the projections do not cover. `Attachment.dense` names them. None: all layers.
        layout: of the cache that `generate` gets. "auto": tiled where that is possible, for the decoding kernels;
            "tiled": an AquaError where it is not; "plain": a growing cache.
        record: on a GPU, record the decoding steps of `generate` as a CUDA graph, and replay it.
        compile: with `record`, have `torch.compile` make a few kernels of the model's norms, rotary embeddings and
            activations. It takes seconds once, and says so.

    Returns:
        An `Attachment`, which does nothing before `with` or `attach()`.

    Raises:
        AquaError: the model does not use transformers' attention interface, the projections are not for it, or a
            setting means nothing to it (an encoder has no cache, and no token is its most recent one).
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
