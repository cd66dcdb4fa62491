# SPDX-License-Identifier: Apache-2.0
"""What is compiled: parts of a model by us, for steps of one token, and a whole model or its layers by its user.

Norms, MLP blocks and rotary embeddings are found, give the same, and leave nothing behind.
"""

from __future__ import annotations

import gc
import logging
import shutil
import sys
import threading
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from test_matrix import FAMILIES
from torch import nn

import aqua_attention as aqua
from aqua_attention.attach.compiled import CompiledParts
from aqua_attention.model.capture import attention_layers
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from conftest import calibrated, make_gemma3, make_llama

LLAMA = {"LlamaRMSNorm": 7, "LlamaMLP": 3, "LlamaRotaryEmbedding": 1, "apply_rotary_pos_emb": 1}
KINDS = {
    "llama": LLAMA,
    "mistral": {"MistralRMSNorm": 7, "MistralMLP": 3, "MistralRotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    # Two norms a layer, one at the end, and one each for queries and keys.
    "qwen3": {"Qwen3RMSNorm": 13, "Qwen3MLP": 3, "Qwen3RotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    "qwen2 (biases)": {"Qwen2RMSNorm": 7, "Qwen2MLP": 3, "Qwen2RotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    "gemma2 (softcap)": {"Gemma2RMSNorm": 13, "Gemma2MLP": 3, "Gemma2RotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    "gemma3 (sliding and full, two bases)": {
        "Gemma3RMSNorm": 19,
        "Gemma3MLP": 3,
        "Gemma3RotaryEmbedding": 1,
        "apply_rotary_pos_emb": 1,
    },
    # Its norms are torch's, its MLP lies in the layer, its positions are learned.
    "opt (scaling 1, learned positions)": {},
    # Its experts are no MLP blocks.
    "olmoe (mixture of experts, MHA)": {"OlmoeRMSNorm": 13, "OlmoeRotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    "phi3": {"Phi3RMSNorm": 7, "Phi3MLP": 3, "Phi3RotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    "gpt_neox (partial rotary)": {"GPTNeoXMLP": 3, "GPTNeoXRotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
    "granite (scaling of its own)": {
        "GraniteRMSNorm": 7,
        "GraniteMLP": 3,
        "GraniteRotaryEmbedding": 1,
        "apply_rotary_pos_emb": 1,
    },
    "gpt_oss (s_aux)": {"GptOssRMSNorm": 7, "GptOssRotaryEmbedding": 1, "apply_rotary_pos_emb": 1},
}


class Backend:
    """A backend of `torch.compile` that runs graphs as they are, and counts."""

    def __init__(self, change=lambda outputs: outputs):
        self.graphs = self.runs = 0
        self.change = change

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*given):
            self.runs += 1
            return self.change(graph(*given))

        return run


def parts_of(model, **options):
    return CompiledParts(model, attention_layers(model), **{"backend": Backend()} | options)


@torch.no_grad()
def steps(model, parts=None, count=3):
    """Logits of a few tokens after a prompt, one by one; inside of `parts.used()` each, where parts are given."""
    cache, logits = model(torch.arange(2, 12)[None], use_cache=True).past_key_values, []
    for token in range(count):
        given = {"input_ids": torch.tensor([[7 + token]]), "past_key_values": cache}
        if parts is None:
            logits.append(model(**given).logits)
            continue
        with parts.used():
            logits.append(model(**given).logits)
    return torch.cat(logits, 1)


def state(model):
    """All that contexts could leave behind: attributes of modules, and the functions of their files."""
    files = {type(module).__module__ for module in model.modules()}
    modules = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
    return modules, [dict(vars(sys.modules[file])) for file in files if "modeling" in file]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_the_same_compiled_and_as_before_afterwards(name):
    model = FAMILIES[name]()
    expected, before = steps(model), state(model)
    parts = parts_of(model)
    assert parts.kinds == KINDS[name]
    assert torch.equal(steps(model, parts), expected)
    assert parts.left_out == {}
    assert parts.kinds == KINDS[name]
    assert state(model) == before
    assert torch.equal(steps(model), expected)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler on a CPU")
@pytest.mark.parametrize(
    ("make", "dtype"), [(make_llama, torch.bfloat16), (make_gemma3, torch.float32)], ids=["llama", "gemma3"]
)
def test_what_inductor_makes_is_the_same_but_for_rounding(make, dtype):
    model = make().to(dtype)
    rounded, parts = steps(model), parts_of(model, backend="inductor")
    found, exact = steps(model, parts), steps(model.double())
    # As near to the exact logits as the model's own code is: where that rounds, inductor rounds elsewhere.
    error, allowed = float((found - exact).abs().max()), float((rounded - exact).abs().max())
    assert 0 < error <= 2 * allowed
    assert parts.left_out == {}
    assert parts.seconds > 0


def test_a_kind_is_compiled_once_whatever_the_layers_models_and_contexts():
    model, backend = make_llama(num_hidden_layers=12), Backend()
    parts = parts_of(model, backend=backend)
    steps(model, parts)
    assert parts.kinds["LlamaRMSNorm"] == 25
    assert backend.graphs == 4
    steps(make_llama(), parts_of(make_llama(), backend=backend))
    steps(model, parts_of(model, backend=backend))
    assert backend.graphs == 4


def test_shapes_and_numbers_of_a_module_are_looked_at():
    """Norms of queries have another width, and one of the layers another epsilon."""
    model, backend = FAMILIES["qwen3"](), Backend()
    model.model.layers[1].input_layernorm.variance_epsilon = 10.0
    expected, parts = steps(model), parts_of(model, backend=backend)
    assert torch.equal(steps(model, parts), expected)
    # Norms: as wide as the model, with either epsilon; of queries; of keys. Rotary embeddings, their function, the MLP.
    assert backend.graphs == 4 + 3
    assert parts.left_out == {}


def test_more_shapes_than_dynamo_keeps_variants_are_no_failure():
    model, backend = make_llama(num_hidden_layers=1), Backend()
    parts = parts_of(model, backend=backend)
    with torch.no_grad():
        for batch in range(1, 11):
            ids = torch.full((batch, 1), 5)
            expected = model(ids).logits
            with parts.used():
                assert torch.equal(model(ids).logits, expected)
    assert parts.left_out == {}
    assert backend.graphs == 4 * 10


def lies(outputs):
    """Only where a graph has two outputs, as rotary embeddings do."""
    return outputs if len(outputs) == 1 else tuple(each * 1.01 for each in outputs)


def test_a_part_that_lies_is_left_out_and_its_lie_is_not_used():
    model = make_llama()
    expected, backend = steps(model), Backend(lies)
    parts = parts_of(model, backend=backend)
    assert torch.equal(steps(model, parts), expected)
    reason = "compiled, it gives something else"
    assert parts.left_out == {"LlamaRotaryEmbedding": reason, "apply_rotary_pos_emb": reason}
    assert parts.kinds == {"LlamaRMSNorm": 7, "LlamaMLP": 3}


@pytest.mark.parametrize("factor", [1 + 2**-8, 1.1])
def test_rounding_of_16_bits_is_no_lie(factor):
    model = make_llama().bfloat16()
    parts = parts_of(model, backend=Backend(lambda outputs: tuple(each * factor for each in outputs)))
    steps(model, parts, count=1)
    assert set(parts.left_out) == (set(LLAMA) if factor == 1.1 else set())


def test_without_a_compiler_all_is_as_before():
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nwas found")

    model = make_llama()
    expected, before = steps(model), state(model)
    parts = parts_of(model, backend=backend)
    assert torch.equal(steps(model, parts), expected)
    assert set(parts.left_out) == set(LLAMA)
    assert set(parts.left_out.values()) == {"RuntimeError: no compiler"}
    assert state(model) == before
    assert not parts.kinds


def test_a_failure_after_the_first_step_is_no_exception_either():
    model, backend = make_llama(), Backend()
    expected, parts = steps(model), parts_of(model, backend=backend)
    steps(model, parts)

    def fail(outputs):
        raise RuntimeError("lost")

    backend.change = fail
    assert torch.equal(steps(model, parts), expected)
    assert parts.left_out == dict.fromkeys(LLAMA, "RuntimeError: lost")


class Breaking(nn.SiLU):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_graph_break_leaves_its_kind_out(monkeypatch):
    monkeypatch.setattr(Breaking, "__module__", "transformers.activations")
    model = make_llama()
    model.model.layers[2].mlp.act_fn = Breaking().eval()
    expected, parts = steps(model), parts_of(model)
    assert torch.equal(steps(model, parts), expected)
    assert set(parts.left_out) == {"LlamaMLP"}


def replace_forward(mlp):
    mlp.forward = lambda x: type(mlp).forward(mlp, x)


SPOILED = {
    "it has hooks": lambda mlp: mlp.register_forward_hook(lambda *_: None),
    "it has hooks ": lambda mlp: mlp.up_proj.register_forward_pre_hook(lambda *_: None),
    "its forward was replaced": replace_forward,
    "its forward was replaced ": lambda mlp: add_hook_to_module(mlp.down_proj, ModelHook()),
    "it is in training mode": lambda mlp: mlp.train(),
    "it is compiled already": lambda mlp: mlp.compile(backend="eager"),
    "its weights are quantised or spread over devices": lambda mlp: mlp.up_proj.register_parameter(
        "codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    ),
    "it holds a Sequential": lambda mlp: mlp.add_module("adapter", nn.Sequential()),
}


@pytest.mark.parametrize("reason", SPOILED)
def test_modules_that_others_have_changed_are_left_alone(reason):
    model = make_llama()
    parts = parts_of(model)
    SPOILED[reason](model.model.layers[1].mlp)
    expected, before = steps(model), state(model)
    assert torch.equal(steps(model, parts), expected)
    assert parts.left_out == {"model.layers.1.mlp": reason.strip()}
    assert parts.kinds == LLAMA | {"LlamaMLP": 2}
    assert state(model) == before


def test_what_was_changed_back_is_compiled_again():
    model = make_llama()
    parts = parts_of(model.train())
    assert set(parts.left_out.values()) == {"it is in training mode"}
    steps(model.eval(), parts)
    assert parts.kinds == LLAMA
    assert parts.left_out == {}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_left_alone(kind):
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
    scaling |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    model = make_llama(rope_parameters=scaling)
    parts = parts_of(model)
    assert parts.left_out == {"model.rotary_emb": f"its frequencies depend on the length ({kind})"}


def test_only_gpus_where_the_caller_says_so():
    parts = parts_of(make_llama(), cuda_only=True)
    assert set(parts.left_out.values()) == {"it runs on cpu, not on CUDA alone"}
    assert not parts.kinds


class Mixture(nn.Module):
    def __init__(self, shared, expert):
        super().__init__()
        self.shared, self.experts = shared, nn.ModuleList([expert])

    def forward(self, x):
        return self.shared(x) + self.experts[0](x)


def test_experts_in_a_list_are_left_alone_and_a_shared_one_is_not():
    model, other = make_llama(), make_llama()
    layer = model.model.layers[0]
    layer.mlp = Mixture(layer.mlp, other.model.layers[0].mlp)
    names = {part.name for part in parts_of(model).parts if part.kind == "LlamaMLP"}
    assert names == {"model.layers.0.mlp.shared", "model.layers.1.mlp", "model.layers.2.mlp"}


def test_under_aqua_the_rest_is_compiled_and_attention_is_as_before(llama):
    model, projections = llama
    parts = parts_of(model)
    with aqua.apply(model, projections, aqua.AquaConfig(k_ratio=0.5, sink=2, recent=5)):
        expected = steps(model)
        assert torch.equal(steps(model, parts), expected)
    assert parts.kinds == LLAMA


def test_an_exception_leaves_nothing_behind():
    model = make_llama()
    before, parts = state(model), parts_of(model)
    with pytest.raises(ZeroDivisionError), parts.used():
        assert "forward" in vars(model.model.norm)
        raise ZeroDivisionError
    assert state(model) == before


def in_thread(function):
    """What `function` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_other_threads_run_what_they_ran():
    model, backend = make_llama(), Backend()
    expected, parts = steps(model), parts_of(model, backend=backend)
    with parts.used():
        assert torch.equal(in_thread(lambda: steps(model)), expected)
        assert backend.graphs == 0


def test_contexts_of_two_threads_may_close_in_any_order():
    model = make_llama()
    expected, before = steps(model), state(model)
    opened, first_closed = threading.Event(), threading.Event()

    def second():
        # Made while another thread has replaced what is looked up.
        parts = parts_of(model)
        with parts.used():
            opened.set()
            assert first_closed.wait(60)
        return parts

    found = []
    thread = threading.Thread(target=lambda: found.append(second()))
    first = parts_of(model)
    with first.used():
        thread.start()
        assert opened.wait(60)
    assert torch.equal(steps(model), expected)
    assert state(model) != before
    first_closed.set()
    thread.join()
    assert state(model) == before
    assert torch.equal(steps(model, found[0]), expected)
    assert found[0].kinds == first.kinds == LLAMA


def test_nothing_is_compiled_while_a_graph_is_recorded(monkeypatch):
    model, backend = make_llama(), Backend()
    expected, parts = steps(model), parts_of(model, backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert torch.equal(steps(model, parts), expected)
        assert (backend.graphs, parts.left_out) == (0, {})
    steps(model, parts)
    runs = backend.runs
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        steps(model, parts)
    assert backend.runs > runs


@pytest.mark.gpu
@torch.no_grad()
def test_a_recorded_step_runs_what_was_compiled_before():
    model = make_llama().to("cuda", torch.bfloat16)
    parts = parts_of(model, backend="inductor", cuda_only=True)
    ids, graph = torch.tensor([[5]], device="cuda"), torch.cuda.CUDAGraph()
    with parts.used():
        model(ids, use_cache=False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            logits = model(ids, use_cache=False).logits
    assert parts.left_out == {}
    ids.fill_(9)
    graph.replay()
    expected = model(ids, use_cache=False).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


def test_with_gradients_nothing_is_compiled():
    model, backend = make_llama(), Backend()
    parts = parts_of(model, backend=backend)
    with parts.used():
        model(torch.tensor([[5]])).logits.sum().backward()
    assert backend.graphs == 0
    assert model.model.norm.weight.grad is not None


def test_compiling_is_told_once_with_the_time_it_took(caplog):
    said, model, backend = [], make_llama(), Backend()
    parts = parts_of(model, backend=backend, report=said.append)
    steps(model, parts)
    assert [line.split(" ")[0] for line in said] == ["compiling", "compiled"]
    assert said[1] == f"compiled in {parts.seconds:.1f} s"
    assert parts.seconds > 0
    with caplog.at_level(logging.INFO, logger="aqua_attention"):
        steps(model, parts_of(model, backend=backend))
        steps(model, parts_of(model, backend=Backend(lies)))
    first, last = [record.getMessage() for record in caplog.records if record.name == "aqua_attention"]
    assert first == said[0]
    assert "apply_rotary_pos_emb is not compiled: compiled, it gives something else" in last


def test_compiled_code_keeps_no_model_alive():
    model = make_llama()
    parts, alive = parts_of(model), weakref.ref(model.model.norm)
    steps(model, parts)
    del model, parts
    gc.collect()
    assert alive() is None


WINDOW = {"k_ratio": 0.5, "sink": 2, "recent": 5}
INT8 = {"k_ratio": 0.5, "bits": 8}


def make_two_gemma3(**changes):
    return make_gemma3(layer_types=["sliding_attention", "full_attention"], **changes)


ORDERS = {
    "tiled, growing": (make_llama, WINDOW, ("tiled", "growing")),
    "growing, tiled": (make_llama, WINDOW, ("growing", "tiled")),
    "tiled, static": (make_llama, WINDOW, ("tiled", "plain")),
    "int8 twice": (make_llama, INT8, ("growing", "growing")),
    "rings, growing": (make_two_gemma3, WINDOW, ("tiled", "growing")),
}


@pytest.fixture
def fresh(monkeypatch):
    """Nothing was compiled before. Tiles are read by the kernel for CPUs where there is a compiler."""
    if not no_kernel_reason():
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_a_model_compiled_once_takes_one_kind_of_cache_after_another(order, fresh):
    """A tiled cache breaks the graph: what is compiled after the break is for one layer, and no other must run it."""
    make, setting, kinds = ORDERS[order]
    model = make(num_hidden_layers=2)

    def logits(step, cache):
        ids = torch.arange(2, 24)[None]
        return torch.cat(
            [step(part, past_key_values=cache).logits for part in (ids[:, :20], *ids[:, 20:].split(1, 1))], 1
        )

    with aqua.apply(model, calibrated(model), aqua.AquaConfig(**setting)) as attachment:
        step = torch.compile(model, backend="eager")
        for kind in kinds:
            given = {} if kind == "growing" else {"max_length": 40, "layout": kind}
            expected = logits(model, attachment.new_cache(**given))
            assert torch.allclose(logits(step, attachment.new_cache(**given)), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_layers_that_are_compiled_one_by_one_keep_their_own_projections(fresh):
    model = make_llama()
    ids = torch.arange(2, 24)[None]
    with aqua.apply(model, calibrated(model), aqua.AquaConfig(**WINDOW)):
        expected = model(ids, use_cache=False).logits
        for layer in model.model.layers:
            layer.compile(backend="eager")
        assert torch.allclose(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
