# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

import os

from aqua_attention.vllm.settings import PROJECTIONS

NAME = "AQUA"
CLASS = "aqua_attention.vllm.backend.AquaBackend"


def register() -> None:
    """Make the backend known as `--attention-backend AQUA`. Calling it again changes nothing.

    vLLM's CPU platform ignores the backend that is asked for and takes its own. There AQUA stands in for that one
    where `AQUA_PROJECTIONS` is set.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, CLASS)
    if current_platform.is_cpu() and os.environ.get(PROJECTIONS):
        register_backend(AttentionBackendEnum.CPU_ATTN, CLASS)
