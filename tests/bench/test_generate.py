# SPDX-License-Identifier: Apache-2.0
"""`aqua bench generate`, but for its figures: what is counted and compared, its command, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import DynamicCache, OPTConfig, OPTForCausalLM, StaticCache

import aqua_attention as aqua_package
from aqua_attention.bench import clocked, random_llama
from aqua_attention.bench import generate as bench
from aqua_attention.bench.generate_gate import is_exact
from aqua_attention.evaluate.suites import SUITES
from aqua_attention.model.capture import attention_layers
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from aqua_attention.report.recognise import records_of
from aqua_attention.report.tables import generate_table
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama, make_mistral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXACT = aqua_package.AquaConfig(k_ratio=1, selection="weighted", share="group", sink=4, recent=64)

HALF = aqua_package.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64)
SELECT = aqua_package.AquaConfig(k_ratio=0.25, sink=4, recent=16, select_tokens=10, score_bits=8)
INT8 = aqua_package.AquaConfig(k_ratio=0.5, selection="weighted", share="group", sink=4, recent=64, bits=8)


@pytest.fixture(scope="module")
def model():
    """A tiny Llama from the function that makes the large one, in float32."""
    return random_llama.make_model(**SHAPE, vocab_size=VOCABULARY, dtype=torch.float32, device=DEVICE)


@pytest.fixture(scope="module")
def projections_file(tmp_path_factory):
    """Projections of `tiny_folder`."""
    path = tmp_path_factory.mktemp("projections") / "tiny.safetensors"
    calibrated(make_llama()).save(path)
    return path


def test_the_model_is_the_same_each_time_and_leaves_the_random_state(model):
    before = torch.get_rng_state()
    twin = random_llama.make_model(**SHAPE | {"num_hidden_layers": 1}, device=DEVICE)
    assert twin.dtype == torch.bfloat16
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(aqua_package.AquaError, match="query heads in equal groups"):
        random_llama.make_model(num_attention_heads=4, num_key_value_heads=3, device=DEVICE)


def test_bytes_are_those_of_the_weights_but_the_embeddings_and_of_the_chosen_dimensions(model):
    attention, mlp, norms = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96, 2 * 64
    weights = bench.weight_bytes(model)
    assert weights == 4 * (2 * (attention + mlp + norms) + 64 + 64 * VOCABULARY)
    layers = attention_layers(model)
    # Two layers, three sequences, two heads, 100 tokens.
    tokens = 2 * 3 * 2 * 100
    for config, each in ((None, 32 * 4), (EXACT, 32 * 4), (HALF, 24 * 4), (INT8, 24 + 4)):
        read = bench.step_bytes(model, layers, batch=3, length=100, config=config)
        assert read - weights == tokens * each


@pytest.mark.parametrize(("bits", "whole"), [(None, 32 * 4), (8, 32 + 4)])
def test_where_tokens_are_chosen_all_are_scored_and_some_are_read(model, bits, whole):
    sizes = {"batch": 3, "length": 100, "config": dataclasses.replace(SELECT, bits=bits)}
    tokens, weights = 2 * 3 * 2 * 100, bench.weight_bytes(model)
    for share in (0.25, 1.0):
        read = bench.step_bytes(model, attention_layers(model), **sizes, tokens_read=share)
        assert read - weights == tokens * (4 + 2 + share * whole)
    assert not is_exact(dataclasses.replace(SELECT, k_ratio=1.0))


def test_tied_embeddings_are_read_and_of_a_sliding_window_only_its_tokens():
    tied, apart = make_llama(tie_word_embeddings=True), make_llama()
    assert bench.weight_bytes(tied) == bench.weight_bytes(apart)
    mistral = make_mistral()
    sizes = {"batch": 1, "length": 100, "config": INT8}
    read = bench.step_bytes(mistral, attention_layers(mistral), **sizes) - bench.weight_bytes(mistral)
    assert read == 3 * 2 * 12 * (16 + 16) * 4, "a sliding window is read whole"


def measured_rows():
    """Rows as they are measured, before they are compared."""
    rows = [("transformers, default", None, 0.060, 0.30), ("dense, recorded (SDPA cuDNN)", None, 0.020, 0.28)]
    rows += [("AQUA", 0.5, 0.016, 0.35)]
    figures = {"bits": None, "bytes": 32e9, "peak_bytes": 2**34, "step_seconds": None, "added_seconds": None}
    made = [
        figures | {"name": name, "k_ratio": ratio, "seconds": seconds, "first_seconds": first, "recorded": None}
        for name, ratio, seconds, first in rows
    ]
    made[-1] |= {"recorded": True, "added_seconds": 0.0004, "step_seconds": 0.0156}
    return [*made, {"name": "transformers, static, compiled", "k_ratio": None, "absent": "failed: no memory"}]


def test_rows_are_compared_with_the_recorded_dense_one_the_default_and_the_bandwidth():
    rows = measured_rows()
    assert bench.compare(rows, 8, 4e12) == "dense, recorded (SDPA cuDNN)"
    assert [row.get("ratio") for row in rows] == pytest.approx([1 / 3, 1.0, 1.25, None])
    assert [row.get("default_ratio") for row in rows] == pytest.approx([1.0, 3.0, 3.75, None])
    assert [row.get("first_ratio") for row in rows] == pytest.approx([0.30 / 0.28, 1.0, 1.25, None])
    given = {"device": "GPU", "batch": 8, "length": 32768, "layers": 32, "hidden": 4096, "dtype": "torch.bfloat16"}
    titles, cells = generate_table(given | {"new_tokens": 72, "compiled": True, "rows": rows})
    assert titles[0] == "GPU, 8 x 32768 tokens, 32 layers of 4096, torch.bfloat16, compiled"
    assert cells[2] == ["AQUA, k_ratio 0.5", "350", "1.25", "16.00", "1.25", "3.75", "16.0", "yes", "0.40", "50.0%"]
    assert cells[3] == ["transformers, static, compiled", "absent: failed: no memory", *[""] * 8]
    # Without a recorded dense row the fastest dense one is the baseline, and what no row has is no column.
    rows = [row for row in measured_rows() if not row["name"].startswith("dense")]
    assert bench.compare(rows, 8, None) == "transformers, default"
    assert [row.get("ratio") for row in rows] == pytest.approx([1.0, 3.75, None])
    assert "of the roofline" not in generate_table(given | {"new_tokens": 72, "rows": rows})[0]
    alone = measured_rows()[2:3]
    assert bench.compare(alone, 8, None) is None
    assert alone[0]["ratio"] is alone[0]["default_ratio"] is alone[0]["first_ratio"] is None


def test_a_file_of_an_earlier_version_keeps_its_columns():
    row = {"name": "aqua", "k_ratio": 0.5, "seconds": 0.02, "tokens_per_second": 50.0, "ratio": 1.5}
    result = {"batch": 1, "length": 4096, "rows": [row | {"roofline_seconds": 0.01, "share": 0.5}]}
    titles, cells = generate_table(result)
    assert titles[1:] == ["tokens/s", "ms a token", "to the best dense", "roofline: ms", "of the roofline"]
    assert cells == [["aqua, k_ratio 0.5", "50.0", "20.00", "1.50", "10.00", "50.0%"]]


@torch.no_grad()
def test_a_filled_cache_goes_on_as_after_a_prompt():
    model = make_llama()
    projections, model = calibrated(model), model.to(DEVICE)
    ids = torch.randint(1, VOCABULARY, (2, 103), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    prompt = DynamicCache(config=model.config)
    model(ids[:, :100], past_key_values=prompt)
    states = [(layer.keys.clone(), layer.values.clone()) for layer in prompt.layers]

    def logits(cache):
        return torch.cat([model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(100, 103)], 1)

    dense = logits(prompt)
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=110)
    for cache in (dynamic, static, static):
        cache.reset()
        clocked.fill_cache(cache, states)
        assert torch.allclose(logits(cache), dense, atol=2e-4)
    # The dense prompt's states are AQUA's at k_ratio 1.
    with aqua_package.apply(model, projections, EXACT) as attachment:
        filled = attachment.new_cache(max_length=110, layout="tiled")
        clocked.fill_cache(filled, states)
        assert int(filled.get_seq_length()) == 100
        found = logits(filled)
        assert torch.allclose(found, dense, atol=2e-4)
        filled.reset()
        clocked.fill_cache(filled, states)
        assert torch.equal(logits(filled), found)


def test_a_clock_counts_every_token_and_changes_none(model):
    task = clocked.Task(model, torch.arange(1, 41, device=DEVICE)[None], new_tokens=16)
    assert (task.batch, task.length, task.room) == (1, 40, 56)
    given, seen = {"pad_token_id": 0}, []
    with clocked.plain_generation(model):
        times = clocked.clocked(task, lambda: seen.append(1) or dict(given), 16)
        assert model.generation_config.eos_token_id is None
    assert seen == [1]
    assert len(times.tokens) == 15
    assert 0 < times.first < times.total
    assert sum(times.tokens) <= times.total - times.first
    assert model.generation_config.eos_token_id is not None


def test_a_small_model_is_measured_on_a_cpu_by_the_command(aqua, tmp_path, monkeypatch):
    monkeypatch.setattr(random_llama, "LLAMA_SMALL", random_llama.LLAMA_8B | SHAPE | {"vocab_size": VOCABULARY})
    file = tmp_path / "generate.json"
    arguments = ("--device", "cpu", "--size", "2x40", "--length", 24, "--new-tokens", 16, "--int8", "--json", file)
    choices = ("--select-p", 0.5, "--select-tokens", 3, "--sink", 1, "--recent", 2)
    code, out, err = aqua("bench", "generate", *arguments, *choices)
    assert code == 0, err
    assert "AQUA, k_ratio 0.5" in out
    value = json.loads(file.read_text())
    assert value["model"] == "random weights, 2 layers"
    assert value["prompts"] == "random tokens"
    assert [(each["batch"], each["length"]) for each in value["results"]] == [(2, 40), (1, 24)]
    for result in value["results"]:
        names = [(row["name"], row["k_ratio"], row["bits"]) for row in result["rows"]]
        assert names[0] == ("transformers, default", None, None)
        assert names[1:4] == [("AQUA", 0.9, None), ("AQUA", 0.5, None), ("AQUA, int8", 0.5, 8)]
        assert names[4:6] == [("AQUA, select_p=0.5", 0.5, None), ("AQUA, select_tokens=3", 0.5, None)]
        assert names[6:] == [("AQUA, int8, select_p=0.5", 0.5, 8), ("AQUA, int8, select_tokens=3", 0.5, 8)]
        assert result["baseline"] == "transformers, default"
        assert not result["compiled"]
        assert not result["is_filled"]
        for row in result["rows"]:
            assert row["ratio"] == pytest.approx(result["rows"][0]["seconds"] / row["seconds"])
            assert row["tokens_per_second"] == pytest.approx(result["batch"] / row["seconds"])
            assert row["first_seconds"] > 0
            assert row["step_seconds"] is row["share"] is None
        ours = result["rows"][1:]
        assert {row["recorded"] for row in ours} == {False}
        assert all(row["reason"] for row in ours)
        assert {row["layout"] for row in ours} <= {"tiled", "plain", "growing"}
        assert all(0 < row["tokens_read"] < 1 and row["setting"]["score_bits"] == 8 for row in ours[3:])
        assert not any("tokens_read" in row for row in ours[:3])
    found = records_of(value, "generate.json")
    assert [record.suite for record in found] == ["generate", "generate"]
    assert SUITES["generate"].command == "aqua bench generate"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a growing cache on a CPU")
@pytest.mark.parametrize(("make", "chooses"), [(make_gemma3, True), (make_mistral, False)])
def test_rows_that_choose_tokens_are_of_the_layers_that_do(make, chooses):
    """Layers with a sliding window read all of it, and stand first; in one model they are all."""
    if reason := no_kernel_reason():
        pytest.skip(reason)
    model = make()
    benchmark = bench.GenerateBenchmark(model, calibrated(model), (SELECT,), new_tokens=16, is_random=False)
    _, row = benchmark.measure(1, 40)["rows"]
    found = (row["backend"], row.get("tokens_read", 1) < 1)
    assert found == ("cpu" if chooses else None, chooses)
    assert ("tokens_read" in row) == chooses


def test_a_model_of_the_user_is_measured_with_his_text(aqua, tmp_path, tiny_folder, projections_file, words):
    text, file = tmp_path / "text.txt", tmp_path / "generate.json"
    text.write_text(words)
    arguments = ("--length", 40, "--new-tokens", 16, "--k-ratio", 0.5, "--no-int8", "--device", "cpu")
    code, _, err = aqua(
        *("bench", "generate", tiny_folder, "-p", projections_file, *arguments, "--data", text, "--json", file)
    )
    assert code == 0, err
    value = json.loads(file.read_text())
    assert (value["model"], value["prompts"]) == (str(tiny_folder), str(text))
    assert [row["name"] for row in value["results"][0]["rows"]] == ["transformers, default", "AQUA"]
    code, _, err = aqua(
        "bench", "generate", tiny_folder, "-p", projections_file, *arguments, "--data", text, "--size", "90x40"
    )
    assert code == 2
    assert "too few for 90 prompts of 40" in err.replace("\n", " ")


REFUSED = {
    "is there no GPU": (["--device", "cuda"], "device is 'cuda', and there is no CUDA GPU here: choose cpu"),
    "another device": (["--device", "abacus"], "device is 'abacus': it must be cpu, cuda or cuda:NUMBER"),
    "a size": (["--size", "8"], "size is '8': it must be sequences x tokens, such as 8x32768"),
    "a short prompt": (["--length", "4", "--layers", "1"], "size is 1x4: a prompt must have 16 tokens or more"),
    "few tokens": (["--new-tokens", "9", "--layers", "1"], "new_tokens is 9: it must be 16 or more"),
    "a dtype": (["--dtype", "int8"], "dtype is 'int8': it must be auto, float32, bfloat16, float16"),
    "a ratio": (["--k-ratio", "2", "--layers", "1"], "k_ratio is 2.0"),
    "bits of scores": (["--select-p", "0.5", "--score-bits", "5", "--layers", "1"], "score_bits is 5"),
    "layers": (["--layers", "0"], "give one layer or more"),
    "projections of no model": (["-p", "p"], "--projections and --data are for a MODEL"),
    "a model alone": (["MODEL"], "needs its projections: make them by `aqua calibrate`, and give -p FILE"),
    "layers of a model": (["MODEL", "-p", "p", "--layers", "2"], "--layers is for the random model"),
    "too long a text": (
        ["MODEL", "-p", "FILE", "--length", "250", "--data", "builtin:evaluation"],
        "the model knows 256 positions",
    ),
    "always too long": (["MODEL", "-p", "FILE"], "the model knows 256 positions: choose fewer tokens"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is not")
@pytest.mark.parametrize("refused", REFUSED)
def test_what_cannot_be_measured_is_refused(aqua, refused, tiny_folder, projections_file):
    arguments, words = REFUSED[refused]
    given = {"MODEL": tiny_folder, "FILE": projections_file}
    code, _, err = aqua("bench", "generate", *(given.get(each, each) for each in arguments))
    assert code == 2
    assert words in err.replace("\n", " ")


def test_random_prompts_may_be_longer_than_rotary_positions():
    model = make_llama()
    benchmark = bench.GenerateBenchmark(model, calibrated(model), (HALF,), new_tokens=16, is_random=False)
    with pytest.warns(UserWarning, match="knows 256 positions: beyond them only times mean something"):
        assert benchmark._task(1, 250).length == 250
    learned = OPTForCausalLM(OPTConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64))
    benchmark.model = learned
    with pytest.raises(aqua_package.AquaError, match="knows 64 positions"):
        benchmark._task(1, 60)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(2, 1000), (8, 9000)])
def test_a_small_model_is_measured_on_a_gpu(size):
    pytest.importorskip("triton")
    model = random_llama.make_model(num_hidden_layers=2, vocab_size=1024)
    settings = (EXACT, HALF, INT8)
    projections = random_llama.random_projections(model)
    result = bench.GenerateBenchmark(model, projections, settings, is_random=True).measure(*size)
    assert result["is_filled"] == (size[0] == 8)
    rows = [row for row in result["rows"] if "absent" not in row]
    assert [row["name"] for row in rows[-3:]] == ["AQUA", "AQUA", "AQUA, int8"]
    assert result["baseline"].startswith("dense, recorded (")
    for row in rows[-4:]:
        assert row["recorded"], row["reason"]
        assert row["step_seconds"] > 0
        assert row["added_seconds"] == pytest.approx(row["seconds"] - row["step_seconds"])
    assert not hasattr(model, "_compiled_call")
