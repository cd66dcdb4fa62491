# SPDX-License-Identifier: Apache-2.0
"""The entry to attention: what it refuses and why, which path it takes, and gradients through each."""

import pytest
import torch
from plain import TORCH_IMPLEMENTATIONS, choose

from aqua_attention.errors import AquaError
from aqua_attention.ops.api import attention


def problem(queries=9, keys=9, heads=4, groups=2, requires_grad=(), dtype=torch.float64):
    """Random query, key, value and selected; those named in `requires_grad` are leaves with a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (2, heads, queries, 6), "key": (2, groups, keys, 6), "value": (2, groups, keys, 8)}
    states = {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(name in requires_grad)
        for name, shape in shapes.items()
    }
    return states | {"selected": torch.rand(shapes["query"], generator=generator) < 0.6}


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": zeros(1, 2, 9, 6)}, r"key is \(1, 2, 9, 6\): query \(2, 4, 9, 6\) needs its batch and width"),
        ({"key": zeros(2, 2, 9, 5)}, r"key is \(2, 2, 9, 5\): query \(2, 4, 9, 6\) needs its batch and width"),
        ({"value": zeros(2, 2, 8, 8)}, r"value is \(2, 2, 8, 8\): .* tokens of key \(2, 2, 9, 6\)"),
        ({"value": zeros(2, 1, 9, 8)}, r"value is \(2, 1, 9, 8\): it must have the heads"),
        ({"value": zeros(1, 2, 9, 8)}, r"value is \(1, 2, 9, 8\)"),
        (
            {"key": zeros(2, 3, 9, 6), "value": zeros(2, 3, 9, 8)},
            "4 query heads do not divide into 3 key-value heads",
        ),
        ({"selected": zeros(2, 4, 9, 5).bool()}, r"selected is torch.bool \(2, 4, 9, 5\): .* shape of query"),
        ({"selected": zeros(2, 2, 9, 6).bool()}, r"selected is torch.bool \(2, 2, 9, 6\)"),
        (
            {"key": zeros(2, 2, 8, 6), "value": zeros(2, 2, 8, 8)},
            "9 causal queries need at least as many keys, there are 8",
        ),
        ({"mask": zeros(2, 1, 9, 8).bool()}, r"mask is \(2, 1, 9, 8\): .* queries 9, keys 9"),
        ({"mask": zeros(2, 1, 1, 9).bool()}, r"mask is \(2, 1, 1, 9\)"),
    ],
)
@pytest.mark.parametrize("impl", TORCH_IMPLEMENTATIONS)
def test_shapes_that_do_not_fit_are_refused_with_sizes(change, message, impl):
    with pytest.raises(AquaError, match=message):
        attention(**(problem() | change), impl=impl)


def test_a_mask_allows_more_queries_than_keys():
    arguments = problem(queries=9, keys=8) | {"mask": torch.ones(2, 1, 9, 8, dtype=torch.bool)}
    results = [attention(**arguments, impl=impl) for impl in TORCH_IMPLEMENTATIONS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("impl", ["flash", "", "Fused", None])
def test_an_unknown_implementation_is_refused_listing_the_valid_ones(impl):
    with pytest.raises(AquaError) as refusal:
        attention(**problem(), impl=impl)
    assert str(refusal.value) == f"impl is {impl!r}: it must be one of auto, fused, chunked, reference"


WINDOW = {"sink": 1, "recent": 2}
NOT_FUSED = {
    "softcap": ({}, {"softcap": 30.0}, "no softcap"),
    "s_aux": ({}, {"s_aux": torch.zeros(4)}, "s_aux"),
    "window and mask": ({}, {"mask": torch.ones(2, 1, 9, 9).tril().bool(), **WINDOW}, "exact window"),
    "codes": ({}, {"mask": torch.ones(2, 1, 9, 9).tril().to(torch.uint8)}, "exact window"),
    "window after a cache": ({"keys": 12}, WINDOW, "as many queries as keys"),
    "gradient of the query": ({"requires_grad": ("query",)}, WINDOW, "no gradient"),
    "gradient of the key": ({"requires_grad": ("key",)}, WINDOW, "no gradient"),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_fused_cannot_take_is_refused_with_the_reason_and_auto_runs_chunked(case):
    shapes, options, reason = NOT_FUSED[case]
    arguments = problem(**shapes) | options
    with pytest.raises(AquaError, match=rf"impl='fused' cannot take this call \(.*{reason}.*\): use auto"):
        attention(**arguments, impl="fused")
    automatic = attention(**arguments)
    assert torch.equal(automatic, attention(**arguments, impl="chunked"))
    torch.testing.assert_close(automatic, attention(**arguments, impl="reference"))


@pytest.mark.parametrize(
    ("options", "keys", "expected"),
    [
        ({"window": False}, 9, "fused"),
        ({"window": True}, 9, "fused"),
        ({"window": False}, 12, "fused"),
        ({"window": True}, 12, "chunked"),
        ({"window": False, "softcap": 30.0}, 9, "chunked"),
        ({"window": False, "softcap": 30.0, "impl": "reference"}, 9, "reference"),
        ({"window": False, "impl": "chunked"}, 9, "chunked"),
    ],
)
def test_choose_names_the_path(options, keys, expected):
    arguments = problem(keys=keys)
    assert choose(arguments["query"], arguments["key"], arguments["value"], None, **options) == expected


def gradients(impl, names, arguments):
    output = attention(**arguments, impl=impl)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output * weights).sum(), [arguments[name] for name in names])


ALL = ("query", "key", "value")
PADDED = torch.ones(9, 9).tril().bool() & (torch.arange(9) >= torch.tensor([0, 3])[:, None, None, None])


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (ALL, WINDOW, "chunked"),
        (("query",), WINDOW, "chunked"),
        (("key",), WINDOW, "chunked"),
        (("value",), WINDOW, "fused"),
        (ALL, {}, "fused"),
        (ALL, {"mask": PADDED}, "fused"),
        (ALL, {"mask": PADDED, **WINDOW}, "chunked"),
        (ALL, {"softcap": 3.0, **WINDOW}, "chunked"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_gradients_of_the_automatic_path_are_the_references(names, options, expected, block, monkeypatch):
    monkeypatch.setattr("aqua_attention.ops.reference.CHUNK_SCORES", block)
    arguments = problem(requires_grad=names) | options
    window = options.get("sink", 0) + options.get("recent", 0) > 0
    mask, softcap = options.get("mask"), options.get("softcap")
    assert (
        choose(arguments["query"], arguments["key"], arguments["value"], mask, window=window, softcap=softcap)
        == expected
    )
    found, reference = (gradients(impl, names, arguments) for impl in ("auto", "reference"))
    for name, one, other in zip(names, found, reference, strict=True):
        assert one.isfinite().all(), name
        assert (other != 0).any(), name
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def test_gradients_of_dropped_query_entries_are_zero_outside_the_window():
    arguments = problem(requires_grad=("query",))
    (gradient,) = gradients("auto", ("query",), arguments)
    assert (gradient[~arguments["selected"]] == 0).all()


def test_without_gradients_enabled_a_window_takes_the_fused_path():
    arguments = problem(requires_grad=ALL)
    with torch.no_grad():
        assert choose(arguments["query"], arguments["key"], arguments["value"], None, window=True) == "fused"
        torch.testing.assert_close(attention(**arguments, **WINDOW), attention(**arguments, **WINDOW, impl="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(2, 1, 9, 9)}, "mask is torch.float32: it must be boolean"),
        ({"mask": torch.ones(2, 1, 9, 9, dtype=torch.int64)}, "mask is torch.int64: it must be boolean"),
        ({"mask": torch.ones(9, 9, dtype=torch.bool)}, r"mask is \(9, 9\)"),
        ({"mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)}, r"mask is \(3, 1, 9, 9\)"),
        ({"s_aux": torch.zeros(3)}, r"s_aux is \(3,\): it must be one logit for each of 4 query heads"),
        ({"selected": torch.ones(2, 4, 9, 6)}, "selected is torch.float32 .* must be boolean"),
        ({"query": torch.zeros(4, 9, 6)}, r"query is \(4, 9, 6\): it must be \[batch, heads, tokens, width\]"),
        ({"query": torch.zeros(2, 4, 0, 6)}, r"query is \(2, 4, 0, 6\): .* not empty"),
        ({"key": torch.zeros(2, 2, 9, 6, dtype=torch.bfloat16)}, "they must be of one dtype"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(change, message):
    with pytest.raises(AquaError, match=message):
        attention(**problem() | change)
