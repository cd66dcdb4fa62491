# SPDX-License-Identifier: Apache-2.0
"""A static cache in the layout of the decoding kernel, under a model: in triton's interpreter here."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aqua_attention as aqua
from aqua_attention.config import PRESETS
from aqua_attention.ops.backends.cpu.build import no_kernel_reason
from conftest import VOCABULARY, calibrated, make_gemma3, make_llama

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {
    "dense": {"k_ratio": 1.0},
    "weighted": {"k_ratio": 0.5, "selection": "weighted", "sink": 2, "recent": 5},
    "sliced": {"k_ratio": 0.5, "s_ratio": 0.25},
    "adaptive": {"logit_error": 0.2, "sink": 2, "recent": 5},
    "static": {"k_ratio": 0.5, "selection": "static"},
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["triton", "cpu"])
def kernel(request, monkeypatch, tmp_path_factory):
    """Which kernels run: triton's, in its interpreter where there is no GPU, or the one in C."""
    if request.param == "cpu":
        if DEVICE == "cuda" or no_kernel_reason():
            pytest.skip(no_kernel_reason() or "the model is on a GPU")
        monkeypatch.delenv("TRITON_INTERPRET")
    return request.param


@pytest.fixture(scope="module")
def model():
    """(model, projections) of a tiny Llama where the kernels run."""
    model = make_llama()
    projections = calibrated(model)
    return model.to(DEVICE), projections


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(DEVICE)


@pytest.mark.parametrize("name", SETTINGS)
def test_decoded_logits_and_choices_are_those_of_the_growing_cache(model, name, kernel):
    model, projections = model
    ids = tokens(2, 134)
    config = aqua.AquaConfig.paper(share="group", **SETTINGS[name])
    results = []
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        for cache in (attachment.new_cache(), attachment.new_cache(max_length=160, layout="tiled")):
            seen, logits = [], [model(ids[:, :130], past_key_values=cache).logits]
            attachment.on_selection = lambda index, selected, *_, seen=seen: seen.append(selected)
            for place in range(130, 134):
                logits.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
            assert int(cache.get_seq_length()) == 134
            results.append((torch.cat(logits, 1), seen))
            attachment.on_selection = None
    (expected, plain), (found, tiled) = results
    assert torch.allclose(found, expected, atol=2e-4)
    for mine, theirs in zip(tiled, plain, strict=True):
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


@pytest.mark.parametrize("options", [{"k_ratio": 1.0}, {"k_ratio": 0.5, "selection": "weighted", "recent": 5}])
def test_a_tiled_cache_in_int8_loses_little_more_than_a_growing_one(model, options):
    """It rounds evenly around zero, and values at once: about twice the error on this small random model."""
    model, projections = model
    ids, logits = tokens(2, 132, seed=3), {}
    for name, bits, fixed in (("exact", None, True), ("tiled", 8, True), ("growing", 8, False)):
        config = aqua.AquaConfig.paper(share="group", bits=bits, **options)
        with aqua.apply(model, projections, config) as attachment, torch.no_grad():
            cache = attachment.new_cache(**({"max_length": 140, "layout": "tiled"} if fixed else {}))
            model(ids[:, :126], past_key_values=cache)
            steps = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(126, 132)]
            logits[name] = torch.cat(steps, 1)
            if fixed:
                assert cache.layers[0].cache.tiles.dtype == (torch.float32 if bits is None else torch.uint8)
    tiled, growing = ((logits[name] - logits["exact"]).norm() for name in ("tiled", "growing"))
    assert 0 < tiled < 3 * growing


