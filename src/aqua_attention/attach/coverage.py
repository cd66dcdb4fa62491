# SPDX-License-Identifier: Apache-2.0
"""Which of a model's attention layers are under AQUA, which stay dense, and which must not run at all."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from aqua_attention.cache.stored import needs_own_cache
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError, Reason
from aqua_attention.model.capture import AttentionLayer, chosen_layers, innermost_decoder, layers_and_gaps
from aqua_attention.model.interface import install

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Coverage:
    """The layers that projections and a pattern of names take, and the others.

    Attributes:
        covered: the layers that the projections are for.
        found: those of them that the pattern takes.
        left: the other layers that were found in the model, and whether they are causal.
        dense: what stays dense, by name. Attention of a kind that AQUA cannot take is on the list too: torch's own
            module, as in the pooling head of SigLIP, and layers that could not be found, with the reason.
        alone: whether every other layer that calls AQUA is to be refused, because it was not left out on purpose.
    """

    def __init__(self, model: PreTrainedModel, projections: Projections, pattern: str | None) -> None:
        """Look the layers up; an AquaError where the model cannot take AQUA, or no layer has such a name."""
        every, gaps = layers_and_gaps(model)
        self.name, self.gaps, self._pattern = type(model).__name__, gaps, pattern
        self._model, self._projections = model, projections
        self.covered = projections.covered(every)
        self.found = chosen_layers(self.covered, pattern, gaps)
        self.left = {layer.module: layer.causal for layer in every if layer not in self.found}
        self.dense = [layer.name for layer in every if layer.module in self.left]
        is_part = pattern is not None or "names" in projections.model["shape"] or bool(self.left)
        self.alone = not is_part or not (self.left or gaps)
        if gaps and not self.alone:
            self.dense += [gap.removeprefix("its ") for gap in gaps]
        self.dense += [
            name.removeprefix(f"{model.base_model_prefix}.")
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        ]

    def key_weights(self) -> dict[nn.Module, list[float] | None]:
        """Digests of the covered layers as they are now; errors and a warning as of `Projections.check_model`."""
        rows = self._projections.check_model(self._model, self.covered)
        return {layer.module: rows[place] if rows else None for place, layer in enumerate(self.covered)}

    def rotates_on_write(self, config: AquaConfig, foreign: str) -> bool:
        """Whether a cache can hold the keys of the causal layers rotated; `foreign`: see `cache.foreign_layers`.

        An AquaError where it cannot store what `config` asks for.
        """
        layers = [layer for layer in self.found if layer.causal]
        needs, reads_own_cache = needs_own_cache(config), bool(layers) and all(each.reads_own_cache for each in layers)
        if needs and foreign:
            raise AquaError(f"{needs} is impossible, because {foreign}: leave {needs.split('=')[0]} out")
        if needs and not reads_own_cache:
            raise AquaError(
                f"{self.name} does not take its keys straight from its cache, so that {needs} would save nothing: "
                "leave it out"
            )
        if needs and any(self.left.values()):
            raise AquaError(f"{needs} is for all layers of a language model: leave it out, or the pattern of layers")
        if not needs and reads_own_cache and config.sink + config.recent > 0:
            narrow = any(config.kept_dims(layer.head_dim) < layer.head_dim for layer in layers)
            needs = f"s_ratio={config.s_ratio:g} with an exact window" if narrow else ""
        if needs and (only_plain := next(filter(None, (layer.only_plain for layer in layers)), None)):
            remedy = "give sink=0, recent=0" if "window" in needs else "leave it out"
            raise AquaError(f"{self.name} {only_plain}, which a cache with {needs} cannot follow: {remedy}")
        return reads_own_cache

    def why_no_tiles(self) -> str | None:
        """Why no cache is for the decoding kernels; None when there are no causal layers that stay dense."""
        if not any(self.left.values()):
            return None
        text = "some layers are left dense, and a mask of the size that they need is not made for a decoding step"
        remedy = "leave out the pattern of layers (layers=...)" if self._pattern else "calibrate all layers"
        return Reason(text, remedy)

    def check_call(self, module: nn.Module, is_causal: bool, dropout: float, found_causal: bool | None) -> None:
        """Raise AquaError for an attention call of an unknown layer, or of one that has changed since it was found.

        `found_causal` is whether it was causal when it was found; None for one that is not among `found`.
        """
        if found_causal is None and module not in self.left:
            reason = (
                "; ".join(self.gaps)
                or "either another model shares this one's config, or it was added later; load the other model anew, "
                "or attach again"
            )
            remedy = "; to leave them dense, name the other layers by a pattern (layers=...)" if self.gaps else ""
            raise AquaError(
                f"{type(module).__name__} called AQUA attention, but AQUA was not attached to it: {reason}{remedy}"
            )
        if is_causal != (self.left[module] if found_causal is None else found_causal):
            raise AquaError(
                f"{self.name} is {'' if is_causal else 'not '}causal in this call, other than when AQUA was "
                "attached: attach it again"
            )
        if dropout > 0:
            raise AquaError("AQUA attention has no dropout: call model.eval(), or set attention_dropout to 0")


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
        stack: layers that are all causal or all not, so that one `mask` function (see `interface.install`) is right.
        alone: whether the model has no others. Else only modules with a config of these layers' are sent there.
        before_forward: maps the inputs of each forward pass of the smallest model that holds the stack.
    """
    configs = None if alone else _configs(model, stack)
    name, undo = install(model, attention, mask, configs)
    holder = innermost_decoder(model, stack)
    hook = ForwardHook(name, holder.config if configs is None else configs[0], before_forward)
    return [undo, holder.register_forward_pre_hook(hook, with_kwargs=True).remove]


class ForwardHook:
    """Changes the inputs of each forward pass while the config names our attention. In a copied or pickled model it
    does nothing.
    """

    def __init__(self, name: str = "", config: Any = None, change: Callable[..., Inputs] | None = None) -> None:
        """Hand what a module is called with to `change`; an AquaError where `config` has another name than `name`."""
        self._name, self._config, self._change = name, config, change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """The inputs to go on with; None: as they are."""
        if self._change is None:
            return None
        implementation = self._config._attn_implementation
        if implementation != self._name:
            raise AquaError(
                f"the model's attention was set to {implementation!r} while AQUA is attached: detach AQUA first"
            )
        return self._change(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


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
            f"the attention layers of {type(model).__name__} have no config: AQUA can only take all of them, "
            "leave layers out"
        )
    return list({id(config): config for config in found}.values())
