# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses: what each backend refuses and why, a backend that is new, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain import identity

import aqua_attention as aqua
from aqua_attention import ops
from aqua_attention.errors import AquaError
from aqua_attention.ops import backend
from aqua_attention.ops.api import attend, decode
from aqua_attention.ops.backend import Backend, choose, load, names, tiled_backend, why_not_tiled
from aqua_attention.ops.layout import TiledCache
from aqua_attention.ops.plan import Attended, LayerPlan

SOURCE = Path(aqua.__file__).parent
HAS_TRITON = load("triton").serves_tiles(torch.device("cpu"))
interpreted = pytest.mark.skipif(not HAS_TRITON, reason="triton's interpreter is off")


def plan_of(head_dim=16, kv_heads=2, dtype=torch.float32, is_wide=False, **settings):
    """`is_wide`: tokens of the exact window keep every dimension."""
    config = aqua.AquaConfig.paper(**settings)
    width = head_dim if is_wide else config.kept_dims(head_dim)
    rotation = identity(kv_heads, head_dim, width, "cpu").to(dtype)
    return LayerPlan.of(rotation, torch.ones(kv_heads, config.kept_dims(head_dim)), config)


def call_of(plan, queries=9, keys=9, heads=4, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, queries, plan.head_dim), (plan.num_key_value_heads, keys, plan.rotation.shape[2])
    query, key = (torch.randn(1, *shape, generator=generator, dtype=dtype) for shape in shapes)
    value = torch.randn(1, plan.num_key_value_heads, keys, plan.head_dim, generator=generator, dtype=dtype)
    return plan.call(query, key, value, **options)


class Dummy(Backend):
    """Attends to nothing longer than 8 tokens."""

    name = "dummy"

    def why_not(self, call, plan):
        return "it is for 8 keys at most" if call.key.shape[2] > 8 else None

    def attend(self, call, plan):
        return Attended(torch.full_like(call.query, 42.0), None, call.query.shape)


@pytest.fixture
def dummy(monkeypatch):
    # Its first line is all that a new backend needs besides its own module.
    monkeypatch.setattr(backend, "BACKENDS", {"dummy": f"{__name__}:Dummy", **backend.BACKENDS})
    monkeypatch.setattr(backend, "_loaded", {})


def test_a_new_backend_is_chosen_named_and_refuses_for_its_reason(dummy):
    plan = plan_of(k_ratio=0.5)
    short, long = call_of(plan, 8, 8), call_of(plan)
    assert names()[0] == "dummy" and "dummy" not in names(rotated=True)
    assert choose(short, plan).name == "dummy"
    assert (attend(short, plan).output == 42).all()
    assert choose(long, plan).name == "fused"
    with pytest.raises(AquaError) as refusal:
        attend(long, plan, "dummy")
    assert str(refusal.value) == (
        "impl='dummy' cannot take this call (it is for 8 keys at most): "
        "use auto, triton, fused, cpu, chunked or reference"
    )
    with pytest.raises(AquaError, match="must be one of auto, dummy, triton, fused, cpu, chunked, reference"):
        attend(short, plan, "flash")
    # What it does not override is refused, or left to others.
    assert load("dummy").why_not_tiled(plan, 2, torch.float16) == "it reads no tiles"
    assert torch.equal(backend.rotate(short.query, plan.rotation), short.query)


def test_the_last_backend_may_refuse_too(dummy, monkeypatch):
    monkeypatch.setattr(backend, "BACKENDS", {"dummy": f"{__name__}:Dummy"})
    plan = plan_of()
    with pytest.raises(AquaError, match=r"cannot take this call .* use auto$"):
        choose(call_of(plan), plan, "dummy")


@interpreted
@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({"dtype": torch.float64}, {}, "the rotation is torch.float64, and it takes torch.float32"),
        ({}, {"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "it knows no mask"),
        ({}, {"softcap": 3.0}, "neither softcap nor"),
        ({}, {"s_aux": torch.zeros(4)}, "neither softcap nor"),
        ({}, {"queries": 3}, "parts of 64 tokens or more: 3 queries and 9 keys"),
        ({}, {"dtype": torch.float64}, "it takes bfloat16, float16 and float32"),
        ({"head_dim": 272}, {}, "heads of at most 256 dimensions"),
    ],
)
def test_triton_says_what_it_does_not_take(settings, options, reason):
    plan = plan_of(**settings)
    call = call_of(plan, **options)
    with pytest.raises(AquaError, match=rf"impl='triton' cannot take this call \(.*{reason}.*\): use auto, fused"):
        attend(call, plan, "triton")
    assert choose(call, plan).name in ("fused", "chunked")
    assert attend(call, plan).output.isfinite().all()


