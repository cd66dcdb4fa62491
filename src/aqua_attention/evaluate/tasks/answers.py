# SPDX-License-Identifier: Apache-2.0
"""What a model answers: how likely it finds given answers, what it writes, and a file that keeps both."""

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from aqua_attention.attach.apply import Attachment
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import check_fits, generate
from aqua_attention.evaluate.run import damaged
from aqua_attention.evaluate.tasks.formats import ChoiceItem, Item, Task, WrittenItem
from aqua_attention.io.state import RunState, read_sealed, write_sealed
from aqua_attention.model.capture import input_device

NEW_TOKENS = 256
"""Tokens that a written answer may have."""
STOPS = ("Question:", "</s>", "<|im_end|>")
"""What ends a written answer, besides the model's own end token; as lm-evaluation-harness ends GSM8K's."""
TOKENS_AT_ONCE, TOKENS_AT_ONCE_GPU = 2048, 16384
"""Tokens of one forward pass, padding included, unless one sequence alone has more; bounds the memory."""
KIND, FORMAT_VERSION = "aqua_attention_answers", 1
"""Of a file of answers."""
Answer = list[float] | str
"""Log-likelihoods of all given answers, or what was written."""


class _Pair(NamedTuple):
    """Context and continuation as tokens; the continuation begins at `start`."""

    ids: tuple[int, ...]
    start: int


def answer_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    attachments: Sequence[Attachment | None],
) -> Iterator[list[Answer]]:
    """Answers of items that `check_items` has checked, under one attachment (None: dense) after the other.

    An answer given is scored by the summed log-likelihood of its tokens (float32), in one forward pass without a cache.
    Where only a cache shows what is lost (`bits`, `h2o_ratio`), the context fills one first, as it does when a model
    writes. Other answers are written greedily, up to one of STOPS or NEW_TOKENS tokens. AquaError for
    NaN or infinite logits.
    """
    choices = [item for item in items if isinstance(item, ChoiceItem)]
    written = [item for item in items if isinstance(item, WrittenItem)]
    pairs = [[_encoded(tokenizer, *pair) for pair in zip(c.contexts, c.continuations, strict=True)] for c in choices]
    prompts = [tokenizer(item.prompt, verbose=False)["input_ids"] for item in written]
    for attachment in attachments:
        scores = _log_likelihoods(model, list(dict.fromkeys(pair for row in pairs for pair in row)), attachment)
        texts = iter(_written(model, tokenizer, prompts, attachment) if prompts else [])
        rows = iter(pairs)
        yield [[scores[pair] for pair in next(rows)] if isinstance(item, ChoiceItem) else next(texts) for item in items]


def check_items(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """Tokens that the model reads of each item of a task: of its longest answer with the context, or of the prompt.

    AquaError for a question that is too long, tokens that the model does not know, an answer without any.
    """
    remedy = "ask with fewer examples (few_shot)" if task.few_shot else "drop it, or ask a model that knows more"
    lengths = []
    for item in task.items:
        try:
            lengths.append(_checked_length(model, tokenizer, item, remedy))
        except AquaError as error:
            raise AquaError(f"{task.name}, {item.where or 'a question'}: {error}") from error
    return lengths


def _encoded(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> _Pair:
    """Both are tokenised in one, so that a space belongs to the word after it."""
    bare = context.rstrip()
    ids = tokenizer(context + continuation, verbose=False)["input_ids"]
    start = len(tokenizer(bare, verbose=False)["input_ids"])
    if not 0 < start < len(ids):
        raise AquaError(
            f"the tokenizer leaves nothing of the answer {continuation!r} after {bare[-40:]!r}, which cannot be "
            "scored: drop the question"
        )
    return _Pair(tuple(ids), start)


def _checked_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Item, remedy: str) -> int:
    if isinstance(item, WrittenItem):
        read, more = [tokenizer(item.prompt, verbose=False)["input_ids"]], NEW_TOKENS
    else:
        pairs = zip(item.contexts, item.continuations, strict=True)
        read, more = [_encoded(tokenizer, *pair).ids for pair in pairs], 0
    longest = max(map(len, read))
    check_fits(model, torch.tensor([token for ids in read for token in ids]), longest + more, "the question", remedy)
    return longest


def _log_likelihoods(model: PreTrainedModel, pairs: list[_Pair], attachment: Attachment | None) -> dict[_Pair, float]:
    with attachment or nullcontext(), torch.no_grad():
        if attachment and (attachment.config.bits is not None or attachment.config.h2o_ratio < 1):
            scores = {pair: _score_with_cache(model, pair) for pair in pairs}
        else:
            scores = {}
            on_cpu = input_device(model).type == "cpu"
            for batch in _batches(pairs, TOKENS_AT_ONCE if on_cpu else TOKENS_AT_ONCE_GPU):
                scores |= _score_batch(model, batch)
    if not all(math.isfinite(score) for score in scores.values()):
        raise damaged("the model gives NaN or infinite logits")
    return scores


def _batches(pairs: list[_Pair], tokens: int) -> Iterator[dict[tuple[int, ...], list[_Pair]]]:
    """Pairs by what the model reads, in batches of similar length and of at most so many tokens.

    Answers that differ in their last token only, such as letters, are read once.
    """
    by_input: dict[tuple[int, ...], list[_Pair]] = {}
    for pair in pairs:
        by_input.setdefault(pair.ids[:-1], []).append(pair)
    batch: dict[tuple[int, ...], list[_Pair]] = {}
    for ids in sorted(by_input, key=len, reverse=True):
        longest = len(next(iter(batch), ids))
        if batch and (len(batch) + 1) * longest > tokens:
            yield batch
            batch = {}
        batch[ids] = by_input[ids]
    if batch:
        yield batch


def _score_batch(model: PreTrainedModel, batch: dict[tuple[int, ...], list[_Pair]]) -> dict[_Pair, float]:
    width = max(map(len, batch))
    # Padding comes last, where causal attention never looks back from: no mask is needed, nor the slower path for one.
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=input_device(model))
    first = min(pair.start for pairs in batch.values() for pair in pairs) - 1
    logits = model(input_ids=tokens, use_cache=False, **_only_last(model, width - first)).logits
    first = width - logits.shape[1]
    return {
        pair: _sum(logits[row, pair.start - 1 - first : len(pair.ids) - 1 - first], pair)
        for row, pairs in enumerate(batch.values())
        for pair in pairs
    }


