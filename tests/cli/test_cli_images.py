# SPDX-License-Identifier: Apache-2.0
"""`aqua calibrate` and `aqua eval images` as a user of a vision model, of an encoder or of both at once types them."""

from __future__ import annotations

import json
import sys
import types
import warnings

import pytest
import torch
import transformers as tf

from aqua_attention.calibration.projections import Projections
from aqua_attention.cli import main as cli
from conftest import SHAPE, VOCABULARY

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8, "initializer_range": 0.3}


def save(model, folder, *others):
    torch.manual_seed(0)
    model().save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder


def processor():
    return tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    model = lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION, projection_dim=16))  # noqa: E731
    return save(model, tmp_path_factory.mktemp("clip"), processor())


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory, word_tokenizer):
    config = tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return save(lambda: tf.BertForMaskedLM(config), tmp_path_factory.mktemp("bert"), word_tokenizer)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory, word_tokenizer):
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**SHAPE), image_token_id=5
    )
    model = lambda: tf.LlavaForConditionalGeneration(config)  # noqa: E731
    return save(model, tmp_path_factory.mktemp("llava"), word_tokenizer, processor())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of twelve images of noise."""
    folder, rng = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(0, 256, (40, 48, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words)
    return path


@pytest.fixture(scope="session")
def clip_projections(tmp_path_factory, clip_folder, pictures):
    path = tmp_path_factory.mktemp("projections") / "clip.safetensors"
    command = ["aqua", "calibrate", str(clip_folder), "--data", str(pictures), "-o", str(path)]
    few = "204 tokens are few for heads of 16 dimensions"
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match=few):
        patch.setattr(sys, "argv", command)
        cli.app(standalone_mode=False)
    return path


def test_calibration_on_a_folder_of_images(aqua, clip_projections, clip_folder):
    projections = Projections.load(clip_projections)
    assert list(projections.layers) == [0, 1]
    assert projections.calibration["images"] == 12
    assert projections.calibration["tokens"] == 12 * 17
    assert projections.model["name"] == str(clip_folder)
    code, out, err = aqua("inspect", clip_projections)
    assert code == 0, err
    assert "12 images, 204 tokens" in out
    assert "clip_vision_model, 2 layers, 2 query and 2 key-value heads of 16" in out


def test_eval_images_has_a_row_for_each_method_and_ratio(aqua, clip_folder, clip_projections, pictures, tmp_path):
    figures = tmp_path / "images.json"
    code, out, err = aqua("eval", "images", clip_folder, "-p", clip_projections, "--data", pictures, "--json", figures)
    assert code == 0, err
    result = json.loads(figures.read_text())
    assert (result["images"], result["data"], result["dtype"]) == (12, str(pictures), "float32")
    named = [(row["setting"]["k_ratio"], row["setting"]["selection"], row["basis"]) for row in result["rows"]]
    methods = [("magnitude", "aqua"), ("weighted", "aqua"), ("static", "aqua"), ("magnitude", "none")]
    assert named == [(ratio, *method) for ratio in (0.9, 0.75, 0.5, 0.25) for method in methods]
    assert all(0 <= row["same_neighbour"] <= 1 and row["mean_cosine"] <= 1 + 1e-6 for row in result["rows"])
    assert "k_ratio 0.5, weighted" in out and "k_ratio 0.25, not rotated" in out
    assert "softmax lost in layer" in out and "12 images; dense, two of them have a cosine of" in out


def test_a_report_has_the_figures_and_the_layers(aqua, clip_folder, clip_projections, pictures, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    (tmp_path / "results").mkdir()
    arguments = ["-p", clip_projections, "--data", pictures, "--json", tmp_path / "results" / "images.json"]
    code, _, err = aqua("eval", "images", clip_folder, *arguments)
    assert code == 0, err
    code, _, err = aqua("report", tmp_path / "results", "--json", tmp_path / "summary.json")
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["unused"] == [] and summary["settings"] == {"images": 16, "retention": 16}
    page = (tmp_path / "results" / "report.md").read_text()
    rows = json.loads((tmp_path / "results" / "images.json").read_text())["rows"]
    assert f"| k\\_ratio 0.9 | 94% | {rows[0]['mean_cosine']:.4f} |" in page
    assert "## Images" in page and "## Layers and heads" in page


def test_eval_images_takes_one_method_and_an_exact_first_token(aqua, clip_folder, clip_projections, pictures):
    options = ["--k-ratio", "1", "--selection", "weighted", "--sink", "1", "--images", "5"]
    code, out, err = aqua("eval", "images", clip_folder, "-p", clip_projections, "--data", pictures, *options)
    assert code == 0, err
    assert "k_ratio 1, weighted, exact 1 + 0" in out and "1.0000" in out and "5 images;" in out


def test_a_calibration_on_images_that_is_stopped_goes_on(aqua, clip_folder, clip_projections, pictures, tmp_path):
    from aqua_attention.calibration import run as calibration

    output, original, calls = tmp_path / "clip.safetensors", calibration.LayerStatistics.of, []

    def stop_in_the_fifth_image(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    command = ["calibrate", clip_folder, "--data", pictures, "-o", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration.LayerStatistics, "of", stop_in_the_fifth_image)
        code, _, err = aqua(*command)
    assert code == 130 and "--resume goes on" in err
    assert not output.exists()
    code, _, err = aqua(*command)
    assert code == 2 and "unfinished calibration" in err
    code, _, err = aqua(*command, "--images", 6, "--resume")
    assert code == 2 and "another run" in err
    code, _, err = aqua(*command, "--resume")
    assert code == 0, err
    assert output.read_bytes() == clip_projections.read_bytes()


def test_ctrl_c_in_an_evaluation_leaves_the_code_of_an_interrupt(
    aqua, clip_folder, clip_projections, pictures, tmp_path
):
    from aqua_attention.evaluate.suites import images

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_embedding", stop)
        arguments = ["-p", clip_projections, "--data", pictures, "--json", tmp_path / "figures.json"]
        code, _, err = aqua("eval", "images", clip_folder, *arguments)
    assert code == 130 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_damaged_images_are_named_and_counted(aqua, clip_folder, pictures, tmp_path):
    for file in list(pictures.iterdir())[:3]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = aqua("calibrate", clip_folder, "--data", tmp_path, "-o", tmp_path / "out.safetensors")
    assert code == 0, err
    assert "warning: 1 of 4 images cannot be read and are left out:" in err and "broken.png (not an image)" in err
    assert "3 images" in out


@pytest.fixture
def bad(tmp_path, clip_folder, tiny_folder, bert_folder, llava_folder, clip_projections, pictures, text_file):
    """What the commands below name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"broken")
    (tmp_path / "mixed").mkdir()
    for file in (text_file, next(pictures.iterdir())):
        (tmp_path / "mixed" / file.name).write_bytes(file.read_bytes())
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(clip_projections.read_bytes()[:-100])
    return {
        "clip": clip_folder,
        "llama": tiny_folder,
        "bert": bert_folder,
        "llava": llava_folder,
        "p": clip_projections,
        "truncated": truncated,
        "pictures": pictures,
        "text": text_file,
        "empty": tmp_path / "empty",
        "mixed": tmp_path / "mixed",
        "damaged": tmp_path / "damaged",
        "out": tmp_path / "out.safetensors",
    }


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrate {clip} --data {empty} -o {out}", "holds no image"),
        ("calibrate {clip} --data {damaged} -o {out}", "none of the 1 images"),
        ("calibrate {clip} --data {text} -o {out}", "is no image: images are one of"),
        ("calibrate {clip} --data builtin:calibration -o {out}", "names no images"),
        ("calibrate {clip} --data {pictures} --images 0 -o {out}", "images is 0"),
        ("calibrate {clip} --data {pictures} --layers text.* -o {out}", "no attention layer has a name like 'text.*'"),
        ("calibrate {llama} --data {pictures} -o {out}", "reads text, and"),
        ("calibrate {llama} --data builtin:noise -o {out}", "reads text, and 'builtin:noise' names images"),
        ("calibrate {llava} --data {empty} -o {out}", "holds no file ending in"),
        ("calibrate {llava} --data {mixed} -o {out}", "reads both: say --side images or text"),
        ("calibrate {llava} --data {pictures} --side sound -o {out}", "side is 'sound': it must be text or images"),
        ("calibrate {llava} --data {pictures} --side text -o {out}", "names images: give --data a text"),
        ("calibrate {llava} --data {text} --side images -o {out}", "is no image: images are one of"),
        ("calibrate {llama} --data {pictures} --side images -o {out}", "reads text, not images"),
        ("calibrate {llama} --gguf-file x.gguf --side images -o {out}", "x.gguf is a GGUF file"),
        ("calibrate {clip} --side text -o {out}", "reads images, not text"),
        ("eval images {llama} -p {p} --data {pictures}", "reads text, not images"),
        ("eval images smollm2 -p {p} --data {pictures}", "reads text, not images"),
        ("eval images {clip} -p {p} --data {pictures} --k-ratio 0", "k_ratio is 0.0"),
        ("eval images {clip} -p {p} --data {pictures} --selection best", "selection is 'best'"),
        ("eval images {clip} -p {p} --data {pictures} --images 1", "there is 1 image"),
        ("eval images {clip} -p {p} --data {empty}", "holds no image"),
        ("eval images {clip} -p {truncated} --data {pictures}", "not a complete safetensors file"),
        ("eval images {clip} -p {empty}/none --data {pictures}", "no such projections file"),
        ("eval images {llava} -p {p} --data {pictures}", "these projections are for clip_vision_model"),
        ("eval images {clip} -p {p} --data {pictures} --json {empty}", "cannot write"),
        ("eval perplexity {clip} -p {p}", "reads images, not text"),
        ("eval perplexity {bert} -p {p}", "BertForMaskedLM predicts no next token"),
        ("generate {bert} -p {p} --prompt w1", "BertForMaskedLM predicts no next token"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(aqua, bad, command, message):
    code, _, err = aqua(*(word.format(**bad) for word in command.split()))
    last = err.strip().splitlines()[-1]
    assert code == 2 and message in last and last.startswith("error: "), err
    assert not bad["out"].exists()


def test_a_text_encoder_is_calibrated_and_its_retention_measured(aqua, bert_folder, text_file, tmp_path):
    file, figures = tmp_path / "bert.safetensors", tmp_path / "figures.json"
    sizes = ["--data", text_file, "--context", 64, "--tokens", 256]
    code, out, err = aqua("calibrate", bert_folder, *sizes, "-o", file)
    assert code == 0, err
    assert "bert, 2 layers, 2 query and 2 key-value heads of 16" in out
    code, _, err = aqua("eval", "retention", bert_folder, "-p", file, *sizes, "--json", figures)
    assert code == 0, err
    rows = json.loads(figures.read_text())["rows"]
    assert {row["selection"] for row in rows} == {"static", "magnitude", "weighted"}
    assert all(0 < row["softmax_loss"] < 1 for row in rows)


def test_a_vision_language_model_has_a_calibration_for_text_and_one_for_images(
    aqua, llava_folder, text_file, pictures, tmp_path
):
    files = [tmp_path / f"{name}.safetensors" for name in ("text", "images", "both")]
    code, out, err = aqua(
        "calibrate", llava_folder, "--data", text_file, "--context", 64, "--tokens", 256, "-o", files[0]
    )
    assert code == 0, err
    assert "language_model.layers.0.self_attn to language_model.layers.2.self_attn" in out
    code, out, err = aqua("calibrate", llava_folder, "--data", pictures, "-o", files[1])
    assert code == 0, err
    assert "vision_tower.encoder.layers.0.self_attn to vision_tower.encoder.layers.1.self_attn" in out
    code, out, err = aqua("merge", files[0], files[1], "-o", files[2])
    assert code == 0, err
    assert list(Projections.load(files[2]).layers) == [0, 1, 2, 3, 4]
    for file in files[1:]:
        code, out, err = aqua("eval", "images", llava_folder, "-p", file, "--data", pictures, "--k-ratio", "0.5")
        assert code == 0, err
        assert "k_ratio 0.5, weighted" in out
    code, _, err = aqua("eval", "images", llava_folder, "-p", files[0], "--data", pictures)
    assert code == 2 and "have no layers that read images" in err
    sizes = ["--data", text_file, "--context", 64, "--tokens", 128]
    for file in (files[0], files[2]):
        code, out, err = aqua("eval", "perplexity", llava_folder, "-p", file, *sizes)
        assert code == 0, err
    for command in ("perplexity", "retention"):
        code, _, err = aqua("eval", command, llava_folder, "-p", files[1], *sizes)
        assert code == 2 and "have no layers that read text" in err
    code, out, err = aqua("eval", "retention", llava_folder, "-p", files[2], *sizes)
    assert code == 0, err


@pytest.mark.parametrize(("side", "layers"), [("text", "language_model.layers"), ("images", "vision_tower.encoder")])
def test_the_side_of_a_vision_language_model_can_be_said(
    aqua, llava_folder, text_file, pictures, tmp_path, monkeypatch, side, layers
):
    """A folder of both, and a dataset of the hub, do not say which side they are for."""
    folder, output = tmp_path / "both", tmp_path / "out.safetensors"
    folder.mkdir()
    for file in (text_file, next(pictures.iterdir())):
        (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"text": text_file.read_text(), "image": Image.open(next(pictures.iterdir()))}]
    datasets = types.SimpleNamespace(load_dataset=lambda *args, **options: rows)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    for data in (folder, "hub:both"):
        sizes = ["--context", 64, "--tokens", 128]
        code, out, err = aqua("calibrate", llava_folder, "--data", data, "--side", side, *sizes, "-o", output)
        assert code == 0, err
        names = Projections.load(output).model["shape"]["names"]
        assert names and all(name.startswith(layers) for name in names)
        assert ("1 images" in out) == (side == "images")
