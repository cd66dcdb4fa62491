# SPDX-License-Identifier: Apache-2.0
"""Ways to call `generate`. Each gives what it returned, as tensors to be compared: tokens first."""

from __future__ import annotations

import torch
from standin import DEVICE
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import aqua_attention as aqua
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama

CONFIG = aqua.AquaConfig(k_ratio=0.5, share="group", selection="weighted", sink=2, recent=5)
MAKERS = {"llama": make_llama, "gemma3": make_gemma3}
NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
SAMPLED = {
    "do_sample": True,
    "temperature": 2.0,
    "top_k": 40,
    "top_p": 0.95,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 4,
}


def prompt(rows=2, length=20, padding=7, seed=0):
    """A left-padded batch: token ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(2, VOCABULARY, (rows, length), generator=generator), torch.ones(rows, length)
    ids[1:, :padding], mask[1:, :padding] = 0, 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.long().to(DEVICE)}


def made(make):
    """A model where the kernels run, and projections."""
    model = make()
    projections = calibrated(model)
    return model.to(DEVICE), projections


def recorded(model, projections, config=CONFIG):
    """AQUA as everybody has it, but that rounding is the model's own."""
    return aqua.apply(model, projections, config, compile=False)


def generated(model, given=None, **options):
    """The sequences that a call with a seed of its own gives."""
    torch.manual_seed(7)
    return model.generate(**(given or prompt()), **GREEDY | options)


def plainly(model, projections, run=generated, config=CONFIG):
    """What a function of the model gives without recordings."""
    with aqua.apply(model, projections, config, layout="plain", record=False):
        return run(model)


class Told(BaseStreamer):
    """Keeps what it is told; or raises `error` at the fifth time."""

    def __init__(self, error=None):
        self.tokens, self.error = [], error

    def put(self, value):
        self.tokens.append(value)
        if self.error is not None and len(self.tokens) == 5:
            raise self.error

    def end(self):
        self.tokens.append(torch.tensor(-1))


class Raises(LogitsProcessor):
    """Fails at a length."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 25:
            raise ZeroDivisionError("a processor of the user's failed")
        return scores


class Stops(StoppingCriteria):
    """Ends the first row after four tokens and all after six."""

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return (rows == 0) & (input_ids.shape[1] >= 24) | (input_ids.shape[1] >= 26)


class Biased(LogitsProcessor):
    """Depends on the tokens so far, on the host."""

    def __call__(self, input_ids, scores):
        scores[:, int(input_ids[0, -1]) % VOCABULARY] += 3.0
        return scores


def end_tokens(model):
    """Rows end at different steps."""
    found = generated(model)[:, 20:]
    return [generated(model, eos_token_id=[int(found[0, 3]), int(found[1, 5])])]


def streamed(model):
    told = Told()
    return [generated(model, streamer=told), *told.tokens]


def as_dictionary(model):
    asked = ("output_logits", "output_scores", "output_hidden_states", "return_dict_in_generate")
    found = generated(model, **dict.fromkeys(asked, True))
    states = [state for step in found.hidden_states for state in step]
    return [found.sequences, *found.logits, *found.scores, *states]


def embedded(model):
    given = prompt()
    with torch.no_grad():
        states = model.get_input_embeddings()(given["input_ids"])
    return [generated(model, {"inputs_embeds": states, "attention_mask": given["attention_mask"]})]


def continued(model):
    """Three turns of a chat on the cache of the first."""
    given, cache, found = prompt(), None, []
    for turn in range(3):
        said = generated(model, given, past_key_values=cache, return_dict_in_generate=True)
        found, cache = [*found, said.sequences], said.past_key_values
        more = prompt(length=3 - turn, padding=0, seed=turn)["input_ids"]
        ids = torch.cat([said.sequences, more], 1)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        given = {"input_ids": ids, "attention_mask": mask}
    return found


def resized(model):
    """Another batch and back."""
    return [generated(model, prompt(rows)) for rows in (2, 3, 1, 2)]


def one_token(model):
    """Prompts of one token, which look like decoding steps."""
    alone = {"input_ids": torch.tensor([[5]], device=DEVICE)}
    return [generated(model, alone) for _ in range(3)]


WAYS = {
    "greedy": lambda model: [generated(model)],
    "without padding": lambda model: [generated(model, prompt(padding=0))],
    "sampling": lambda model: [generated(model, **SAMPLED)],
    "several returned": lambda model: [generated(model, **SAMPLED, num_return_sequences=2)],
    "guidance": lambda model: [generated(model, prompt(1), guidance_scale=1.5)],
    "logits processor": lambda model: [generated(model, logits_processor=LogitsProcessorList([Biased()]))],
    "end tokens": end_tokens,
    "stopping criteria": lambda model: [generated(model, stopping_criteria=StoppingCriteriaList([Stops()]))],
    "streamer": streamed,
    "dictionary": as_dictionary,
    "prompt in pieces": lambda model: [generated(model, prefill_chunk_size=size) for size in (7, 19, 1)],
    "inputs_embeds": embedded,
    "chat": continued,
    "other batches": resized,
    "one token": one_token,
}


def assert_same(found, expected, name=""):
    """Tokens are equal, and states but for rounding."""
    assert len(found) == len(expected), name
    for one, other in zip(found, expected, strict=True):
        if one.is_floating_point():
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3), name
        else:
            assert torch.equal(one, other), name
