# SPDX-License-Identifier: Apache-2.0
"""AQUA in one stack of a model's layers, such as those that read images, and not in the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.model.capture import AttentionLayer, innermost_decoder
from aqua_attention.model.interface import NAME_PREFIX, install

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def install_stack(
    model: PreTrainedModel,
    stack: list[AttentionLayer],
    alone: bool,
    attention: Callable[..., Any],
    mask: Callable[..., Tensor | None],
    before_forward: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Inputs],
) -> list[Callable[[], None]]:
    """Send the calls of some layers to `attention`; returns what undoes it.

    Args:
        stack: layers that are all causal or all not, so that one mask function is right for them.
        alone: whether there are no other layers in the model. Else only modules with a config of these layers' are sent
            there.
        mask: see `interface.install`.
        before_forward: maps the inputs of each forward pass of the smallest model that holds the stack.
    """
    configs = None if alone else _configs(model, stack)
    name, undo = install(model, attention, mask, configs)
    holder = innermost_decoder(model, stack)
    watched: Any = holder.config if configs is None else configs[0]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        implementation = watched._attn_implementation
        if implementation == name:
            return before_forward(module, args, kwargs)
        if str(implementation).startswith(NAME_PREFIX):
            return args, kwargs  # being observed: dense for a moment, see capture.py
        raise AquaError(
            f"the model's attention was set to {implementation!r} while AQUA is attached: detach AQUA first"
        )

    return [undo, holder.register_forward_pre_hook(hook, with_kwargs=True).remove]


def check_stacks(model: PreTrainedModel, stacks: list[list[AttentionLayer]]) -> None:
    """Raise AquaError where two stacks share a config: it names one mask function, which is wrong for one of them."""
    if len(stacks) > 1:
        configs = [{id(config) for config in _configs(model, stack)} for stack in stacks]
        if set.intersection(*configs):
            raise AquaError(
                f"causal and bidirectional attention layers of {type(model).__name__} share a config: give AQUA one "
                "kind of them, by a pattern of names (layers=...)"
            )


def _configs(model: PreTrainedModel, stack: list[AttentionLayer]) -> list[Any]:
    """The configs of the layers, each once."""
    found = [getattr(layer.module, "config", None) for layer in stack]
    if None in found:
        raise AquaError(
            f"the attention layers of {type(model).__name__} have no config: AQUA can only take all of them"
        )
    return list({id(config): config for config in found}.values())
