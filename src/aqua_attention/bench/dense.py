# SPDX-License-Identifier: Apache-2.0
"""Dense decoding attention by every kernel that may be installed: what ours is compared with.

Each is a function of query [batch, num_attention_heads, head_dim] and keys and values [batch, num_key_value_heads,
length, head_dim] that returns one to run, after it has laid them out as its kernel likes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


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
    query = query.to(keys.dtype)
    # This build takes sequences one behind the other.
    flat = [each.transpose(1, 2).flatten(0, 1).contiguous() for each in (keys, values)]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=keys.device)
    given: list[Any] = [query, *flat, None, None, None, None, starts, starts * length, None, None, None, 1, length]
    given += [*[None] * 9, query.shape[-1] ** -0.5, False, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None]

    def run() -> Tensor:
        return torch.ops._vllm_fa3_C.fwd(*given)[0]

    return run


def _in_fp8(make: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
    """The same with keys and values in float8_e4m3fn; the random ones need no scale."""

    def make_low(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        return make(query, *(states.to(torch.float8_e4m3fn) for states in (keys, values)))

    return make_low


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
LOW_PRECISION: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "FlashAttention-3, fp8": _in_fp8(_flash_attention_3),
    "FlashInfer, fp8": _in_fp8(_flashinfer(False)),
    "FlashInfer, tensor cores, fp8": _in_fp8(_flashinfer(True)),
}