@interpreted
def test_triton_has_no_gradient_and_keys_of_one_width():
    plan = plan_of()
    call = call_of(plan)
    assert load("triton").why_not(call, plan) is None
    assert choose(call, plan).name == "fused", "the interpreter is not for use"
    call.value.requires_grad_()
    assert load("triton").why_not(call, plan) == "it has no gradient"
    with torch.no_grad():
        assert load("triton").why_not(call, plan) is None
    wide = LayerPlan.of(identity(2, 16, 16, "cpu"), torch.ones(2, 12), aqua.AquaConfig.paper(s_ratio=0.25, sink=2))
    with pytest.raises(AquaError, match="tokens that keep more dimensions than others"):
        choose(call_of(wide), wide, "triton")
    assert load("triton").why_not(call, None) == "its kernels rotate and choose by themselves"


def test_backends_for_tiles_say_what_they_do_not_take():
    def reasons(plan, dtype=torch.float32, heads=4):
        return {name: load(name).why_not_tiled(plan, heads, dtype) for name in ("cpu", "fused")}

    from aqua_attention.ops.backends.cpu.build import no_kernel_reason

    assert reasons(plan_of(share="group"))["fused"] == "it reads no tiles"
    if no_kernel_reason() is None:
        assert reasons(plan_of(share="group"))["cpu"] is None
        assert reasons(plan_of(bits=8))["cpu"] == "the CPU kernel reads no bits=8"
        assert "the model is torch.float16" in reasons(plan_of(), torch.float16)["cpu"]
        assert "heads have 272 dimensions" in reasons(plan_of(272))["cpu"]


@interpreted
def test_tiles_are_refused_for_what_no_kernel_stores():
    def reason(dtype=torch.float32, heads=4, **settings):
        return why_not_tiled(plan_of(**{"share": "group"} | settings), heads, dtype)

    assert reason() is None
    assert reason(share="head", heads=2) is None
    assert "share is 'head'" in reason(share="head")
    assert "neither bits=4" in reason(bits=4)
    assert "neither bits=4" in reason(h2o_ratio=0.5)
    assert "neither bits=4" in reason(s_ratio=0.25, recent=4, is_wide=True)
    assert "recent 129" in reason(recent=129)
    assert "the model is torch.float64" in reason(torch.float64)
    assert "heads have 272 dimensions" in reason(head_dim=272)
    assert "with bits=8 it takes 128 at most" in reason(head_dim=144, bits=8)


def test_one_backend_serves_the_tiles_of_a_device(monkeypatch):
    assert tiled_backend(torch.device("cuda")).name == "triton"
    assert tiled_backend(torch.device("cpu")).name == ("triton" if HAS_TRITON else "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tiled_backend(torch.device("cpu")).name == "cpu"


@interpreted
def test_the_door_decodes_by_the_backend_of_the_cache():
    plan, new = plan_of(share="group", k_ratio=0.5), torch.ones(1, 2, 16)
    cache = TiledCache(1, 2, 16, 16, 8, torch.float32, "cpu")
    output, rotated, chosen = decode(new, new, new, cache, plan)
    assert torch.equal(rotated, new) and cache.lengths.tolist() == [1]
    assert torch.allclose(output, new) and chosen.dims.shape == (1, 2, 8)
    with pytest.raises(AquaError, match="key is"):
        decode(new, new[:, :1], new, cache, plan)


def modules_imported(path):
    """Every module that a file imports, wherever in it; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


OPS = sorted((SOURCE / "ops").rglob("*.py"))
BACKENDS = "aqua_attention.ops.backends"


@pytest.mark.parametrize("path", OPS, ids=lambda path: str(path.relative_to(SOURCE)))
def test_ops_knows_no_models_and_backends_not_each_other(path):
    found = set(modules_imported(path))
    assert not {name for name in found if name.split(".")[0] == "transformers"}
    parts = path.relative_to(SOURCE / "ops").with_suffix("").parts
    own = f"{BACKENDS}.{parts[1]}" if parts[0] == "backends" and len(parts) > 1 else None
    for name in found:
        assert not name.startswith(BACKENDS) or (own and (name + ".").startswith(own + ".")), name


def test_only_one_module_names_backends():
    """As text, for they are loaded when they are first asked; `bench` times kernels alone."""
    who = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if "ops.backends." in path.read_text() and path.relative_to(SOURCE).parts[:2] != ("ops", "backends")
    }
    assert {name for name in who if not name.startswith("bench/")} == {"ops/backend.py"}


def test_the_names_of_ops_load_when_they_are_asked():
    code = "import sys, aqua_attention.ops; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert all(getattr(ops, name) is not None for name in ops.__all__)
    assert ops.attend is attend and ops.choose is choose
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = ops.flash
