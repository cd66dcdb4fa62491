# SPDX-License-Identifier: Apache-2.0
"""Where text comes from, and how it becomes windows of token ids."""

from __future__ import annotations

import gzip
import hashlib
import random
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqua_attention.data.sources import PACKED, files_below, first_line, hub_rows, local_files, suffix_of
from aqua_attention.errors import AquaError, brief, install_extra
from aqua_attention.io.files import json_lines, open_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (*PACKED, ".parquet")
FORMS = (
    "builtin:calibration, builtin:evaluation, hub:dataset[:config[:split]], a folder, "
    f"or a file ending in {', '.join(SUFFIXES)} (all but .parquet may end in .gz too)"
)
RUN = 8
"""Tokens that, where they follow each other again, are a repetition."""
_FIELDS = ("text", "content")


def load_text(spec: str | Path, *, max_characters: int = 50_000_000) -> str:
    """Read the text that `spec` names, at most the first `max_characters` of it.

    Rows, lines and files are joined by an empty line; a row's text is its field `text`, else `content`.

    Args:
        spec: one of `FORMS`. The built-in ones are the first 80 % and the last 20 % of the topics of Python's own help,
            so that the wording follows the Python version. Files are UTF-8; of a folder all are read, by path; of a
            dataset the split "train", unless given.

    Raises:
        AquaError: there is no such text, it cannot be read, or it is blank.
    """
    if max_characters < 1:
        raise AquaError(f"max_characters is {max_characters}: it must be at least 1")
    if not isinstance(spec, str | Path):
        raise AquaError(f"the text's name is {brief(spec)}: it is one of {FORMS}")
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    if kind == "builtin":
        text = _builtin(rest)[:max_characters]
    elif kind == "hub":
        text = _join(hub_rows(rest, lambda row: _row_text(row, spec)), max_characters)
    else:
        unknown = f"cannot tell what {spec!r} holds from its name"
        files = local_files(spec, SUFFIXES, f"a text is one of {FORMS}", unknown, "file")
        text = _join((_read(file, max_characters) for file in files), max_characters)
    if not text.strip():
        raise AquaError(f"the text {spec!r} is blank: give a text with words in it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AquaError(f"the text {spec!r} has half a surrogate pair in it: mend its \\u escapes") from error
    return text


def holds_text(spec: str) -> bool:
    """Whether `spec` is a folder with a file that `load_text` reads."""
    path = Path(spec).expanduser()
    return path.is_dir() and bool(files_below(path, SUFFIXES))


def _builtin(name: str) -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise AquaError("this Python comes without pydoc_data, the built-in text: give a file") from error
    if name not in ("calibration", "evaluation"):
        raise AquaError(f"unknown built-in text {name!r}: it is calibration or evaluation")
    text = "\n\n".join(topics[key] for key in sorted(topics))
    cut = text.index("\n", len(text) * 8 // 10) + 1
    return text[:cut] if name == "calibration" else text[cut:]


def _join(texts: Iterable[str], limit: int) -> str:
    """Join by empty lines, taking no more texts than it needs to reach `limit` characters."""
    taken: list[str] = []
    length = 0
    for text in texts:
        taken.append(text)
        length += len(text) + 2
        if length >= limit + 2:
            break
    return "\n\n".join(taken)[:limit]


def _read(path: Path, limit: int) -> str:
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            return _join(_parquet_rows(path), limit)
        with open_text(path) as file:
            text = _join(_jsonl_rows(path, file), limit) if suffix == ".jsonl" else file.read(limit)
    except UnicodeDecodeError as error:
        raise AquaError(f"{path} is not UTF-8 text ({error.reason}): convert it to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise AquaError(f"{path} is not a complete gzip file ({error}): make or fetch it again") from error
    except OSError as error:
        raise AquaError(f"cannot read {path} ({error.strerror or error}): check the file") from error
    if "\0" in text:
        # UTF-16 without a mark is valid UTF-8, with every second character a NUL.
        raise AquaError(f"{path} is no UTF-8 text (it has NUL characters, as UTF-16 has): convert it to UTF-8")
    return text


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for row, where in json_lines(path, lines):
        if not isinstance(row, dict):
            raise AquaError(f"{where} is no JSON object: give objects with a field 'text'")
        yield _row_text(row, where)


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise AquaError(f"reading {path} takes pyarrow: {install_extra('data')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((field for field in _FIELDS if field in names), None)
            if column is None:
                raise AquaError(
                    f"{path} has no column 'text' or 'content': its columns are {', '.join(names)}, rename one"
                )
            for batch in file.iter_batches(columns=[column], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise AquaError(f"{path} has no strings in its column {column!r}: give a text column")
                    yield text or ""
    except (pyarrow.ArrowException, OSError) as error:
        raise AquaError(f"{path} is not a whole parquet file ({first_line(error)}): fetch it again") from error


def _row_text(row: dict[str, Any], where: str) -> str:
    for field in _FIELDS:
        if isinstance(row.get(field), str):
            return str(row[field])
    raise AquaError(
        f"{where} has no string in a field 'text' or 'content': its fields are {', '.join(row)}, rename one"
    )


def text_digest(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids of `text` without special tokens, and the ids that the tokenizer puts in front of a text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    dressed = tokenizer("a", verbose=False)["input_ids"]
    bos = dressed[:1] if dressed[:1] == [tokenizer.bos_token_id] else []
    # What stands before the bare ids is the prefix; what stands after them, such as an EOS, is left out.
    found = (start for start in range(len(dressed)) if bare and dressed[start : start + len(bare)] == bare)
    start = next(found, None)
    return ids, bos if start is None else dressed[:start]


def token_windows(
    token_ids: Sequence[int] | torch.Tensor, *, tokens: int, context: int, seed: int | None, prefix: Sequence[int] = ()
) -> torch.Tensor:
    """Cut token ids into windows: an int64 tensor [windows, context].

    There are `tokens // context` windows, at least one, and fewer where the text is short. Each is `prefix` (see
    `tokenize`) and then consecutive text tokens, none of them in two windows; both count as tokens.

    Args:
        token_ids: the text, without special tokens; a list or a 1-D tensor.
        seed: None takes one window after the other from the start; an int spreads them over the whole
            text, each at a random place in its share.

    Raises:
        AquaError: a value is out of range, or the text is shorter than one window.
    """
    import torch

    if tokens < 1:
        raise AquaError(f"tokens is {tokens}: it must be at least 1")
    least = max(2, len(prefix) + 1)
    if context < least:
        raise AquaError(f"context is {context}: it must be at least {least}")
    ids = torch.as_tensor(token_ids, dtype=torch.int64).flatten()
    width = context - len(prefix)
    count = min(max(1, tokens // context), len(ids) // width)
    if count == 0:
        found = f"the text has {len(ids)} tokens, fewer than one window of {context}"
        raise AquaError(f"{found}: give more text or a smaller --context")
    starts = [index * width for index in range(count)]
    if seed is not None:
        slack, rng = len(ids) - count * width, random.Random(seed)
        starts = [start + int((index + rng.random()) * slack / count) for index, start in enumerate(starts)]
    head = torch.tensor(prefix, dtype=torch.int64, device=ids.device)
    return torch.stack([torch.cat([head, ids[start : start + width]]) for start in starts])


def warn_of_windows(windows: torch.Tensor, tokens: int) -> None:
    """Warn where a text had fewer `tokens` than were asked for, or says the same again and again."""
    count, context = windows.shape
    if count < tokens // context:
        read = f"{windows.numel()} tokens ({count} windows of {context}) are read, not {tokens}"
        warnings.warn(f"the text is short: {read}", stacklevel=3)
    if context < RUN:
        return
    runs = windows.unfold(1, RUN, 1).reshape(-1, RUN)
    different = len(runs.unique(dim=0))
    if 2 * different < len(runs):
        repeats = f"the text repeats itself (of its {len(runs)} runs of {RUN} tokens only {different} differ)"
        warnings.warn(f"{repeats}, and says little of others: give one that does not", stacklevel=3)


def text_prompts(tokenizer: PreTrainedTokenizerBase, text: str) -> Callable[[int, int], torch.Tensor]:
    """What maps a number of prompts and a length to token ids of that shape, one behind the other in a text.

    They raise an AquaError where the text is too short.
    """
    ids, prefix = tokenize(tokenizer, text)

    def prompts(batch: int, length: int) -> torch.Tensor:
        found = token_windows(ids, tokens=batch * length, context=length, seed=None, prefix=prefix)
        if len(found) < batch:
            raise AquaError(f"the text has {len(ids)} tokens, too few for {batch} prompts of {length}: give more text")
        return found

    return prompts
