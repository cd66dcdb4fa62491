# SPDX-License-Identifier: Apache-2.0
"""What the vLLM backend makes of a batch, without an engine: who decodes, and that all get their own answers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.entrypoints")

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, UniformTypeKVCacheSpecs

import aqua_attention as aqua
from aqua_attention.errors import AquaError
from aqua_attention.ops.reference import attention_reference
from aqua_attention.vllm import attention as module
from aqua_attention.vllm.attention import AquaAttention, own_heads
from aqua_attention.vllm.backend import AquaBackend, AquaMetadataBuilder
from aqua_attention.vllm.page import bytes_of
from aqua_attention.vllm.settings import Serving
from aqua_attention.vllm.versions import INT8, LAYOUTS
from conftest import calibrated, make_llama

INT8_MODE = KVQuantMode.INT8_PER_TOKEN_HEAD
BLOCK, BLOCKS, HEADS, KV_HEADS, DIM = 16, 40, 4, 2, 16
LENGTHS, QUERIES = [37, 20, 33, 64, 5], [1, 1, 1, 30, 5]
"""Three sequences that decode, one of them a prompt's last token; a part of a prompt; a whole one."""


@pytest.fixture(scope="module")
def projections():
    return calibrated(make_llama())


@pytest.fixture
def served(projections, monkeypatch):
    """`served(**config)`: the attention of layer 1 of a server with this setting."""

    def make(window=None, kv_cache_dtype="auto", **config):
        setting = Serving.__new__(Serving)
        for name, value in {"projections": projections, "config": aqua.AquaConfig(**config)}.items():
            object.__setattr__(setting, name, value)
        for place in ("aqua_attention.vllm.attention", "aqua_attention.vllm.backend", "aqua_attention.vllm.page"):
            monkeypatch.setattr(f"{place}.serving", lambda: setting)
        monkeypatch.setattr(module, "own_heads", lambda count, here: slice(0, here))
        # What vLLM is configured to do is asked in test_checks.
        monkeypatch.setattr(module, "get_current_vllm_config", engine_config)
        monkeypatch.setattr(module, "check_engine", lambda config: None)
        return AquaAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, None, window, kv_cache_dtype)

    return make


def spec_of(dtype=torch.float32, **options):
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=DIM, dtype=dtype, **options)


def metadata(queries, lengths, table, slots, padded=0):
    """Of vLLM; `padded` sequences of nothing behind the others, as in a recorded batch."""
    starts = torch.tensor([0, *queries, *[1] * padded]).cumsum(0).int()
    lengths = torch.tensor([*lengths, *[0] * padded]).int()
    table = torch.cat([table, torch.zeros(padded, table.shape[1], dtype=torch.int32)])
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(queries),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.cat([slots, torch.full((padded,), -1)]),
    )


def engine_config():
    return SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=128),
    )


