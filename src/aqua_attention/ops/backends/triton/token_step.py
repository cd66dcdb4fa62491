# SPDX-License-Identifier: Apache-2.0
"""A decoding step that chooses tokens (AQUA-Select) on a GPU: four launches, or five (see `token_gather`).

Nothing is waited for, and nothing allocated but the output, so a step can be recorded; lengths are read on the GPU.
"""

from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.decode import check_window
from aqua_attention.ops.backends.triton.token_arguments import Sequences
from aqua_attention.ops.backends.triton.token_choice import choose_tokens
from aqua_attention.ops.backends.triton.token_gather import attend_to_tokens
from aqua_attention.ops.backends.triton.token_prepare import prepare_tokens
from aqua_attention.ops.backends.triton.token_scores import score_tokens
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.layout import Chosen, expect
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache


def decode_scored(
    query: Tensor, key: Tensor, value: Tensor, cache: ScoredCache, plan: LayerPlan, scaling: float
) -> tuple[Tensor, Chosen, Tensor]:
    """`Backend.decode_scored`. What it works in is made for the first step of a cache, and shared by its layers."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    work = TokenWork.shared(cache, query.shape[1], plan.k)
    output = query.new_empty((*query.shape[:2], value.shape[2]))
    selected_step(query, key, value, cache, plan, work, output, scaling=scaling)
    return output, Chosen(work.dims, work.mask), work.scratch.counts.view(key.shape[:2])


def selected_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: ScoredCache,
    plan: LayerPlan,
    work: TokenWork,
    output: Tensor,
    *,
    scaling: float,
) -> None:
    """`ops.scored_step.selected_step`, whose output is written to `output`.

    Args:
        query: [batch, num_attention_heads, head_dim]; key: [batch, num_key_value_heads, head_dim], value likewise; all
            contiguous, in the dtype of the cache.
        cache: gets the token; where there is no room for it the step goes on without.
        work: made for this shape of cache and plan; its `rotated`, `dims` and `scratch` then hold what was found.
        output: [batch, num_attention_heads, value_dim], contiguous.
    """
    check_selected(query, key, value, cache, plan, work, output)
    prepare_tokens(query, key, value, cache, plan, work)
    attend_selected(cache, plan, work, output, scaling=scaling, appended=True)


def attend_selected(
    cache: Sequences, plan: LayerPlan, work: TokenWork, output: Tensor, *, scaling: float, appended: bool
) -> None:
    """What follows once `work` has rotated queries and dimensions, and counts the step: score, choose, attend."""
    score_tokens(cache, work, scaling=scaling, window=(plan.sink, plan.recent), appended=appended)
    choose_tokens(cache, work, plan, appended=appended)
    attend_to_tokens(cache, work, output, scaling=scaling, appended=appended)


def check_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: ScoredCache,
    plan: LayerPlan,
    work: TokenWork,
    output: Tensor,
) -> None:
    """Raise AquaError for what the kernels do not take."""
    cache.check_step(query, key, value, plan)
    check_window(plan.sink, plan.recent)
    batch, _, kept, value_dim, _ = cache.shape
    heads = query.shape[1]
    expect("output", output, query.dtype, (batch, heads, value_dim))
    if work.rotated.shape != (batch, heads, kept) or work.dims.shape[2] != plan.k:
        raise AquaError(
            f"work is for queries {tuple(work.rotated.shape)} and {work.dims.shape[2]} dimensions: give it "
            f"{(batch, heads, kept)} and {plan.k}"
        )
    for name, states in (("query", query), ("key", key), ("value", value), ("rotation", plan.rotation)):
        if not states.is_contiguous():
            raise AquaError(f"{name} must be contiguous")
