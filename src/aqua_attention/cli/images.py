# SPDX-License-Identifier: Apache-2.0
"""The command `aqua eval images`, and calibration on images: parsing and printing only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import ModelOptions, ProjectionsFile, load_projections
from aqua_attention.cli.terminal import Show
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.progress import progress_bars

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from aqua_attention.calibration.projections import Projections

Images = Annotated[int, "How many images at most, spread over the folder."]
Layers = Annotated[str | None, "Only layers whose name matches, such as 'vision_tower.*' (default: all)."]
BY_DATA = "(default: images if --data is images, else text)"
Side = Annotated[str | None, f"text or images, for a model that reads both {BY_DATA}."]
GRID = [0.9, 0.75, 0.5, 0.25]
METHODS = [("magnitude", "aqua"), ("weighted", "aqua"), ("static", "aqua"), ("magnitude", "none")]
"""Selection and basis: the paper, ours, a fixed slice, not rotated."""


@dataclass(frozen=True)
class ImageModel(ModelOptions):
    """A model that reads images, which no GGUF file holds."""

    model: Annotated[str, typer.Argument(help="A local folder, or a hub id, of a model that reads images.")]
    gguf_file: str | None = field(default=None, init=False)


def images(
    *,
    projections: ProjectionsFile,
    data: Annotated[str, "A folder of images, an image, or hub:name."] = "builtin:evaluation-photographs",
    k_ratio: Annotated[
        list[float] | None,
        "Share of the key dimensions that a query multiplies; may be repeated (default: 0.9 0.75 0.5 0.25).",
    ] = None,
    selection: Annotated[
        list[str] | None, "magnitude, weighted or static; may be repeated (default: all, and not rotated)."
    ] = None,
    basis: str = "aqua",
    share: str = "head",
    sink: int = 0,
    images: Images = 256,
    model: ImageModel,
    show: Show,
) -> None:
    """Measure how far embeddings of images turn, how many nearest neighbours stay, and what each layer loses.

    Example: `aqua eval images clip-vit-base-patch16/ -p clip.safetensors --data pictures/ --k-ratio 0.75 --k-ratio 0.5
    --json images.json`
    """
    default = selection is None and basis == "aqua"
    methods = METHODS if default else [(name, basis) for name in selection or ["magnitude"]]
    same, given = AquaConfig.paper(share=share, sink=sink), product(k_ratio or GRID, methods)
    configs = [(replace(same, k_ratio=ratio, selection=name), its_basis) for ratio, (name, its_basis) in given]
    from aqua_attention.evaluate.record import provenance
    from aqua_attention.evaluate.setting import Setting, Subject
    from aqua_attention.evaluate.suites.images import evaluate_images
    from aqua_attention.model.sides import inputs_digest
    from aqua_attention.report.tables import images_table, layers_table

    learned, settings = load_projections(projections), [Setting(*each) for each in configs]
    with progress_bars() as report:
        loaded, inputs = _load(model, data, images, report)
        subject = Subject(model.name, loaded, None, learned, data, rests_on=provenance(projections, learned))
        result = evaluate_images(subject, settings, inputs, progress=partial(report, "embed"))
    result |= subject.source() | {"inputs_sha256": inputs_digest(inputs)}
    paper = any((row["selection"], row["basis"]) == METHODS[0] for row in result["retention"])
    show(result, images_table(result), *([layers_table(result)] if paper else []), suite="images")
    cosines = "two of them have a cosine of {others:.4f}, nearest ones of {nearest:.4f}".format(**result["dense"])
    typer.echo(f"{result['images']} images; dense, {cosines}")


def _load(
    model: ModelOptions, data: str, most: int, report: Callable[[str, float, int], None]
) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A model that reads images, and the images as it reads them."""
    from aqua_attention.data.images import check_pillow, image_reader, read_images
    from aqua_attention.data.models import load_image_model

    check_pillow()
    options = {name: getattr(model, name) for name in ("dtype", "device", "trust_remote_code")}
    loaded, processor = load_image_model(model.model, **options)
    progress = partial(report, "read images")
    return loaded, read_images(data, image_reader(loaded, processor), most=most, progress=progress)[0]


def wants_images(model: ModelOptions, data: str | None, side: str | None) -> bool:
    """Whether a calibration of `model` on `data` reads images: as `side` says; without it where the model reads nothing
    else, or the data are images.

    Raises:
        AquaError: `side` is not known; it is left out, and the model reads both, and the data are both.
    """
    from aqua_attention.data.images import is_images
    from aqua_attention.data.models import reads_images
    from aqua_attention.data.text import holds_text
    from aqua_attention.model.sides import IMAGES, TEXT

    if side not in (None, TEXT, IMAGES):
        raise AquaError(f"side is {side!r}: it must be {TEXT} or {IMAGES}")
    if side == IMAGES and model.gguf_file:
        raise AquaError(f"{model.gguf_file} is a GGUF file, which holds text models alone: side cannot be {IMAGES}")
    if side:
        return side == IMAGES
    options: dict[str, Any] = {"gguf_file": model.gguf_file, "trust_remote_code": model.trust_remote_code}
    takes_images, takes_text = reads_images(model.model, **options)
    if not (takes_images and takes_text):
        return takes_images
    if data is None or not is_images(data):
        return False
    if holds_text(data):
        both = f"{data!r} holds images and text, and model {model.model!r} reads both"
        raise AquaError(f"{both}: say --side {IMAGES} or {TEXT}")
    return True


def text_for(model: str, data: str) -> str:
    """The text that `data` names, for a model or a side of one that reads no images."""
    from aqua_attention.data.images import is_images
    from aqua_attention.data.text import load_text

    try:
        return load_text(data)
    except AquaError as error:
        if is_images(data):
            raise AquaError(f"model {model!r} reads text, and {data!r} names images: give --data a text") from error
        raise


def calibrate_on_images(model: ModelOptions, data: str, most: int, **options: Any) -> Projections:
    """Projections from images; `options` are those of `calibration.calibrate_inputs`."""
    from aqua_attention.calibration.run import calibrate_inputs

    with progress_bars() as report:
        loaded, inputs = _load(model, data, most, report)
        facts = {"images": len(inputs)}
        return calibrate_inputs(loaded, inputs, facts=facts, progress=partial(report, "calibrate"), **options)
