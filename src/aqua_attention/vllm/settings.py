# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server does with AQUA: which projections, and which setting. Read once in each process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AUTO, AquaConfig
from aqua_attention.errors import AquaError

INT8 = "int8_per_token_head"
"""The `kv_cache_dtype` that goes with `bits` 8: a byte an element, and room for scales."""
PROJECTIONS, CONFIG = "AQUA_PROJECTIONS", "AQUA_CONFIG"
"""Environment variables: a projections file; and a preset's name or the fields of an `AquaConfig` as JSON,
which may name a `preset`, too.

Every process of a server inherits them, and vLLM's CPU platform takes a backend only from a plugin, which is given
nothing else.
"""
UNSERVED = {"h2o_ratio": 1.0, "logit_error": None}
"""Knobs that a server cannot follow yet, and the values that do nothing."""
SCORE_BITS = 8
"""Of the copy of the keys that tokens are chosen by, which lies in vLLM's pages."""


@dataclass(frozen=True)
class Serving:
    """Projections, their file, and the setting of this server."""

    projections: Projections
    file: str
    config: AquaConfig

    def __str__(self) -> str:
        """For the log: what differs from the defaults, and which projections."""
        usual = AquaConfig().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != usual[name]}
        setting = ", ".join(f"{name} {value}" for name, value in ({"k_ratio": self.config.k_ratio} | changed).items())
        return f"{setting}; projections {self.file} for {self.projections.fits}"

    @classmethod
    def of(cls, file: str | None, setting: str | None) -> Serving:
        """From the values of the two variables; an AquaError that names the variable and the remedy."""
        if not file:
            raise AquaError(f"{PROJECTIONS} is not set: name a file made by `aqua calibrate`")
        config = _config(setting or "{}")
        for name, nothing in UNSERVED.items():
            if (value := getattr(config, name)) != nothing:
                raise AquaError(f"{CONFIG}: {name} is {value!r}, which is not served in vLLM yet: leave it out")
        if config.bits == 4:
            raise AquaError(f"{CONFIG}: bits is 4, which is not served in vLLM: set it to 8, or leave it out")
        if config.chooses_tokens and config.score_bits != SCORE_BITS:
            raise AquaError(
                f"{CONFIG}: score_bits is {config.score_bits}, and vLLM's pages hold what tokens are chosen by in "
                f"{SCORE_BITS} bits: set it to {SCORE_BITS}"
            )
        if config.chooses_tokens and config.bits is not None:
            raise AquaError(
                f"{CONFIG}: bits is {config.bits} with {config.choice}, which is not served in vLLM yet: "
                "leave one of them out"
            )
        if config.s_ratio > 0 and config.sink + config.recent > 0:
            raise AquaError(
                f"{CONFIG}: s_ratio is {config.s_ratio:g} with an exact window of {config.sink} + {config.recent} "
                "tokens, which store every dimension, and vLLM's pages are of one width: set sink and recent to 0"
            )
        if config.min_length == AUTO:
            raise AquaError(f"{CONFIG}: min_length is {AUTO!r}, which a server has no profile for: give a number")
        try:
            return cls(Projections.load(Path(file)), file, config)
        except AquaError as error:
            raise AquaError(f"{PROJECTIONS}: {error}") from error


@cache
def serving() -> Serving:
    """Of this process."""
    return Serving.of(os.environ.get(PROJECTIONS), os.environ.get(CONFIG))


def _config(setting: str) -> AquaConfig:
    try:
        if not setting.lstrip().startswith("{"):
            return AquaConfig.preset(setting)
        return AquaConfig.from_dict(json.loads(setting))
    except json.JSONDecodeError as error:
        raise AquaError(f"{CONFIG} is {setting!r}: it is no JSON ({error}), give a preset's name or JSON") from error
    except AquaError as error:
        raise AquaError(f"{CONFIG}: {error}") from error
