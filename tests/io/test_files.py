# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all."""

import errno
import json
import os
import stat

import pytest

from aqua_attention.errors import AquaError
from aqua_attention.io.files import write_atomically, write_json


@pytest.fixture
def umask():
    """Set the process's umask; put back after the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_content_is_written_and_no_other_file_remains(tmp_path):
    write_atomically(tmp_path / "a.bin", b"\x00one\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00one\n"
    assert names(tmp_path) == ["a.bin"]


def test_a_string_path_and_a_bare_name_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("a.bin", b"one")
    assert (tmp_path / "a.bin").read_bytes() == b"one"


def test_a_longer_file_is_replaced_completely(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old and longer")
    write_atomically(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_the_old_content_is_there_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, during = tmp_path / "a.bin", []
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: during.append(path.read_bytes()))
    write_atomically(path, b"new")
    assert during == [b"old"]
    assert path.read_bytes() == b"new"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(AquaError, match=r"cannot write .*gone.a\.bin: there is no folder .*gone, make it first$"):
        write_atomically(tmp_path / "gone" / "a.bin", b"one")
    assert names(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(AquaError, match="there is no folder"):
        write_atomically(tmp_path / "file" / "a.bin", b"one")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_target_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(AquaError, match=r"cannot write .*a: it is a folder"):
        write_atomically(tmp_path / "a", b"one")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("old", [None, b"old"], ids=["new-file", "old-file"])
@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.fdopen", "os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_no_trace_and_keeps_an_older_file(tmp_path, monkeypatch, step, old):
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(AquaError, match=r"cannot write .*a\.bin: No space left on device"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert names(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or path.read_bytes() == old


def test_an_interrupt_while_writing_leaves_no_trace(tmp_path, monkeypatch):
    def interrupt(handle):
        assert len(names(tmp_path)) == 1  # the temporary file is there
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.bin", b"one")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_that_of_an_ordinary_file_under_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write_atomically(tmp_path / "a.bin", b"one")
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == mode
    assert umask(mask) == mask  # reading the umask did not change it


def test_json_is_indented_ends_in_a_newline_and_reads_back(tmp_path):
    value = {"name": "ε", "numbers": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.startswith('{\n  "name": ')
    assert text.endswith("}\n")


def test_a_value_that_is_no_json_touches_nothing(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"set": {1}})
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]
