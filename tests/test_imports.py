# SPDX-License-Identifier: Apache-2.0
"""Imports: one direction, nothing patched, nothing heavy before it is needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import aqua_attention

SOURCE = Path(aqua_attention.__file__).parent
ORDER = [
    "errors",
    "version",
    "io",
    "config",
    "machine",
    "ops",
    "model",
    "data",
    "calibration",
    "cache",
    "attach",
    "vllm",
    "evaluate",
    "bench",
    "report",
    "cli",
]
"""The data's way through the library; a module imports only from itself and from what stands before it."""


MOST_ROOT_MODULES = 8
BACKENDS = SOURCE / "ops" / "backends"
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path):
    """Names of modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            # `from package import module` names the module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    place = path.relative_to(SOURCE).with_suffix("").parts[0]
    if place == "__init__":
        return
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("aqua_attention.")}
    assert ours & set(ORDER) <= set(ORDER[: ORDER.index(place) + 1])
    known = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert ours & known <= set(ORDER), "a package that ORDER does not name"


def test_the_root_is_small():
    modules = list(SOURCE.glob("*.py"))
    assert len(modules) <= MOST_ROOT_MODULES, sorted(map(name_of, modules))


@pytest.mark.parametrize("path", sorted((SOURCE / "ops").rglob("*.py")), ids=name_of)
def test_ops_knows_no_transformers(path):
    assert not any(name.split(".")[0] == "transformers" for name in imported(path))


@pytest.mark.parametrize("path", sorted(BACKENDS.rglob("*.py")), ids=name_of)
def test_backends_never_import_each_other(path):
    own = path.relative_to(BACKENDS).with_suffix("").parts[0]
    others = {each.stem if each.is_file() else each.name for each in BACKENDS.iterdir()} - {own, "__init__"}
    prefix = "aqua_attention.ops.backends."
    found = {name.removeprefix(prefix).split(".")[0] for name in imported(path) if name.startswith(prefix)}
    assert not found & others


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_one_place_loads_backends(path):
    """Benchmarks time kernels, so they may name them."""
    if BACKENDS in path.parents or "bench" in path.parts:
        return
    assert not any(name.startswith("aqua_attention.ops.backends") for name in imported(path))
    named = "aqua_attention.ops.backends." in path.read_text()
    assert not named or path == SOURCE / "ops" / "backend.py"


MOST_PARAMETERS = 12


def is_kernel(function):
    """Whether Triton compiles it: what a kernel reads must be named in its signature."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_have_few_parameters(path):
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    for function in functions:
        given = function.args
        count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
        assert count <= MOST_PARAMETERS or is_kernel(function), f"{function.name} has {count} parameters"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, aqua_attention.cli.main; print({'torch', 'transformers'} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.parametrize("module", ["report.page", "evaluate.record", "evaluate.suites", "cli.main"])
def test_what_reads_results_loads_no_torch(module):
    code = f"import sys, aqua_attention.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert run(code) == "set()"


def test_the_public_names_need_only_core_dependencies_and_patch_nothing():
    """With triton, vllm and every optional package blocked, all names load and transformers' tables stay the same."""
    code = """
import sys
for name in ("triton", "vllm", "datasets", "pyarrow", "lm_eval", "matplotlib"):
    sys.modules[name] = None
from transformers import AttentionInterface, AttentionMaskInterface
before = [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]
import aqua_attention
assert all(getattr(aqua_attention, name) is not None for name in aqua_attention.__all__)
assert callable(aqua_attention.calibrate)
assert before == [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]
print("unchanged")
"""
    assert run(code) == "unchanged"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'aquarium'"):
        _ = aqua_attention.aquarium


@pytest.mark.parametrize("name", ["report.page", "report.collect", "report.record_tables", "evaluate.record"])
def test_what_reads_records_loads_neither_torch_nor_transformers(name):
    code = f"import sys, aqua_attention.{name}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert run(code) == "set()"


def test_the_report_is_made_without_torch(tmp_path):
    """`aqua report` of a record, with torch and transformers blocked."""
    pytest.importorskip("matplotlib")
    record = {"schema": 1, "suite": "perplexity", "model": "m", "config": None, "options": {}, "command": "aqua"}
    (tmp_path / "a.json").write_text(json.dumps(record | {"result": {"perplexity": 2.0}}))
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from aqua_attention.cli import main
sys.argv = ["aqua", "report", {str(tmp_path)!r}]
try:
    main.main()
except SystemExit as leaving:
    assert not leaving.code
"""
    assert "settings: 1 perplexity" in run(code)
    assert "2.000" in (tmp_path / "report.md").read_text()
