# SPDX-License-Identifier: Apache-2.0
"""Prompts and greedy continuations."""

from __future__ import annotations

import copy

import pytest

import aqua_attention as aqua
from aqua_attention.evaluate.generation import continue_prompt, encode_prompt


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 3.0},
        {"num_beams": 8},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 3.0},
    ],
)
def test_the_habits_of_a_model_do_not_change_greedy_answers(llama, word_tokenizer, habit):
    """Some models ship a generation config with penalties, beams or sampling."""
    model, other = llama[0], copy.deepcopy(llama[0])
    other.generation_config.update(**habit)
    answers = [
        continue_prompt(each, word_tokenizer, "w1 w2 w3", max_new_tokens=16).token_ids for each in (model, other)
    ]
    assert answers[0] == answers[1]
    ids = encode_prompt(word_tokenizer, "w1 w2 w3")
    plain = other.generate(ids, max_new_tokens=16, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert plain != answers[0], "the habit would have changed them"


def test_the_answer_may_be_begun(word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    assert encode_prompt(tokenizer, "w1", answer_start="w2").tolist() == [[3, 4]]
    tokenizer.chat_template = "<s> w5 {{ messages[0].content }} w6 "
    assert encode_prompt(tokenizer, "w1", answer_start="w2").tolist() == [[1, 7, 3, 8, 4]]
    assert encode_prompt(tokenizer, "w1", answer_start="w2", chat=False).tolist() == [[3, 4]]


def test_a_broken_chat_template_is_one_clear_error(word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system prompt') }}"
    with pytest.raises(aqua.AquaError, match=r"chat template cannot be used .*go without it \(--no-chat\)"):
        encode_prompt(tokenizer, "w1")
