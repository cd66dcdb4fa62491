# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server does with AQUA: which projections, and which setting. Read once in each process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError

PROJECTIONS, CONFIG = "AQUA_PROJECTIONS", "AQUA_CONFIG"
"""Environment variables: a projections file; and a preset's name or the fields of an `AquaConfig` as JSON.

Every process of a server inherits them, and vLLM's CPU platform takes a backend only from a plugin, which is given
nothing else.
"""
UNSERVED = {"h2o_ratio": 1.0, "logit_error": None}
"""Knobs that a server cannot follow yet, and the values that do nothing."""


@dataclass(frozen=True)
class Serving:
    """Projections and setting of this server."""

    projections: Projections
    config: AquaConfig

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
        if config.s_ratio > 0 and config.sink + config.recent > 0:
            raise AquaError(
                f"{CONFIG}: s_ratio is {config.s_ratio:g} with an exact window of {config.sink} + {config.recent} "
                "tokens, which store every dimension, and vLLM's pages are of one width: set sink and recent to 0"
            )
        try:
            return cls(Projections.load(Path(file)), config)
        except AquaError as error:
            raise AquaError(f"{PROJECTIONS}: {error}") from error


@cache
def serving() -> Serving:
    """Of this process."""
    return Serving.of(os.environ.get(PROJECTIONS), os.environ.get(CONFIG))


def _config(setting: str) -> AquaConfig:
    if not setting.lstrip().startswith("{"):
        return AquaConfig.preset(setting)
    try:
        fields = json.loads(setting)
    except json.JSONDecodeError as error:
        raise AquaError(f"{CONFIG} is {setting!r}: it is no JSON ({error})") from error
    try:
        return AquaConfig.from_dict(fields)
    except AquaError as error:
        raise AquaError(f"{CONFIG}: {error}") from error
