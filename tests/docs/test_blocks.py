# SPDX-License-Identifier: Apache-2.0
"""The code of README and docs/ does what it says: Python is run with small models, and shell commands exist."""

from __future__ import annotations

import pytest
import torch

import aqua_attention as aqua
from conftest import VOCABULARY, calibrated, make_llama
from pages import commands, files

PAGES = files.pages()
IN_PYTHON = [path for path in PAGES if files.blocks(path, "python")]
WITH_COMMANDS = [*PAGES, *(files.ROOT / name for name in ("SERVING.md", "CONTRIBUTING.md"))]
LANGUAGES = {"python", "sh", "text"}


def name_of(path):
    return str(path.relative_to(files.ROOT))


@pytest.fixture
def small(monkeypatch, tmp_path, word_tokenizer):
    """In place of the default model and its texts: a tiny Llama, random words, and a folder for files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ids = torch.randint(0, VOCABULARY - 2, (20_000,), generator=torch.Generator().manual_seed(5)).tolist()

    def load_model(name, **_):
        assert isinstance(name, str)
        return make_llama(max_position_embeddings=4096), word_tokenizer

    monkeypatch.setattr(aqua, "load_model", load_model)
    monkeypatch.setattr(aqua, "load_text", lambda name: " ".join(f"w{number}" for number in ids))
    calibrated(make_llama(max_position_embeddings=4096)).save("model.safetensors")


def pictures(tmp_path):
    """A folder with a tiny CLIP and its image processor, and photographs."""
    image = pytest.importorskip("PIL.Image")
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    shape = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=shape).save_pretrained(tmp_path / "clip")
    bytes_of = torch.randint(0, 256, (16, 40, 40, 3), dtype=torch.uint8).numpy()
    return {"path": str(tmp_path / "clip"), "photos": [image.fromarray(each) for each in bytes_of]}


@pytest.mark.parametrize("path", IN_PYTHON, ids=name_of)
def test_python_runs(path, small, tmp_path):
    """The blocks of a page, one after the other."""
    names = pictures(tmp_path) if path.name == "images.md" else {}
    for block in files.blocks(path, "python"):
        # Lines of a traceback are those of the page.
        code = compile("\n" * block.line + block.code, str(path), "exec")
        exec(code, names)


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_exist_with_their_options(path):
    for block in files.blocks(path, "sh"):
        for words in commands.lines(block):
            assert commands.wrong(words) is None, f"{path.name}, line {block.line}"


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_that_are_mentioned_exist(path):
    assert [found for found in map(commands.wrong_mention, commands.mentioned(path)) if found] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_block_names_a_language_that_is_tested(path):
    fences = files.FENCE.finditer(path.read_text())
    assert {each[1] for each in fences} <= LANGUAGES


@pytest.mark.parametrize(
    "line",
    [
        "aqua calibrat smollm2 -o x",
        "aqua calibrate smollm2",
        "aqua eval perplexity m -p p --k-ration 1",
        "aqua eval perplexity m -p p --k-ratio half",
        "aqua eval nothing m",
        "make nonsense",
        "python benchmarks/none.py",
        "python benchmarks/overhead.py smollm2 --none",
        "AQUA_CONFG=fast vllm serve MODEL",
        "unknown program",
    ],
)
def test_a_wrong_command_is_found(line):
    (words,) = commands.lines(files.Block(files.README, 1, "sh", line))
    assert commands.wrong(words)


def test_a_wrong_setting_of_a_server_is_found():
    with pytest.raises(aqua.AquaError, match="preset"):
        commands.wrong(["AQUA_CONFIG=fastest", "vllm"])


@pytest.mark.parametrize("text", ["aqua evl grid", "aqua eval grids", "aqua eval grid --sweep"])
def test_a_wrong_mention_is_found(text):
    assert commands.wrong_mention(text)
