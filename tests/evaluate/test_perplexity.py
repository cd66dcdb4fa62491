# SPDX-License-Identifier: Apache-2.0
"""The figures of `evaluate_perplexity` against their definitions, on a tiny model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

import aqua_attention as aqua
from aqua_attention.evaluate.generation import continue_tokens
from aqua_attention.evaluate.setting import Setting
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from conftest import SHAPE, VOCABULARY, calibrated, subject_of


@pytest.fixture(scope="module")
def windows():
    return torch.randint(2, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(5))


def log_probabilities(model, windows):
    with torch.no_grad():
        return model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)


def test_figures_follow_their_definitions(llama, windows):
    model, projections = llama
    config = aqua.AquaConfig.paper(k_ratio=0.5, selection="weighted", sink=1, recent=3)
    result = evaluate_perplexity(subject_of(model, projections), [Setting(config)], windows)
    dense = log_probabilities(model, windows)
    with aqua.apply(model, projections, config):
        found = log_probabilities(model, windows)
    targets = windows[:, 1:, None]
    row = result["rows"][0]
    perplexity = math.exp(-found.gather(-1, targets).mean())
    dense_perplexity = math.exp(-dense.gather(-1, targets).mean())
    assert result["dense"]["perplexity"] == pytest.approx(dense_perplexity, rel=1e-4)
    assert row["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert row["perplexity_change"] == pytest.approx(perplexity / dense_perplexity - 1, rel=1e-3)
    assert row["kl"] == pytest.approx(float((dense.exp() * (dense - found)).sum(-1).mean()), rel=1e-3)
    assert row["top1"] == pytest.approx(float((dense.argmax(-1) == found.argmax(-1)).double().mean()))
    assert row["tokens"] == result["dense"]["tokens"] == 2 * 47
    assert row["setting"] == config.to_dict()
    assert row["mean_k"] == 0.5
    assert row["kl"] > 0.01, "half the dimensions must cost this model something"


def test_the_settings_differ_and_dense_is_free(llama, windows):
    model, projections = llama
    settings = [
        Setting(aqua.AquaConfig.paper(k_ratio=1)),
        Setting(aqua.AquaConfig.paper(k_ratio=0.25)),
        Setting(aqua.AquaConfig.paper(k_ratio=0.25, selection="static")),
        Setting(aqua.AquaConfig.paper(k_ratio=0.25), basis="none"),
        Setting(aqua.AquaConfig.paper(k_ratio=0.25, selection="weighted"), basis="none"),
        Setting(aqua.AquaConfig.paper(k_ratio=0.5, s_ratio=0.5)),
    ]
    rows = evaluate_perplexity(subject_of(model, projections), settings, windows)["rows"]
    assert abs(rows[0]["perplexity_change"]) < 1e-5
    assert rows[0]["kl"] < 1e-6
    assert rows[0]["top1"] == 1.0
    assert [row["mean_k"] for row in rows] == [1.0, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert len({round(row["kl"], 6) for row in rows}) == len(rows)
    assert [row["basis"] for row in rows] == ["aqua", "aqua", "aqua", "none", "none", "aqua"]


def test_progress_counts_every_forward_pass(llama, windows):
    model, projections = llama
    seen = []
    evaluate_perplexity(
        subject_of(model, projections),
        [Setting(aqua.AquaConfig.paper())],
        windows,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_attached_model_is_not_taken_for_dense(llama, windows):
    model, projections = llama
    with aqua.apply(model, projections, aqua.AquaConfig.paper()), pytest.raises(aqua.AquaError, match="attached"):
        evaluate_perplexity(subject_of(model, projections), [Setting(aqua.AquaConfig.paper())], windows)


def test_nan_weights_are_an_error_and_no_result(llama, windows):
    model, projections = copy.deepcopy(llama[0]), llama[1]
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(aqua.AquaError, match="LlamaForCausalLM gives NaN: the weights are damaged"):
        evaluate_perplexity(subject_of(model, projections), [Setting(aqua.AquaConfig.paper())], windows)


def test_tokens_that_the_model_does_not_know_are_an_error(llama, windows):
    model, projections = llama
    with pytest.raises(aqua.AquaError, match=f"the model knows {VOCABULARY} tokens"):
        evaluate_perplexity(subject_of(model, projections), [], windows + VOCABULARY)


def test_no_windows_is_an_error(llama):
    model, projections = llama
    with pytest.raises(aqua.AquaError, match="at least one window of two tokens"):
        evaluate_perplexity(subject_of(model, projections), [], torch.zeros(0, 8, dtype=torch.long))


class OwnCode(transformers.LlamaPreTrainedModel):
    """A language model as checkpoints with code of their own have them: no GenerationMixin."""

    def __init__(self, config, width=VOCABULARY):
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, width, bias=False)
        self.post_init()

    def forward(self, input_ids=None, **options):
        states = self.model(input_ids=input_ids, **options)
        return CausalLMOutputWithPast(
            logits=self.lm_head(states.last_hidden_state), past_key_values=states.past_key_values
        )


def test_a_language_model_that_cannot_generate_has_a_perplexity(llama, windows, word_tokenizer):
    model = OwnCode(transformers.LlamaConfig(**SHAPE)).eval()
    model.load_state_dict(llama[0].state_dict())
    settings = [Setting(aqua.AquaConfig.paper(k_ratio=0.5))]
    expected = evaluate_perplexity(subject_of(*llama), settings, windows)
    assert evaluate_perplexity(subject_of(model, llama[1]), settings, windows)["rows"] == expected["rows"]
    with pytest.raises(aqua.AquaError, match="OwnCode cannot generate"):
        continue_tokens(model, word_tokenizer, windows[:1], max_new_tokens=2)


def test_models_without_next_token_logits_are_refused(windows):
    for model in (
        OwnCode(transformers.LlamaConfig(**SHAPE), width=2),
        transformers.LlamaModel(transformers.LlamaConfig(**SHAPE)),
    ):
        with pytest.raises(aqua.AquaError, match=f"{type(model).__name__} predicts no next token"):
            evaluate_perplexity(
                subject_of(model.eval(), calibrated(model.eval())), [Setting(aqua.AquaConfig.paper())], windows
            )
