# SPDX-License-Identifier: Apache-2.0
"""Where images come from, and how they become what a model reads."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.data.pictures import SETS
from aqua_attention.data.sources import files_below, first_line, hub_rows, local_files, usable_path
from aqua_attention.errors import AquaError, install_extra
from aqua_attention.model.sides import IMAGES, padding, runner, sides

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMS = (
    f"{', '.join(f'builtin:{name}' for name in SETS)}, hub:dataset[:config[:split]], a folder, "
    f"or an image ending in {', '.join(SUFFIXES)}"
)
Reader = Callable[["Image"], dict[str, Tensor]]
"""From a picture to what the model is called with."""
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Means and standard deviations of the channels: what CLIP was trained with, and what most others were."""


def is_images(spec: str) -> bool:
    """Whether `spec` names images rather than text: by its name, or by what files the folder holds."""
    kind, _, rest = spec.partition(":")
    if kind == "builtin":
        return rest in SETS
    try:
        path = usable_path(spec)
        return path.suffix.lower() in SUFFIXES or (path.is_dir() and bool(files_below(path, SUFFIXES)))
    except (AquaError, OSError):  # reading it will say so
        return False


def read_images(
    spec: str, reader: Reader, *, most: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The images that `spec` names as a model reads them, and their names.

    Args:
        spec: one of `FORMS`; of a folder all images in it and below, of a dataset the split "train" unless given.
        reader: see `image_reader`.
        most: how many at most, spread evenly over a sorted folder or a built-in set, of a dataset the first.
        progress: called as progress(images done, images in all).

    Raises:
        AquaError: none can be read. Others that cannot, or that `reader` refuses or pads, are left out with a warning.
    """
    if most < 1:
        raise AquaError(f"images is {most}: it must be 1 or more")
    check_pillow()
    pictures = _pictures(spec, most)
    read: list[tuple[dict[str, Tensor], str]] = []
    unread: list[str] = []
    for done, (name, picture) in enumerate(pictures):
        progress(done, len(pictures))
        try:
            read.append((_read(reader, picture), name))
        except _Unreadable as error:
            unread.append(f"{name} ({error})")
    progress(len(pictures), len(pictures))
    listed = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
    if not read:
        raise AquaError(f"none of the {len(unread)} images of {spec!r} can be read: {listed}: give other ones")
    if unread:
        wrong = f"{len(unread)} of {len(pictures)} images cannot be read and are left out: {listed}"
        warnings.warn(wrong, stacklevel=2)
    return [inputs for inputs, _ in read], [name for _, name in read]


def check_pillow() -> None:
    """Raise AquaError when images cannot be read, because Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise AquaError(f"reading images takes Pillow: {install_extra('vision')}") from error


class _Unreadable(Exception):
    """This image cannot be decoded, or the model's image processor does not take it whole and alone."""


def _read(reader: Reader, picture: Image | Path) -> dict[str, Tensor]:
    picture = _decoded(picture) if isinstance(picture, Path) else picture
    try:
        inputs = reader(picture)
    except Exception as error:  # processors refuse pictures, as too narrow ones, in their own ways
        raise _Unreadable(first_line(error)) from error
    if mask := padding(inputs):
        raise _Unreadable(f"its processor pads it: {mask} is not all ones")
    return inputs


def _pictures(spec: str, most: int) -> Sequence[tuple[str, Image | Path]]:
    """Names and pictures; files are decoded one by one, because many do not fit in memory."""
    kind, _, rest = spec.partition(":")
    if kind == "builtin":
        if rest not in SETS:
            raise AquaError(f"{spec!r} names no images: they are one of {FORMS}")
        return _spread(list(SETS[rest]()), most)
    if kind == "hub":
        found = enumerate(islice(hub_rows(rest, partial(_row_picture, spec)), most))
        return [(f"{rest.partition(':')[0]}#{number}", picture) for number, picture in found]
    files = local_files(spec, SUFFIXES, f"images are one of {FORMS}", f"{spec!r} is no image", "image")
    return [(str(file), file) for file in _spread(files, most)]


def _spread(found: list[Any], most: int) -> list[Any]:
    """At most so many, evenly."""
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _decoded(file: Path) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # decoders of damaged files raise anything
        unknown = type(error).__name__ == "UnidentifiedImageError"
        raise _Unreadable("not an image" if unknown else first_line(error)) from error


def _row_picture(spec: str, row: dict[str, Any]) -> Image:
    """The first image of a row of a dataset."""
    from PIL.Image import Image

    found = next((value for value in row.values() if isinstance(value, Image)), None)
    if found is None:
        raise AquaError(f"{spec} has no images in its columns {', '.join(row)}: give another dataset")
    return found.convert("RGB")


def image_reader(model: PreTrainedModel, processor: Any | None) -> Reader:
    """How `model` reads a picture: as its image processor says, else cut to its size, in the colours it expects.

    An AquaError where it does not read images, or needs a processor of its own.
    """
    name = type(model).__name__
    if IMAGES not in sides(model):
        raise AquaError(f"{name} reads text, not images: give a text, or a model that reads images")
    if processor is not None:

        def processed(picture: Image) -> dict[str, Tensor]:
            made = processor(images=[picture], return_tensors="pt")
            return {key: value for key, value in made.items() if isinstance(value, Tensor)}

        return processed
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None)
    needs = "image_grid_thw" in inspect.signature(runner(model, IMAGES)).parameters
    if needs or not isinstance(size, int) or getattr(config, "num_channels", 3) != 3:
        raise AquaError(f"{name} needs an image processor: put its preprocessor_config.json beside the weights")
    mean, std = OPENAI if "clip" in config.model_type else HALF
    done = f"images are scaled and cut to {size} x {size}, mean {', '.join(f'{part:.2f}' for part in mean)}"
    warnings.warn(f"{name} has no preprocessor_config.json: {done}", stacklevel=2)
    return lambda picture: {"pixel_values": _plain_pixels(picture, size, mean, std)}


def _plain_pixels(picture: Image, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The middle square of a picture, [1, 3, size, size]."""
    from PIL import Image

    side = min(picture.size)
    left, top = ((whole - side) // 2 for whole in picture.size)
    square = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3).float() / 255
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None].contiguous()
