# SPDX-License-Identifier: Apache-2.0
"""A model's attention layers, and the queries and keys that pass through them."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from aqua_attention.errors import AquaError, brief
from aqua_attention.model import interface, sides
from aqua_attention.model.sides import IMAGES, TEXT, Inputs
from aqua_attention.ops.plan import Call

Observer = Callable[[nn.Module, Tensor, Tensor, float], None]
CHANGES_VALUES = "changes values between its cache and its attention"
ATTENDS_AGAIN = "attends more than once to what it has cached once"
WRAPPED = ("_orig_mod", "module", "model")
"""Where wrappers keep the model: those of torch.compile, of data parallelism, of others."""
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model: where it is and the shape of its heads."""

    index: int
    """No two layers of a model share it. Of a language model's layers it is `layer_idx`, the place in a cache; of
    others the place in the order in which they run; in a vision-language model those of images follow those of text."""
    module: nn.Module
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    device: torch.device
    reads_own_cache: bool
    """Whether its keys come straight from this layer of a `DynamicCache`, so that they can be rotated when written."""
    only_plain: str = ""
    """Why only a plain cache will do, which hands out the very values it was given; empty: any cache will do."""
    name: str = ""
    """Where the module is in the base model, such as "vision_tower.encoder.layers.0.self_attn"."""
    causal: bool = True
    """Whether a token sees those before it only; False in encoders."""
    side: str = TEXT
    """What it runs on, "text" or "images", see `sides`."""


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[dict[nn.Module, bool]]:
    """While open, `observer(module, query, key, scaling)` sees each attention call; the model's results stay dense.

    query: [batch, num_attention_heads, length, head_dim], key: [batch, num_key_value_heads, length, head_dim], as
    they enter the scores: after rotary embedding and after any query-key norm. The dictionary says of each module that
    has called whether its attention is causal. What other threads do with the model is not observed.
    """
    with watched(model, lambda module, call: observer(module, call.query, call.key, call.scaling)) as directions:
        yield directions


@contextmanager
def watched(model: PreTrainedModel, observer: Callable[[nn.Module, Call], None]) -> Iterator[dict[nn.Module, bool]]:
    """As `observed`, by an `observer(module, call)` that sees the whole call."""
    directions: dict[nn.Module, bool] = {}
    here = threading.get_ident()

    def dense(module: nn.Module, call: Call, causal: bool, _: dict[str, Any]) -> Tensor:
        if threading.get_ident() == here:
            directions[module] = causal
            observer(module, call)
        if call.mask is not None and call.mask.shape[2] != call.query.shape[2]:
            raise AquaError(f"{name} makes one mask for all queries, which AQUA does not support")
        return interface.attend_dense(interface.directed(call, causal))

    name = type(model).__name__
    attention = interface.attention_function(name, dense)
    _, undo = interface.install(model, attention, interface.mask_builder(0, 0))
    try:
        yield directions
    finally:
        undo()


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The layers of `layers_and_gaps`."""
    return layers_and_gaps(model)[0]


def layers_and_gaps(model: PreTrainedModel) -> tuple[list[AttentionLayer], list[str]]:
    """The attention layers of a model in order, and why some could not be found ("its image layers could not ...").

    Each side is run on a small input and watched, and the run compared with the model's own attention. Unlike a look at
    class names, this shows that a layer sends its attention through the interface. There are gaps where a model
    takes images in a form that AQUA does not know how to make. An AquaError where it does not send its attention
    through transformers' interface, or is no decoder or encoder of text or images.
    """
    if not isinstance(model, PreTrainedModel):
        inside = _model_inside(model)
        remedy = f", such as the {inside[1]} in it: give model{inside[0]}" if inside else ""
        raise AquaError(f"model is a {type(model).__name__}: a transformers PreTrainedModel is needed{remedy}")
    name = type(model).__name__
    modules = list(model.modules())
    if any(each.is_meta for each in model.parameters()) and not any(hasattr(each, "_hf_hook") for each in modules):
        raise AquaError(f"{name} is on the meta device, so it has no weights: load them, as from_pretrained does")
    if getattr(model.config, "is_encoder_decoder", False):
        raise AquaError(f"{name} is an encoder-decoder: only decoders and encoders alone are supported")
    with interface.looking_at(model):
        return _found(model)


def _found(model: PreTrainedModel) -> tuple[list[AttentionLayer], list[str]]:
    name = type(model).__name__
    layers: list[AttentionLayer] = []
    gaps: list[str] = []
    for side in sides.sides(model):
        try:
            probed = _probed(model, side)
        except _DoesNotRun as error:
            if not layers:
                raise
            gaps.append(f"its image layers could not be found ({error.reason})")
            continue
        _check_finite(name, probed)
        _check_same(model, probed)
        first = 1 + max((layer.index for layer in layers), default=-1)
        layers += sorted(_described(model, side, probed, first), key=lambda layer: layer.index)
    if not layers:
        raise AquaError(f"{name} made no attention call: AQUA needs a model with attention layers")
    if len({layer.index for layer in layers}) < len(layers):
        raise AquaError(f"{name} has attention layers that share a layer index: this architecture is not supported")
    return layers, gaps


def _model_inside(model: Any) -> tuple[str, str] | None:
    """The transformers model in what wraps it (torch.compile, PEFT, data parallelism, a pipeline): where, its class."""
    path = ""
    while not isinstance(model, PreTrainedModel):
        if callable(inner := getattr(model, "get_base_model", None)):
            path, model = f"{path}.get_base_model()", inner()
            continue
        place = next((each for each in WRAPPED if isinstance(getattr(model, each, None), nn.Module)), None)
        if place is None:
            return None
        path, model = f"{path}.{place}", getattr(model, place)
    return path, type(model).__name__


class _DoesNotRun(AquaError):
    """None of the inputs that we know of runs one side of a model."""

    def __init__(self, name: str, side: str, reason: str) -> None:
        alone, self.reason = "token ids" if side == TEXT else "images", reason
        super().__init__(f"{name} does not run on {alone} alone, so it is not supported ({reason})")


@dataclass
class _Probed:
    """What running one side of a model on a small input showed."""

    run: Callable[..., Any]
    inputs: dict[str, Tensor]
    calls: dict[nn.Module, list[Call]]
    """The attention calls of each module, in order."""
    causal: dict[nn.Module, bool]
    output: Any
    """Under our dense attention, with a cache where the model takes one."""
    expected: Tensor
    """First tensor of the output under the model's own attention."""


