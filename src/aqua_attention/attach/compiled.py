# SPDX-License-Identifier: Apache-2.0
"""Norms, rotary embeddings and activations of any decoder as a few kernels, for decoding steps of one token."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach.parts import Part, find_parts
from aqua_attention.attach.swap import replaced
from aqua_attention.model.capture import AttentionLayer

TOLERANCES = {torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps, torch.float16: 2 * torch.finfo(torch.float16).eps}
TOLERANCE = 1e-5
"""Differences allowed, relative to the largest output; this one is of all other dtypes."""
BEGINNING = "compiling norms, rotary embeddings and activations for decoding (kept on disk by torch for the next time)"
Report = Callable[[str], None]
Signature = tuple[Any, ...]
_compiled: dict[Signature, Callable[..., Any]] = {}
_lock = threading.Lock()


class CompiledParts:
    """The norms, MLP blocks and rotary embeddings of a decoder, which `torch.compile` makes a few kernels of.

    As transformers run them they are dozens of tiny kernels a layer. Each is compiled when a step first runs it, and
    compared with the model's own on the same inputs. What differs or cannot be compiled stays as it was.

    Attributes:
        parts: what was found in the model.
        left_out: why parts stay as they are, by their kind, or by their name where it is not the whole kind.
        seconds: how long compiling and comparing took.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[AttentionLayer],
        *,
        cuda_only: bool = False,
        report: Report | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        """Find the parts; the model is not changed before `used`.

        Args:
            layers: those of `attention_layers`.
            cuda_only: leave parts on other devices as they are.
            report: told when compiling begins and how long it took; None: the logger "aqua_attention", at INFO.
            backend: of `torch.compile`.
        """
        self.parts = find_parts(model, layers)
        self.seconds = 0.0
        self._cuda_only, self._backend = cuda_only, backend
        self._report: Report = report or logging.getLogger("aqua_attention").info
        self._failed: dict[str, str] = {}
        self._unfit = self._why_not()
        self._checked: set[Signature] = set()
        self._compiles = False
        """Whether this context has compiled something, and said so."""

    @property
    def left_out(self) -> dict[str, str]:
        """Why parts stay as they are: now, or from their failure on."""
        return self._unfit | self._failed

    @property
    def kinds(self) -> Counter[str]:
        """How many parts of each kind are compiled, or will be when they run."""
        return Counter(part.kind for part in self.parts if not {part.name, part.kind} & self.left_out.keys())

    @contextmanager
    def used(self) -> Iterator[None]:
        """While open, this thread runs the parts compiled: for steps of one token without gradients.

        Any other length would be compiled too, which takes seconds. Afterwards the model is as before.
        """
        self._unfit = self._why_not()
        fit = [part for part in self.parts if part.name not in self._unfit]
        before = self.seconds
        try:
            with replaced([(part.place, part.eager, partial(self._run, part)) for part in fit]):
                yield
        finally:
            if self._compiles:
                self._compiles = False
                failed = "".join(f"; {kind} is not compiled: {why}" for kind, why in self._failed.items())
                self._report(f"compiled in {self.seconds - before:.1f} s{failed}")

    def _why_not(self) -> dict[str, str]:
        reasons = ((part.name, part.why_not(self._cuda_only)) for part in self.parts)
        return {name: reason for name, reason in reasons if reason is not None}

    def _run(self, part: Part, /, *args: Any, **kwargs: Any) -> Any:
        """One call of a part: compiled where that was found to be right, or can be found out now."""
        if part.kind in self._failed or torch.is_grad_enabled():
            return part.eager(*args, **kwargs)
        seen = torch.is_inference_mode_enabled(), *_signature((args, kwargs))
        if (part.name, seen) not in self._checked:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return part.eager(*args, **kwargs)
            return self._first(part, seen, args, kwargs)
        try:
            return self._function(part, seen)(*part.owner, *args, **kwargs)
        except Exception as error:
            self._failed[part.kind] = _reason(error)
            return part.eager(*args, **kwargs)

    def _first(self, part: Part, seen: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first call with such inputs: compiled and compared. Whatever is wrong, the result is right."""
        started = time.perf_counter()
        # Of copies, so that a part that wrote to its inputs would still be computed twice from the same.
        expected = part.eager(*_map_tensors(args, Tensor.clone), **_map_tensors(kwargs, Tensor.clone))
        try:
            found = self._function(part, seen)(*part.owner, *args, **kwargs)
            if not _is_near(found, expected):
                raise ValueError("compiled, it gives something else")
        except Exception as error:
            self._failed[part.kind] = _reason(error)
            return expected
        finally:
            self.seconds += time.perf_counter() - started
        self._checked.add((part.name, seen))
        return found

    def _function(self, part: Part, seen: Signature) -> Callable[..., Any]:
        """The compiled function of a kind for such inputs, shared by all models of the process."""
        key = part.function, self._backend, seen
        with _lock:
            if key not in _compiled:
                if not self._compiles:
                    self._compiles = True
                    self._report(BEGINNING)
                _compiled[key] = _compile(part.function, self._backend)
            return _compiled[key]


def _compile(function: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo keeps at most 8 variants of a code object: each function and shape needs one of its own.
    call.__code__ = call.__code__.replace()
    options: dict[str, Any] | None = None
    if backend == "inductor":
        from torch._inductor import config

        # Roundings to 16 bits between the operations of a kernel stay where the model has them.
        name = "emulate_precision_casts"
        options = {name: True} if hasattr(config, name) else None
    return torch.compile(call, backend=backend, dynamic=False, fullgraph=True, options=options)


def _signature(value: Any) -> Signature:
    """What a compiled function depends on, in a form that can be compared."""
    if isinstance(value, Tensor):
        modes = value.is_inference(), torch.is_autocast_enabled(value.device.type)
        return (tuple(value.shape), value.stride(), value.dtype, value.device, *modes)
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(each)) for name, each in value.items())
    return type(value), value if isinstance(value, int | float | str) else None


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_tensors(each, change) for name, each in value.items()}
    return type(value)(_map_tensors(each, change) for each in value) if type(value) in (tuple, list) else value


def _is_near(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    if not isinstance(expected, Tensor):
        same = type(found) is type(expected)
        if isinstance(expected, tuple | list):
            return same and len(found) == len(expected) and all(map(_is_near, found, expected))
        return same and bool(found == expected)
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    largest = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
    tolerance = TOLERANCES.get(expected.dtype, TOLERANCE) * largest
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def _reason(error: Exception) -> str:
    """What an error says, in one short line."""
    # Dynamo wraps what a backend raises, and its own first line says only that.
    error = getattr(error, "inner_exception", error)
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return said[:200] if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"[:200]
