# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder that are many tiny kernels, found by what they are: norms, MLPs and rotary embeddings."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aqua_attention.attach.swap import ABSENT, Place, current
from aqua_attention.model.capture import AttentionLayer, innermost_decoder, is_plain
from aqua_attention.model.sides import TEXT

ROTARY_FUNCTION = re.compile(r"apply_\w*(rotary|rope)")
LINEAR = nn.Linear, Conv1D
HARMLESS = nn.Dropout, nn.Identity, nn.LayerNorm, nn.RMSNorm
"""What an MLP block may hold beside linear layers, activations and norms written in Python."""
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


@dataclass(frozen=True)
class Part:
    """A module whose forward is compiled, or a function that attention modules find in the globals of their file."""

    name: str
    """Of a module its path in the model, such as "model.layers.0.mlp"."""
    kind: str
    """The name of the class or function; parts of a kind share their compiled code."""
    place: Place
    function: Callable[..., Any]
    """What is compiled; it takes `owner` first."""
    devices: frozenset[str]
    """Types of the devices on which it runs."""
    owner: tuple[nn.Module, ...] = ()
    """The module, or nothing for a function."""

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes without us."""
        return self.function(*self.owner, *args, **kwargs)

    def why_not(self, cuda_only: bool) -> str | None:
        """Why it must be left as it is, now; None when it can be compiled."""
        if cuda_only and self.devices != {"cuda"}:
            return f"it runs on {' and '.join(sorted(self.devices)) or 'no device'}, not on CUDA alone"
        inside = [module for root in self.owner for module in root.modules()]
        strange = (f"it holds a {type(module).__name__}" for module in inside[1:] if not _is_known(module))
        return next(chain(strange, filter(None, map(_why_not, inside))), None)


def find_parts(model: PreTrainedModel, layers: list[AttentionLayer]) -> list[Part]:
    """The norms, MLP blocks and rotary embeddings of the decoder that holds the text layers among `layers`."""
    text = [layer for layer in layers if layer.side == TEXT]
    if not text:
        return []
    decoder, devices = innermost_decoder(model, text), frozenset(layer.device.type for layer in text)
    modules = dict.fromkeys(_outermost(decoder, {layer.module for layer in text}))
    found = [_of_module(path, module, devices) for path, module in model.named_modules() if module in modules]
    return found + list(_rotary_functions(text, devices))


def _of_module(path: str, module: nn.Module, devices: frozenset[str]) -> Part:
    """The part that a module is; one that holds nothing runs on the `devices` of the layers."""
    own = frozenset(each.device.type for each in (*module.parameters(), *module.buffers()))
    place = Place(vars(module), "forward")
    return Part(path, type(module).__name__, place, type(module).forward, own or devices, (module,))


def _outermost(root: nn.Module, attention: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules inside `root` that are parts, but none inside of another part."""
    for module in root.children():
        if is_norm(module) or is_rotary(module):
            yield module
        elif is_mlp(module, attention):
            # Experts, in a list, are run on as many tokens as the router sends them.
            if not isinstance(root, nn.ModuleList):
                yield module
        else:
            yield from _outermost(module, attention)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm written in Python. Those of torch are one kernel already."""
    leaf = _is_empty(module.children()) and _is_empty(module.buffers())
    return leaf and "norm" in type(module).__name__.lower() and not _is_of_torch(module)


def is_mlp(module: nn.Module, attention: set[nn.Module]) -> bool:
    """Whether it holds an activation and linear layers, and no attention."""
    inside = set(module.modules())
    linear = any(isinstance(each, LINEAR) for each in inside)
    return linear and any(map(_is_activation, module.children())) and attention.isdisjoint(inside)


def is_rotary(module: nn.Module) -> bool:
    """Whether it computes cosines and sines of positions from frequencies it holds."""
    frequencies = any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    return frequencies and hasattr(module, "rope_type") and _is_empty(module.parameters())


def _is_activation(module: nn.Module) -> bool:
    files = "torch.nn.modules.activation", "transformers.activations"
    return type(module).__module__.startswith(files) and _is_empty(module.children())


def _is_known(module: nn.Module) -> bool:
    """Whether an MLP block that holds it is one that we know how to compile."""
    return isinstance(module, LINEAR + HARMLESS) or _is_activation(module) or is_norm(module)


def _is_empty(found: Iterator[Any]) -> bool:
    return next(found, None) is None


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.")


def _rotary_functions(layers: list[AttentionLayer], devices: frozenset[str]) -> Iterator[Part]:
    """The functions that turn queries and keys by their positions, in the files of the attention modules."""
    for file in dict.fromkeys(type(layer.module).__module__ for layer in layers):
        namespace = vars(sys.modules[file])
        for name in list(namespace):
            function = current(Place(namespace, name)) if ROTARY_FUNCTION.match(name) else None
            if callable(function):
                yield Part(name, name, Place(namespace, name), function, devices)


def _why_not(module: nn.Module) -> str | None:
    """Why this module, a part or inside of one, cannot be compiled as its class says."""
    if module.training:
        return "it is in training mode"
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        return "it has hooks"
    if current(Place(vars(module), "forward")) is not ABSENT:
        return "its forward was replaced"
    if module._compiled_call_impl is not None:
        return "it is compiled already"
    if not all(map(is_plain, module.parameters())):
        return "its weights are quantised or spread over devices"
    kinds = getattr(module, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if "dynamic" in str(kind) or kind == "longrope":
            return f"its frequencies depend on the length ({kind})"
    return None