def _score_with_cache(model: PreTrainedModel, pair: _Pair) -> float:
    tokens = torch.tensor([pair.ids], device=input_device(model))
    cache = DynamicCache(config=model.config)
    logits = [model(input_ids=tokens[:, : pair.start], past_key_values=cache, **_only_last(model, 1)).logits[0, -1:]]
    if rest := tokens[:, pair.start : -1].numel():
        logits.append(model(input_ids=tokens[:, pair.start : -1], past_key_values=cache).logits[0, -rest:])
    return _sum(torch.cat(logits), pair)


def _only_last(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """Ask for the logits of the last positions only, where the model can leave out the others."""
    can = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": count} if can else {}


def _sum(logits: Tensor, pair: _Pair) -> float:
    targets = torch.tensor(pair.ids[pair.start :], device=logits.device)
    return float(logits.float().log_softmax(-1).gather(-1, targets[:, None]).sum())


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], attachment: Attachment | None
) -> list[str]:
    width = max(map(len, prompts))
    stops = [_Stops(tokenizer, width)]
    output = generate(model, tokenizer, prompts, attachment, max_new_tokens=NEW_TOKENS, stopping_criteria=stops)
    return [_cut(text) for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def _cut(text: str) -> str:
    return re.split("|".join(map(re.escape, STOPS)), text, maxsplit=1)[0]


class _Stops(StoppingCriteria):
    """Ends a row as soon as its answer holds one of STOPS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens
        # A token has at least one character, so that a stop is seen in the last tokens.
        self.tail = max(map(len, STOPS)) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        rows = input_ids[:, max(self.prompt_tokens, input_ids.shape[1] - self.tail) :].tolist()
        texts = [self.tokenizer.decode(row) for row in rows]
        return torch.tensor([any(stop in text for stop in STOPS) for text in texts], device=input_ids.device)


class Answers(RunState):
    """Answers to each task's questions, in their order: for each question dense's, then each setting's.

    Kept in a JSON file, when there is a path, at most every few seconds and when `save` is called.
    """

    instead = "give another --state"

    def __init__(self, run: dict[str, Any], path: Path | str | None = None, *, seconds: float = 10.0) -> None:
        """Go on with what `path` holds, if it is there; AquaError where it is damaged, or of another `run`.

        In `run`, each entry of `tasks` tells a task from others of its name. Tasks of earlier runs stay in the file,
        and new ones may join.
        """
        super().__init__(path, run, seconds=seconds)
        self.of_task: dict[str, list[list[Answer]]]
        self.of_task, earlier = self.found() or ({}, {})
        self.run["tasks"] = earlier | self.run["tasks"]

    def add(self, task: str, answers: list[list[Answer]]) -> None:
        """Add the answers to a task's next questions."""
        # One assignment, so that an interrupt finds all of them or none.
        self.of_task[task] = [*self.of_task.get(task, []), *answers]
        self.keep()

    def _write(self, path: Path, content: tuple[()]) -> None:
        write_sealed(path, KIND, FORMAT_VERSION, {"run": self.run, "answers": self.of_task})

    def _read(self, path: Path) -> tuple[dict[str, Any], tuple[dict[str, list[list[Answer]]], dict[str, Any]]]:
        words = {"what": "answers of `aqua eval tasks`", "remedy": "give another --state, or delete it"}
        content = read_sealed(path, KIND, FORMAT_VERSION, **words)
        run, answers = content["run"], content["answers"]
        return run, (answers, run["tasks"])

    def _differences(self, run: dict[str, Any]) -> list[str]:
        ours, theirs = self.run["tasks"], run["tasks"]
        names = [name for name in super()._differences(run) if name != "tasks"]
        asked = sorted(ours.keys() & theirs.keys())
        return names + [f"the questions of {task}" for task in asked if ours[task] != theirs[task]]
