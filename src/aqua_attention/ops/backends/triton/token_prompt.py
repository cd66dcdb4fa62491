# SPDX-License-Identifier: Apache-2.0
"""A prompt, or its last part, whose queries choose tokens: `ops.tokens.attend_to_chosen` on a GPU.

Four kernels a block of queries: the softmax of the scores of each head; weights of tokens, summed over the heads of a
group; from these the least weight that is read, by halving bits; and attention to what is read. Of some queries weights
lie in memory, in float32, and a bit for each token. No other matrix of queries and tokens does.

Every token is scored and multiplied, so this saves no time beside dense attention. It chooses as decoding does. So
figures of whole texts show what the choice loses.

Weights below 2^-126 may be zero here and not in the reference: where a fixed number reaches so far, more ties are read.
"""

import torch
import triton
from torch import Tensor

from aqua_attention.ops.backends.triton.blocks import LOG2_E, on_device_of, padded
from aqua_attention.ops.backends.triton.rotate import PRECISION, by_token, empty_by_token, rotate_and_narrow
from aqua_attention.ops.backends.triton.token_prompt_kernels import (
    WORD,
    Block,
    Prompt,
    attend_rows,
    find_least,
    sum_scores,
    weigh,
)
from aqua_attention.ops.plan import Attended, Call, LayerPlan, Reading
from aqua_attention.ops.tokens import reading_of, scored_bytes, scored_keys

MOST_WEIGHTS = 1 << 26
"""Held at once, in float32: a quarter of a gigabyte, unless 64 queries of one sequence have more."""
MOST_COPIED = 1 << 25
"""Numbers of keys that are rounded to what scores at once: some copies are made of them meanwhile."""
ROWS, KEYS, FLOAT32_KEYS = 64, 64, 32
"""Queries and tokens of a matrix product; fewer tokens of float32, for which registers do not last otherwise."""
WARPS, STAGES = 8, 2
MOST_AT_ONCE, LEAST_AT_ONCE, A_THREAD = 16384, 1024, 32
"""Weights of a query that are looked at together, at most and at least, and those of a thread."""
SCORE_PRECISION = "tf32"
"""Of scores of queries in 16 bits. These are exact in it, and keys are rounded less than by their 8 bits."""


def attend_prompt(call: Call, plan: LayerPlan) -> Attended:
    """Attention of a prompt or its last part, causal and without a mask, each query to the tokens that it chooses.

    Tokens are chosen as the reference does, up to rounding of their scores. Of queries in 16 bits these are products in
    TF32.
    """
    at_once = max(1, MOST_WEIGHTS // (call.key.shape[1] * call.key.shape[2] * ROWS))
    if call.query.shape[0] <= at_once:
        return _attend(call, plan)
    states = zip(*(each.split(at_once) for each in call[:3]), strict=True)
    parts = [_attend(call._replace(query=query, key=key, value=value), plan) for query, key, value in states]
    outputs, selected, _, readings = zip(*parts, strict=True)
    return Attended(
        torch.cat(outputs),
        None if selected[0] is None else torch.cat(selected),
        torch.Size((len(call.query), *parts[0].rotated[1:])),
        None if readings[0] is None else Reading(*(torch.cat(each) for each in zip(*readings, strict=True))),
    )


def _attend(call: Call, plan: LayerPlan) -> Attended:
    """`attend_prompt` of few sequences."""
    (batch, heads, queries, _), (kv_heads, tokens) = call.query.shape, call.key.shape[1:3]
    before, value_dim, config = tokens - queries, call.value.shape[3], plan.config
    rotated, narrow, selected = rotate_and_narrow(
        call.query, plan, call.scaling, is_observed=call.is_observed, before=before
    )
    key, value = by_token(call.key), by_token(call.value)
    copy = torch.empty(key.shape, dtype=torch.float32, device=key.device)
    step = max(1, MOST_COPIED // (batch * kv_heads * key.shape[3]))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        copy[:, :, part] = scored_keys(key[:, :, part], plan)
    output = empty_by_token(rotated, value_dim)
    count = torch.empty(batch, kv_heads, queries, dtype=torch.int32, device=key.device)
    rows = min(queries, max(ROWS, MOST_WEIGHTS // (batch * kv_heads * tokens) // ROWS * ROWS))
    at_once = FLOAT32_KEYS if key.dtype == torch.float32 else KEYS
    weights = torch.empty(batch, kv_heads, rows, tokens, dtype=torch.float32, device=key.device)
    lse, words = weights.new_empty(batch, heads, rows), triton.cdiv(tokens, WORD)
    chosen = torch.empty(batch, kv_heads, rows, words, dtype=torch.int32, device=key.device)
    prompt = Prompt(
        rotated, narrow, key, value, copy, output, weights, lse, chosen, count, *key.stride()[:3], *value.stride()[:3]
    )
    window = call.sink, call.recent, plan.min_length, call.scaling * LOG2_E
    constants = {
        "GROUP": heads // kv_heads,
        "KEPT": key.shape[3],
        "KEPT_PADDED": padded(key.shape[3]),
        "ROWS": ROWS,
        "KEYS": at_once,
        "PRECISION": PRECISION,
    }
    likely = constants | {"SCORE_PRECISION": PRECISION if key.dtype == torch.float32 else SCORE_PRECISION}
    launch = {"num_warps": WARPS, "num_stages": STAGES if key.element_size() == 2 else 1}
    with on_device_of(key):
        for first in range(0, queries, rows):
            here = min(rows, queries - first)
            block = Block(first, here, queries, before, rows, words, kv_heads, *window)
            blocks, seen = triton.cdiv(here, ROWS), before + first + here
            sum_scores[(blocks, heads, batch)](prompt, block, **likely, **launch)
            weigh[(triton.cdiv(seen, at_once), blocks, batch * kv_heads)](prompt, block, **likely, **launch)
            together = min(MOST_AT_ONCE, max(LEAST_AT_ONCE, triton.next_power_of_2(seen)))
            find_least[(here, kv_heads, batch)](
                prompt,
                block,
                1.0 if config.select_p is None else float(config.select_p),
                config.select_tokens or 0,
                BY_COUNT=config.select_p is None,
                ALL=config.select_p == 1,
                AT_ONCE=together,
                ONE=seen <= together,
                num_warps=together // (32 * A_THREAD),
            )
            attend_rows[(blocks, heads, batch)](
                prompt, block, **constants, VALUE_DIM=value_dim, VALUE_PADDED=padded(value_dim), **launch
            )
    reading = _reading(call, plan, count, selected) if call.is_observed else None
    return Attended(output, selected, rotated.shape, reading)


def _reading(call: Call, plan: LayerPlan, count: Tensor, selected: Tensor | None) -> Reading:
    """What was read, of so many tokens."""
    (batch, kv_heads, queries), tokens = count.shape, call.key.shape[2]
    seen = torch.arange(tokens - queries + 1, tokens + 1, device=count.device).expand(batch, kv_heads, queries)
    dims = plan.kept if selected is None else selected.unflatten(1, (kv_heads, -1)).any(2).sum(-1)
    read = count.long()
    return reading_of(read, read, seen, scored_bytes(dims, plan.config.score_bits), plan, call.value.shape[3])
