# SPDX-License-Identifier: Apache-2.0
import gzip
import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqua_attention.data.text import load_text, text_digest, token_windows, tokenize
from aqua_attention.errors import AquaError

WORDS = "Größe matters.\nTwo lines of it.\n"
ROWS = ["first", "second\nrow", "third"]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def compress(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_builtin_texts_are_two_parts_of_one() -> None:
    from pydoc_data.topics import topics

    first, second = load_text("builtin:calibration"), load_text("builtin:evaluation")
    whole = "\n\n".join(topics[key] for key in sorted(topics))
    assert first + second == whole
    assert first.endswith("\n")
    assert 0.8 <= len(first) / len(whole) < 0.801
    assert load_text("builtin:evaluation", max_characters=100) == second[:100]
    with pytest.raises(AquaError, match="unknown built-in text 'train': it is calibration or evaluation"):
        load_text("builtin:train")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".raw", ".rst", ".TXT"])
def test_plain_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"words{suffix}"
    path.write_text(WORDS, encoding="utf-8")
    assert load_text(str(path)) == WORDS
    assert load_text(str(compress(path))) == WORDS
    assert load_text(str(path), max_characters=5) == WORDS[:5]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8-sig")
    assert load_text(str(path)) == WORDS


@pytest.mark.parametrize("field", ["text", "content"])
def test_rows(tmp_path: Path, field: str) -> None:
    lines = write_jsonl(tmp_path / "rows.jsonl", [{"id": 1, field: row} for row in ROWS])
    table = write_parquet(tmp_path / "rows.parquet", {"id": [1, 2, 3], field: ROWS})
    expected = "first\n\nsecond\nrow\n\nthird"
    for path in (lines, compress(lines), table):
        assert load_text(str(path)) == expected
        assert load_text(str(path), max_characters=6) == expected[:6]


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 10}])
    with path.open("a") as file:
        file.write("no JSON here\n")
    assert load_text(str(path), max_characters=10) == "x" * 10
    with pytest.raises(AquaError, match="line 2"):
        load_text(str(path), max_characters=11)
    with pytest.raises(AquaError, match="max_characters is 0: it must be at least 1"):
        load_text(str(path), max_characters=0)


def test_null_parquet_rows_are_empty(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": ["a", None, "b"]})
    assert load_text(str(path)) == "a\n\n\n\nb"


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.md").write_text("inner")
    (tmp_path / "a.txt").write_text("outer")
    (tmp_path / "c.py").write_text("no text")
    compress(write_jsonl(tmp_path / "d.jsonl", [{"text": "row"}]))
    assert load_text(str(tmp_path)) == "outer\n\ninner\n\nrow\n\nrow"
    assert load_text(str(tmp_path), max_characters=8) == "outer\n\ni"


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text("no text")
    with pytest.raises(AquaError, match=r"holds no file ending in \.txt"):
        load_text(str(tmp_path))


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(AquaError, match=r"no file or folder '.*none\.txt': .*builtin:calibration.*hub:"):
        load_text(str(tmp_path / "none.txt"))
    for name in ("data.csv", "data", "data.gz", "data.parquet.gz", "data.csv.gz"):
        (tmp_path / name).write_text("x")
        with pytest.raises(AquaError, match=rf"cannot tell what '.*{name}' holds.*\.jsonl, \.parquet"):
            load_text(str(tmp_path / name))
    for spec in ("a long prose given in place of a path " * 200, "~no-such-user/x.txt"):
        with pytest.raises(AquaError, match="is no usable path") as caught:
            load_text(spec)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_blank_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(content)
    with pytest.raises(AquaError, match=r"blank\.txt' is blank"):
        load_text(str(path))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(WORDS.encode("latin-1"))
    for file in (path, compress(path)):
        with pytest.raises(AquaError, match=rf"{file.name} is not UTF-8 text"):
            load_text(str(file))


def test_damaged_gzip(tmp_path: Path) -> None:
    plain = tmp_path / "words.txt"
    plain.write_text(WORDS * 100, encoding="utf-8")
    whole = compress(plain).read_bytes()
    broken = bytearray(whole)
    broken[-8:-4] = b"\0" * 4  # the checksum
    for data in (whole[:-10], whole[: len(whole) // 2], b"no gzip", bytes(broken)):
        path = tmp_path / "damaged.txt.gz"
        path.write_bytes(data)
        with pytest.raises(AquaError, match=r"damaged\.txt\.gz is not a complete gzip file"):
            load_text(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', r"line 3 is not JSON"),
        ("[" * 100_000, r"line 3 is not JSON"),
        ("1" * 5000, r"line 3 is not JSON"),
        ('["text"]', r"line 3 is no JSON object"),
        ('{"id": 1, "body": "x"}', r"line 3 has no string in a field 'text' or 'content': .*id, body"),
        ('{"text": 5}', r"line 3 has no string in a field"),
    ],
)
def test_bad_jsonl_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(AquaError, match=rf"rows\.jsonl, {message}"):
        load_text(str(path))


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(AquaError, match=r"rows\.jsonl' has half a surrogate pair"):
        load_text(str(path))


def test_bad_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"id": [1], "body": ["x"]})
    with pytest.raises(AquaError, match=r"rows\.parquet has no column 'text' or 'content': .*id, body"):
        load_text(str(path))
    path = write_parquet(path, {"text": [1, 2]})
    with pytest.raises(AquaError, match=r"no strings in its column 'text'"):
        load_text(str(path))
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(AquaError, match=r"rows\.parquet is not a whole parquet file"):
        load_text(str(path))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(AquaError, match=r"takes pyarrow: install it .*'\.\[data\]'"):
        load_text(str(path))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz"])