def _probed(model: PreTrainedModel, side: str) -> _Probed:
    """Run one side on the first of its `probes` that it takes, under our dense attention and under its own."""
    name, run = type(model).__name__, sides.runner(model, side)
    cached = {"use_cache": True} if side == TEXT and run is model and _knows_cache(model) else {}
    calls: dict[nn.Module, list[Call]] = {}
    failed: Exception | None = None
    for probe in sides.probes(model, side):
        inputs = (
            {"input_ids": probe["input_ids"].to(input_device(model))} if side == TEXT else sides.placed(probe, model)
        )
        calls.clear()
        try:
            with torch.no_grad(), evaluation_mode(model):
                with watched(model, lambda module, call: calls.setdefault(module, []).append(call)) as causal:
                    output = run(**inputs, **cached)
                return _Probed(run, inputs, calls, causal, output, sides.first_tensor(run(**inputs)))
        except AquaError as error:
            raise error if name in str(error) else AquaError(f"{name}: {error}") from error
        except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError, IndexError) as error:
            failed = failed or error
    raise _DoesNotRun(name, side, f"{type(failed).__name__}: {failed}".splitlines()[0][:200]) from failed


def _check_finite(name: str, probed: _Probed) -> None:
    """No NaN may pass: compared with anything, it would look like no difference."""
    remedy = "the weights are damaged or the dtype is too narrow (try --dtype float32)"
    for module, calls in probed.calls.items():
        if not all(bool(torch.isfinite(each).all()) for call in calls for each in (call.query, call.key)):
            layer = getattr(module, "layer_idx", None)
            raise AquaError(f"layer {layer} of {name} gives NaN or infinite queries or keys: {remedy}")
    if bool(torch.isnan(probed.expected).any()):
        raise AquaError(f"{name} gives NaN: {remedy}")


