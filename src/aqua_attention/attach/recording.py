# SPDX-License-Identifier: Apache-2.0
"""Decoding steps recorded as CUDA graphs: the host launches one graph where it launched hundreds of kernels.

A graph knows the addresses of what it reads and writes, so a step is recorded for one cache and replayed for it alone.
The first step after a prompt runs as always, the second is recorded, the others are replayed. Before all that, one step
is rehearsed: a model that waits for a value in it is not recorded.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map_only
from transformers import Cache, PreTrainedTokenizerBase

from aqua_attention.attach.observers import noted, observers_of, tell
from aqua_attention.attach.rehearsal import GeneratingThreads, Rehearsal, as_recorded
from aqua_attention.errors import Reason

CACHE, MASK = "past_key_values", "attention_mask"
Key = tuple[Any, ...]
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
FIXED = (Tensor, *PLAIN, PreTrainedTokenizerBase)
"""What a recording can have as an input; `generate` hands the tokenizer of stop strings on to the model."""
OUR_HOOKS = ("aqua_attention.", "transformers.")
"""Hooks of these packages do nothing in a step that a replay would miss."""


NO_STEP, FIRST_STEP = Reason("no step so far"), Reason("the first step is not recorded")
NO_GRAPHS = Reason("only steps on a CUDA GPU are recorded")
CHANGING = Reason("inputs other than tokens change from step to step")
MOST_CHANGES = 3
"""In one call. A model whose inputs grow would be recorded anew in each step."""
NATURAL = (NO_STEP, FIRST_STEP, NO_GRAPHS)
"""Reasons against which nothing can or need be done."""
threads = GeneratingThreads()


class CudaGraph:
    """One recorded step. Tests put another class in its place, where there is no GPU."""

    device = "cuda"

    def __init__(self, where: torch.device) -> None:
        """One on this device, which need not be the current one."""
        self._where = where

    def record(self, run: Callable[[], Any]) -> Any:
        """Record what `run` launches; returns what it returns, which each replay writes anew."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._where):
            # torch's own stream for this lies on the device that was the current one first.
            stream = torch.cuda.Stream(self._where)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                return run()

    def replay(self) -> None:
        """Run it again."""
        with torch.cuda.device(self._where):
            self._graph.replay()


@dataclass(eq=False)
class GenerateCall:
    """One call of `generate`, and what it did.

    Attributes:
        extends_masks: see `Recorder.generating`.
        has_graphs: whether there are graphs where the model is.
        changes: how often a step's inputs were of another shape than those of the step before.
        steps: decoding steps; replays: those of them that were replayed; seconds: spent on recording.
    """

    extends_masks: bool = True
    has_graphs: bool = True
    changes: int = 0
    steps: int = 0
    replays: int = 0
    seconds: float = 0.0


