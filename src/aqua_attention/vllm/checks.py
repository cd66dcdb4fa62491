# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server is asked to do and AQUA does not: said when the engine starts, in one line with its remedy."""

from __future__ import annotations

import os
import warnings
from typing import Any, NoReturn

from aqua_attention.errors import AquaError
from aqua_attention.vllm.settings import CONFIG, INT8, PROJECTIONS, serving

TESTED = ("0.26", "0.32")
"""Versions of vLLM whose engine AQUA was run in."""
ALLOW = "AQUA_ALLOW_UNTESTED_VLLM"
"""Environment variable: 1 lets other versions pass."""
OTHERWISE = f"choose another backend, and unset {PROJECTIONS}"
LATENT = f"this model has latent attention (MLA), which AQUA does not serve: {OTHERWISE}"


def check_version(version: str) -> None:
    """An AquaError for a version that AQUA was not tested with; a warning where that is allowed."""
    if version.startswith(tuple(f"{each}." for each in TESTED)):
        return
    tested = f"vLLM is {version}, and AQUA was tested with {' and '.join(TESTED)}"
    if os.environ.get(ALLOW) != "1":
        raise AquaError(f"{tested}: install one of these, or set {ALLOW}=1 to try")
    warnings.warn(f"{tested}: answers may be wrong", stacklevel=2)


def why_not(config: Any) -> str | None:
    """Why AQUA cannot serve what a `VllmConfig` asks for; None when it can."""
    model, parallel, dtype = config.model_config, config.parallel_config, config.cache_config.cache_dtype
    if model.use_mla:
        return LATENT
    if model.is_mm_prefix_lm:
        return f"this model attends to images in both directions, which AQUA does not serve: {OTHERWISE}"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            return f"{name} is {size}, and AQUA does not split a sequence over GPUs: set it to 1"
    if serving().config.chooses_tokens and not _pages_have_room():
        return (
            f"vLLM is {_version()}, whose pages have no room for what tokens are chosen by: install 0.30 or newer, or "
            f"leave select_p and select_tokens out of {CONFIG}"
        )
    if serving().config.chooses_tokens and parallel.use_ubatching:
        return (
            "halves of a batch run at once (enable_dbo or ubatch_size), and what tokens are chosen in is for one step: "
            "leave both out"
        )
    if serving().config.bits == 8:
        if dtype != INT8:
            return f"kv_cache_dtype is {dtype}, and {CONFIG} asks for bits 8: set it to {INT8}"
    elif dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        return f"kv_cache_dtype is {dtype}, and AQUA stores keys and values in the model's dtype: leave it out"
    if config.kv_transfer_config is not None:
        name = config.kv_transfer_config.kv_connector
        return (
            f"kv_connector is {name}, and whoever reads AQUA's pages elsewhere would take rotated keys for plain ones: "
            "leave kv_transfer_config and kv_offloading_size out"
        )
    if config.speculative_config is not None:
        method = config.speculative_config.method
        return f"speculative decoding ({method}) is not served by AQUA yet: leave speculative_config out"
    return None


def check_engine(config: Any) -> None:
    """An AquaError where AQUA cannot serve what a `VllmConfig` asks for; else the log says once what it does."""
    from vllm.logger import init_logger

    if reason := why_not(config):
        raise AquaError(reason)
    # Only loggers below vLLM's own are shown.
    init_logger("vllm.aqua").info_once("AQUA attention: %s", str(serving()))


def _version() -> str:
    from vllm import __version__

    return __version__


def _pages_have_room() -> bool:
    """Whether a backend may say how many bytes a page has, and vLLM makes them of any content."""
    from aqua_attention.vllm.versions import LAYOUTS

    return LAYOUTS is not None


class NoLatentAttention:
    """What vLLM's CPU platform gets for latent attention; it would take a dense one of its own and not ask."""

    @staticmethod
    def get_name() -> NoReturn:
        """The first that vLLM asks of a backend."""
        raise AquaError(LATENT)
