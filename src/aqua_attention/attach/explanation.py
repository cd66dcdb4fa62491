# SPDX-License-Identifier: Apache-2.0
"""What `Attachment.explain` returns: fields, and a few short lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from aqua_attention.attach.recording import NATURAL
from aqua_attention.errors import remedy_of, said
from aqua_attention.ops.backend import FROM_GROWING

MOST_KINDS = 6
"""Kinds of compiled parts that are named in a line."""


@dataclass(frozen=True)
class Prompt:
    """What computes attention of a whole prompt.

    Attributes:
        backends: how many attention layers each backend takes.
        reason: why the backend that is preferred on this device does not take all full layers; None when it does.
        is_dense: whether nothing is left out, because `select_in` leaves all choice to decoding.
    """

    backends: dict[str, int]
    reason: str | None
    is_dense: bool = False


@dataclass(frozen=True)
class Bytes:
    """Bytes of keys and values that decoding reads in all layers, and those that dense attention reads.

    Attributes:
        token, dense_token: for each token of context, in the layers that see all of it; where a kernel chooses tokens
            what scores them.
        step, dense_step: for a new token of each sequence.
        is_bound: whether fewer may be read, because `logit_error` or `select_p` decides.
        chosen: for each token that is chosen; 0 where no kernel chooses.
        held: that the cache holds for each token of context, in these layers, with what is scored; dense: dense_token.
    """

    token: int
    dense_token: int
    step: int
    dense_step: int
    is_bound: bool
    chosen: int
    held: int


@dataclass(frozen=True)
class Decoding:
    """What decodes after a prompt, with the cache that `generate` gets by itself.

    Attributes:
        backends: how many layers each backend takes.
        layout: "tiled"; "growing"; "model's own" where keys do not come straight from a cache.
        layers: how many layers of the cache are of which kind, such as {"tiled": 3, "ring": 15}; "scored" are those in
            the tiled layout that choose tokens.
        sliding: how many layers see a window only, so that AQUA saves nothing there.
        untiled: why the cache is not tiled; None when it is.
        recorded: whether steps are recorded as a CUDA graph; unrecorded: why not.
        compiled: parts of the model that are compiled, by kind; left_out: reasons, and how many parts each keeps as
            they are.
        uncompiled: why nothing is compiled; None when something is, or steps are not recorded.
        unskipped: why every dimension is multiplied; None when some are left out.
        choice: how many tokens are chosen, such as "select_p=0.95"; empty where all are read.
        unchosen: why no kernel chooses them; None when one does, or all are read.
        bytes: what is read.
    """

    backends: dict[str, int]
    layout: str
    layers: dict[str, int]
    sliding: int
    untiled: str | None
    recorded: bool
    unrecorded: str | None
    compiled: dict[str, int]
    left_out: dict[str, int]
    uncompiled: str | None
    unskipped: str | None
    choice: str
    unchosen: str | None
    bytes: Bytes


@dataclass(frozen=True)
class LastCall:
    """What the last call of `generate` did.

    Attributes:
        layout: of its cache: "tiled", "plain", "growing", "no", or what it was given.
        untiled: why it got no cache of ours; None when it got one, or its own was tiled.
        steps, replays: decoding steps, and those of them replayed; seconds: spent on recording.
        unreplayed: why the last step was not replayed; None when it was, or nothing prevented it.
    """

    layout: str
    untiled: str | None
    steps: int
    replays: int
    seconds: float
    unreplayed: str | None


@dataclass(frozen=True)
class Explanation:
    """What `Attachment.explain` found; `str` of it is a few short lines.

    Attributes:
        length, batch: tokens of each sequence, and sequences, that it is for.
        dense: attention layers that stay dense.
        prompt, decoding: what will happen; decoding is None where nothing is decoded, as in an encoder.
        last: what did happen in the last call of `generate`; None before it.
    """

    length: int
    batch: int
    dense: int
    prompt: Prompt
    decoding: Decoding | None
    last: LastCall | None

    @property
    def reason(self) -> str | None:
        """What prevents something faster in decoding, the last call's own first; None when nothing does."""
        return next(self._reasons(), None)

    @property
    def remedy(self) -> str:
        """The one setting that would change that; empty where none would."""
        return remedy_of(self.reason)

    def _reasons(self) -> Iterator[str]:
        last, now = self.last, self.decoding
        found = [] if last is None else [last.untiled, last.unreplayed]
        if now is not None:
            # What `min_length` is for is no obstacle.
            unskipped = now.unskipped if remedy_of(now.unskipped) else None
            found += [now.untiled, now.unchosen, now.unrecorded, now.uncompiled, unskipped]
        return (each for each in found if each and each not in (*NATURAL, FROM_GROWING))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        found = asdict(self) | {"reason": self.reason, "remedy": self.remedy}
        found["prompt"]["remedy"] = remedy_of(self.prompt.reason)
        return found

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(found: Explanation) -> Iterator[str]:
    prompt, last = found.prompt, found.last
    why = f", because {said(prompt.reason)}" if prompt.reason else ""
    how = ", dense (select_in)" if prompt.is_dense else ""
    yield f"prompt of {found.length} tokens: {_counted(prompt.backends)}{how}{why}"
    if found.decoding is not None:
        yield from _decoding_lines(found.decoding, found.length, found.batch)
    if found.dense:
        yield f"  {_layers(found.dense)} dense"
    if found.reason:
        yield f"  not faster, because {said(found.reason, '' if found.remedy else 'no setting changes that')}"
    if last is not None:
        replayed = f"{last.replays} of {last.steps} steps replayed" if last.replays else f"{last.steps} steps"
        seconds = f", recorded in {last.seconds:.2f} s" if last.seconds else ""
        yield f"last call: {last.layout} cache, {replayed}{seconds}"


