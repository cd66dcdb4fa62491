# SPDX-License-Identifier: Apache-2.0
"""The same prompt through the model, dense and with AQUA."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.attach.apply import Attachment
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.run import damaged
from aqua_attention.model.capture import input_device
from aqua_attention.model.limits import check_generates, check_tokens, position_limit

# Some models ship a generation config with penalties or beams, which would hide what attention does.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    token_ids: list[int]


def continue_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = True, **options: Any
) -> Continuation:
    """`continue_tokens` of `prompt`, in the chat template if there is one; AquaError for an empty prompt, too."""
    return continue_tokens(model, tokenizer, encode_prompt(tokenizer, prompt, chat=chat), **options)


def check_prompt(prompt: str) -> None:
    """Raise AquaError for a prompt without words."""
    if not prompt.strip():
        raise AquaError("the prompt is empty: give it some words")


def check_new_tokens(max_new_tokens: int) -> None:
    """Raise AquaError where no token is to be written."""
    if max_new_tokens < 1:
        raise AquaError(f"max_new_tokens is {max_new_tokens}: it must be 1 or more")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = True, answer_start: str = ""
) -> Tensor:
    """Token ids [1, length] of `prompt`, in the chat template if there is one, and of the answer's first words."""
    check_prompt(prompt)
    if templated := chat and bool(tokenizer.chat_template):
        messages = [{"role": "user", "content": prompt}]
        try:
            question = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program, and fails in any way it likes
            raise AquaError(f"the model's chat template cannot be used ({error}): go without it (--no-chat)") from error
        text = f"{question}{answer_start}"
    else:
        text = f"{prompt}\n{answer_start}" if answer_start else prompt
    # A template writes its own special tokens.
    return tokenizer(text, add_special_tokens=not templated, return_tensors="pt", verbose=False)["input_ids"]


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Tensor,
    *,
    max_new_tokens: int,
    attachment: Attachment | None = None,
) -> Continuation:
    """Greedy continuation of token ids [1, length], under `attachment` (not attached yet) or dense.

    AquaError as `generate`; no token to write, prompt and answer longer than the model's positions, NaN.
    """
    check_new_tokens(max_new_tokens)
    length = token_ids.shape[1]
    check_tokens(model, token_ids, context=length + max_new_tokens)
    options = {"max_new_tokens": max_new_tokens, "output_logits": True, "return_dict_in_generate": True}
    output = generate(model, tokenizer, token_ids.tolist(), attachment, **options)
    if bool(torch.stack(output.logits).isnan().any()):
        raise damaged("the model gives NaN")
    new = output.sequences[0, length:].tolist()
    return Continuation(text=str(tokenizer.decode(new, skip_special_tokens=True)), token_ids=new)


def check_fits(model: PreTrainedModel, token_ids: Tensor, tokens: int, question: str, remedy: str) -> None:
    """Raise AquaError if a question of `tokens` tokens, answer included, does not fit, or as `check_tokens`."""
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        what = f"{question} takes {tokens} tokens with its answer"
        raise AquaError(f"{what}, the model knows {limit} positions: {remedy}")
    check_tokens(model, token_ids, context=tokens)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    attachment: Attachment | None,
    **options: Any,
) -> Any:
    """What the model's own `generate` gives for prompts in one left-padded batch, greedy; AquaError if it has none."""
    check_generates(model)
    width = max(map(len, prompts))
    pad = next(each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if each is not None)
    tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=input_device(model))
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=tokens.device)
    with attachment or nullcontext(), torch.no_grad():
        return model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=pad, **options, **GREEDY)