class Asked(TorchDispatchMode):
    """Counts how often the host asks for a number that a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("bits", [None, 8])
def test_a_prompt_without_a_mask_waits_for_nothing(model, bits):
    model, projections = model
    ids = tokens(2, 40, seed=7)
    config = aqua.AquaConfig(share="group", bits=bits, **SETTINGS["weighted"])
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        cache = attachment.new_cache(max_length=50, layout="tiled")
        with Asked() as asked:
            model(ids, past_key_values=cache)
        assert asked.count == 0
        with asked:
            assert int(cache.get_seq_length()) == 40
        assert asked.count == 1


def test_int8_in_a_cache_of_fixed_size_needs_the_tiled_layout(model, monkeypatch):
    model, projections = model
    with aqua.apply(model, projections, aqua.AquaConfig.paper(bits=8, share="group")) as attachment:
        with pytest.raises(aqua.AquaError, match="in the tiled layout bits=8 is possible"):
            attachment.new_cache(max_length=100, layout="plain")
        if DEVICE == "cpu":
            monkeypatch.delenv("TRITON_INTERPRET")
            with pytest.raises(aqua.AquaError, match="a static cache cannot store bits=8"):
                attachment.new_cache(max_length=100, layout="tiled")
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(bits=4, share="group")) as attachment,
        pytest.raises(aqua.AquaError, match="a static cache cannot store bits=4"),
    ):
        attachment.new_cache(max_length=100, layout="tiled")


def test_the_decoding_kernels_take_every_preset_but_the_papers(model):
    model, projections = model
    for name in PRESETS:
        with aqua.apply(model, projections, aqua.AquaConfig.preset(name)) as attachment:
            if name == "paper":
                with pytest.raises(aqua.AquaError, match="share is 'head'"):
                    attachment.new_cache(max_length=100, layout="tiled")
            else:
                assert attachment.new_cache(max_length=100, layout="tiled").layout == "tiled"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "max_new_tokens": 3}], ids=["greedy", "beams"])
def test_generation_with_padding_is_that_of_the_growing_cache(model, options, kernel):
    model, projections = model
    ids, mask = tokens(3, 20, seed=1), torch.ones(3, 20, dtype=torch.long, device=DEVICE)
    ids[1, :7], mask[1, :7] = 0, 0
    config = aqua.AquaConfig.paper(share="group", **SETTINGS["weighted"])
    with aqua.apply(model, projections, config) as attachment:
        given = {"attention_mask": mask} | GREEDY | options
        expected = model.generate(ids, **given)
        cache = attachment.new_cache(max_length=40, layout="tiled")
        assert torch.equal(model.generate(ids, past_key_values=cache, **given), expected)
        assert cache.layout == "tiled"


def test_a_prompt_in_pieces_between_decoded_tokens(model, kernel):
    model, projections = model
    ids, mask = tokens(2, 30, seed=2), torch.ones(2, 30, dtype=torch.long, device=DEVICE)
    ids[0, :4], mask[0, :4] = 0, 0
    config = aqua.AquaConfig.paper(share="group", **SETTINGS["weighted"])
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        results = []
        for cache in (attachment.new_cache(), attachment.new_cache(max_length=30, layout="tiled")):
            start, logits = 0, []
            for size in (9, 1, 1, 8, 1, 10):
                part = slice(start, start + size)
                logits.append(model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache).logits)
                start = part.stop
            results.append(torch.cat(logits, 1))
        real = mask.bool()
        assert torch.allclose(results[1][real], results[0][real], atol=2e-4)
        model(ids[:, :1], past_key_values=cache)
        assert (cache.max_length, int(cache.get_seq_length())) == (45, 31)
        cache.reset()
        again = model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits
        assert torch.allclose(again[real[:, :9]], results[1][:, :9][real[:, :9]], atol=2e-4)


MASKS = {
    "left padding, one by one": ([1] * 8, [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]),
    "hidden between turns": ([4, 1, 1, 2, 1], [[1, 1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]),
    "hidden afterwards": ([5, 1, 1, 1], [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("layout", ["tiled", "plain"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_hide_more_than_padding_are_obeyed(model, name, layout):
    """As the growing cache obeys them, token by token."""
    model, projections = model
    sizes, rows = MASKS[name]
    mask = torch.tensor(rows, device=DEVICE)
    ids = tokens(2, mask.shape[1], seed=3)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, share="group")) as attachment,
        torch.no_grad(),
    ):
        results = []
        for cache in (attachment.new_cache(), attachment.new_cache(max_length=12, layout=layout)):
            start, logits = 0, []
            for size in sizes:
                part = slice(start, start + size)
                # What was seen before may be hidden only from the last token on.
                seen = mask if name != "hidden afterwards" or part.stop == mask.shape[1] else torch.ones_like(mask)
                given = {"attention_mask": seen[:, : part.stop], "position_ids": places[:, part]}
                logits.append(model(ids[:, part], past_key_values=cache, **given).logits)
                start = part.stop
            results.append(torch.cat(logits, 1)[mask.bool()])
    assert torch.allclose(results[1], results[0], atol=2e-4)


@pytest.mark.parametrize("layout", ["tiled", "plain"])
@pytest.mark.parametrize("window", [{}, {"sink": 2, "recent": 5}], ids=["", "window"])
def test_decoding_without_any_mask_sees_no_empty_end(model, layout, window):
    model, projections = model
    ids = tokens(1, 12, seed=4)
    config = aqua.AquaConfig.paper(k_ratio=0.5, share="group", **window)
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        results = []
        for cache in (attachment.new_cache(), attachment.new_cache(max_length=40, layout=layout)):
            model(ids[:, :9], past_key_values=cache)
            results.append(torch.cat([model(ids[:, n : n + 1], past_key_values=cache).logits for n in (9, 10, 11)]))
    assert torch.allclose(results[1], results[0], atol=2e-4)


def test_a_reset_keeps_the_addresses_that_a_recorded_graph_knows(model):
    model, projections = model
    with (
        aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, share="group")) as attachment,
        torch.no_grad(),
    ):
        cache = attachment.new_cache(max_length=40, layout="tiled")
        (layer, *_), ids = cache.layers, tokens(2, 12, seed=5)

        def addresses():
            held = layer.cache
            tensors = (held.tiles, held.tail, held.values, held.lengths, held.arrived, layer._padding)
            return [tensor.data_ptr() for tensor in tensors]

        first = model(ids, past_key_values=cache).logits
        before = addresses()
        model(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, first)
        assert addresses() == before
        cache.reset()
        model(ids[:1], past_key_values=cache)  # another batch
        assert cache.layers[0].cache.lengths.shape == (1,)


def test_a_tiled_cache_of_another_attachment_is_refused(model):
    model, projections = model
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, share="group")) as attachment:
        cache = attachment.new_cache(max_length=40, layout="tiled")
        for method, given in (("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([0]))):
            with pytest.raises(aqua.AquaError, match="cannot repeat or select sequences: make it without max_length"):
                getattr(cache, method)(given)
        with pytest.raises(aqua.AquaError, match="assisted decoding"):
            cache.crop(-1)
    wrong = pytest.raises(
        aqua.AquaError, match="this cache is tiled, which is impossible here, because share is 'head'"
    )
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5)), torch.no_grad(), wrong:
        model(tokens(1, 5), past_key_values=cache)


def test_what_the_layout_cannot_do_is_said(model):
    model, projections = model
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5)) as attachment:
        with pytest.raises(aqua.AquaError, match="share is 'head'"):
            attachment.new_cache(max_length=64, layout="tiled")
        assert attachment.new_cache(max_length=64).layout == "plain"
    wide = aqua.AquaConfig.paper(k_ratio=0.5, share="group", recent=129)
    words = pytest.raises(
        aqua.AquaError, match="recent 129, and it takes 128 at most: set sink and recent to 128 or less"
    )
    with aqua.apply(model, projections, wide) as attachment, words:
        attachment.new_cache(max_length=64, layout="tiled")
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, share="group")) as attachment:
        with pytest.raises(aqua.AquaError, match="fixed size"):
            attachment.new_cache(layout="tiled")
        with pytest.raises(aqua.AquaError, match="fixed size"):
            attachment.new_cache(max_length=64, layout="tiled", offloading=True)
        with pytest.raises(aqua.AquaError, match="layout is 'tile': it must be one of auto, tiled, plain"):
            attachment.new_cache(max_length=64, layout="tile")
        assert attachment.new_cache(max_length=64).layout == ("tiled" if DEVICE == "cuda" else "plain")
        cache = attachment.new_cache(max_length=64, layout="tiled")
        with torch.no_grad():
            model(tokens(1, 10), past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="holds 1 sequences, the batch has 2"):
            model(tokens(2, 1), past_key_values=cache)
        with pytest.raises(aqua.AquaError, match="no gradient"):
            model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(aqua.AquaError, match="has left the model"), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU needs no C compiler")
def test_without_a_compiler_there_is_no_layout_of_tiles(model, monkeypatch, no_kernel_loaded):
    model, projections = model
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("PATH", "")
    config = aqua.AquaConfig.paper(k_ratio=0.5, share="group")
    with (
        aqua.apply(model, projections, config) as attachment,
        pytest.raises(aqua.AquaError, match="no C compiler"),
    ):
        attachment.new_cache(max_length=64, layout="tiled")


def test_sliding_layers_beside_tiled_ones():
    model = make_gemma3()
    projections = calibrated(model)
    model, ids = model.to(DEVICE), tokens(1, 24)
    with aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.5, share="group")) as attachment:
        expected = model.generate(ids, **GREEDY)
        cache = attachment.new_cache(max_length=40, layout="tiled")
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert [type(layer).__name__ for layer in cache.layers] == ["RingLayer", "TiledLayer", "RingLayer"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_step_recorded_as_a_cuda_graph_goes_on_by_itself(dtype):
    model = make_llama()
    projections = calibrated(model)
    model = model.to(DEVICE, dtype)
    ids, total = tokens(2, 300), 300
    config = aqua.AquaConfig.paper(share="group", **SETTINGS["weighted"])
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        cache = attachment.new_cache(max_length=total)
        assert cache.layout == "tiled"
        model(ids[:, :200], past_key_values=cache)
        expected = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(200, total)]
        cache.reset()
        model(ids[:, :200], past_key_values=cache)
        token, stream = ids[:, 200:201].clone(), torch.cuda.Stream()
        # The other stream reads what this one writes.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = model(token, past_key_values=cache).logits
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=cache).logits
        found = [first]
        for place in range(201, total):
            token.copy_(ids[:, place : place + 1])
            graph.replay()
            found.append(logits.clone())
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
    assert int(cache.get_seq_length()) == total
