# SPDX-License-Identifier: Apache-2.0
"""Information retention: how far scores and softmax are from dense when only some dimensions are multiplied.

The paper's ablation: for each layer and head, the loss of keeping k of d dimensions, chosen once for all (static) or
for every query (magnitude, weighted).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqua_attention.config import AquaConfig
from aqua_attention.data.text import text_digest
from aqua_attention.evaluate.run import Job, Progress, damaged
from aqua_attention.evaluate.setting import Setting, Subject, check_covered
from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.model.capture import attention_layers, observe_windows
from aqua_attention.model.limits import check_tokens
from aqua_attention.model.sides import TEXT, Inputs, check_unpadded, given_sides
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate, select_dimensions

K_RATIOS = (0.9, 0.75, 0.5, 0.25)
LOSSES = ("score_loss", "softmax_loss")


def evaluate_retention(
    subject: Subject,
    windows: Tensor | Sequence[Inputs],
    *,
    k_ratios: Sequence[float] = K_RATIOS,
    selections: Sequence[str] = ("static", "magnitude", "weighted"),
    queries: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss of scores and of softmax for every layer, head, selection and ratio, on the model's own dense states.

    Each query head has its own dimensions, and there is no exact window.

    Every earlier token counts as visible, also in sliding-window layers, and in bidirectional layers every token;
    softcap is left out.

    Args:
        windows: token ids, [count, context], or what the model is called with, such as the `pixel_values` of an image.
        queries: measured in each window, spread over its second half, in bidirectional layers over all of it.

    Returns:
        `{"rows": [...]}`, a row for each `selection` and `k_ratio`: `score_loss`, the squared length of the difference
        of a query's scores from the dense ones over that of the dense ones (both without their mean over the visible
        keys, which softmax does not see); `softmax_loss`, half the summed absolute difference of the probabilities (0
        equal, 1 disjoint); both means over layers and heads, and in `per_layer` as lists of a value a head.

    Raises:
        AquaError: projections without the layers that read the windows, or of another model; padding; NaN.
    """
    model, projections = subject.model, subject.projections
    found = attention_layers(model)
    projections.check_model(model, found)
    layers = {layer.module: layer for layer in projections.covered(found)}
    configs = [AquaConfig.paper(ratio, selection=selection) for selection in selections for ratio in k_ratios]
    if isinstance(windows, Tensor):
        check_tokens(model, windows, context=windows.shape[1])
        given = {TEXT}
    else:
        check_unpadded(windows)
        given = given_sides(windows)
    check_covered(model, {layer.side for layer in layers.values()}, given)
    # By config and layer: both losses of every query head, [2, heads], in each call.
    losses: list[dict[int, list[Tensor]]] = [{} for _ in configs]

    def measure(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        layer = layers.get(module)
        if layer is None:
            return
        projection = projections.layers[layer.index]
        length = key.shape[2]
        first = length // 2 if layer.causal else 0
        places = torch.linspace(first, length - 1, min(queries, length), device=key.device).long()
        rotation, spread = projection.rotation.to(key.device), projection.key_spread.to(key.device)
        q, k = rotate(query[:, :, places].float(), rotation), rotate(key.float(), rotation)
        last = places if layer.causal else torch.full_like(places, length - 1)
        visible = torch.arange(length, device=key.device) <= last[:, None]
        dense = _scores(q, k, scaling)
        dense_centred, dense_softmax = _centred(dense, visible), _softmax(dense, visible)
        for config, by_layer in zip(configs, losses, strict=True):
            selected = select_dimensions(q, LayerPlan.of(rotation, spread, config))
            scores = dense if selected is None else _scores(torch.where(selected, q, 0), k, scaling)
            missing = (_centred(scores, visible) - dense_centred).square().sum(-1)
            score_loss = (missing / dense_centred.square().sum(-1).clamp_min(1e-30)).mean((0, -1))
            softmax_loss = (_softmax(scores, visible) - dense_softmax).abs().sum(-1).mean((0, -1)) / 2
            by_layer.setdefault(layer.index, []).append(torch.stack((score_loss, softmax_loss)).double().cpu())

    observe_windows(model, found, windows, measure, progress)
    return {"rows": [_row(*each) for each in zip(configs, losses, strict=True)]}


def retention_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """A job for each basis, selection and k_ratio, the first of which measures all of its basis."""
    windows = subject.windows(sizes.retention_tokens, sizes.context)
    distinct = dict.fromkeys(
        Setting(AquaConfig.paper(setting.config.k_ratio, selection=setting.config.selection), setting.basis)
        for setting in settings
        if setting.config.logit_error is None
    )
    known: dict[tuple[str, str, float], dict[str, Any]] = {}

    def measure(setting: Setting, progress: Progress, _: Path) -> dict[str, Any]:
        place = setting.basis, setting.config.selection, setting.config.k_ratio
        if place not in known:
            same = [other for other in distinct if other.basis == setting.basis]
            rows = retention_rows(subject, same, windows, progress)
            known.update({(row.pop("basis"), row["selection"], row["k_ratio"]): row for row in rows})
        return known[place]

    read, digest = subject.read(windows), text_digest(subject.text)
    return subject.jobs("retention", list(distinct), read, measure, text_sha256=digest)


def retention_rows(
    subject: Subject, settings: Sequence[Setting], windows: Tensor | Sequence[Inputs], progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The rows of `evaluate_retention` for the k_ratios and selections of each basis, with `basis` in each."""
    rows = []
    for basis in dict.fromkeys(setting.basis for setting in settings):
        configs = [setting.config for setting in settings if setting.basis == basis]
        names = ("k_ratio", "selection")
        chosen: dict[str, Any] = {
            f"{name}s": list(dict.fromkeys(getattr(config, name) for config in configs)) for name in names
        }
        turned = replace(subject, projections=subject.projections.with_basis(basis))
        found = evaluate_retention(turned, windows, **chosen, progress=progress)
        rows += [row | {"basis": basis} for row in found["rows"]]
    return rows


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[1, heads, queries, keys] in float32."""
    repeats = query.shape[1] // key.shape[1]
    return query @ key.repeat_interleave(repeats, dim=1).transpose(-1, -2) * scaling


def _centred(scores: Tensor, visible: Tensor) -> Tensor:
    mean = torch.where(visible, scores, 0).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
    return torch.where(visible, scores - mean, 0)


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def _row(config: AquaConfig, losses: dict[int, list[Tensor]]) -> dict[str, Any]:
    layers = {index: (sum(calls[1:], calls[0]) / len(calls)).tolist() for index, calls in sorted(losses.items())}
    row: dict[str, Any] = {"selection": config.selection, "k_ratio": config.k_ratio}
    for place, name in enumerate(LOSSES):
        values = [value for both in layers.values() for value in both[place]]
        row[name] = sum(values) / len(values)
        if not math.isfinite(row[name]):
            raise damaged("the model gives NaN or infinite scores")
    per_layer = [{"layer": index} | dict(zip(LOSSES, both, strict=True)) for index, both in layers.items()]
    return row | {"per_layer": per_layer}
