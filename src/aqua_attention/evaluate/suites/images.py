# SPDX-License-Identifier: Apache-2.0
"""What AQUA does to the embeddings of images: how far they turn, and whether nearest neighbours stay the same."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach.apply import Attachment
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.run import Progress, counting, damaged
from aqua_attention.evaluate.setting import Setting, Subject, runs_of
from aqua_attention.evaluate.suites.retention import retention_rows
from aqua_attention.model.capture import evaluation_mode
from aqua_attention.model.sides import IMAGES, Inputs, accepted, check_unpadded, first_tensor, placed, runner, sides

BATCH = 8
"""Images in a forward pass, where a model takes any number of them."""
RETENTION_IMAGES = 8
"""How many of the images the loss of each layer is measured on."""


def evaluate_images(
    subject: Subject, settings: Sequence[Setting], inputs: Sequence[Inputs], *, progress: Progress | None = None
) -> dict[str, Any]:
    """Embed every image (`inputs`: see `images.read_images`) dense, then under every setting.

    Returns:
        `{"images": count, "dense": {...}, "rows": [...], "retention": [...]}`. `dense`, as a yardstick: `others` and
        `nearest`, the mean cosine of two different images, and of an image and the nearest other one. A row a setting:
        `Run.head`, `mean_cosine` and `lowest_cosine` of the embeddings to the dense ones, `same_neighbour` (the share
        of images whose nearest other image is the same), `Run.mean_ks`. `retention`: `retention_rows` on some images.

    Raises:
        AquaError: fewer than two images, a model that does not read images, padding, projections without its image
            layers, NaN.
    """
    model = subject.model
    name = type(model).__name__
    if IMAGES not in sides(model):
        raise AquaError(f"{name} reads text, not images: give a model that reads images")
    if len(inputs) < 2:
        raise AquaError(f"there is {len(inputs)} image: nearest neighbours need two or more, give more images")
    check_unpadded(inputs)
    runs = runs_of(subject, settings, IMAGES)
    batches = _batches(inputs)
    step = counting(progress, len(inputs) * (1 + len(runs)))

    def embed(attachment: Attachment | None) -> Tensor:
        parts = []
        with attachment or nullcontext(), torch.no_grad(), evaluation_mode(model):
            for count, batch in batches:
                step(count)
                parts.append(_embedding(model, batch, count))
        found = torch.cat(parts).float().cpu()
        if not bool(torch.isfinite(found).all()):
            raise damaged(f"{name} gives NaN or infinity")
        return torch.nn.functional.normalize(found, dim=-1)

    dense = embed(None)
    expected = _neighbours(dense)
    rows = []
    for run in runs:
        found = embed(run.attachment)
        cosines = (found * dense).sum(-1)
        figures = {
            "mean_cosine": float(cosines.mean()),
            "lowest_cosine": float(cosines.min()),
            "same_neighbour": float((_neighbours(found) == expected).float().mean()),
        }
        rows.append(run.head() | figures | run.mean_ks())
    step(0)
    some = retention_rows(subject, settings, inputs[:: -(-len(inputs) // RETENTION_IMAGES)])
    return {"images": len(inputs), "dense": _yardstick(dense), "rows": rows, "retention": some}


def _batches(inputs: Sequence[Inputs]) -> list[tuple[int, Inputs]]:
    """How many images, and what the model is called with for them."""
    shapes = {tuple(each["pixel_values"].shape) for each in inputs}
    first, *others = shapes
    if others or len(first) != 4 or first[0] != 1 or any(len(each) > 1 for each in inputs):
        return [(1, each) for each in inputs]
    return [
        (len(part), {"pixel_values": torch.cat([each["pixel_values"] for each in part])})
        for part in (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
    ]


def _embedding(model: PreTrainedModel, batch: Inputs, count: int) -> Tensor:
    """[count, width]: what the model calls the embedding of an image, or else the mean over its tokens."""
    run = runner(model, IMAGES)
    output = run(**accepted(run, placed(batch, model)))
    named = (getattr(output, key, None) for key in ("image_embeds", "pooler_output"))
    found = next((each for each in named if each is not None), None)
    # Some models, as LLaVA, give a list with a tensor for each image.
    states = found if isinstance(found, (list, tuple)) else first_tensor(output if found is None else found)
    parts = [part.reshape(-1, part.shape[-1]) for part in states]  # [tokens, width]
    if count == 1:
        parts = [torch.cat(parts)]
    elif len(parts) != count:
        # The tokens of all images in one row: which are whose is not known.
        rows = ({name: value[row : row + 1] for name, value in batch.items()} for row in range(count))
        return torch.cat([_embedding(model, each, 1) for each in rows])
    return torch.stack([part.mean(0) for part in parts])


def _neighbours(embeddings: Tensor) -> Tensor:
    """For each image the index of the nearest other one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(-1)


def _yardstick(embeddings: Tensor) -> dict[str, float]:
    cosines = embeddings @ embeddings.T
    count = len(embeddings)
    others = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    nearest = cosines.fill_diagonal_(-torch.inf).amax(-1).mean()
    return {"others": float(others), "nearest": float(nearest)}