def test_utf_16_without_a_mark_is_no_text(encoding: str, suffix: str, tmp_path: Path) -> None:
    """It is valid UTF-8, half of it NUL characters."""
    path, content = tmp_path / f"text{suffix}", "plain words\n".encode(encoding)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(AquaError, match=r"text\.\S+ is no UTF-8 text \(it has NUL .*\): convert it to UTF-8"):
        load_text(str(path))


def test_hub_needs_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AquaError, match=r"'hub:some/set'.*install it .*'\.\[data\]'"):
        load_text("hub:some/set")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:some/set", ("some/set", None, "train")),
        ("hub:some/set:raw", ("some/set", "raw", "train")),
        ("hub:some/set:raw:test", ("some/set", "raw", "test")),
        ("hub:some/set::test", ("some/set", None, "test")),
    ],
)
def test_hub_rows_are_streamed(
    monkeypatch: pytest.MonkeyPatch, spec: str, expected: tuple[str, str | None, str]
) -> None:
    calls, rows = [], []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        calls.append((name, config, split))
        assert streaming
        for row in ROWS:
            rows.append(row)
            yield {"text": row}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_text(spec, max_characters=8) == "first\n\ns"
    assert calls == [expected]
    assert rows == ROWS[:2]


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *args: Any, **options: Any) -> list[dict[str, str]]:
        if name == "gone":
            raise ConnectionError("no route\nto the hub")
        return [{"label": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(AquaError, match=r"cannot read 'hub:gone' \(no route\): .*network"):
        load_text("hub:gone")
    with pytest.raises(AquaError, match=r"hub:set has no string in a field .*label"):
        load_text("hub:set")
    for spec in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(AquaError, match=r"write hub:dataset\[:config\[:split\]\]"):
            load_text(spec)


def test_digest() -> None:
    assert text_digest("ä") == hashlib.sha256(b"\xc3\xa4").hexdigest()


def tokenizer_with(template: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", bos_token="<s>", eos_token="</s>", model_max_length=2
    )


@pytest.mark.parametrize(
    ("template", "prefix"),
    [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("<s> </s> $A", [1, 2])],
)
def test_tokenize(template: str, prefix: list[int], caplog: pytest.LogCaptureFixture) -> None:
    ids, found = tokenize(tokenizer_with(template), "b a b x")
    assert ids == [4, 3, 4, 0]
    assert found == prefix
    assert "longer than" not in caplog.text


def test_evaluation_windows_follow_each_other() -> None:
    windows = token_windows(list(range(10)), tokens=9, context=4, seed=None)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert token_windows(torch.arange(10), tokens=9, context=4, seed=None).equal(windows)
    # A text shorter than asked for gives fewer windows; fewer tokens than a window still give one.
    assert len(token_windows(range(10), tokens=10_000, context=4, seed=None)) == 2
    assert len(token_windows(range(10), tokens=1, context=4, seed=None)) == 1


def test_windows_begin_with_the_prefix() -> None:
    windows = token_windows(list(range(10, 20)), tokens=12, context=4, seed=None, prefix=[1])
    assert windows.tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]


@given(
    length=st.integers(1, 400),
    tokens=st.integers(1, 500),
    context=st.integers(3, 40),
    prefix=st.lists(st.just(-1), max_size=2),
    seed=st.integers(0, 2**32),
)
def test_seeded_windows(length: int, tokens: int, context: int, prefix: list[int], seed: int) -> None:
    width = context - len(prefix)
    if length < width:
        with pytest.raises(AquaError, match=f"the text has {length} tokens, fewer than one window of {context}"):
            token_windows(range(length), tokens=tokens, context=context, seed=seed, prefix=prefix)
        return
    windows = token_windows(range(length), tokens=tokens, context=context, seed=seed, prefix=prefix)
    again = token_windows(range(length), tokens=tokens, context=context, seed=seed, prefix=prefix)
    assert windows.equal(again)
    count = min(max(1, tokens // context), length // width)
    assert windows.shape == (count, context)
    assert (windows[:, : len(prefix)] == -1).all()
    taken = windows[:, len(prefix) :]
    assert (taken.diff(dim=1) == 1).all()
    assert taken.unique().numel() == taken.numel()
    # Window i lies in its own share of the text: an even spread, however few windows there are.
    slack = length - count * width
    for index, start in enumerate(taken[:, 0].tolist()):
        assert index * slack // count <= start - index * width <= (index + 1) * slack / count


def test_seeds_differ() -> None:
    first, second = (token_windows(range(10_000), tokens=512, context=64, seed=seed) for seed in (1, 2))
    assert not first.equal(second)


@pytest.mark.parametrize(
    ("tokens", "context", "prefix", "message"),
    [
        (0, 4, [], "tokens is 0: it must be at least 1"),
        (8, 1, [], "context is 1: it must be at least 2"),
        (8, 2, [1, 1], "context is 2: it must be at least 3"),
    ],
)
def test_window_sizes_out_of_range(tokens: int, context: int, prefix: list[int], message: str) -> None:
    with pytest.raises(AquaError, match=message):
        token_windows(range(10), tokens=tokens, context=context, seed=None, prefix=prefix)
