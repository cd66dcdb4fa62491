# SPDX-License-Identifier: Apache-2.0
"""Projections that an evaluation calibrates for itself, kept in its results folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqua_attention.calibration.checkpoint import calibrated_weights, discard
from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.run import calibrate
from aqua_attention.data.text import text_digest, token_windows, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import dtype_of, file_digest, make_folder
from aqua_attention.evaluate.run import Progress
from aqua_attention.io.files import remove_leftovers
from aqua_attention.io.state import same_digest
from aqua_attention.model.capture import attention_layers
from aqua_attention.model.fingerprint import key_weight_digest


@dataclass(frozen=True)
class Calibration:
    """How projections are calibrated: from which text, and how much of it.

    Attributes:
        name: of the text, for people.
        text_sha256: of the text.
        tokens, context, seed: see `calibrate`.
    """

    name: str
    text_sha256: str
    tokens: int
    context: int
    seed: int


class Calibrator:
    """Calibrates one model, and keeps each result in `FOLDER/projections` and in memory.

    A stopped calibration goes on where it was when it is asked for again.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            name: the model, as the user named it.
            notice: told about a damaged file, or one of other weights, which is made again.
        """
        self.folder, self.name, self.model, self.tokenizer = folder / "projections", name, model, tokenizer
        self._notice = notice or (lambda message: None)
        self._kept: dict[Calibration, tuple[Projections, str]] = {}

    @cached_property
    def _weights(self) -> list[list[float]] | None:
        """Tells the model from another one of its name."""
        return key_weight_digest(attention_layers(self.model))

    def projections(
        self, calibration: Calibration, text: str, progress: Progress | None = None
    ) -> tuple[Projections, str]:
        """Projections, and the SHA-256 of their file.

        Args:
            text: the one that `calibration` means.

        Raises:
            AquaError: as `calibrate`; the text is another one, or has fewer tokens than asked for.
        """
        if calibration not in self._kept:
            path = self._path(calibration)
            found = self._load(path) or self._calibrate(calibration, text, path, progress)
            self._kept[calibration] = found, file_digest(path)
        return self._kept[calibration]

    def _path(self, calibration: Calibration) -> Path:
        run = asdict(calibration) | {"model": self.name, "dtype": dtype_of(self.model)}
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        # Names are the user's: a file takes of them what every system can store.
        plain = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in calibration.name)[:40]
        return self.folder / f"{plain}-{digest[:12]}.safetensors"

    def _load(self, path: Path) -> Projections | None:
        if not path.exists():
            return None
        try:
            found = Projections.load(path)
        except AquaError as error:
            self._notice(f"{error}; it is made again now")
            return None
        if same_digest(found.model.get("key_weights"), self._weights):
            return found
        self._notice(f"{path} is of other weights of {self.name}; it is made again now")
        return None

    def _calibrate(self, calibration: Calibration, text: str, path: Path, progress: Progress | None) -> Projections:
        if text_digest(text) != calibration.text_sha256:
            raise AquaError(f"the text {calibration.name!r} is not the one of this calibration: read it again")
        check_enough(self.tokenizer, calibration, text)
        make_folder(path.parent)
        partial = path.with_name(f"{path.name}.partial")
        if partial.exists() and not same_digest(calibrated_weights(partial), self._weights):
            self._notice(f"{partial} is of other weights of {self.name}; it is begun anew now")
            discard(partial)
        projections = calibrate(
            self.model,
            self.tokenizer,
            text,
            tokens=calibration.tokens,
            context=calibration.context,
            seed=calibration.seed,
            name=self.name,
            checkpoint=partial,
            resume=True,
            progress=progress,
        )
        projections.save(path)
        discard(partial)
        remove_leftovers(path)
        return projections


def check_enough(tokenizer: PreTrainedTokenizerBase, calibration: Calibration, text: str) -> None:
    """Raise AquaError when `text` has fewer tokens than `calibration` says, which would give it a wrong name."""
    if calibration.tokens < calibration.context:
        raise AquaError(
            f"calibration tokens are {calibration.tokens}, fewer than one window of {calibration.context}: give more "
            "tokens or shorter windows"
        )
    ids, prefix = tokenize(tokenizer, text)
    windows = token_windows(
        ids, tokens=calibration.tokens, context=calibration.context, seed=calibration.seed, prefix=prefix
    )
    if len(windows) < calibration.tokens // calibration.context:
        raise AquaError(
            f"the text {calibration.name!r} has {len(ids)} tokens to calibrate on, {calibration.tokens} are asked for: "
            "give more text, or ask for fewer"
        )
