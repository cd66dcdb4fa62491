# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Time of one decoding attention step on a GPU: ours at several k, and every dense kernel that is installed.

Nothing is timed before it is right: each of our settings is compared with the reference in float64 on rows of the same
data, each baseline with dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aqua_attention.errors import AquaError
from aqua_attention.ops.reference import attention_reference
from aqua_attention.ops.triton.decode import decode
from aqua_attention.ops.triton.layout import TiledCache

RUNS = 25
CHECKED_ROWS = 2
TOLERANCE = 3.0
"""A result may be so many times as far from float64 as the reference in the low precision is."""


def measure_decode(
    *,
    batch: int,
    length: int,
    heads: int = 32,
    groups: int = 8,
    head_dim: int = 128,
    k_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
    sink: int = 4,
    recent: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Check and time one step of every kernel on random keys and values.

    Returns:
        `{"batch", "length", ..., "read_bandwidth", "rows"}`; a row a kernel: `name`, `k_ratio` (None: dense), `seconds`
        (median), `bytes` (keys and values that the step needs), `share` (of the measured read bandwidth), `ratio`
        (to the fastest dense one, above 1 is faster), `ceiling` (what that could be at most: its bytes over ours), or
        `absent` (why it did not run).

    Raises:
        AquaError: no CUDA GPU, or a kernel of ours is wrong.
    """
    if not torch.cuda.is_available():
        raise AquaError("aqua bench decode measures kernels on a CUDA GPU: there is none")
    if heads % groups or not all(0 < ratio <= 1 for ratio in k_ratios):
        raise AquaError(
            f"{heads} query heads for {groups} key-value heads and k_ratio {k_ratios}: heads must divide, and ratios "
            "be above 0 and at most 1"
        )
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    query = random(batch, heads, head_dim)
    keys, values = random(batch, groups, length, head_dim), random(batch, groups, length, head_dim)
    cache = TiledCache(batch, groups, head_dim, head_dim, length, dtype, "cuda")
    cache.fill(keys, values, torch.full((batch,), length))
    rows: list[dict[str, Any]] = []
    wide = batch * groups * length * head_dim * keys.element_size()
    for name, make in BASELINES.items():
        try:
            run = make(query, keys, values)
            _check(run()[:CHECKED_ROWS], query, keys, values, None, 0, 0)
            rows.append({"name": name, "k_ratio": None, "seconds": _seconds(run), "bytes": 2 * wide})
        except (RuntimeError, ImportError, AttributeError, OSError) as error:
            rows.append({"name": name, "k_ratio": None, "absent": str(error).splitlines()[0][:120]})
    size = query.view(batch, groups, heads // groups, head_dim).float().square().sum(2)
    order = size.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    for ratio in k_ratios:
        count = math.ceil(ratio * head_dim)
        dims = None if count == head_dim else order[..., :count].contiguous()

        def run(dims: Tensor | None = dims) -> Tensor:
            return decode(query, dims, cache, sink=sink, recent=recent)

        _check(run()[:CHECKED_ROWS], query, keys, values, dims, sink, recent)
        used = wide + wide * count // head_dim
        rows.append({"name": "aqua", "k_ratio": ratio, "seconds": _seconds(run), "bytes": used})
    bandwidth = read_bandwidth()
    dense = min((row["seconds"] for row in rows if row["k_ratio"] is None and "seconds" in row), default=None)
    for row in rows:
        if "seconds" in row:
            row["share"] = row["bytes"] / row["seconds"] / bandwidth
            row["ratio"] = None if dense is None else dense / row["seconds"]
            row["ceiling"] = 2 * wide / row["bytes"]
    return {
        "device": torch.cuda.get_device_name(),
        "batch": batch,
        "length": length,
        "heads": heads,
        "groups": groups,
        "head_dim": head_dim,
        "sink": sink,
        "recent": recent,
        "dtype": str(dtype),
        "read_bandwidth": bandwidth,
        "rows": rows,
    }


def read_sizes(sizes: list[str]) -> list[tuple[int, int]]:
    """Sequences and tokens of "8x32768" and the like.

    Raises:
        AquaError: it is written in another way.
    """
    found = []
    for size in sizes:
        batch, _, length = size.partition("x")
        if not (batch.isdecimal() and length.isdecimal() and int(batch) > 0 and int(length) > 1):
            raise AquaError(f"size is {size!r}: it must be sequences x tokens, such as 8x32768")
        found.append((int(batch), int(length)))
    return found


def read_bandwidth() -> float:
    """Bytes a second that a kernel reads which does nothing else, the best of several."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    sums = torch.empty(data.numel() // (1 << 15), device="cuda")
    seconds = _seconds(lambda: _read[(sums.numel(),)](data, sums, BLOCK=4096, BLOCKS=8, num_warps=8))
    return data.nbytes / seconds


@triton.jit
def _read(data_ptr, sums_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.static_range(0, BLOCKS):
        total += tl.load(data_ptr + start + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def _seconds(run: Callable[[], Any]) -> float:
    """Median time of one run in a CUDA graph, so that no launch is waited for."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[RUNS // 2] / 1e3


def _check(
    found: Tensor, query: Tensor, keys: Tensor, values: Tensor, dims: Tensor | None, sink: int, recent: int
) -> None:
    """The first rows against float64, with the error of the low-precision reference as yardstick."""
    for row in range(found.shape[0]):
        one = slice(row, row + 1)
        one_query, one_key, one_value = query[one, :, None], keys[one], values[one]
        selected = None
        if dims is not None:
            heads_of_group = query.shape[1] // keys.shape[1]
            chosen = torch.zeros_like(keys[one, :, 0], dtype=torch.bool).scatter_(-1, dims[one].long(), True)
            selected = chosen.repeat_interleave(heads_of_group, 1)[:, :, None]
        wide = one_query.double(), one_key.double(), one_value.double()
        exact = attention_reference(wide[0], wide[1], wide[2], selected, sink=sink, recent=recent)
        plain = attention_reference(one_query, one_key, one_value, selected, sink=sink, recent=recent)
        limit = TOLERANCE * float((plain.double() - exact).norm())
        error = float((found[one, :, None].double() - exact).norm())
        if not error <= limit:
            raise AquaError(f"a kernel is wrong: row {row} is {error:.2e} from the reference, {limit:.2e} is allowed")


def _sdpa(backend: SDPBackend) -> Callable[..., Callable[[], Tensor]]:
    def make(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

        return run

    return make


def _sdpa_packed(backend: SDPBackend) -> Callable[..., Callable[[], Tensor]]:
    def make(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        packed = query.unflatten(1, (keys.shape[1], -1))

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(packed, keys, values).flatten(1, 2)

        return run

    return make


def _flash_attention_3(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
    """FlashAttention-3 as vLLM builds it; `import _vllm_fa3_C` must find the library."""
    import _vllm_fa3_C  # type: ignore[import-not-found]  # noqa: F401

    batch, _, length, _ = keys.shape
    # This build takes sequences one behind the other.
    flat = [each.transpose(1, 2).flatten(0, 1).contiguous() for each in (keys, values)]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=keys.device)
    given: list[Any] = [query, *flat, None, None, None, None, starts, starts * length, None, None, None, 1, length]
    given += [*[None] * 9, query.shape[-1] ** -0.5, False, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None]

    def run() -> Tensor:
        return torch.ops._vllm_fa3_C.fwd(*given)[0]

    return run


def _flashinfer(tensor_cores: bool) -> Callable[..., Callable[[], Tensor]]:
    def make(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        import flashinfer  # type: ignore[import-not-found]

        batch, groups, length, dim = keys.shape
        page = 16
        paged = [
            each.transpose(1, 2).reshape(batch * length // page, page, groups, dim).contiguous()
            for each in (keys, values)
        ]
        work = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "NHD", use_tensor_cores=tensor_cores)
        counts = torch.arange(0, batch + 1, dtype=torch.int32, device="cuda") * (length // page)
        places = torch.arange(0, batch * length // page, dtype=torch.int32, device="cuda")
        last = torch.full((batch,), page, dtype=torch.int32, device="cuda")
        wrapper.plan(
            counts, places, last, query.shape[1], groups, dim, page, q_data_type=query.dtype, kv_data_type=keys.dtype
        )
        return lambda: wrapper.run(query, tuple(paged))

    return make


BASELINES: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA flash, packed": _sdpa_packed(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN, packed": _sdpa_packed(SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-3": _flash_attention_3,
    "FlashInfer": _flashinfer(False),
    "FlashInfer, tensor cores": _flashinfer(True),
}
