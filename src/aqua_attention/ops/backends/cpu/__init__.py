# SPDX-License-Identifier: Apache-2.0
"""AQUA decoding from tiled caches on a CPU, in C. It is compiled when it is first used, and needs a C compiler then."""

import torch
from torch import Tensor

from aqua_attention.errors import Reason
from aqua_attention.ops.backend import Backend
from aqua_attention.ops.layout import WIDEST, Chosen, TiledCache
from aqua_attention.ops.plan import LayerPlan


class Cpu(Backend):
    """A decoding step in one call; prompts go through torch."""

    name = "cpu"
    for_prompts = False
    keeps_short_unrotated = True

    def serves_tiles(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type == "cpu"

    def why_not_tiled(self, plan: LayerPlan, num_attention_heads: int, dtype: torch.dtype) -> str | None:
        """See `Backend`."""
        from aqua_attention.ops.backends.cpu.build import no_kernel_reason

        if reason := no_kernel_reason():
            return reason
        if dtype not in (torch.float32, torch.bfloat16):
            text = f"the model is {dtype}, and the CPU kernel takes float32 and bfloat16"
            return Reason(text, "load the model with dtype='bfloat16' or 'float32'")
        if plan.config.bits == 8:
            return Reason("the CPU kernel reads no bits=8", "leave bits out")
        return (
            f"heads have {plan.head_dim} dimensions, and it takes {WIDEST} at most" if plan.head_dim > WIDEST else None
        )

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, cache: TiledCache, plan: LayerPlan, scaling: float
    ) -> tuple[Tensor, Tensor, Chosen | None]:
        """See `Backend`."""
        from aqua_attention.ops.backends.cpu.step import decode_step

        return decode_step(query, key, value, cache, plan, scaling)
