# SPDX-License-Identifier: Apache-2.0
"""The sides of a model, text and images: how each is run without the other, on what to try it, and what it reads."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError

TEXT, IMAGES = "text", "images"
Inputs = Mapping[str, Tensor]
"""What a model is called with: `input_ids`, or `pixel_values` and what goes with them, or both."""
_MASKS = ("attention_mask", "pixel_attention_mask", "pixel_mask")


def sides(model: PreTrainedModel) -> tuple[str, ...]:
    """What `model` reads: "text", "images", or both; an AquaError for neither, such as sound."""
    if model.main_input_name == "pixel_values":
        return (IMAGES,)
    if model.main_input_name != "input_ids":
        raise AquaError(
            f"{type(model).__name__} reads {model.main_input_name}: AQUA knows models of text and of images"
        )
    return (TEXT, IMAGES) if hasattr(model, "get_image_features") else (TEXT,)


def runner(model: PreTrainedModel, side: str) -> Callable[..., Any]:
    """What runs one side of `model` alone: the model itself, or its method for the features of that side."""
    if sides(model) == (side,):
        return model
    # A model of pairs, as CLIP, runs on both only; the text of a language model needs no image.
    name = "get_image_features" if side == IMAGES else "get_text_features"
    return getattr(model, name, model)


def accepted(forward: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Those of `inputs` that `forward` names; an image processor may give more than one side of a model takes."""
    target = forward.forward if isinstance(forward, torch.nn.Module) else forward
    names = inspect.signature(target).parameters
    return {name: value for name, value in inputs.items() if name in names}


def probes(model: PreTrainedModel, side: str) -> Iterator[dict[str, Tensor]]:
    """Small inputs for one side of `model`; of images in each form that models take, of which one should run."""
    if side == TEXT:
        yield {"input_ids": torch.arange(4)[None]}
        return
    config = getattr(model.config, "vision_config", None) or model.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    if "image_grid_thw" in inspect.signature(runner(model, side)).parameters:
        # Patches of any number of images, one after the other, as Qwen-VL.
        patch, grid = config.patch_size, 2 * getattr(config, "spatial_merge_size", 1)
        width = channels * getattr(config, "temporal_patch_size", 1) * patch**2
        yield {"pixel_values": noise(grid**2, width), "image_grid_thw": torch.tensor([[1, grid, grid]])}
        return
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    image = noise(1, channels, height, width)
    yield {"pixel_values": image}
    yield {"pixel_values": image[None]}  # several images, or parts of one, in each row


def first_tensor(output: Any) -> Tensor:
    """The first tensor in what a model returned, however it is wrapped."""
    if isinstance(output, Tensor):
        return output
    parts: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    for part in parts:
        if part is not None:
            return first_tensor(part)
    raise AquaError("the model returns no tensor: AQUA needs one that returns logits or embeddings")


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the inputs of `model` belong; the CPU when its weights are offloaded."""
    return next((weight.device for weight in model.parameters() if weight.device.type != "meta"), torch.device("cpu"))


def placed(inputs: Inputs, model: PreTrainedModel) -> dict[str, Tensor]:
    """`inputs` on the model's device, pixels in its dtype."""
    device = device_of(model)
    return {
        name: value.to(device=device, dtype=model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def inputs_digest(inputs: Sequence[Inputs]) -> str:
    """SHA-256 of what a model reads, or of any tensors by name, in hexadecimal."""
    digest = hashlib.sha256()
    for each in inputs:
        for key in sorted(each):
            digest.update(f"{key} {tuple(each[key].shape)}".encode())
            digest.update(each[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def given_sides(inputs: Sequence[Inputs]) -> set[str]:
    """The sides that have something to read in `inputs`, see `sides`."""
    keys = {TEXT: "input_ids", IMAGES: "pixel_values"}
    return {side for side, key in keys.items() if any(key in each for each in inputs)}


def padding(inputs: Inputs) -> str | None:
    """The name of the mask in `inputs` that hides padding; None without padding."""
    return next((name for name in _MASKS if name in inputs and not bool(inputs[name].all())), None)


def check_unpadded(inputs: Sequence[Inputs]) -> None:
    """Raise AquaError for padding, whose queries and keys would count like real ones."""
    for number, each in enumerate(inputs):
        if mask := padding(each):
            raise AquaError(
                f"input {number} is padded ({mask} is not all ones): "
                "give sequences and images without padding, one by one"
            )