def builder():
    return AquaMetadataBuilder(spec_of(), ["model.layers.1.self_attn.attn"], engine_config(), torch.device("cpu"))


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(
    "config",
    [
        {"k_ratio": 0.5, "sink": 2, "recent": 6, "min_length": 30},
        {"k_ratio": 1.0},
        {"k_ratio": 0.5, "select_p": 0.7, "sink": 2, "recent": 6, "score_bits": 8},
        {"k_ratio": 1.0, "select_tokens": 4, "sink": 0, "recent": 3, "min_length": 30, "score_bits": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [0, 3])
def test_a_mixed_batch_gives_everybody_his_own_answer(served, window, config, padded):
    impl = served(window=window, **config)
    layer = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).int()
    table = order[: len(LENGTHS) * 5].view(len(LENGTHS), 5)
    pages = torch.full((BLOCKS, KV_HEADS, BLOCK, bytes_of(spec_of()) // 4), torch.nan)
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(length, HEADS + 2 * KV_HEADS, DIM, generator=generator) for length in LENGTHS]

    def slots_of(row, tokens):
        return table[row, tokens // BLOCK].long() * BLOCK + tokens % BLOCK

    def step(rows, queries, lengths, padded=0):
        """Let the engine do the last `queries` tokens of these rows."""
        tokens = [torch.arange(length - count, length) for count, length in zip(queries, lengths, strict=True)]
        given = torch.cat([states[row][token] for row, token in zip(rows, tokens, strict=True)])
        given = torch.cat([given, torch.randn(padded + 2, *given.shape[1:], generator=generator)])
        slots = torch.cat([slots_of(row, token) for row, token in zip(rows, tokens, strict=True)])
        built = builder().build(0, metadata(queries, lengths, table[rows], slots, padded))
        output = torch.full((len(given), HEADS, DIM), torch.nan)
        impl.forward(layer, *given.split([HEADS, KV_HEADS, KV_HEADS], 1), pages, built, output)
        return built, output.split([*queries, padded + 2])[:-1]

    before = [length - count for count, length in zip(QUERIES, LENGTHS, strict=True)]
    first = [row for row, length in enumerate(before) if length > 0]
    step(first, [before[row] for row in first], [before[row] for row in first])
    rows = list(range(len(LENGTHS)))
    built, found = step(rows, QUERIES, LENGTHS)
    assert (built.decodes, built.lengths) == (3, [64, 5])
    if padded:
        rows = rows[:3]
        built, found = step(rows, QUERIES[:3], LENGTHS[:3], padded)
        assert (built.decodes, built.lengths) == (3 + padded, [])
    plan = impl._layers[layer.layer_name][0].plan
    assert (plan is None) == (window is not None or (config["k_ratio"] == 1 and len(config) == 1))
    for row in rows:
        query, key, value = states[row].transpose(0, 1)[None].split([HEADS, KV_HEADS, KV_HEADS], 1)
        own = query[:, :, -QUERIES[row] :]
        behind = torch.arange(LENGTHS[row])[-QUERIES[row] :, None] - torch.arange(LENGTHS[row])
        mask = ((behind >= 0) & (behind < (window or 1000)))[None, None]
        if plan is None:
            expected = attention_reference(own, key, value, None, mask=mask)
        else:
            call = plan.call(own, aqua.ops.api.rotate(key, plan.rotation), value)
            expected = aqua.ops.api.attend(call, plan, "reference").output
        assert torch.allclose(found[row], expected[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("choice", [{}, {"select_p": 0.7, "score_bits": 8}], ids=str)
def test_a_token_sees_pages_that_a_prompt_of_the_same_batch_fills(served, choice):
    """vLLM finds a prefix that is still to be computed: both are then in one batch."""
    impl = served(k_ratio=0.5, sink=2, recent=6, **choice)
    layer = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")
    pages = torch.full((BLOCKS, KV_HEADS, BLOCK, bytes_of(spec_of()) // 4), torch.nan)
    states = torch.randn(33, HEADS + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(1))
    # The last token of one sequence, then the prompt of another, which begins alike.
    table = torch.tensor([[4, 7, 1], [4, 7, 2]], dtype=torch.int32)
    slots = torch.cat([torch.tensor([BLOCK]), 4 * BLOCK + torch.arange(BLOCK), 7 * BLOCK + torch.arange(BLOCK)])
    given = torch.cat([states[32:], states[:32]])
    built = builder().build(0, metadata([1, 32], [33, 32], table, slots))
    assert built.decodes == 1
    output = torch.full((33, HEADS, DIM), torch.nan)
    impl.forward(layer, *given.split([HEADS, KV_HEADS, KV_HEADS], 1), pages, built, output)
    plan = impl._layers[layer.layer_name][0].plan
    query, key, value = states.transpose(0, 1)[None].split([HEADS, KV_HEADS, KV_HEADS], 1)
    call = plan.call(query, aqua.ops.api.rotate(key, plan.rotation), value)
    expected = aqua.ops.api.attend(call, plan, "reference").output[0].transpose(0, 1)
    assert torch.allclose(output[0], expected[32], atol=1e-5)
    assert torch.allclose(output[1:], expected[:32], atol=1e-5)


@pytest.mark.skipif(LAYOUTS is None, reason="pages of this vLLM hold whole keys")
def test_pages_hold_what_is_kept_and_in_8_bits_its_scales(served):
    served(k_ratio=0.5, s_ratio=0.25, sink=0, recent=0)
    assert AquaBackend.customize_spec(spec_of()).state_content_bytes == (12 + 16) * 4
    served(k_ratio=0.5, bits=8, kv_cache_dtype=INT8)
    assert AquaBackend.customize_spec(spec_of(torch.int8, kv_quant_mode=INT8_MODE)).state_content_bytes == 16 + 16 + 4
    served(k_ratio=0.5)
    assert AquaBackend.customize_spec(spec_of()) == spec_of()
    # A byte a dimension more, and a scale, in whole elements.
    served(k_ratio=0.5, select_p=0.9, score_bits=8)
    assert AquaBackend.customize_spec(spec_of(torch.bfloat16)).state_content_bytes == (16 + 16) * 2 + 16 + 2
    assert AquaBackend.customize_spec(spec_of()).state_content_bytes == (16 + 16) * 4 + 16 + 4


@pytest.mark.skipif(LAYOUTS is not None, reason="this vLLM does not ask for shapes")
@pytest.mark.parametrize("given", [("auto", torch.bfloat16, KVQuantMode.NONE), (INT8, torch.int8, INT8_MODE)])
def test_pages_by_shape_are_as_large_as_vllm_takes_them_to_be(given):
    name, dtype, mode = given
    spec = spec_of(dtype, kv_quant_mode=mode)
    shape = AquaBackend.get_kv_cache_shape(3, BLOCK, KV_HEADS, DIM, cache_dtype_str=name)
    assert 3 * spec.page_size_bytes == torch.empty(shape, dtype=dtype).nbytes
    assert [shape[place] for place in AquaBackend.get_kv_cache_stride_order()] == list(shape)
    assert AquaBackend.get_kv_cache_block_dim(BLOCK, KV_HEADS, DIM) == 0
    assert not AquaBackend.indexes_kv_by_block_stride()


def test_in_8_bits_every_layer_needs_projections(served):
    impl = served(window=12, kv_cache_dtype=INT8, k_ratio=0.5, bits=8)
    with pytest.raises(AquaError, match="bits is for the pages of all layers, and layer 1 has a sliding window"):
        impl._made(1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("count", "here", "size", "expected"),
    [
        (8, 8, 1, [(0, 8)]),
        (8, 4, 2, [(0, 4), (4, 8)]),
        (2, 1, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        # Projections of a model with more heads, or fewer.
        (16, 8, 1, [None]),
        (8, 8, 2, [None, None]),
        (3, 1, 4, [None] * 4),
    ],
)
def test_a_process_has_the_heads_that_tensor_parallelism_gives_it(count, here, size, expected, monkeypatch):
    monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    for rank, own in enumerate(expected):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert own_heads(count, here) == (None if own is None else slice(*own))


def test_projections_of_a_model_with_other_heads_are_refused(served, monkeypatch):
    impl = served(k_ratio=0.5)
    monkeypatch.setattr(module, "own_heads", own_heads)
    monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    assert impl._made(1, torch.device("cpu")).num_key_value_heads == KV_HEADS
    impl.num_kv_heads = 1
    with pytest.raises(AquaError, match=r"AQUA_PROJECTIONS: made for .*, but layer 1 has 1 key-value heads of 16"):
        impl._made(1, torch.device("cpu"))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("reason", [None, "no kernels"])
def test_graphs_are_recorded_where_kernels_decode_every_layer(on_cpu, reason, monkeypatch):
    platform = SimpleNamespace(is_cpu=lambda: on_cpu, device_type="cpu")
    monkeypatch.setattr("aqua_attention.vllm.backend.current_platform", platform)
    asked = []
    monkeypatch.setattr("aqua_attention.vllm.backend.why_no_kernels", lambda *given: asked.append(given[1]) or reason)
    model = SimpleNamespace(dtype=torch.float32, get_num_attention_heads=lambda parallel: HEADS)
    config = SimpleNamespace(model_config=model, parallel_config=None)
    other = replace(spec_of(), num_kv_heads=4)
    several = UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs={"one": spec_of(), "other": other})
    for spec in (spec_of(), several):
        found = AquaMetadataBuilder.get_cudagraph_support(config, spec)
        assert (found is AttentionCGSupport.NEVER) == (on_cpu or reason is not None)
    if not on_cpu:
        assert asked == ([2, 2, 1] if reason is None else [2, 2])
