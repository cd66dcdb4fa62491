# SPDX-License-Identifier: Apache-2.0
"""Whether a step can be recorded, which is seen beforehand: a GPU does not survive a recording that fails."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
)
"""Operations after which the host knows a value, or a size that depends on one."""
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""These wait where an index is a mask."""
COPIES = ("aten::copy_", "aten::_to_copy")
_local = threading.local()


class Rehearsal(TorchDispatchMode):
    """Runs operations, and notes the first of which a recording would be impossible in `reason`."""

    reason: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        waits = name in WAITS or (name in INDEXED and _has_mask(args[1]))
        if waits or (name in COPIES and _leaves_device(args, found)):
            self.reason = self.reason or f"the model's step waits for a value ({name})"
        return found


@contextmanager
def as_recorded() -> Iterator[None]:
    """While open, `is_recorded` is true in this thread."""
    before, _local.recorded = is_recorded(), True
    try:
        yield
    finally:
        _local.recorded = before


def is_recorded() -> bool:
    """Whether this thread records a step or rehearses that, so that nothing may look at a length or a mask."""
    return getattr(_local, "recorded", False)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _leaves_device(args: Any, found: Any) -> bool:
    devices = {each.device.type for each in (*tree_leaves(args), *tree_leaves(found)) if isinstance(each, Tensor)}
    return len(devices) > 1


class GeneratingThreads:
    """Threads inside `generate`. One that records is alone: torch refuses random numbers to the others meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._calls: Counter[int] = Counter()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """While open, this thread generates; waits for a recording to end."""
        mine = threading.get_ident()
        with self._lock:
            self._calls[mine] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[mine] -= 1

    @contextmanager
    def kept_out(self) -> Iterator[bool]:
        """Whether no other thread generates; while open, none begins to."""
        with self._lock:
            yield not any(count for thread, count in self._calls.items() if thread != threading.get_ident())
