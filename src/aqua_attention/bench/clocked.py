# SPDX-License-Identifier: Apache-2.0
"""`model.generate` with a clock at each token: time to the first, time of each later one, memory."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from aqua_attention.attach.apply import Attachment
from aqua_attention.attach.recording import Recorder
from aqua_attention.bench.memory import memory_in_use
from aqua_attention.bench.random_llama import random_states
from aqua_attention.cache.layer import Recordable

SETTLING = 8
"""Tokens of a call that are not counted: the first after the prompt, the recording, and what settles after it."""
SHORT_CALL = 4
"""Tokens of calls that only the first is wanted of; enough for a recording. Without one it is one: transformers would
compile anew for a cache of that size."""
PROMPTS = 3
"""Calls whose first token is timed."""
Options = Callable[[], dict[str, Any]]
"""What `generate` is given beside the prompt; asked before each call, and not timed."""


@dataclass(frozen=True)
class Task:
    """What every row does.

    Attributes:
        ids: the prompts, [batch, length]; of filled caches one token more, which is all that the model still reads.
        new_tokens: how many are generated.
        is_filled: caches begin with `length` random tokens, because the activations of such a prompt do not fit.
    """

    model: PreTrainedModel
    ids: Tensor
    new_tokens: int
    is_filled: bool = False

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens of each before the first step."""
        return self.ids.shape[1] - self.is_filled

    @property
    def room(self) -> int:
        """Tokens that a cache must hold."""
        return self.ids.shape[1] + self.new_tokens

    def filled(self, cache: Cache) -> Cache:
        """A cache as it is handed to `generate`: with random tokens where the prompt is left out."""
        if self.is_filled:
            fill_cache(cache, random_states(self.model, self.batch, self.length))
        return cache


class Times(NamedTuple):
    """Seconds of one call: to the first token, of each later one, and of all."""

    first: float
    tokens: list[float]
    total: float


class Clock(LogitsProcessor):
    """Notes when the logits of each token are there.

    Only the first are waited for. `generate` itself waits for every token, so that later differences are right too.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing."""
        if not self.times:
            wait_for(scores.device)
        self.times.append(time.perf_counter())
        return scores


@torch.no_grad()
def clocked(task: Task, options: Options, new_tokens: int) -> Times:
    """One call of `generate`, timed."""
    clock, given = Clock(), options()
    given |= {"attention_mask": torch.ones_like(task.ids), "max_new_tokens": new_tokens, "do_sample": False}
    wait_for(task.ids.device)
    start = time.perf_counter()
    task.model.generate(task.ids, logits_processor=LogitsProcessorList([clock]), **given)
    wait_for(task.ids.device)
    total = time.perf_counter() - start
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return Times(clock.times[0] - start, steps, total)


def figures(task: Task, options: Options, recorder: Recorder | None = None) -> dict[str, Any]:
    """Of a row: times, memory, and what `generate` adds to the recorded step, see `measure`.

    The last call is a short one, so that its cache has room for the steps that are then replayed alone.
    """
    first = clocked(task, options, task.new_tokens)
    memory_in_use(task.ids.device, reset=True)
    timed = clocked(task, options, task.new_tokens)
    peak = memory_in_use(task.ids.device)
    short, calls = SHORT_CALL if recorder else 1, 1 if task.is_filled else PROMPTS - 1
    prompts = [timed, *(clocked(task, options, short) for _ in range(calls))]
    seconds = median(timed.tokens[SETTLING - 1 :])
    step = step_seconds(task, recorder)
    return {
        "seconds": seconds,
        "first_seconds": None if task.is_filled else median(each.first for each in prompts),
        "once_seconds": max(0.0, first.total - timed.total),
        "peak_bytes": peak,
        "step_seconds": step,
        "added_seconds": None if step is None else seconds - step,
        "recorded": None if recorder is None else recorder.reason == "",
    }


def step_seconds(task: Task, recorder: Recorder | None) -> float | None:
    """Median time of the recorded step alone, after a short call; None without a recording or a GPU."""
    graphs = [steps.graph for steps in recorder._steps.values() if steps.graph is not None] if recorder else []
    if not graphs or task.ids.device.type != "cuda":
        return None
    from aqua_attention.bench.timing import RUNS, replay_seconds

    # Each appends a token.
    return replay_seconds(graphs[-1].replay, min(RUNS, task.new_tokens - SHORT_CALL))


def default_options(task: Task) -> Options:
    """Nothing is given but for a cache that is filled already."""

    def given() -> dict[str, Any]:
        return {"past_key_values": task.filled(DynamicCache(config=task.model.config))} if task.is_filled else {}

    return given


def own_options(task: Task, attachment: Attachment) -> Options:
    """Nothing is given, and AQUA has its own cache; where it must be filled first, one as it would have."""
    if not task.is_filled:
        return dict
    tiled = attachment.new_cache(task.room, layout="tiled") if attachment._why_not_automatic() is None else None

    def given() -> dict[str, Any]:
        if tiled is None:
            return {"past_key_values": task.filled(attachment.new_cache())}
        # The same one each time: it was recorded for that.
        tiled.reset()
        return {"past_key_values": task.filled(tiled)}

    return given


def fill_cache(cache: Cache, states: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put keys, as the model computes them, and values of each layer into an empty cache."""
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
        if isinstance(layer := cache.layers[index], Recordable):
            layer.store(None)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """While open, `generate` of a model ends at no token and has no settings of the model's own."""
    before, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = before


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """What the rows before held, graphs and all, makes room for the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