class RecordedSteps:
    """What is known of the decoding steps of one cache.

    Attributes:
        graph: the recorded step; None before it is recorded.
        inputs: where it reads its inputs; outputs: what it writes, but for the cache; kind: the type that holds them.
        observed: what observers are told after each replay, with their names.
        key, state: the inputs, and the model and memory of the cache, that it was recorded for.
        call: the call of `generate` that the last step was part of.
        is_fresh: whether something else than a step came last, so that everything must be looked at again.
        left: tokens for which there is room.
        refused: why steps of this cache are not recorded any more.
    """

    graph: CudaGraph | None
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    kind: Callable[..., Any]

    def __init__(self) -> None:
        self.refused: str | None = None
        self.call: GenerateCall | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the recording: an address has changed, or the model."""
        self.graph, self.is_warm, self.is_fresh, self.left = None, False, True, 0
        self.inputs, self.outputs = {}, {}
        self.observed: list[Any] = []
        self.key: Any = None
        self.state: Any = None


class Recorder:
    """Stands before a model's `forward`, and replays decoding steps inside `generate`.

    Attributes:
        reason: why the last forward pass was not replayed; empty when it was.
        seconds: what the last recording took.
        replays: steps replayed so far.
        last: what the last call of `generate` did, or does.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        why_not: Callable[[Any, Tensor | None], str | None],
        *,
        parts: Callable[[], AbstractContextManager[Any]] = nullcontext,
        observing: Any = None,
    ) -> None:
        """For one model.

        Args:
            forward: the model's own.
            why_not: maps a cache and the attention mask to why its next step cannot be recorded; None when it can. The
                cache has `max_length`, tokens it has room for.
            parts: a context in which the step runs that is recorded, and the one before: parts of the model compiled.
            observing: has observers, see `Attachment`.
        """
        self.model, self._forward, self._why_not = model, forward, why_not
        self._parts, self._observing, self._graph = parts, observing, CudaGraph
        self._steps: WeakKeyDictionary[Any, RecordedSteps] = WeakKeyDictionary()
        self._rehearsed: dict[Key, str | None] = {}
        """By inputs, why the model's step cannot be recorded; None when it can."""
        self._local = threading.local()
        self.reason: str = NO_STEP
        self.seconds, self.replays, self.last = 0.0, 0, GenerateCall()

    @contextmanager
    def generating(self, extends_masks: bool = True) -> Iterator[None]:
        """While open, steps of this thread are replayed: `generate` changes no weights between them.

        Args:
            extends_masks: a mask only grows by tokens that are seen, so that it is looked at once; else in each step.
        """
        before = getattr(self._local, "call", None)
        self._local.call = call = GenerateCall(extends_masks, self.has_graphs())
        self.last = before or call
        try:
            with threads.one_more():
                yield
        finally:
            self._local.call = before

    def forget(self) -> None:
        """Drop all recordings."""
        self._steps.clear()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward pass, replayed where it is a step that was recorded."""
        call = getattr(self._local, "call", None)
        if torch.compiler.is_compiling() or call is None:
            return self._forward(*args, **inputs)
        cache, tokens = inputs.get(CACHE), inputs.get("input_ids")
        is_step = not args and isinstance(tokens, Tensor) and tokens.shape[1] == 1
        call.steps += is_step
        if not call.has_graphs:
            self.reason = NO_GRAPHS
            return self._forward(*args, **inputs)
        if not isinstance(cache, Cache):
            self.reason = Reason("there is no cache", "set use_cache=True")
            return self._forward(*args, **inputs)
        steps = self._steps.setdefault(cache, RecordedSteps())
        if steps.call is not call:  # its user may have done anything to the cache in between
            steps.call, steps.is_fresh = call, True
        if not is_step:
            steps.is_fresh, self.reason = True, NO_STEP
            return self._forward(*args, **inputs)
        return self._step(steps, cache, inputs)

    def has_graphs(self) -> bool:
        """Whether there are graphs where the model is, or a part of it."""
        return any(weight.device.type == self._graph.device for weight in self.model.parameters())

    def _step(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any]) -> Any:
        key = self._key(inputs)
        is_new = steps.is_fresh or steps.left == 0 or key != steps.key
        self._local.call.changes += steps.key is not None and key != steps.key
        if reason := self._why_not_begin(steps, cache, inputs, key) if is_new else self._why_not_go_on(cache, inputs):
            self.reason, steps.is_fresh = reason, True
            return self._forward(**inputs)
        if is_new:
            self._begin(steps, cache, key)
        steps.left -= 1
        if not steps.is_warm:
            steps.is_warm, self.reason = True, FIRST_STEP
            with self._parts():
                return self._forward(**inputs)
        if key not in self._rehearsed:
            return self._rehearse(steps, key, inputs)
        if steps.graph is None and not self._record(steps, cache, inputs):
            steps.is_fresh = True
            return self._forward(**inputs)
        return self._replay(steps, cache, inputs)

    def _rehearse(self, steps: RecordedSteps, key: Key, inputs: dict[str, Any]) -> Any:
        """Run a step as if it were recorded, after one in which everything is checked as always.

        Not with compiled parts, which torch does not run under a mode.
        """
        self.reason = "the first step is rehearsed"
        with as_recorded(), Rehearsal() as rehearsal:
            outputs = self._forward(**{name: value for name, value in inputs.items() if name != MASK})
        self._rehearsed[key] = rehearsal.reason
        steps.is_fresh = rehearsal.reason is not None
        return outputs

    def _key(self, inputs: dict[str, Any]) -> Key:
        """What must be the same for a recording to be the step that these inputs ask for."""
        found: list[Any] = [torch.is_inference_mode_enabled(), *observers_of(self._observing)]
        found.append(_autocast(self._graph.device))
        for name in sorted(inputs.keys() - {CACHE, MASK}):
            value = inputs[name]
            found.append((name, (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value))
        return tuple(found)

    def _why_not_go_on(self, cache: Any, inputs: dict[str, Any]) -> str | None:
        """Why the step after one that could be recorded cannot be."""
        mask = inputs.get(MASK)
        return None if mask is None or self._local.call.extends_masks else self._why_not(cache, mask)

    def _why_not_begin(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any], key: Key) -> str | None:
        if self._local.call.changes > MOST_CHANGES:
            return CHANGING
        if reason := steps.refused or self._rehearsed.get(key) or self._why_not(cache, inputs.get(MASK)):
            return reason
        if reason := why_not_recorded(self.model):
            return reason
        if torch.is_grad_enabled():
            return Reason("gradients are being recorded", "use torch.no_grad()")
        others = (name for name, value in inputs.items() if name != CACHE and not isinstance(value, FIXED))
        if other := next(others, None):
            return f"{other} is a {type(inputs[other]).__name__}, and only tensors and numbers can be recorded"
        if inputs.get("return_dict") is False:
            return Reason("return_dict is False", "leave return_dict out")
        mask = inputs.get(MASK)
        if mask is not None and inputs.get("position_ids") is None:
            return Reason("there is a mask and no position_ids", "give position_ids")
        return None

    def _begin(self, steps: RecordedSteps, cache: Any, key: Key) -> None:
        """Look at what a replay takes for granted: room, inputs, the model."""
        held = int(cache.get_seq_length())
        if held >= cache.max_length:
            steps.forget()
            cache.make_room(held + 1)
        if steps.graph is not None and (key != steps.key or steps.state != self._state(cache)):
            steps.forget()
        steps.key, steps.is_fresh, steps.left = key, False, cache.max_length - held

    def _state(self, cache: Any) -> list[Any]:
        """What a recording takes for granted: of the model, and where the cache lies and how large it is."""
        addresses = (address for layer in cache.layers for address in _addresses(layer))
        return [*model_state(self.model), cache.max_length, *addresses]

    def _record(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any]) -> bool:
        """Record a step; whether that was possible. Nothing is computed, and the cache does not change."""
        start, graph = time.perf_counter(), self._graph(next(self.model.parameters()).device)
        steps.inputs = {
            name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
            if name not in (CACHE, MASK)
        }
        with threads.kept_out() as is_alone:
            if not is_alone:
                self.reason = Reason("another thread generates, which a recording would disturb")
                return False
            try:
                with (
                    self._parts(),
                    noted(self._observing, steps.observed),
                    as_recorded(),
                    self._without_autocast_cache(),
                ):
                    outputs = graph.record(lambda: self._forward(**steps.inputs, **{CACHE: cache}))
            except Exception as error:  # without a recording it may be none, or say it better
                steps.refused = self.reason = Reason(f"recording failed: {(str(error).splitlines() or [''])[0][:160]}")
                return False
        steps.kind = type(outputs)
        steps.outputs = {name: value for name, value in outputs.items() if name != CACHE}
        steps.graph, steps.state = graph, self._state(cache)
        self.seconds = time.perf_counter() - start
        self.last.seconds += self.seconds
        return True

    def _without_autocast_cache(self) -> AbstractContextManager[Any]:
        """Weights that autocast has converted are freed at its end: a recording converts them itself."""
        kind, (enabled, dtype) = self._graph.device, _autocast(self._graph.device)
        return torch.autocast(kind, dtype, enabled, cache_enabled=False) if enabled else nullcontext()

    def _replay(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any]) -> Any:
        assert steps.graph is not None
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name != MASK:
                steps.inputs[name].copy_(value)
        steps.graph.replay()
        self.reason, self.replays = "", self.replays + 1
        self.last.replays += 1
        # Clones, because the next replay writes over them.
        tell(self._observing, steps.observed)
        outputs = tree_map_only(Tensor, torch.clone, steps.outputs)
        return steps.kind(**outputs, **{CACHE: cache})


def _addresses(layer: Any) -> list[int]:
    """Where a layer of a cache has its tensors; one of transformers' static cache has two."""
    return layer.addresses() if hasattr(layer, "addresses") else [layer.keys.data_ptr(), layer.values.data_ptr()]


