# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a whole decoding step, but for its timing: what is counted, how caches are filled, and the gate."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

import aqua_attention as aqua
from aqua_attention.cache.cache import AquaCache
from aqua_attention.cli import main as cli
from aqua_attention.report.tables import generate_table
from conftest import VOCABULARY, calibrated, make_llama

pytest.importorskip("triton")
from aqua_attention.bench import generate as bench
from aqua_attention.bench import random_llama

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXACT = aqua.AquaConfig.paper(k_ratio=1, share="group", sink=4, recent=64)
HALF = aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64)
INT8 = aqua.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64, bits=8)


@pytest.fixture(scope="module")
def model():
    """A tiny Llama from the function that makes the large one, in float32."""
    return random_llama.make_model(**SHAPE, vocab_size=VOCABULARY, dtype=torch.float32, device=DEVICE)


def test_the_model_is_the_same_each_time_and_leaves_the_random_state(model):
    before = torch.get_rng_state()
    twin = random_llama.make_model(**SHAPE | {"num_hidden_layers": 1}, device=DEVICE)
    assert twin.dtype == torch.bfloat16
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(aqua.AquaError, match="heads must divide"):
        random_llama.make_model(num_attention_heads=4, num_key_value_heads=3, device=DEVICE)


def test_bytes_are_those_of_the_weights_but_the_embeddings_and_of_the_chosen_dimensions(model):
    attention, mlp, norms = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96, 2 * 64
    weights = bench.weight_bytes(model)
    assert weights == 4 * (2 * (attention + mlp + norms) + 64 + 64 * VOCABULARY)
    # Two layers, three sequences, two heads, 100 tokens.
    tokens = 2 * 3 * 2 * 100
    assert bench.step_bytes(model, 3, 100, None) - weights == tokens * (16 + 16) * 4
    assert bench.step_bytes(model, 3, 100, EXACT) - weights == tokens * (16 + 16) * 4
    assert bench.step_bytes(model, 3, 100, HALF) - weights == tokens * (16 + 8) * 4
    assert bench.step_bytes(model, 3, 100, INT8) - weights == tokens * (16 + 8 + 4)


def test_rows_are_compared_with_the_fastest_dense_one_and_with_the_bandwidth():
    rows = [
        {"name": "slow", "k_ratio": None, "seconds": 0.040, "bytes": 40e9},
        {"name": "gone", "k_ratio": None, "absent": "failed: no memory"},
        {"name": "fast", "k_ratio": None, "seconds": 0.020, "bytes": 40e9},
        {"name": "aqua", "k_ratio": 0.5, "seconds": 0.016, "bytes": 32e9},
    ]
    bench.compare(rows, 8, 4e12)
    assert [row.get("ratio") for row in rows] == pytest.approx([0.5, None, 1.0, 1.25])
    given = {"device": "GPU", "batch": 8, "length": 32768, "layers": 32, "hidden": 4096, "dtype": "torch.bfloat16"}
    titles, cells = generate_table(given | {"rows": rows})
    assert titles[0] == "GPU, 8 x 32768 tokens, 32 layers of 4096, torch.bfloat16"
    assert cells == [
        ["slow", "200.0", "40.00", "0.50", "10.00", "25.0%"],
        ["gone", "absent: failed: no memory", "", "", "", ""],
        ["fast", "400.0", "20.00", "1.00", "10.00", "50.0%"],
        ["aqua, k_ratio 0.5", "500.0", "16.00", "1.25", "8.00", "50.0%"],
    ]
    alone = [rows[-1] | {}]
    bench.compare(alone, 8, 4e12)
    assert alone[0]["ratio"] is None
    assert generate_table(given | {"rows": alone})[1][0][3] == ""


