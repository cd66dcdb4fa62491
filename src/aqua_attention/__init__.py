# SPDX-License-Identifier: Apache-2.0
"""AQUA attention: multiply only the query dimensions that matter (arXiv 2509.11155).

In the order of use:

    calibrate        learn the projections of a model from a text, once
    calibrate_inputs the same from images, or from whatever else a model reads
    Projections      the learned rotations; save, load, check
    AquaConfig       the knobs: what is multiplied (k_ratio, ...) and what is stored (s_ratio, bits, h2o_ratio)
    apply            AQUA in a transformers model, as a context manager
    AquaCache        a cache that is filled under it; made by `Attachment.new_cache`
    AquaError        every mistake of a user, with its remedy

Names load on first use, so that importing the package (and `aqua --help`) is quick and changes nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aqua_attention.attach.apply import Attachment as Attachment
    from aqua_attention.attach.door import apply as apply
    from aqua_attention.cache.cache import AquaCache as AquaCache
    from aqua_attention.calibration.projections import Projections as Projections
    from aqua_attention.calibration.run import calibrate as calibrate
    from aqua_attention.calibration.run import calibrate_inputs as calibrate_inputs
    from aqua_attention.config import AquaConfig as AquaConfig
    from aqua_attention.data.models import load_model as load_model
    from aqua_attention.data.text import load_text as load_text
    from aqua_attention.errors import AquaError as AquaError
    from aqua_attention.version import __version__ as __version__

_HOME = {
    "AquaCache": "cache.cache",
    "AquaConfig": "config",
    "AquaError": "errors",
    "Attachment": "attach.apply",
    "Projections": "calibration.projections",
    "__version__": "version",
    "apply": "attach.door",
    "calibrate": "calibration.run",
    "calibrate_inputs": "calibration.run",
    "load_model": "data.models",
    "load_text": "data.text",
}

__all__ = sorted(_HOME)


def lazy(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names load on first use, each from its module in `homes`."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load


__getattr__ = lazy(__name__, _HOME)
