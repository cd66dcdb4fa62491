# SPDX-License-Identifier: Apache-2.0
"""Where images come from, what becomes of bad ones, and what a model reads of a good one."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers as tf

from aqua_attention.data import pictures
from aqua_attention.data.images import HALF, OPENAI, image_reader, is_images, read_images
from aqua_attention.errors import AquaError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
HAS_PHOTOGRAPHS = all(importlib.util.find_spec(name) for name in ("skimage", "sklearn"))


def save(path, colour=(10, 200, 30), size=(40, 30), mode="RGB"):
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def corner(picture):
    """A reader that shows which picture it is: its first pixel and its size."""
    return {"pixel_values": torch.tensor([*picture.getpixel((0, 0)), *picture.size])}


@pytest.fixture
def folder(tmp_path):
    """Five images in two folders, in several formats and modes, and a text file."""
    (tmp_path / "inner").mkdir()
    for number, (name, mode) in enumerate(
        [("a.png", "RGB"), ("b.jpg", "L"), ("c.gif", "P"), ("d.webp", "RGBA"), ("inner/e.bmp", "1")]
    ):
        save(tmp_path / name, (50 * number,) * 3, mode=mode)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_all_images_of_a_folder_in_order_whatever_their_format_and_mode(folder):
    inputs, names = read_images(str(folder), corner, most=99)
    assert [Path(name).name for name in names] == ["a.png", "b.jpg", "c.gif", "d.webp", "e.bmp"]
    for number, each in enumerate(inputs[:4]):
        assert each["pixel_values"].tolist() == pytest.approx([50 * number] * 3 + [40, 30], abs=3)


def test_at_most_so_many_spread_evenly(folder):
    _, names = read_images(str(folder), corner, most=2)
    assert [Path(name).name for name in names] == ["a.png", "c.gif"]
    with pytest.raises(AquaError, match="images is 0"):
        read_images(str(folder), corner, most=0)


def test_one_image_alone(folder):
    assert len(read_images(str(folder / "b.jpg"), corner, most=9)[0]) == 1


def test_damaged_images_are_named_counted_and_left_out(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 of 7 images cannot be read .*cut\.png.*empty\.jpg \(not an image\)"):
        inputs, names = read_images(str(folder), corner, most=99)
    assert len(inputs) == len(names) == 5


def test_images_that_a_processor_refuses_are_named_counted_and_left_out(folder):
    """Qwen2-VL takes no image that is 200 times as wide as high."""
    save(folder / "narrow.png", size=(1000, 3))
    processor = tf.Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=2, merge_size=2)
    read = lambda picture: dict(processor(images=[picture], return_tensors="pt"))  # noqa: E731
    with pytest.warns(UserWarning, match=r"1 of 6 images .* left out: \S*narrow\.png \(.*aspect ratio"):
        _, names = read_images(str(folder), read, most=99)
    assert len(names) == 5 and not any("narrow" in name for name in names)
    with pytest.raises(AquaError, match=r"none of the 1 images .*narrow\.png \(.*aspect ratio"):
        read_images(str(folder / "narrow.png"), read, most=99)


def test_images_that_a_processor_pads_are_named_counted_and_left_out(folder):
    """Padding would be calibrated on like an image."""
    save(folder / "wide.png", size=(64, 32))

    def padded(picture):
        mask = torch.ones(1, 1, 64, 64, dtype=torch.long)
        mask[..., 32:, :] = int(picture.size != (64, 32))
        return {"pixel_values": torch.zeros(1, 1, 3, 64, 64), "pixel_attention_mask": mask}

    with pytest.warns(UserWarning, match=r"1 of 6 images .*wide\.png \(its processor pads it: pixel_attention_mask"):
        _, names = read_images(str(folder), padded, most=99)
    assert len(names) == 5
    with pytest.raises(AquaError, match=r"none of the 1 images .*wide\.png \(its processor pads it"):
        read_images(str(folder / "wide.png"), padded, most=99)


def test_no_image_left_is_an_error_that_names_them(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(AquaError, match=r"none of the 7 images .*0\.png.*4\.png \(not an image\), \.\.\.") as caught:
        read_images(str(tmp_path), corner, most=99)
    assert "5.png" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}", "holds no image"),
        ("{}/none", "there is no file or folder"),
        ("{}/notes.txt", "is no image"),
        ("builtin:calibration", "names no images: they are one of builtin:photographs"),
        ("hub:", r"write hub:dataset"),
    ],
)
def test_what_holds_no_image_is_an_error(spec, message, tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(AquaError, match=message):
        read_images(spec.format(tmp_path), corner, most=9)


def test_reading_needs_pillow(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(AquaError, match=r"takes Pillow: install it .*'\.\[vision\]'"):
        read_images(str(folder), corner, most=9)


def test_images_are_told_from_text(folder, tmp_path):
    (tmp_path / "inner" / "only.txt").write_text("text")
    assert is_images(str(folder)) and is_images("picture.JPG") and is_images("builtin:noise")
    assert not any(
        map(is_images, ("builtin:calibration", "notes.txt", "hub:wikitext", "nowhere", "a" * 5000, "~nobody/x"))
    )


def test_a_dataset_of_the_hub(monkeypatch):
    rows = [{"label": number, "image": Image.new("RGB", (8, 8), (number, 0, 0))} for number in range(3)]
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    inputs, names = read_images("hub:flowers:small:test", corner, most=2)
    assert asked == [(("flowers", "small"), {"split": "test", "streaming": True})]
    assert names == ["flowers#0", "flowers#1"]
    assert [each["pixel_values"][0].item() for each in inputs] == [0, 1]
    rows[:] = [{"text": "words"}]
    with pytest.raises(AquaError, match="hub:flowers has no images in its columns text"):
        read_images("hub:flowers", corner, most=2)


def vision(config=tf.CLIPVisionConfig, model=tf.CLIPVisionModel, **changes):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return model(config(**size | {"image_size": 32, "patch_size": 16} | changes))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: vision(), OPENAI),
        (lambda: vision(tf.ViTConfig, tf.ViTModel), HALF),
    ],
    ids=["clip", "vit"],
)
def test_without_a_processor_the_middle_square_is_scaled_and_normalised(model, expected):
    picture = Image.new("RGB", (80, 40), "white")
    picture.paste((10, 20, 30), (20, 0, 60, 40))
    with pytest.warns(UserWarning, match=r"no preprocessor_config.json: images are scaled and cut to 32 x 32"):
        read = image_reader(model(), None)
    pixels = read(picture)["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    mean, std = (torch.tensor(values) for values in expected)
    wanted = (torch.tensor([10, 20, 30]) / 255 - mean) / std
    inner = pixels[0, :, 4:-4, 4:-4]  # the edges are mixed with what lies beside the square
    assert torch.allclose(inner, wanted[:, None, None].expand(3, 24, 24), atol=1e-6)


def test_with_a_processor_it_says_how():
    processor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = image_reader(vision(), processor)
    pixels = read(Image.new("RGB", (80, 40), "white"))["pixel_values"]
    mean, std = (torch.tensor(values) for values in OPENAI)
    assert torch.allclose(pixels, ((1 - mean) / std)[:, None, None].expand(3, 32, 32)[None], atol=1e-6)


def test_a_model_that_reads_text_reads_no_images(llama):
    with pytest.raises(AquaError, match="LlamaForCausalLM reads text, not images"):
        image_reader(llama[0], None)


@pytest.mark.parametrize("name", ["noise", "renderings", "evaluation-renderings"])
def test_built_in_sets_are_the_same_in_every_run(name):
    made = [[(label, picture.tobytes()) for label, picture in islice(pictures.SETS[name](), 5)] for _ in range(2)]
    assert made[0] == made[1]
    assert len({pixels for _, pixels in made[0]}) == 5
    assert all(len(pixels) == 3 * pictures.SIZE**2 for _, pixels in made[0])


def test_renderings_are_black_text_on_white():
    picture = next(iter(pictures.renderings(1, "builtin:calibration")))[1].convert("L")
    shades = picture.histogram()
    assert shades[255] > picture.width * picture.height / 2
    assert sum(shades[:128]) > 1000


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for scikit-image and scikit-learn, with a photograph each."""
    rng = torch.Generator().manual_seed(0)
    for package, place in (("skimage", "data/one.png"), ("sklearn", "datasets/images/two.png")):
        path = tmp_path / package / place
        path.parent.mkdir(parents=True)
        pixels = torch.randint(0, 256, (90, 120, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    found = lambda name: types.SimpleNamespace(submodule_search_locations=[str(tmp_path / name)])  # noqa: E731
    monkeypatch.setattr(pictures, "find_spec", found)
    return tmp_path


def test_photographs_are_cropped_alike_in_every_run(packages):
    made = [[(name, picture.tobytes()) for name, picture in pictures.photographs("one.png two.png")] for _ in range(2)]
    assert made[0] == made[1]
    assert len(made[0]) == 2 * pictures.CROPS == len({pixels for _, pixels in made[0]})
    assert made[0][0][0] == "one.png#0" and made[0][-1][0] == f"two.png#{pictures.CROPS - 1}"


def test_photographs_that_are_not_there(packages, monkeypatch):
    with pytest.raises(AquaError, match=r"three\.png is not in the installed scikit-image and scikit-learn"):
        list(pictures.photographs("three.png"))
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(AquaError, match=r"come with skimage: install it .*'\.\[pictures\]'"):
        list(pictures.photographs("one.png"))


@pytest.mark.skipif(not HAS_PHOTOGRAPHS, reason="needs scikit-image and scikit-learn")
def test_the_two_sets_of_photographs_share_none():
    assert not set(pictures.CALIBRATION.split()) & set(pictures.EVALUATION.split())
    for names in (pictures.CALIBRATION, pictures.EVALUATION):
        assert len(list(pictures.photographs(names))) == pictures.CROPS * len(names.split())
