# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a CUDA graph on a CPU: torch's operations and our kernels are noted once, and run again on replay.

Like a graph it knows the tensors of the step that was recorded, and nothing of Python. A host that waits for a value
while it is recorded is an error, as it is on a GPU.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from aqua_attention.attach import apply as applying
from aqua_attention.cache.tiled import TiledLayer

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select")


class Notes(TorchDispatchMode):
    """Runs operations and notes them."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in WAITS:
            raise RuntimeError(f"{func.name()} waits for a value, which is impossible while a step is recorded")
        out = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, out))
        return out


class StandIn:
    """In place of `CudaGraph`."""

    device = "cpu"
    recorded = 0

    def record(self, run):
        self.notes, self.is_new = [], True
        type(self).recorded += 1
        with ExitStack() as restore:
            patches = [
                (TiledLayer, "_decode", self._noting(TiledLayer._decode)),
                (applying, "_is_captured", lambda: True),
            ]
            for place, name, by in patches:
                restore.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, by)
            restore.enter_context(Notes(self.notes))
            return run()

    def replay(self):
        if self.is_new:  # recording has computed it
            self.is_new = False
            return
        for func, args, kwargs, out in self.notes:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def _noting(self, decode):
        """A layer's step as one note: what its kernel writes passes no dispatcher."""

        def noted(layer, call):
            taken = layer._taken()

            def again():
                layer._new = taken
                return tuple(each for each in decode(layer, call))

            with _disable_current_modes():
                out = again()
            self.notes.append((again, (), {}, out))
            return type(out)(*out) if hasattr(out, "_fields") else applying_attended(out)

        return noted


def applying_attended(out):
    from aqua_attention.ops.plan import Attended

    return Attended(*out)