def _decoding_lines(decoding: Decoding, length: int, batch: int) -> Iterator[str]:
    recorded = "recorded as a CUDA graph" if decoding.recorded else f"not recorded ({decoding.unrecorded})"
    yield f"decoding after {length} tokens: {_counted(decoding.backends)}, {decoding.layout} cache, steps {recorded}"
    yield f"  keys and values read: {_read(decoding, batch)}"
    if decoding.choice:
        by = f"plain torch, because {said(decoding.unchosen)}" if decoding.unchosen else "a kernel"
        held, dense = _amount(decoding.bytes.held), _amount(decoding.bytes.dense_token)
        yield f"  keys and values held: {held} for each token of context (dense: {dense})"
        yield f"  {decoding.choice}: tokens are chosen by {by}"
    if decoding.sliding:
        total = sum(decoding.backends.values())
        yield f"  {decoding.sliding} of {_layers(total)} slide: they read their window only, AQUA saves nothing there"
    if decoding.compiled:
        kinds = [f"{count} {kind}" for kind, count in decoding.compiled.items()]
        more = f" and {len(kinds) - MOST_KINDS} more kinds" if len(kinds) > MOST_KINDS else ""
        yield f"  compiled: {', '.join(kinds[:MOST_KINDS])}{more}"
    for why, count in decoding.left_out.items():
        yield f"  not compiled: {count} parts ({why})"


def _read(decoding: Decoding, batch: int) -> str:
    read, most = decoding.bytes, "at most " if decoding.bytes.is_bound else ""
    tokens = "a new token" if batch == 1 else f"{batch} new tokens"
    step = f"{most}{_amount(read.step)} for {tokens} (dense: {_amount(read.dense_step)})"
    chosen = f" and {_amount(read.chosen)} for each one chosen" if read.chosen else ""
    each = f"{'' if chosen else most}{_amount(read.token)} for each token of context{chosen}"
    token = f"{each} (dense: {_amount(read.dense_token)}), "
    why = f"; {decoding.unskipped}" if decoding.unskipped and not remedy_of(decoding.unskipped) else ""
    return f"{token if read.dense_token else ''}{step}{why}"


def _amount(count: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _counted(backends: dict[str, int]) -> str:
    if len(backends) == 1:
        return next(iter(backends))
    return ", ".join(f"{name} ({_layers(count)})" for name, count in backends.items())


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
