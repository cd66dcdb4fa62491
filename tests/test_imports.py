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
    "evaluate",
    "bench",
    "report",
    "cli",
]
"""The data's way through the library; a module imports only from itself and from what stands before it."""


def imported(path):
    """Names of our own modules that a file imports, at the top level of our package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aqua_attention."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    place = path.relative_to(SOURCE).with_suffix("").parts[0]
    if place == "__init__":
        return
    assert set(imported(path)) <= set(ORDER[: ORDER.index(place) + 1])


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, aqua_attention.cli.main; print({'torch', 'transformers'} & set(sys.modules))"
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
