# SPDX-License-Identifier: Apache-2.0
"""The honest baseline: dense attention in steps recorded as ours are, by each kernel that reads transformers' cache."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from aqua_attention.attach.generate import Replaced
from aqua_attention.attach.recording import Recorder
from aqua_attention.bench.clocked import SHORT_CALL, Options, Task, clocked, figures, free, step_seconds
from aqua_attention.bench.dense import BASELINES
from aqua_attention.model.interface import install

KERNELS = ("SDPA flash", "SDPA flash, packed", "SDPA cuDNN", "SDPA cuDNN, packed")
"""Those of `BASELINES` that read the layout of transformers' static cache."""
UNKNOWN = ("sliding_window", "softcap", "s_aux")
"""What models pass to attention that these kernels do not know."""
NAME = "dense, recorded"
Parts = Callable[[], AbstractContextManager[Any]]
Reasons = dict[str, str | None]
"""Kernels by name, and why one does not run; None where it does."""


class UncompiledStaticCache(StaticCache):
    """A static cache for which `generate` makes no mask in each step, which these kernels would not read."""

    @property
    def is_compileable(self) -> bool:
        """False."""
        return False


@contextmanager
def recorded_dense(model: PreTrainedModel, kernel: str, length: int, parts: Parts) -> Iterator[Recorder]:
    """While open, steps of the model attend to `length` tokens of a static cache by this kernel, and are recorded.

    A recorded step cannot tell a kernel of SDPA how many tokens there are, so that the few generated ones are left out:
    in favour of this baseline. Prompts, which must not be padded, run on causal SDPA.

    Args:
        parts: as `Recorder` takes them.
    """
    recorder = Recorder(model, model.forward, lambda cache, mask: _why_not(recorder), parts=parts)

    def forward(original: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
        return recorder(*args, **inputs)

    with ExitStack() as restore:
        restore.callback(install(model, _attention(kernel, length), lambda *_, **__: None)[1])
        restore.callback(Replaced(model, "forward", forward).undo)
        restore.callback(recorder.forget)
        restore.enter_context(recorder.generating())
        yield recorder


def dense_row(task: Task, kernels: Reasons, parts: Parts) -> dict[str, Any]:
    """The row of the kernel whose step is the fastest, with `kernels`: seconds of each, or why it did not run.

    Args:
        kernels: what `generate_gate` found of them.
    """
    options = static_options(task)
    steps: dict[str, Any] = dict(kernels)
    right = [name for name, reason in kernels.items() if reason is None]
    for name in right:
        try:
            with recorded_dense(task.model, name, task.length + 1, parts) as recorder:
                clocked(task, options, SHORT_CALL)
                steps[name] = step_seconds(task, recorder)
        except RuntimeError as error:
            steps[name] = why_failed(error)
        free()
    # Without a GPU no step is timed alone.
    running = [name for name in right if not isinstance(steps[name], str)]
    row = {"name": NAME, "k_ratio": None, "bits": None, "kernels": steps}
    if not running:
        return row | {"absent": next(filter(None, steps.values()), "there is no kernel")}
    best = min(running, key=lambda name: steps[name] or 0.0)
    with recorded_dense(task.model, best, task.length + 1, parts) as recorder:
        measured = figures(task, options, recorder)
        return row | {"name": f"{NAME} ({best})", "layout": "static", "reason": recorder.reason} | measured


def static_options(task: Task, *, compiled: bool = False) -> Options:
    """Hand `generate` a static cache, the same one each time; `compiled`: have transformers compile its steps."""
    kind = StaticCache if compiled else UncompiledStaticCache
    cache = kind(config=task.model.config, max_cache_len=task.room)
    cache.max_length = task.room  # `Recorder` asks for it

    def given() -> dict[str, Any]:
        cache.reset()
        return {"past_key_values": task.filled(cache), **({} if compiled else {"disable_compile": True})}

    return given


def why_failed(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "there is not enough memory on the GPU"
    return f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"


def _why_not(recorder: Recorder) -> str | None:
    return None if recorder.has_graphs() else "only steps on a CUDA GPU are recorded"


def _attention(kernel: str, length: int) -> Callable[..., Any]:
    make = BASELINES[kernel]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> tuple[Tensor, None]:
        if unknown := next((name for name in UNKNOWN if given.get(name) is not None), None):
            raise RuntimeError(f"the model's attention has a {unknown.replace('_', ' ')}, which these kernels lack")
        own = query.shape[-1] ** -0.5
        query = query if given.get("scaling") in (None, own) else query * (given["scaling"] / own)
        if (new := query.shape[2]) == 1:
            return make(query[:, :, 0], key[:, :, :length], value[:, :, :length])()[:, None], None
        key, value = key[:, :, :new], value[:, :, :new]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    return attend
