# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a CUDA graph on a CPU: torch's operations and our kernels are noted once, and run again on replay.

Like a graph it knows the tensors of the step that was recorded, and nothing of Python. A host that waits for a value
while it is recorded is an error, as it is on a GPU. On a GPU the real graphs are taken, and counted.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from aqua_attention.attach import recording
from aqua_attention.attach.recording import CudaGraph
from aqua_attention.attach.rehearsal import WAITS
from aqua_attention.cache.tiled import TiledLayer
from aqua_attention.ops.backends.cpu.build import no_kernel_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_local = threading.local()
_decode = TiledLayer._decode


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
    """In place of `CudaGraph`. What is recorded has been computed, so the first replay does nothing."""

    device = "cpu"
    recorded = 0

    def __init__(self, where):
        assert where.type == self.device

    def record(self, run):
        self.notes, self.is_new = [], True
        StandIn.recorded += 1
        _local.notes = self.notes
        try:
            with Notes(self.notes):
                return run()
        finally:
            _local.notes = None

    def replay(self):
        if self.is_new:
            self.is_new = False
            return
        for func, args, kwargs, out in self.notes:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Counted(CudaGraph):
    """Real graphs."""

    recorded = 0

    def record(self, run):
        Counted.recorded += 1
        return super().record(run)


def decode(layer, call):
    """A layer's step as one note while this thread records: what its kernel writes passes no dispatcher."""
    notes = getattr(_local, "notes", None)
    if notes is None:
        return _decode(layer, call)
    taken = layer._taken()

    def again():
        layer._new = taken
        return _decode(layer, call)

    with _disable_current_modes():
        out = again()
    notes.append((again, (), {}, out))
    return out


GRAPH = Counted if DEVICE == "cuda" else StandIn


def use_graphs(monkeypatch):
    """What records steps during a test, with `recorded`: how many so far. On a CPU the kernel in C decodes."""
    if DEVICE == "cpu":
        if reason := no_kernel_reason():
            pytest.skip(reason)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(TiledLayer, "_decode", decode)
    monkeypatch.setattr(recording, "CudaGraph", GRAPH)
    monkeypatch.setattr(GRAPH, "recorded", 0)
    return GRAPH