def _check_same(model: PreTrainedModel, probed: _Probed) -> None:
    """Under our dense attention a model gives what it gives under its own, or scores hold more than q and k."""
    name, found, expected = type(model).__name__, sides.first_tensor(probed.output), probed.expected
    # A quantised model may round activations too: then the last bit of an attention output moves logits by percents.
    exact = found.dtype in (torch.float32, torch.float64) and all(map(is_plain, model.parameters()))
    tolerance = 1e-2 if exact else 0.2
    difference = _difference(found, expected)
    if not difference > tolerance:
        return
    with torch.no_grad(), evaluation_mode(model):
        again = sides.first_tensor(probed.run(**probed.inputs))
    if _difference(again, expected) > tolerance:
        raise AquaError(f"{name} gives something else each time it runs on the same input: it is not supported")
    raise AquaError(
        f"{name} computes more than softmax attention of queries and keys (its output changes by {difference:.0%} "
        "under plain attention), which AQUA does not support"
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def _described(model: PreTrainedModel, side: str, probed: _Probed, first: int) -> list[AttentionLayer]:
    """The modules that called attention; `first` is the first index that the layers of the other side leave free."""
    cache = getattr(probed.output, "past_key_values", None)
    names = {module: path.removeprefix(f"{model.base_model_prefix}.") for path, module in model.named_modules()}
    layers: list[AttentionLayer] = []
    for module, calls in probed.calls.items():
        index, causal = getattr(module, "layer_idx", None) if side == TEXT else None, probed.causal[module]
        query, key = calls[-1].query, calls[-1].key
        is_cached = _are_cached(cache, index, "key", calls) and key.shape[2] == query.shape[2]
        only_plain = "" if _are_cached(cache, index, "value", calls) else CHANGES_VALUES
        if is_cached and not causal and (model.can_generate() or IMAGES in sides.sides(model)):
            # PaliGemma: neither an encoder, nor a decoder whose tokens never see a later one.
            raise AquaError(
                f"{type(model).__name__} is not causal, yet generates from a cache: only decoders and encoders are "
                "supported"
            )
        index = first + len(layers) if index is None else index
        heads = query.shape[1], key.shape[1], query.shape[-1]
        of_module = {"name": names[module], "causal": causal, "side": side, "reads_own_cache": is_cached and causal}
        of_module["only_plain"] = only_plain if len(calls) == 1 else ATTENDS_AGAIN
        layers.append(AttentionLayer(index, module, *heads, key.device, **of_module))
    return layers


def _are_cached(cache: Any, index: int | None, name: str, calls: list[Call]) -> bool:
    """Whether each call got the very "key" or "value" that layer `index` of an ordinary `DynamicCache` holds."""
    if type(cache) is not DynamicCache or index is None or index >= len(cache.layers):
        return False
    stored = getattr(cache.layers[index], f"{name}s", None)
    return isinstance(stored, Tensor) and all(_is_untouched(getattr(call, name), stored) for call in calls)


def _is_untouched(given: Tensor, stored: Tensor) -> bool:
    """Whether a tensor is what a cache has just made by torch.cat, and nobody has written to it."""
    same = (given.shape, given.stride(), given.data_ptr()) == (stored.shape, stored.stride(), stored.data_ptr())
    return same and (given.is_inference() or given._version == 0)


def _knows_cache(model: PreTrainedModel) -> bool:
    """Whether `model` can be told to use a cache; some encoders cannot."""
    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def chosen_layers(layers: list[AttentionLayer], pattern: str | None, gaps: Sequence[str] = ()) -> list[AttentionLayer]:
    """Those of `layers` whose name matches a pattern as of file names, such as "vision_tower.*"; None: all.

    An AquaError, which names the `gaps` of `layers_and_gaps`, where there is none.
    """
    if not isinstance(pattern, str | None):
        raise AquaError(f"layers is {brief(pattern)}: give one pattern of names, such as 'vision_tower.*'")
    chosen = [layer for layer in layers if pattern is None or fnmatchcase(layer.name, pattern)]
    if layers and not chosen:
        first, last = layers[0].name, layers[-1].name
        missing = "".join(f"; {gap}" for gap in gaps)
        raise AquaError(f"no attention layer has a name like {pattern!r}: the names go from {first} to {last}{missing}")
    return chosen


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout while open; then every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def observe_windows(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    windows: Tensor | Sequence[Inputs],
    observer: Observer,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """One dense forward pass for each window, watched by `observer`.

    Windows are token ids [count, context], or what the model is called with, such as the `pixel_values` of an image.
    """
    with interface.looking_at(model), observed(model, observer), torch.no_grad(), evaluation_mode(model):
        for done, window in enumerate(windows):
            if progress:
                progress(done, len(windows))
            run_encoder_or_decoder(model, layers, {"input_ids": window[None]} if isinstance(window, Tensor) else window)
    if progress:
        progress(len(windows), len(windows))


def run_encoder_or_decoder(model: PreTrainedModel, layers: list[AttentionLayer], inputs: Inputs) -> Any:
    """Run the part of `model` that reads `inputs`: all of it only on text and images together."""
    if "input_ids" not in inputs:
        forward = sides.runner(model, IMAGES)
        return forward(**sides.accepted(forward, sides.placed(inputs, model)))
    if "pixel_values" in inputs:
        return model(**sides.placed(inputs, model))
    # The language-model head says nothing about queries and keys, and costs more than observing does.
    text = innermost_decoder(model, [layer for layer in layers if layer.side == TEXT])
    options = {"use_cache": False} if _knows_cache(text) else {}
    device = input_device(model)
    return text(**{name: value.to(device) for name, value in inputs.items()}, **options)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the token ids of `model` belong; the CPU when its embeddings are offloaded."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # a model of pairs, as CLIP
        return sides.device_of(model)
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        raise AquaError(f"{type(model).__name__} has no token embeddings: a decoder language model is needed")
    return weight.device if weight.device.type != "meta" else torch.device("cpu")


def is_plain(weight: Tensor) -> bool:
    """Whether `weight` holds ordinary floats. Quantised ones are integers, float8, or of a class of their own."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in PLAIN_DTYPES


def innermost_decoder(model: PreTrainedModel, layers: list[AttentionLayer]) -> PreTrainedModel:
    """The smallest PreTrainedModel inside `model` that holds all attention layers (no language-model head)."""
    modules = {layer.module for layer in layers}
    holders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and modules <= set(part.modules())]
    return holders[-1]