@torch.no_grad()
def test_a_filled_cache_goes_on_as_after_a_prompt():
    model = make_llama()
    projections, model = calibrated(model), model.to(DEVICE)
    ids = torch.randint(1, VOCABULARY, (2, 303), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    prompt = DynamicCache(config=model.config)
    model(ids[:, :300], past_key_values=prompt)
    states = [(layer.keys.clone(), layer.values.clone()) for layer in prompt.layers]

    def logits(cache):
        return torch.cat([model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(300, 303)], 1)

    dense = logits(prompt)
    static = StaticCache(config=model.config, max_cache_len=310)
    for _ in range(2):
        static.reset()
        bench.fill_cache(static, states)
        assert torch.allclose(logits(static), dense, atol=2e-4)
    # The dense prompt's states are AQUA's at k_ratio 1.
    with aqua.apply(model, projections, EXACT) as attachment:
        real, filled = (attachment.new_cache(max_length=310, layout="tiled") for _ in range(2))
        model(ids[:, :300], past_key_values=real)
        bench.fill_cache(filled, states)
        assert int(filled.get_seq_length()) == 300
        found = logits(filled)
        assert torch.allclose(found, logits(real), atol=2e-4)
        assert torch.allclose(found, dense, atol=2e-4)
        filled.reset()
        bench.fill_cache(filled, states)
        assert torch.equal(logits(filled), found)


@torch.no_grad()
def test_the_gate_lets_what_is_right_through(model):
    # In float32, the order of a sum makes no more than the least that is allowed.
    assert bench.check_logits(model, random_llama.random_projections(model), (EXACT, HALF, INT8), 2) == bench.TOLERANCE
    assert model.config._attn_implementation == "sdpa"


FAULTS = {
    "a token missing": lambda keys, values: (keys[:, :, 1:], values[:, :, 1:]),
    "keys of other heads": lambda keys, values: (keys.flip(1), values),
    "values of other tokens": lambda keys, values: (keys, values.roll(1, 2)),
    "a second sequence damaged": lambda keys, values: (keys, torch.cat([values[:1], 0 * values[1:]])),
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_refuses_what_is_wrong(model, monkeypatch, fault):
    fill = bench.fill_cache

    def wrong(cache, states):
        is_ours = isinstance(cache, AquaCache)
        fill(cache, (FAULTS[fault](*each) if is_ours else each for each in states))

    monkeypatch.setattr(bench, "fill_cache", wrong)
    with pytest.raises(aqua.AquaError, match="a decoding step is wrong: the logits of aqua, k_ratio 1 are off"):
        bench.check_logits(model, random_llama.random_projections(model), (HALF,), 2)


def test_logits_that_are_not_numbers_are_refused():
    right = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    bench.check_near(right * 1.01, right, "it", 0.02)
    for wrong in (right * 1.03, right * torch.nan, torch.cat([right[:1], -right[1:]])):
        with pytest.raises(aqua.AquaError, match="the logits of it are off by"):
            bench.check_near(wrong, right, "it", 0.02)


@torch.no_grad()
def test_a_dense_kernel_takes_the_place_of_transformers_own_and_leaves_it(model, monkeypatch):
    def plain(query, keys, values):
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, enable_gqa=True
        )[:, :, 0]

    monkeypatch.setitem(bench.BASELINES, "plain", plain)
    steps = bench.Steps(model, 2, 40)
    expected = steps()
    for length, is_right in ((41, True), (30, False)):
        steps.restart()
        with bench._dense_kernel(model, "plain", length):
            assert torch.allclose(steps(), expected, atol=1e-4) == is_right
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_compiled_model_is_the_same_and_as_before_afterwards(model):
    ids = torch.arange(1, 20, device=DEVICE)[None]
    expected, runs = model(ids).logits, []

    def backend(graph, inputs):
        def run(*given):
            runs.append(graph)
            return graph(*given)

        return run

    with random_llama.compiled(model, backend=backend):
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        # Rotary embeddings; a norm before attention and one before the rest, and both, in two layers; a last norm.
        assert len(runs) == 10
    assert torch.equal(model(ids).logits, expected)
    assert len(runs) == 10


@torch.no_grad()
def test_what_cannot_be_compiled_is_named(model):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    ids = torch.tensor([[5]], device=DEVICE)
    expected = model(ids).logits
    named = pytest.warns(UserWarning, match=r"measured without torch.compile: .*LlamaMLP: RuntimeError: no compiler")
    with named, random_llama.compiled(model, backend=backend):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the next one measures")
def test_all_but_the_times_is_measured_without_a_gpu_too(model, monkeypatch):
    for name, result in (("need_gpu", None), ("seconds_of", 0.5), ("read_bandwidth", 1e6)):
        monkeypatch.setattr(bench, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    result = bench.measure_generate(model, batch=2, length=200, settings=(EXACT, INT8))
    rows = [row for row in result["rows"] if "absent" not in row]
    names = [row["name"] for row in rows]
    assert (names[0], names[-2:]) == ("transformers, sdpa", ["aqua", "aqua, int8"])
    assert {row["tokens_per_second"] for row in rows} == {4.0}
    cache = 2 * 2 * 2 * 200 * (16 + 8 + 4)
    assert rows[-1]["bytes"] == result["weight_bytes"] + cache
    assert rows[-1]["roofline_seconds"] == pytest.approx(rows[-1]["bytes"] / 1e6)
    assert len(generate_table(result)[1]) == len(result["rows"])
    assert model.config._attn_implementation == "sdpa"


def test_steps_that_fill_the_cache_are_not_reported(model, monkeypatch):
    steps = bench.Steps(model, 2, 10)
    monkeypatch.setattr(bench, "seconds_of", lambda run: [run() for _ in range(bench.ROOM)] and 1.0)
    with torch.no_grad(), pytest.raises(aqua.AquaError, match="take a larger model"):
        steps.seconds()


@pytest.mark.gpu
def test_a_small_model_is_measured():
    model = random_llama.make_model(num_hidden_layers=2)
    result = bench.measure_generate(model, batch=2, length=1000, settings=(EXACT, HALF, INT8))
    rows = [row for row in result["rows"] if "absent" not in row]
    assert [row["name"] for row in rows[-3:]] == ["aqua", "aqua", "aqua, int8"]
    assert max(row["ratio"] for row in rows if row["k_ratio"] is None) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is not")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "aqua bench generate measures decoding on a CUDA GPU: there is none"),
        (["--size", "8"], "size is '8': it must be sequences x tokens, such as 8x32768"),
        (["--dtype", "int8"], "dtype is 'int8': it must be bfloat16 or float16"),
        (["--k-ratio", "2"], "k_ratio is 2.0"),
    ],
)
def test_without_a_gpu_or_with_wrong_options_it_says_so(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["aqua", "bench", "generate", *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
