# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

import os
from typing import Any

from aqua_attention.vllm.settings import PROJECTIONS

NAME = "AQUA"
CLASS = "aqua_attention.vllm.backend.AquaBackend"
NO_LATENT = "aqua_attention.vllm.checks.NoLatentAttention"
ON_CPU = {"CPU_ATTN": CLASS, "CPU_MLA": NO_LATENT, "AMX_MLA": NO_LATENT}


def register() -> None:
    """Make the backend known, see `backend_name`. Calling it again changes nothing.

    vLLM's CPU platform ignores the backend that is asked for and takes its own. There AQUA stands in for that one
    where `AQUA_PROJECTIONS` is set. Where it is set, what is wrong with it, or with vLLM's version, is said here: the
    process that the user has started is the first to call this.
    """
    from vllm import __version__
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from aqua_attention.vllm.checks import check_version
    from aqua_attention.vllm.settings import serving

    is_wanted = bool(os.environ.get(PROJECTIONS))
    if is_wanted:
        check_version(__version__)
        serving()
    if backend_name() == NAME:
        if NAME not in AttentionBackendEnum.__members__:
            register_backend(NAME, CLASS)
            # vLLM's spawned processes read their configuration, and the member in it, before they load plugins.
            AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (_member, ())
    elif is_wanted or not AttentionBackendEnum.CUSTOM.is_overridden():  # another plugin may have it
        register_backend(AttentionBackendEnum.CUSTOM, CLASS)
    if is_wanted and current_platform.is_cpu():
        for name in ON_CPU.keys() & AttentionBackendEnum.__members__.keys():
            register_backend(AttentionBackendEnum[name], ON_CPU[name])


def _member() -> Any:
    """The backend in vLLM's registry, in a process that may not know it yet."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[NAME]


def backend_name() -> str:
    """What `--attention-backend` takes: AQUA, or CUSTOM where vLLM's registry has no place for other names."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return NAME if hasattr(AttentionBackendEnum, "register") else "CUSTOM"