def why_not_recorded(model: nn.Module) -> str | None:
    """Why no step of this model can be recorded; None when it can."""
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        text = f"the model lies on several devices ({', '.join(sorted(map(str, devices)))})"
        return Reason(text, "load the model onto one device")
    if any(
        map(
            _is_foreign,
            (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()),
        )
    ):
        return Reason(
            "there is a forward hook for all modules, which a replayed step would not call", "remove the hook"
        )
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(map(_is_foreign, hooks)):
            text = f"{name or type(model).__name__} has a forward hook, which a replayed step would not call"
            return Reason(text, "remove the hook")
    return None


def _is_foreign(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(OUR_HOOKS)


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def model_state(model: nn.Module) -> list[Any]:
    """What a recorded step takes for granted of a model: where its tensors lie, its modules and their settings."""
    state: list[Any] = []
    for module in model.modules():
        state.append(type(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            state.append(None if tensor is None else tensor.data_ptr())
        state.append([_fact(value) for name, value in vars(module).items() if name not in ("_parameters", "_buffers")])
    return state


def _fact(value: Any) -> Any:
    """Of an attribute what matters to a recording: numbers, names and functions as they are, tensors by their place."""
    if isinstance(value, PLAIN) or callable(value):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    if isinstance(value, dict):
        return [(str(name), _fact(each)) for name, each in value.items() if isinstance(each, PLAIN)]
    if isinstance(value, (list, tuple)):
        return [each for each in value if isinstance(each, PLAIN)]
    return None
