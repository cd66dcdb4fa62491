# SPDX-License-Identifier: Apache-2.0
"""The same prompt through the model, dense and with AQUA."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.calibration import check_tokens
from aqua_attention.capture import input_device
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.integrations.transformers import apply
from aqua_attention.projections import Projections


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    token_ids: list[int]


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    projections: Projections | None = None,
    config: AquaConfig | None = None,
    chat: bool = True,
) -> Continuation:
    """Greedy continuation of `prompt`; with AQUA when `projections` are given, else dense.

    Args:
        chat: put the prompt into the tokenizer's chat template, if it has one.

    Raises:
        AquaError: an empty prompt, no token to write, prompt and answer longer than the model's positions.
    """
    if not prompt.strip():
        raise AquaError("the prompt is empty: give it some words")
    if max_new_tokens < 1:
        raise AquaError(f"max_new_tokens is {max_new_tokens}: it must be 1 or more")
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    check_tokens(model, inputs["input_ids"], context=inputs["input_ids"].shape[1] + max_new_tokens)
    inputs = inputs.to(input_device(model))
    attached = nullcontext() if projections is None else apply(model, projections, config)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with attached, torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    return Continuation(text=str(tokenizer.decode(new, skip_special_tokens=True)), token_ids=new)
