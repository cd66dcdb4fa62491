# SPDX-License-Identifier: Apache-2.0
"""Decoding steps recorded as CUDA graphs: the host launches one graph where it launched hundreds of kernels.

A graph knows the addresses of what it reads and writes, so a step is recorded for one cache and replayed for it alone.
The first step after a prompt runs as always, the second is recorded, the others are replayed.
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
from torch.utils._pytree import tree_map_only
from transformers import Cache

from aqua_attention.errors import Reason

CACHE, MASK = "past_key_values", "attention_mask"
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
OUR_HOOKS = ("aqua_attention.", "transformers.")
"""Hooks of these packages do nothing in a step that a replay would miss."""


NO_STEP, FIRST_STEP = Reason("no step so far"), Reason("the first step is not recorded")
NO_GRAPHS = Reason("only steps on a CUDA GPU are recorded")
NATURAL = (NO_STEP, FIRST_STEP, NO_GRAPHS)
"""Reasons against which nothing can or need be done."""


class CudaGraph:
    """One recorded step. Tests put another class in its place, where there is no GPU."""

    device = "cuda"

    def record(self, run: Callable[[], Any]) -> Any:
        """Record what `run` launches; returns what it returns, which each replay writes anew."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """Run it again."""
        self._graph.replay()


class RecordedSteps:
    """What is known of the decoding steps of one cache.

    Attributes:
        graph: the recorded step; None before it is recorded.
        inputs: where it reads its inputs; outputs: what it writes, but for the cache; kind: the type that holds them.
        observed: what `on_selection` is told after each replay.
        key, state: the inputs and the model that it was recorded for.
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
        self.forget()

    def forget(self) -> None:
        """Drop the recording: an address has changed, or the model."""
        self.graph, self.is_warm, self.is_fresh, self.left = None, False, True, 0
        self.inputs, self.outputs = {}, {}
        self.observed: list[Any] = []
        self.key: Any = None
        self.state: Any = None


