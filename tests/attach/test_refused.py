# SPDX-License-Identifier: Apache-2.0
"""What AQUA refuses: at the beginning, with the right cause and what to do."""

import pytest
import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    TextGenerationPipeline,
)

import aqua_attention as aqua
from conftest import SHAPE, VOCABULARY, calibrated, make_gemma3, make_llama

IDS = torch.randint(2, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def falcon_h1():
    """A model whose layers have attention and a state space, and projections."""
    torch.manual_seed(0)
    space = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = FalconH1ForCausalLM(FalconH1Config(**SHAPE, **space, mamba_chunk_size=8)).eval()
    return model, calibrated(model)


@pytest.mark.parametrize("setting", [{"bits": 8}, {"bits": 4}, {"h2o_ratio": 0.5}])
def test_layers_with_a_state_beside_keys_store_nothing_else(falcon_h1, setting):
    (name,) = setting
    with pytest.raises(
        aqua.AquaError, match=rf"^{name}=.* \(LinearAttentionAndFullAttentionLayer\): leave {name} out$"
    ):
        aqua.apply(*falcon_h1, aqua.AquaConfig(**setting))


def test_layers_with_a_state_beside_keys_are_not_tiled(falcon_h1):
    cause = r"is impossible here, because .* more than keys and values \(LinearAttentionAnd"
    with pytest.raises(aqua.AquaError, match=cause), aqua.apply(*falcon_h1, layout="tiled"):
        pass
    with aqua.apply(*falcon_h1) as attachment, pytest.raises(aqua.AquaError, match=cause):
        attachment.new_cache(max_length=64, layout="tiled")


@pytest.mark.parametrize("sizes", [{}, {"max_length": 80}])
def test_layers_with_a_state_beside_keys_have_caches_that_rotate_when_read(falcon_h1, sizes):
    model, projections = falcon_h1
    expected = model.generate(IDS, **GREEDY)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=1)) as attachment:
        found = model.generate(IDS, past_key_values=attachment.new_cache(**sizes), **GREEDY)
        assert torch.equal(found, expected)
        assert "growing" in str(attachment.explain(length=64))


@pytest.mark.parametrize("kinds", ["lff", "lfl"])
def test_a_mask_that_hides_no_padding_is_refused_by_name(kinds):
    torch.manual_seed(0)
    names = {"l": "linear_attention", "f": "full_attention"}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = MiniMaxForCausalLM(MiniMaxConfig(**SHAPE, **experts, layer_types=[names[kind] for kind in kinds])).eval()
    ids, mask = IDS[:, :24].reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    with aqua.apply(model, calibrated(model), aqua.AquaConfig.paper(k_ratio=1)):
        assert model.generate(ids, attention_mask=mask, **GREEDY).shape == (2, 16)
        mask[0, :5] = 0
        with pytest.raises(aqua.AquaError, match="MiniMaxForCausalLM makes a mask of 1 token for the 13 of its cache"):
            model.generate(ids, attention_mask=mask, **GREEDY)
        assert model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY).shape == (2, 16)


def test_continuous_batching_is_refused_by_name_and_comes_back(llama):
    model, projections = llama
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    with aqua.apply(model, projections):
        with pytest.raises(aqua.AquaError, match="does not know continuous batching"):
            model.generate_batch([[3, 4, 5]], generation_config=config)
        with pytest.raises(aqua.AquaError, match="call generate with a padded batch, or detach AQUA"):
            model.init_continuous_batching(generation_config=config)
        with (
            pytest.raises(aqua.AquaError, match="does not know continuous batching"),
            model.continuous_batching_context_manager(generation_config=config),
        ):
            pass
    assert "init_continuous_batching" not in vars(model)


def test_continuous_batching_that_runs_already_fails_and_is_never_dense(llama):
    model, projections = llama
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)  # else it takes what memory there is
    given = {"generation_config": config, "continuous_batching_config": small}
    with model.continuous_batching_context_manager(**given) as manager:
        before = manager.get_result(manager.add_request([3, 4, 5], max_new_tokens=2), timeout=60)
        assert len(before.generated_tokens) == 2
        with aqua.apply(model, projections):
            found = manager.get_result(manager.add_request([3, 4, 5], max_new_tokens=2), timeout=60)
    assert "which AQUA does not support" in found.error
    assert not found.generated_tokens


class Adapted(nn.Module):
    """As a model of PEFT."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def get_base_model(self):
        return self.base_model.model


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (torch.compile, "._orig_mod"),
        (Adapted, ".get_base_model()"),
        (nn.DataParallel, ".module"),
        (Wrapped, ".module"),
        (lambda model: torch.compile(Adapted(model)), ".get_base_model()"),
    ],
)
def test_a_wrapped_model_is_refused_with_the_place_of_the_model_in_it(llama, wrap, path):
    model, projections = llama
    wrapped = wrap(model)
    with pytest.raises(aqua.AquaError) as refusal:
        aqua.apply(wrapped, projections)
    assert str(refusal.value).endswith(f"such as the LlamaForCausalLM in it: give model{path}")
    assert eval(f"wrapped{path}") is model


def test_a_pipeline_is_refused_with_its_model_and_other_things_without(llama, word_tokenizer):
    model, projections = llama
    with pytest.raises(aqua.AquaError, match=r"LlamaForCausalLM in it: give model\.model$"):
        aqua.apply(TextGenerationPipeline(model=model, tokenizer=word_tokenizer), projections)
    for other in ("smollm2", nn.Linear(2, 2), None):
        with pytest.raises(aqua.AquaError, match=r"PreTrainedModel is needed$"):
            aqua.apply(other, projections)


@pytest.mark.parametrize("make", [make_llama, make_gemma3])
def test_a_model_without_weights_says_so(make, llama):
    with torch.device("meta"):
        model = make()
    for call in (lambda: aqua.apply(model, llama[1]), lambda: calibrated(model)):
        with pytest.raises(aqua.AquaError, match="is on the meta device, so it has no weights: load them"):
            call()


@pytest.mark.parametrize("way", ["assistant", "prompt lookup", "the assistant evicts", "in the config"])
def test_what_takes_tokens_back_is_refused_with_eviction_before_anything_runs(llama, way):
    model, projections = llama
    other = make_llama()
    evicting, ran = (other if way == "the assistant evicts" else model), []
    config = GenerationConfig(prompt_lookup_num_tokens=3, **GREEDY)
    options = {
        "assistant": {"assistant_model": other} | GREEDY,
        "prompt lookup": {"prompt_lookup_num_tokens": 3} | GREEDY,
        "the assistant evicts": {"assistant_model": other} | GREEDY,
        "in the config": {"generation_config": config},
    }[way]
    hook = evicting.model.register_forward_hook(lambda *_: ran.append(1))
    try:
        with aqua.apply(evicting, projections, aqua.AquaConfig(h2o_ratio=0.5)):
            ran.clear()
            with pytest.raises(aqua.AquaError, match=r"take tokens back, and h2o_ratio=0\.5 has forgotten"):
                model.generate(IDS, **options)
            assert not ran
    finally:
        hook.remove()
