# SPDX-License-Identifier: Apache-2.0
"""Images that need no download: crops of the photographs in scikit-image and scikit-learn, noise, and drawn text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from aqua_attention.data.text import load_text
from aqua_attention.errors import AquaError, install_extra

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
"""Pixels on each side of a built-in image."""
CROPS = 24
"""Images made of each photograph, and so the number of all others for as many photographs."""
CALIBRATION = "astronaut.png brick.png camera.png cell.png china.jpg coffee.png gravel.png moon.png motorcycle_left.png"
EVALUATION = (
    "chelsea.png clock_motion.png coins.png flower.jpg grass.png hubble_deep_field.jpg ihc.png retina.jpg rocket.jpg"
)
"""No photograph, and no second one of a scene, is in both."""

Named = tuple[str, "Image"]


def photographs(names: str) -> Iterator[Named]:
    """Crops of random size and place, mirrored and lightened at random, the same in every run.

    An AquaError where scikit-image or scikit-learn is not installed, or does not hold these photographs.
    """
    from PIL import Image

    for name in names.split():
        with Image.open(_packaged(name)) as file:
            picture = file.convert("RGB")
        # A string as seed is hashed in the same way everywhere.
        rng = random.Random(name)
        for number in range(CROPS):
            yield f"{name}#{number}", _crop(picture, rng)


def noise(count: int) -> Iterator[Named]:
    """Uniform noise: each channel of each pixel alone."""
    from PIL import Image

    rng = random.Random("noise")
    for number in range(count):
        yield f"noise#{number}", Image.frombytes("RGB", (SIZE, SIZE), rng.randbytes(3 * SIZE * SIZE))


def renderings(count: int, source: str) -> Iterator[Named]:
    """Pages of a text (see `text.load_text`) in black on white, in letters of random size."""
    from PIL import Image, ImageDraw, ImageFont

    text, rng = load_text(source), random.Random(f"renderings of {source}")
    for number in range(count):
        start, page = rng.randrange(len(text) - 4000), Image.new("RGB", (SIZE, SIZE), "white")
        font = ImageFont.load_default(rng.uniform(8, 28))
        ImageDraw.Draw(page).multiline_text((4, 2), text[start : start + 4000], fill="black", font=font)
        yield f"rendering#{number}", page


_COUNT = CROPS * len(CALIBRATION.split())
SETS: dict[str, Callable[[], Iterator[Named]]] = {
    "photographs": lambda: photographs(CALIBRATION),
    "evaluation-photographs": lambda: photographs(EVALUATION),
    "noise": lambda: noise(_COUNT),
    "renderings": lambda: renderings(_COUNT, "builtin:calibration"),
    "evaluation-renderings": lambda: renderings(_COUNT, "builtin:evaluation"),
}


def _crop(picture: Image, rng: random.Random) -> Image:
    from PIL import Image, ImageEnhance

    side = round(min(picture.size) * rng.uniform(0.4, 1.0))
    left, top = (rng.randint(0, whole - side) for whole in picture.size)
    crop = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Contrast(crop).enhance(rng.uniform(0.8, 1.2))


def _packaged(name: str) -> Path:
    """Where a photograph lies in the packages that ship it."""
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        found = find_spec(package)  # importing it would take a second
        if found is None or not found.submodule_search_locations:
            raise AquaError(f"the built-in photographs come with {package}: {install_extra('pictures')}")
        root = found.submodule_search_locations[0]
        if (path := Path(root, folder, name)).is_file():
            return path
    raise AquaError(f"{name} is not in the installed scikit-image and scikit-learn: give a folder of images instead")
