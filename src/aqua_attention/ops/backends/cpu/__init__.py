# SPDX-License-Identifier: Apache-2.0
"""AQUA decoding on a CPU, in C, from tiled caches, and by token where tokens are chosen.

It is compiled when it is first used, and needs a C compiler then.
"""

import torch
from torch import Tensor

from aqua_attention.errors import Reason
from aqua_attention.ops import tokens
from aqua_attention.ops.backend import FROM_GROWING, Backend
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.ops.backends.cpu.rotate import rotate_new, why_not_rotate
from aqua_attention.ops.backends.cpu.step import DTYPES
from aqua_attention.ops.layout import WIDEST, Chosen, TiledCache
from aqua_attention.ops.plan import Attended, Call, LayerPlan

SCORE_BITS = (16, 8)


class Cpu(Backend):
    """A decoding step in one call; prompts go through torch."""

    name = "cpu"
    for_choice = True
    keeps_short_unrotated = True

    def why_not(self, call: Call, plan: LayerPlan | None) -> str | None:
        """See `Backend`."""
        if plan is None:
            return "its kernel rotates and chooses by itself"
        if not plan.config.chooses_tokens:
            return "it attends to keys by token only where it chooses tokens (select_p, select_tokens)"
        if call.query.device.type != "cpu":
            return f"it is for a CPU, and this is {call.query.device}"
        if call.query.shape[2] != 1:
            return f"it is for one query a sequence, there are {call.query.shape[2]}"
        if torch.compiler.is_compiling():
            return "torch.compile does not look into it"
        return _why_not_call(call, plan) or _why_not_scored(call, plan) or no_kernel_reason()

    def attend(self, call: Call, plan: LayerPlan) -> Attended:
        """See `Backend`."""
        from aqua_attention.ops.backends.cpu.select import attend_to_chosen

        return attend_to_chosen(call, plan)

    def why_not_rotate(self, states: Tensor, rotation: Tensor) -> str | None:
        """See `Backend`."""
        return why_not_rotate(states, rotation)

    def rotate(self, states: Tensor, rotation: Tensor) -> Tensor:
        """See `Backend`."""
        return rotate_new(states, rotation)

    def serves_tiles(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type == "cpu"

    def why_not_tiled(self, plan: LayerPlan, num_attention_heads: int, dtype: torch.dtype) -> str | None:
        """See `Backend`."""
        if plan.config.chooses_tokens:
            return FROM_GROWING
        if reason := no_kernel_reason():
            return reason
        if dtype not in DTYPES:
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


def _why_not_call(call: Call, plan: LayerPlan) -> str | None:
    """What of tensors, mask and softmax the step that chooses tokens does not take."""
    if call.softcap is not None or call.s_aux is not None:
        return "it knows neither softcap nor extra softmax logits (s_aux)"
    if call.mask is not None and call.mask.shape[1] != 1:
        return "it knows no mask that differs between heads"
    if call.query.dtype not in DTYPES or plan.rotation.dtype != torch.float32:
        text = f"queries are {call.query.dtype}, and it takes float32 and bfloat16"
        return Reason(text, "load the model with dtype='bfloat16' or 'float32'")
    widest = max(plan.head_dim, call.value.shape[3])
    if widest > WIDEST:
        return f"heads have {widest} dimensions, and it takes {WIDEST} at most"
    return "it has no gradient" if call.has_gradient else None


def _why_not_scored(call: Call, plan: LayerPlan) -> str | None:
    """What of the settings by which it would score tokens it does not take."""
    config = plan.config
    if tokens.Way() != tokens.WAY:
        return "it chooses tokens in our way only, and a benchmark has put another in its place"
    if plan.has_window_store:
        text = "it knows no tokens that keep more dimensions than others (s_ratio with an exact window)"
        return Reason(text, "leave s_ratio out, or sink and recent")
    if config.share != "group" and call.query.shape[1] != call.key.shape[1]:
        text = f"share is {config.share!r}, and it scores the same dimensions for a group"
        return Reason(text, "set share='group'")
    if config.score_bits not in SCORE_BITS:
        return Reason(f"score_bits is {config.score_bits}, and it scores keys in 8 and 16", "set score_bits=8")
    if config.score_bits == 8 and call.score_copy is None:
        text = "score_bits is 8, and there is no copy of the keys, which a growing cache without bits has"
        return Reason(text, "leave bits out")
    return None