@dataclass
class GenerateCall:
    """What one call of `generate` did: decoding steps, those of them replayed, and seconds spent on recording."""

    steps: int = 0
    replays: int = 0
    seconds: float = 0.0


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
            observing: has `on_selection`, see `Attachment`.
        """
        self.model, self._forward, self._why_not = model, forward, why_not
        self._parts, self._observing, self._graph = parts, observing, CudaGraph
        self._steps: WeakKeyDictionary[Any, RecordedSteps] = WeakKeyDictionary()
        self._local = threading.local()
        self.reason: str = NO_STEP
        self.seconds, self.replays, self.last = 0.0, 0, GenerateCall()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While open, steps of this thread are replayed: `generate` changes no weights or masks between them."""
        if not getattr(self._local, "depth", 0):
            self.last = GenerateCall()
        self._local.depth = getattr(self._local, "depth", 0) + 1
        self._local.has_graphs = self.has_graphs()
        try:
            yield
        finally:
            self._local.depth -= 1

    def forget(self) -> None:
        """Drop all recordings."""
        self._steps.clear()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward pass, replayed where it is a step that was recorded."""
        if torch.compiler.is_compiling() or not getattr(self._local, "depth", 0):
            return self._forward(*args, **inputs)
        cache, tokens = inputs.get(CACHE), inputs.get("input_ids")
        is_step = not args and isinstance(tokens, Tensor) and tokens.shape[1] == 1
        self.last.steps += is_step
        if not self._local.has_graphs:
            self.reason = NO_GRAPHS
            return self._forward(*args, **inputs)
        if not isinstance(cache, Cache):
            self.reason = Reason("there is no cache", "set use_cache=True")
            return self._forward(*args, **inputs)
        steps = self._steps.setdefault(cache, RecordedSteps())
        if not is_step:
            steps.is_fresh, self.reason = True, NO_STEP
            return self._forward(*args, **inputs)
        return self._step(steps, cache, inputs)

    def has_graphs(self) -> bool:
        """Whether there are graphs where the model is, or a part of it."""
        return any(weight.device.type == self._graph.device for weight in self.model.parameters())

    def _step(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any]) -> Any:
        key = self._key(inputs)
        if steps.is_fresh or steps.left == 0 or key != steps.key:
            if reason := self._why_not_begin(steps, cache, inputs, key):
                self.reason, steps.is_fresh = reason, True
                return self._forward(**inputs)
            self._begin(steps, cache, key)
        steps.left -= 1
        if not steps.is_warm:
            steps.is_warm, self.reason = True, FIRST_STEP
            with self._parts():
                return self._forward(**inputs)
        if steps.graph is None and not self._record(steps, cache, inputs):
            steps.is_fresh = True
            return self._forward(**inputs)
        return self._replay(steps, cache, inputs)

    def _key(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """What must be the same for a recording to be the step that these inputs ask for."""
        found: list[Any] = [torch.is_inference_mode_enabled(), getattr(self._observing, "on_selection", None) is None]
        for name in sorted(inputs.keys() - {CACHE, MASK}):
            value = inputs[name]
            found.append((name, (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value))
        return tuple(found)

    def _why_not_begin(
        self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any], key: tuple[Any, ...]
    ) -> str | None:
        if steps.refused:
            return steps.refused
        if reason := why_not_recorded(self.model):
            return reason
        if torch.is_grad_enabled():
            return Reason("gradients are being recorded", "use torch.no_grad()")
        others = (name for name, value in inputs.items() if name != CACHE and not isinstance(value, (Tensor, *PLAIN)))
        if other := next(others, None):
            return f"{other} is a {type(inputs[other]).__name__}, and only tensors and numbers can be recorded"
        if inputs.get("return_dict") is False:
            return Reason("return_dict is False", "leave return_dict out")
        mask = inputs.get(MASK)
        if mask is not None and inputs.get("position_ids") is None:
            return Reason("there is a mask and no position_ids", "give position_ids")
        return self._why_not(cache, mask)

    def _begin(self, steps: RecordedSteps, cache: Any, key: tuple[Any, ...]) -> None:
        """Look at what a replay takes for granted: room, inputs, the model."""
        held = int(cache.get_seq_length())
        if held >= cache.max_length:
            steps.forget()
            cache.make_room(held + 1)
        if steps.graph is not None and (key != steps.key or steps.state != model_state(self.model)):
            steps.forget()
        steps.key, steps.is_fresh, steps.left = key, False, cache.max_length - held

    def _record(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any]) -> bool:
        """Record a step; whether that was possible. Nothing is computed, and the cache does not change."""
        start, graph = time.perf_counter(), self._graph()
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            steps.inputs = {
                name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
                for name, value in inputs.items()
                if name not in (CACHE, MASK)
            }
        try:
            with self._parts(), self._observed(steps.observed):
                outputs = graph.record(lambda: self._forward(**steps.inputs, **{CACHE: cache}))
        except RuntimeError as error:
            steps.refused = self.reason = Reason(f"recording failed: {(str(error).splitlines() or [''])[0][:160]}")
            return False
        steps.kind = type(outputs)
        steps.outputs = {name: value for name, value in outputs.items() if name != CACHE}
        steps.graph, steps.state = graph, model_state(self.model)
        self.seconds = time.perf_counter() - start
        self.last.seconds += self.seconds
        return True

    def _replay(self, steps: RecordedSteps, cache: Any, inputs: dict[str, Any]) -> Any:
        assert steps.graph is not None
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name != MASK:
                steps.inputs[name].copy_(value)
        steps.graph.replay()
        self.reason, self.replays = "", self.replays + 1
        self.last.replays += 1
        for told in steps.observed:
            self._observing.on_selection(*told)
        # The next replay writes over them.
        outputs = tree_map_only(Tensor, torch.clone, steps.outputs)
        return steps.kind(**outputs, **{CACHE: cache})

    @contextmanager
    def _observed(self, told: list[Any]) -> Iterator[None]:
        """Collect what `on_selection` would be told, which every replay writes anew."""
        observer = getattr(self._observing, "on_selection", None)
        if observer is None:
            yield
            return
        self._observing.on_selection = lambda *seen: told.append(seen)
        try:
            yield
        finally:
            self._observing.on_selection = observer


def why_not_recorded(model: nn.Module) -> str | None:
    """Why no step of this model can be recorded; None when it can."""
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        text = f"the model lies on several devices ({', '.join(sorted(map(str, devices)))})"
        return Reason(text, "load the model onto one device")
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not str(getattr(hook, "__module__", "")).startswith(OUR_HOOKS) for hook in hooks):
            text = f"{name or type(model).__name__} has a forward hook, which a replayed step would not call"
            return Reason(text, "remove the hook")
    return None


def model_state(model: nn.Module) -> list[Any]:
    """What a recorded step takes for granted of a model: where its tensors lie, and the settings of its modules."""
    state: list[Any] = []
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            state.append(None if tensor is None else tensor.data_ptr())
        state.append([_fact(value) for name, value in vars(module).items() if name not in ("_parameters", "_buffers")])
    return state


def _fact(value: Any) -> Any:
    """Of an attribute what matters to a recording: numbers and names as they are, tensors by their place."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    if isinstance(value, dict):
        return [(str(name), _fact(each)) for name, each in value.items() if isinstance(each, PLAIN)]
    if isinstance(value, (list, tuple)):
        return [each for each in value if isinstance(each, PLAIN)]
    return None
