# SPDX-License-Identifier: Apache-2.0
"""Dense decoding attention by every kernel that may be installed: what ours is compared with.

All take keys and values [batch, num_key_value_heads, length, head_dim]. An `Attend` takes a query [batch,
num_attention_heads, 1, head_dim] and returns the result; a `Maker` takes [batch, num_attention_heads, head_dim] and
returns what is to run, after it has laid all out as its kernel likes it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Maker = Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`scaled_dot_product_attention` as it comes: slow on a CPU, where it reads keys once for each query head."""
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def sdpa_packed(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same with the heads of a group as the queries of one head."""
    return F.scaled_dot_product_attention(_packed(query, keys), keys, values).reshape(query.shape)


def matmul(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Two products and a softmax."""
    scores = (_packed(query, keys) @ keys.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ values).reshape(query.shape)


def _packed(query: Tensor, keys: Tensor) -> Tensor:
    return query.reshape(keys.shape[0], keys.shape[1], -1, query.shape[-1])


def _by(backend: SDPBackend, attend: Attend) -> Maker:
    def make(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return attend(query[:, :, None], keys, values)[:, :, 0]

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
    return lambda: torch.ops._vllm_fa3_C.fwd(*given)[0]


def _flashinfer(tensor_cores: bool) -> Maker:
    def make(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        import flashinfer  # type: ignore[import-not-found]

        batch, kv_heads, length, dim = keys.shape
        page = 16
        pages = batch * length // page
        paged = [each.transpose(1, 2).reshape(pages, page, kv_heads, dim).contiguous() for each in (keys, values)]
        work = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "NHD", use_tensor_cores=tensor_cores)
        indices, last = torch.arange(pages).int().cuda(), torch.full((batch,), page).int().cuda()
        counts = torch.arange(batch + 1).int().cuda() * (length // page)
        dtypes = {"q_data_type": query.dtype, "kv_data_type": keys.dtype}
        wrapper.plan(counts, indices, last, query.shape[1], kv_heads, dim, page, **dtypes)
        return lambda: wrapper.run(query, tuple(paged))

    return make


def _in_fp8(make: Maker) -> Maker:
    """The same with keys and values in float8_e4m3fn; the random ones need no scale."""
    return lambda query, keys, values: make(query, *(each.to(torch.float8_e4m3fn) for each in (keys, values)))


BASELINES: dict[str, Maker] = {
    "SDPA flash": _by(SDPBackend.FLASH_ATTENTION, sdpa),
    "SDPA cuDNN": _by(SDPBackend.CUDNN_ATTENTION, sdpa),
    "SDPA flash, packed": _by(SDPBackend.FLASH_ATTENTION, sdpa_packed),
    "SDPA cuDNN, packed": _by(SDPBackend.CUDNN_ATTENTION, sdpa_packed),
    "FlashAttention-3": _flash_attention_3,
    "FlashInfer": _flashinfer(False),
    "FlashInfer, tensor cores": _flashinfer(True),
}
LOW_PRECISION = {
    f"{name}, fp8": _in_fp8(BASELINES[name]) for name in ("FlashAttention-3", "FlashInfer", "FlashInfer, tensor cores")
}
